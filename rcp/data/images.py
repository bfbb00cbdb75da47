"""Reading images and masks: any ordinary file becomes RGB or bool, resized and cropped as in the paper (Sec. 4.1)."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # by content: no other decoder is ever started
LABELS = 32  # a mask whose values all lie below this holds class numbers (VisA: 0, 1, 2, ...), not grey levels


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An opened image, its header read and checked; whatever goes wrong inside is raised with the path."""
    # Another library may have switched this on for the whole process: half an image would then pass as a whole one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such image: {path}") from error
    except Image.UnidentifiedImageError as error:
        reason = "its content is none of " + ", ".join(FORMATS) if os.path.getsize(path) else "the file is empty"
        raise ValueError(f"unreadable image {path}: {reason}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image {path} is too large to be read safely: {error} Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds: SyntaxError for a broken PNG, struct.error, ...
        raise ValueError(f"unreadable image {path}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}) have no defined white; save it with 8 or 16 bits")
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _defective(image: Image.Image) -> np.ndarray:
    """-> bool (h, w): where a mask says defective."""
    image = _upright(image)
    if image.mode == "1":
        return np.asarray(image)
    if image.mode == "L" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
    else:
        colours = np.asarray(image.convert("RGB"))
        levels = colours.max(axis=2)
        if image.mode == "P" and (colours != levels[..., None]).any():
            return levels > 0  # a coloured palette numbers classes; the background is black
    full = 65535 if image.mode.startswith("I;16") else 255
    return levels > (0 if levels.max() < LABELS else full / 2)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header alone unless the image is rotated."""
    with _opened(path) as image:
        # The base class's getexif: the PNG one would decode the whole image.
        if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) > 4:
            image = ImageOps.exif_transpose(image)
        return image.size


@dataclass(frozen=True)
class Transform:
    """Resize, then centre crop (Sec. 4.1: 256 to 224, 366 to 320, 512 to 480), pixel for pixel as torchvision on PIL.

    resize: side in pixels before the crop. image_size: side S of the crop, at most ``resize``.
    aspect: "keep" brings the shorter side to ``resize``; "squash" brings both sides there.
    """

    resize: int = 256
    image_size: int = 224
    aspect: Literal["keep", "squash"] = "keep"

    def __post_init__(self):
        for name in ("resize", "image_size"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number of pixels, not {value!r}")
        if self.aspect not in ("keep", "squash"):
            raise ValueError(f"aspect must be 'keep' or 'squash', not {self.aspect!r}")
        if self.image_size > self.resize:
            raise ValueError(f"image_size (the crop) is {self.image_size} px, larger than resize ({self.resize} px)")

    def image(self, path: str | Path) -> np.ndarray:
        """-> uint8 (S, S, 3), RGB.

        Greyscale is repeated; 16 bits are scaled to 8; transparent pixels show white, as on a page; EXIF rotation is
        applied; of several frames the first is taken. Bilinear with antialias.
        Errors: FileNotFoundError; ValueError for a file that is no image, truncated or too large. Both name the path.
        """
        with _opened(path) as image:
            return np.asarray(self._crop(self._image(self._resize(_rgb(image), Image.Resampling.BILINEAR), path)))

    def mask(self, path: str | Path, of: str | Path | None = None) -> np.ndarray:
        """-> bool (S, S), True where defective: the value is above half of full scale; nearest neighbour.

        A mask of class numbers, as VisA's (all below 32, or a coloured palette), is True where it is not 0 or black.
        of: the image that the mask belongs to.
        Errors: as `image`.
        """
        with _opened(path) as image:
            binary = Image.fromarray(_defective(image).astype(np.uint8))
            resized = self._resize(binary, Image.Resampling.NEAREST)
            return np.asarray(self._crop(self._mask(resized, of or path))).astype(bool)

    def _image(self, image: Image.Image, path: str | Path) -> Image.Image:
        """What happens between resize and crop: nothing here (see :mod:`rcp.data.perturb`)."""
        return image

    def _mask(self, mask: Image.Image, of: str | Path) -> Image.Image:
        return mask

    def _resize(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        width, height, side = *image.size, self.resize
        if self.aspect == "squash":
            size = (side, side)
        elif width <= height:
            size = (side, int(side * height / width))
        else:
            size = (int(side * width / height), side)
        if Image.MAX_IMAGE_PIXELS and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"at {width} x {height} px it is too long for aspect='keep': it would become {size[0]} x {size[1]} px"
            )
        return image if size == image.size else image.resize(size, resample)

    def _crop(self, image: Image.Image) -> Image.Image:
        left, top = (round((n - self.image_size) / 2) for n in image.size)
        return image.crop((left, top, left + self.image_size, top + self.image_size))


def threaded(work: Callable[[int], None], count: int, progress: Callable | None = None) -> None:
    """``work(0) ... work(count - 1)`` on all cores (Pillow frees the interpreter); raises the first error in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(work, range(count))
        for _ in progress(done, total=count) if progress else done:
            pass


def load_images(paths: Sequence[str | Path], transform: Transform, progress: Callable | None = None) -> np.ndarray:
    """-> uint8 (n, S, S, 3), RGB, in the order of ``paths``.

    progress: wraps an iterable as tqdm does, e.g. ``tqdm`` or ``functools.partial(tqdm, desc="decode")``.
    Errors: as `Transform.image`, for the first bad file in order.
    """
    if isinstance(paths, str | Path):
        raise ValueError(f"paths must be a list of images, not one path: {paths}; for a folder use load_dataset")
    paths = list(paths)
    out = np.empty((len(paths), transform.image_size, transform.image_size, 3), np.uint8)

    def read(i: int) -> None:
        out[i] = transform.image(paths[i])

    threaded(read, len(paths), progress)
    return out
