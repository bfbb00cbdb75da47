"""``fit`` and ``predict`` take whatever holds images; what is no image is named; decisions and places come back on the original."""

import dataclasses
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageSequence

from rcp import PatchCore
from rcp.data import load_dataset
from rcp.data.images import Original, Transform
from rcp.data.sources import images_of
from rcp.metrics import evaluate
from rcp.prediction import Prediction

SMALL = {"backbone": "resnet18", "weights": "random:0", "resize": 64, "image_size": 64, "dim": 64, "coreset_ratio": 0.1}


@pytest.fixture(scope="module")
def data(demo_root):
    return load_dataset(demo_root, category="gear")


@pytest.fixture(scope="module")
def detector(data):
    return PatchCore(**SMALL).fit(data.train, log=len)


@pytest.fixture
def folder(tmp_path, data):
    for i, path in enumerate(data.test[:3]):
        shutil.copy(path, tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_labels_are_of_the_same_files_also_by_a_link(detector, data, tmp_path):
    (tmp_path / "link").symlink_to(data.test[0].parents[2])
    linked = [tmp_path / "link" / path.relative_to(data.test[0].parents[2]) for path in data.test]
    assert (
        evaluate(detector.predict(linked), data.test)["image_auroc"]
        == evaluate(detector.predict(data.test), data.test)["image_auroc"]
    )


def test_a_folder_in_a_list_is_called_a_folder(detector, folder):
    with pytest.raises(ValueError, match="it is a folder, to be given alone"):
        detector.predict([folder])


def test_the_same_images_in_any_form_have_the_same_scores(detector, folder):
    paths = sorted(folder.glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths])
    expected = detector.predict(paths).scores
    (folder / "[1]").symlink_to(folder)
    patterns = (f"{folder}/*.png", f"{folder}/[[]1]/*.png", f"{folder}/[1]/?.png")
    opened = [Image.open(p) for p in paths]
    for form in (str(folder), folder, *patterns, pixels, list(pixels), opened, (p for p in paths)):
        np.testing.assert_array_equal(detector.predict(form).scores, expected)
    for one in (paths[1], str(paths[1]), pixels[1], Image.open(paths[1])):
        out = detector.predict(one)
        np.testing.assert_allclose(out.scores, expected[1:2], rtol=1e-4)  # the CNN's last bits depend on its batch
        assert out.paths in ((paths[1],), (str(paths[1]),), ("image 0",))
    streamed = list(detector.predict_iter((p for p in paths), batch=2))
    assert [len(one) for one in streamed] == [1, 1, 1]
    np.testing.assert_allclose([one.scores[0] for one in streamed], expected, rtol=1e-4)
    np.testing.assert_allclose(streamed[2].maps[0], detector.predict(paths).maps[2], rtol=1e-4)
    assert streamed[2].table().path[0] == str(paths[2])


def test_what_a_pattern_fits_and_is_not_read_is_named(folder, recwarn):
    (folder / "b.jfif").touch()
    (folder / "notes.txt").touch()
    assert len(list(images_of(f"{folder}/*.png"))) == 3 and not len(recwarn)
    with pytest.warns(UserWarning, match=r"files left out of .*: 1 of \./\*\.jfif$"):
        assert len(list(images_of(f"{folder}/*"))) == 3
    assert len(list(images_of(f"{folder}/**/**/*.png"))) == 3, "each once"


def test_fit_takes_a_folder_or_a_generator_and_keeps_no_more_than_the_files(data, detector):
    for form in (str(data.folder), (np.asarray(Image.open(p).convert("RGB")) for p in data.train)):
        same = PatchCore(**SMALL).fit(form, log=len)
        assert (same.bank_.entries == detector.bank_.entries).all() and same.threshold_ == detector.threshold_


def test_a_generator_may_use_the_memory_of_its_pixels_again(detector, folder):
    apart = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.glob("*.png"))]

    def camera():
        held = np.empty_like(apart[0])
        for image in apart:
            held[:] = image
            yield held

    pages, expected = folder / "pages.tif", detector.predict(apart).scores
    Image.fromarray(apart[0]).save(pages, save_all=True, append_images=[Image.fromarray(a) for a in apart[1:]])
    for given in (camera(), ImageSequence.Iterator(Image.open(pages))):
        np.testing.assert_array_equal(detector.predict(given).scores, expected)
    opened = Image.open(folder / "0.png")
    assert (detector.predict([opened] * 8).scores == detector.predict([apart[0]] * 8).scores).all(), (
        "read by one thread"
    )


