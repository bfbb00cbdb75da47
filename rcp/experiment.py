"""One cell of a grid = (config, data set, category, seed) → metrics and scores, computed once; and ensembles of cells.

Notebooks, papermill batches, grids and tests all go through :func:`run`, so all of them resume.
"""

import dataclasses
import datetime
import importlib.metadata
import logging
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from rcp import backbone, coreset, metrics, paths, refinement
from rcp.augment import Perturbation, PerturbedTransform
from rcp.config import Config, check_type
from rcp.data import Dataset, Split, Transform, load_dataset, load_images
from rcp.detector import Prediction, ReConPatch
from rcp.provenance import code_of, code_upto
from rcp.refinement import Refinement
from rcp.scoring import center_and_deviation, modified_z_score, score_maps
from rcp.store import Store, require_disk

logger = logging.getLogger("rcp")


@dataclass(frozen=True)
class Cell:
    """One detector on one category: (config, data set, category, seed). ``config.seed`` is the seed.

    dataset: a folder. perturbation: of Appendix C.1, or None; perturbed: the splits that it applies to.
    """

    config: Config
    dataset: str
    category: str | None = None
    layout: str = "auto"
    perturbation: Perturbation | None = None
    perturbed: Literal["both", "train", "test"] = "both"

    def __post_init__(self):
        check_type("perturbed", Literal["both", "train", "test"], self.perturbed)

    @property
    def method(self) -> str:
        return "ReConPatch" if self.config.represent else "PatchCore"

    def columns(self) -> dict:
        """What tells this cell from others in a table: method, category, augmentation, every hyper-parameter."""
        words = {True: "with", False: "without"}
        named = {"method": self.method, "category": self.category, "augmentation": words[self.perturbation is not None]}
        named |= {"refinement": "without", "simulation": "no refinement"}
        as_printed = {
            "layers": "+".join(map(str, self.config.layers)),
            "projection_layer": words[self.config.projection is not None],
        }
        weights = self.config.weights
        if Path(weights).suffix:  # a file, which goes by its name: where it lies is of this machine
            as_printed["weights"] = Path(weights).name
        return named | self.config.asdict() | as_printed

    def data(self) -> Dataset:
        return load_dataset(self.dataset, category=self.category, layout=self.layout)

    def perturbation_of(self, split: str) -> Perturbation | None:
        return self.perturbation if self.perturbed in ("both", split) else None

    def transform(self, split: str) -> Transform:
        """How the pictures of a split ("train", "test") are read."""
        c, how = self.config, self.perturbation_of(split)
        transform = Transform(resize=c.resize, image_size=c.image_size, aspect=c.aspect)
        return transform if how is None else PerturbedTransform.of(transform, how)

    def identity(self) -> dict:
        """What the result depends on: resolved config, content of data and weights, code. Not the device, not any path."""
        return self.identity_upto("scores", self.data(), ("train", "test"))

    def identity_upto(self, stage: str, data: Dataset, splits: Sequence[str]) -> dict:
        """The same of one stage's result, which is of these splits."""
        c = self.config
        return {
            "config": c.upto(stage) | {"weights": backbone.weights_identity(c.backbone, c.weights)},
            "data": data.fingerprint(),
            "perturbation": {name: _described(self.perturbation_of(name)) for name in splits},
            "code": code_upto(stage),
        }

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        """-> (result for JSON, arrays). Nothing is stored but features and f, which other cells may share."""
        data = self.data()
        fitted, test = fit(self, data, store, log)
        prediction = dataclasses.replace(fitted.predict_features(test), transform=self.transform("test"))
        with fitted.timings_("metrics"):
            measured = metrics.evaluate(prediction, data.test)
        held_out = fitted.train_patch_scores_
        result = {
            "config": self.config.asdict(),
            "data": _counts(data),
            "metrics": measured,
            "bank": list(fitted.bank_.entries.shape),
            "bank_bytes": fitted.bank_.entries.nbytes,
            "history": fitted.history_,
            "seconds": {stage: round(seconds, 3) for stage, seconds in fitted.timings_.items()},
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(fitted.device)
            if fitted.device.type == "cuda"
            else 0,
            "device": device_name(fitted.device),
            # of the held-out training scores: what Eq. 11 takes
            "train_statistics": {}
            if held_out is None
            else {"image": _statistics(held_out.max(1)), "patch": _statistics(held_out)},
        }
        arrays = {"scores": prediction.scores, "labels": data.test.labels, "patch_scores": prediction.patch_scores}
        return result, arrays | ({} if held_out is None else {"train_scores": fitted.train_scores_})


