"""What every notebook begins and ends with: checked parameters, and one line on where its numbers come from."""

import ast
import ctypes
import dataclasses
import difflib
import hashlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rcp import backbone
from rcp.checks import check_fields, check_names, check_type, require
from rcp.config import Config
from rcp.data import categories
from rcp.detector import resolve_device
from rcp.paths import data_root
from reproduce import paper
from reproduce.demo import CNN, demo_weights, draw_demo
from reproduce.entries import Entry
from reproduce.provenance import commit, device_name, versions
from reproduce.run import Grid, Result, shard_of
from reproduce.store import Store, runs_root

# What a profile stands for where a parameter is left empty.
PROFILES = {
    "demo": {"backbone": CNN, "weights": "random:0", "epochs": 2, "seeds": (0,)},  # of its own CNN: demo_weights
    "paper": {"backbone": "wide_resnet50_2", "weights": "IMAGENET1K_V1", "epochs": 120, "seeds": (0, 1, 2)},
}

# Where BTAD is the data set: Table 7's backbone.
ON_BTAD = {"demo": {}, "paper": {"backbone": "wide_resnet101_2"}}

# A third of the patches that there are at the paper's 224 px; of so few a hundredth is too small a memory.
DEMO = {"resize": 146, "image_size": 128, "coreset_ratio": 0.1}
# Whose images a figure shows: their licences ask to say so.
CREDITS = {
    "MVTec AD (Bergmann et al., CC BY-NC-SA 4.0)": paper.CATEGORIES,
    "BTAD (Mishra et al., CC BY-NC-SA 4.0)": ("01", "02", "03"),
    "KolektorSDD (Tabernik et al., CC BY-NC-SA 4.0)": ("kolektorsdd",),
}
# What a notebook declares a parameter to be -> what it may hold.
KINDS = {"str": str, "int": int, "float": float, "bool": bool, "list": tuple[str | int, ...], "dict": dict}
DEMO_GROUPS = {"object": ("gear",), "texture": ("fabric",)}


