"""The refinement network (Appendix D): coarse patch scores in, a fine score map out; trained on simulated anomalies only."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rcp import paths
from rcp.backbone import normalize
from rcp.config import check_type, nearest
from rcp.scoring import center_and_deviation, score_maps
from rcp.synthesis import (
    DRAWN,
    Simulation,
    check_side,
    draw_textures,
    load_textures,
    simulate,
    texture_files,
    without_object,
)

logger = logging.getLogger("rcp")


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Hyper-parameters of the refinement network and its training (Appendix D.1); immutable, checked on construction.

    simulation: of the anomalies it is trained on; "structure" is the paper's choice (Table S7) [P].
    textures: folder of pictures for "texture" and "mixture"; "" is DTD in the data folder, "drawn" makes them up (the demo).
    texture_count: textures of that folder that are drawn of, chosen by ``seed``; they are held in memory [?].
    inputs: what the network sees: the normalised "map" of patch scores, "features" (how far f(p) lies from its nearest bank entry in
        each dimension) and the "picture", joined with "+"; the map alone carries over best to real defects
        (benchmarks/refinement_inputs.py) [?].
    stride: pixels of the picture per cell of the network's grid, a power of two [?].
    channels: of the residual blocks and of each atrous convolution [?].
    rates: of the parallel atrous convolutions; 6, 12, 18 [I].
    skip: the network's output is added to the normalised map instead of replacing it, so that training starts from it [?].
    beta: of the normalisation by Eq. 11; 1.4826, with which the median deviation of normal scores is their standard deviation.
    outlier: such deviations at which the map alone has even odds of a defect; 3.5 is Iglewicz and Hoaglin's bound [?].
    epochs, batch_size, momentum: 500, 16, 0.9 [P].
    lr_blocks, lr_head: learning rate of the residual blocks (and what leads to them) and of the head [I].
    schedule: learning rate "constant" or "cosine" (annealed to 0 over all steps) [?].
    weight_decay: 1e-4 [I].
    focal_gamma: of the focal loss; 4 [I].
    focal_weight, l1_weight: of the two losses; 1 and 0.1. DeSTSeg's 1 and 1 [I] pull what is uncertain to 0, and with it the weak
        middle of a large defect (in the same benchmark bottle gains more with them, and transistor loses).
    image_score: "map" is the maximum of the refined map; "patches" keeps the unrefined maximum of Eq. 10 [?].
    seed: of the initialisation, the order of the pictures and, with the simulation's own seed, of the anomalies.

    Raises:
        ValueError: a value outside its range, named.
    """

    simulation: Simulation = field(default_factory=lambda: Simulation(kind="structure"))
    textures: str = ""
    texture_count: int = 512
    inputs: str = "map"
    stride: int = 8
    channels: int = 32
    rates: tuple[int, ...] = (6, 12, 18)
    skip: bool = True
    beta: float = 1.4826
    outlier: float = 3.5
    epochs: int = 500
    batch_size: int = 16
    lr_blocks: float = 0.1
    lr_head: float = 0.01
    schedule: Literal["constant", "cosine"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    focal_gamma: float = 4.0
    focal_weight: float = 1.0
    l1_weight: float = 0.1
    image_score: Literal["map", "patches"] = "map"
    seed: int = 0

    INPUTS = ("map", "features", "picture")

    def __post_init__(self):
        object.__setattr__(self, "textures", str(self.textures))
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, check_type(name, kind, getattr(self, name)))
        for part in self.parts:
            if part not in self.INPUTS:
                raise ValueError(
                    f"inputs: expected some of {', '.join(self.INPUTS)} joined with '+', got {self.inputs!r}.{nearest(part, self.INPUTS)}"
                )
        expected = {
            "stride": (self.stride >= 1 and self.stride.bit_count() == 1, "a power of two"),
            "rates": (bool(self.rates) and min(self.rates, default=0) >= 1, "rates from 1, such as (6, 12, 18)"),
            "momentum": (0 <= self.momentum < 1, "a momentum from 0 and below 1"),
        }
        for name in ("texture_count", "channels", "beta", "outlier", "epochs", "batch_size", "lr_blocks", "lr_head"):
            expected[name] = (getattr(self, name) > 0, "a number above 0")
        for name in ("weight_decay", "focal_gamma", "focal_weight", "l1_weight", "seed"):
            expected[name] = (getattr(self, name) >= 0, "0 or more")
        for name, (holds, words) in expected.items():
            if not holds:
                raise ValueError(f"{name}: expected {words}, got {getattr(self, name)!r}")

    @property
    def parts(self) -> tuple[str, ...]:
        """``inputs`` as a tuple."""
        return tuple(self.inputs.split("+"))

    @classmethod
    def build(cls, **values) -> "Refinement":
        """From named values, those of the simulation among them (``kind``, ``grid``, ...; ``seed`` is the training's)."""
        own = {f.name for f in dataclasses.fields(cls)} - {"simulation"}
        of_simulation = {f.name for f in dataclasses.fields(Simulation)} - {"seed"}
        for name in values:
            if name not in own | of_simulation | {"simulation"}:
                raise ValueError(f"refine: unknown option {name!r}.{nearest(name, own | of_simulation)}")
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        base = values.pop("simulation", None) or Simulation(kind="structure")
        base = (
            Simulation(**{n: tuple(v) if isinstance(v, list) else v for n, v in base.items()})
            if isinstance(base, dict)
            else base
        )
        simulation = dataclasses.replace(base, **{n: v for n, v in values.items() if n in of_simulation})
        return cls(simulation=simulation, **{n: v for n, v in values.items() if n in own})

    def asdict(self) -> dict:
        """JSON-able values by name; ``build(**asdict())`` gives the same."""
        return dataclasses.asdict(self)

    def image_scores(self, scores: Tensor, maps: np.ndarray) -> np.ndarray:
        """patch scores (n, h, w), refined maps (n, S, S) -> (n,) float32, as ``image_score`` says."""
        return maps.max((1, 2)) if self.image_score == "map" else scores.flatten(1).amax(1).cpu().numpy()

    def identity(self) -> dict:
        """What a training depends on: the options, and the textures by their names and sizes, not by where they lie."""
        return self.asdict() | {"textures": self.textures_identity()}

    def textures_identity(self) -> str | None:
        """What the textures are, by their names and sizes, not where; None where the simulation needs none."""
        if self.simulation.kind == "structure" or self.textures == "drawn":
            return self.textures if self.simulation.kind != "structure" else None
        files = texture_files(self._textures_root())
        listed = "\n".join(f"{file.parent.name}/{file.name} {file.stat().st_size}" for file in files)
        return hashlib.blake2b(listed.encode(), digest_size=12).hexdigest()

    def _textures_root(self) -> Path:
        return Path(self.textures or paths.data_root() / "dtd")

    def load_textures(self, side: int) -> np.ndarray | None:
        """The textures that the simulation draws of: (m, side, side, 3) uint8, or None where it needs none.

        Raises:
            FileNotFoundError, ValueError: as :func:`rcp.synthesis.load_textures`.
        """
        check_side(side, self.simulation)
        if self.simulation.kind == "structure":
            return None
        if self.textures == "drawn":
            return draw_textures(min(DRAWN, self.texture_count), side, self.seed)
        return load_textures(self._textures_root(), side, self.texture_count, self.seed)


