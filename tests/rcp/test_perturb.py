"""The perturbations of Appendix C.1: drawn per image from a seed, and masks that move with their images."""

import re

import numpy as np
import pytest
from PIL import Image

from rcp.data import Transform, load_dataset
from rcp.data.perturb import Perturbation, PerturbedTransform

NOTHING = {"rotation": 0.0, "translation": 0.0, "brightness": 0.0, "contrast": 0.0, "blur": 0.0}
SMALL = Transform(resize=64, image_size=56)


def only(**ranges) -> PerturbedTransform:
    return PerturbedTransform.of(SMALL, Perturbation(**NOTHING | ranges))


@pytest.fixture
def image(tmp_path):
    """A bright square a little off the centre, and its mask."""
    pixels = np.full((64, 64, 3), 40, np.uint8)
    pixels[20:30, 30:46] = 200
    folder = tmp_path / "cat" / "test" / "dent"
    truth = tmp_path / "cat" / "ground_truth" / "dent"
    folder.mkdir(parents=True)
    truth.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "000.png")
    Image.fromarray((pixels[..., 0] > 100).astype(np.uint8) * 255).save(truth / "000_mask.png")
    return folder / "000.png", truth / "000_mask.png"


def test_what_is_drawn_follows_the_image_s_name_below_its_data_set():
    one, other = (Perturbation().draw(f"/data/{name}/train/7.png") for name in ("a", "b"))
    assert one == other != Perturbation().draw("/data/a/train/8.png")
    assert Perturbation().draw("/data/a/test/good/7.png") != Perturbation().draw("/data/a/test/cut/7.png") != one


def test_each_kind_does_what_its_name_says(image):
    path, _ = image
    plain = SMALL.image(path).astype(float)
    drawn = Perturbation().draw(path)
    bright = only(brightness=0.5)
    assert bright.image(path).mean() / plain.mean() == pytest.approx(
        bright.perturbation.draw(path)["brightness"], abs=0.02
    )
    contrast = only(contrast=0.9)
    assert contrast.image(path).std() / plain.std() == pytest.approx(
        contrast.perturbation.draw(path)["contrast"], abs=0.05
    )
    edges = [np.abs(np.diff(image.astype(float), axis=1)).max() for image in (plain, only(blur=4.0).image(path))]
    assert edges[1] < 0.8 * edges[0]
    assert -10 <= drawn["rotation"] <= 10 and 0 <= drawn["blur"] <= 1
    for name, value in {"dx": 0.05, "dy": 0.05, "brightness": 1.2, "contrast": 1.2}.items():
        assert abs(drawn[name]) <= value


@pytest.mark.parametrize("ranges", [{"rotation": 30.0}, {"translation": 0.2}, {"rotation": 20.0, "translation": 0.1}])
def test_a_mask_moves_as_its_image_does(image, ranges):
    path, mask = image
    transform = only(**ranges)
    moved, truth = transform.image(path)[..., 0] > 120, transform.mask(mask, path)
    assert truth.any() and not np.array_equal(truth, SMALL.mask(mask, path)), "it moved"
    assert (moved ^ truth).sum() <= 0.25 * truth.sum(), "resampling moves the rim by half a pixel, no more"


def test_what_comes_into_view_is_the_edge_or_black(tmp_path):
    path = tmp_path / "white.png"
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(path)
    whole = Transform(resize=64, image_size=64)
    turned = {}
    for border in ("edge", "black"):
        turned[border] = PerturbedTransform.of(whole, Perturbation(**NOTHING | {"rotation": 40.0}, border=border))
    assert turned["edge"].image(path).min() >= 254 and turned["black"].image(path).min() == 0


def test_draws_follow_seed_and_name_and_nothing_else(demo_root, tmp_path):
    test = load_dataset(demo_root, category="gear").test
    first = Perturbation(seed=1)
    draws = [tuple(first.draw(path).values()) for path in test.paths]
    assert len(set(draws)) == len(draws), "each image has its own"
    assert [tuple(Perturbation(seed=1).draw(path).values()) for path in reversed(test.paths)] == draws[::-1]
    elsewhere = tmp_path / "/".join(test.paths[0].parts[-3:])
    assert tuple(first.draw(elsewhere).values()) == draws[0], "the place of the data set does not matter"
    assert tuple(Perturbation(seed=2).draw(test.paths[0]).values()) != draws[0]
    columns = np.array(draws)
    assert (columns.min(0) < [-5, -0.02, -0.02, 0.9, 0.9, 0.3]).all() and (
        columns.max(0) > [5, 0.02, 0.02, 1.1, 1.1, 0.7]
    ).all()


@pytest.mark.parametrize(("given", "message"), [
    ({"rotation": 200.0}, "rotation: expected at most 180, got 200.0"),
    ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ({"blur": -1.0}, "blur: expected 0 or more, got -1.0"),
    ({"brightness": "much"}, "brightness: expected float, got 'much'"),
    ({"border": "edges"}, "border: expected one of 'edge', 'black', got 'edges'. Did you mean 'edge'?"),
])  # fmt: skip
def test_bad_ranges_are_named(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Perturbation(**given)