@dataclass(frozen=True)
class Settings:
    """The parameters that notebooks share, resolved by profile and checked.

    Raises:
        ValueError: an unknown name or value; names the nearest valid one.
        FileNotFoundError: the paper profile without data, with the command that fetches them.
    """

    profile: Literal["demo", "paper"] = "demo"
    data_root: str = ""
    btad_root: str = ""
    categories: tuple[str, ...] = ()
    backbone: str = ""
    weights: str = ""
    epochs: int = 0
    seeds: tuple[int, ...] = ()
    device: str = "auto"
    shard: str = "1/1"
    render_only: bool = False
    # Which of the two roots, or neither; no parameter of a notebook.
    dataset: Literal["mvtec", "btad", "none"] = "mvtec"

    def __post_init__(self):
        check_fields(self)
        defaults = PROFILES[self.profile] | (ON_BTAD[self.profile] if self.dataset == "btad" else {})
        if self.profile == "demo" and self.backbone in ("", CNN) and not self.weights:
            defaults["weights"] = str(demo_weights())
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        shard_of([], self.shard)
        different = len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0 and max(self.seeds) < 2**63
        require("seeds", different, "different numbers from 0, of 64 bits", self.seeds)
        require("categories", len({*self.categories}) == len(self.categories), "different names", self.categories)
        require("epochs", 0 < self.epochs < 2**31, "a number above 0, of 32 bits", self.epochs)
        resolve_device(self.device)
        default = (defaults["backbone"], defaults["weights"])
        if not self.render_only and (self.backbone, self.weights) != default:  # to look takes seconds
            backbone.check(self.backbone, self.weights)
        for name in ("data_root", "btad_root"):  # of both, before the first is computed
            if root := getattr(self, name):
                require(name, Path(root).is_dir(), "a folder", root)
                categories(root)
        if self.dataset == "none":
            return
        root = self.btad_root if self.dataset == "btad" else self.data_root
        object.__setattr__(self, "data_root", root or str(self._default_data()))
        there = categories(self.data_root)
        check_names(f"categories: {self.data_root} has no", self.categories, there)
        object.__setattr__(self, "categories", tuple(self.categories) or tuple(there))
        text = all(n == n.encode(errors="ignore").decode() for n in self.categories)
        require("categories", text, "names in UTF-8, as tables and notebooks are", self.categories)

    def _default_data(self) -> Path:
        if self.profile == "demo":  # the same drawn images stand in for BTAD
            return draw_demo(runs_root() / "demo-data")
        argument, names = ("btad_root", "01, 02, 03") if self.dataset == "btad" else ("data_root", "bottle, cable, ...")
        if not (root := data_root() / self.dataset).is_dir():
            fetch = f"fetch it with: python -m reproduce download {self.dataset}"
            raise FileNotFoundError(f"{argument}: no {root}; name the folder that holds {names}, or {fetch}")
        return root

    @property
    def store(self) -> Store:
        return Store(runs_root())

    @property
    def label(self) -> str:
        """Where the numbers of the single model at these settings come from."""
        return self.label_of(())

    def label_of(self, tasks: Iterable, images: bool = False) -> str:
        """What a table or figure of these tasks says about where its numbers come from: what their entries in fact are.

        images: whether it shows images; then whose they are is said too.
        """
        single = [entry for task in tasks for entry in getattr(task, "members", (task,))]
        configs = [entry.config for entry in single] or [self.config(seed=seed) for seed in self.seeds]
        categories_ = list(dict.fromkeys(entry.category for entry in single)) or self.categories
        backbones = " + ".join(dict.fromkeys(c.backbone for c in configs))
        weights = ", ".join(dict.fromkeys(Path(c.weights).stem for c in configs))
        epochs = _epochs_in_words((c.epochs, c.image_size) for c in configs if c.representation == "trained")
        if self.profile == "demo":
            images = "drawn images" if Path(self.data_root).parent == runs_root() else self.data_root
            return f"Demo: {images}, {backbones} with weights {weights}, {epochs}. The numbers are not the paper's."
        n = len({c.seed for c in configs})
        few = ", ".join(categories_) if len(categories_) <= 3 else f"{len(categories_)} categories"
        credits = ", ".join(words for words, names in CREDITS.items() if {*names} & {*categories_}) if images else ""
        shown = f" Images: {credits}." if credits else ""
        return f"{few}; {backbones} ({weights}), {epochs}, {n} seed{'s' if n > 1 else ''}.{shown}"

    def departures(self, of: Sequence[str] | None = None) -> list[str]:
        """In what this is not the paper's setting; empty where it is.

        of: the categories that an item is of; all of the data set where None.
        """
        if self.profile == "demo":
            images = "drawn images, CNN, " * (Path(self.data_root).parent == runs_root())
            return [f"the demo's {images}size and coreset"]
        btad = self.dataset == "btad"
        expected = PROFILES["paper"] | (ON_BTAD["paper"] if btad else {})
        own = {name: getattr(self, name) for name in ("backbone", "epochs")}
        found = [f"{n} {value} instead of {expected[n]}" for n, value in own.items() if value != expected[n]]
        if tag_of(self.backbone, self.weights) != expected["weights"] and not found:
            file = "from the file " if Path(self.weights).is_file() else ""
            found.append(f"weights {file}{Path(self.weights).name} instead of {expected['weights']}")
        whole = ("01", "02", "03") if btad else paper.CATEGORIES
        if of is None and set(self.categories) != set(whole):
            found.append(f"{len(self.categories)} categories instead of the {len(whole)}")
        elif missing := set(of or ()) - set(self.categories):
            found.append(f"without {', '.join(sorted(missing))}")
        return found

    def one_category(self, category: str = "", prefer: str = "") -> str:
        """A notebook's own ``category``, checked; where it is empty ``prefer``, or the first where that is not there.

        Raises:
            ValueError: not among the categories of this run; names them and the nearest.
        """
        check_names("category: this run has no", [category] * bool(category), self.categories)
        return category or (prefer if prefer in self.categories else self.categories[0])

    def some_epochs(self, at_epochs: Sequence[int]) -> list[int]:
        """A figure's own ``at_epochs``, checked: nothing can be seen after an epoch that is not trained.

        Raises:
            ValueError: one is below 1 or beyond ``epochs``.
        """
        for epoch in check_type("at_epochs", tuple[int, ...], tuple(at_epochs)):
            require("at_epochs", 1 <= epoch <= self.epochs, f"epochs from 1 to {self.epochs}", epoch)
        return list(at_epochs)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Which categories are objects and which textures."""
        return DEMO_GROUPS if self.profile == "demo" else {"object": paper.OBJECTS, "texture": paper.TEXTURES}

    def config(self, **changes) -> Config:
        """The paper's single-model config with this profile's backbone, weights and epochs."""
        base = {name: getattr(self, name) for name in ("backbone", "weights", "epochs", "device")}
        small = DEMO if self.profile == "demo" else {}
        if "backbone" in changes and not self.render_only:  # of an ensemble: each is looked up before one is computed
            backbone.check(changes["backbone"], changes.get("weights", self.weights))
        return Config.build(**(base | {"seed": self.seeds[0]} | small | changes))

    def entries(self, configs: Sequence[Config], **changes) -> list[Entry]:
        """Every config for every category and seed; ``changes`` go to :class:`reproduce.entries.Entry`."""
        return [
            Entry(dataclasses.replace(config, seed=seed), self.data_root, category, **changes)
            for category in self.categories for config in configs for seed in self.seeds
        ]  # fmt: skip

    def out(self, name: str) -> Path:
        """Where a table or figure of this run goes: beside the executed notebooks; a shard, which is not the whole, has its own folder."""
        folder = runs_root() / "reproduce" / self.profile
        if self.shard != "1/1":
            folder /= f"shard-{self.shard.replace('/', '-of-')}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


def settings(names: dict, dataset: str = "mvtec") -> Settings:
    """Checked settings from a notebook's ``globals()``; call it in the cell after the parameters.

    dataset: which data the notebook is about: "mvtec", "btad" (all its categories) or "none".

    The parameters are the names assigned in the cell that declares ``profile``, and those that papermill injected after it:
    papermill itself only warns of an unknown one, so it is refused here, before any work. A notebook's own parameters are
    plain variables; only those that :class:`Settings` knows are in what is returned.
    """
    sources = list(names.get("In", []))
    declared = next((assigned(s) for s in sources if "profile" in assigned(s)), {})
    injected = [name for s in sources if s.lstrip().startswith("# Parameters") for name in assigned(s)]
    shared = [f.name for f in dataclasses.fields(Settings)]
    valid = declared or shared
    check_names("unknown parameter", injected, valid)
    for name, kind in declared.items():
        # A notebook has parameters of its own; one that is nearly a shared one, which is missing, is a slip.
        left_out = [n for n in shared if n not in declared]
        if name not in shared and (meant := difflib.get_close_matches(name, left_out, 1, 0.8)):
            raise ValueError(f"unknown parameter {name!r} in the cell of parameters. Did you mean {meant[0]!r}?")
        value = names[name] if kind is Any else check_type(name, kind, names[name])
        inside = value if isinstance(value, tuple | dict) else [value]
        fits = kind is Any or all(isinstance(v, str) or (kind is not dict and 0 <= v < 2**63) for v in inside)
        require(name, fits, "no number below 0, and keys that are text", value)
        if name in ("members", "backbones") and not names.get("render_only"):
            for cnn, weights in value.items():
                backbone.check(cnn, check_type(name, str, weights))
    _end_with_batch()
    given = {name: names[name] for name in valid if name in shared and name in names}
    return Settings(**given | ({"categories": ()} if dataset == "btad" else {}), dataset=dataset)


def _end_with_batch() -> None:
    """A batch's kernel ends when the batch does, however that ends: Linux sends the signal."""
    if (batch := os.environ.get("RCP_BATCH")) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(batch):
            os._exit(1)


