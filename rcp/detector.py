"""The detectors: ``ReConPatch``, and ``PatchCore``, which is ReConPatch without f."""

import hashlib
import inspect
import json
import math
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rcp import backbone, decision
from rcp.checks import check_type, require
from rcp.config import Config
from rcp.coreset import coreset_size, greedy_k_center, random_selection
from rcp.data.images import Original, Transform
from rcp.data.layouts import Dataset, load_dataset
from rcp.data.sources import batches, images_of
from rcp.files import allocate, read_tensors, write_tensors
from rcp.maps import center_and_deviation, score_maps
from rcp.metrics import UndefinedMetric, normal_threshold
from rcp.model import EachEpoch, Trained, represent
from rcp.patches import PatchExtractor, images_at_a_time, pool
from rcp.paths import require_disk, require_memory, require_writable
from rcp.prediction import Prediction
from rcp.progress import Log, progress, say
from rcp.refinement import training as refinement
from rcp.refinement.network import RefinementNet
from rcp.refinement.options import Refine, RefinementConfig
from rcp.scoring import MemoryBank, image_scores, patch_scores

LARGEST = 1e6  # number in f(p): beyond, float32 loses Eq. 10's weight
FLOATS = (np.float16, np.float32, np.float64)  # in this machine's order of bytes


class Timings(dict):
    """Stage -> seconds. ``with timings("coreset"): ...`` adds to a stage; waits for the GPU where there is one."""

    @contextmanager
    def __call__(self, stage: str):
        _wait()
        started = time.perf_counter()
        try:
            yield
        finally:
            _wait()
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU. Raises ValueError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(check_type("device", str, name))
        torch.empty(1, device=device).item()  # which a "meta" device does not have
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ValueError(f"device: expected auto, cpu or an available cuda device, got {name!r} ({e!s:.99})") from None
    return device


def bank_size(config: Config, patches: int, extracted: int) -> int:
    """-> number of entries of the memory bank of so many training patches; extracted: size of p.

    Raises:
        ValueError: the ratio selects nothing.
        MemoryError: all f(p) and the bank do not fit on the device.
    """
    count, dim = coreset_size(config.coreset_ratio, patches), config.bank_dim(extracted)
    words = f"{patches:,} patches of {dim} numbers"
    require_memory(resolve_device(config.device), 4 * dim * patches, 4 * dim * count, words)
    return count


