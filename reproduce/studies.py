"""What is no grid of AUROCs: the space of patch features (Figures 3, S1), the time of an inference (Table S6),
and settings judged without labels.

All are tasks for :func:`reproduce.run.run`: computed once, found again in the store.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
import torch

from rcp import metrics
from rcp.checks import require
from rcp.data import load_images
from rcp.detector import ReConPatch, resolve_device
from rcp.maps import score_maps
from rcp.patches import images_at_a_time
from rcp.refinement.simulation import DRAWN, Simulation, draw_textures, simulate
from rcp.scoring import image_scores
from reproduce.entries import Entry, OfAnEntry, about, features, fit
from reproduce.provenance import code_of, device_name
from reproduce.store import Store


class Study(OfAnEntry):
    """What is no entry of its own, and depends on one, on this module and on the study's own options."""

    study: ClassVar[str]

    def identity(self) -> dict:
        how = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "entry"}
        code = code_of("reproduce.studies", alone=True)
        return {"study": self.study, "entry": self.entry.identity(), "code": code} | how


def _require_two(data) -> None:
    of = f"two training images or more of the category {data.category!r}"
    require("train", len(data.train) > 1, of, len(data.train))


@dataclass(frozen=True)
class FeatureSpace(Study):
    """Patch features of a few training images in two dimensions (UMAP), and how much they know of their position.

    epochs: after which f is looked at; () for PatchCore. images: how many, spread over the training set.
    neighbours: of UMAP. Position is predicted from the 5 nearest patches of *other* images.
    """

    study = "feature space"
    entry: Entry
    epochs: tuple[int, ...] = ()
    images: int = 8
    neighbours: int = 15

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        detector, data = ReConPatch.from_config(self.config), self.data()
        _require_two(data)
        train = features(self.entry, data, ("train",), store, detector.timings_)["train"]
        chosen = np.unique(np.linspace(0, len(train) - 1, self.images).astype(int))
        shown = torch.from_numpy(train[chosen])
        spaces = {}

        def look(epoch: int, f: torch.nn.Linear | None) -> None:
            if f is None or epoch in self.epochs:
                detector.f_ = f
                spaces[f"epoch {epoch}" if epoch else "PatchCore"] = detector.represent_patches(shown).cpu().numpy()

        if self.config.representation == "trained":
            detector.train(train, log, look)
        else:
            look(0, None)
        side = int(train.shape[1] ** 0.5)
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
        positions, image = np.tile(grid, (len(chosen), 1)), np.repeat(np.arange(len(chosen)), len(grid))
        arrays, position = {"positions": positions}, {}
        for name, space in spaces.items():
            flat = space.reshape(-1, space.shape[-1])
            log(f"{name}: UMAP of {len(flat)} patches ...")
            with detector.timings_("umap"):
                arrays[name] = embed(flat, self.neighbours, self.config.seed)
            position[name] = position_r2(flat, positions, image)
        return about(self, data, detector.timings_, detector.device, {"position_r2": position}), arrays


def embed(features: np.ndarray, neighbours: int = 15, seed: int = 0) -> np.ndarray:
    """UMAP with its defaults. features: (n, D) -> (n, 2) float32.

    scikit-learn finds the neighbours, and what UMAP compiles is kept for the next process: 2 s in the place of 20 for 512 patches.
    pynndescent, which would find them, is imported uncompiled: 13 s in the place of 41 where nothing is kept yet, the same numbers.
    """
    import numba
    from sklearn.neighbors import NearestNeighbors

    with mock.patch.object(numba.config, "DISABLE_JIT", True):
        import pynndescent  # noqa: F401
    from umap import UMAP, umap_

    for compiled in (umap_.smooth_knn_dist, umap_.compute_membership_strengths):
        compiled.enable_caching()
    k = min(neighbours, len(features) - 1)
    distances, others = NearestNeighbors(n_neighbors=k - 1).fit(features).kneighbors()
    itself = np.arange(len(features))
    known = np.column_stack([itself, others]), np.column_stack([0 * itself, distances]).astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "precomputed_knn")  # new patches could not be added
        return UMAP(n_neighbors=k, precomputed_knn=known, random_state=seed, n_jobs=1).fit_transform(features)


def position_r2(features: np.ndarray, positions: np.ndarray, image: np.ndarray, k: int = 5) -> float:
    """How well a patch's place is known from its features: R² of the mean place of its k nearest patches of other images.

    features: (n, D); positions: (n, 2) row and column; image: (n,) which image a patch is of. 1 is exact, 0 no better than the
    middle of the image. Every second image is predicted from the others.
    """
    from sklearn.metrics import r2_score
    from sklearn.neighbors import KNeighborsRegressor

    asked = image % 2 == 1
    model = KNeighborsRegressor(k, algorithm="brute").fit(features[~asked], positions[~asked])
    return float(r2_score(positions[asked], model.predict(features[asked])))


@dataclass(frozen=True)
class InferenceTime(Study):
    """Table S6's protocol: 10 warm-ups, 30 iterations, split into backbone, features, f, search and map.

    batch: images of one pass. The device is part of what the result depends on.
    """

    study = "inference time"
    entry: Entry
    batch: int = 1
    warm_ups: int = 10
    iterations: int = 30

    def identity(self) -> dict:
        return super().identity() | {"device": device_name(resolve_device(self.config.device))}

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        data = self.data()
        detector, _ = fit(self.entry, data, store, log)
        images = load_images((list(data.test.paths) * self.batch)[: self.batch], detector.transform)
        forget_peak(detector.device)
        seconds = inference_seconds(detector, images, self.warm_ups, self.iterations)
        peak = peak_memory(detector.device)
        low, median, high = np.quantile(np.stack(list(seconds.values())), [0.25, 0.5, 0.75], axis=1).tolist()
        each = zip(seconds, low, median, high, strict=True)
        spread = {stage: {"median_ms": 1e3 * m, "iqr_ms": 1e3 * (b - a)} for stage, a, m, b in each}
        found = {
            "inference_ms": 1e3 * median[0] / self.batch, "iqr_ms": 1e3 * (high[0] - low[0]) / self.batch,
            "images_per_second": self.batch / median[0], "peak_memory_bytes": peak, "stages": spread,
        }  # fmt: skip
        info = about(self, data, detector.timings_, detector.device, found)
        return info | {"bank": list(detector.bank_.entries.shape)}, seconds