def test_a_generator_is_read_as_it_is_scored(detector, data):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield data.test[0]

    scores = [one.scores[0] for one, _ in zip(detector.predict_iter(endless(), batch=2), range(5), strict=False)]
    assert len(set(scores)) == 1 and len(asked) <= 8


@pytest.mark.parametrize(("given", "words"), [
    (lambda f: f / "absent", "no such image or folder: .*absent"),
    (lambda f: f / "*.tif", "images: expected a pattern that fits some image"),
    (lambda f: f / "empty", r"no image in .*empty .*; it holds nothing"),
    (lambda f: f / "above", r"it holds 1 of \.png; for its sub-folders: .*above/\*\*/\*"),
    (lambda f: 3, "images: expected a path, a folder"),
    (lambda f: {"a": 1}, "images: expected a path, a folder"),
    (lambda f: np.zeros((4, 4), np.uint8), r"images: expected an array \(H, W, 3\)"),
    (
        lambda f: [np.zeros((4, 4, 3))],
        r"unreadable image image 0: .*uint8, RGB, none masked, got .*float64 \(4, 4, 3\)",
    ),
    (lambda f: [3], "unreadable image image 0: expected a path, .*got int"),
    (lambda f: f / "notes.txt", "unreadable image .*notes.txt"),
])  # fmt: skip
def test_what_is_no_image_is_named(detector, folder, given, words):
    (folder / "empty").mkdir()
    (folder / "above" / "below").mkdir(parents=True)
    (folder / "0.png").rename(folder / "above" / "below" / "0.png")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        detector.predict(given(folder))


def test_unreadable_images_can_be_skipped_and_are_listed(detector, folder, data):
    (folder / "1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"1\.png"):
        detector.predict(folder)
    out = detector.predict(folder, skip_unreadable=True)
    assert len(out) == 2 and out.skipped[0][0] == folder / "1.png" and "1 unreadable" in repr(out)
    said = []
    fitted = PatchCore(**SMALL).fit([*data.train[:4], folder / "1.png"], said.append, skip_unreadable=True)
    assert len(fitted.train_scores_) == 4 and fitted.skipped_[0][0] == folder / "1.png" and "left out" in said[0]
    with pytest.raises(ValueError, match=r"at least one image without defects \(1 are unreadable"):
        PatchCore(**SMALL).fit([folder / "1.png"], skip_unreadable=True)


def test_the_decision_follows_the_rate_and_is_saved(detector, data, tmp_path):
    out = detector.predict(data.test)
    assert detector.threshold_ > detector.train_scores_.max() and (out.defective == (out.scores >= out.threshold)).all()
    detector.save(tmp_path / "a.rcp")
    loaded = PatchCore.load(tmp_path / "a.rcp")
    assert loaded.threshold_ == detector.threshold_
    loaded.false_alarm_rate = np.float32(0.75)
    assert loaded.threshold_ < detector.threshold_
    assert (loaded.predict(data.test).defective == (out.scores >= loaded.threshold_)).all()
    loaded.save(tmp_path / "b.rcp")
    assert PatchCore.load(tmp_path / "b.rcp").false_alarm_rate == 0.75
    with pytest.raises(ValueError, match="false_alarm_rate: expected at least"):
        loaded.false_alarm_rate = 0.001
    assert loaded.false_alarm_rate == 0.75
    with pytest.raises(ValueError, match="above 0 and below 1"):
        PatchCore(**SMALL, false_alarm_rate=2)


@pytest.mark.parametrize(
    ("n", "folds", "why"), [(1, 2, "no held-out scores"), (4, 2, "normal images that differ"), (3, 0, "no held-out")]
)
def test_where_there_is_no_threshold_the_reason_is_given(data, n, folds, why):
    said = []
    same = PatchCore(**SMALL, calibration_folds=folds).fit([data.train[0]] * n, said.append)
    out = same.predict(data.test[:2])
    assert same.threshold_ is None and why in said[-1] and why in repr(out) and out.table().defective.isna().all()
    with pytest.raises(ValueError, match=why):
        _ = out.defective


def test_scores_in_another_order_than_the_labels_are_refused(detector, data):
    turned = detector.predict(list(data.test)[::-1])
    opened = detector.predict([Image.open(path) for path in list(data.test)[::-1]]).paths
    for paths in (turned.paths, tuple(map(str, turned.paths)), opened):
        with pytest.raises(ValueError, match="expected the split's images in its order; image 0 is"):
            evaluate(dataclasses.replace(turned, paths=paths), data.test)
    assert evaluate(detector.predict(data.test), data.test)["n_defective"] > 0


def bright(width, height, box, transform: Transform, orientation: int, folder, kind: str) -> Prediction:
    """A prediction whose patches are the brightness of a file's pixels: a detector that finds a white rectangle on black."""
    stored = np.zeros((height, width, 3), np.uint8)
    stored[box[1] : box[3], box[0] : box[2]] = 255
    exif = Image.Exif()
    exif[274] = orientation
    path = folder / f"{orientation}.{kind}"
    Image.fromarray(stored).save(path, exif=exif)
    seen, original = transform.read(path)
    scores = np.asarray(Image.fromarray(seen[..., 0]).resize((28, 28), Image.Resampling.BOX), np.float32)[None]
    return Prediction(
        scores.max((1, 2)), seen[None, ..., 0].astype(np.float32), transform, None, scores, (path,), (original,), threshold=100.0
    )  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("how", "kind"), [
    ((256, 224, "keep"), "png"), ((224, 224, "squash"), "jpg"), ((224, 224, "keep"), "tif"),
])  # fmt: skip
def test_places_come_back_through_crop_resize_and_exif(tmp_path, orientation, how, kind):
    box = (290, 150, 350, 190)  # of 640 x 400, within the crop
    out = bright(640, 400, box, Transform(*how), orientation, tmp_path, kind)
    (found,) = out.boxes(0)
    assert np.abs(np.subtract(found[:4], box)).max() <= 25, "a patch's width"
    mapped = out.maps_on_original(0)
    assert mapped.shape == (400, 640)
    rows, columns = np.nonzero(np.nan_to_num(mapped) > 127)
    assert np.abs(np.subtract([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], box)).max() <= 3
    assert np.isnan(mapped).any() == (how[2] == "keep")
    upright = out.maps_on_original(0, upright=True)
    assert upright.shape == ((400, 640) if orientation < 5 else (640, 400))
    assert out.overlay(0).size == ((640, 400) if orientation < 5 else (400, 640))
    small = np.asarray(dataclasses.replace(out, threshold=0.0, why="").overlay(0, 64))
    assert (small == (255, 217, 47)).all(2).sum() > 60, "a frame is drawn after the image is made small"


