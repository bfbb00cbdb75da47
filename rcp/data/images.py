"""Reading images and masks: any ordinary file becomes RGB or bool, resized and cropped as in the paper (Sec. 4.1)."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Semaphore
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, ImageSequence
from scipy import ndimage

from rcp.checks import check_fields, limited, require

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # by content: no other decoder is ever started
AT_A_TIME = 64  # megapixels that all threads together decode; an image that is larger goes alone
_room, _turn = Semaphore(AT_A_TIME), Lock()
# Blocks that malloc gives back: of 16 images of 88 megapixels on 8 threads 6.1 GB stayed, now 1.4.
Image.core.set_block_size(2**26)
TURNS = b"eXIf", b"Raw profile", b"com.adobe.xmp"  # chunks of a PNG that may hold EXIF's orientation
# A mask of at most so many distinct values holds class numbers or colours (VisA: 0, 1, 2, ...), not grey levels.
LABELS = 32


def named_as_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


class Original(NamedTuple):
    """An image before resize and crop: its size in pixels, upright, and how its file turns it (EXIF's orientation, 1 to 8)."""

    width: int
    height: int
    orientation: int = 1


@contextmanager
def _opened(source: "str | Path | Image.Image | np.ndarray", name: str | Path = "") -> Iterator[Image.Image]:
    """An opened image, its header read and checked; whatever goes wrong inside is raised with its path or name."""
    of_file = isinstance(source, str | Path)
    path = name or (source if of_file else "given as pixels")
    try:
        if not of_file:
            yield _of_pixels(source)
            return
        if Path(source).exists() and not Path(source).is_file():  # a pipe would be waited for
            raise ValueError("it is a folder, to be given alone" if Path(source).is_dir() else "it is no file")
        # Another library may have switched this on for the whole process: half an image would then pass as a whole one.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with Image.open(source, formats=FORMATS) as image:
            # of 16 bits in colour Pillow keeps the upper 8, and this tells no more once they are loaded
            image.deep = ";16" in str(image.tile)
            if image.format == "TIFF":
                image.filename = ""  # else raw pixels are mapped at the size that EXIF's turn gives them
                _check_levels(image.tag_v2)
            if (
                image.format == "PNG"
            ):  # Pillow checks the sums of the pixels only when asked to: zeros would be an image
                with Image.open(source, formats=("PNG",)) as again:
                    again.verify()
            share = min(AT_A_TIME, -(-image.width * image.height // 10**6))
            with _turn:  # one waits at a time: two that have half of what they need would wait for ever
                for _ in range(share):
                    _room.acquire()
            try:
                yield image
            finally:
                _room.release(share)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such image: {path}") from error
    except Image.UnidentifiedImageError as error:
        reason = "its content is none of " + ", ".join(FORMATS) if os.path.getsize(path) else "the file is empty"
        raise ValueError(f"unreadable image {path}: {reason}") from error
    except Image.DecompressionBombError as error:
        advice = "Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS."
        raise ValueError(f"image {path} is too large to be read safely: {error} {advice}") from error
    except Exception as error:  # Pillow's decoders raise many kinds: SyntaxError for a broken PNG, struct.error, ...
        raise ValueError(f"unreadable image {path}: {error}") from error


def _check_levels(tags) -> None:
    """Raises ValueError for levels of a TIFF that Pillow would read as others."""
    bits, zero, planes, kind = (tags.get(n, d) for n, d in ((258, (1,)), (262, 1), (284, 1), (339, (1,))))
    odd = (16 in bits and (zero == 0 or planes == 2)) or (2 in kind and 32 not in bits)
    sound = not odd and {*bits} <= {1, 2, 4, 8, 16, 32}
    words = "unsigned levels of 1 to 8 bits, or 16 whose 0 is black, in one plane"
    require("TIFF", sound, words, (bits, zero, planes, kind))


def _of_pixels(source: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    fits = isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3
    if not fits or np.ma.is_masked(source):
        what = f"{type(source).__name__} {getattr(source, 'dtype', '')} {getattr(source, 'shape', '')}"
        raise ValueError(f"expected a path, a PIL image or an array (H, W, 3) of uint8, RGB, none masked, got {what}")
    return Image.fromarray(source)


def _upright(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}) have no defined white; save it with 8 or 16 bits")
    require("pixels", 0 not in image.size, "one or more", image.size)
    image.load()  # EXIF may stand after the pixels; what it does not turn is not copied
    return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image


def _rgb(image: Image.Image) -> Image.Image:
    deep, image = getattr(image, "deep", False), _upright(image)
    grey = image.mode.startswith("I;16")
    if (grey or deep) and 0 < np.max(image if grey else image.getextrema()[:3]) < (2**14 if grey else 2**6):
        words = "an image of 16 bits has no level above 16,383 (8 bits, or a camera's 10 to 14?): it is read as a dark"
        warnings.warn(f"{words} one; scale it to 65,535 where that is not meant", stacklevel=2)
    if grey:  # Pillow's own conversion would clip at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = _in(image, "RGBA")
        require("alpha", image.getchannel("A").getbbox() is not None, "some pixel that is not transparent", "none")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _in(image, "RGB")


def _in(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which copies also where nothing changes


def _lossless(image: Image.Image) -> bool:
    """Whether the file holds the pixels that were drawn: no JPEG, also not within TIFF, and WebP of its lossless kind alone."""
    if image.format == "WEBP":
        return b"VP8L" in Path(image.filename).read_bytes()
    return image.format in ("PNG", "BMP", "TIFF") and "jpeg" not in str(image.info.get("compression"))


def _classes(levels: np.ndarray) -> bool:
    """Whether levels are class numbers: no two with JPEG's noise around both, and few, or areas of 2 x 2 pixels or more, no edges."""
    few, top = len(np.unique(levels)) <= LABELS, levels.max()
    between = (levels > 0) & (levels < top) & (levels != np.bincount(levels.ravel()).argmax())  # JPEG's black may be 3
    low, high = levels[between] < top / 16, levels[between] > top - top / 16
    noise = top > 2 * LABELS and low.any() and high.any() and (few or (low | high).mean() > 0.5)
    if few and not noise:
        return True
    alike = ndimage.maximum_filter(levels, 2) == ndimage.minimum_filter(levels, 2)
    return ndimage.maximum_filter(alike, 2, origin=-1)[between].mean() > (0.9 if noise else 0.7)


def _defective(image: Image.Image) -> np.ndarray:
    """-> bool (h, w): where a mask says defective, by :meth:`Transform.mask`'s rule.

    Raises:
        ValueError: nowhere, or everywhere.
    """
    cut = image.mode[0] != "I" and image.deep
    pages = [page.size for page in ImageSequence.Iterator(image)] if getattr(image, "n_frames", 1) > 1 else [image.size]
    require("pages", pages.count(pages[0]) == 1, "one, or smaller copies beside it", len(pages))
    image.seek(0)
    lossless, mode, image = _lossless(image), image.mode, _upright(image)
    if image.has_transparency_data and np.ptp(alpha := np.asarray(_in(image, "RGBA").getchannel("A"))):
        levels, image = alpha, _in(_in(image, "RGBA"), "RGB")
        if len(colours := image.getcolors(LABELS) or ()) > 1:
            rgb, seen, hidden = np.asarray(image), alpha > alpha.max() / 2, alpha == 0
            drawn = (rgb != max(colours)[1]).any(2)
            alike = max((drawn & shape).sum() / (drawn | shape).sum() for shape in (seen, ~seen, ~hidden, hidden))
            one = (rgb[~hidden] == rgb[~hidden][0]).all()  # colour that is seen
            # black is seen and white is not: a brush, or white made clear?
            either = hidden.any() and not rgb[seen].any() and (rgb[hidden] == 255).all()
            words = "the shape that the colours draw (save the mask without alpha)"
            require("alpha", (one or alike > 0.5) and not either, words, "another")
    elif image.mode in ("1", "L") or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint16)
    else:
        image = _in(image, "RGB")
        bands, colours = [np.asarray(band) for band in image.split()], image.getcolors(LABELS) if lossless else None
        levels = np.maximum.reduce(bands)
        if colours and levels.min():  # none is black
            background = zip(bands, max(colours)[1], strict=True)
            levels = np.any([band != level for band, level in background], 0).astype(np.uint8)
    require("levels", not cut or not set(np.unique(levels)) - {0, 255}, "black and white in 16 bits a colour", mode)
    found = levels > (0 if lossless and _classes(levels) else max(LABELS, levels.max() / 2 * (levels.min() <= LABELS)))
    if found.any() and not found.all():
        return found
    where = "everywhere" if found.any() else "nowhere"
    raise ValueError(f"as a mask it says defective {where} (mode {mode}, values {levels.min()} to {levels.max()})")


def open_rgb(source: "str | Path | Image.Image | np.ndarray") -> Image.Image:
    """The whole image, upright, RGB. Errors: as `Transform.image`."""
    with _opened(source) as image:
        return _rgb(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header alone unless the image is rotated."""
    with _opened(path) as image:
        if image.format == "PNG" and any(map(Path(path).read_bytes().count, TURNS)):  # it may stand after the pixels
            image.load()
        # The base class's getexif: the PNG one would decode the whole image.
        if Image.Image.getexif(image).get(ExifTags.Base.Orientation) in range(5, 9):
            image = ImageOps.exif_transpose(image)
        return image.size


@dataclass(frozen=True)
class Transform:
    """Resize, then centre crop (Sec. 4.1: 256 to 224, 366 to 320, 512 to 480), pixel for pixel as torchvision on PIL.

    resize: side in pixels before the crop. image_size: side S of the crop, at most ``resize``.
    aspect: "keep" brings the shorter side to ``resize``; "squash" brings both sides there.
    tiles: (rows, columns) of S x S that an image is seen as: everything is so many times as tall and wide, and squashed.
    tile_overlap: pixels that a tile shares with the next one, so that what is seen is so much smaller at each seam.
    """

    resize: int = limited(256, most=2**14)
    image_size: int = 224
    aspect: Literal["keep", "squash"] = "keep"
    tiles: tuple[int, ...] = (1, 1)
    tile_overlap: int = limited(0, least=0)

    def __post_init__(self):
        check_fields(self)
        size = self.image_size
        require("image_size", 1 <= size <= self.resize, f"1 to resize={self.resize} px", size)
        require("tiles", len(self.tiles) == 2 and min(self.tiles) >= 1, "(rows, columns) from 1", self.tiles)
        require("tile_overlap", self.tile_overlap < size, f"less than image_size={size} px", self.tile_overlap)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of what is seen, in pixels."""
        return self._tiled(self.image_size)

    def _tiled(self, side: int) -> tuple[int, int]:
        """(height, width) of the tiles together, ``side`` pixels each."""
        return tuple(n * side - (n - 1) * self.tile_overlap for n in self.tiles)

    def image(self, source: "str | Path | Image.Image | np.ndarray") -> np.ndarray:
        """A file, a PIL image, or an array (H, W, 3) uint8 -> uint8 (S, S, 3), RGB.

        Greyscale is repeated; 16 bits are scaled to 8; transparent pixels show white, as on a page; EXIF rotation is
        applied; of several frames the first is taken. Bilinear with antialias.
        Errors: FileNotFoundError; ValueError for a file that is no image, truncated or too large. Both name the path.
        """
        return self.read(source)[0]

    def read(self, source, name: str | Path = "") -> tuple[np.ndarray, Original]:
        """:meth:`image`, and what the image was before. name: for messages, where the source has no path."""
        with _opened(source, name) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # before TIFF's decoder turns the pixels
            upright = _rgb(image)
            seen = self._crop(self._image(self._resize(upright, Image.Resampling.BILINEAR), name or source))
            return np.asarray(seen), Original(*upright.size, orientation if orientation in range(1, 9) else 1)

    def mask(self, path: str | Path, of: str | Path | None = None) -> np.ndarray:
        """-> bool (S, S), True where defective; nearest neighbour.

        Classes (0/255, 0/1, class numbers, a palette: at most 32 values or colours, or more where they fill areas, in a file that was not
        compressed with loss): what is not 0 or black, or where nothing is black, not the commonest colour; so soft edges of few levels
        count as defective. JPEG, lossy WebP, JPEG's noise saved as PNG, and edges of many levels: above half of the greatest. A shape in
        the alpha channel, where that is not the same everywhere: the same of alpha; refused where a few colours draw another one. Of
        colours with 16 bits, black and white alone. One page.
        of: the image that the mask belongs to.
        Errors: as `image`; ValueError where the whole mask, before any crop, is empty or full.
        """
        with _opened(path) as image:
            resized = self._resize(Image.fromarray(_defective(image).astype(np.uint8)), Image.Resampling.NEAREST)
            return np.asarray(self._crop(self._mask(resized, of or path))).astype(bool)

    def _image(self, image: Image.Image, path: str | Path) -> Image.Image:
        """What happens between resize and crop: nothing here (see :mod:`rcp.data.perturb`)."""
        return image

    def _mask(self, mask: Image.Image, of: str | Path) -> Image.Image:
        return mask

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What the crop shows of an upright image of this size: left, top, right, bottom in the image's own pixels."""
        size = self._resized(width, height)
        left, top, right, bottom = self._box(size)
        x, y = width / size[0], height / size[1]
        return left * x, top * y, right * x, bottom * y

    def _box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        (tall, wide), (width, height) = self.shape, size
        left, top = round((width - wide) / 2), round((height - tall) / 2)
        return left, top, left + wide, top + tall

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        side = self.resize
        if self.aspect == "squash":
            return self._tiled(side)[::-1]
        return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)

    def _resize(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        width, height = image.size
        size = self._resized(width, height)
        if Image.MAX_IMAGE_PIXELS and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            becomes = f"it would become {size[0]} x {size[1]} px"
            raise ValueError(f"at {width} x {height} px it is too long for aspect='keep': {becomes}")
        return image if size == image.size else image.resize(size, resample)

    def _crop(self, image: Image.Image) -> Image.Image:
        return image.crop(self._box(image.size))


def threaded(work: Callable, *items: Iterable) -> Iterator:
    """As ``map``, on all cores (Pillow and numpy free the interpreter); raises the first error in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(work, *items)


def load_images(paths: Sequence[str | Path], transform: Transform) -> np.ndarray:
    """-> uint8 (n, S, S, 3), RGB, in the order of ``paths``.

    Errors: as `Transform.image`, for the first bad file in order.
    """
    if isinstance(paths, str | Path):
        raise ValueError(f"paths must be a list of images, not one path: {paths}; for a folder use load_dataset")
    out = np.empty((len(paths), *transform.shape, 3), np.uint8)
    for i, image in enumerate(threaded(transform.image, paths)):
        out[i] = image
    return out
