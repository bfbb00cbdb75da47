"""The detectors: ``ReConPatch``, and ``PatchCore``, which is ReConPatch without f."""

import ctypes
import dataclasses
import inspect
import json
import mmap
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rcp import backbone, refinement
from rcp.config import Config
from rcp.coreset import coreset_size, greedy_k_center
from rcp.data import Transform, load_images
from rcp.memory import MemoryBank
from rcp.model import train
from rcp.patches import PatchExtractor, pictures_at_a_time, pool
from rcp.refinement import Refinement, Refiner
from rcp.scoring import image_scores, patch_scores, score_maps
from rcp.store import require_disk
from rcp.timing import Timings


@dataclass(frozen=True, eq=False)
class Prediction:
    """What ``predict`` returns.

    scores: (n,) float32 image scores; higher is more anomalous, in units of feature distance; of a refined map, in [0, 1].
    maps: (n, S, S) float32 score maps at ``image_size``, or None; where refined, in [0, 1].
    transform: the resize and crop that were applied, for masks to go the same way.
    train_scores: (n_train,) float32, each training picture scored against a bank made of other pictures (None without folds).
    patch_scores: (n, h, w) float32, what scores and maps are made of (Eq. 10).
    """

    scores: np.ndarray
    maps: np.ndarray | None
    transform: Transform
    train_scores: np.ndarray | None
    patch_scores: np.ndarray | None = None


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the processor. Raises ValueError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto, cpu or an available cuda device, got {name!r} ({error})") from None
    return device


