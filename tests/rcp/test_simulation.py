"""Simulated anomalies: masks that say exactly what was changed, both kinds, seeds, and no image but the given ones."""

import re

import literal
import numpy as np
import pytest
from PIL import Image

from rcp.refinement.simulation import (
    Simulation,
    draw_textures,
    foreground,
    load_textures,
    perlin,
    simulate,
    without_object,
)

TEXTURES = draw_textures(4, 64, seed=1)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["texture", "structure", "mixture"])
def test_a_mask_is_true_exactly_where_a_pixel_was_changed(images, kind):
    before = images.copy()
    out, masks = simulate(images, Simulation(kind=kind, foreground=False), TEXTURES)
    assert np.array_equal(images, before), "the input is not touched"
    assert np.array_equal((out != images).any(-1), masks)
    assert masks.any((1, 2)).mean() > 0.9 and 0.01 < masks.mean() < 0.5


def test_texture_blends_a_texture_in_and_structure_the_images_own_cells(images):
    whole = {"foreground": False, "opacity": (1.0, 1.0), "threshold": -0.9, "finest": 1}
    out, masks = simulate(images, Simulation(kind="texture", **whole), TEXTURES)
    colours = {tuple(c) for t in TEXTURES for c in t.reshape(-1, 3)}
    assert all(tuple(c) in colours for c in out[masks])
    out, masks = simulate(images, Simulation(kind="structure", grid=4, **whole))
    for image, own, mask in zip(out, images, masks, strict=True):
        cells = {own[y : y + 16, x : x + 16].tobytes() for y in range(0, 64, 16) for x in range(0, 64, 16)}
        inside = [
            (y, x) for y in range(0, 64, 16) for x in range(0, 64, 16) if mask[y : y + 16, x : x + 16].mean() == 1
        ]
        assert all(image[y : y + 16, x : x + 16].tobytes() in cells for y, x in inside)


def test_draws_follow_seed_epoch_and_number_alone(images):
    how = Simulation(foreground=False, seed=3)
    out, masks = simulate(images, how, TEXTURES)
    again, _ = simulate(images, how, TEXTURES)
    assert np.array_equal(out, again)
    part, part_masks = simulate(images[5:9], how, TEXTURES, numbers=range(5, 9))
    assert np.array_equal(part, out[5:9]) and np.array_equal(part_masks, masks[5:9]), "in any batch the same"
    for other in (
        simulate(images, how, TEXTURES, epoch=1),
        simulate(images, Simulation(foreground=False, seed=4), TEXTURES),
    ):
        assert not np.array_equal(other[1], masks)
    half = (
        simulate(np.repeat(images, 20, 0), Simulation(foreground=False, anomalous=0.5), TEXTURES)[1].any((1, 2)).mean()
    )
    assert half == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(("side", "rows", "columns"), [(32, 1, 4), (30, 8, 2), (17, 4, 4), (16, 16, 16)])
def test_perlin_noise_is_the_literal_one(side, rows, columns):
    angles = np.random.default_rng(5).uniform(0, 2 * np.pi, (rows + 1, columns + 1))
    found = perlin(side, rows, columns, np.random.default_rng(5))
    np.testing.assert_allclose(found, literal.perlin(side, angles), atol=1e-5)


def test_foreground_is_the_object_before_a_plain_background():
    image = np.full((128, 128, 3), 230, np.uint8)
    image[30:90, 40:100] = (120, 60, 30)
    image[50:60, 60:70] = 230  # a hole shows the background and still belongs to the object's outline
    found = foreground(image)
    assert found[34:86, 44:96].all() and not found[:24].any() and not found[:, 104:].any()
    masks = simulate(np.stack([image] * 20), Simulation(kind="structure"))[1]
    assert masks.any() and not masks[:, :24].any()
    rough = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert foreground(rough).all(), "no plain background: the whole image"
    bare = np.full((128, 128, 3), 90, np.uint8)
    assert not foreground(bare).any(), "nothing stands out"
    assert without_object(np.stack([image, rough, bare, bare]), Simulation()).tolist() == [False, False, True, True]
    assert not without_object(bare[None], Simulation(foreground=False)).any(), "it is not asked"
    grainy = (bare + np.random.default_rng(0).integers(0, 5, bare.shape)).astype(np.uint8)
    masks = simulate(np.stack([grainy] * 20), Simulation(kind="structure"))[1]
    assert masks.any((1, 2)).mean() > 0.9, "a mask lies anywhere then"
    borders = masks[:, :8].any() and masks[:, -8:].any() and masks[:, :, :8].any() and masks[:, :, -8:].any()
    assert borders


def test_textures_are_read_from_a_folder_or_drawn(tmp_path, shared_data):
    found = load_textures(shared_data / "dtd" / "images", 64, 10)
    assert found.shape == (10, 64, 64, 3) and len({t.tobytes() for t in found}) == 10
    assert np.array_equal(found, load_textures(shared_data / "dtd" / "images", 64, 10))
    with pytest.raises(FileNotFoundError, match=re.escape("python -m reproduce download dtd")):
        load_textures(tmp_path / "absent", 64)
    with pytest.raises(ValueError, match="no images in"):
        load_textures(tmp_path, 64)
    Image.new("RGB", (90, 70)).save(tmp_path / "a.png")
    assert load_textures(tmp_path, 64).shape == (1, 64, 64, 3)
    drawn = draw_textures(5, 64)
    assert drawn.shape == (5, 64, 64, 3) and len({t.tobytes() for t in drawn}) == 5 and drawn.std() > 20


@pytest.mark.parametrize(("make", "message"), [
    (
        lambda p: simulate(p, Simulation(kind="texture")),
        "textures: expected images of textures (DTD) for kind='texture', got None",
    ),
    (
        lambda p: simulate(p, Simulation(), TEXTURES[:, :32]),
        "textures: expected images of the shape (64, 64, 3) of uint8, got ((32, 64, 3)",
    ),
    (
        lambda p: simulate(p[:, :6, :6], Simulation(kind="structure")),
        "images: expected at least 8 px a side for as many cells, got 6",
    ),
    (
        lambda _: Simulation(kind="textures"),
        "kind: expected one of 'texture', 'structure', 'mixture', got 'textures'",
    ),
    (
        lambda _: Simulation(opacity=(0.5, 0.2)),
        "opacity: expected (least, most), above 0 and up to 1, got (0.5, 0.2)",
    ),
    (lambda _: Simulation(finest=20), "finest: expected a power of two, got 20"),
])  # fmt: skip
def test_bad_input_is_named(images, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(images)