class Seen(NamedTuple):
    """What the detector makes of pictures, float32: patch scores (n, h, w) by Eq. 10, score maps (n, S, S), |f(p) - r*| (n, h · w, dim).

    distances: () where the network does not see the features.
    """

    scores: Tensor
    maps: Tensor
    distances: Tensor


class Refiner(nn.Module):
    """What was seen of pictures, and the pictures (n, S, S, 3) uint8 -> logits of "defective": (n, S, S) float32.

    Args:
        how: inputs, stride, channels, rates and skip are used.
        dim: of f(p).
        center, deviation: of normal patch scores (Eq. 11's median and β · MAD); the map enters as z = (s - center) / deviation.
    """

    def __init__(self, how: Refinement, dim: int, center: float = 0.0, deviation: float = 1.0):
        super().__init__()
        self.how, c = how, how.channels
        self.register_buffer("center", torch.tensor(float(center)))
        self.register_buffer("deviation", torch.tensor(float(deviation)))
        into = {"map": 1, "features": c, "picture": c}
        if "features" in how.parts:
            self.of_features = nn.Sequential(nn.Conv2d(dim, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        if "picture" in how.parts:
            steps = int(math.log2(how.stride))
            widths = [3, *(max(8, c >> (steps - i)) for i in range(1, steps + 1))] if steps else [3, c]
            widths[-1] = c
            self.of_picture = nn.Sequential(*(_normed(a, b, stride=2 if steps else 1) for a, b in pairwise(widths)))
        self.blocks = nn.Sequential(ResidualBlock(sum(into[p] for p in how.parts), c), ResidualBlock(c, c))
        self.head = AtrousPyramid(c, how.rates)
        # log odds of the map alone: even where z is an outlier
        self.slope, self.offset = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-how.outlier))

    def forward(self, seen: Seen, pictures: Tensor) -> Tensor:
        n, h, w = seen.scores.shape
        size = pictures.shape[1]
        side = -(-size // self.how.stride)
        z = ((seen.maps - self.center) / self.deviation)[:, None]
        parts = []
        for name in self.how.parts:
            if name == "map":
                parts.append(_resized(z / self.how.outlier, side))  # of the order of 1 where there is a defect
            elif name == "features":
                distances = seen.distances.transpose(1, 2).reshape(n, -1, h, w)
                parts.append(_resized(self.of_features(distances / self.deviation), side))
            else:
                parts.append(_resized(self.of_picture(normalize(pictures)), side))
        found = _resized(self.head(self.blocks(torch.cat(parts, 1))), size)
        if self.how.skip:
            found = found + self.slope * z
        return (found + self.offset)[:, 0]

    @classmethod
    def restore(cls, how: Refinement, state: dict[str, Tensor]) -> "Refiner":
        """From the ``state_dict`` of a trained one."""
        first = next((value for name, value in state.items() if name.startswith("of_features.0.")), torch.empty(1, 1))
        refiner = cls(how, first.shape[1])
        refiner.load_state_dict(state)
        return refiner.eval().requires_grad_(False)

    def parameter_groups(self) -> list[dict]:
        """The head and the map's own two weights learn at ``lr_head``, all else at ``lr_blocks``."""
        head = [*self.head.parameters(), self.slope, self.offset]
        others = [p for p in self.parameters() if not any(p is q for q in head)]
        return [{"params": others, "lr": self.how.lr_blocks}, {"params": head, "lr": self.how.lr_head}]

    @torch.inference_mode()
    def refine(self, seen: Seen, pictures: np.ndarray) -> np.ndarray:
        """-> (n, S, S) float32 refined maps: how likely a pixel is defective by what was simulated, in [0, 1]."""
        pictures = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.center.device)
        return self(seen, pictures).sigmoid().cpu().numpy()