class OfACell:
    """What a task about one cell's detector takes over from the cell."""

    cell: Cell

    @property
    def config(self) -> Config:
        return self.cell.config

    @property
    def category(self) -> str | None:
        return self.cell.category

    @property
    def method(self) -> str:
        return self.cell.method

    def columns(self) -> dict:
        return self.cell.columns()


@dataclass(frozen=True)
class Refined(OfACell):
    """A cell's detector with a refinement network (Appendix D); unrefined scores and maps are the cell's own.

    ``refine.seed`` is of the network, ``cell.config.seed`` of the detector.
    """

    cell: Cell
    refine: Refinement

    def data(self) -> Dataset:
        return self.cell.data()

    def transform(self, split: str) -> Transform:
        return self.cell.transform(split)

    def columns(self) -> dict:
        return super().columns() | {"refinement": "with", "simulation": self.refine.simulation.kind}

    def identity(self) -> dict:
        return {
            "cell": self.cell.identity(),
            "refinement": self.refine.identity(),
            "code": code_of("rcp.refinement", "rcp.experiment"),
        }

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        data, c = self.data(), self.config
        textures = self.refine.load_textures(c.image_size)
        train, test = (load_images(getattr(data, n).paths, self.transform(n)) for n in ("train", "test"))
        fitted, features = fit(self.cell, data, store, log, self.refine)
        checkpoint = store.folder("checkpoints", self.identity()).with_suffix(".safetensors")
        refinement.fit(fitted, train, textures, log, checkpoint, data.train.paths)
        prediction = fitted.predict_features(features, pictures=test)
        prediction = dataclasses.replace(prediction, transform=self.transform("test"))
        result = {
            "config": c.asdict(),
            "refinement": self.refine.asdict(),
            "data": _counts(data),
            "metrics": metrics.evaluate(prediction, data.test),
            "history": fitted.refinement_history_,
            "seconds": {stage: round(seconds, 3) for stage, seconds in fitted.timings_.items()},
            "device": device_name(fitted.device),
        }
        checkpoint.unlink(missing_ok=True)
        arrays = {"scores": prediction.scores, "labels": data.test.labels, "log_odds": _log_odds(prediction.maps)}
        return result, arrays | {"patch_scores": prediction.patch_scores}


def _log_odds(maps: np.ndarray) -> np.ndarray:
    """Probabilities -> float16 that keep the order of the small ones."""
    p = np.clip(maps.astype(np.float64), 1e-30, 1 - 1e-7)
    return (np.log(p) - np.log1p(-p)).astype(np.float16)


