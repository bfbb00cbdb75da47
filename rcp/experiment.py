"""One cell of a grid = (config, data set, category, seed) → metrics and scores, computed once.

Notebooks, papermill batches, grids and tests all go through :func:`run`, so all of them resume.
"""

import ast
import datetime
import hashlib
import importlib.metadata
import inspect
import logging
import platform
import resource
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from rcp import (
    backbone,
    config,
    coreset,
    detector,
    graphs,
    leading,
    losses,
    memory,
    metrics,
    model,
    patches,
    paths,
    scoring,
    similarity,
)
from rcp.config import Config
from rcp.data import Dataset, Split, layouts, load_dataset, load_images, pictures
from rcp.detector import ReConPatch
from rcp.store import Store, require_disk

logger = logging.getLogger("rcp")

FEATURE_CODE = (config, pictures, layouts, backbone, patches)
CELL_CODE = (
    *FEATURE_CODE,
    similarity,
    losses,
    "optimizer",
    model,
    coreset,
    "kernels",
    leading,
    memory,
    scoring,
    detector,
    graphs,
    metrics,
)
_FEATURE_FIELDS = (
    "resize",
    "image_size",
    "aspect",
    "backbone",
    "layers",
    "backbone_dtype",
    "patch_size",
    "patch_dim",
    "feature_dtype",
    "extracted_dim",
)
_PATCHCORE_IGNORES = (
    "projection", "bias", "init", "epochs", "lr", "weight_decay", "cosine", "batch_size", "batch_pictures", "k", "margin", "alpha",
    "sigma", "gamma", "normalize_teacher", "gate", "self_neighbour", "expansion", "half_k", "empty_expansion", "drop_last",
    "pairs", "diagonal",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One cell of a grid. ``dataset`` is a folder; ``config.seed`` is the seed."""

    config: Config
    dataset: str
    category: str | None = None
    layout: str = "auto"


@dataclass(frozen=True, eq=False)
class Result:
    """What a cell gave.

    metrics: as :func:`rcp.metrics.evaluate` returns them. info: config, data, timings, versions, device, peak memory, history.
    scores, labels: (n_test,) of the test pictures; train_scores: (n_train,), or (0,).
    """

    metrics: dict
    info: dict
    scores: np.ndarray
    labels: np.ndarray
    train_scores: np.ndarray
    computed: bool  # in this call, instead of read from the store


def run(cell: Cell, store: Store | None = None, log: Callable[[str], None] = logger.info) -> Result:
    """Looks a cell up in the store, else computes and stores it.

    All pictures are decoded before any feature is computed, and disk space is checked before that, so that bad input
    costs no work. Features are shared by every cell that needs the same.

    Raises:
        ValueError, FileNotFoundError: bad data, weights or hyper-parameters, named.
        OSError: no disk space.
    """
    store = store or Store(paths.runs_root())
    data = load_dataset(cell.dataset, category=cell.category, layout=cell.layout)
    identity = identity_of(cell, data)
    if found := store.load_cell(identity):
        return _result(*found, computed=False)
    with store.locked("cells", identity):
        if found := store.load_cell(identity):  # another process computed it while this one waited
            return _result(*found, computed=False)
        result, arrays = _compute(cell, data, store, log)
        store.save_cell(identity, result, arrays)
    return _result(result, arrays, computed=True)


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of one table that are there, in order, and those that are not."""

    cells: list[Cell]
    results: list[Result]
    missing: list[Cell]

    def frame(self) -> pd.DataFrame:
        """One row per cell: method, category, seed, every hyper-parameter that differs, every metric (fractions)."""
        rows = []
        for cell, result in zip(self.cells, self.results, strict=True):
            metrics_ = {name: value for name, value in result.metrics.items() if name != "undefined"}
            rows.append({"method": _method(cell), "category": cell.category} | cell.config.asdict() | metrics_)
        return pd.DataFrame(
            rows, columns=None if rows else ["method", "category", "seed", "image_auroc", "pixel_auroc"]
        )


def _method(cell: Cell) -> str:
    return "ReConPatch" if cell.config.represent else "PatchCore"


def run_grid(cells: Sequence[Cell], store: Store, *, shard: str = "1/1", render_only: bool = False, log=print) -> Grid:
    """Every cell of this shard through :func:`run`, with a line each; the rest from the store where it is there.

    Args:
        shard: "i/n" computes every n-th cell from the i-th.
        render_only: computes nothing; what the store lacks is in ``missing``.
    """
    mine = [] if render_only else shard_of(cells, shard)
    for i, cell in enumerate(mine, 1):
        name = f"[{i}/{len(mine)}] {cell.category} {_method(cell)} seed {cell.config.seed}"
        log(f"{name} ...")
        result = run(cell, store, log)
        auroc = result.metrics["image_auroc"]
        took = f"{sum(result.info['seconds'].values()):.0f} s" if result.computed else "from the store"
        log(f"{name}: image AUROC {'undefined' if auroc is None else f'{auroc:.4f}'}, {took}")
    found = {id(cell): load(cell, store) for cell in cells}
    done = [cell for cell in cells if found[id(cell)]]
    return Grid(done, [found[id(cell)] for cell in done], [cell for cell in cells if not found[id(cell)]])


def load(cell: Cell, store: Store) -> Result | None:
    """A cell's result from the store, or None; computes nothing."""
    found = store.load_cell(identity_of(cell, load_dataset(cell.dataset, category=cell.category, layout=cell.layout)))
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


def identity_of(cell: Cell, data: Dataset) -> dict:
    """What a cell's result depends on: resolved config, content of data and weights, code. Not the device, not any path."""
    values = cell.config.asdict()
    for name in ("device", "weights"):
        del values[name]
    if not cell.config.represent:
        for name in _PATCHCORE_IGNORES:
            del values[name]
        if cell.config.coreset_projection is None and cell.config.coreset_start == "mean":
            del values["seed"]  # nothing is drawn: all seeds are the same cell
    return {
        "config": values,
        "weights": backbone.weights_identity(cell.config.backbone, cell.config.weights),
        "data": data.fingerprint(),
        "code": code_version(CELL_CODE),
    }


@lru_cache
def code_version(modules: tuple) -> str:
    """Hash of the modules' code without comments, docstrings and layout (Python's own version can change it).

    A module of rcp that may not be importable here goes by its name.
    """
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        tree = ast.parse(
            (paths.PACKAGE / f"{module}.py").read_text() if isinstance(module, str) else inspect.getsource(module)
        )
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
                and ast.get_docstring(node, clean=False) is not None
            ):
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


