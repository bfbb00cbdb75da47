"""Fixtures: the real material beside the project where it is there, and the demo set, drawn once."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A time limit per example fails on a busy machine and says nothing of the code.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

SHARED = Path(os.environ.get("RCP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


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
    return _there(SHARED / "weights" / "resnet18_imagenet1k_v1_layers1-3.safetensors")


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
def small_demo(drawn_in) -> Path:
    """The same with 6 training images and 6 test images a category."""
    from reproduce.demo import draw_demo

    return draw_demo(drawn_in / "small", train=6, good=2, per_defect=1)
