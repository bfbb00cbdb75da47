"""Every hyper-parameter of the method, once: its default, its range, and where its value comes from.

Provenance marks: [P] printed in the paper; [I] inferred from the works it builds on; [?] stated nowhere, so an option.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


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

    Pictures
        resize: shorter side before the crop, pixels; 256, 366 or 512 [P].
        image_size: side S of the centre crop, pixels; 224, 320 or 480 [P].
        aspect: "keep" resizes the shorter side, "squash" both sides (they differ on BTAD 03 only) [I].

    Patch features p (Sec. 3.1)
        backbone: a torchvision or timm CNN by name; wide_resnet50_2 [P].
        weights: a tag (IMAGENET1K_V1 [I]), a file (.safetensors, .pth), or "random:SEED".
        layers: hierarchy levels, 1 is stride 4; (2, 3) [P].
        backbone_dtype: arithmetic of the CNN; "bfloat16" is faster where the machine has it, and moves the features by 1e-2 [?].
        patch_size: side of the neighbourhood that is aggregated, odd; 3 or 5 [P].
        patch_dim: size of p: every level is pooled to it, then their concatenation is; 1024 [I].
        feature_dtype: how p is held and stored, "float16" or "float32"; what comes after is float32 [?].

    Representation f, projection g and their training (Sec. 3.2)
        represent: True is ReConPatch; False is PatchCore, which scores p itself.
        dim: D_f, size of f(p), or the size PatchCore's p is pooled to; 512 [P].
        projection: size of g's output, or None for no g (Table S4) [?].
        bias: whether f and g have a bias [?].
        init: "default" (PyTorch's nn.Linear) or "orthogonal" [?].
        epochs: 120; 60 for the 320 px ensemble [P].
        lr: 1e-5; 1e-6 for ensembles and 480 px [P].
        weight_decay: of AdamP, 1e-2 [P].
        cosine: learning rate annealed per "step" or per "epoch" [?].
        batch_size: patches in a mini-batch (N of Eq. 7) [?].
        drop_last: leave the incomplete last mini-batch of an epoch out [?].
        batch_pictures: 0 shuffles the patches of the whole training set; n > 0 takes ``batch_size`` patches of n pictures [?].
        k: neighbours in N_k (Eq. 2); 5 [P].
        margin: m of Eq. 7; 1.0 [P].
        alpha: share of pairwise similarity in Eq. 6; 0.5 [P].
        sigma: bandwidth of Eq. 1, divides the squared distance [?].
        gamma: momentum of the EMA copies, Eq. 8 [?].
        normalize_teacher: divide z̄ by its length before Eq. 1 to 5 [?].
        gate: Eq. 2 is zero unless j ∈ N_k(i) [P]; False drops the condition.
        self_neighbour: i counts among its own k nearest [?].
        expansion: Eq. 4 averages over "reciprocal" [P] or "plain" k/2 neighbours.
        half_k: rounding of k/2 in Eq. 4, "floor" or "ceil" [?].
        empty_expansion: what Eq. 4 is where R_{k/2}(i) is empty: "self" takes i alone, "zero" takes 0 [?].
        pairs: what Eq. 7 divides by: "N" [P] or "N(N-1)".
        diagonal: keep the pairs i = j in Eq. 7; they add the constant mean (1 - ω_ii) m² and no gradient [P].

    Memory bank M (Sec. 3.3)
        coreset_ratio: share of all patches kept; 0.01 [P].
        coreset_projection: random projection before greedy selection, a size or None; PatchCore's is 128 [I].
        coreset_start: "mean" starts at the patch farthest from the mean, "random" anywhere [I].

    Scores (Sec. 3.3)
        neighbours: b of Eq. 10 [?].
        self_in_neighbours: r* ∈ N_b(r*) [I].
        squared: D is the squared distance in Eq. 10 [?].
        weighting: apply Eq. 10's weight to "patches" (every patch [P]) or to "none" (the plain distance).
        blur: σ of the Gaussian on score maps, pixels of the crop; 4 [I].
        calibration_folds: folds for the held-out training scores behind ``normal_threshold``; 0 is none. No part of the method [?].

    Run
        seed: of initialisation, mini-batches, projection and random start.
        device: "auto", "cpu", "cuda", "cuda:1", ...; no part of a result's identity.

    Raises:
        ValueError: a value outside its range; the message names the argument, what was expected and what came.
    """

    resize: int = 256
    image_size: int = 224
    aspect: Literal["keep", "squash"] = "keep"
    backbone: str = "wide_resnet50_2"
    weights: str = "IMAGENET1K_V1"
    layers: tuple[int, ...] = (2, 3)
    backbone_dtype: Literal["float32", "bfloat16"] = "float32"
    patch_size: int = 3
    patch_dim: int = 1024
    feature_dtype: Literal["float16", "float32"] = "float16"
    represent: bool = True
    dim: int = 512
    projection: int | None = 128
    bias: bool = True
    init: Literal["default", "orthogonal"] = "default"
    epochs: int = 120
    lr: float = 1e-5
    weight_decay: float = 1e-2
    cosine: Literal["step", "epoch"] = "step"
    batch_size: int = 1024
    drop_last: bool = True
    batch_pictures: int = 0
    k: int = 5
    margin: float = 1.0
    alpha: float = 0.5
    sigma: float = 1.0
    gamma: float = 0.999
    normalize_teacher: bool = False
    gate: bool = True
    self_neighbour: bool = True
    expansion: Literal["reciprocal", "plain"] = "reciprocal"
    half_k: Literal["floor", "ceil"] = "floor"
    empty_expansion: Literal["self", "zero"] = "self"
    pairs: Literal["N", "N(N-1)"] = "N"
    diagonal: bool = True
    coreset_ratio: float = 0.01
    coreset_projection: int | None = None
    coreset_start: Literal["mean", "random"] = "mean"
    neighbours: int = 9
    self_in_neighbours: bool = True
    squared: bool = False
    weighting: Literal["patches", "none"] = "patches"
    blur: float = 4.0
    calibration_folds: int = 2
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "weights", str(self.weights))
        if (
            isinstance(self.layers, int | str)
            or not all(isinstance(n, int) and n >= 1 for n in self.layers)
            or not self.layers
        ):
            raise ValueError(f"layers: expected hierarchy levels from 1 such as (2, 3), got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, check_type(name, kind, getattr(self, name)))
        positive = "resize image_size patch_size patch_dim dim epochs lr batch_size sigma neighbours"
        for name in positive.split():
            self._require(name, getattr(self, name) > 0, "a number above 0")
        for name in ("weight_decay", "margin", "blur", "batch_pictures", "calibration_folds", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require(
            "image_size",
            self.image_size <= self.resize,
            f"at most resize={self.resize} (the crop lies inside the picture)",
        )
        self._require("patch_size", self.patch_size % 2 == 1, "an odd number")
        self._require("alpha", 0 <= self.alpha <= 1, "a share from 0 (contextual only) to 1 (pairwise only)")
        self._require("gamma", 0 <= self.gamma <= 1, "a momentum from 0 to 1")
        self._require("coreset_ratio", 0 < self.coreset_ratio <= 1, "a share of the patches, above 0 and at most 1")
        self._require("k", self.k >= 2, "2 or more (Eq. 4 needs k/2 neighbours)")
        self._require("k", self.k < self.batch_size, f"fewer than batch_size={self.batch_size} patches")
        self._require(
            "neighbours",
            self.neighbours >= 1 + self.self_in_neighbours,
            f"{1 + self.self_in_neighbours} or more (else Eq. 10 is 0)",
        )
        for name in ("projection", "coreset_projection"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "a size above 0, or None")
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

    @property
    def k_half(self) -> int:
        """k/2 of Eq. 4, rounded as ``half_k`` says."""
        return self.k // 2 if self.half_k == "floor" else math.ceil(self.k / 2)

    @property
    def extracted_dim(self) -> int:
        """Size of the extracted p: PatchCore's ``dim`` is pooled from ``patch_dim`` where that is exact, else extracted directly."""
        return self.patch_dim if self.represent or self.patch_dim % self.dim == 0 else self.dim
