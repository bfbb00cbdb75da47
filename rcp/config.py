"""Every hyper-parameter of the method, once: default, meaning, range, where the value comes from, and the stage it belongs to.

Provenance marks: [P] printed in the paper; [I] inferred from the works it builds on; [?] stated nowhere, so an option.

The stages of a result are ``STAGES``, in order. What one depends on is ``config.upto(stage)``: nothing else names hyper-parameters
for that purpose, so one that is declared here cannot be forgotten there.
"""

import dataclasses
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from rcp.checks import check_fields, check_names, check_type, limited, require

STAGES = ("features", "training", "bank", "scores")

# No options, but fixed where they stand in the code: what the paper leaves open or varies in no table, and what changed nothing measured.
# [P]: Eq. 2 is zero unless j ∈ N_k(i); Eq. 7 is divided by N and keeps the pairs i = j, which add a constant and no gradient.
# [I]: r* ∈ N_b(r*) in Eq. 10.
# [?]: f and g have a bias; the learning rate is annealed with every step; the incomplete last mini-batch of an epoch is left out;
#      i counts among its own k nearest (d_ii = 0), so R_{k/2}(i) is never empty; k/2 of Eq. 4 is rounded down; D of Eq. 10 is the
#      distance, not its square.


def option(stage: str | None, default: Any, meaning: str, *, of: tuple[str, ...] = (), **limits: float) -> Any:
    """Declares a hyper-parameter.

    Args:
        stage: the first of ``STAGES`` whose result depends on it; None where no result does.
        meaning: what it is, with its provenance mark.
        of: the representations whose results depend on it; () is all.
        limits: as of :func:`rcp.checks.limited`; without ``most``, less than what no one means.
    """
    check_type("stage", Literal[*STAGES, None], stage)
    most = 1e9 if isinstance(default, float) else 2**31 - 1
    return limited(default, {"stage": stage, "meaning": meaning, "of": of}, **{"most": most} | limits)


def of_f(default: Any, meaning: str, of: tuple[str, ...] = ("trained",), **limits: float) -> Any:
    """Declares a hyper-parameter of f, which PatchCore does not have."""
    return option("training", default, meaning, of=of, **limits)