def test_a_name_that_holds_the_end_of_a_line_is_one_row_and_none_is_computed(detector, data, tmp_path, monkeypatch):
    for name in ("a\rb.png", "c\nd.png", 'e",f.png'):
        shutil.copy(data.test[0], tmp_path / name)
    for _ in range(2):
        out = detector.predict(tmp_path)
        written = out.save(tmp_path / "results")
        assert [*pd.read_csv(written / "predictions.csv")["path"]] == [str(path) for path in out.paths]
        assert len(list(written.glob("*.jpg"))) == 3, "those of an earlier run are gone"
    monkeypatch.chdir(tmp_path)
    shutil.copy(data.test[0], "=1+1.png")
    assert detector.predict("=1+1.png").table().path[0] == "./=1+1.png"


def test_a_bank_of_one_patch_is_held_against_banks_of_one(data):
    normal = np.random.default_rng(0).integers(108, 149, (13, 64, 64, 3)).astype(np.uint8)
    small = PatchCore(**SMALL | {"coreset_ratio": 0.01}).fit(normal[:3], log=len)
    assert len(small.bank_.entries) == 1 and not small.predict(normal[:3]).defective.any()


def test_what_the_crop_does_not_see_is_said_once_with_its_share(data, tmp_path):
    for i, path in enumerate(data.train[:3]):
        Image.open(path).convert("RGB").resize((300, 100)).save(tmp_path / f"{i}.jpg")
    said = []
    PatchCore(**SMALL).fit(tmp_path, said.append)
    (line,) = [line for line in said if "crop" in line]
    assert "33% of the area of images of 300 x 100 px" in line
    PatchCore(**SMALL | {"aspect": "squash"}).fit(tmp_path, said.append)
    assert len([line for line in said if "crop" in line]) == 1


