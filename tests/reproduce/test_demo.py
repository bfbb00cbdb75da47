"""The demo set: layout, exact masks, the same bytes every time, and no half set whatever happens."""

import json
import multiprocessing
from functools import partial

import numpy as np
import pytest
from PIL import Image

from reproduce import demo
from reproduce.demo import draw_demo

KINDS = [(category, kind) for category, kinds in demo.DEFECTS.items() for kind in kinds]
TINY = {"train": 2, "good": 1, "per_defect": 1}
TINY_IMAGES = 2 * (2 + 1 + 4)


def _files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def sketch(monkeypatch):
    """Images of one flat grey, for the tests of files alone; a list of what was drawn."""
    drawn = []

    def image(category, split, kind, index):
        drawn.append((category, split, kind, index))
        grey = np.full((8, 8, 3), index, np.uint8)
        return grey, grey, grey[..., 0] == index

    monkeypatch.setattr(demo, "_image", image)
    return drawn


def test_layout_counts_and_formats(demo_root):
    expected = {demo.STAMP}
    for category, kinds in demo.DEFECTS.items():
        counts = {"train/good": 30, "test/good": 8} | {f"test/{kind}": 4 for kind in kinds}
        expected |= {f"{category}/{folder}/{i:03d}.png" for folder, count in counts.items() for i in range(count)}
        expected |= {f"{category}/ground_truth/{kind}/{i:03d}_mask.png" for kind in kinds for i in range(4)}
    assert {p.relative_to(demo_root).as_posix() for p in demo_root.rglob("*") if p.is_file()} == expected
    for path in demo_root.rglob("*.png"):
        pixels = np.asarray(Image.open(path))
        if "ground_truth" not in path.parts:
            assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
            continue
        assert pixels.shape == (256, 256) and set(np.unique(pixels)) == {0, 255}, path
        spots = np.argwhere(pixels)
        assert spots.min() >= 16 and spots.max() < 240 and 20 <= len(spots) <= 0.1 * pixels.size, path


@pytest.mark.parametrize(("category", "kind"), KINDS)
def test_mask_is_exactly_what_the_defect_changed(category, kind):
    for index in (0, 3):  # the subtlest and the plainest
        image, clean, mask = demo._image(category, "test", kind, index)
        changed = (image != clean).any(2)
        assert not (changed & ~mask).any() and changed[mask].mean() > 0.9


@pytest.mark.parametrize("category", demo.DEFECTS)
def test_good_images_vary_a_little_and_have_no_mask(category):
    (first, clean, mask), (second, *_) = (demo._image(category, "test", "good", i) for i in range(2))
    assert (first == clean).all() and not mask.any() and 0.5 < np.abs(first.astype(float) - second).mean() < 40


def test_same_bytes_whatever_the_order_and_size_of_the_set(demo_root, tmp_path):
    small = _files(draw_demo(tmp_path / "small", **TINY))
    stamp = json.loads(small.pop(demo.STAMP))
    assert stamp == {"version": demo.VERSION, **TINY, "files": {name: len(small[name]) for name in stamp["files"]}}
    assert len(small) == len(stamp["files"]) == TINY_IMAGES + 2 * 4
    assert all((demo_root / name).read_bytes() == content for name, content in small.items())


def test_drawn_once_and_again_where_incomplete_or_different(tmp_path, sketch, monkeypatch):
    root = draw_demo(tmp_path / "demo", **TINY)
    whole, times = _files(root), {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert draw_demo(str(root), **TINY) == root and len(sketch) == TINY_IMAGES
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == times
    (root / "gear/train/good/001.png").unlink()
    assert _files(draw_demo(root, **TINY)) == whole
    (root / "fabric/ground_truth/hole/000_mask.png").write_bytes(b"cut")
    assert _files(draw_demo(root, **TINY)) == whole
    draw_demo(root, **TINY | {"train": 1})
    assert len(list((root / "gear/train/good").iterdir())) == 1
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    drawn = len(sketch)
    draw_demo(root, **TINY)
    assert len(sketch) == drawn + TINY_IMAGES
    assert sorted(p.name for p in tmp_path.iterdir()) == [".demo.lock", "demo"]  # nothing else is left beside it


def test_a_failure_leaves_what_was_there(tmp_path, sketch, monkeypatch):
    before = _files(draw_demo(tmp_path / "demo", **TINY))
    monkeypatch.setattr(demo, "_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_demo(tmp_path / "demo")
    assert _files(tmp_path / "demo") == before and len(list(tmp_path.iterdir())) == 2


def test_several_processes_at_once(tmp_path):
    root = tmp_path / "demo"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert set(pool.map(partial(draw_demo, train=1, good=1, per_defect=1), [root] * 3)) == {root}
    assert len(_files(root)) == 2 * (1 + 1 + 4 + 4) + 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["notes.txt", "gear/train/good/000.png"])
def test_foreign_files_are_refused(tmp_path, sketch, name):
    mine = tmp_path / "set" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, not of the demo set"):
        draw_demo(tmp_path / "set", **TINY)
    assert mine.read_text() == "mine" and not sketch


def test_a_users_file_in_a_drawn_set_stays(tmp_path, sketch):
    mine = draw_demo(tmp_path / "set", **TINY) / "gear/notes.txt"
    mine.write_text("mine")
    draw_demo(tmp_path / "set", **TINY)
    with pytest.raises(ValueError, match=r"holds gear/notes.txt, not of the demo set"):
        draw_demo(tmp_path / "set", **TINY | {"good": 2})
    assert mine.read_text() == "mine"


def test_bad_arguments_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        draw_demo(tmp_path / "file", **TINY)
    with pytest.raises(ValueError, match=r"at least 1, found .*'per_defect': 0"):
        draw_demo(tmp_path / "demo", per_defect=0)
