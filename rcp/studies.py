"""What is no grid of AUROCs: the space of patch features (Figures 3 and S1) and the time of an inference (Table S6).

Both are tasks for :func:`rcp.experiment.run`: computed once, found again in the store.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rcp import experiment, timing
from rcp.data import load_images
from rcp.detector import ReConPatch
from rcp.experiment import Cell, OfACell
from rcp.provenance import code_of
from rcp.store import Store


def _about(task: OfACell, detector: ReConPatch) -> dict:
    seconds = {stage: round(seconds, 3) for stage, seconds in detector.timings_.items()}
    return {"config": task.config.asdict(), "device": experiment.device_name(detector.device), "seconds": seconds}


@dataclass(frozen=True)
class FeatureSpace(OfACell):
    """Patch features of a few training pictures in two dimensions (UMAP), and how much they know of their position.

    epochs: after which f is looked at; () for PatchCore. pictures: how many, spread over the training set.
    neighbours: of UMAP. Position is predicted from the 5 nearest patches of *other* pictures.
    """

    cell: Cell
    epochs: tuple[int, ...] = ()
    pictures: int = 8
    neighbours: int = 15

    def identity(self) -> dict:
        how = {"epochs": list(self.epochs), "pictures": self.pictures, "neighbours": self.neighbours}
        return {
            "study": "feature space",
            "cell": self.cell.identity(),
            "code": code_of("rcp.studies"),
        } | how

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        data = self.cell.data()
        detector = ReConPatch.from_config(self.config)
        train = experiment.extract(self.cell, detector, data, ("train",), store)["train"]
        chosen = np.unique(np.linspace(0, len(train) - 1, self.pictures).astype(int))
        shown = torch.from_numpy(train[chosen])
        spaces = {}

        def look(epoch: int, f: torch.nn.Linear | None) -> None:
            if f is None or epoch in self.epochs:
                detector.f_ = f
                spaces[f"epoch {epoch}" if epoch else "PatchCore"] = detector.represent_patches(shown).cpu().numpy()

        if self.config.represent:
            detector.train_features(train, log, look)
        else:
            look(0, None)
        side = int(train.shape[1] ** 0.5)
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
        positions, picture = np.tile(grid, (len(chosen), 1)), np.repeat(np.arange(len(chosen)), len(grid))
        arrays, position = {"positions": positions}, {}
        for name, space in spaces.items():
            flat = space.reshape(-1, space.shape[-1])
            log(f"{name}: UMAP of {len(flat)} patches ...")
            with detector.timings_("umap"):
                arrays[name] = embed(flat, self.neighbours, self.config.seed)
            position[name] = position_r2(flat, positions, picture)
            log(f"{name}: position predicted with R² {position[name]:.3f}")
        return _about(self, detector) | {"metrics": {"position_r2": position, "undefined": {}}}, arrays


def embed(features: np.ndarray, neighbours: int = 15, seed: int = 0) -> np.ndarray:
    """UMAP with its defaults. features: (n, D) -> (n, 2) float32."""
    from umap import UMAP

    return UMAP(n_neighbors=min(neighbours, len(features) - 1), random_state=seed, n_jobs=1).fit_transform(features)


def position_r2(features: np.ndarray, positions: np.ndarray, picture: np.ndarray, k: int = 5) -> float:
    """How well a patch's place is known from its features: R² of the mean place of its k nearest patches of other pictures.

    features: (n, D); positions: (n, 2) row and column; picture: (n,) which picture a patch is of. 1 is exact, 0 no better than the
    middle of the picture. Every second picture is predicted from the others.
    """
    from sklearn.metrics import r2_score
    from sklearn.neighbors import KNeighborsRegressor

    asked = picture % 2 == 1
    model = KNeighborsRegressor(k, algorithm="brute").fit(features[~asked], positions[~asked])
    return float(r2_score(positions[asked], model.predict(features[asked])))


@dataclass(frozen=True)
class InferenceTime(OfACell):
    """Table S6's protocol: 10 warm-ups, 30 iterations, split into backbone, features, f, search and map.

    batch: pictures of one pass. The device is part of what the result depends on.
    """

    cell: Cell
    batch: int = 1
    warm_ups: int = 10
    iterations: int = 30

    def identity(self) -> dict:
        from rcp.detector import resolve_device

        how = {name: getattr(self, name) for name in ("batch", "warm_ups", "iterations")}
        code = code_of("rcp.studies")
        device = experiment.device_name(resolve_device(self.config.device))
        return {"study": "inference time", "cell": self.cell.identity(), "device": device, "code": code} | how

    def columns(self) -> dict:
        return super().columns() | {"batch": self.batch}

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        data = self.cell.data()
        detector, _ = experiment.fit(self.cell, data, store, log)
        paths = (list(data.test.paths) * self.batch)[: self.batch]
        pictures = load_images(paths, detector.transform)
        _forget_peak(detector.device)
        seconds = timing.inference(detector, pictures, self.warm_ups, self.iterations)
        peak = _peak(detector.device)
        low, median, high = np.quantile(np.stack(list(seconds.values())), [0.25, 0.5, 0.75], axis=1).tolist()
        spread = {
            stage: {"median_ms": 1e3 * m, "iqr_ms": 1e3 * (b - a)}
            for stage, a, m, b in zip(seconds, low, median, high, strict=True)
        }
        found = {
            "inference_ms": 1e3 * median[0] / self.batch,
            "iqr_ms": 1e3 * (high[0] - low[0]) / self.batch,
            "images_per_second": self.batch / median[0],
            "peak_memory_bytes": peak,
            "stages": spread,
            "undefined": {},
        }
        return _about(self, detector) | {"metrics": found, "bank": list(detector.bank_.entries.shape)}, seconds


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int | None:
    """Bytes: allocated on a GPU, else resident (the whole process: Python, torch, backbone and bank)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