def test_fit_counts_the_defects_outside_the_crop_where_there_are_masks(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train/good/0", "train/good/1", "test/hole/0", "test/hole/1", "test/hole/2", "test/good/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(90, 160, (64, 128, 3), np.uint8)).save(tmp_path / f"{name}.png")
    for i, left in enumerate((4, 60, 110)):  # the crop sees columns 32 to 96
        mask = np.zeros((64, 128), np.uint8)
        mask[20:30, left : left + 8] = 255
        (tmp_path / "ground_truth/hole").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"ground_truth/hole/{i}_mask.png")
    for given in (tmp_path, load_dataset(tmp_path)):
        said = []
        PatchCore(**SMALL | {"resize": 64, "image_size": 64}).fit(given, said.append)
        (line,) = [line for line in said if "crop" in line]
        assert "the crop sees 50%" in line
        assert "of 3 defects with masks 2 lie outside (all of it: aspect='squash'" in line


def test_a_prediction_is_saved_as_a_table_and_overlays(detector, data, tmp_path):
    out = detector.predict(data.test[:3])
    saved = out.save(tmp_path / "new" / "folder")
    table = (saved / "predictions.csv").read_text().splitlines()
    assert table[0].startswith("path,score,defective") and len(table) == 4
    assert len(list(saved.glob("000[123]_*.jpg"))) == 3
    with pytest.raises(ValueError, match="out: expected another folder than that of the images"):
        out.save(data.test[0].parent)
    with pytest.raises(FileNotFoundError, match=r"no such image: .*gone\.png"):
        dataclasses.replace(out, paths=(tmp_path / "gone.png", *out.paths[1:])).save(tmp_path / "gone")
    assert len((tmp_path / "gone/predictions.csv").read_text().splitlines()) == 4
    Image.new("RGB", (9, 5)).save(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"gone\.png: expected the image that was scored, 256 x 256 px, got \(9, 5\)"):
        dataclasses.replace(out, paths=(tmp_path / "gone.png", *out.paths[1:])).overlay(0)
    page = dataclasses.replace(out, paths=("a<b>.png", *out.paths[1:]))._repr_html_()
    assert page.count("<img") == 3 and 'class="tex2jax_ignore' in page
    assert "a&lt;b&gt;.png" in page and "<b>.png" not in page
    assert re.match(r"Prediction\(3 images, \d defective at", repr(out))


def test_images_of_a_data_set_s_folder_are_its_training_images(data):
    assert list(images_of(data.folder, train=True)) == list(data.train)
    assert Original(4, 5) == (4, 5, 1)