@dataclass(frozen=True)
class Ensemble:
    """Several cells on one category and seed, their scores brought to one scale by Eq. 11 and averaged (Table 6).

    The statistics of Eq. 11 are those of the members' held-out *training* scores; nothing of the test set is used.
    Refined members (Table S8) are on one scale already: their maps say how likely a pixel is defective.

    level: they are of "image" scores or of "patch" scores. deviation, beta: as :func:`rcp.scoring.center_and_deviation`.
    """

    members: tuple[Cell, ...] | tuple[Refined, ...]
    level: Literal["image", "patch"] = "image"
    deviation: Literal["median", "mean"] = "median"
    beta: float = 1.4826

    def __post_init__(self):
        check_type("level", Literal["image", "patch"], self.level)
        check_type("deviation", Literal["median", "mean"], self.deviation)

    @property
    def config(self) -> Config:
        return self.members[0].config

    @property
    def category(self) -> str | None:
        return self.members[0].category

    @property
    def method(self) -> str:
        return self.members[0].method

    def data(self) -> Dataset:
        return self.members[0].data()

    def columns(self) -> dict:
        """As :meth:`Cell.columns`; the backbones are joined with "+"."""
        return self.members[0].columns() | {"backbone": "+".join(m.config.backbone for m in self.members)}

    def identity(self) -> dict:
        how = {name: getattr(self, name) for name in ("level", "deviation", "beta")}
        return {"members": [m.identity() for m in self.members], "code": code_of("rcp.experiment")} | how

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        results = [run(member, store, log) for member in self.members]
        refined = [isinstance(member, Refined) for member in self.members]
        if any(refined) and not all(refined):
            raise ValueError("members: expected all of them with a refinement network or none, got some of both")
        c, data = self.config, self.data()
        if all(refined):
            images, patches, maps = [r.scores for r in results], [], [r.maps() for r in results]
        else:
            images, patches = zip(*(self._normalized(r) for r in results), strict=True)
            # a map is linear in its patch scores: the mean of the maps is the map of the mean where the grids agree
            maps = [score_maps(torch.from_numpy(p), c.image_size, c.blur) for p in patches]
        scores, maps = np.mean(images, 0), np.mean(maps, 0)
        prediction = Prediction(scores, maps, self.members[0].transform("test"), None)
        result = {
            "config": c.asdict(),
            "data": _counts(data),
            "members": [r.info["config"]["backbone"] for r in results],
            "metrics": metrics.evaluate(prediction, data.test),
            "seconds": {"members": sum(sum(r.info["seconds"].values()) for r in results)},
            "device": results[0].info["device"],
        }
        shared = {"patch_scores": np.mean(patches, 0)} if len({p.shape for p in patches}) == 1 else {}
        return result, {"scores": scores, "labels": data.test.labels} | shared

    def _normalized(self, result: "Result") -> tuple[np.ndarray, np.ndarray]:
        """One member's image and patch scores in units of Eq. 11."""
        statistics = result.info["train_statistics"]
        if not statistics:
            raise ValueError(
                "calibration_folds: expected 2 or more of an ensemble's members (Eq. 11 needs training scores), got 0"
            )
        center, mad = statistics[self.level][self.deviation]
        return tuple(modified_z_score(result.arrays[n], center, mad, self.beta) for n in ("scores", "patch_scores"))


def _described(perturbation: Perturbation | None) -> dict | None:
    return None if perturbation is None else dataclasses.asdict(perturbation) | {"code": code_of("rcp.augment")}


def _counts(data: Dataset) -> dict:
    good = int((data.test.labels == 0).sum())
    named = {"category": data.category, "layout": data.layout, "fingerprint": data.fingerprint()}
    return named | {"train": len(data.train), "test_good": good, "test_defective": len(data.test) - good}


def _statistics(scores: np.ndarray) -> dict[str, tuple[float, float]]:
    return {deviation: center_and_deviation(scores, deviation) for deviation in ("median", "mean")}


@dataclass(frozen=True, eq=False)
class Result:
    """What a task gave.

    metrics: as :func:`rcp.metrics.evaluate` returns them, or the task's own. info: config, data, timings, versions, device, history.
    arrays: of a cell scores, labels (n_test,), patch_scores (n_test, h, w), train_scores (n_train,) where held out.
    """

    metrics: dict
    info: dict
    arrays: dict[str, np.ndarray]
    computed: bool  # in this call, instead of read from the store

    @property
    def scores(self) -> np.ndarray:
        return self.arrays["scores"]

    @property
    def labels(self) -> np.ndarray:
        return self.arrays["labels"]

    @property
    def patches(self) -> int | None:
        """Patches of the training set: N_images · h · w."""
        if "patch_scores" not in self.arrays:
            return None
        return self.info["data"]["train"] * int(np.prod(self.arrays["patch_scores"].shape[1:]))

    def maps(self) -> np.ndarray:
        """(n_test, S, S) float32 score maps, drawn again from the patch scores; where refined, those of the refinement network."""
        if "log_odds" in self.arrays:
            return 1 / (1 + np.exp(-self.arrays["log_odds"].astype(np.float32)))
        c = self.info["config"]
        return score_maps(torch.from_numpy(self.arrays["patch_scores"]), c["image_size"], c["blur"])