class ReConPatch:
    """ReConPatch (WACV 2024) for one kind of product: ``fit`` on normal images, ``predict`` on any.

    Keyword arguments are the hyper-parameters of :class:`rcp.config.Config`, whose docstring gives each one's meaning,
    default and provenance; an unknown name raises ValueError with the nearest valid one.

    refine: train a refinement network as well (Appendix D): True, a :class:`rcp.refinement.Refinement`, or its options as a dict.
    false_alarm_rate: the share of normal images that may be called defective, also settable after ``fit`` and saved with the detector;
        None is 0.01, or the least that the training images support (:func:`rcp.decision.threshold`).

    Attributes after ``fit``:
        f_: nn.Linear, p -> f(p); None for PatchCore.
        bank_: the memory bank M.
        history_: one dict per training epoch (loss, quantiles of ω^P).
        train_patch_scores_: (n_train, h · w) float32, held-out patch scores of the training images, or None; not saved.
        train_scores_: (n_train,) float32, their maxima, or None.
        threshold_: an image is defective where its score is this or more; None where there is none.
        skipped_: (name, reason) of the training images that could not be read.
        fold_banks_: for a refinement, the F banks of the held-out scores, the i-th for the training images i, i + F, ...; not saved.
        refiner_: the refinement network, or None. refinement_history_: one dict per epoch of its training.
        timings_: seconds per stage of the last fit and predict.
    """

    represents = ("trained", "random", "whitened")  # the representations of this class

    def __init__(self, *, refine: Refine = None, false_alarm_rate: float | None = None, **hyper_parameters):
        self.train_scores_: np.ndarray | None = None
        self.false_alarm_rate = false_alarm_rate
        self.refine = RefinementConfig.of(refine)
        self.config = c = Config.build(**({"representation": self.represents[0]} | hyper_parameters))
        words = f"{' or '.join(map(repr, self.represents))} of a {type(self).__name__}"
        require("representation", c.representation in self.represents, words, c.representation)
        for_refinement = "2 or more (the refinement normalises by held-out scores)"
        require("calibration_folds", not self.refine or c.calibration_folds >= 2, for_refinement, c.calibration_folds)
        require("tiles", not self.refine or c.tiles == (1, 1), "(1, 1) with refine, which knows no tiles", c.tiles)
        self.transform = Transform(c.resize, c.image_size, c.aspect, c.tiles, c.tile_overlap)
        self.device = resolve_device(c.device)
        backbone.check(c.backbone, c.weights)
        self._weights: str | None = None  # their identity
        self.f_: nn.Linear | None = None
        self.bank_: MemoryBank | None = None
        self.fold_banks_: tuple[MemoryBank, ...] = ()
        self.refiner_: RefinementNet | None = None
        self.history_, self.refinement_history_ = [], []
        self.train_patch_scores_: np.ndarray | None = None
        self.skipped_: list[tuple[Path | str, str]] = []
        self.timings_ = Timings()

    def __setattr__(self, name: str, value) -> None:
        """Raises ValueError for a hyper-parameter: what is built and fitted would not follow."""
        fixed = (name in Config.names() and name != "device") or (name == "config" and "config" in vars(self))
        require(name, not fixed, "it when the detector is made", value)
        super().__setattr__(name, value)

    @classmethod
    def from_config(cls, config: Config, refine: RefinementConfig | dict | bool | None = None) -> "ReConPatch":
        """The detector that a config describes: ReConPatch or PatchCore, by ``config.representation``."""
        return (PatchCore if config.representation == "none" else ReConPatch)(refine=refine, **config.asdict())

    @cached_property
    def extractor(self) -> PatchExtractor:
        """Frozen CNN and aggregation, built when first needed."""
        found = backbone.weights_identity(self.config.backbone, self.config.weights)
        require("weights", self._weights in (None, found), f"those of the fit, {self._weights}", found)
        self._weights = found
        return PatchExtractor(self.config, self.device)

    @property
    def false_alarm_rate(self) -> float | None:
        return self._false_alarm_rate

    @false_alarm_rate.setter
    def false_alarm_rate(self, rate: float | None) -> None:
        """Raises ValueError for no share between 0 and 1, and of a fitted detector for one that its images do not support."""
        if rate is not None:
            rate = decision.check_rate(rate)
            if self.train_scores_ is not None:
                decision.threshold(self.train_scores_, rate)
        self._false_alarm_rate = rate

    @property
    def threshold_(self) -> float | None:
        return self.decide()[0]

    def decide(self, refined: bool = True) -> tuple[float | None, str]:
        """-> (threshold, "") or (None, why there is none). refined: as of :meth:`predict`."""
        self._check_fitted()
        if refined and self.refiner_ is not None:
            return None, "held-out scores are of unrefined maps"
        if self.train_scores_ is None:
            return None, "no held-out scores (calibration_folds=0, or one image)"
        try:
            return decision.threshold(self.train_scores_, self.false_alarm_rate), ""
        except ValueError as error:
            return None, str(error)

    def promise(self) -> str:
        """A sentence: the threshold, the false alarms to expect of it, and how far so few images let them vary; or why there is none."""
        found, why = self.decide()
        if found is None:
            return f"no threshold: {why}"
        n = len(self.train_scores_)
        low, high = decision.false_alarms(n, self.false_alarm_rate, 100)
        rate = decision.rate_of(n, self.false_alarm_rate)
        return f"threshold {found:.4g}; false alarms: {rate:.1%} on average, of 100 normal images {low:.0%} to {high:.0%} ({n} held out)"

    def fit(self, images, log: Log = say, *, skip_unreadable: bool = False) -> "ReConPatch":
        """Learns the normal state from images without defects.

        All are decoded, a few at a time into a temporary file, before any feature is computed.

        Args:
            images: ``dataset.train``, or whatever :func:`rcp.data.sources.images_of` takes: a folder, paths, arrays, a generator, ...
            log: receives one line per training epoch, what the crop does not see, and what the threshold promises.
            skip_unreadable: leave out what cannot be read; it is listed in ``skipped_``.

        Raises:
            ValueError: no images; a file that is no image (named, before any feature is computed); a ratio that selects nothing.
        """
        c, self.skipped_ = self.config, []
        textures = self.refine.load_textures(c.image_size) if self.refine else None
        with self.timings_("decode"):
            skipped = self.skipped_ if skip_unreadable else None
            paths, decoded, originals = self._decoded(images_of(images, train=True), skipped)
        if min(c.calibration_folds, len(paths)) > 1:
            decision.rate_of(len(paths), self.false_alarm_rate)
        left_out = f" ({len(self.skipped_)} are unreadable: {self.skipped_[0][0]})" if self.skipped_ else ""
        require("images", len(paths) > 0, f"at least one image without defects{left_out}", paths)
        for line in [f"left out, {name}: {why}" for name, why in self.skipped_] + self._cropped(originals, images):
            log(line)
        if copies := len(decoded) - len({hashlib.blake2b(image).digest() for image in decoded}):
            log(f"{copies} of {len(decoded)} images are copies: the threshold is then too low; leave them out")
        h, w, dim = self.extractor.shape()
        shape, dtype = (len(decoded), h * w, dim), np.dtype(c.feature_dtype)
        bank_size(c, len(decoded) * h * w, dim)
        require_disk(tempfile.gettempdir(), int(np.prod(shape)) * dtype.itemsize, "patch features")
        with tempfile.TemporaryFile() as file:  # p on disk: in memory, beside f(p), there would be twice as much
            p = np.memmap(file, dtype, "w+", shape=shape)
            allocate(file, "patch features")
            with self.timings_("features"):
                self.extractor(decoded, out=p, names=paths)
            self._remember(p, *self.train(p, log))
            if self.refine:
                self.fit_refinement(decoded, textures, log, paths)
                self.fold_banks_ = ()
        for line in (*self._apart(paths), self.promise()):
            log(line)
        return self

    def _decoded(self, images, skipped: list | None) -> tuple[list, np.ndarray | None, list[Original]]:
        """Names, pixels (n, S, S, 3) uint8 in a temporary file that goes with the array, and sizes of all images."""
        names, originals = [], []
        with tempfile.TemporaryFile() as file:
            for some, read, sizes in progress(batches(images, self.transform, 64, skipped), "images"):
                require_disk(tempfile.gettempdir(), read.nbytes, "decoded images")
                file.write(read)
                names += some
                originals += sizes
            file.flush()
            pixels = np.memmap(file, np.uint8, "r+", shape=(len(names), *self.transform.shape, 3)) if names else None
        return names, pixels, originals

    def _cropped(self, originals: Sequence[Original], images) -> list[str]:
        """A line where the crop does not see all of the images: how much of the worst, and how many of a data set's defects."""
        seen = {}
        for width, height in {original[:2] for original in originals}:
            left, top, right, bottom = self.transform.window(width, height)
            across, down = (min(b, n) - max(a, 0) for a, b, n in ((left, right, width), (top, bottom, height)))
            seen[across * down / (width * height)] = f"{width} x {height}"
        if not seen or min(seen) > 0.999:
            return []
        if isinstance(images, str | Path) and Path(images).is_dir():
            images = load_dataset(images)
        test = images.test if isinstance(images, Dataset) else None
        masks = [self.transform.mask(m, p) for m, p in zip(test.masks, test.paths, strict=True) if m] if test else []
        outside = f"; of {len(masks)} defects with masks {sum(not m.any() for m in masks)} lie outside" if masks else ""
        side = self.config.image_size
        words = f"the crop sees {min(seen):.0%} of the area of images of {seen[min(seen)]} px; a defect outside it is not found"
        return [f"{words}{outside} (all of it: aspect='squash', resize={side}, image_size={side})"]

    def _apart(self, names: Sequence) -> list[str]:
        """A line on training images with held-out scores above median + 5 · 1.4826 · MAD: a defect among them raises the threshold."""
        try:
            limit = normal_threshold(self.train_scores_, z=5)
        except UndefinedMetric:
            return []
        far = [str(names[i]) for i in np.argsort(-self.train_scores_) if self.train_scores_[i] > limit]
        words = "training images score far above the others; a defect among them raises the threshold, so look at them"
        return [f"{len(far)} of {len(names)} {words}: {', '.join(far[:5])}{', ...' * (len(far) > 5)}"] * bool(far)

    def train(self, p: np.ndarray, log: Log = say, each_epoch: EachEpoch | None = None) -> Trained:
        """f and its history from p (n, h · w, D), see :func:`rcp.model.represent`; (None, []) of a PatchCore."""
        if self.config.representation == "none":
            return None, []
        with self.timings_("training"):
            return represent(as_tensor(p).to(self.device), self.config, log, each_epoch)

    @classmethod
    def assemble(
        cls,
        config: Config,
        f: nn.Linear | None,
        p: np.ndarray,
        history: Sequence[dict] = (),
        refine: RefinementConfig | None = None,
        timings: dict | None = None,
    ) -> "ReConPatch":
        """A fitted detector from what was computed before: f (None for PatchCore) and p (n, h · w, D) of the training images.

        A refinement is not trained: :meth:`fit_refinement` does that.
        """
        detector = cls.from_config(config, refine)
        detector.timings_.update(timings or {})
        return detector._remember(p, f, list(history))

    def _remember(self, p: np.ndarray, f: nn.Linear | None, history: list[dict]) -> "ReConPatch":
        """The memory bank of f(p), and the held-out scores of the training images."""
        c = self.config
        p = _features(p, c.extracted_dim)
        sizes = isinstance(f, nn.Linear) and (f.in_features, f.out_features)
        wanted = c.representation != "none" and (p.shape[2], c.bank_dim(p.shape[2]))
        require("f", sizes == wanted, f"a linear layer of the sizes {wanted}" if wanted else "None", f)
        n, patches, _ = p.shape
        self._grid(patches)
        count = bank_size(c, n * patches, p.shape[-1])
        self.f_, self.history_, self.refiner_ = f, history, None
        # where it is interrupted, none goes with another f
        self.bank_ = self.train_scores_ = self.train_patch_scores_ = None
        with self.timings_("representation"):
            represented = torch.empty(n, patches, c.bank_dim(p.shape[-1]), device=self.device)
            for i, part in enumerate(as_tensor(p)):
                represented[i] = self.represent_patches(part)
                drop_pages(p)
        with self.timings_("coreset"):
            self.bank_ = self._memorize(represented.flatten(0, 1), count)
        with self.timings_("calibration"):
            self.train_patch_scores_ = held_out = self._held_out_scores(represented)
            self.train_scores_ = None if held_out is None else held_out.max(1)
        return self

    def fit_refinement(
        self,
        images: np.ndarray,
        textures: np.ndarray | None = None,
        log: Log = say,
        names: Sequence[str | Path] | None = None,
        checkpoint: str | Path | None = None,
    ) -> "ReConPatch":
        """Trains the refinement network (Appendix D) of a fitted detector on simulated anomalies in its training images.

        Args:
            images: (n, S, S, 3) uint8, as ``fit`` saw them.
            textures, names, checkpoint: as :func:`rcp.refinement.training.train`.

        Raises:
            ValueError: the detector has no ``refine``, or no held-out scores to normalise by.
        """
        require("refine", self.refine is not None, "options of the refinement, or True, at construction", None)
        words = "2 or more, and as many images, of a detector that was just fitted"
        require("calibration_folds", len(self.fold_banks_) >= 2, words, self.config.calibration_folds)

        def see(changed: np.ndarray, numbers: np.ndarray) -> np.ndarray:
            """Maps of changed images against banks without them: a bank that holds an image scores its unchanged patches 0."""
            banks = [self.fold_banks_[i % len(self.fold_banks_)] for i in numbers]
            scores = self.score_patches(self.represent_patches(torch.as_tensor(self.extractor(changed))), banks)
            return score_maps(scores, self.transform.shape, self.config.blur)

        normal = center_and_deviation(self.train_patch_scores_)
        with self.timings_("refinement"):
            of = self.config.upto("scores") | {"weights": ""}  # which may lie elsewhere when it goes on
            how = self.refine, normal, textures, log, checkpoint, self.device, names, of
            self.refiner_, self.refinement_history_ = refinement.train(images, see, *how)
        return self

    @torch.inference_mode()
    def represent_patches(self, p: Tensor) -> Tensor:
        """p: (..., D) of any float dtype -> f(p), or the pooled p of PatchCore: (..., dim) float32 on the detector's device."""
        p = p.to(self.device).float()
        if self.f_ is None:
            x = pool(p.flatten(0, -2), self.config.bank_dim(p.shape[-1])).unflatten(0, p.shape[:-1])
        else:
            with backbone.ALONE:
                x = torch.stack([self.f_(image) for image in p]) if self._one_by_one(p) else self.f_(p)
        largest = float(torch.stack(x.aminmax()).abs().max())
        require("p", largest <= LARGEST, f"features of at most {LARGEST:g} in size", largest)
        return x

    def score_patches(self, represented: Tensor, banks: Sequence[MemoryBank] = ()) -> Tensor:
        """f(p): (n, h · w, dim) -> (n, h, w) float32, Eq. 9 and 10. banks: one per image, else ``bank_``."""
        parts = represented if banks or self._one_by_one(represented) else [represented.flatten(0, 1)]
        pairs = zip(parts, banks or [self.bank_] * len(parts), strict=True)
        scores = [patch_scores(part, bank, self.config.weighting) for part, bank in pairs]
        return torch.cat(scores).reshape(len(represented), *self._grid(represented.shape[1]))

    def _grid(self, patches: int) -> tuple[int, int]:
        """(h, w) of an image's patches, a grid of the shape of what is seen."""
        tall, wide = self.transform.shape
        h = math.isqrt(patches * tall // wide)
        w = h * wide // tall
        require("p", 0 < h * w == patches, f"features of a grid of the shape of {tall} x {wide} px", patches)
        return h, w

    def _one_by_one(self, images: Tensor) -> bool:
        """On a CPU each image goes by itself: its scores are the same in any batch, to the last bit."""
        return images.ndim == 3 and self.device.type == "cpu"

    def predict(self, images, maps: bool = True, refined: bool = True, *, skip_unreadable: bool = False) -> Prediction:
        """Scores images, and decides.

        Args:
            images: ``dataset.test``, or whatever :func:`rcp.data.sources.images_of` takes: a path, a folder, arrays, ... A file that is no
                image is named before any feature is computed.
            maps: also return score maps at ``image_size``.
            refined: by the refinement network, where there is one; False gives scores and maps without it.
            skip_unreadable: leave out what cannot be read; it is listed in ``out.skipped``.
        """
        self._check_fitted()
        skipped = [] if skip_unreadable else None
        with self.timings_("decode"):
            names, decoded, originals = self._decoded(images_of(images), skipped)
        about = {"paths": tuple(names), "originals": tuple(originals), "skipped": tuple(skipped or ())}
        return self._predict(len(names), lambda i: self.extractor(decoded[i], names=names[i]), maps, refined, **about)

    def predict_iter(
        self, images, maps: bool = True, refined: bool = True, *, batch: int | None = None, skipped: list | None = None
    ) -> Iterator[Prediction]:
        """Scores images one after the other and keeps none of them: each is given as a :class:`Prediction` of one.

        Args:
            images, maps, refined: as :meth:`predict`.
            batch: how many are read and scored together; None suits the device.
            skipped: receives (name, reason) of those that cannot be read; where None, the first of them raises.
        """
        self._check_fitted()
        at_a_time = batch or images_at_a_time(self.device, self.config.image_size)
        for names, pixels, originals in batches(images_of(images), self.transform, at_a_time, skipped):
            p, about = self.extractor(pixels, names=names), {"paths": tuple(names), "originals": tuple(originals)}
            yield from self._predict(len(names), p.__getitem__, maps, refined, **about)

    def predict_features(self, p: np.ndarray, maps: bool = True, refined: bool = True) -> Prediction:
        """``predict`` from features that are there already: p (n, h · w, D) as :class:`PatchExtractor` makes them."""
        self._check_fitted()
        p = self._fitting(p)
        return self._predict(len(p), lambda part: drop_pages(p)[part], maps, refined)

    def _fitting(self, p: np.ndarray) -> np.ndarray:
        size = self.f_.in_features if self.f_ else self.config.extracted_dim or self.bank_.entries.shape[1]
        return _features(p, size)

    def _predict(self, n: int, p_of: Callable[[slice], np.ndarray], maps: bool, refined: bool, **about) -> Prediction:
        """Scores n images, a few at a time. p_of: the features of some of them. about: further fields of the prediction."""
        c, batch = self.config, images_at_a_time(self.device, self.config.image_size)
        refined = refined and self.refine is not None
        require("refined", not refined or self.refiner_ is not None, "False: its training did not end", refined)
        scores, patches = np.empty(n, np.float32), []
        all_maps = np.empty((n, *self.transform.shape), np.float32) if maps else None
        for start in progress(range(0, n, batch), "scores"):
            part = slice(start, min(start + batch, n))
            with self.timings_("features"):
                p = as_tensor(self._fitting(p_of(part)))
            with self.timings_("scoring"):
                s = self.score_patches(self.represent_patches(p))
                found = score_maps(s, self.transform.shape, c.blur) if maps or refined else None
                if refined:
                    found = self.refiner_.refine(found)
                scores[part] = found.max((1, 2)) if refined else image_scores(s.flatten(1)).cpu().numpy()
                patches.append(s.cpu().numpy())
                if maps:
                    all_maps[part] = found
        # held-out scores are unrefined: a refined one of an image that the network was trained on would not be held out
        train_scores = None if refined else self.train_scores_
        about["threshold"], about["why"] = self.decide(refined)
        patches = np.concatenate(patches) if patches else np.empty((0, 0, 0), np.float32)
        return Prediction(scores, all_maps, self.transform, train_scores, patches, **about)

    def _memorize(self, represented: Tensor, count: int, among: Tensor | None = None) -> MemoryBank:
        """(N, dim) -> the coreset of ``count`` patches as a memory bank; where the ratio is 1 all of them, and no neighbours (b = 1)."""
        c = self.config
        if c.coreset_ratio == 1:
            return MemoryBank(represented if among is None else represented[among], 1)
        if c.selection == "random":
            return MemoryBank(represented[random_selection(len(represented), count, c.seed, among)], c.neighbours)
        how = {"start": c.coreset_start, "projection": c.coreset_projection, "seed": c.seed, "among": among}
        return MemoryBank(represented[greedy_k_center(represented, count, **how)], c.neighbours)

    def _held_out_scores(self, represented: Tensor) -> np.ndarray | None:
        """(n, h · w, dim) -> (n, h · w): scores of training images' patches against a bank made of the other folds' images.

        An image that helped to fill the bank scores lower than a fresh one would; these do not. f has still seen all.
        None where there is nothing to hold out.
        """
        n, patches, _ = represented.shape
        folds = min(self.config.calibration_folds, n)
        if folds < 2:
            return None
        scores, banks = np.empty((n, patches), np.float32), []
        for fold in progress(range(folds), "held-out scores"):
            held = torch.arange(n, device=represented.device) % folds == fold
            others = (~held).repeat_interleave(patches)
            whole = len(self.bank_.entries)
            count = max(min(whole, 2), whole * int(others.sum()) // len(others))  # Eq. 10 needs a neighbour
            bank = self._memorize(represented.flatten(0, 1), count, others)
            for i in held.nonzero().flatten().tolist():
                scores[i] = patch_scores(represented[i], bank, self.config.weighting).cpu().numpy()
            if self.refine:
                banks.append(bank)
        self.fold_banks_ = tuple(banks)
        return scores

    def _check_fitted(self):
        if self.bank_ is None:
            raise ValueError(f"this {type(self).__name__} is not fitted: call fit(images) or load(path) first")

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: bank, f and training scores, with the config as JSON in its header. Not the backbone."""
        self._check_fitted()
        require_writable(path, "save {} in", b"rcp-detector")
        tensors, c = {"bank": self.bank_.entries}, self.config
        weights = str(Path(c.weights).absolute()) if backbone.is_file(c.weights) else c.weights
        header = {"format": "rcp-detector-2", "config": json.dumps(c.asdict() | {"weights": weights})}
        header["backbone"] = self._weights or backbone.weights_identity(c.backbone, c.weights)
        header["false_alarm_rate"] = json.dumps(self.false_alarm_rate)
        if self.train_scores_ is not None:
            tensors["train_scores"] = torch.from_numpy(self.train_scores_)
        for part, module in {"f": self.f_, "refiner": self.refiner_}.items():
            tensors |= {f"{part}.{name}": value for name, value in (module.state_dict() if module else {}).items()}
        if self.refiner_ is not None:
            header["refine"] = json.dumps(self.refine.asdict())
        write_tensors(path, tensors, header)

    def export(self, path: str | Path) -> Path:
        """Writes an .onnx or .pt2 file that needs no rcp to run: see :func:`rcp.export.export`."""
        from rcp.export import export  # of those who deploy alone

        self._check_fitted()
        return export(self, path)

    @classmethod
    def load(cls, path: str | Path, *, weights: str | Path | None = None, device: str | None = None) -> "ReConPatch":
        """Reads what ``save`` wrote, of PatchCore too (unless this is PatchCore's own ``load``); nothing is unpickled.

        Args:
            weights: where the backbone's weights are now, if they moved; they must be the same weights.
            device: another device than the one of ``fit``.

        Raises:
            FileNotFoundError: no such file, or the weights are no longer where they were.
            ValueError: not such a file, one of ReConPatch where PatchCore's is meant, or other backbone weights.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no detector file {path}")
        header, tensors = read_tensors(path, "rcp-detector")
        try:
            here = {"device": "auto" if device is None else device} | ({"weights": str(weights)} if weights else {})
            config = Config.build(**json.loads(header["config"]) | here)
            refine = json.loads(header["refine"]) if "refine" in header else None
            detector = cls.from_config(config, refine)
            if not isinstance(detector, cls):
                raise ValueError(f"holds a {type(detector).__name__}, not a {cls.__name__}")
            detector.false_alarm_rate = json.loads(header.get("false_alarm_rate", "null"))
            detector._restore(tensors)  # after it, a rate that its scores do not support would be refused
        except (KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not a detector saved by rcp, or is damaged ({why})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: {error}; if they moved, name them as weights") from None
        c, expected = detector.config, header.get("backbone")
        if (identity := backbone.weights_identity(c.backbone, c.weights)) != expected:
            words = f"weights: {c.weights} are not the weights {path} was fitted with"
            raise ValueError(f"{words} ({identity}, expected {expected})")
        detector._weights = expected
        return detector

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """What is fitted, from a file's tensors."""
        c, learnt, of_learnt = self.config, {}, dict(tensors)
        for name, t in tensors.items():
            axes = {"bank": 2, "train_scores": 1, "f.weight": 2}.get(name, t.ndim)
            fits = t.dtype == torch.float32 and t.ndim == axes and t.numel() > 0
            expected = f"float32 numbers along {axes} axes"
            require(name, fits or name.endswith("num_batches_tracked"), expected, (tuple(t.shape), t.dtype))
        bank, scores = of_learnt.pop("bank"), of_learnt.pop("train_scores", None)
        size = bank.shape[1]
        if c.representation != "none":
            size = c.extracted_dim or tensors["f.weight"].shape[1]
            learnt["f"] = nn.Linear(size, c.bank_dim(size))
        if self.refine:
            learnt["refiner"] = RefinementNet(self.refine)
        both = nn.ModuleDict(learnt).requires_grad_(False).eval().to(self.device)
        both.load_state_dict(of_learnt)  # none is missing, foreign or of another shape, or it raises
        self.f_, self.refiner_ = learnt.get("f"), learnt.get("refiner")
        require("bank", bank.shape[1] == c.bank_dim(size), f"{c.bank_dim(size)} columns by its config", bank.shape[1])
        self.bank_ = MemoryBank(bank.to(self.device), 1 if c.coreset_ratio == 1 else c.neighbours)
        self.train_scores_ = None if scores is None else scores.numpy()

    def __repr__(self) -> str:
        by_class = {"representation": "trained"} if self.represents == ("none",) else {}  # the class says it
        named = repr(self.config.replace(**by_class)).replace("Config", type(self).__name__, 1)
        if self.refine is None:
            return named
        return f"{named.removesuffix(')')}{'' if named.endswith('()') else ', '}refine={self.refine})"


class PatchCore(ReConPatch):
    """PatchCore: ReConPatch without f, p pooled to ``dim``; everything else is the same code and the same arguments."""

    represents = ("none",)


def load(path: str | Path, **how) -> ReConPatch:
    """What ``save`` wrote, of either class. how: as of :meth:`ReConPatch.load`."""
    return ReConPatch.load(path, **how)


def _features(p: np.ndarray, size: int | None) -> np.ndarray:
    """p as an array. Raises ValueError where that cannot be features, or those of another size."""
    p = np.asanyarray(p)
    fits = p.ndim == 3 and len(p) > 0 and p.dtype in FLOATS and p.shape[2] == (size or p.shape[2])
    require("p", fits, f"features (n, h · w, {size or 'D'}) of float numbers", (p.shape, p.dtype))
    return p


def drop_pages(p: np.ndarray) -> np.ndarray:
    """Gives the memory of what was read of a memory map back; the file keeps it. Returns ``p``."""
    if isinstance(p, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        p._mmap.madvise(mmap.MADV_DONTNEED)
    return p


def as_tensor(p: np.ndarray) -> Tensor:
    """A memory-mapped or plain array as a tensor over the same memory, read only by agreement."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(p))


_OWN = [p for p in inspect.signature(ReConPatch).parameters.values() if p.kind is p.KEYWORD_ONLY]
_SIGNATURE = inspect.Signature([*inspect.signature(Config).parameters.values(), *_OWN])
ReConPatch.__signature__ = PatchCore.__signature__ = _SIGNATURE  # so that help() and editors show every argument