@dataclass(frozen=True)
class HeldOut(Study):
    """What can be known of a setting without any defect: held-out normal images beside the same with simulated defects (App. D.2).

    The training images are dealt to two folds; each fold's are scored against a bank (and a whitening) of the other's. The metrics:
    image and pixel AUROC for each kind of simulated defects (KIND_image_auroc, KIND_pixel_auroc), and ``steadiness``: median over MAD of
    the held-out normal scores.

    images: how many are scored, spread over the training set. kinds: as of :class:`rcp.refinement.Simulation`; "texture" draws its own.
    """

    study = "held out"
    entry: Entry
    images: int = 100
    kinds: tuple[str, ...] = ("texture", "structure")

    def identity(self) -> dict:
        return super().identity() | {"simulation": code_of("rcp.refinement.simulation")}

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        c, data = self.config, self.data()
        require("representation", not c.linear, "none or whitened, for f has seen all images", c.representation)
        _require_two(data)
        detector = ReConPatch.from_config(c)
        p = features(self.entry, data, ("train",), store, detector.timings_)["train"]
        chosen = np.unique(np.linspace(0, len(p) - 1, min(self.images, len(p))).astype(int))
        images = load_images([data.train.paths[i] for i in chosen], self.transform("train"))
        textures = {"texture": draw_textures(DRAWN, images.shape[1])}
        # of each kind (n, S, S, 3) uint8, and where the defects are, (n, S, S) bool
        changed = {kind: simulate(images, Simulation(kind=kind), textures.get(kind)) for kind in self.kinds}
        with detector.timings_("features"):
            seen = [p[chosen], *(detector.extractor(defective) for defective, _ in changed.values())]
        scores = np.empty((len(seen), len(chosen)), np.float32)
        maps = np.empty((*scores.shape, c.image_size, c.image_size), np.float32)
        for fold in (0, 1):
            held, known = np.flatnonzero(chosen % 2 == fold), np.ascontiguousarray(p[np.arange(len(p)) % 2 != fold])
            fitted = ReConPatch.assemble(c, *detector.train(known, log)[:1], known, timings=detector.timings_)
            for row, of in enumerate(seen):
                out = fitted.predict_features(of[held])
                scores[row, held], maps[row, held] = out.scores, out.maps
        spread = float(np.median(np.abs(scores[0] - np.median(scores[0]))))
        found = {"steadiness": float(np.median(scores[0])) / spread if spread else None}
        for row, (kind, (_, masks)) in enumerate(changed.items(), 1):
            # where no place was found, none is changed
            labels = np.concatenate([np.zeros(len(masks), bool), masks.any((1, 2))])
            found[f"{kind}_image_auroc"] = metrics.image_auroc(labels, scores[[0, row]].ravel())
            truth, drawn = np.concatenate([np.zeros_like(masks), masks]), maps[[0, row]].reshape(-1, *masks.shape[1:])
            found[f"{kind}_pixel_auroc"] = metrics.pixel_auroc(truth, drawn)
        return about(self, data, detector.timings_, detector.device, found), {"scores": scores, "chosen": chosen}


def inference_seconds(detector, images: np.ndarray, warm_ups: int = 10, iterations: int = 30) -> dict[str, np.ndarray]:
    """Stage -> (iterations,) seconds of one pass over a batch: backbone, features, f, search, map (Table S6), and all of them.

    As ``predict`` does it: a few images at a time where that is faster. Measured by CUDA events on a GPU. Decoding is
    left out; the images' way to the GPU is in "backbone", the maps' way back in "map".

    Args:
        detector: fitted.
        images: (n, S, S, 3) uint8, one batch.
    """
    c, extractor = detector.config, detector.extractor
    stages = {
        "backbone": extractor.maps, "features": extractor.patches, "f": detector.represent_patches,
        "search": detector.score_patches,
        "map": lambda s: (image_scores(s.flatten(1)).cpu(), score_maps(s, c.image_size, c.blur)),
    }  # fmt: skip
    size = images_at_a_time(detector.device, c.image_size)
    mark, between = _clock(detector.device)
    seconds = np.zeros((warm_ups + iterations, 1 + len(stages)))
    for row in seconds:
        marks = []
        for start in range(0, len(images), size):
            value = images[start : start + size]
            part = [mark()]
            for stage in stages.values():
                value = stage(value)
                part.append(mark())
            marks.append(part)
        row[0] = between(marks[0][0], marks[-1][-1])
        for part in marks:
            row[1:] += [between(a, b) for a, b in pairwise(part)]
    return dict(zip(["all", *stages], seconds[warm_ups:].T, strict=True))


def _clock(device: torch.device) -> tuple[Callable, Callable]:
    """-> (marks a moment, seconds between two of them)."""
    if device.type != "cuda":
        return time.perf_counter, lambda a, b: b - a

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(a, b):
        b.synchronize()
        return a.elapsed_time(b) / 1e3

    return mark, between


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on a GPU, else resident (the whole process: Python, torch, backbone and bank)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
