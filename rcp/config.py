"""Every hyper-parameter of the method, once: default, meaning, range, where the value comes from, and the stage it belongs to.

Provenance marks: [P] printed in the paper; [I] inferred from the works it builds on; [?] stated nowhere, so an option.

The stages of a result are ``STAGES``, in order. What one depends on is ``config.upto(stage)``: nothing else names hyper-parameters
for that purpose, so one that is declared here cannot be forgotten there.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

STAGES = ("features", "training", "bank", "scores")


def option(
    stage: str | None,
    default: Any,
    meaning: str,
    *,
    above: float | None = None,
    least: float | None = None,
    without_f: bool = True,
) -> Any:
    """Declares a hyper-parameter.

    Args:
        stage: the first of ``STAGES`` whose result depends on it; None where no result does.
        meaning: what it is, with its provenance mark.
        above, least: its values lie above the one, or are the other or more.
        without_f: whether PatchCore, which trains nothing, depends on it too.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, or None, got {stage!r}")
    about = {"stage": stage, "meaning": meaning, "above": above, "least": least, "without_f": without_f}
    return field(default=default, metadata=about)


def of_f(default: Any, meaning: str, **limits: float) -> Any:
    """Declares a hyper-parameter of training f, which PatchCore does not have."""
    return option("training", default, meaning, without_f=False, **limits)