def assigned(source: str) -> dict[str, Any]:
    """Names that a cell assigns at its top level, and the types that they are declared with; none where it is not plain Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    targets = [(n, t) for n in body for t in (getattr(n, "targets", None) or [getattr(n, "target", None)])]
    of = {t.id: getattr(n, "annotation", None) for n, t in targets if isinstance(t, ast.Name)}
    return {name: KINDS.get(getattr(kind, "id", ""), Any) for name, kind in of.items()}


def at_least(name: str, value: int, least: int) -> int:
    """A notebook's own number, checked.

    Raises:
        ValueError: no whole number, or below ``least``.
    """
    require(name, check_type(name, int, value) >= least, f"{least} or more", value)
    return value


def built(kind: type, name: str, values: dict):
    """A dataclass from a notebook's own parameter ``name``, a dict of its fields.

    Raises:
        ValueError: an unknown key, with the nearest valid one; a value outside its range, from the dataclass.
    """
    check_names(f"{name}: unknown key", values, [field.name for field in dataclasses.fields(kind)])
    return kind(**values)


def tag_of(backbone_: str, weights: str) -> str:
    """``weights``, or where they are torchvision's published file, its tag: name and content have the published hash."""
    path = Path(weights)
    digits = path.stem.rpartition("-")[2]
    if len(digits) != 8 or not path.is_file():
        return weights
    from torchvision import models  # seconds, that a tag does without

    known = models.get_model_weights(backbone_) if backbone_ in models.list_models(module=models) else ()
    for published in known:
        if Path(published.url).stem.endswith(f"-{digits}"):
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest()
            return published.name if whole.startswith(digits) else weights
    return weights