def run(task, store: Store | None = None, log: Callable[[str], None] = logger.info) -> Result:
    """Looks a task up in the store, else computes and stores it.

    A task is a :class:`Cell`, an :class:`Ensemble` or anything else with ``identity()`` and ``compute(store, log)``. All
    pictures are decoded before any feature is computed, and disk space is checked before that, so that bad input costs no work.

    Raises:
        ValueError, FileNotFoundError: bad data, weights or hyper-parameters, named.
        OSError: no disk space.
    """
    store = store or Store(paths.runs_root())
    identity = task.identity()
    if found := store.load_cell(identity):
        return _result(*found, computed=False)
    with store.locked("cells", identity):
        if found := store.load_cell(identity):  # another process computed it while this one waited
            return _result(*found, computed=False)
        started = datetime.datetime.now(datetime.UTC)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result, arrays = task.compute(store, log)
        result |= {
            "started": started.isoformat(timespec="seconds"),
            "process_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "versions": versions(),
            "commit": commit(),
        }
        store.save_cell(identity, result, arrays)
    return _result(result, arrays, computed=True)


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of one table that are there, in order, and those that are not."""

    cells: list
    results: list[Result]
    missing: list

    def pairs(self) -> list[tuple]:
        """(cell, result) of each cell that is there."""
        return list(zip(self.cells, self.results, strict=True))

    def frame(self) -> pd.DataFrame:
        """One row per cell: method, category, augmentation, every hyper-parameter, every metric (fractions)."""
        rows = [
            cell.columns()
            | {"bank_bytes": result.info.get("bank_bytes"), "patches": result.patches}
            | {name: value for name, value in result.metrics.items() if name != "undefined"}
            for cell, result in self.pairs()
        ]
        always = [*Cell(Config(), "").columns(), "bank_bytes", "patches"]
        measured = ["image_auroc", "d_prime", "f1", "pixel_auroc", "aupro"]
        return pd.DataFrame(rows, columns=None if rows else [*always, *measured])


def run_grid(cells: Sequence, store: Store, *, shard: str = "1/1", render_only: bool = False, log=print) -> Grid:
    """Every cell of this shard through :func:`run`, with a line each; the rest from the store where it is there.

    Args:
        shard: "i/n" computes every n-th cell from the i-th.
        render_only: computes nothing; what the store lacks is in ``missing``.
    """
    mine = [] if render_only else shard_of(cells, shard)
    done = {}
    for i, cell in enumerate(mine, 1):
        name = f"[{i}/{len(mine)}] {cell.category} {cell.method} seed {cell.config.seed}"
        log(f"{name} ...")
        result = done[id(cell)] = run(cell, store, _seldom(log))
        took = f"{sum(result.info['seconds'].values()):.0f} s" if result.computed else "from the store"
        if "image_auroc" in result.metrics:  # a feature space or a time has none
            auroc = result.metrics["image_auroc"]
            took = f"image AUROC {'undefined' if auroc is None else f'{auroc:.4f}'}, {took}"
        log(f"{name}: {took}")
    found = {id(cell): done.get(id(cell)) or load(cell, store) for cell in cells}
    there = [cell for cell in cells if found[id(cell)]]
    return Grid(there, [found[id(cell)] for cell in there], [cell for cell in cells if not found[id(cell)]])


def _seldom(log: Callable[[str], None], seconds: float = 30.0) -> Callable[[str], None]:
    """At most one line in so many seconds: a long training says where it is, a quick one nothing."""
    last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            log(line)

    return say


def load(task, store: Store) -> Result | None:
    """A task's result from the store, or None; computes nothing."""
    found = store.load_cell(task.identity())
    return _result(*found, computed=False) if found else None


