"""What a grid is made of: one detector on one category and seed, the same with a refinement network, and ensembles of them.

A detector's result goes through three stages, each looked up or computed: p (:func:`features`), f (:func:`representation`), then bank
and scores (``ReConPatch.assemble`` and ``predict_features``).
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from rcp import backbone, metrics
from rcp.checks import check_type, require
from rcp.config import Config
from rcp.data import Dataset, Transform, load_dataset, load_images
from rcp.data.perturb import Perturbation, PerturbedTransform
from rcp.detector import Prediction, ReConPatch, Timings, as_tensor, bank_size, resolve_device
from rcp.maps import center_and_deviation, modified_z_score, score_maps
from rcp.model import represent
from rcp.patches import PatchExtractor
from rcp.paths import require_disk
from rcp.refinement import RefinementConfig
from reproduce.provenance import ChangedCode, code_of, code_upto, device_name
from reproduce.run import Result, run
from reproduce.store import Store, runs_root

logger = logging.getLogger("rcp")
Log = Callable[[str], None]


METHODS = {"none": "PatchCore", "random": "random f", "trained": "ReConPatch", "whitened": "whitened"}


@dataclass(frozen=True)
class Entry:
    """One detector on one category: (config, data set, category, seed). ``config.seed`` is the seed.

    dataset: a folder. perturbation: of Appendix C.1, or None; perturbed: the splits that it applies to.
    """

    config: Config
    dataset: str
    category: str | None = None
    perturbation: Perturbation | None = None
    perturbed: Literal["both", "train", "test"] = "both"

    def __post_init__(self):
        check_type("perturbed", Literal["both", "train", "test"], self.perturbed)

    @property
    def method(self) -> str:
        return METHODS[self.config.representation]

    def columns(self) -> dict:
        """What tells this entry from others in a table: method, category, augmentation, every hyper-parameter."""
        c, words = self.config, {True: "with", False: "without"}
        named = {"method": self.method, "category": self.category, "augmentation": words[self.perturbation is not None]}
        named |= {"refinement": "without", "simulation": "no refinement"}
        as_printed = {"layers": "+".join(map(str, c.layers)), "projection_layer": words[c.projection is not None]}
        if Path(c.weights).suffix:  # a file, which goes by its name: where it lies is of this machine
            as_printed["weights"] = Path(c.weights).name
        return named | c.asdict() | as_printed

    def data(self) -> Dataset:
        return load_dataset(self.dataset, category=self.category)

    def perturbation_of(self, split: str) -> Perturbation | None:
        return self.perturbation if self.perturbed in ("both", split) else None

    def transform(self, split: str) -> Transform:
        """How the images of a split ("train", "test") are read."""
        c, how = self.config, self.perturbation_of(split)
        transform = Transform(c.resize, c.image_size, c.aspect, c.tiles, c.tile_overlap)
        return transform if how is None else PerturbedTransform.of(transform, how)

    def identity(self) -> dict:
        """What the result depends on: resolved config, content of data and weights, code. Not the device, not any path."""
        return self.identity_upto("scores", self.data(), ("train", "test"))

    def identity_upto(self, stage: str, data: Dataset, splits: Sequence[str]) -> dict:
        """The same of one stage's result, which is of these splits."""
        c = self.config
        return {
            "config": c.upto(stage) | {"weights": backbone.weights_identity(c.backbone, c.weights)},
            "data": data.fingerprint(), "perturbation": {name: _described(self.perturbation_of(name)) for name in splits},
            "code": code_upto(stage),
        }  # fmt: skip

    def compute(self, store: Store, log: Log) -> tuple[dict, dict]:
        """-> (info for JSON, arrays). Nothing is stored but features and f, which other entries may share."""
        data = self.data()
        fitted, test = fit(self, data, store, log)
        prediction = dataclasses.replace(fitted.predict_features(test), transform=self.transform("test"))
        with fitted.timings_("metrics"):
            measured = metrics.evaluate(prediction, data.test)
        held_out, on_gpu = fitted.train_patch_scores_, fitted.device.type == "cuda"
        info = about(self, data, fitted.timings_, fitted.device, measured) | {
            "bank": list(fitted.bank_.entries.shape), "bank_bytes": fitted.bank_.entries.nbytes, "history": fitted.history_,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(fitted.device) if on_gpu else 0,
            "train_statistics": {},
        }  # fmt: skip
        arrays = {"scores": prediction.scores, "labels": data.test.labels, "patch_scores": prediction.patch_scores}
        if held_out is not None:
            arrays["train_scores"] = fitted.train_scores_
            for level, of in (("image", fitted.train_scores_), ("patch", held_out)):  # what Eq. 11 takes
                info["train_statistics"][level] = {d: center_and_deviation(of, d) for d in ("median", "mean")}
        return info, arrays


