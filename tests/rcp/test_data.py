"""Layouts, images and masks: what is found, how it is read, and what a bad folder or file is told."""

import os
import re
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from scipy import ndimage
from torchvision import transforms

from rcp.data import Split, Transform, categories, load_dataset, load_images
from rcp.data.images import image_size
from rcp.paths import data_root, weights_root

SMALL = Transform(resize=16, image_size=16)
ORIENTATION = 0x0112


def draw(path: Path, size=(20, 16), seed=0, **save) -> Path:
    """An image of noise, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **save)
    return path


def mask(path: Path, size=(20, 16), mode="L") -> Path:
    """A mask whose left half is defective."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = Image.new("L", size)
    grey.paste(255, (0, 0, size[0] // 2, size[1]))
    grey.convert(mode).save(path)
    return path


def tree(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (mask if "ground_truth" in name else partial(draw, seed=seed))(root / name)
    return root


@pytest.fixture
def mvtec(tmp_path) -> Path:
    root = tmp_path / "mvtec"
    for category in ("cable", "bottle"):
        bad, good = ("cut/0", "cut/1", "blob/0"), ("train/good/10.png", "train/good/9.png", "test/good/0.png")
        images = *good, *(f"test/{name}.png" for name in bad)
        tree(root / category, *images, *(f"ground_truth/{name}_mask.png" for name in bad))
    (root / "license.txt").write_text("text")
    return root


def names(split: Split, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in split]


# ---- layouts --------------------------------------------------------------------------------------------


def test_mvtec(mvtec):
    data = load_dataset(mvtec, category="bottle")
    folder = mvtec / "bottle"
    assert (data.layout, data.category, data.root, data.folder) == ("mvtec", "bottle", mvtec, folder)
    assert names(data.train, folder) == ["train/good/9.png", "train/good/10.png"]  # natural order
    assert names(data.test, folder) == ["test/blob/0.png", "test/cut/0.png", "test/cut/1.png", "test/good/0.png"]
    assert data.test.labels.tolist() == [1, 1, 1, 0] and data.test.labels.dtype == np.int64
    assert data.test.defects == ("blob", "cut", "cut", "good")
    assert data.test.masks[2] == folder / "ground_truth/cut/1_mask.png" and data.test.masks[3] is None
    assert data.test.has_masks and not data.train.has_masks
    masks = data.test.load_masks(SMALL)
    assert masks.dtype == bool and masks.shape == (4, 16, 16)
    assert masks[:3, :, :7].all() and not masks[:3, :, 9:].any() and not masks[3].any()
    assert categories(mvtec) == ["bottle", "cable"]


def test_a_category_folder_is_a_root_too(mvtec, monkeypatch):
    data = load_dataset(mvtec / "bottle")
    assert data.category == "bottle" and categories(mvtec / "bottle") == ["bottle"]
    assert data.fingerprint() == load_dataset(mvtec, "bottle").fingerprint()
    monkeypatch.chdir(mvtec / "bottle")
    assert load_dataset(".").category == "bottle"
    shutil.rmtree(mvtec / "cable")
    assert load_dataset(mvtec).category == "bottle"  # the only one there is


def test_btad(tmp_path):
    tree(tmp_path / "01", "train/ok/0000.bmp", "test/ok/0000.bmp", "test/ko/0001.bmp", "ground_truth/ko/0001.png")
    tree(tmp_path / "03", "train/ok/0000.png", "test/ok/0000.png", "test/ko/0001.png", "ground_truth/ko/0001.bmp")
    assert categories(tmp_path) == ["01", "03"]
    data = load_dataset(tmp_path, "03")
    assert (data.layout, data.test.defects, len(data.train)) == ("btad", ("ko", "good"), 1)
    assert data.test.masks[0] == tmp_path / "03/ground_truth/ko/0001.bmp"
    assert load_dataset(tmp_path, "01").test.load_masks(SMALL)[0, :, :7].all()


def visa(root: Path) -> Path:
    """VisA as published: JPG images, masks of class numbers, a table of paths from the root."""
    lines = ["object,split,label,image,mask"]
    for category in ("candle", "pcb1"):
        at = f"{category}/Data"
        for i, split in enumerate(("train", "train", "test")):
            lines.append(f"{category},{split},normal,{at}/Images/Normal/{i:04}.JPG,")
            draw(root / at / f"Images/Normal/{i:04}.JPG", format="JPEG")
        lines.append(f"{category},test,anomaly,{at}/Images/Anomaly/000.JPG,{at}/Masks/Anomaly/000.png")
        draw(root / at / "Images/Anomaly/000.JPG", format="JPEG")
        classes = np.zeros((16, 20), np.uint8)
        classes[:8, :10], classes[8:, :10] = 1, 3
        (root / category / "Data/Masks/Anomaly").mkdir(parents=True)
        Image.fromarray(classes).save(root / category / "Data/Masks/Anomaly/000.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_visa(tmp_path):
    root = visa(tmp_path)
    assert categories(root) == ["candle", "pcb1"]
    data = load_dataset(root, "candle")
    assert data.layout == "visa" and data.fingerprint() == load_dataset(root / "candle").fingerprint()
    assert names(data.train, root) == ["candle/Data/Images/Normal/0000.JPG", "candle/Data/Images/Normal/0001.JPG"]
    assert data.test.defects == ("anomaly", "good") and data.test.labels.tolist() == [1, 0]
    masks = data.test.load_masks(SMALL)
    # every class is a defect, though far below half of full scale
    assert masks[0, :, :7].all() and not masks[0, :, 9:].any()
    table = root / "split_csv/1cls.csv"
    table.write_text(table.read_text().replace("candle/Data/Masks", "candle/truth").replace(",", ", "))
    (root / "candle/Data/Masks").rename(root / "candle/truth")
    draw(root / "candle/Data/Images/Normal/new.JPG", format="JPEG")
    with pytest.warns(UserWarning, match=r"candle: 1 of Data/Images/Normal/\*.jpg$"):
        assert load_dataset(root, "candle").test.has_masks, "the table says where they are"


def test_visa_errors(tmp_path):
    table = visa(tmp_path) / "split_csv/1cls.csv"
    sound, at = table.read_text(), "candle/Data/"
    now = f"test,anomaly,{at}Images/Normal/0002.JPG,{at}Masks/Anomaly/000.png"
    table.write_text(sound.replace(f"test,normal,{at}Images/Normal/0002.JPG,", now))
    with pytest.raises(ValueError, match=r"mask: expected one of one image alone, got .*000\.png"):
        load_dataset(tmp_path, "candle")
    table.write_text(sound)
    text = table.read_text()
    table.write_text(text.replace("object,split,label,image,mask", "object,split,label,image"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(table))} has no column mask, or several; its columns are"):
        load_dataset(tmp_path, "candle")
    table.write_text(
        text.replace(
        "candle,train,normal,candle/Data/Images/Normal/0001", "candle,train,anomaly,candle/Data/Images/Normal/0001" )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Normal/0001.JPG: expected train normal, .*, got \('train', 'anomaly'\)"):
        load_dataset(tmp_path, "candle")
    table.write_text(text)
    (tmp_path / "candle/Data/Images/Normal/0001.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"Normal/0001.JPG, listed in .*1cls.csv"):
        load_dataset(tmp_path, "candle")
    shutil.rmtree(tmp_path / "pcb1/Data/Masks")
    assert not load_dataset(tmp_path, "pcb1").test.has_masks
    table.write_text(text.replace("candle,train", "candle,test"))
    draw(tmp_path / "candle/Data/Images/Normal/0001.JPG", format="JPEG")
    with pytest.raises(ValueError, match=r"no training images of 'candle' in .*1cls.csv"):
        load_dataset(tmp_path, "candle")


@pytest.mark.parametrize(("content", "words"), [
    (b"object,split,label,image,mask\ncandle,train,normal,caf\xe9.jpg,\n", "is no CSV in UTF-8"),
    (b"object,split,label,image,mask\ncandle,train,normal,../../outside.jpg,\n", "expected paths inside"),
    (b"object,split,label,image,mask\ncandle,train,normal,/etc/hostname,\n", "expected paths inside"),
    (b"object,split,label,image,mask\ncandle,train\n", "expected paths inside"),
])  # fmt: skip
def test_a_visa_table_that_is_no_text_or_leads_elsewhere(tmp_path, content, words):
    table = visa(tmp_path) / "split_csv/1cls.csv"
    table.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(table))}.* {words}"):
        load_dataset(tmp_path, "candle")


@pytest.mark.parametrize("variable", ["RCP_DATA", "RCP_WEIGHTS"])
def test_a_variable_that_names_a_file_for_a_folder_is_named(tmp_path, variable, monkeypatch):
    monkeypatch.setenv(variable, str(draw(tmp_path / "file.png")))
    with pytest.raises(ValueError, match=f"{variable}: expected a folder, got .*file.png"):
        (data_root if variable == "RCP_DATA" else weights_root)()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"unreadable image .*pipe\.png: it is no file"):
        SMALL.image(tmp_path / "pipe.png")


def test_many_threads_decode_large_images_in_a_bounded_memory(tmp_path):
    """Eight of 15 megapixels (60 kB), each 60 MB as Pillow holds it, on eight threads: four at a time, and no copies."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell the peak of the memory")
    Image.new("RGB", (5000, 3000)).save(path := tmp_path / "large.png")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    with ThreadPoolExecutor(8) as pool:
        assert all(image.shape == (16, 16, 3) for image in pool.map(SMALL.image, [path] * 8))
    assert resident("VmHWM") - before < 400 * 1024


def resident(what: str) -> int:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_own_folder(tmp_path):
    images = (
        "train/a.jpg", "train/Normal/b.PNG", "test/OK/a.tif", "test/bent/2.webp", "test/bent/10.jpeg", "test/normal/c.bmp",
    )  # fmt: skip
    tree(tmp_path / "parts", *images, "ground_truth/bent/2.tif", "ground_truth/bent/10_mask.png")
    (tmp_path / "parts/train/.hidden.png").write_bytes(b"")
    (tmp_path / "parts/train/notes.txt").write_text("text")
    data = load_dataset(tmp_path / "parts")
    assert (data.layout, data.category) == ("own", "parts")
    assert names(data.train, data.folder) == ["train/a.jpg", "train/Normal/b.PNG"]
    there = ["test/bent/2.webp", "test/bent/10.jpeg", "test/normal/c.bmp", "test/OK/a.tif"]
    assert names(data.test, data.folder) == there
    assert data.test.defects == ("bent", "bent", "good", "good")
    assert [m and m.name for m in data.test.masks] == ["2.tif", "10_mask.png", None, None]
    assert load_images(data.test, SMALL).shape == (4, 16, 16, 3)
    tree(tmp_path / "other", "train/a.png")
    assert categories(tmp_path) == ["other", "parts"]
    assert len(load_dataset(tmp_path, "other").test) == 0


def test_plain_folder_of_images(tmp_path):
    data = load_dataset(tree(tmp_path / "shots", "2.jpg", "10.jpg"))
    assert names(data.train, data.folder) == ["2.jpg", "10.jpg"] and len(data.test) == 0 and data.category == "shots"
    assert data.test.labels.dtype == np.int64 and data.test.load_masks(SMALL).shape == (0, 16, 16)
    assert load_images(data.test, SMALL).shape == (0, 16, 16, 3)


def test_named_layout_is_checked(mvtec):
    assert load_dataset(mvtec, "bottle", layout="own").layout == "own"
    words = r"no known layout in .*mvtec. Looked for\n  btad: CATEGORY/train/ok .*\nFound: bottle/, cable/, license"
    with pytest.raises(ValueError, match=words):
        load_dataset(mvtec, "bottle", layout="btad")
    words = r"unknown layout 'mvtc'. Did you mean 'mvtec'\? Valid: auto, visa, mvtec, btad, own"
    with pytest.raises(ValueError, match=words):
        load_dataset(mvtec, "bottle", layout="mvtc")


# ---- what a bad folder is told --------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no such data folder: {re.escape(str(tmp_path / 'nowhere'))}"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a file: .*set.zip"):
        load_dataset(draw(tmp_path / "set.zip", format="PNG"))


def test_no_known_layout(mvtec):
    (mvtec.parent / "readme.md").write_text("text")
    with pytest.raises(ValueError) as error:
        load_dataset(mvtec.parent)
    found = ("Found: mvtec/, readme.md", f"Did you mean {mvtec}?")
    for part in (str(mvtec.parent), "1cls.csv", "train/good", "train/ok", "own: train", *found):
        assert part in str(error.value)
    assert all(draw(mvtec.parent / "sorted" / name) for name in ("NG/1.png", "OK/1.png"))
    with pytest.raises(ValueError, match=r"Did you mean .*sorted/OK\?"):
        load_dataset(mvtec.parent / "sorted")
    (mvtec.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Found: nothing"):
        load_dataset(mvtec.parent / "empty")


def test_unknown_category(mvtec):
    words = r"mvtec \(layout mvtec\) has no category 'cabel'. Did you mean 'cable'\? Valid: bottle, cable"
    with pytest.raises(ValueError, match=words):
        load_dataset(mvtec, "cabel")
    with pytest.raises(ValueError, match=r"holds 2 categories; name one with category=: bottle, cable"):
        load_dataset(mvtec)


def test_no_training_images(mvtec):
    shutil.rmtree(mvtec / "bottle/train/good")
    (mvtec / "bottle/train/good").mkdir()
    with pytest.raises(ValueError, match=r"no training images of 'bottle' in .*bottle/train"):
        load_dataset(mvtec, "bottle")


def test_unlabelled_test_image(mvtec):
    draw(mvtec / "bottle/test/7.png")
    with pytest.raises(ValueError, match=r"test image without label: .*test/7.png; move it to test/good/"):
        load_dataset(mvtec, "bottle")


def test_missing_mask(mvtec):
    (mvtec / "bottle/ground_truth/cut/1_mask.png").unlink()
    words = r"no mask for the defective image .*test/cut/1.png: looked for .*ground_truth/cut/1_mask.png"
    with pytest.raises(ValueError, match=words):
        load_dataset(mvtec, "bottle")
    shutil.rmtree(mvtec / "bottle/ground_truth")
    test = load_dataset(mvtec, "bottle").test
    assert not test.has_masks and set(test.masks) == {None} and test.labels.sum() == 3
    assert not test[3:].load_masks(SMALL).any()
    with pytest.raises(ValueError, match=r"no ground truth for the defective image .*test/blob/0.png"):
        test.load_masks(SMALL)


def test_masks_that_match_nothing_are_not_taken_for_absent(mvtec):
    truth = mvtec / "bottle/ground_truth"
    shutil.rmtree(truth / "blob")
    (truth / "cut").rename(truth / "Cuts")
    with pytest.raises(ValueError, match=r"no mask for the defective image .*test/blob/0.png"):
        load_dataset(mvtec, "bottle")


def test_two_masks_for_one_image(mvtec):
    mask(mvtec / "bottle/ground_truth/cut/1.tif")
    with pytest.raises(ValueError, match=r"two masks for one image: .*1.tif and .*1_mask.png"):
        load_dataset(mvtec, "bottle")


def test_masks_in_a_folder_for_each_image_are_refused_by_name(mvtec):
    mask(mvtec / "bottle/ground_truth/cut/0/0.png")
    assert load_dataset(mvtec, "bottle").test.has_masks, "there are others"
    for name in ("0", "1"):
        (mvtec / f"bottle/ground_truth/cut/{name}_mask.png").unlink()
    with pytest.raises(ValueError, match=r"ground_truth: .*LOCO's layout .*got '.*/bottle/ground_truth/cut'"):
        load_dataset(mvtec, "bottle")


def test_mask_of_another_size(mvtec):
    mask(mvtec / "bottle/ground_truth/cut/1_mask.png", size=(16, 20))
    with pytest.raises(ValueError, match=r"cut/1_mask.png is 16 x 20, .*test/cut/1.png is 20 x 16"):
        load_dataset(mvtec, "bottle")
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a quarter turn: the image is seen at 16 x 20, as its mask is
    draw(mvtec / "bottle/test/cut/1.png", exif=exif)
    assert load_dataset(mvtec, "bottle").test.has_masks


def test_folder_and_broken_link_named_like_images(mvtec):
    (mvtec / "bottle/train/good/11.png").mkdir()
    with pytest.raises(ValueError, match=r"named like an image, but no file \(a folder, .*train/good/11.png"):
        load_dataset(mvtec, "bottle")
    (mvtec / "cable/train/good/11.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"named like an image, but no file \(.* a broken link\): .*train/good/11.png"):
        load_dataset(mvtec, "cable")


# ---- fingerprint ----------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_not_the_place(mvtec, tmp_path):
    first = load_dataset(mvtec, "bottle").fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", first)
    shutil.copytree(mvtec, tmp_path / "copy")
    assert load_dataset(tmp_path / "copy", "bottle").fingerprint() == first
    assert load_dataset(mvtec, "cable").fingerprint() == first  # drawn alike; the category is part of the configuration


@pytest.mark.parametrize("what", ["train image", "mask", "name", "swap"])
def test_fingerprint_sees_every_change(mvtec, what):
    data = load_dataset(mvtec, "bottle")
    first, folder = data.fingerprint(), mvtec / "bottle"
    if what == "train image":
        draw(folder / "train/good/9.png", seed=99)
    elif what == "mask":
        Image.new("L", (20, 16)).save(folder / "ground_truth/cut/0_mask.png")
    elif what == "name":
        (folder / "train/good/9.png").rename(folder / "train/good/8.png")
    else:
        a, b = folder / "train/good/9.png", folder / "train/good/10.png"
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    assert load_dataset(mvtec, "bottle").fingerprint() != first


# ---- transform ------------------------------------------------------------------------------------------


def torchvision_pixels(image, resize, crop, mode):
    chain = transforms.Compose([transforms.Resize(resize, interpolation=mode), transforms.CenterCrop(crop)])
    return np.asarray(chain(image))


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
@example(37, 53, 32, 27)  # the long side is rounded down, and the crop starts at half a pixel
@example(51, 31, 33, 28)
@example(24, 24, 24, 24)
def test_keep_is_torchvision(width, height, resize, crop):
    crop = min(crop, resize)
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    transform = Transform(resize, crop)
    for name in ("BILINEAR", "NEAREST"):
        expected = torchvision_pixels(image, resize, crop, transforms.InterpolationMode[name])
        assert np.array_equal(transform._crop(transform._resize(image, Image.Resampling[name])), expected)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"resize": 200}, r"image_size: expected 1 to resize=200 px, got 224"),
    ({"resize": 0, "image_size": 0}, "image_size: expected 1 to resize=0 px, got 0"),
    ({"image_size": 22.4}, "image_size: expected int, got 22.4"),
    ({"aspect": "crop"}, "aspect: expected one of 'keep', 'squash', got 'crop'"),
])  # fmt: skip
def test_transform_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transform(**arguments)


# ---- image modes --------------------------------------------------------------------------------------

EXACT = Transform(resize=8, image_size=8)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_greyscale_and_16_bit(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    expected = np.repeat(RAMP[..., None], 3, 2)
    assert np.array_equal(EXACT.image(tmp_path / "grey.png"), expected)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
        assert np.array_equal(EXACT.image(tmp_path / name), expected)
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "white.png")
    assert (EXACT.image(tmp_path / "white.png") == 255).all()
    for level, expected in ((1000, 4), (200, 1), (2**14 - 1, 64)):
        Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / "dark.png")
        with pytest.warns(UserWarning, match="no level above 16,383"):
            assert (EXACT.image(tmp_path / "dark.png") == expected).all()  # 1000 / 257 = 3.9; clipping would give 255


def test_transparent_pixels_show_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 100, 50, 255)
    rgba[4:, :4] = (200, 100, 50, 0)
    rgba[4:, 4:] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(rgba[..., [0, 3]], "LA").save(tmp_path / "la.png")
    got = EXACT.image(tmp_path / "rgba.png")
    assert (got[:4] == (200, 100, 50)).all() and (got[4:, :4] == 255).all() and (got[4:, 4:] == 127).all()
    got = EXACT.image(tmp_path / "la.png")
    assert (got[:4] == 200).all() and (got[4:, :4] == 255).all() and (got[4:, 4:] == 127).all()


def test_palette(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 8, 4))
    image.save(tmp_path / "palette.png")
    image.save(tmp_path / "transparent.png", transparency=0)
    got = EXACT.image(tmp_path / "palette.png")
    assert (got[:4] == (10, 20, 30)).all() and (got[4:] == (200, 100, 50)).all()
    got = EXACT.image(tmp_path / "transparent.png")
    assert (got[:4] == 255).all() and (got[4:] == (200, 100, 50)).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, name, orientation):
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8], stored[:4, 8:] = (255, 0, 0), (0, 255, 0)
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1), 7: stored[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    how = {"quality": 95} if name == "a.jpg" else {"lossless": True}
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **how)
    expected = EXACT._crop(EXACT._resize(Image.fromarray(np.ascontiguousarray(upright)), Image.Resampling.BILINEAR))
    assert np.abs(EXACT.image(tmp_path / name).astype(int) - np.asarray(expected)).mean() < 12
    assert image_size(tmp_path / name) == upright.shape[1::-1]
    Image.fromarray(stored[..., 1]).save(
        tmp_path / f"g{name}", exif=exif, **how
    )  # Pillow may map a file of one channel
    seen, turned = Transform(16, 16, "squash").mask(tmp_path / f"g{name}"), Image.fromarray(upright[..., 1] > 99)
    assert np.array_equal(seen, np.asarray(turned.resize((16, 16), Image.Resampling.NEAREST)))
    text = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0"
    Image.fromarray(stored).save(tmp_path / "text.jpg", exif=text)
    assert image_size(tmp_path / "text.jpg") == (16, 8), "an orientation that is no number"


def test_32_bits_are_refused(tmp_path):
    for name, dtype in (("float.tif", np.float32), ("int.tif", np.int32)):
        Image.fromarray(RAMP.astype(dtype)).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: 32 bits a channel"):
            EXACT.image(tmp_path / name)


# ---- masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_mask_modes(tmp_path, mode):
    assert np.array_equal(EXACT.mask(mask(tmp_path / "m.png", (8, 8), mode)), np.tile(np.arange(8) < 4, (8, 1)))


TRUTH = np.zeros((48, 48), bool)
TRUTH[10:30, 20:41] = True


def coded(name: str) -> Image.Image:
    """The truth as an annotator's tool may write it."""
    t, soft = TRUTH, np.where(TRUTH, 255, 0).astype(np.uint8)
    ids, steps = t * np.uint8(1), np.arange(48) // 4
    ids[12:14, 22:30] = 40
    palette = Image.fromarray(t.astype(np.uint8))
    if name.startswith("palette"):
        palette = palette.convert("P")
        palette.putpalette([*(255, 255, 255), *(255, 0, 0)] if "red" in name else [*(0, 0, 0), *(100, 100, 100)])
    white = np.full((48, 48, 4), 255, np.uint8)
    white[..., 3] = soft
    return {
        "0/255": Image.fromarray(soft), "1 bit": Image.fromarray(t), "0/100": Image.fromarray(t * np.uint8(100)),
        "16 bits, 0/255": Image.fromarray(t * np.uint16(255)), "16 bits, 0/65535": Image.fromarray(t * np.uint16(65535)),
        "classes 1 and 40": Image.fromarray(ids), "colour": Image.fromarray(np.where(t[..., None], np.uint8([64, 0, 0]), np.uint8(0))),
        "blue on grey": Image.fromarray(np.where(t[..., None], np.uint8([0, 0, 90]), np.uint8(120))),
        "alpha": Image.fromarray(white), "alpha, all the same": Image.fromarray(soft).convert("RGBA"),
        "instances of 2 x 2 px": Image.fromarray((t * np.kron(np.arange(1, 577).reshape(24, 24), np.ones((2, 2)))).astype(np.uint16)),
        "80 instances": Image.fromarray(np.kron(t * (1 + steps * 9 + steps[:, None]), np.ones((9, 9))).astype(np.uint16)),
        "classes 1, 254, 255": Image.fromarray(t * np.choose(steps % 3, [1, 254, 255]).astype(np.uint8)),
        "soft edges": Image.fromarray(np.clip(soft.astype(int) + np.arange(48)[None] - 47, 0, 255).astype(np.uint8)),
    }.get(name, palette)  # fmt: skip


@pytest.mark.parametrize("name", [
    "0/255", "1 bit", "0/100", "16 bits, 0/255", "16 bits, 0/65535", "classes 1 and 40", "colour", "blue on grey", "alpha",
    "alpha, all the same", "80 instances", "classes 1, 254, 255", "instances of 2 x 2 px", "soft edges",
    "palette, red on white", "palette, grey on black",
])  # fmt: skip
def test_a_mask_is_read_however_it_is_coded(tmp_path, name):
    coded(name).save(tmp_path / "m.png")
    assert np.array_equal(Transform(48, 48).mask(tmp_path / "m.png"), TRUTH)


def test_a_mask_in_colours_of_16_bits_is_black_and_white_or_refused(tmp_path):
    for level in (65535, 300):
        rows = np.where(TRUTH[..., None], [level] * 3, 0).astype(">u2")
        parts = [(b"IHDR", struct.pack(">IIBBBBB", 48, 48, 16, 2, 0, 0, 0)), (b"IEND", b"")]
        parts.insert(1, (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))))
        chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
        (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        if level == 65535:
            assert np.array_equal(Transform(48, 48).mask(tmp_path / "m.png"), TRUTH)
    with pytest.raises(ValueError, match=r"m\.png: .*black and white in 16 bits a colour"):
        Transform(48, 48).mask(tmp_path / "m.png")
    with pytest.warns(UserWarning, match="no level above 16,383"):
        assert Transform(48, 48).image(tmp_path / "m.png").max() == 1


def tiff(path: Path, bits: int, zero: int, kind: int = 1) -> None:
    """The truth as a TIFF of one strip, its levels of so many bits; zero: 0 where white is 0. kind: 2 for signed."""
    white = 2 ** (bits - (kind == 2)) - 1
    levels = np.where(zero == TRUTH, white, 0) if bits > 8 else np.where(TRUTH, white, 0)
    data = (levels.astype("<u2") if bits == 16 else levels.astype(np.uint8)).tobytes()
    data = bytes(48 * 72) if bits == 12 else data
    tags = [
        (256, 48),
        (257, 48),
        (258, bits),
        (259, 1),
        (262, zero),
        (273, 8),
        (277, 1),
        (278, 48),
        (279, len(data)),
        (339, kind),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


@pytest.mark.parametrize(("bits", "zero", "kind"), [(16, 1, 1), (16, 0, 1), (12, 1, 1), (8, 1, 2)])
def test_a_tiff_whose_levels_would_be_read_wrongly_is_refused(tmp_path, bits, zero, kind):
    tiff(tmp_path / "m.tif", bits, zero, kind)
    if (bits, zero) == (16, 1):
        assert np.array_equal(Transform(48, 48).mask(tmp_path / "m.tif"), TRUTH)
        return
    for read in (Transform(48, 48).mask, Transform(48, 48).image):
        with pytest.raises(
            ValueError, match=r"m\.tif: TIFF: expected unsigned levels of 1 to 8 bits, or 16 whose 0 is"
        ):
            read(tmp_path / "m.tif")


def test_a_mask_of_several_pages_or_with_two_shapes_is_refused(tmp_path):
    drawn, other = Image.fromarray(TRUTH * np.uint8(255)), Image.fromarray(TRUTH[::-1] * np.uint8(255))
    for name in ("m.tif", "m.png", "m.webp"):
        drawn.save(tmp_path / name, save_all=True, append_images=[other])
        with pytest.raises(ValueError, match=rf"{name}: pages: expected one"):
            Transform(48, 48).mask(tmp_path / name)
    drawn.save(tmp_path / "pyramid.tif", save_all=True, append_images=[drawn.resize((24, 24))])
    assert np.array_equal(Transform(48, 48).mask(tmp_path / "pyramid.tif"), TRUTH)
    soft = Image.fromarray(
        np.dstack([*[TRUTH * np.uint8(255)] * 3, ndimage.gaussian_filter(np.float32(TRUTH * 255), 6).astype(np.uint8)])
    )
    soft.paste((255, 255, 255), mask=soft.getchannel("A").point(lambda v: 255 * (v > 0)))
    soft.putalpha(Image.fromarray(ndimage.gaussian_filter(np.float32(TRUTH * 255), 6).astype(np.uint8)))
    soft.save(tmp_path / "soft.png")
    assert 0.1 < Transform(48, 48).mask(tmp_path / "soft.png").mean() < 0.25
    both = drawn.convert("RGBA")
    both.putalpha(Image.fromarray(np.where(np.arange(48 * 48).reshape(48, 48) == 0, 0, 255).astype(np.uint8)))
    both.save(tmp_path / "dot.png")  # black and white, and one pixel that is not seen
    with pytest.raises(ValueError, match=r"dot\.png: alpha: expected the shape that the colours draw"):
        Transform(48, 48).mask(tmp_path / "dot.png")
    both = drawn.convert("RGB").convert("RGBA")
    both.putalpha(drawn)
    both.save(tmp_path / "same.png")
    assert np.array_equal(Transform(48, 48).mask(tmp_path / "same.png"), TRUTH)
    both.putalpha(drawn.point(lambda v: 255 - v))
    both.save(tmp_path / "white.png")  # the white is what is transparent: which of both is defective?
    with pytest.raises(ValueError, match=r"white\.png: alpha: expected the shape that the colours draw"):
        Transform(48, 48).mask(tmp_path / "white.png")
    for colour, rest in (((255, 0, 0), (255, 255, 255)), ((255, 255, 255), (255, 255, 255)), ((0, 0, 0), (0, 0, 0))):
        layer = np.where(TRUTH[..., None], (*colour, 255), (*rest, 0)).astype(np.uint8)
        layer[0, :9] = 0  # a strip that is neither seen nor of the rest's colour
        Image.fromarray(layer).save(tmp_path / "layer.png")
        assert np.array_equal(Transform(48, 48).mask(tmp_path / "layer.png"), TRUTH)
    both.putalpha(0)
    both.save(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"none\.png: alpha: expected some pixel that is not transparent"):
        Transform(48, 48).image(tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["jpg", "tif", "webp", "png"])
@pytest.mark.parametrize(("level", "mode"), [(255, "L"), (100, "L"), (255, "RGB")])
def test_a_mask_s_noise_of_compression_is_no_class(tmp_path, level, mode, kind):
    drawn = Image.fromarray(TRUTH * np.uint8(level)).convert(mode)
    how = {"compression": "jpeg"} if kind == "tif" else {}
    for quality in (90, 53, 39):  # with some of them black is no 0
        drawn.save(tmp_path / "m.jpg", quality=quality)
        given = Image.open(tmp_path / "m.jpg") if kind == "png" else drawn  # of JPEG, saved without loss later
        given.save(tmp_path / f"m.{kind}", **how | {"quality": 60})
        assert (Transform(48, 48).mask(tmp_path / f"m.{kind}") != TRUTH).mean() < 0.02


@pytest.mark.parametrize(("level", "where"), [(0, "nowhere"), (255, "everywhere"), (1, "everywhere")])
def test_an_empty_or_full_mask_is_an_error_that_names_it(tmp_path, level, where):
    Image.fromarray(np.full((48, 48), level, np.uint8)).save(tmp_path / "m.png")
    Image.fromarray(np.where(TRUTH[..., None], np.uint8([255, 0, 0]), np.uint8(128))).save(tmp_path / "on_grey.jpg")
    with pytest.raises(ValueError, match=r"on_grey\.jpg: as a mask it says defective everywhere"):
        Transform(48, 48).mask(tmp_path / "on_grey.jpg")
    with pytest.raises(ValueError, match=rf"m\.png: as a mask it says defective {where} \(mode L, values {level}"):
        Transform(48, 48).mask(tmp_path / "m.png")


def test_mask_is_nearest_neighbour_and_lies_on_its_image(tmp_path):
    levels = np.zeros((61, 83), np.uint8)
    levels[20:41, 30:50] = 255
    Image.fromarray(levels).save(tmp_path / "m.png")
    transform = Transform(32, 27)
    got = transform.mask(tmp_path / "m.png")
    expected = torchvision_pixels(Image.fromarray(levels), 32, 27, transforms.InterpolationMode.NEAREST) > 0
    assert np.array_equal(got, expected)
    image = transform.image(tmp_path / "m.png")[..., 0] / 255
    assert np.abs(got - image).mean() < 0.03  # shifted by one pixel it would be above 0.06
    speckled = np.random.default_rng(0).random((61, 83)) < 0.3  # an average would lose most of it
    Image.fromarray(speckled).save(tmp_path / "m.png")
    expected = torchvision_pixels(Image.fromarray(speckled), 32, 27, transforms.InterpolationMode.NEAREST)
    assert np.array_equal(transform.mask(tmp_path / "m.png"), expected)


# ---- bad files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("library_tolerates", [False, True])
def test_truncated_file(tmp_path, suffix, library_tolerates, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", library_tolerates)
    path = draw(tmp_path / f"cut{suffix}", (64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match=rf"unreadable image {re.escape(str(path))}: "):
        Transform(32, 32).image(path)


def test_not_a_image(tmp_path):
    for name, content, reason in (
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"hello" * 99, "its content is none of PNG"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: {reason}"):
            SMALL.image(tmp_path / name)
    (tmp_path / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    )  # would start an interpreter
    with pytest.raises(ValueError, match=r"script.png: its content is none of PNG"):
        SMALL.image(tmp_path / "script.png")
    with pytest.raises(ValueError, match=rf"unreadable image {re.escape(str(tmp_path))}"):
        SMALL.mask(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such image: .*none.png"):
        SMALL.image(tmp_path / "none.png")


def test_a_png_that_ends_in_zeros_is_half_a_copy(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 9, (64, 64, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    packer = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)  # whose codes go on among zeros: no decoder would notice
    packed = packer.compress(rows) + packer.flush()
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)),
        (b"IDAT", packed),
        (b"IEND", b""),
    )
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    file = tmp_path / "a.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert np.array_equal(Transform(64, 64).read(file)[0], pixels)
    whole = file.read_bytes()
    for share in (0.3, 0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))].ljust(len(whole), b"\0"))
        with pytest.raises(ValueError, match=r"unreadable image .*a.png"):
            load_images([file], Transform(64, 64))


def test_a_folder_that_may_not_be_read_is_not_empty(tmp_path, monkeypatch):
    shut = tmp_path / "set" / "b"
    for name in ("a", "b"):
        (tmp_path / "set" / name / "train" / "good").mkdir(parents=True)
    scandir = os.scandir

    def refused(path="."):
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="set/b"):
        categories(tmp_path / "set")


def test_broken_png_checksum(tmp_path):
    path = draw(tmp_path / "flip.png", (64, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flip.png"):
        SMALL.image(path)


def test_too_large_and_too_long(tmp_path, monkeypatch):
    path = draw(tmp_path / "large.png", (200, 200))
    long = draw(tmp_path / "long.png", (2000, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"large.png is too large to be read safely: .*40000 pixels"):
        SMALL.image(path)
    with pytest.raises(ValueError, match=r"long.png: at 2000 x 1 px it is too long for aspect='keep'"):
        SMALL.image(long)
    assert Transform(16, 16, "squash").image(long).shape == (16, 16, 3)


def test_load_images_keeps_order_and_names_the_first_bad_file(tmp_path):
    paths = [draw(tmp_path / f"{i}.png", (40, 30), seed=i) for i in range(12)]
    images = load_images(paths, SMALL)
    assert images.dtype == np.uint8 and images.shape == (12, 16, 16, 3)
    assert all(np.array_equal(images[i], SMALL.image(path)) for i, path in enumerate(paths))
    for i in (4, 9):
        paths[i].write_bytes(b"text")
    with pytest.raises(ValueError, match=r"4.png"):
        load_images(paths, SMALL)
    with pytest.raises(ValueError, match=r"paths: expected Sequence"):
        load_images(paths[0], SMALL)


# ---- real data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("category", "counts"), [("bottle", (209, 20, 63)), ("transistor", (213, 60, 40))])
def test_real_mvtec(shared_data, category, counts):
    start = time.perf_counter()
    data = load_dataset(shared_data / "mvtec", category)
    assert time.perf_counter() - start < 2  # 0.02 s on an idle core: headers only
    assert (len(data.train), int((data.test.labels == 0).sum()), int(data.test.labels.sum())) == counts
    assert data.layout == "mvtec" and data.test.has_masks
    few = data.test[::8]
    masks = few.load_masks(Transform())
    assert (masks.any(axis=(1, 2)) == (few.labels == 1)).all()
    expected = torchvision_pixels(Image.open(few[3]).convert("RGB"), 256, 224, transforms.InterpolationMode.BILINEAR)
    assert np.array_equal(load_images(few, Transform())[3], expected)


def picture(path, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*str(path).encode()])  # no two are the same
    Image.fromarray(rng.integers(0, 2, (32, 32), np.uint8) * 255).save(path, **how)


@pytest.fixture
def own(tmp_path):
    for name in ("train/good/0.png", "test/good/0.png", "test/bad/0.png"):
        picture(tmp_path / name)
    return tmp_path


def test_images_that_are_in_no_split_are_named_with_their_number(own):
    picture(own / "ground_truth/bad/0.png")
    for i in range(3):
        picture(own / f"train/good/day1/{i}.png")
        picture(own / f"test/bad/{i}.pgm")
        (own / f"train/good/{i}.cr2").touch()
        (own / f"train/good/{i}").touch()
        picture(own / f"ground_truth/worse/{i}.png")
        (own / f"train/good/{i}.txt").touch()
        picture(own.with_name(f"{own.name} of another") / f"{i}.png")
    (own / "train/good/linked").symlink_to(own.with_name(f"{own.name} of another"))
    (own / "train/good/back").symlink_to(own)
    places = ["test/bad/*.pgm", "train/good/*", "train/good/*.cr2", "train/good/day1/*.png", "train/good/linked/*.png"]
    named = ", ".join(f"3 of {place}" for place in ["ground_truth/worse/*.png", *places])
    with pytest.warns(UserWarning, match=re.escape(f"{own}: {named}") + "$"):
        assert len(load_dataset(own).train) == 1


def test_categories_that_are_left_out_are_named_and_no_name_stands_for_two(own):
    for name in ("a/train/good/0.png", "a/test/good/0.png", "b/train/0.png", "c/0.png"):
        picture(own / "all" / name)
    picture(own / "all/loose.png")
    with pytest.warns(UserWarning, match="not mvtec: b, c, loose.png$"):
        assert categories(own / "all") == ["a"]
    for name in ("\u00e4", "a\u0308"):
        picture(own / "twins" / name / "train/0.png")
    with pytest.raises(ValueError, match=r"names that differ in more than their Unicode form, got .*twins"):
        categories(own / "twins")


def test_nothing_is_said_of_what_systems_leave_behind(own, recwarn):
    for name in ("ground_truth/.ipynb_checkpoints/", "test/@eaDir/", "test/__MACOSX/", "test/bad/._"):
        picture(own / f"{name}0.png")
    test = load_dataset(own).test
    assert sorted(set(test.defects)) == ["bad", "good"] and not test.has_masks and not len(recwarn)
    for name in ("@scratch", "\uff11"):  # nobody's folder, and a digit that is no number here
        picture(own / "test" / name / f"{name}1.png")
    assert sorted(set(load_dataset(own).test.defects)) == ["@scratch", "bad", "good", "\uff11"]


def test_names_in_another_unicode_form_are_the_same_names(own):
    composed, decomposed = "pr\u00fcfling", "pru\u0308fling"
    picture(own / "test" / composed / f"{composed}.png")
    picture(own / "ground_truth" / decomposed / f"{decomposed}_mask.png")
    picture(own / "ground_truth/bad/0.png")
    assert load_dataset(own).test.has_masks
    picture(own / "all" / decomposed / "train/0.png")
    assert len(load_dataset(own / "all", composed).train) == 1


def test_a_name_may_end_in_mask_and_a_mask_has_one_image(own):
    picture(own / "test/bad/0_mask.png")
    picture(own / "ground_truth/bad/0_mask.png")
    picture(own / "ground_truth/bad/0_mask_mask.png")
    assert [m.name for m in load_dataset(own).test.masks if m] == ["0_mask.png", "0_mask_mask.png"]
    picture(own / "train/good/0_mask.png")
    picture(own / "train/good/_mask.png")
    with pytest.warns(UserWarning, match="named as masks, but read as images: 1, such as .*train/good/0_mask"):
        load_dataset(own)
    picture(own / "test/bad/0.bmp")
    with pytest.raises(ValueError, match=r"two images for one mask, .*0_mask\.png: .*0\.bmp and .*0\.png"):
        load_dataset(own)


def test_a_newer_set_is_refused_by_its_folders(tmp_path):
    for name in ("train/good/0.png", "validation/good/0.png", "test_public/good/0.png", "test_private/0.png"):
        picture(tmp_path / "can" / name)
    with pytest.raises(ValueError, match="no test/, but test_private, test_public"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("copy", ["test/good/0.png", "test/bad/1.png"])
def test_the_same_image_to_train_and_to_test_on_or_under_two_labels_is_named(own, copy):
    shutil.copy(own / ("train" if copy == "test/good/0.png" else "test") / "good/0.png", own / copy)
    with pytest.warns(UserWarning, match=rf"under two labels: 2 files, such as .*{copy}"):
        load_dataset(own)


def test_masks_that_are_inverted_are_counted_and_one_is_named(own):
    picture(own / "test/bad/1.png")
    (own / "ground_truth/bad").mkdir(parents=True)
    for i, share in enumerate((4, 28)):
        Image.fromarray(np.repeat(np.arange(32) < share, 32).reshape(32, 32)).save(own / f"ground_truth/bad/{i}.png")
    with pytest.warns(UserWarning, match=r"more than 80 % .*\(inverted\?\): 1 of 3 images, such as .*bad/1\.png"):
        load_dataset(own).test.load_masks(SMALL)
