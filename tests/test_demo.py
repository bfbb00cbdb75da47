"""The demo set: counts, layout, exact masks, the same bytes every time, and no half set whatever happens."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from rcp.data import demo, draw_demo

KINDS = [(category, kind) for category, kinds in demo.DEFECTS.items() for kind in kinds]
TINY = {"train": 2, "good": 1, "per_defect": 1}


def _files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def sketch(monkeypatch):
    """Pictures of one flat grey, for the tests of files alone; a list of what was drawn."""
    drawn = []

    def picture(category, split, kind, index):
        drawn.append((category, split, kind, index))
        grey = np.full((8, 8, 3), index, np.uint8)
        return grey, grey, grey[..., 0] == index

    monkeypatch.setattr(demo, "_picture", picture)
    return drawn


def test_counts_and_layout(demo_root):
    assert sorted(p.name for p in demo_root.iterdir()) == sorted([*demo.DEFECTS, demo.STAMP])
    for category, kinds in demo.DEFECTS.items():
        home = demo_root / category
        assert len(kinds) == 4 and [p.name for p in sorted((home / "train").iterdir())] == ["good"]
        assert {p.name for p in (home / "test").iterdir()} == {"good", *kinds}
        assert {p.name for p in (home / "ground_truth").iterdir()} == set(kinds)
        assert len(list((home / "train/good").iterdir())) >= 24 and len(list((home / "test").glob("*/*.png"))) >= 20
        for kind in kinds:
            pictures = [p.stem for p in sorted((home / "test" / kind).iterdir())]
            assert pictures and [f"{p}_mask" for p in pictures] == [
                p.stem for p in sorted((home / "ground_truth" / kind).iterdir())
            ]


def test_formats_size_and_defects_inside_the_crop(demo_root):
    for path in demo_root.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (256, 256)
            if "ground_truth" not in path.parts:
                assert image.mode == "RGB"
                continue
            mask = np.asarray(image)
        assert mask.dtype == np.uint8 and mask.ndim == 2 and set(np.unique(mask)) == {0, 255}, path
        rows, cols = np.nonzero(mask)
        assert min(rows.min(), cols.min()) >= 16 and max(rows.max(), cols.max()) < 240, path
        assert 20 <= mask.astype(bool).sum() <= 0.1 * mask.size, path
    assert sum(p.stat().st_size for p in demo_root.rglob("*.png")) < 25e6


@pytest.mark.parametrize(("category", "kind"), KINDS)
def test_mask_is_exactly_what_the_defect_changed(category, kind):
    for index in (0, 3):  # the subtlest and the plainest
        picture, clean, mask = demo._picture(category, "test", kind, index)
        changed = (picture != clean).any(2)
        assert not (changed & ~mask).any()
        assert changed[mask].mean() > 0.9
        assert not (picture == picture[0, 0]).all()


def test_good_pictures_vary_a_little_and_have_no_mask():
    for category in demo.DEFECTS:
        first, clean, mask = demo._picture(category, "test", "good", 0)
        second = demo._picture(category, "test", "good", 1)[0]
        assert (first == clean).all() and not mask.any()
        assert 0.5 < np.abs(first.astype(float) - second).mean() < 40


def test_same_bytes_whatever_the_order_and_size_of_the_set(demo_root, tmp_path):
    small = _files(draw_demo(tmp_path / "small", **TINY))
    stamp = json.loads(small.pop(demo.STAMP))
    assert stamp["version"] == demo.VERSION and set(stamp["files"]) == set(small)
    assert len(small) == 3 * (2 + 1 + 4 + 4)
    assert all((demo_root / name).read_bytes() == content for name, content in small.items())


def test_second_call_draws_nothing(tmp_path, sketch):
    root = draw_demo(tmp_path / "demo", **TINY)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    count = len(sketch)
    assert count == 3 * (2 + 1 + 4)
    assert draw_demo(str(root), **TINY) == root
    assert len(sketch) == count and before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def _lose_stamp(root):
    (root / demo.STAMP).unlink()


def _lose_picture(root):
    (root / "gear/train/good/001.png").unlink()


def _cut_mask(root):
    mask = root / "fabric/ground_truth/hole/000_mask.png"
    mask.write_bytes(mask.read_bytes()[:-9])


def _garble_stamp(root):
    (root / demo.STAMP).write_text('{"version"')


@pytest.mark.parametrize("damage", [_lose_stamp, _lose_picture, _cut_mask, _garble_stamp])
def test_incomplete_set_is_drawn_again(tmp_path, sketch, damage):
    root = draw_demo(tmp_path / "demo", **TINY)
    whole = _files(root)
    damage(root)
    assert _files(draw_demo(root, **TINY)) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]  # nothing left beside it


def test_other_version_or_counts_are_drawn_again(tmp_path, sketch, monkeypatch):
    root = draw_demo(tmp_path / "demo", **TINY)
    draw_demo(root, **{**TINY, "train": 1})
    assert len(list((root / "gear/train/good").iterdir())) == 1
    count = len(sketch)
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    draw_demo(root, **{**TINY, "train": 1})
    assert len(sketch) == 2 * count - 3 * (2 + 1 + 4)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(demo, "_picture", broken)
    with pytest.raises(OSError, match="no space"):
        draw_demo(tmp_path / "demo", **TINY)
    assert not list(tmp_path.iterdir())


def test_several_at_once(tmp_path, sketch):
    root = tmp_path / "demo"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: draw_demo(root, **TINY), range(4))) == {root}
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    assert len(_files(root)) == 3 * (2 + 1 + 4 + 4) + 1


@pytest.mark.parametrize("name", ["notes.txt", "gear/notes.txt", "gear/train/good/mine.png"])
def test_other_files_are_never_deleted(tmp_path, sketch, name):
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=name):
        draw_demo(tmp_path, **TINY)
    assert mine.read_text() == "mine" and not sketch


def test_bad_arguments_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        draw_demo(tmp_path / "file", **TINY)
    with pytest.raises(ValueError, match=r"per_defect.*at least 1.*0"):
        draw_demo(tmp_path / "demo", per_defect=0)