class ResidualBlock(nn.Module):
    """(n, c, y, x) -> (n, d, y, x): two 3 × 3 convolutions, added to their input (through a 1 × 1 one where c and d differ)."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.first, self.second = (
            _normed(c, d),
            nn.Sequential(nn.Conv2d(d, d, 3, padding=1, bias=False), nn.BatchNorm2d(d)),
        )
        self.shortcut = nn.Identity() if c == d else nn.Sequential(nn.Conv2d(c, d, 1, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.shortcut(x)).relu()


class AtrousPyramid(nn.Module):
    """(n, c, y, x) -> (n, 1, y, x): a 1 × 1 and parallel atrous convolutions and the picture's mean, joined (DeepLab's ASPP)."""

    def __init__(self, c: int, rates: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList([_normed(c, c, size=1), *(_normed(c, c, rate=r) for r in rates)])
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.ReLU())
        self.join = _normed((len(rates) + 2) * c, c, size=1)
        self.out = nn.Conv2d(c, 1, 1)
        nn.init.zeros_(self.out.weight)  # nothing is added to the map before anything is learnt
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        parts.append(self.whole(x).expand(-1, -1, *x.shape[2:]))
        return self.out(self.join(torch.cat(parts, 1)))


def _normed(c: int, d: int, *, size: int = 3, stride: int = 1, rate: int = 1) -> nn.Sequential:
    padding = rate * (size // 2)
    conv = nn.Conv2d(c, d, size, stride=stride, padding=padding, dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(d), nn.ReLU())


def _resized(x: Tensor, side: int) -> Tensor:
    return (
        x if x.shape[-1] == side else functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    )


def focal_and_l1(logits: Tensor, masks: Tensor, how: Refinement) -> Tensor:
    """Focal loss + L1 (Appendix D), means over all pixels. logits: (n, S, S) float, masks: (n, S, S) bool -> ().

    focal = -(1 - p_t)^γ log p_t, p_t the probability of what the mask says; L1 = |probability - mask|.
    """
    signed = torch.where(masks, logits, -logits)
    wrong = torch.sigmoid(-signed)  # 1 - p_t, which is also the L1 distance
    focal = -(wrong**how.focal_gamma * functional.logsigmoid(signed)).mean()
    return how.focal_weight * focal + how.l1_weight * wrong.mean()


def options(given: Refinement | dict | bool | None) -> Refinement | None:
    """What a detector's ``refine`` may be -> the options of its refinement network, or None.

    Raises:
        ValueError: neither, or an option that is unknown or out of range.
    """
    if given is None or given is False:
        return None
    if given is True:
        return Refinement()
    if isinstance(given, dict):
        return Refinement.build(**given)
    if not isinstance(given, Refinement):
        raise ValueError(f"refine: expected True, a Refinement or a dict of its options, got {given!r}")
    return given


@torch.inference_mode()
def see(detector, features: np.ndarray | Tensor, numbers: Sequence[int] | None = None) -> Seen:
    """p: (n, h · w, D) -> what the refinement network is shown of it.

    numbers: which training pictures these were, before a defect was simulated in them. They are scored against a bank made of
    other pictures: their own holds the very patches that were not changed, which would leave the network no noise to learn from.
    """
    represented = detector.represent_patches(torch.as_tensor(features))
    folds = detector.fold_banks_
    banks = [detector.bank_] * len(represented) if numbers is None else [folds[i % len(folds)] for i in numbers]
    scores = detector.score_patches(represented, () if numbers is None else banks)
    maps = torch.from_numpy(score_maps(scores, detector.config.image_size, detector.config.blur)).to(scores)
    if "features" not in detector.refine.parts:
        return Seen(scores, maps, torch.empty(0))
    found = [p - bank.entries[bank.nearest(p)] for p, bank in zip(represented, banks, strict=True)]
    return Seen(scores, maps, torch.stack(found).abs_())


def refined(detector, features: Tensor, pictures: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """p: (n, h · w, D), pictures: (n, S, S, 3) uint8 -> patch scores (n, h, w), image scores (n,), refined maps (n, S, S)."""
    seen = see(detector, features)
    maps = detector.refiner_.refine(seen, pictures)
    return seen.scores, detector.refine.image_scores(seen.scores, maps), maps


def fit(
    detector,
    pictures: np.ndarray,
    textures: np.ndarray | None = None,
    log: Callable[[str], None] = print,
    checkpoint: str | Path | None = None,
    names: Sequence[str | Path] | None = None,
) -> None:
    """Trains the refinement network of a fitted detector on simulated anomalies in its training pictures.

    Sets ``refiner_`` and ``refinement_history_``.

    Args:
        pictures: (n, S, S, 3) uint8, as the detector's ``fit`` saw them.
        textures, checkpoint, names: as :func:`train`.

    Raises:
        ValueError: the detector has no ``refine``, or no held-out scores (``calibration_folds``) to normalise by.
    """
    if detector.refine is None:
        raise ValueError("refine: expected options of the refinement (or True) when the detector was made, got None")
    if detector.train_patch_scores_ is None or not detector.fold_banks_:
        raise ValueError(
            "calibration_folds: expected a detector that was made with `refine`, and fitted with 2 or more folds and pictures "
            "(the refinement learns from held-out scores)"
        )
    center, deviation = center_and_deviation(detector.train_patch_scores_)
    with detector.timings_("refinement"):
        detector.refiner_, detector.refinement_history_ = train(
            pictures,
            lambda changed, numbers: see(detector, detector.extractor(changed), numbers),
            detector.refine,
            (center, detector.refine.beta * deviation or 1.0),
            textures,
            log,
            checkpoint,
            detector.device,
            names,
        )


def train(
    pictures: np.ndarray,
    see: Callable[[np.ndarray, np.ndarray], Seen],
    how: Refinement,
    normal: tuple[float, float],
    textures: np.ndarray | None = None,
    log: Callable[[str], None] = print,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    names: Sequence[str | Path] | None = None,
) -> tuple[Refiner, list[dict]]:
    """Trains a refinement network on simulated anomalies in normal pictures; -> it, and a row per epoch (loss, anomalous, seconds).

    Every epoch shows each picture once, with another anomaly. Draws follow the seeds and the epoch alone, so a run that goes on from
    a checkpoint ends where an uninterrupted one does.

    Args:
        pictures: (n, S, S, 3) uint8, normal.
        see: (pictures, their numbers) -> what the detector makes of them.
        normal: median and β · MAD of normal patch scores.
        textures: (m, S, S, 3) uint8, as :meth:`Refinement.load_textures` gives them.
        checkpoint: file that is written after every epoch and read where it exists; none where left out.
        names: of the pictures, for the notice that nothing stands out from the background of some.

    Raises:
        ValueError: no textures, pictures too small, a checkpoint of another training; before any work.
        FloatingPointError: the loss is NaN or infinite; names the epoch.
    """
    simulation = dataclasses.replace(how.simulation, seed=how.simulation.seed + how.seed)
    simulate(pictures[:1], simulation, textures)  # what is wrong with them is said before any work
    if (without := without_object(pictures, simulation).nonzero()[0]).size:
        first = Path(names[without[0]]).parts[-4:] if names is not None else ("picture", str(without[0]))
        logger.warning(
            "foreground: in %d of %d training pictures nothing, or less than 1 %% of the picture, stands out from a plain background "
            "by %g grey levels (first: %s); their simulated defects may lie anywhere. Of a texture that is as it should be; if they "
            "show an object, lower `tolerance`",
            len(without), len(pictures), simulation.tolerance, "/".join(first),
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        refiner = Refiner(how, see(pictures[:1], np.arange(1)).distances.shape[-1], *normal)
    refiner = refiner.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(refiner.parameter_groups(), momentum=how.momentum, weight_decay=how.weight_decay)
    batches = -(-len(pictures) // how.batch_size)
    full = [group["lr"] for group in optimizer.param_groups]
    rows = _resume(checkpoint, refiner, optimizer, how)
    for epoch in range(len(rows), how.epochs):
        order = np.random.default_rng([how.seed, epoch]).permutation(len(pictures))
        losses, seen_anomalies, started = [], 0, time.perf_counter()
        for i, chosen in enumerate(np.array_split(order, batches)):
            changed, masks = simulate(pictures[chosen], simulation, textures, epoch=epoch, numbers=chosen)
            done = (epoch * batches + i) / (how.epochs * batches)
            for group, lr in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2 if how.schedule == "cosine" else lr
            seen = Seen(*(part.clone() for part in see(changed, chosen)))  # autograd wants no inference tensors
            logits = refiner(seen, torch.from_numpy(changed).to(device))
            loss = focal_and_l1(logits, torch.from_numpy(masks).to(device), how)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            seen_anomalies += int(masks.any((1, 2)).sum())
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"loss of the refinement is {mean} at epoch {epoch + 1}; likely cause: a learning rate that is too high"
            )
        rows.append(
            {
                "epoch": epoch + 1,
                "loss": mean,
                "anomalous": seen_anomalies / len(pictures),
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
        _save(checkpoint, refiner, optimizer, how, rows)
        log(f"refinement epoch {epoch + 1:>3}/{how.epochs}  loss {mean:.5f}  {rows[-1]['seconds']:.1f} s")
    return refiner.eval().requires_grad_(False), rows


def _save(
    checkpoint: str | Path | None, refiner: Refiner, optimizer: torch.optim.Optimizer, how: Refinement, rows: list[dict]
) -> None:
    """Everything that the next epoch depends on, under a temporary name first."""
    if checkpoint is None:
        return
    tensors = {f"network.{name}": value for name, value in refiner.state_dict().items()}
    for i, parameter in enumerate(refiner.parameters()):
        tensors[f"momentum.{i}"] = optimizer.state[parameter]["momentum_buffer"]
    header = {"format": "rcp-refinement-checkpoint-1", "how": json.dumps(how.identity()), "rows": json.dumps(rows)}
    checkpoint = Path(checkpoint)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata=header)
    os.replace(temporary, checkpoint)


def _resume(
    checkpoint: str | Path | None,
    refiner: Refiner,
    optimizer: torch.optim.Optimizer,
    how: Refinement,
) -> list[dict]:
    """Puts the state of a checkpoint into network and optimiser; -> its rows, or [] where there is none."""
    if checkpoint is None or not Path(checkpoint).exists():
        return []
    try:
        with safe_open(checkpoint, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        aside = Path(checkpoint).with_suffix(".damaged")
        os.replace(checkpoint, aside)
        logger.warning(
            "checkpoint: %s is damaged (%s); it is set aside as %s, and the training starts anew",
            checkpoint, error, aside.name,
        )  # fmt: skip
        return []
    if header.get("how") != json.dumps(how.identity()):
        raise ValueError(f"checkpoint: {checkpoint} is of another training than {how}; remove it to start anew")
    refiner.load_state_dict({n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")})
    for i, parameter in enumerate(refiner.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{i}"].to(parameter)
    return json.loads(header["rows"])
