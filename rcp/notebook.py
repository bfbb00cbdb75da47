"""What every notebook begins and ends with: checked parameters, and one line on where its numbers come from."""

import ast
import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

from rcp import backbone, data, experiment, paper, paths
from rcp.config import Config, check_type, nearest
from rcp.data import categories, draw_demo
from rcp.experiment import Cell
from rcp.store import Store

# What a profile stands for where a parameter is left empty.
PROFILES = {
    "demo": {"backbone": "resnet18", "weights": "random:0", "epochs": 4, "seeds": (0,)},
    "paper": {"backbone": "wide_resnet50_2", "weights": "IMAGENET1K_V1", "epochs": 120, "seeds": (0, 1, 2)},
}

# Where BTAD is the data set: Table 7's backbone.
ON_BTAD = {"demo": {}, "paper": {"backbone": "wide_resnet101_2"}}

DEMO_GROUPS = {"object": ("circuit", "gear"), "texture": ("fabric",)}


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
    dataset: Literal["mvtec", "btad", "none"] = (
        "mvtec"  # which of the two roots, or neither; no parameter of a notebook
    )

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            check_type(name, kind, getattr(self, name))
        defaults = PROFILES[self.profile] | (ON_BTAD[self.profile] if self.dataset == "btad" else {})
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        experiment.shard_of([], self.shard)
        if not self.render_only:
            backbone.check(self.backbone, self.weights)
        if self.dataset == "none":
            return
        root = self.btad_root if self.dataset == "btad" else self.data_root
        object.__setattr__(self, "data_root", root or str(self._default_data()))
        there = categories(self.data_root)
        for name in self.categories:
            if name not in there:
                raise ValueError(
                    f"categories: {self.data_root} has no {name!r}.{nearest(name, there)} There are: {', '.join(there)}"
                )
        object.__setattr__(self, "categories", tuple(self.categories) or tuple(there))

    def _default_data(self) -> Path:
        if self.profile == "demo":
            if self.dataset == "btad":
                return data.draw_demo_btad(paths.runs_root() / "demo-btad")
            return draw_demo(paths.runs_root() / "demo-data")
        argument, holds = {"mvtec": ("data_root", "bottle, cable, ..."), "btad": ("btad_root", "01, 02, 03")}[
            self.dataset
        ]
        if not (root := paths.data_root() / self.dataset).is_dir():
            raise FileNotFoundError(
                f"{argument}: no {root}; name the folder that holds {holds}, or fetch it with: python -m rcp download {self.dataset}"
            )
        return root

    @property
    def store(self) -> Store:
        return Store(paths.runs_root())

    @property
    def label(self) -> str:
        """What every table and figure says about where its numbers come from."""
        if self.profile == "demo":
            pictures = "drawn pictures" if Path(self.data_root).parent == paths.runs_root() else self.data_root
            made_of = f"{pictures}, {self.backbone} with weights {self.weights}, {self.epochs} epochs"
            return f"Demo: {made_of}. The numbers are not the paper's."
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "1 seed"
        few = ", ".join(self.categories) if len(self.categories) <= 3 else f"{len(self.categories)} categories"
        return f"{few}; {self.backbone} ({Path(self.weights).stem}), {self.epochs} epochs, {seeds}."

    def departures(self) -> list[str]:
        """In what this is not the paper's setting; empty where it is."""
        if self.profile == "demo":
            return ["the demo's drawn pictures and random weights"]
        btad = self.dataset == "btad"
        expected = PROFILES["paper"] | (ON_BTAD["paper"] if btad else {})
        found = [
            f"{name} {getattr(self, name)} instead of {expected[name]}"
            for name in ("backbone", "epochs")
            if getattr(self, name) != expected[name]
        ]
        if self.weights != expected["weights"] and not found:
            found.append(f"weights {Path(self.weights).name} instead of {expected['weights']}")
        whole = ("01", "02", "03") if btad else paper.CATEGORIES
        if set(self.categories) != set(whole):
            found.append(f"{len(self.categories)} categories instead of the {len(whole)}")
        return found

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Which categories are objects and which textures."""
        return DEMO_GROUPS if self.profile == "demo" else {"object": paper.OBJECTS, "texture": paper.TEXTURES}

    def config(self, **changes) -> Config:
        """The paper's single-model config with this profile's backbone, weights and epochs."""
        base = {
            "backbone": self.backbone,
            "weights": self.weights,
            "epochs": self.epochs,
            "device": self.device,
            "seed": self.seeds[0],
        }
        return Config.build(**(base | changes))

    def cells(self, configs: Sequence[Config], **changes) -> list[Cell]:
        """Every config for every category and seed; ``changes`` go to :class:`rcp.experiment.Cell`."""
        return [
            Cell(dataclasses.replace(config, seed=seed), self.data_root, category, **changes)
            for category in self.categories
            for config in configs
            for seed in self.seeds
        ]

    def out(self, name: str) -> Path:
        """Where a table or figure of this run goes: beside the executed notebooks."""
        folder = paths.runs_root() / "reproduce" / self.profile
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
    declared = next((_assigned(s) for s in sources if "profile" in _assigned(s)), [])
    injected = [name for s in sources if s.lstrip().startswith("# Parameters") for name in _assigned(s)]
    shared = [f.name for f in dataclasses.fields(Settings)]
    valid = declared or shared
    for name in injected:
        if name not in valid:
            raise ValueError(f"unknown parameter {name!r}.{nearest(name, valid)} Valid: {', '.join(valid)}")
    given = {name: plain(names[name]) for name in valid if name in shared and name in names}
    return Settings(**given | ({"categories": ()} if dataset == "btad" else {}), dataset=dataset)


def plain(value):
    """A parameter as papermill has it (a list) -> as frozen settings hold it (a tuple)."""
    return tuple(value) if isinstance(value, list) else value


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns at its top level; none where it is not plain Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    targets = [t for node in body for t in (getattr(node, "targets", None) or [getattr(node, "target", None)])]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def report(grid: experiment.Grid, cells: Sequence, say=print) -> None:
    """How much of a grid is there, which cells are missing, and which categories have no pixel metrics, and why."""
    say(f"{len(grid.results)} of {len(cells)} cells are there")
    for cell in grid.missing:
        say(f"missing: {cell.category} {cell.method} seed {cell.config.seed} {cell.config}")
    for category, why in grid.undefined().items():
        say(f"{category}: no pixel metrics, left out of their means ({why})")


def provenance(results: Sequence[experiment.Result], cells: int) -> str:
    """A few lines on where a grid's numbers come from: cells done, commit, versions, devices, hours, seeds."""
    if not results:
        return f"0 of {cells} cells done."
    infos = [r.info for r in results]
    hours = sum(sum(info["seconds"].values()) for info in infos) / 3600
    commits, devices = (", ".join(sorted({info[name] for info in infos})) for name in ("commit", "device"))
    seeds = ", ".join(map(str, sorted({info["config"]["seed"] for info in infos})))
    versions = _versions(infos[0]["versions"])
    done = f"{len(results)} of {cells} cells done; commit {commits}; {versions}; {devices}"
    return textwrap.fill(f"{done}; {hours:.2f} hours of computing; seeds {seeds}", 100)


def environment(device) -> str:
    """One line on where this session's numbers come from: commit, versions, device."""
    return f"commit {experiment.commit()}; {_versions(experiment.versions())}; {experiment.device_name(device)}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("rcp", "torch", "torchvision", "faiss-gpu", "adamp"))