def _described(perturbation: Perturbation | None) -> dict | None:
    return perturbation and dataclasses.asdict(perturbation) | {"code": code_of("rcp.data.perturb")}


def about(task, data: Dataset, timings: Timings, device: torch.device, measured: dict) -> dict:
    """What is stored of every task."""
    good = int((data.test.labels == 0).sum())
    counts = {"train": len(data.train), "test_good": good, "test_defective": len(data.test) - good}
    named = {"category": data.category, "layout": data.layout, "fingerprint": data.fingerprint()}
    return {
        "config": task.config.asdict(), "metrics": {"undefined": {}} | measured, "data": named | counts,
        "seconds": {stage: round(seconds, 3) for stage, seconds in timings.items()}, "device": device_name(device),
    }  # fmt: skip


def features(
    entry: Entry, data: Dataset, splits: Sequence[str], store: Store, timings: Timings
) -> dict[str, np.ndarray]:
    """First stage: p of the named splits ("train", "test"), from the store or computed into it: (n, h · w, D), memory-mapped."""
    c = entry.config
    for name in splits:
        there = len(getattr(data, name))
        require(name, there > 0, f"images of the category {data.category!r} in {entry.dataset}", "none")
    identities = {name: entry.identity_upto("features", data, (name,)) for name in splits}
    found = {name: store.open_array(identity) for name, identity in identities.items()}
    missing = [name for name, p in found.items() if p is None]
    if not missing:
        return found
    extractor = PatchExtractor(c, resolve_device(c.device))
    h, w, dim = extractor.shape()
    bank_size(c, len(data.train) * h * w, dim)
    images = sum(len(getattr(data, name)) for name in missing)
    require_disk(store.root, images * h * w * dim * np.dtype(c.feature_dtype).itemsize, "patch features")
    with timings("decode"):
        decoded = {name: load_images(getattr(data, name).paths, entry.transform(name)) for name in missing}
    for name in missing:
        with store.locked("features", identities[name]), timings("features"):
            found[name] = store.open_array(identities[name])  # another process may have computed it
            if found[name] is None:
                shape, paths = (len(decoded[name]), h * w, dim), getattr(data, name).paths
                with store.new_array(identities[name], shape, c.feature_dtype) as out:
                    extractor(decoded[name], out=out, names=paths)
                    with suppress(ChangedCode):
                        now = entry.identity_upto("features", data, (name,))
                        require("features", now == identities[name], "images and weights as they were", "changed ones")
                found[name] = store.open_array(identities[name])
        del decoded[name]
    return found


def representation(entry: Entry, data: Dataset, p: np.ndarray, store: Store, timings: Timings, log: Log):
    """Second stage: f and its history from p of the training images, from the store or trained into it; (None, []) of a PatchCore.

    f is made once for all entries that differ only in what comes after it (coreset, memory bank, scores).
    """
    c, device = entry.config, resolve_device(entry.config.device)
    if c.representation == "none":
        return None, []
    identity = entry.identity_upto("training", data, ("train",))
    with store.locked("representations", identity):
        if stored := store.load("representations", identity):
            info, arrays = stored
            f = torch.nn.Linear(*reversed(arrays["weight"].shape), device=device).requires_grad_(False)
            f.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
            log(f"f from the store, {len(info['history'])} epochs")
            return f, info["history"]
        with timings("training"):
            f, history = represent(as_tensor(p).to(device), c, log)
        arrays = {name: value.cpu().numpy() for name, value in f.state_dict().items()}
        store.save("representations", identity, {"history": history}, arrays)
    return f, history


def fit(
    entry: Entry,
    data: Dataset,
    store: Store | None = None,
    log: Log = logger.info,
    refine: RefinementConfig | None = None,
) -> tuple[ReConPatch, np.ndarray]:
    """-> (fitted detector, p of the test images), p and f from the store: what a notebook needs to look inside.

    refine: of a refinement network that the caller is to train (``ReConPatch.fit_refinement``).
    """
    store, timings = store or Store(runs_root()), Timings()
    p = features(entry, data, ("train", "test"), store, timings)
    bank_size(entry.config, len(data.train) * p["train"].shape[1], p["train"].shape[2])  # before hours of training
    f, history = representation(entry, data, p["train"], store, timings, log)
    return ReConPatch.assemble(entry.config, f, p["train"], history, refine, timings), p["test"]


class OfAnEntry:
    """What a task about one entry's detector takes over from the entry."""

    entry: Entry
    config = property(attrgetter("entry.config"))
    category = property(attrgetter("entry.category"))
    method = property(attrgetter("entry.method"))
    columns = property(attrgetter("entry.columns"))
    data = property(attrgetter("entry.data"))
    transform = property(attrgetter("entry.transform"))


