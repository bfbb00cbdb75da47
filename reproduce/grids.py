"""The entries behind each table and figure: what the notebooks show, and the batch and the workflow compute.

An entry that several of them need is computed once: the store knows it by what it depends on, not by who asked.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from rcp.checks import check_names
from rcp.data.perturb import Perturbation
from rcp.refinement import RefinementConfig
from reproduce.demo import CNN
from reproduce.entries import Ensemble, Entry, Refined
from reproduce.notebook import Settings
from reproduce.peers import LOCAL, METHODS, OURS, Peer
from reproduce.studies import FeatureSpace, HeldOut, InferenceTime

# Sides of the crop of Table 6, and what differs there from the single model. Patch 5 at 480 px is method.md's [I].
_AT_320 = {"dim": 384, "patch_size": 3, "lr": 1e-6}
_AT_480 = {"dim": 512, "patch_size": 5, "lr": 1e-6}
SIZES = {
    "paper": {320: {"resize": 366, **_AT_320}, 480: {"resize": 512, **_AT_480}},
    "demo": {96: {"resize": 110, **_AT_320}, 128: {"resize": 144, **_AT_480}},
}
MEMBERS = dict.fromkeys(("wide_resnet101_2", "resnext101_32x8d", "densenet201"), "IMAGENET1K_V1")
RATIOS = (0.25, 0.1, 0.01)
DIMS = (1024, 512, 256, 128, 64)
LEVELS = (((2, 3), 3), ((2, 3), 5), ((1, 2, 3), 3), ((1, 2, 3), 5))  # the paper prints all but the third
REFINEMENT = {"paper": {}, "demo": {"epochs": 2, "channels": 16, "lr_head": 0.1, "textures": "drawn"}}
KINDS = ("texture", "structure")  # of simulated anomalies
SWEPT = {"k": (3, 5, 7, 10, 15, 20), "margin": (0.5, 1.0, 1.5, 2.0), "alpha": (0.0, 0.25, 0.5, 0.75, 1.0)}


def members_of(s: Settings) -> dict[str, str]:
    """backbone -> weights of Table 6's ensemble; the demo's second one has the weights of its first, and pads evenly."""
    weights = s.weights if s.backbone == CNN else "random:0"
    return dict.fromkeys((CNN, CNN.removeprefix("tf_")), weights) if s.profile == "demo" else MEMBERS


def _short(s: Settings) -> Settings:
    """The demo of the larger grids is of its first category alone."""
    return dataclasses.replace(s, categories=s.categories[:1]) if s.profile == "demo" else s


def _varied(s: Settings, changes: Sequence[dict]) -> list[Entry]:
    """The single model with each of these changes; the demo's is of one category and without held-out scores, which no such table shows."""
    folds = {"calibration_folds": 0} if s.profile == "demo" else {}
    return _short(s).entries(list(dict.fromkeys(s.config(**folds, **change) for change in changes)))


def table_1(s: Settings) -> list[Entry]:
    """Share of the patches that the coreset keeps, D 1024."""
    return _varied(s, [{"dim": 1024, "coreset_ratio": ratio} for ratio in RATIOS])


def table_2(s: Settings) -> list[Entry]:
    """Size of f(p), and of PatchCore's p (also Figure S2)."""
    return _varied(s, [{"dim": dim, "representation": name} for name in ("none", "trained") for dim in DIMS])


def table_3(s: Settings) -> list[Entry]:
    """Hierarchy levels and patch size."""
    levels = LEVELS if s.profile == "paper" else LEVELS[:2] + LEVELS[3:]
    return _varied(s, [{"layers": layers, "patch_size": size} for layers, size in levels])


def table_4(s: Settings, perturbation: Perturbation | None = None, perturbed: str = "both") -> list[Entry]:
    """Table 5's models without and with the perturbations of Appendix C.1 (also Table S5)."""
    s = _short(s)
    return [*table_5(s), *s.entries(_models(s), perturbation=perturbation or Perturbation(), perturbed=perturbed)]


