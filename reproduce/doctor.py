"""``python -m reproduce doctor``: what is here, what is missing for the paper profile, and the command that gets it."""

import shutil
from pathlib import Path

import torch

from rcp import backbone, paths
from rcp.data import REGISTRY, categories
from reproduce.notebook import PROFILES
from reproduce.provenance import device_name, versions
from reproduce.store import runs_root

PAPER_BACKBONES = ("wide_resnet50_2", "wide_resnet101_2", "resnext101_32x8d", "densenet201")


def report() -> tuple[list[str], list[str]]:
    """-> (lines on what is here, lines on what the paper profile lacks, each with its command)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = f", {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if device.type == "cuda" else ""
    lines, missing = [f"device    {device_name(device)}{memory}"], []
    lines.append("versions  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    if device.type == "cpu":
        missing.append("a GPU: the paper profile (15 categories x 3 seeds x 120 epochs) takes days on a CPU")
    for name in REGISTRY:
        found = _data(paths.data_root() / name)
        lines.append(f"data      {name:6} {found or 'not found in ' + str(paths.data_root() / name)}")
        if not found and name == "mvtec":
            own = "(or name your copy: make reproduce PROFILE=paper DATA=...)"
            missing.append(f"MVTec AD: python -m reproduce download mvtec   {own}")
    for name in PAPER_BACKBONES:
        file = weights_file(name)
        lines.append(f"weights   {name:17} {'found' if file.exists() else 'not found'} ({file.name})")
        if not file.exists() and name == PROFILES["paper"]["backbone"]:
            missing.append(f"weights of {name}: python -m reproduce weights {name}   (or name a file: WEIGHTS=...)")
    runs = runs_root()
    free = shutil.disk_usage(next(p for p in (runs, *runs.resolve().parents) if p.exists())).free
    lines.append(f"disk      {free / 1e9:.0f} GB free for {runs}")
    if free < 30e9:
        needed = "features of 15 categories at 224 px need about 9 GB, at 480 px about 40 GB"
        missing.append(f"disk: {needed}; {free / 1e9:.0f} GB are free")
    return lines, missing


def weights_file(name: str, tag: str = "IMAGENET1K_V1") -> Path:
    """Where a model's weights are looked for and fetched to."""
    from torchvision import models

    return paths.weights_root() / Path(models.get_model_weights(name)[tag].url).name


def _data(root: Path) -> str:
    if not root.is_dir():
        return ""
    try:
        return f"{len(categories(root))} categories in {root}"
    except (ValueError, FileNotFoundError):
        return f"images in {root}" if any(root.rglob("*.jpg")) else ""


def fetch_weights(name: str, tag: str = "IMAGENET1K_V1") -> Path:
    """Downloads a backbone's weights where they are not there yet, checks that they fit, and says where they are."""
    backbone.Backbone(name, tag, (2, 3))
    return weights_file(name, tag)
