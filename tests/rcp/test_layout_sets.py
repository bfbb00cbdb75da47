"""Small sets in the exact layouts of BTAD and VisA: found, labelled and masked as the real ones are."""

import numpy as np
import pytest
from layout_sets import write_btad, write_visa
from PIL import Image

from rcp import PatchCore
from rcp.data import Transform, categories, load_dataset, load_images
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
def btad(tmp_path_factory, small_demo):
    return write_btad(small_demo, tmp_path_factory.mktemp("btad") / "BTech_Dataset_transformed")


@pytest.fixture(scope="module")
def visa(tmp_path_factory, small_demo):
    return write_visa(small_demo, tmp_path_factory.mktemp("visa"))


def test_btad_is_found_with_bmp_among_png_and_masks_of_other_extensions(btad):
    assert list(categories(btad)) == ["01", "02", "03"]
    endings = {}
    for name in ("01", "02", "03"):
        data = load_dataset(btad, category=name)
        assert (data.layout, len(data.train), len(data.test)) == ("btad", 6, 6) and data.test.labels.sum() == 4
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
    assert images.shape == (6, 128, 128, 3) and masks.any((1, 2)).tolist() == [bool(label) for label in test.labels]


def test_visa_is_found_by_its_table_and_its_class_numbers_are_masks(visa):
    for name in categories(visa):
        data = load_dataset(visa, category=name)
        assert (data.layout, len(data.train), len(data.test), data.test.labels.sum()) == ("visa", 6, 6, 4)
        values = {int(v) for mask in data.test.masks if mask for v in np.unique(np.asarray(Image.open(mask)))}
        assert values == {0, 1, 2, 3, 4}, "numbers of kinds, not 255"
        masks = data.test.load_masks(Transform(resize=256, image_size=224))
        assert masks.any((1, 2)).tolist() == [bool(label) for label in data.test.labels]
        assert {path.suffix for path in data.train.paths} == {".JPG"}


@pytest.mark.parametrize(("layout", "category"), [("btad", "03"), ("visa", "fabric")])
def test_a_detector_runs_on_them(layout, category, request):
    data = load_dataset(request.getfixturevalue(layout), category=category)
    report = evaluate(PatchCore(**SMALL).fit(data.train, log=len).predict(data.test), data.test)
    assert report["undefined"] == {} and report["pixel_auroc"] > 0.5 and 0 <= report["image_auroc"] <= 1