def table_5(s: Settings) -> list[Entry]:
    """The single models."""
    return s.entries(_models(s))


def table_6(s: Settings, members: Mapping[str, str] = {}, image_sizes: Sequence[int] = (), **how) -> list[Ensemble]:
    """Ensembles of both methods at two sizes; 320 px trains half as long [P]. ``how`` goes to :class:`reproduce.entries.Ensemble`.

    members: backbone -> weights.
    """
    s, found, members = _short(s), [], members or members_of(s)
    for size in dict.fromkeys(image_sizes or SIZES[s.profile]):
        changes = size_changes(s, size)
        for representation in ("none", "trained"):
            configs = [
                s.config(representation=representation, backbone=name, weights=weights, **changes)
                for name, weights in members.items()
            ]
            found += [Ensemble(group, **how) for group in zip(*(s.entries([c]) for c in configs), strict=True)]
    return found


def size_changes(s: Settings, size: int) -> dict:
    """What a config at this side of the crop has else than the single model at 224 px."""
    sizes = SIZES[s.profile]
    if size not in sizes:
        raise ValueError(f"image_sizes: expected some of {', '.join(map(str, sizes))}, got {size!r}")
    return {"image_size": size, "epochs": max(1, s.epochs // 2) if size == min(sizes) else s.epochs, **sizes[size]}


def table_7(s: Settings, aspect: str = "keep") -> list[Entry]:
    """BTAD at the larger size; ``s`` is of the data set btad."""
    changes = size_changes(s, max(SIZES[s.profile])) | {"aspect": aspect}
    return s.entries([s.config(representation=representation, **changes) for representation in ("none", "trained")])


def table_s1_s2_s3(s: Settings) -> list[Entry]:
    """k of Eq. 2, m of Eq. 7, α of Eq. 6, each with the others at their defaults; the demo's are the default and both ends."""
    ends = {name: (values[0], values[-1]) for name, values in SWEPT.items()}
    of = SWEPT if s.profile == "paper" else ends
    return _varied(s, [{}] * (of is ends) + [{name: value} for name, values in of.items() for value in values])


def refinement(s: Settings, kind: str = "structure", seed: int = 0, **options) -> RefinementConfig:
    """The refinement network of a profile, trained on one kind of simulated anomalies; ``options`` as of :class:`RefinementConfig`."""
    return RefinementConfig.build(**(REFINEMENT[s.profile] | options | {"kind": kind, "seed": seed}))


def table_s7(s: Settings, **options) -> list[Entry | Refined]:
    """The single model without refinement, then with it, trained on each kind of simulated anomalies (also Figure S5)."""
    entries = _short(s).entries([s.config()])
    return entries + [Refined(c, refinement(s, kind, c.config.seed, **options)) for kind in KINDS for c in entries]


def table_s8(s: Settings, members: Mapping[str, str] = {}, image_sizes: Sequence[int] = (), **how) -> list[Ensemble]:
    """Table 6's ensembles of ReConPatch without refinement, and of refined members; the demo shows the smaller size alone."""
    sizes = image_sizes or (tuple(SIZES[s.profile]) if s.profile == "paper" else (min(SIZES[s.profile]),))
    plain = [e for e in table_6(s, members, sizes) if e.config.representation == "trained"]
    refined = [tuple(Refined(m, refinement(s, seed=m.config.seed, **how)) for m in e.members) for e in plain]
    return plain + [Ensemble(members) for members in refined]


def table_s4(s: Settings) -> list[Entry]:
    """Training without and with the projection g."""
    return _varied(s, [{"projection": None}, {}])


def figure_s1(s: Settings, category: str = "", images: int = 4) -> list[FeatureSpace]:
    """The feature space without and with the projection g."""
    configs = [s.config(projection=None), s.config()]
    return [FeatureSpace(Entry(c, s.data_root, category or s.categories[0]), (s.epochs,), images) for c in configs]


def table_s6(s: Settings, category: str = "", batch: int = 1) -> list[InferenceTime]:
    """Both methods with 512 dimensions, as the paper times them."""
    configs = [s.config(representation=representation) for representation in ("none", "trained")]
    return [InferenceTime(Entry(c, s.data_root, category or s.categories[0]), batch) for c in configs]


def figure_3(s: Settings, category: str = "", epochs: Sequence[int] = (), images: int = 4) -> list[FeatureSpace]:
    """PatchCore's feature space, and ReConPatch's at three epochs: the first, the middle one and the last where not named."""
    entry = Entry(s.config(), s.data_root, category or s.categories[0])
    patchcore = Entry(s.config(representation="none"), s.data_root, entry.category)
    chosen = tuple(epochs) or tuple(dict.fromkeys((1, -(-s.epochs // 2), s.epochs)))
    return [FeatureSpace(patchcore, (), images), FeatureSpace(entry, chosen, images)]


def figure_s4(s: Settings) -> list[Entry]:
    """Table 7's entries of one seed; ``s`` is of the data set btad."""
    return [entry for entry in table_7(s) if entry.config.seed == s.seeds[0]]


def _models(s: Settings) -> list:
    """The single models, with the dimensions they are published with: PatchCore 1024, ReConPatch 512."""
    return [s.config(representation="none", dim=1024), s.config()]


# ---- what the paper does not ask ----


REPRESENTATIONS = ("none", "random", "trained", "whitened")
BANKS = (0.01, 0.1, 1.0)


def does_training_help(s: Settings, backbones: Mapping[str, str] = {}, starts: int = 5) -> list[Entry]:
    """The four representations by three banks, for each CNN; and the coreset's own noise: PatchCore's of 1 %, begun at random patches.

    backbones: backbone -> weights; the settings' own where left out.
    """
    s, cnns = _short(s), (backbones or {s.backbone: s.weights}).items()
    found = [
        s.config(backbone=cnn, weights=w, representation=r, coreset_ratio=ratio, calibration_folds=0)
        for cnn, w in cnns for r in REPRESENTATIONS for ratio in BANKS
    ]  # fmt: skip
    return s.entries(found) + coreset_noise(s, dict(cnns), starts)


def coreset_noise(s: Settings, backbones: dict[str, str], starts: int = 5) -> list[Entry]:
    """PatchCore with a coreset of 1 % that begins at a random patch: ``starts`` times for each CNN."""
    random = {"representation": "none", "coreset_ratio": BANKS[0], "coreset_start": "random", "calibration_folds": 0}
    configs = [s.config(backbone=cnn, weights=w, **random) for cnn, w in backbones.items()]
    return dataclasses.replace(s, seeds=tuple(range(starts))).entries(configs)


# What the paper leaves open, and values around the default; epochs, which it prints, are those of the run and fewer.
CHOICES = {
    "sigma": (0.1, 1.0, 10.0), "gamma": (0.99, 0.999, 0.9999), "batch_size": (512, 1024, 2048), "batch_images": (0, 8),
    "projection": (64, 128, 256), "normalize_teacher": (False, True), "init": ("default", "orthogonal", "pca"),
    "aggregation": ("pooled", "mean"), "coreset_projection": (128, None), "coreset_start": ("mean", "random"),
    "neighbours": (3, 9, 27), "weighting": ("patches", "none"),
}  # fmt: skip


def choices(s: Settings) -> dict[str, tuple]:
    """What :func:`open_choices` varies: CHOICES, in the demo two values of each; and 1, 10, 40, 120 epochs as far as the run's own go."""
    of = {name: values[-2:] for name, values in CHOICES.items()} if s.profile == "demo" else CHOICES
    return of | {"epochs": (*(n for n in (1, 10, 40, 120) if n < s.epochs), s.epochs)}


def open_choices(s: Settings, only: Sequence[str] = (), starts: int = 5) -> list[Entry]:
    """ReConPatch with one choice of the paper's open ones moved at a time, the others at their defaults; and the coreset's noise.

    only: names of some choices; all where empty.
    """
    s, default = _short(s), s.config(calibration_folds=0)
    of = {name: values for name, values in choices(s).items() if not only or name in only}
    moved = [default.replace(**{name: value}) for name, values in of.items() for value in values]
    return s.entries(list(dict.fromkeys([default, *moved]))) + coreset_noise(s, {s.backbone: s.weights}, starts)


BANK_RATIOS = {"paper": (0.001, 0.003, 0.01, 0.03, 0.1), "demo": (0.01, 0.1)}  # and 1, where nothing is selected


def bank(s: Settings, starts: int = 5) -> list[Entry]:
    """PatchCore and ReConPatch by the size of the bank, greedy and random selection; then the coreset's noise."""
    s = _short(s)
    ways = [(ratio, how) for how in ("greedy", "random") for ratio in BANK_RATIOS[s.profile]] + [(1.0, "greedy")]
    found = [
        s.config(representation=representation, coreset_ratio=ratio, selection=how, calibration_folds=0)
        for representation in ("none", "trained") for ratio, how in ways
    ]  # fmt: skip
    return s.entries(found) + coreset_noise(s, {s.backbone: s.weights}, starts)


def bank_times(s: Settings, category: str = "") -> list[InferenceTime]:
    """The time of an image by the size of the bank: PatchCore, one category."""
    ratios = (*BANK_RATIOS[s.profile], 1.0)
    configs = [s.config(representation="none", coreset_ratio=ratio, calibration_folds=0) for ratio in ratios]
    return [InferenceTime(Entry(c, s.data_root, category or s.categories[0])) for c in configs]


# Settings that need no training of f: 36, and 4 in the demo.
LAYERS = {"paper": ((2, 3), (1, 2, 3), (3,)), "demo": ((2, 3),)}
PATCHES = {"paper": (1, 3, 5), "demo": (3,)}


def choose_without_labels(s: Settings, images: int = 100) -> list[Entry | HeldOut]:
    """The settings' entries, which labels judge, then what can be known of each without a defect. Nothing is drawn: one seed is all."""
    s = dataclasses.replace(s, seeds=s.seeds[:1])
    configs = [
        s.config(representation=r, aggregation=a, layers=layers, patch_size=size, calibration_folds=0)
        for r in ("none", "whitened") for a in ("pooled", "mean") for layers in LAYERS[s.profile] for size in PATCHES[s.profile]
    ]  # fmt: skip
    entries = _short(s).entries(configs)
    return [*entries, *(HeldOut(entry, images) for entry in entries)]


def peers(s: Settings, methods: Sequence[str] = (), changes: Mapping = {}, epochs: Mapping = {}) -> list[Peer]:
    """Other methods on this run's images, ours beside them: PatchCore (D 1024; and with means) and ReConPatch (D 512).

    methods: names of :mod:`reproduce.peers`; all where empty (demo: SPADE and PaDiM). changes: of the config.
    epochs: of methods that anomalib trains, by name; the others have as many as they are published with.
    """
    s, small = _short(s), {"resize": 110, "image_size": 96} if s.profile == "demo" else {}
    base = {"calibration_folds": 0, **small, **changes}
    patchcore, recon = (base | of for of in ({"representation": "none", "dim": 1024}, {}))
    found = [(patchcore, "PatchCore"), (patchcore | {"aggregation": "mean"}, "PatchCore"), (recon, "ReConPatch")]
    others = ("SPADE", "PaDiM") if s.profile == "demo" else [n for n in (*LOCAL, *METHODS) if n not in OURS]
    # anomalib has not the demo's CNN
    known = {"backbone": "resnet18", "weights": "random:0"} if s.backbone == CNN else {}
    found += [(patchcore | known if name in METHODS else patchcore, name) for name in methods or others]
    check_names("epochs: anomalib has no method", epochs, METHODS)
    named = [Peer(entry, name, epochs.get(name, 0)) for how, name in found for entry in s.entries([s.config(**how)])]
    return list(dict.fromkeys(named))