def nearest(name: str, valid) -> str:
    """`` Did you mean 'x'?`` for the valid name nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_type(name: str, kind: Any, value: Any) -> Any:
    """``value`` if it fits the annotation ``kind`` (a whole number becomes a float where one is meant).

    Raises:
        ValueError: names the argument, what was expected, what came, and the nearest choice.
    """
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise ValueError(
                f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.{nearest(value, choices)}"
            )
        return value
    kinds = (tuple,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    items = get_args(kind)[:1] if get_origin(kind) is tuple else ()
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if items and fits:
        fits = all(isinstance(v, items) and not isinstance(v, bool) for v in value)
    if not fits:
        words = (
            f"a list of {items[0].__name__}"
            if items
            else " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        )
        raise ValueError(f"{name}: expected {words}, got {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of one detector; immutable, checked on construction.

    Raises:
        ValueError: a value outside its range; the message names the argument, what was expected and what came.
    """

    resize: int = option("features", 256, "shorter side before the crop, pixels; 256, 366 or 512 [P]", above=0)
    image_size: int = option("features", 224, "side S of the centre crop, pixels; 224, 320 or 480 [P]", above=0)
    aspect: Literal["keep", "squash"] = option(
        "features", "keep", "resize the shorter side, or both sides (they differ on BTAD 03 only) [I]"
    )
    backbone: str = option("features", "wide_resnet50_2", "a torchvision or timm CNN by name [P]")
    weights: str = option("features", "IMAGENET1K_V1", 'a tag [I], a file (.safetensors, .pth), or "random:SEED"')
    layers: tuple[int, ...] = option("features", (2, 3), "hierarchy levels, 1 is stride 4 [P]")
    backbone_dtype: Literal["float32", "bfloat16"] = option(
        "features",
        "float32",
        "arithmetic of the CNN; bfloat16 is faster where the machine has it, and moves p by 1e-2 [?]",
    )
    patch_size: int = option("features", 3, "side of the neighbourhood that is aggregated, odd; 3 or 5 [P]", above=0)
    patch_dim: int = option(
        "features", 1024, "size that every level, then their concatenation, is pooled to [I]", above=0
    )
    feature_dtype: Literal["float16", "float32"] = option(
        "features", "float16", "how p is held and stored; what comes after is float32 [?]"
    )
    represent: bool = option("training", True, "True is ReConPatch; False is PatchCore, which scores p itself")
    dim: int = option("training", 512, "D_f, size of f(p), or the size that PatchCore's p is pooled to [P]", above=0)
    projection: int | None = of_f(128, "size of g's output, or None for no g (Table S4) [?]", above=0)
    bias: bool = of_f(True, "f and g have a bias [?]")
    init: Literal["default", "orthogonal"] = of_f("default", "initialisation of f and g; default is nn.Linear's [?]")
    epochs: int = of_f(120, "of training f; 60 for the 320 px ensemble [P]", above=0)
    lr: float = of_f(1e-5, "learning rate; 1e-6 for ensembles and 480 px [P]", above=0)
    weight_decay: float = of_f(1e-2, "of AdamP [P]", least=0)
    cosine: Literal["step", "epoch"] = of_f("step", "what the learning rate is annealed per [?]")
    batch_size: int = of_f(1024, "patches in a mini-batch, N of Eq. 7 [?]", above=0)
    drop_last: bool = of_f(True, "leave the incomplete last mini-batch of an epoch out [?]")
    batch_pictures: int = of_f(
        0, "0 shuffles the patches of the whole training set; n takes batch_size patches of n pictures [?]", least=0
    )
    k: int = of_f(5, "neighbours in N_k (Eq. 2) [P]", least=2)
    margin: float = of_f(1.0, "m of Eq. 7 [P]", least=0)
    alpha: float = of_f(0.5, "share of pairwise similarity in Eq. 6 [P]")
    sigma: float = of_f(1.0, "bandwidth of Eq. 1, divides the squared distance [?]", above=0)
    gamma: float = of_f(0.999, "momentum of the EMA copies, Eq. 8 [?]")
    normalize_teacher: bool = of_f(False, "divide z̄ by its length before Eq. 1 to 5 [?]")
    gate: bool = of_f(True, "Eq. 2 is zero unless j ∈ N_k(i) [P]; False drops the condition")
    self_neighbour: bool = of_f(True, "i counts among its own k nearest [?]")
    expansion: Literal["reciprocal", "plain"] = of_f(
        "reciprocal", "what Eq. 4 averages over [P], or all k/2 neighbours"
    )
    half_k: Literal["floor", "ceil"] = of_f("floor", "rounding of k/2 in Eq. 4 [?]")
    empty_expansion: Literal["self", "zero"] = of_f("self", "Eq. 4 where R_{k/2}(i) is empty: i alone, or 0 [?]")
    pairs: Literal["N", "N(N-1)"] = of_f("N", "what Eq. 7 divides by [P]")
    diagonal: bool = of_f(True, "keep the pairs i = j in Eq. 7; they add a constant and no gradient [P]")
    coreset_ratio: float = option("bank", 0.01, "share of all patches kept [P]")
    coreset_projection: int | None = option(
        "bank", None, "random projection before greedy selection, a size or None; PatchCore's is 128 [I]", above=0
    )
    coreset_start: Literal["mean", "random"] = option(
        "bank", "mean", "start at the patch farthest from the mean, or anywhere [I]"
    )
    neighbours: int = option("scores", 9, "b of Eq. 10 [?]", above=0)
    self_in_neighbours: bool = option("scores", True, "r* ∈ N_b(r*) [I]")
    squared: bool = option("scores", False, "D is the squared distance in Eq. 10 [?]")
    weighting: Literal["patches", "none"] = option(
        "scores", "patches", "Eq. 10's weight for every patch [P], or the plain distance"
    )
    blur: float = option("scores", 4.0, "σ of the Gaussian on score maps, pixels of the crop [I]", least=0)
    calibration_folds: int = option(
        "scores",
        2,
        "folds for the held-out training scores behind normal_threshold; 0 is none; no part of the method [?]",
        least=0,
    )
    seed: int = option("training", 0, "of initialisation, mini-batches, projection and random start", least=0)
    device: str = option(None, "auto", "auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        object.__setattr__(self, "weights", str(self.weights))
        if (
            isinstance(self.layers, int | str)
            or not all(isinstance(n, int) and n >= 1 for n in self.layers)
            or not self.layers
        ):
            raise ValueError(f"layers: expected hierarchy levels from 1 such as (2, 3), got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        kinds = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = check_type(f.name, kinds[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            if value is not None and (above := f.metadata["above"]) is not None:
                self._require(f.name, value > above, f"a number above {above}")
            if value is not None and (least := f.metadata["least"]) is not None:
                self._require(f.name, value >= least, f"{least} or more")
        self._require(
            "image_size",
            self.image_size <= self.resize,
            f"at most resize={self.resize} (the crop lies inside the picture)",
        )
        self._require("patch_size", self.patch_size % 2 == 1, "an odd number")
        self._require("alpha", 0 <= self.alpha <= 1, "a share from 0 (contextual only) to 1 (pairwise only)")
        self._require("gamma", 0 <= self.gamma <= 1, "a momentum from 0 to 1")
        self._require("coreset_ratio", 0 < self.coreset_ratio <= 1, "a share of the patches, above 0 and at most 1")
        self._require("k", self.k < self.batch_size, f"fewer than batch_size={self.batch_size} patches")
        self._require(
            "neighbours",
            self.neighbours >= 1 + self.self_in_neighbours,
            f"{1 + self.self_in_neighbours} or more (else Eq. 10 is 0)",
        )
        if not self.represent:
            self._require(
                "dim",
                self.dim <= self.patch_dim,
                f"at most patch_dim={self.patch_dim} (PatchCore pools, it cannot widen)",
            )

    def _require(self, name: str, holds: bool, expected: str):
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def __repr__(self) -> str:
        changed = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}
        return f"Config({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def build(cls, **values) -> "Config":
        """A Config from named values; an unknown name raises ValueError with the nearest valid one."""
        for name in values:
            if name not in cls.names():
                raise ValueError(
                    f"unknown hyper-parameter {name!r}.{nearest(name, cls.names())} Valid: {', '.join(cls.names())}"
                )
        if isinstance(values.get("layers"), list):
            values["layers"] = tuple(values["layers"])
        return cls(**values)

    def replace(self, **values) -> "Config":
        return self.build(**(dataclasses.asdict(self) | values))

    def asdict(self) -> dict[str, Any]:
        """JSON-able values by name."""
        return dataclasses.asdict(self) | {"layers": list(self.layers)}

    def upto(self, stage: str) -> dict[str, Any]:
        """What the result of a stage depends on: the JSON-able values of its hyper-parameters and of those of the stages before it.

        A PatchCore's leaves out what only f has, and the seed where nothing is drawn. ``weights`` is the name that was given;
        who compares results of different machines puts the content in its place (:func:`rcp.backbone.weights_identity`).
        """
        stages = STAGES[: STAGES.index(stage) + 1]
        values, found = self.asdict(), {}
        for f in dataclasses.fields(self):
            if f.metadata["stage"] in stages and (self.represent or f.metadata["without_f"]):
                found[f.name] = values[f.name]
        if not self.represent and self.coreset_projection is None and self.coreset_start == "mean":
            found.pop("seed", None)
        return found | {"extracted_dim": self.extracted_dim}

    @property
    def k_half(self) -> int:
        """k/2 of Eq. 4, rounded as ``half_k`` says."""
        return self.k // 2 if self.half_k == "floor" else math.ceil(self.k / 2)

    @property
    def extracted_dim(self) -> int:
        """Size of the extracted p: PatchCore's ``dim`` is pooled from ``patch_dim`` where that is exact, else extracted directly."""
        return self.patch_dim if self.represent or self.patch_dim % self.dim == 0 else self.dim


Config.__doc__ += "\n    Hyper-parameters:\n" + "".join(
    f"        {f.name}: {f.metadata['meaning']}; default {f.default!r}.\n" for f in dataclasses.fields(Config)
)
