"""Other methods on the same images: same split and crop, same CNN and weights, their scores and maps judged by :mod:`rcp.metrics`.

SPADE is :mod:`reproduce.spade`; PatchCore and ReConPatch are :mod:`rcp`'s, fitted anew so that all are timed alike. The others are
anomalib's networks and training steps (extra ``peers``), without its thresholds, normalisation or validation on test images; the
last epoch counts. anomalib is imported only where one of them is computed.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from rcp import metrics
from rcp.backbone import normalize
from rcp.checks import check_fields, check_names, limited, require
from rcp.config import Config
from rcp.data import load_images
from rcp.detector import Prediction, ReConPatch, Timings, resolve_device
from rcp.paths import data_root
from rcp.refinement import Refinement
from reproduce.entries import Entry, OfAnEntry, about
from reproduce.provenance import code_of, version_of
from reproduce.spade import BATCH, deepest, spade
from reproduce.store import Store
from reproduce.studies import forget_peak, peak_memory

ANOMALIB = "2.7.0"
CNNS = ("resnet18", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2")
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # (n, S, S, 3) uint8 -> scores (n,), maps (n, S, S)


class Method(NamedTuple):
    """anomalib's class of a method, and how it is published: epochs, images of a batch, learning rate (0 where nothing is trained).

    alias: of these CNNs it knows two by name; all but ResNet-18 are named WideResNet-50-2, whose maps have the same channels.
    """

    of: str
    epochs: int = 1
    batch: int = BATCH
    lr: float = 0.0
    alias: bool = False


OURS = ("PatchCore", "ReConPatch")
LOCAL = (*OURS, "SPADE")
METHODS = {
    "PatchCore (anomalib)": Method("Patchcore"), "PaDiM": Method("Padim", alias=True), "CFA": Method("Cfa", 30, 4, 1e-3, alias=True),
    "CFLOW-AD": Method("Cflow", 200, 32, 2e-4), "FastFlow": Method("Fastflow", 500, 32, 1e-3, alias=True),
    "RD4AD": Method("ReverseDistillation", 200, 16, 5e-3), "DRAEM": Method("Draem", 700, 8, 1e-4),
}  # fmt: skip


@dataclass(frozen=True)
class Peer(OfAnEntry):
    """One method on one category and seed. ``entry`` says which CNN, images, size, bank (of PatchCore) and seed.

    epochs, batch, lr: 0 is the method's published value; of what anomalib does not train they are not used.

    Raises:
        ValueError: an unknown name; a CNN that the method cannot use; options below 0.
    """

    entry: Entry
    name: str
    epochs: int = limited(0, least=0)
    batch: int = limited(0, least=0)
    lr: float = limited(0.0, least=0)

    def __post_init__(self):
        check_fields(self)
        check_names("methods: there is none named", [self.name], [*LOCAL, *METHODS])
        cnn, words = self.config.backbone, f"one that {self.name} can use: {', '.join(CNNS)}"
        require("backbone", self.name in LOCAL or cnn in CNNS, words, cnn)

    @property
    def method(self) -> str:
        if self.name in OURS and self.config.aggregation == "mean":
            return "PatchCore (mean)"
        fewer = bool(self.training) and self.training["epochs"] != METHODS[self.name].epochs
        return f"{self.name} ({self.epochs} of {METHODS[self.name].epochs} epochs)" if fewer else self.name

    @property
    def training(self) -> dict:
        """Epochs, batch and learning rate that are used, of a method that anomalib trains; else {}."""
        published = METHODS.get(self.name)
        used = ("epochs", "batch", "lr") if published and published.lr else ()
        return {name: getattr(self, name) or getattr(published, name) for name in used}

    def columns(self) -> dict:
        return super().columns() | {"method": self.method}

    def identity(self) -> dict:
        whole, used = self.entry.identity(), ["backbone", "resize", "image_size", "aspect", "seed"]
        used += ["layers", "coreset_ratio", "neighbours"] * (self.name == "PatchCore (anomalib)")
        of = {name: getattr(self.config, name) for name in used} if self.name in METHODS else whole["config"]
        library, textures = ANOMALIB if self.name in METHODS else None, None
        if self.name == "DRAEM" and (data_root() / "dtd").is_dir():
            textures = Refinement.build(textures=str(data_root() / "dtd"), kind="texture").identity()["textures"]
        return {
            "study": "peer", "name": self.name, "training": self.training, "anomalib": library, "data": whole["data"],
            "perturbation": whole["perturbation"], "textures": textures,
            "config": of | {"weights": whole["config"]["weights"]},
            "code": [whole["code"], code_of("reproduce.peers", "reproduce.spade", alone=True)],
        }  # fmt: skip

    def compute(self, store: Store, log: Callable[[str], None]) -> tuple[dict, dict]:
        data, timings, of = self.data(), Timings(), self.transform("test")
        require("category", len(data.train) > 1, f"two training images or more for {self.name}", len(data.train))
        if self.name in METHODS:
            check_anomalib()
        device = resolve_device(self.config.device)
        with timings("decode"):
            train, test = (load_images(split.paths, of) for split in (data.train, data.test))
        forget_peak(device)
        with timings("fit"), torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            predict = (anomalib if self.name in METHODS else ours)(self, train)
        with timings("predict"):
            scores, maps = predict(test)
        peak, measured = peak_memory(device), metrics.evaluate(Prediction(scores, maps, of, None), data.test)
        measured |= {"fit_seconds": timings["fit"], "inference_ms": 1e3 * timings["predict"] / len(test)}
        measured["peak_memory_mib"] = peak and peak / 2**20
        info = about(self, data, timings, device, measured) | {"training": self.training}
        return info, {"scores": scores, "labels": data.test.labels}


def check_anomalib() -> None:
    """Raises ImportError, with the command, where anomalib is missing or of another version than this is written for."""
    if (found := version_of("anomalib")) != ANOMALIB:
        how = f"python -m pip install 'anomalib=={ANOMALIB}', in an environment of its own if need be"
        raise ImportError(f"this peer needs anomalib {ANOMALIB}, found {found}: {how}")


def ours(peer: Peer, train: np.ndarray) -> Predict:
    if peer.name == "SPADE":
        return spade(peer.config, train)
    # images are cropped already
    detector = ReConPatch.from_config(peer.config.replace(resize=peer.config.image_size)).fit(train)
    return lambda images: attrgetter("scores", "maps")(detector.predict(images))


# ---- anomalib ----


def anomalib(peer: Peer, train: np.ndarray) -> Predict:
    """anomalib's network, trained to the last epoch on (n, S, S, 3) uint8; nothing of the test set is seen."""
    from anomalib import models
    from anomalib.data import ImageBatch
    from anomalib.pre_processing import PreProcessor
    from lightning.pytorch import LightningDataModule, Trainer
    from torch.utils.data import DataLoader
    from torchvision.transforms.v2 import Resize

    c, how, published = peer.config, peer.training, METHODS[peer.name]
    device, raw = resolve_device(c.device), published.of == "Draem"  # it takes images as they are, in [0, 1]

    def prepared(images: np.ndarray) -> Tensor:
        images = torch.from_numpy(images)
        return images.permute(0, 3, 1, 2).float().div(255) if raw else normalize(images).contiguous()

    def batched(images: list) -> ImageBatch:
        return ImageBatch(image=prepared(np.stack(images)))

    class Images(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(train, how.get("batch", BATCH), shuffle=bool(how), collate_fn=batched)

    with _built_as(c) as levels:
        size = PreProcessor(Resize((c.image_size, c.image_size)))  # some ask it for the size: it changes nothing
        alone = {"pre_processor": size, "post_processor": False, "evaluator": False, "visualizer": False}
        model = getattr(models, published.of)(**alone | _options(c, published, levels))
    configured = model.configure_optimizers
    model.configure_optimizers = lambda: _with_rate(configured(), how.get("lr"))
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # of a loop without validation, which is meant
        trainer = Trainer(max_epochs=how.get("epochs", 1), accelerator=accelerator, devices=1, barebones=True)
        trainer.fit(model, datamodule=Images())
    network = model.model.to(device).eval()

    @torch.inference_mode()
    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = [network(prepared(images[i : i + BATCH]).to(device)) for i in range(0, len(images), BATCH)]
        scores, maps = (torch.cat([getattr(o, n).float().cpu() for o in out]) for n in ("pred_score", "anomaly_map"))
        return scores.flatten().numpy(), maps.reshape(images.shape[:3]).numpy()

    return predict


def _options(c: Config, published: Method, levels: int) -> dict:
    """What the constructor is told: the CNN's name, and what is not as published because the CNN is another."""
    if published.of == "Draem":  # anomalib would fetch them itself
        root = data_root() / "dtd"
        require("textures", root.is_dir(), f"DTD in {root}: python -m reproduce download dtd", "none")
        return {"dtd_dir": root}
    named = {"backbone": "wide_resnet50_2" if published.alias and c.backbone != "resnet18" else c.backbone}
    if published.of == "Patchcore":
        named |= {"layers": [f"layer{n}" for n in c.layers], "coreset_sampling_ratio": c.coreset_ratio}
        named["num_neighbors"] = c.neighbours
    if published.of == "Cflow":  # published with levels 2 to 4
        named |= {"layers": [f"layer{n}" for n in range(levels - 2, levels + 1)]}
    return named


@contextmanager
def _built_as(c: Config):
    """Every CNN that timm or torchvision builds meanwhile is the config's, with its weights; -> the deepest level there is."""
    import timm
    import torchvision

    cnn, create = deepest(c), timm.create_model
    state, levels = cnn.trunk.state_dict(), len(cnn.levels)
    alone = torchvision.models.get_model(c.backbone, weights=None)

    def loaded(model):
        absent = {key.split(".")[0] for key in model.load_state_dict(state, strict=False).missing_keys}
        absent -= {"fc", *(f"layer{n}" for n in range(levels + 1, 5))}
        require("weights", not absent, f"all of {c.backbone}'s levels 1 to {levels}", f"none of {sorted(absent)}")
        return model

    by_timm = patch("timm.create_model", lambda _name, **how: loaded(create(c.backbone, **how | {"pretrained": False})))
    with by_timm, patch.multiple("torchvision.models", **{name: lambda **_: loaded(alone) for name in CNNS}):
        yield levels


def _with_rate(configured, lr: float | None):
    """What ``configure_optimizers`` returned, each optimizer at this learning rate."""
    found = configured[0] if isinstance(configured, tuple) else configured
    for optimizer in found if isinstance(found, list) else [found] * (lr is not None):
        for group in optimizer.param_groups:
            group["lr"] = lr
    return configured