def by_tag(members: dict[str, str]) -> dict[str, str]:
    """backbone -> weights, with the tag in the place of a published file."""
    return {name: tag_of(name, weights) for name, weights in members.items()}


def _epochs_in_words(trained: Iterable[tuple[int, int]]) -> str:
    """(epochs, side of the images) -> "4 epochs" or "2 epochs at 160 px, 4 at 224 px"."""
    if not (trained := list(dict.fromkeys(trained))):
        return "no f trained"
    (first, side), *others = trained
    words = f"{first} epoch{'s' if first != 1 else ''}"
    if all(epochs == first for epochs, _ in others):
        return words
    return ", ".join([f"{words} at {side} px", *(f"{epochs} at {size} px" for epochs, size in others)])


def report(grid: Grid, entries: Sequence) -> None:
    """How many of these entries are there, which are missing, and which categories have no image AUROC, and why."""
    print(f"{len(grid.results)} of {len(entries)} entries are there")
    left: dict[str, list[str]] = {}
    for e in grid.missing:
        setting = f"{100 * e.config.coreset_ratio:g} % seed {e.config.seed}"
        left.setdefault(f"{e.category} {e.method}, {e.config.backbone}", []).append(setting)
    for of, settings in left.items():
        print(f"missing: {of}: {len(settings)} ({', '.join(sorted(set(settings)))})")
    undefined = {e.category: r.metrics.get("undefined", {}).get("image_auroc") for e, r in grid.pairs()}
    for category, why in undefined.items():
        if why:
            print(f"{category}: undefined, left out of the means ({why})")


def provenance(results: Sequence[Result], entries: int) -> str:
    """A few lines on where a grid's numbers come from: entries done, commit, versions, devices, hours, seeds.

    Entries that are one stored result (all seeds of a PatchCore) count once.
    """
    if not results:
        return f"0 of {entries} entries done."
    from_store = ("identity", "checksum")  # what only a result that was read again has
    once = {json.dumps({n: v for n, v in r.info.items() if n not in from_store}, sort_keys=True): r for r in results}
    infos = [r.info for r in once.values()]
    hours = sum(sum(info["seconds"].values()) for info in infos) / 3600
    commits, devices = (", ".join(sorted({info[name] for info in infos})) for name in ("commit", "device"))
    seeds = ", ".join(map(str, sorted({info["config"]["seed"] for info in infos})))
    same = f" ({len(once)} results, the others are the same)" if len(once) < len(results) else ""
    of = " | ".join(sorted({_versions(info["versions"]) for info in infos}))  # of each machine
    done = f"{len(results)} of {entries} entries done{same}; commit {commits}; {of}; {devices}"
    return textwrap.fill(f"{done}; {hours:.2f} hours of computing; seeds {seeds}", 100)


def environment(device) -> str:
    """One line on where this session's numbers come from: commit, versions, device."""
    return f"commit {commit()}; {_versions(versions())}; {device_name(device)}"


def _versions(of: dict[str, str]) -> str:
    return ", ".join(f"{name} {of[name]}" for name in ("rcp", "torch", "torchvision", "faiss-gpu", "adamp"))