class ReConPatch:
    """ReConPatch (WACV 2024) for one kind of product: ``fit`` on normal pictures, ``predict`` on any.

    Keyword arguments are the hyper-parameters of :class:`rcp.config.Config`, whose docstring gives each one's meaning,
    default and provenance; an unknown name raises ValueError with the nearest valid one.

    refine: train a refinement network as well (Appendix D): True, a :class:`rcp.refinement.Refinement`, or its options as a dict.

    Attributes after ``fit``:
        f_: nn.Linear, p -> f(p); None for PatchCore.
        bank_: the memory bank M.
        history_: one dict per training epoch (loss, quantiles of ω^P).
        train_patch_scores_: (n_train, h · w) float32, held-out patch scores of the training pictures, or None; not saved.
        train_scores_: (n_train,) float32, their maxima, or None.
        fold_banks_: for a refinement, the F banks of the held-out scores, the i-th for the training pictures i, i + F, ...; not saved.
        refiner_: the refinement network, or None. refinement_history_: one dict per epoch of its training.
        timings_: seconds per stage of the last fit and predict.
    """

    represent = True

    def __init__(self, *, refine: Refinement | dict | bool | None = None, **hyper_parameters):
        self.refine = refinement.options(refine)
        self.config = Config.build(**({"represent": self.represent} | hyper_parameters))
        if self.config.represent != self.represent:
            raise ValueError(f"represent: {type(self).__name__} is the detector with represent={self.represent}")
        c = self.config
        if self.refine and c.calibration_folds < 2:
            raise ValueError(
                f"calibration_folds: expected 2 or more (the refinement normalises by held-out scores), got {c.calibration_folds}"
            )
        self.transform = Transform(resize=c.resize, image_size=c.image_size, aspect=c.aspect)
        self.device = resolve_device(c.device)
        _keep_freed_memory()
        backbone.check(c.backbone, c.weights)
        self.bank_: MemoryBank | None = None
        self.fold_banks_: tuple[MemoryBank, ...] = ()
        self.refiner_: Refiner | None = None
        self.timings_ = Timings()
        self._extractor: PatchExtractor | None = None

    @classmethod
    def from_config(cls, config: Config, refine: Refinement | None = None) -> "ReConPatch":
        """The detector that a config describes: ReConPatch or PatchCore, by ``config.represent``."""
        return (ReConPatch if config.represent else PatchCore)(refine=refine, **config.asdict())

    @property
    def extractor(self) -> PatchExtractor:
        """Frozen CNN and aggregation, built when first needed."""
        if self._extractor is None:
            self._extractor = PatchExtractor(self.config, self.device)
        return self._extractor

    def fit(self, images: Sequence[str | Path], log: Callable[[str], None] = print) -> "ReConPatch":
        """Learns the normal state from pictures without defects.

        Args:
            images: paths; ``dataset.train``, or any list.
            log: receives one line per training epoch.

        Raises:
            ValueError: no pictures; a file that is no picture (named, before any feature is computed); a ratio that selects nothing.
        """
        paths = list(images)
        if not paths:
            raise ValueError("images: expected at least one picture without defects, got none")
        textures = self.refine.load_textures(self.config.image_size) if self.refine else None
        with self.timings_("decode"):
            pictures = load_images(paths, self.transform)
        h, w, dim = self.extractor.shape()
        shape, dtype = (len(pictures), h * w, dim), np.dtype(self.config.feature_dtype)
        coreset_size(self.config.coreset_ratio, len(pictures) * h * w)
        require_disk(tempfile.gettempdir(), int(np.prod(shape)) * dtype.itemsize, "patch features")
        with tempfile.TemporaryFile() as file:  # on disk, as in the store: f(p) takes as much memory as p
            features = np.memmap(file, dtype, "w+", shape=shape)
            with self.timings_("features"):
                self.extractor(pictures, out=features, names=paths)
            if not self.refine:
                del pictures
                return self.fit_features(features, log)
            self.fit_features(features, log)
        refinement.fit(self, pictures, textures, log, names=paths)
        self.fold_banks_ = ()
        return self

    def train_features(
        self, features: np.ndarray, log: Callable[[str], None] = print, each_epoch: Callable | None = None
    ) -> tuple[nn.Linear | None, list[dict]]:
        """f and its history from features (n, h · w, D), see :func:`rcp.model.train`; (None, []) of a PatchCore."""
        if not self.config.represent:
            return None, []
        with self.timings_("training"):
            return train(_as_tensor(features).to(self.device), self.config, log, each_epoch)

    def fit_features(
        self,
        features: np.ndarray,
        log: Callable[[str], None] = print,
        trained: tuple[nn.Linear | None, list[dict]] | None = None,
    ) -> "ReConPatch":
        """``fit`` from features that are there already: (n, h · w, D) as :class:`PatchExtractor` makes them.

        trained: what :meth:`train_features` gave for the same features, where f is there already.
        """
        c = self.config
        n, patches, _ = features.shape
        count = coreset_size(c.coreset_ratio, n * patches)
        self.f_, self.history_ = trained or self.train_features(features, log)
        self.refiner_ = None  # of another f, if there was one
        held = _as_tensor(features)
        _keep_freed_memory()()  # of features and training: f(p) comes now
        with self.timings_("representation"):
            represented = torch.empty(n, patches, c.dim, device=self.device)
            for i, part in enumerate(held):
                represented[i] = self.represent_patches(part)
                drop_pages(features)
            del held, features
        with self.timings_("coreset"):
            self.bank_ = self._memorize(represented.flatten(0, 1), count)
        with self.timings_("calibration"):
            self.train_patch_scores_ = held_out = self._held_out_scores(represented)
            self.train_scores_ = None if held_out is None else held_out.max(1)
        return self

    @torch.inference_mode()
    def represent_patches(self, p: Tensor) -> Tensor:
        """p: (..., D) of any float dtype -> f(p), or the pooled p of PatchCore: (..., dim) float32 on the detector's device."""
        p = p.to(self.device).float()
        if self.f_ is None:
            return pool(p.flatten(0, -2), self.config.dim).unflatten(0, p.shape[:-1])
        return torch.stack([self.f_(picture) for picture in p]) if self._one_by_one(p) else self.f_(p)

    def score_patches(self, represented: Tensor, banks: Sequence[MemoryBank] = ()) -> Tensor:
        """f(p): (n, h · w, dim) -> (n, h, w) float32, Eq. 9 and 10 (h = w: the crop is a square). banks: one per picture, for ``bank_``."""
        one_by_one = banks or self._one_by_one(represented)
        parts = represented if one_by_one else [represented.flatten(0, 1)]
        side = int(represented.shape[1] ** 0.5)
        scores = [self._score(part, bank) for part, bank in zip(parts, banks or [self.bank_] * len(parts), strict=True)]
        return torch.cat(scores).reshape(len(represented), side, side)

    def _one_by_one(self, pictures: Tensor) -> bool:
        """On a processor each picture goes by itself: its scores are the same in any batch, to the last bit."""
        return pictures.ndim == 3 and self.device.type == "cpu"

    def predict(self, images: Sequence[str | Path], maps: bool = True, refined: bool = True) -> Prediction:
        """Scores pictures.

        Args:
            images: paths; ``dataset.test``, or any list. A file that is no picture is named before any feature is computed.
            maps: also return score maps at ``image_size``.
            refined: by the refinement network, where there is one; False gives scores and maps without it.
        """
        self._check_fitted()
        with self.timings_("decode"):
            pictures = load_images(list(images), self.transform)
        shown = pictures if refined else None
        return self._predict(
            len(pictures), lambda part: self.extractor(pictures[part], names=list(images)[part]), maps, shown
        )

    def predict_features(
        self, features: np.ndarray, maps: bool = True, pictures: np.ndarray | None = None
    ) -> Prediction:
        """``predict`` from features that are there already: (n, h · w, D). pictures: (n, S, S, 3) uint8, to be refined with."""
        self._check_fitted()

        def features_of(part: slice) -> np.ndarray:
            drop_pages(features)
            return features[part]

        return self._predict(len(features), features_of, maps, pictures)

    def _predict(
        self, n: int, features_of: Callable[[slice], np.ndarray], maps: bool, pictures: np.ndarray | None
    ) -> Prediction:
        batch = pictures_at_a_time(self.device)
        scores, patches = np.empty(n, np.float32), []
        all_maps = np.empty((n, self.config.image_size, self.config.image_size), np.float32) if maps else None
        for start in range(0, n, batch):
            part = slice(start, min(start + batch, n))
            with self.timings_("features"):
                features = _as_tensor(features_of(part))
            with self.timings_("scoring"):
                if self.refiner_ and pictures is not None:
                    s, scores[part], found = refinement.refined(self, features, pictures[part])
                else:
                    s = self.score_patches(self.represent_patches(features))
                    scores[part] = image_scores(s.flatten(1)).cpu().numpy()
                    found = score_maps(s, self.config.image_size, self.config.blur) if maps else None
                patches.append(s.cpu().numpy())
                if maps:
                    all_maps[part] = found
        # held-out scores are unrefined: a refined one of a picture that the network was trained on would not be held out
        comparable = self.refiner_ is None or pictures is None or self.refine.image_score == "patches"
        train_scores = self.train_scores_ if comparable else None
        return Prediction(scores, all_maps, self.transform, train_scores, np.concatenate(patches))

    def _memorize(self, represented: Tensor, count: int, among: Tensor | None = None) -> MemoryBank:
        """(N, dim) -> the coreset of ``count`` patches as a memory bank."""
        c = self.config
        how = {"start": c.coreset_start, "projection": c.coreset_projection, "seed": c.seed, "among": among}
        picks = greedy_k_center(represented, count, **how)
        return MemoryBank(represented[picks], c.neighbours, c.self_in_neighbours)

    @torch.inference_mode()
    def _score(self, queries: Tensor, bank: MemoryBank) -> Tensor:
        return patch_scores(queries, bank, squared=self.config.squared, weighting=self.config.weighting)

    def _held_out_scores(self, represented: Tensor) -> np.ndarray | None:
        """(n, h · w, dim) -> (n, h · w): scores of training pictures' patches against a bank made of the other folds' pictures.

        A picture that helped to fill the bank scores lower than a fresh one would; these do not. f has still seen all.
        None where there is nothing to hold out.
        """
        n, patches, _ = represented.shape
        folds = min(self.config.calibration_folds, n)
        if folds < 2:
            return None
        scores, banks = np.empty((n, patches), np.float32), []
        for fold in range(folds):
            held = torch.arange(n, device=represented.device) % folds == fold
            others = (~held).repeat_interleave(patches)
            count = max(2, len(self.bank_.entries) * int(others.sum()) // len(others))  # Eq. 10 needs a neighbour
            bank = self._memorize(represented.flatten(0, 1), count, others)
            for i in held.nonzero().flatten().tolist():
                scores[i] = self._score(represented[i], bank).cpu().numpy()
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
        tensors = {
            "bank": self.bank_.entries,
        }
        if self.train_scores_ is not None:
            tensors["train_scores"] = torch.from_numpy(self.train_scores_)
        if self.f_ is not None:
            tensors |= {f"f.{name}": value for name, value in self.f_.state_dict().items()}
        if self.refiner_ is not None:
            tensors |= {f"refiner.{name}": value for name, value in self.refiner_.state_dict().items()}
        header = {
            "format": "rcp-detector-1",
            "config": json.dumps(self.config.asdict()),
            "backbone": backbone.weights_identity(self.config.backbone, self.config.weights),
        }
        if self.refiner_ is not None:
            header["refine"] = json.dumps(self.refine.asdict())
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=header)

    @classmethod
    def load(cls, path: str | Path, *, weights: str | Path | None = None, device: str | None = None) -> "ReConPatch":
        """Reads what ``save`` wrote; nothing is unpickled.

        Args:
            weights: where the backbone's weights are now, if they moved; they must be the same weights.
            device: another device than the one of ``fit``.

        Raises:
            FileNotFoundError: no such file, or the weights are no longer where they were.
            ValueError: not such a file, another class's, or other backbone weights.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no detector file {path}")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a detector saved by rcp, or is damaged ({error})") from None
        if header.get("format") != "rcp-detector-1":
            raise ValueError(f"{path} is not a detector saved by rcp (format {header.get('format')!r})")
        values = json.loads(header["config"])
        if values["represent"] != cls.represent:
            raise ValueError(
                f"{path} holds a {'ReConPatch' if values['represent'] else 'PatchCore'}, not a {cls.__name__}"
            )
        values |= {"device": device or "auto"} | ({"weights": str(weights)} if weights else {})
        detector = cls(**values, refine=json.loads(header["refine"]) if "refine" in header else None)
        c = detector.config
        if (identity := backbone.weights_identity(c.backbone, c.weights)) != header["backbone"]:
            raise ValueError(
                f"weights: {c.weights} are not the weights {path} was fitted with ({identity}, expected {header['backbone']})"
            )
        detector.bank_ = MemoryBank(tensors["bank"].to(detector.device), c.neighbours, c.self_in_neighbours)
        detector.history_, detector.f_ = [], None
        detector.train_patch_scores_ = None
        detector.train_scores_ = tensors["train_scores"].numpy() if "train_scores" in tensors else None
        if c.represent:
            detector.f_ = nn.Linear(tensors["f.weight"].shape[1], c.dim, bias=c.bias, device=detector.device)
            detector.f_.load_state_dict(
                {name.removeprefix("f."): t for name, t in tensors.items() if name.startswith("f.")}
            )
            detector.f_.requires_grad_(False)
        if detector.refine:
            state = {n.removeprefix("refiner."): t for n, t in tensors.items() if n.startswith("refiner.")}
            detector.refiner_ = Refiner.restore(detector.refine, state).to(detector.device)
        return detector

    def __repr__(self) -> str:
        shown = repr(self.config.replace(represent=Config.represent))  # the class says it
        named = shown.replace("Config", type(self).__name__, 1)
        if self.refine is None:
            return named
        return f"{named.removesuffix(')')}{'' if named.endswith('()') else ', '}refine={self.refine})"


class PatchCore(ReConPatch):
    """PatchCore: ReConPatch without f, p pooled to ``dim``; everything else is the same code and the same arguments."""

    represent = False


@cache
def _keep_freed_memory() -> Callable[[], None]:
    """Has glibc keep freed blocks of up to 64 MiB, 256 MiB in all, for the next tensor; -> what gives them back after all.

    It would give each back to the system and get it anew, zeroed page by page: up to half of a small CNN's time, by chance of sizes.
    """
    if platform.libc_ver()[0] != "glibc":
        return lambda: None
    libc, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1  # malloc.h
    libc.mallopt(mmap_threshold, 2**26)
    libc.mallopt(trim_threshold, 2**28)
    return lambda: libc.malloc_trim(0)


def drop_pages(features: np.ndarray) -> None:
    """Gives the memory of what was read of a memory map back; the file keeps it."""
    if isinstance(features, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        features._mmap.madvise(mmap.MADV_DONTNEED)


def _as_tensor(features: np.ndarray) -> Tensor:
    """A memory-mapped or plain array as a tensor over the same memory, read only by agreement."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(features))


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v)
        for n, v in [*_DEFAULTS.items(), ("refine", None)]
        if n != "represent"
    ]
)
ReConPatch.__signature__ = PatchCore.__signature__ = _SIGNATURE  # so that help() and editors show every argument
