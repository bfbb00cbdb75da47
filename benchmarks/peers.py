"""anomalib as a peer: its k-center coreset on given features, and its PatchCore from images to metrics."""

import logging
import tempfile
import warnings

import numpy as np
import torch
import torchvision
from alone import seconds
from safetensors.torch import load_file
from torch import Tensor

from rcp.backbone import normalize


def k_center(features: Tensor, count: int, picks: int) -> tuple[float, float]:
    """anomalib's KCenterGreedy on (N, D) float32 -> (seconds for ``picks`` picks, seconds for ``count`` at the same price each).

    It first projects to 4 ln N / 0.16 dimensions (once, measured apart), then compares every patch with every pick.
    """
    from anomalib.models.components.sampling import KCenterGreedy

    torch.manual_seed(0)
    sampler = KCenterGreedy(features, count / len(features))
    sampler.coreset_size = 1
    projection, _ = seconds(sampler.select_coreset_idxs)
    sampler.coreset_size = picks
    all_, _ = seconds(sampler.select_coreset_idxs)
    return all_, projection + (all_ - projection) * (count - 1) / (picks - 1)


def patchcore(
    data: str, category: str, backbone: str, weights: str, ratio: float, size: tuple[int, int], as_shipped: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """anomalib's Patchcore (layers 2 and 3) on a folder of MVTec AD's layout, on the CPU -> (seconds by stage, metrics).

    Its backbone is torchvision's, with the weights of a .safetensors file; nothing is fetched. size: (resize, crop).

    Args:
        as_shipped: validates on the test images during fit, normalises scores and computes F1, as it does unless told not to.
            Else it does none of that: image and pixel AUROC alone. Neither logs, saves or draws.
    """
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from anomalib.metrics import AUROC, Evaluator
    from anomalib.models import Patchcore

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    areas = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]

    def fit():
        cnn = torchvision.models.get_model(backbone, weights=None)
        cnn.load_state_dict(load_file(weights), strict=False)  # layer4 may be missing: nothing here runs it
        model = Patchcore(
            backbone=cnn,
            layers=["layer2", "layer3"],
            coreset_sampling_ratio=ratio,
            pre_processor=Patchcore.configure_pre_processor((size[0], size[0]), (size[1], size[1])),
            post_processor=as_shipped,
            visualizer=False,
            evaluator=as_shipped or Evaluator(test_metrics=areas),
        )
        images = MVTecAD(data, category, train_batch_size=16, eval_batch_size=16, num_workers=0)
        engine.fit(model, datamodule=images)
        return model, images

    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            accelerator="cpu",
            devices=1,
            barebones=True,
            limit_val_batches=1.0 if as_shipped else 0,
            default_root_dir=folder,
        )
        fitting, (model, images) = seconds(fit)
        testing, found = seconds(lambda: engine.test(model, datamodule=images, verbose=False))
    return {"fit": fitting, "test": testing}, {name: float(value) for name, value in found[0].items()}


def inference(
    backbone: str, weights: str | None, bank: int, fill: np.ndarray, images: np.ndarray, iterations: int
) -> list[float]:
    """anomalib's PatchcoreModel, bare, on (n, S, S, 3) uint8 images -> seconds of each pass to scores and maps.

    The images are normalised before; 3 warm-ups are left out. Its bank is ``bank`` patches of the images in ``fill``,
    drawn at random: the size alone matters to its search.
    """
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(0)
    cnn = torchvision.models.get_model(backbone, weights=None)
    if weights:
        cnn.load_state_dict(load_file(weights), strict=False)
    model = PatchcoreModel(layers=["layer2", "layer3"], backbone=cnn).eval()
    model.training = True  # of this module alone: it then returns its embeddings
    with torch.inference_mode():
        images = normalize(torch.from_numpy(images)).contiguous()
        embeddings = torch.cat([model(part.contiguous()) for part in normalize(torch.from_numpy(fill)).split(8)])
        model.training = False
        model.memory_bank = embeddings[torch.randperm(len(embeddings))[:bank]]
        return [seconds(model, images)[0] for _ in range(3 + iterations)][3:]
