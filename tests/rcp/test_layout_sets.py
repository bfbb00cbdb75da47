"""Small drawn sets in the exact layouts of BTAD and VisA: found, labelled and masked as the real ones are."""

import csv

import numpy as np
import pytest
from PIL import Image

from rcp import PatchCore
from rcp.data import Transform, categories, draw_demo_btad, draw_demo_visa, load_dataset, load_images
from rcp.metrics import evaluate

SMALL = {
    "backbone": "resnet18",
    "weights": "random:0",
    "resize": 64,
    "image_size": 64,
    "dim": 64,
    "coreset_ratio": 0.05,
}


@pytest.fixture(scope="module")
def btad(tmp_path_factory):
    return draw_demo_btad(tmp_path_factory.mktemp("btad") / "BTech_Dataset_transformed")


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    return draw_demo_visa(tmp_path_factory.mktemp("visa"))


def test_btad_is_found_with_bmp_among_png_and_masks_of_other_extensions(btad):
    assert list(categories(btad)) == ["01", "02", "03"]
    endings = {}
    for name in ("01", "02", "03"):
        data = load_dataset(btad, category=name)
        assert (data.layout, len(data.train), len(data.test)) == ("btad", 12, 8) and data.test.labels.sum() == 4
        assert data.test.has_masks and set(data.test.defects) == {"good", "ko"}
        images = [*data.train.paths, *data.test.paths]
        endings[name] = {p.suffix for p in images}, {m.suffix for m in data.test.masks if m}
        assert all(m.stem == p.stem for p, m in zip(data.test.paths, data.test.masks, strict=True) if m)
    assert endings == {"01": ({".bmp"}, {".png"}), "02": ({".png", ".bmp"}, {".png"}), "03": ({".bmp"}, {".bmp"})}


@pytest.mark.parametrize("aspect", ["keep", "squash"])
def test_the_non_square_category_is_read_whole_or_cropped(btad, aspect):
    test = load_dataset(btad, category="03").test
    assert {Image.open(path).size for path in test.paths} == {(800, 600)}
    transform = Transform(resize=144, image_size=128, aspect=aspect)
    images, masks = load_images(test.paths, transform), test.load_masks(transform)
    assert images.shape == (8, 128, 128, 3) and masks.any((1, 2)).tolist() == [bool(label) for label in test.labels]


def test_visa_is_found_by_its_table_and_its_class_numbers_are_masks(visa):
    with open(visa / "split_csv" / "1cls.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"object", "split", "label", "image", "mask"} and len(rows) == 2 * 20
    for name in categories(visa):
        data = load_dataset(visa, category=name)
        assert (data.layout, len(data.train), len(data.test), data.test.labels.sum()) == ("visa", 12, 8, 4)
        values = {int(v) for mask in data.test.masks if mask for v in np.unique(np.asarray(Image.open(mask)))}
        assert values == {0, 1, 2, 3, 4}, "numbers of kinds, not 255"
        masks = data.test.load_masks(Transform(resize=256, image_size=224))
        assert masks.any((1, 2)).tolist() == [bool(label) for label in data.test.labels]
        assert {path.suffix for path in data.train.paths} == {".JPG"}


@pytest.mark.parametrize(("layout", "category"), [("btad", "03"), ("visa", "gear")])
def test_a_detector_runs_on_them(layout, category, request):
    data = load_dataset(request.getfixturevalue(layout), category=category)
    out = PatchCore(**SMALL).fit(data.train, log=len).predict(data.test)
    report = evaluate(out, data.test)
    assert report["undefined"] == {} and report["pixel_auroc"] > 0.5 and 0 <= report["image_auroc"] <= 1


@pytest.mark.parametrize("draw", [draw_demo_btad, draw_demo_visa])
def test_they_are_drawn_once_and_again_where_incomplete(draw, tmp_path):
    root, counts = tmp_path / "set", {"train": 1, "good": 1}
    draw(root, **counts)
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}
    draw(root, **counts)
    assert all(path.stat().st_mtime_ns == time for path, (time, _) in files.items())
    gone = sorted(path for path in files if path.suffix != ".json")[0]
    gone.unlink()
    draw(root, **counts)
    assert all(path.read_bytes() == content for path, (_, content) in files.items()), "the same bytes"
    (root / "mine.txt").write_text("keep me")
    gone.unlink()
    with pytest.raises(ValueError, match=r"holds mine.txt, not of the demo set"):
        draw(root, **counts)
    with pytest.raises(ValueError, match="train is a number of images, expected at least 1, found 0"):
        draw(tmp_path / "other", train=0)