def extract(detector_: ReConPatch, data: Dataset, splits: Iterable[str], store: Store) -> dict[str, np.ndarray]:
    """Patch features of the named splits ("train", "test"), from the store or computed into it: (n, h · w, D), memory-mapped."""
    c = detector_.config
    shape, found = None, {}
    described = {name: getattr(c, name) for name in _FEATURE_FIELDS} | {"layers": list(c.layers)}
    described |= {
        "weights": backbone.weights_identity(c.backbone, c.weights),
        "code": code_version(FEATURE_CODE),
    }
    h, w, dim = detector_.extractor.shape()
    wanted = {name: described | {"data": data.fingerprint(), "split": name} for name in splits}
    missing = [name for name, identity in wanted.items() if not store.folder("features", identity).exists()]
    require_disk(
        store.root,
        sum(len(getattr(data, n)) for n in missing) * h * w * dim * np.dtype(c.feature_dtype).itemsize,
        "patch features",
    )
    with detector_.timings_("decode"):
        decoded = {name: load_images(getattr(data, name).paths, detector_.transform) for name in missing}
    for name, identity in wanted.items():
        split: Split = getattr(data, name)
        shape = (len(split), h * w, dim)

        def compute(out, name=name, split=split):
            pictures_ = decoded.pop(name, None)  # nothing is kept once its features are there
            if pictures_ is None:
                pictures_ = load_images(split.paths, detector_.transform)
            detector_.extractor(pictures_, out=out, names=split.paths)

        with detector_.timings_("features"):
            found[name] = store.features(identity, shape, c.feature_dtype, compute)
    return found


def fit(
    cell: Cell, data: Dataset, store: Store | None = None, log: Callable[[str], None] = logger.info
) -> tuple[ReConPatch, np.ndarray]:
    """-> (fitted detector, features of the test pictures), with features from the store: what a notebook needs to look inside."""
    found = ReConPatch.from_config(cell.config)
    coreset.coreset_size(cell.config.coreset_ratio, len(data.train) * int(np.prod(found.extractor.shape()[:2])))
    features = extract(found, data, ("train", "test"), store or Store(paths.runs_root()))
    return found.fit_features(features["train"], log), features["test"]


def _compute(cell: Cell, data: Dataset, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
    started = datetime.datetime.now(datetime.UTC)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fitted, test = fit(cell, data, store, log)
    prediction = fitted.predict_features(test)
    with fitted.timings_("metrics"):
        measured = metrics.evaluate(prediction, data.test)
    result = {
        "config": cell.config.asdict(),
        "data": {
            "category": data.category, "layout": data.layout, "fingerprint": data.fingerprint(),
            "train": len(data.train), "test_good": int((data.test.labels == 0).sum()), "test_defective": int((data.test.labels == 1).sum()),
        },
        "metrics": measured,
        "bank": list(fitted.bank_.entries.shape),
        "history": fitted.history_,
        "seconds": {stage: round(seconds, 3) for stage, seconds in fitted.timings_.items()},
        "process_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(fitted.device) if fitted.device.type == "cuda" else 0,
        "started": started.isoformat(timespec="seconds"),
        "device": device_name(fitted.device),
        "versions": versions(),
        "commit": commit(),
    }  # fmt: skip
    train_scores = np.empty(0, np.float32) if prediction.train_scores is None else prediction.train_scores
    arrays = {"scores": prediction.scores, "labels": data.test.labels, "train_scores": train_scores}
    return result, arrays


def _result(info: dict, arrays: dict[str, np.ndarray], computed: bool) -> Result:
    return Result(
        info["metrics"], info, **{n: arrays[n] for n in ("scores", "labels", "train_scores")}, computed=computed
    )


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
