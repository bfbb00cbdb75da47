"""Fixtures: the real material beside the project where it is there, and the demo set, drawn once."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

# A time limit per example fails on a busy machine and says nothing of the code.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

SHARED = Path(os.environ.get("RCP_SHARED", Path(__file__).resolve().parents[2] / "shared"))

CAMPAIGN = int(os.environ.get("RCP_CAMPAIGN", "0"))  # `make campaign` tries more
WEIGHTS = SHARED / "weights" / "resnet18_imagenet1k_v1_layers1-3.safetensors"
BOTTLE = SHARED / "data" / "mvtec" / "bottle"
REAL = bool(CAMPAIGN) and WEIGHTS.exists() and BOTTLE.exists()


def _there(path: Path) -> Path:
    if not path.exists():
        pytest.skip(
            f"real material not at hand: {path.name} (set RCP_SHARED to the folder that holds data/ and weights/)"
        )
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with mvtec/{bottle,transistor} and dtd/images."""
    return _there(SHARED / "data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """ResNet-18 IMAGENET1K_V1 up to layer 3, safetensors."""
    return _there(WEIGHTS)


def pytest_collection_modifyitems(items):
    """Files with a slow test go first, notebooks follow where they are named first: the end waits for nobody."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def drawn_in(tmp_path_factory) -> Path:
    """A folder that pytest-xdist's workers share: what one has drawn the others use."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def demo_root(drawn_in) -> Path:
    """The demo set in MVTec layout."""
    from reproduce.demo import draw_demo

    return draw_demo(drawn_in / "demo")


@pytest.fixture(scope="session")
def attacked(small_demo, tmp_path_factory) -> tuple[Path, str, str]:
    """(root, category, weights of ResNet-18): in `make campaign` a few real images, small, where they are there; else drawn ones."""
    if not REAL:
        return small_demo, "gear", "random:0"
    root = tmp_path_factory.mktemp("real")
    for folder, n in {"train/good": 12, "test/good": 4, "test/broken_small": 6, "test/contamination": 6}.items():
        for image in sorted((BOTTLE / folder).iterdir())[:n]:
            mask = BOTTLE / folder.replace("test", "ground_truth") / f"{image.stem}_mask.png"
            for file in (image, mask) if mask.exists() else (image,):
                copy = root / "bottle" / file.relative_to(BOTTLE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                Image.open(file).resize((256, 256), Image.Resampling.NEAREST).save(copy)
    return root, "bottle", str(WEIGHTS)


@pytest.fixture(scope="session")
def small_demo(drawn_in) -> Path:
    """The same with 6 training images and 6 test images a category."""
    from reproduce.demo import draw_demo

    return draw_demo(drawn_in / "small", train=6, good=2, per_defect=1)
