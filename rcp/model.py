"""The feature representation layer f, the projection g, their EMA copies, and the training loop (Sec. 3.2, Eq. 8)."""

import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rcp import fast
from rcp.backbone import ALONE
from rcp.checks import require
from rcp.config import Config
from rcp.fast import training
from rcp.losses import contextual, pairwise, relaxed_contrastive, soft_labels, squared_distances
from rcp.patches import pool
from rcp.progress import Log, say

EachEpoch = Callable[[int, nn.Linear], None]  # number of an epoch, and f after it
Trained = tuple[nn.Linear | None, list[dict]]  # f, None where p itself is scored, and a row for each epoch


class Representation(nn.Module):
    """f: p -> f(p) and g: f(p) -> z, both linear. After training only f is kept."""

    def __init__(self, in_dim: int, config: Config):
        super().__init__()
        self.f = nn.Linear(in_dim, config.dim)
        self.g = nn.Linear(config.dim, config.projection) if config.projection else nn.Identity()
        if config.init == "orthogonal":
            for weight in (parameter for parameter in self.parameters() if parameter.ndim == 2):
                nn.init.orthogonal_(weight)

    def forward(self, p: Tensor) -> Tensor:
        """z = g(f(p)). p: (N, D) -> (N, projection)."""
        if fast.usable() and isinstance(self.g, nn.Linear):  # both are linear, so z = (G F) p is one product
            bias = self.g.weight @ self.f.bias + self.g.bias
            return nn.functional.linear(p, self.g.weight @ self.f.weight, bias)
        return self.g(self.f(p))


def initial(features: Tensor, config: Config) -> Representation:
    """f and g before training, drawn from the seed. features: (n, h · w, D); only its size counts but for ``init="pca"``.

    Raises:
        ValueError: ``init="pca"`` with more dimensions than p has.
    """
    in_dim = features.shape[-1]
    with ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = Representation(in_dim, config)
    if config.init == "pca":
        require("dim", config.dim <= in_dim, f"at most {in_dim} (the size of p) with init='pca'", config.dim)
        mean, covariance = moments(features)
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(1).T[: config.dim]
        student.f.load_state_dict({"weight": directions, "bias": -directions @ mean})
    return student.to(features.device)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of all patches, float64. features: (..., D); 8,192 patches at a time.

    Raises:
        ValueError: all patches are the same.
    """
    parts = features.reshape(-1, features.shape[-1]).split(8192)
    count, mean = sum(map(len, parts)), torch.stack([x.double().sum(0) for x in parts]).sum(0)
    mean /= count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for x in parts:
        centred = (x.double() - mean).float()  # small numbers lose nothing in float32, which is much faster
        covariance += (centred.T @ centred).double()
    covariance /= count
    require("images", covariance.trace() > 0, "patches that differ", f"{count} patches with zero variance")
    return mean.cpu(), covariance.cpu()


def whitened(features: Tensor, config: Config) -> nn.Linear:
    """f = (C + λ · mean eigenvalue · I)^-1/2 in closed form, C the covariance of the training patches.

    features: (n, h · w, D). With aggregation="pooled", p is first pooled to ``dim`` as PatchCore's is; that is linear and part of f.

    Raises:
        ValueError: all patches are the same.
    """
    mean, covariance = moments(features)
    chain = torch.eye(len(mean), dtype=torch.float64)
    if config.aggregation == "pooled":
        chain = pool(chain, config.dim)  # (D, dim)
    eigenvalues, directions = torch.linalg.eigh(chain.T @ covariance @ chain)
    shrunk = eigenvalues.clamp_min(0) + config.whitening * eigenvalues.mean()
    weight = directions * shrunk.rsqrt() @ directions.T @ chain.T
    f = nn.Linear(*weight.T.shape).requires_grad_(False)
    f.load_state_dict({"weight": weight, "bias": -weight @ mean})
    return f.to(features.device)


def represent(features: Tensor, config: Config, log: Log = say, each_epoch: EachEpoch | None = None) -> Trained:
    """The f of ``config.representation`` and the history of its training: PatchCore, ReConPatch and their controls differ in this alone.

    Arguments as :func:`train`. Returns None for f where p itself is scored, and no history where nothing is trained.
    """
    if config.representation == "trained":
        return train(features, config, log, each_epoch)
    if config.representation == "random":
        return initial(features, config).f.requires_grad_(False), []
    return (whitened(features, config) if config.representation == "whitened" else None), []


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, gamma: float) -> None:
    """Eq. 8: θ̄ ← γ θ̄ + (1 - γ) θ."""
    for theta_bar, theta in zip(teacher.parameters(), student.parameters(), strict=True):
        theta_bar.lerp_(theta, 1 - gamma)


@torch.no_grad()
def targets(z_bar: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 6 for one mini-batch. z_bar: (N, d) of the teacher -> (ω, ω^P), each (N, N)."""
    d2 = squared_distances(nn.functional.normalize(z_bar) if config.normalize_teacher else z_bar)
    omega_p = pairwise(d2, config.sigma)
    return soft_labels(omega_p, contextual(d2, config.k, config.expansion), config.alpha), omega_p


