"""The feature representation layer f, the projection g, their EMA copies, and the training loop (Sec. 3.2)."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rcp.config import Config
from rcp.graphs import captured
from rcp.losses import relaxed_contrastive
from rcp.optimizer import AdamP
from rcp.similarity import contextual, pairwise, soft_labels, squared_distances

logger = logging.getLogger("rcp")


class Representation(nn.Module):
    """f: p -> f(p) and g: f(p) -> z, both linear. After training only f is kept."""

    def __init__(self, in_dim: int, config: Config):
        super().__init__()
        self.f = nn.Linear(in_dim, config.dim, bias=config.bias)
        self.g = nn.Linear(config.dim, config.projection, bias=config.bias) if config.projection else nn.Identity()
        if config.init == "orthogonal":
            for layer in (self.f, self.g):
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)

    def forward(self, p: Tensor) -> Tensor:
        """z = g(f(p)). p: (N, D) -> (N, projection); f and g are linear, so z = (G F) p is one product."""
        if isinstance(self.g, nn.Identity):
            return self.f(p)
        bias = None if self.f.bias is None else self.g.weight @ self.f.bias + self.g.bias
        return nn.functional.linear(p, self.g.weight @ self.f.weight, bias)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, gamma: float) -> None:
    """Eq. 8: θ̄ ← γ θ̄ + (1 - γ) θ."""
    for theta_bar, theta in zip(teacher.parameters(), student.parameters(), strict=True):
        theta_bar.lerp_(theta, 1 - gamma)


@torch.no_grad()
def similarity_targets(z_bar: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 6 for one mini-batch. z_bar: (N, d) of the teacher -> (ω, ω^P), each (N, N)."""
    c = config
    d2 = squared_distances(nn.functional.normalize(z_bar) if c.normalize_teacher else z_bar)
    variant = {"gate": c.gate, "self_neighbour": c.self_neighbour, "expansion": c.expansion, "empty": c.empty_expansion}
    omega_c = contextual(d2, c.k, c.k_half, **variant)
    omega_p = pairwise(d2, c.sigma)
    return soft_labels(omega_p, omega_c, config.alpha), omega_p


def mini_batches(pictures: int, patches: int, config: Config, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields one epoch of flat patch indices, each (batch,): every patch at most once.

    ``batch_pictures=0`` shuffles the patches of the whole set; n draws ``batch_size`` patches out of n pictures at a time.
    """
    if config.batch_pictures == 0:
        total = pictures * patches
        size = min(config.batch_size, total)
        order = torch.randperm(total, generator=generator)
        batches = order.split(size)
        yield from (
            batch for batch in batches if len(batch) == size or (not config.drop_last and len(batch) > config.k)
        )
        return
    some = min(config.batch_pictures, pictures)
    order = torch.randperm(pictures, generator=generator)
    for chosen in order.split(some):
        pool = (chosen[:, None] * patches + torch.arange(patches)).flatten()
        if len(chosen) == some or not config.drop_last:
            yield pool[torch.randperm(len(pool), generator=generator)[: config.batch_size]]


def train(
    features: Tensor,
    config: Config,
    log: Callable[[str], None] = print,
    each_epoch: Callable[[int, nn.Linear], None] | None = None,
) -> tuple[nn.Linear, list[dict]]:
    """Trains f on the patch features of normal pictures and returns it with one row per epoch.

    The loss can rise while the EMA target moves: it is no sign of success or failure. ω^P near 0 or near 1 everywhere
    means that sigma does not fit the scale of z̄; its quantiles are in every row.

    Mini-batches are gathered from ``features`` where it lies. A step never waits for the device; on a GPU it is one CUDA graph.

    Args:
        features: (n, h · w, D) float16 or float32, on the device to train on.
        each_epoch: called after every epoch with its number and f, which goes on changing (Figure 3 keeps copies).

    Returns:
        f, and rows with epoch, loss, omega_p_05, omega_p_50, omega_p_95, seconds.

    Raises:
        ValueError: the whole set has no more than k patches.
        FloatingPointError: the loss is NaN or infinite; names epoch, step and the likely cause.
    """
    n, patches, in_dim = features.shape
    device = features.device
    flat = features.reshape(-1, in_dim)
    smallest = len(flat) if config.batch_pictures == 0 else patches
    if min(config.batch_size, smallest) <= config.k:
        raise ValueError(f"k: expected fewer than the {smallest} patches of a mini-batch, got {config.k}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = Representation(in_dim, config).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    steps = sum(1 for _ in mini_batches(n, patches, config, torch.Generator()))
    parameters = list(student.parameters())
    optimizer = AdamP(parameters, learning_rates(config, steps), config.weight_decay)

    def step(index: Tensor) -> tuple[Tensor, Tensor]:
        """One mini-batch, index (batch,) into flat -> the loss and ω^P; nothing in it waits for the device."""
        p = flat.index_select(0, index).float()
        omega, omega_p = similarity_targets(teacher(p), config)
        loss = relaxed_contrastive(student(p), omega, config.margin, pairs=config.pairs, diagonal=config.diagonal)
        optimizer.step(torch.autograd.grad(loss, parameters))
        update_ema(teacher, student, config.gamma)
        return loss.detach(), omega_p

    usual = min(config.batch_size, smallest)
    replay = step
    if features.is_cuda:
        state, example = [*optimizer.state, *teacher.parameters()], torch.arange(usual, device=device)
        replay = captured(step, state, [example], what="training")
    rows = []
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        losses = torch.empty(steps, device=device)
        batches = list(mini_batches(n, patches, config, generator))
        on_device = torch.cat(batches).to(device).split([len(batch) for batch in batches])
        for i, index in enumerate(on_device):
            losses[i], omega_p = (replay if len(index) == usual else step)(index)
        rows.append(_row(epoch, losses, omega_p, time.perf_counter() - started))
        log(_line(rows[-1], config.epochs))
        if each_epoch:
            each_epoch(epoch, student.f)
    return student.f.requires_grad_(False), rows


def learning_rates(config: Config, steps: int) -> Tensor:
    """Cosine annealing from lr to 0: (epochs · steps,) float64, changing with every step or with every epoch."""
    length = config.epochs * (steps if config.cosine == "step" else 1)
    rates = config.lr * (1 + torch.cos(math.pi * torch.arange(length, dtype=torch.float64) / length)) / 2
    return rates if config.cosine == "step" else rates.repeat_interleave(steps)


def _row(epoch: int, losses: Tensor, omega_p: Tensor, seconds: float) -> dict:
    finite = losses.isfinite()
    if not finite.all():
        step = int((~finite).nonzero()[0]) + 1
        raise FloatingPointError(
            f"loss is {losses[step - 1].item()} at epoch {epoch}, step {step} of {len(losses)}; likely cause: a learning rate that is "
            f"too high, or NaN in the features"
        )
    off_diagonal = omega_p[~torch.eye(len(omega_p), dtype=torch.bool, device=omega_p.device)]
    low, middle, high = (
        off_diagonal[:: max(1, len(off_diagonal) // 200_000)]
        .quantile(torch.tensor([0.05, 0.5, 0.95], device=omega_p.device))
        .tolist()
    )
    return {
        "epoch": epoch,
        "loss": losses.mean().item(),
        "omega_p_05": low,
        "omega_p_50": middle,
        "omega_p_95": high,
        "seconds": round(seconds, 3),
    }


def _line(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>3}/{epochs}  loss {row['loss']:.4f}  "
        f"ω^P 5/50/95 % {row['omega_p_05']:.3f} {row['omega_p_50']:.3f} {row['omega_p_95']:.3f}  {row['seconds']:.1f} s"
    )