def shard_of(cells: Sequence, shard: str) -> list:
    """The share "i/n" of a sequence: every n-th from the i-th, counted from 1.

    Raises:
        ValueError: not "i/n" with 1 <= i <= n.
    """
    i, _, n = str(shard).partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ValueError(f"shard: expected 'i/n' with 1 <= i <= n, such as '3/8', got {shard!r}")
    return list(cells)[int(i) - 1 :: int(n)]


def extract(
    cell: Cell, detector_: ReConPatch, data: Dataset, splits: Iterable[str], store: Store
) -> dict[str, np.ndarray]:
    """Patch features of the named splits ("train", "test"), from the store or computed into it: (n, h · w, D), memory-mapped."""
    c = detector_.config
    found = {}
    h, w, dim = detector_.extractor.shape()
    wanted = {name: cell.identity_upto("features", data, (name,)) for name in splits}
    missing = [name for name, identity in wanted.items() if not store.folder("features", identity).exists()]
    require_disk(
        store.root,
        sum(len(getattr(data, n)) for n in missing) * h * w * dim * np.dtype(c.feature_dtype).itemsize,
        "patch features",
    )
    with detector_.timings_("decode"):
        decoded = {name: load_images(getattr(data, name).paths, cell.transform(name)) for name in missing}
    for name, identity in wanted.items():
        split: Split = getattr(data, name)
        shape = (len(split), h * w, dim)

        def compute(out, name=name, split=split):
            pictures_ = decoded.pop(name, None)  # nothing is kept once its features are there
            if pictures_ is None:
                pictures_ = load_images(split.paths, cell.transform(name))
            detector_.extractor(pictures_, out=out, names=split.paths)

        with detector_.timings_("features"):
            found[name] = store.features(identity, shape, c.feature_dtype, compute)
    return found


def fit(
    cell: Cell,
    data: Dataset,
    store: Store | None = None,
    log: Callable[[str], None] = logger.info,
    refine: Refinement | None = None,
) -> tuple[ReConPatch, np.ndarray]:
    """-> (fitted detector, features of the test pictures), with features and f from the store: what a notebook needs to look inside.

    f is trained once for all cells that differ only in what comes after it (coreset, memory bank, scores).
    refine: of a refinement network that the caller is to train (:func:`rcp.refinement.fit`).
    """
    store = store or Store(paths.runs_root())
    found = ReConPatch.from_config(cell.config, refine)
    coreset.coreset_size(cell.config.coreset_ratio, len(data.train) * int(np.prod(found.extractor.shape()[:2])))
    features = extract(cell, found, data, ("train", "test"), store)
    return found.fit_features(
        features["train"], log, _trained(cell, found, data, features["train"], store, log)
    ), features["test"]


def _trained(cell: Cell, detector_: ReConPatch, data: Dataset, features: np.ndarray, store: Store, log):
    """f and its history, from the store or trained into it."""
    c = cell.config
    if not c.represent:
        return None, []
    identity = cell.identity_upto("training", data, ("train",))
    with store.locked("representations", identity):
        if stored := store.load_entry("representations", identity):
            info, arrays = stored
            f = torch.nn.Linear(features.shape[-1], c.dim, bias=c.bias, device=detector_.device).requires_grad_(False)
            f.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
            log(f"f from the store, {len(info['history'])} epochs")
            return f, info["history"]
        f, history = detector_.train_features(features, log)
        arrays = {name: value.detach().cpu().numpy() for name, value in f.state_dict().items()}
        store.save_entry("representations", identity, {"history": history}, arrays)
    return f, history


def _result(info: dict, arrays: dict[str, np.ndarray], computed: bool) -> Result:
    return Result(info["metrics"], info, arrays, computed=computed)


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@lru_cache
def versions() -> dict[str, str]:
    """Versions of Python, rcp and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("rcp", "torch", "torchvision", "timm", "faiss-gpu", "adamp", "scikit-learn", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


@lru_cache
def commit() -> str:
    """The project's commit, with "+" where the working tree differs from it; "unknown" outside a checkout."""
    try:
        command = ["git", "-C", str(paths.PROJECT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