def test_a_small_defect_in_a_large_image_is_found_with_tiles_and_not_without(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        image = rng.integers(110, 140, (2000, 3000, 3), dtype=np.uint8)
        if i == 3:
            checks = np.add.outer(np.arange(12) // 4, np.arange(12) // 4) % 2  # grey on average
            image[700:712, 2100:2112] = (25 + 200 * checks)[..., None]
        Image.fromarray(image).save(tmp_path / f"{i}.bmp")
    *good, bad = (tmp_path / f"{i}.bmp" for i in range(4))
    how = SMALL | {"resize": 256, "image_size": 256, "aspect": "squash", "coreset_ratio": 0.02}
    whole = PatchCore(**how).fit(good[:2], log=len).predict([good[2], bad])
    tiled = PatchCore(**how, tiles=(4, 6)).fit(good[:2], log=len).predict([good[2], bad])
    assert tiled.maps.shape == (2, 1024, 1536) and tiled.scores[1] > 1.5 * tiled.scores[0]
    y, x = np.unravel_index(np.nan_to_num(tiled.maps_on_original(1)).argmax(), (2000, 3000))
    assert abs(y - 706) < 40 and abs(x - 2106) < 40
    assert whole.scores[1] < 1.2 * whole.scores[0], "a twelfth of a patch"


def test_tiles_are_the_images_cut_and_one_tile_is_none(data, detector):
    with pytest.raises(ValueError, match=r"tiles: expected rows and columns"):
        PatchCore(**SMALL, tiles=(0, 2))
    with pytest.raises(ValueError, match="aspect: expected 'squash' where images are cut into tiles"):
        PatchCore(**SMALL, tiles=(1, 2))
    how = SMALL | {"aspect": "squash"}
    tiled = PatchCore(**how, tiles=(2, 3)).fit(data.train[:4], log=len)
    image = tiled.transform.image(data.test[0])
    assert image.shape == (128, 192, 3)
    p = tiled.extractor(image[None]).reshape(2 * 8, 3 * 8, -1)
    cut = PatchCore(**how).extractor(np.ascontiguousarray(image[None, 64:, 64:128])).reshape(8, 8, -1)
    np.testing.assert_allclose(p[8:, 8:16].astype(float), cut.astype(float), atol=1e-2)
    assert tiled.predict(data.test[:1]).patch_scores.shape == (1, 16, 24)


def test_a_defect_on_the_border_of_two_tiles_scores_as_one_inside_where_they_overlap():
    checks = (np.add.outer(np.arange(12) // 3, np.arange(12) // 3) % 2 * 150 + 50)[..., None]
    for overlap, least in ((0, 0.2), (16, 0.8), (32, 0.8)):
        width = 128 - overlap
        *good, within, between = np.random.default_rng(0).integers(110, 140, (8, 64, width, 3), np.uint8)
        within[26:38, 20:32] = between[26:38, width // 2 - 6 : width // 2 + 6] = checks
        how = SMALL | {"aspect": "squash", "tiles": (1, 2), "tile_overlap": overlap}
        out = PatchCore(**how).fit(good, log=len).predict([within, between])
        assert least < out.scores[1] / out.scores[0] < least + 0.4, overlap
        assert out.maps.shape == (2, 64, width)
        assert not overlap or abs(out.maps[1].max(0).argmax() - width // 2) <= 8


def test_overlapping_tiles_are_cut_in_the_middle_and_fit_images_of_any_size(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (301, 403, 3), np.uint8)).save(tmp_path / f"{i}.png")
    how = SMALL | {"aspect": "squash", "resize": 72, "tiles": (2, 3), "tile_overlap": 24}
    detector = PatchCore(**how).fit(tmp_path, log=len)
    image = detector.transform.image(tmp_path / "0.png")
    assert image.shape == (2 * 64 - 24, 3 * 64 - 2 * 24, 3)
    p = detector.extractor(image[None]).reshape(13, 18, -1)
    tiles = np.stack([image[y : y + 64, x : x + 64] for y in (0, 40) for x in (0, 40, 80)])
    own = PatchCore(**SMALL).extractor(tiles).reshape(2, 3, 8, 8, -1)
    for y in range(13):
        for x in range(18):
            # a tile begins at each fifth patch, and leaves one to the tile before
            row, column = int(y >= 6), (x >= 6) + (x >= 11)
            np.testing.assert_array_equal(p[y, x], own[row, column, y - 5 * row, x - 5 * column])
    detector.save(tmp_path / "part.rcp")
    out, again = detector.predict(tmp_path), PatchCore.load(tmp_path / "part.rcp").predict(tmp_path)
    assert out.patch_scores.shape == (3, 13, 18) and out.maps.shape == (3, 104, 144)
    assert out.maps_on_original(0).shape == (301, 403) and np.isnan(out.maps_on_original(0)[0, 0]), "resize is more"
    np.testing.assert_array_equal(again.maps, out.maps)
    np.testing.assert_array_equal([one.scores[0] for one in detector.predict_iter(tmp_path)], out.scores)
    found = dataclasses.replace(out, threshold=float(out.patch_scores[0].min()), why="")
    left, top, right, bottom, _ = found.boxes(0)[0]
    assert (left, top, right, bottom) == tuple(np.rint(out.transform.window(403, 301)).astype(int)), "all that is seen"


@pytest.mark.parametrize(
    "wrong", [{"tile_overlap": 12}, {"tile_overlap": 64}, {"tile_overlap": 8, "tiles": (1, 1)}, {"image_size": 60}]
)
def test_an_overlap_that_is_not_of_whole_patches_between_tiles_is_refused(wrong):
    how = SMALL | {"aspect": "squash", "tiles": (1, 2), "tile_overlap": 8}
    PatchCore(**how)
    with pytest.raises(ValueError, match=r"tile_overlap: expected 0, or with tiles a multiple of 8 px .a patch. below"):
        PatchCore(**how | wrong)
    with pytest.raises(ValueError, match="tile_overlap: expected less than image_size=64 px, got 64"):
        Transform(64, 64, "squash", (1, 2), 64)


def test_images_beside_a_data_set_are_not_passed_over(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "old" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "old" / "train" / "z.png")
    words = "holds images and old/, a data set"
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=words):
        images_of(tmp_path, train=True)
    with pytest.warns(UserWarning, match="left out"):
        assert len(load_dataset(tmp_path, category="old").train) == 1
    (tmp_path / "old" / "train").rename(tmp_path / "old" / "good")
    (tmp_path / "old" / "train").mkdir()
    (tmp_path / "old" / "good").rename(tmp_path / "old" / "train" / "good")
    (tmp_path / "old" / "test").mkdir()
    with pytest.warns(UserWarning, match="left out"):
        assert load_dataset(tmp_path).layout == "mvtec"