# For own images: the paper's crop does not see a defect at the border.
WHOLE = {"aspect": "squash", "resize": 256, "image_size": 256}
# For own images too. Mean image / pixel AUROC of four categories over PatchCore's with 1 %, D 512 and the paper's crop, three seeds:
# ResNet-50 +1.59 / +1.73, at worst -0.24 (pill); ResNet-18 +1.37 / +2.90, nowhere below. Over D 1024 +0.07, with pill at -2.86, and +1.93
# (benchmarks/results/preset_*.md). With a neighbourhood of 3, pill has 96.10 instead of 93.84, but transistor 97.54 instead of 99.75.
INSPECTION = WHOLE | {"representation": "whitened", "whitening": 3.0, "patch_size": 5, "dim": 1024, "coreset_projection": 128}  # fmt: skip
# Of these CNNs the pooled chain averages a neighbourhood hardly at all (1,152 numbers to 1,024 with 3 a side).
NARROW = {cnn: {"aggregation": "mean"} for cnn in ("resnet18", "resnet34")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyper-parameters of one detector; immutable, checked on construction.

    Raises:
        ValueError: a value outside its range; the message names the argument, what was expected and what came.
    """

    # fmt: off
    resize: int = option("features", 256, "shorter side before the crop, pixels; 256, 366 or 512 [P]", above=0, most=2**14)
    image_size: int = option("features", 224, "side S of the centre crop, pixels; 224, 320 or 480 [P]", above=0, most=2**14)
    aspect: Literal["keep", "squash"] = option("features", "keep", "resize the shorter side, or both (they differ on BTAD 03 only) [I]")
    tiles: tuple[int, ...] = option("features", (1, 1),
        "rows and columns that an image is cut into, image_size pixels each, for small defects in large images [?]")
    tile_overlap: int = option("features", 0,
        "pixels of a tile that the next one sees too, whole patches; each describes its own half of them [?]", least=0)
    backbone: str = option("features", "wide_resnet50_2", "a CNN by name: a ResNet or DenseNet of torchvision [P], or timm's")
    weights: str = option("features", "IMAGENET1K_V1", 'a tag [I], a file (.safetensors, .pth), or "random:SEED"')
    layers: tuple[int, ...] = option("features", (2, 3), "hierarchy levels, 1 is stride 4 [P]")
    backbone_dtype: Literal["float32", "bfloat16"] = option(
        "features", "float32", "arithmetic of the CNN; bfloat16 is faster where the machine has it, moves p by 1e-2 [?]")
    patch_size: int = option("features", 3, "side of the neighbourhood that is aggregated, odd; 3 or 5 [P]", above=0, most=31)
    aggregation: Literal["pooled", "mean"] = option("features", "pooled",
        "how a neighbourhood becomes a vector: its C·p·p numbers pooled to patch_dim, PatchCore's chain, which the tables take [I]; "
        "or the mean per channel, levels concatenated, nothing pooled away (what anomalib does), for CNNs with few channels: "
        "ResNet-18's 1,152 numbers pooled to 1,024 are hardly averaged at all [?]")
    patch_dim: int | None = option("features", None, "size every level, then their concatenation, is pooled to; None is 1024 [I]",
        above=0, most=2**16)
    feature_dtype: Literal["float16", "float32"] = option("features", "float16", "how p is held and stored; later it is float32 [?]")
    representation: Literal["trained", "random", "whitened", "none"] = option("training", "trained",
        "what is scored: f(p) of the f that the paper trains [P]; of f as initialised, the control that shows what training adds; "
        "p whitened by the training patches in closed form, where textures vary in directions that do not matter; or p itself, PatchCore")
    dim: int = option("training", 512, "D_f, size of f(p), or that p is pooled to without f, but for the mean's [P]", above=0, most=2**16)
    whitening: float = of_f(1.0, "λ of whitening, in mean eigenvalues; a large one changes the scale alone [?]", ("whitened",), above=0)
    projection: int | None = of_f(128, "size of g's output, or None for no g (Table S4) [?]", above=0, most=2**16)
    init: Literal["default", "orthogonal", "pca"] = of_f("default",
        "initialisation of f and g; default is nn.Linear's; pca begins f at the principal directions of p, close to PatchCore [?]",
        ("trained", "random"))
    epochs: int = of_f(120, "of training f; 60 for the 320 px ensemble [P]", above=0)
    lr: float = of_f(1e-5, "learning rate; 1e-6 for ensembles and 480 px [P]", above=0, most=10.0)
    weight_decay: float = of_f(1e-2, "of AdamP [P]", least=0)
    batch_size: int = of_f(1024, "patches in a mini-batch, N of Eq. 7 [?]", above=0, most=2**20)
    batch_images: int = of_f(0, "0 shuffles the patches of the whole training set; n takes batch_size patches of n images [?]", least=0)
    k: int = of_f(5, "neighbours in N_k (Eq. 2) [P]", least=2)
    margin: float = of_f(1.0, "m of Eq. 7 [P]", least=0)
    alpha: float = of_f(0.5, "share of pairwise similarity in Eq. 6, the rest is contextual [P]", least=0, most=1)
    sigma: float = of_f(1.0, "bandwidth of Eq. 1, divides the squared distance [?]", above=0)
    gamma: float = of_f(0.999, "momentum of the EMA copies, Eq. 8 [?]", least=0, most=1)
    normalize_teacher: bool = of_f(False, "divide z̄ by its length before Eq. 1 to 5 [?]")
    expansion: Literal["reciprocal", "plain"] = of_f("reciprocal", "what Eq. 4 averages over [P], or all k/2 neighbours")
    coreset_ratio: float = option("bank", 0.01,
        "share of all patches kept [P]; 1.0 keeps all: nothing is selected, and the score is the distance alone [?]",
        above=0, most=1)
    selection: Literal["greedy", "random"] = option(
        "bank", "greedy", "k-center [P]; or drawn from the seed: cheap, and outliers are not preferred [?]")
    coreset_projection: int | None = option(
        "bank", None, "random projection before greedy selection, a size or None; PatchCore's is 128 [I]", above=0, most=2**16)
    coreset_start: Literal["mean", "random"] = option("bank", "mean", "start at the patch farthest from the mean, or anywhere [I]")
    neighbours: int = option("scores", 9,
        "b of Eq. 10; with 1 that would be 0; none where the bank is all patches, as r* has near-duplicates there [?]", least=2)
    weighting: Literal["patches", "none"] = option("scores", "patches", "Eq. 10's weight for every patch [P], or the plain distance")
    blur: float = option("scores", 4.0, "σ of the Gaussian on score maps, pixels of the crop [I]", least=0, most=2**10)
    calibration_folds: int = option("scores", 2, "folds of held-out training scores (normal_threshold); 0: none; not the paper's", least=0)
    seed: int = option("training", 0, "of initialisation, mini-batches, projection and random start", least=0, most=2**63 - 1)
    device: str = option(None, "auto", "auto, cpu, cuda, cuda:1, ...")
    # fmt: on

    def __post_init__(self):
        mean, pooled = self.aggregation == "mean", self.level_dim
        of_levels = isinstance(self.layers, tuple | list) and all(
            isinstance(n, Integral) and n >= 1 for n in self.layers
        )
        require("layers", of_levels and self.layers, "hierarchy levels from 1 such as (2, 3)", self.layers)
        object.__setattr__(self, "layers", tuple(sorted({int(n) for n in self.layers})))
        check_fields(self)
        inside = f"at most resize={self.resize} (the crop lies inside the image)"
        narrow = f"at most patch_dim={pooled} (PatchCore pools, it cannot widen)"
        patch = 2 ** min(self.layers[0] + 1, 15)  # pixels
        whole = self.tile_overlap % patch == self.image_size % patch == 0 and self.tile_overlap < self.image_size
        shared = f"0, or with tiles a multiple of {patch} px (a patch) below image_size={self.image_size}, itself one"
        for name, holds, expected in (
            ("image_size", self.image_size <= self.resize, inside),
            ("patch_size", self.patch_size % 2 == 1, "an odd number"),
            ("tiles", len(self.tiles) == 2 and min(self.tiles) > 0, "rows and columns, such as (2, 3)"),
            ("tile_overlap", self.tile_overlap == 0 or (whole and self.tiles != (1, 1)), shared),
            ("aspect", self.tiles == (1, 1) or self.aspect == "squash", "'squash' where images are cut into tiles"),
            ("k", self.k < self.batch_size, f"fewer than batch_size={self.batch_size} patches"),
            ("patch_dim", not mean or self.patch_dim is None, "None with aggregation='mean', which pools nothing"),
            ("dim", mean or self.linear or self.dim <= pooled, narrow),
        ):
            require(name, holds, expected, getattr(self, name))

    def __repr__(self) -> str:
        changed = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}
        return f"Config({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def build(cls, **values) -> "Config":
        """A Config from named values.

        Raises:
            ValueError: an unknown name, with the nearest valid one; whatever the constructor refuses.
        """
        check_names("unknown hyper-parameter", values, cls.names())
        return cls(**values)

    @classmethod
    def for_inspection(cls, **changes) -> "Config":
        """The preset for own images: INSPECTION, and NARROW's of a small CNN: nothing cropped, whitened patches, no training of f.

        ``changes`` as of :meth:`build`; of ``resize`` and ``image_size`` one alone is meant for both.
        """
        given = {"image_size": changes.get("resize", WHOLE["resize"])} | changes
        return cls.build(**INSPECTION | NARROW.get(str(given.get("backbone")), {}) | {"resize": given["image_size"]} | given)  # fmt: skip

    def replace(self, **values) -> "Config":
        return self.build(**(dataclasses.asdict(self) | values))

    def asdict(self) -> dict[str, Any]:
        """JSON-able values by name."""
        return dataclasses.asdict(self) | {"layers": list(self.layers), "tiles": list(self.tiles)}

    def upto(self, stage: str) -> dict[str, Any]:
        """What the result of a stage depends on: the JSON-able values of its hyper-parameters and of those of the stages before it.

        What only other representations have is left out, so is what a bank of all patches does not use, the seed where
        nothing is drawn, and an overlap of no pixels. ``weights`` is the name that was given;
        who compares results of different machines puts the content in its place (:func:`rcp.backbone.weights_identity`).
        """
        stages, values = STAGES[: STAGES.index(check_type("stage", Literal[*STAGES], stage)) + 1], self.asdict()
        declared = {f.name: f.metadata for f in dataclasses.fields(self)}
        unused = {n for n, about in declared.items() if about["of"] and self.representation not in about["of"]}
        if self.tile_overlap == 0:
            unused.add("tile_overlap")
        if self.aggregation == "mean" and not self.linear:
            unused.add("dim")
        if self.coreset_ratio == 1:
            unused |= {"selection", "coreset_projection", "coreset_start", "neighbours", "weighting"}
        elif self.selection == "random":
            unused |= {"coreset_projection", "coreset_start"}
        drawn = self.selection == "random" or self.coreset_projection is not None or self.coreset_start == "random"
        if not self.linear and (self.coreset_ratio == 1 or not drawn):
            unused.add("seed")
        if self.linear and self.init == "orthogonal":  # f is drawn after g, whatever its size took of the draws
            unused.discard("projection")
        found = {n: values[n] for n, about in declared.items() if about["stage"] in stages and n not in unused}
        return found | {"extracted_dim": self.extracted_dim}

    @property
    def linear(self) -> bool:
        """Whether p goes through the linear layer f of the paper, trained or not."""
        return self.representation in ("trained", "random")

    def bank_dim(self, extracted: int) -> int:
        """Size of a memory entry, where p has the size ``extracted``: ``dim``, or all of p where nothing is pooled."""
        return extracted if self.aggregation == "mean" and not self.linear else self.dim

    @property
    def extracted_dim(self) -> int | None:
        """Size of the extracted p: PatchCore's ``dim`` is pooled from ``patch_dim`` where that is exact, else extracted directly.

        None with aggregation="mean": as many numbers as the levels have channels.
        """
        if self.aggregation == "mean":
            return None
        return self.level_dim if self.linear or self.level_dim % self.dim == 0 else self.dim

    @property
    def level_dim(self) -> int:
        """``patch_dim``, or the 1024 that None stands for."""
        return self.patch_dim or 1024


_LINES = (f"        {f.name}: {f.metadata['meaning']}; default {f.default!r}.\n" for f in dataclasses.fields(Config))
Config.__doc__ += "\n    Hyper-parameters:\n" + "".join(_LINES)