def mini_batches(images: int, patches: int, config: Config, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields one epoch of flat patch indices, each (batch,): every patch at most once, what does not fill a batch left out.

    ``batch_images=0`` shuffles the patches of the whole set; n draws ``batch_size`` patches out of n images at a time.
    """
    if config.batch_images == 0:
        order = torch.randperm(images * patches, generator=generator)
        size = min(config.batch_size, len(order))
        yield from (batch for batch in order.split(size) if len(batch) == size)
        return
    some = min(config.batch_images, images)
    for chosen in torch.randperm(images, generator=generator).split(some):
        pool = (chosen[:, None] * patches + torch.arange(patches)).flatten()
        if len(chosen) == some:
            yield pool[torch.randperm(len(pool), generator=generator)[: config.batch_size]]


def optimizer_of(parameters: list[nn.Parameter], config: Config, steps: int):
    """AdamP, its learning rate annealed by a cosine from lr to 0 over all steps; has ``zero_grad()`` and ``step()``."""
    if fast.usable():
        return training.AdamP(parameters, config.lr, config.weight_decay, steps)
    from adamp import AdamP

    optimizer = AdamP(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


@torch.inference_mode(False)
@torch.enable_grad()
def train(features: Tensor, config: Config, log: Log = say, each_epoch: EachEpoch | None = None) -> Trained:
    """Trains f on the patch features of normal images and returns it with one row per epoch.

    The loss can rise while the EMA target moves: it is no sign of success or failure. ω^P near 0 or near 1 everywhere
    means that sigma does not fit the scale of z̄; its quantiles are in every row.

    Mini-batches are gathered from ``features`` where it lies. With the quick twin, a step never waits for the device, and is one
    CUDA graph on a GPU.

    Args:
        features: (n, h · w, D) float16 or float32, on the device to train on.
        each_epoch: called after every epoch with its number and f, which goes on changing (Figure 3 keeps copies).

    Returns:
        f, and rows with epoch, loss, omega_p_05, omega_p_50, omega_p_95, seconds.

    Raises:
        ValueError: the whole set has no more than k patches.
        FloatingPointError: the loss is NaN or infinite; names epoch, step and the likely cause.
    """
    fits = features.ndim == 3 and features.numel() > 0 and features.dtype != torch.bool
    require("features", fits, "patches (n, h · w, D)", tuple(features.shape))
    n, patches, in_dim = features.shape
    device, flat = features.device, features.reshape(-1, in_dim)
    batch = min(config.batch_size, patches * min(config.batch_images or n, n))
    require("k", config.k < batch, f"fewer than the {batch} patches of a mini-batch", config.k)
    student = initial(features, config)
    teacher = copy.deepcopy(student).requires_grad_(False)
    steps = sum(1 for _ in mini_batches(n, patches, config, torch.Generator()))
    optimizer = optimizer_of(list(student.parameters()), config, config.epochs * steps)

    def step(index: Tensor) -> tuple[Tensor, Tensor]:
        """One mini-batch, index (batch,) into flat -> the loss and ω^P."""
        p = flat.index_select(0, index).float()
        omega, omega_p = targets(teacher(p), config)
        loss = relaxed_contrastive(student(p), omega, config.margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(teacher, student, config.gamma)
        return loss.detach(), omega_p

    if features.is_cuda and fast.usable():
        state, example = [*optimizer.state, *teacher.parameters()], torch.arange(batch, device=device)
        step = fast.captured(step, state, [example], what="training")
    generator, rows = torch.Generator().manual_seed(config.seed), []
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        losses = torch.empty(steps, device=device)
        indices = torch.stack(list(mini_batches(n, patches, config, generator))).to(device)
        for i, index in enumerate(indices):
            losses[i], omega_p = step(index)
        rows.append(_row(epoch, losses, omega_p, time.perf_counter() - started))
        log(_line(rows[-1], config.epochs))
        if each_epoch:
            each_epoch(epoch, student.f)
    return student.f.requires_grad_(False), rows


def _row(epoch: int, losses: Tensor, omega_p: Tensor, seconds: float) -> dict:
    finite = losses.isfinite()
    if not finite.all():
        step, cause = int((~finite).nonzero()[0]), "a learning rate that is too high, or NaN in the features"
        where = f"epoch {epoch}, step {step + 1} of {len(losses)}"
        raise FloatingPointError(f"loss is {losses[step].item()} at {where}; likely cause: {cause}")
    off_diagonal = omega_p[~torch.eye(len(omega_p), dtype=torch.bool, device=omega_p.device)]
    some = off_diagonal[:: max(1, len(off_diagonal) // 200_000)]
    shares = {f"omega_p_{s}": some.quantile(int(s) / 100).item() for s in ("05", "50", "95")}
    return {"epoch": epoch, "loss": losses.mean().item(), **shares, "seconds": round(seconds, 3)}


def _line(row: dict, epochs: int) -> str:
    omega_p = " ".join(f"{row[f'omega_p_{share}']:.3f}" for share in ("05", "50", "95"))
    return f"epoch {row['epoch']:>3}/{epochs}  loss {row['loss']:.4f}  ω^P 5/50/95 % {omega_p}  {row['seconds']:.1f} s"