@dataclass(frozen=True)
class Refined(OfAnEntry):
    """An entry's detector with a refinement network (Appendix D); unrefined scores and maps are the entry's own.

    ``refine.seed`` is of the network, ``entry.config.seed`` of the detector.
    """

    entry: Entry
    refine: RefinementConfig

    def columns(self) -> dict:
        return super().columns() | {"refinement": "with", "simulation": self.refine.simulation.kind}

    def identity(self) -> dict:
        return {"entry": self.entry.identity(), "refinement": self.refine.identity()}

    def compute(self, store: Store, log: Log) -> tuple[dict, dict]:
        data, textures = self.data(), self.refine.load_textures(self.config.image_size)
        images = load_images(data.train.paths, self.transform("train"))
        fitted, p = fit(self.entry, data, store, log, self.refine)
        checkpoint = store.folder("checkpoints", self.identity()).with_suffix(".safetensors")
        fitted.fit_refinement(images, textures, log, data.train.paths, checkpoint)
        prediction = dataclasses.replace(fitted.predict_features(p), transform=self.transform("test"))
        info = about(self, data, fitted.timings_, fitted.device, metrics.evaluate(prediction, data.test))
        info |= {"refinement": self.refine.asdict(), "history": fitted.refinement_history_}
        for written in checkpoint.parent.glob(f"{checkpoint.stem}.*"):  # a damaged one, too
            written.unlink()
        arrays = {"scores": prediction.scores, "labels": data.test.labels, "patch_scores": prediction.patch_scores}
        return info, arrays | {"log_odds": _log_odds(prediction.maps)}


def _log_odds(maps: np.ndarray) -> np.ndarray:
    """Probabilities -> float16 that keep the order of the small ones."""
    p = np.clip(maps.astype(np.float64), 1e-30, 1 - 1e-7)
    return (np.log(p) - np.log1p(-p)).astype(np.float16)


@dataclass(frozen=True)
class Ensemble(OfAnEntry):
    """Several entries on one category and seed, their scores brought to one scale by Eq. 11 and averaged (Table 6).

    The statistics of Eq. 11 are those of the members' held-out *training* scores; nothing of the test set is used.
    Refined members (Table S8) are on one scale already: their maps say how likely a pixel is defective.

    level: they are of "image" scores or of "patch" scores. deviation: as :func:`rcp.maps.center_and_deviation`.
    """

    members: tuple[Entry, ...] | tuple[Refined, ...]
    level: Literal["image", "patch"] = "image"
    deviation: Literal["median", "mean"] = "median"

    def __post_init__(self):
        check_type("level", Literal["image", "patch"], self.level)
        check_type("deviation", Literal["median", "mean"], self.deviation)
        refined = [isinstance(member, Refined) for member in self.members]
        require("members", all(refined) or not any(refined), "all of them refined, or none", refined)

    @property
    def entry(self) -> Entry | Refined:
        return self.members[0]

    def columns(self) -> dict:
        """As :meth:`Entry.columns`; the backbones are joined with "+"."""
        return self.entry.columns() | {"backbone": "+".join(m.config.backbone for m in self.members)}

    def identity(self) -> dict:
        how = {"level": self.level, "deviation": self.deviation, "code": code_of("reproduce.entries", alone=True)}
        return {"members": [m.identity() for m in self.members]} | how

    def compute(self, store: Store, log: Log) -> tuple[dict, dict]:
        results = [run(member, store, log) for member in self.members]
        c, data = self.config, self.data()
        if isinstance(self.entry, Refined):
            images, patches, maps = [r.scores for r in results], [], [r.maps() for r in results]
        else:
            images, patches = zip(*(self.normalized(r) for r in results), strict=True)
            # a map is linear in its patch scores: the mean of the maps is the map of the mean where the grids agree
            maps = [score_maps(torch.from_numpy(p), self.transform("test").shape, c.blur) for p in patches]
        scores, maps = np.mean(images, 0), np.mean(maps, 0)
        info = {
            "config": c.asdict(), "data": results[0].info["data"],
            "members": [r.info["config"]["backbone"] for r in results],
            "metrics": metrics.evaluate(Prediction(scores, maps, self.transform("test"), None), data.test),
            "seconds": {"members": sum(sum(r.info["seconds"].values()) for r in results)},
            "device": results[0].info["device"],
        }  # fmt: skip
        shared = {"patch_scores": np.mean(patches, 0)} if len({p.shape for p in patches}) == 1 else {}
        return info, {"scores": scores, "labels": data.test.labels} | shared

    def normalized(self, result: Result) -> tuple[np.ndarray, np.ndarray]:
        """One member's image and patch scores in units of Eq. 11."""
        statistics = result.info["train_statistics"]
        require("calibration_folds", bool(statistics), "2 or more of an ensemble's members (Eq. 11)", 0)
        center, mad = statistics[self.level][self.deviation]
        return tuple(modified_z_score(of, center, mad) for of in (result.scores, result.patch_scores))
