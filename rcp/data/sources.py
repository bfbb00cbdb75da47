"""What ``fit`` and ``predict`` take, read a few images at a time: paths, folders, patterns, PIL images, arrays, lists, generators."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from rcp.checks import check_type, require
from rcp.data.images import IMAGE_SUFFIXES, Original, Transform, named_as_image, threaded
from rcp.data.layouts import Dataset, Split, images_in, load_dataset, say_what_is_left_out


def images_of(given, *, train: bool = False) -> Iterable:
    """One image after the other, each a path, a PIL image or an array (H, W, 3) uint8, of whatever names them.

    given: a path, a folder, a pattern such as "line1/*.png", one of those images, an array (n, H, W, 3), an iterable, or a data set.
    train: of a data set or of a folder that holds ``train/``, the training images.

    Raises:
        FileNotFoundError, ValueError: nothing there; a folder without images, with what it holds instead; something else.
    """
    if isinstance(given, Dataset):
        return given.train if train else given.test
    if isinstance(given, str | Path):
        return _at(Path(os.path.expanduser(check_type("images", str | Path, given))), train)
    if isinstance(given, Image.Image):
        return [given]
    if isinstance(given, np.ndarray):
        require("images", given.ndim in (3, 4), "an array (H, W, 3) or (n, H, W, 3)", given.shape)
        return given if given.ndim == 4 else [given]
    defective = int(given.labels.sum()) if train and isinstance(given, Split) else 0
    require("images", not defective, "images without defects to train on", f"{defective} that are labelled defective")
    require("images", isinstance(given, Iterable) and not isinstance(given, bytes | dict), _EXPECTED, given)
    return given


_EXPECTED = "a path, a folder, a pattern, PIL images, arrays (H, W, 3), or a list or generator of those"


def _at(path: Path, train: bool) -> Iterable[Path]:
    if path.is_dir():
        if train:
            return load_dataset(path).train
        if found := images_in(path):
            say_what_is_left_out(path, found)
            return found
        kinds = Counter(p.suffix.lower() or "no suffix" for p in path.rglob("*") if p.is_file())
        there = ", ".join(f"{n} of {suffix}" for suffix, n in kinds.most_common(6)) or "nothing"
        hint = f"; for its sub-folders: {path}/**/*" if any(map(named_as_image, path.rglob("*"))) else ""
        raise ValueError(f"no image in {path} (of {', '.join(IMAGE_SUFFIXES)}); it holds {there}{hint}")
    if not path.exists() and glob.has_magic(str(path)):
        base = next(p for p in path.parents if p.is_dir())  # brackets in its name are no pattern
        there = [base / n for n in {*glob.glob(str(path.relative_to(base)), root_dir=base, recursive=True)}]
        found = sorted(filter(named_as_image, there))
        require("images", bool(found), "a pattern that fits some image", str(path))
        say_what_is_left_out(base, found, filter(Path.is_file, there))
        return found
    if not path.exists():
        raise FileNotFoundError(f"no such image or folder: {path}")
    return [path]


def _name_of_pixels(image) -> str:
    """The file that a PIL image was opened from, as text: it may have been changed since."""
    name = getattr(image, "filename", "") if isinstance(image, Image.Image) else ""
    return name if isinstance(name, str) else ""


def batches(images: Iterable, transform: Transform, at_a_time: int, skipped: list | None = None) -> Iterator[tuple]:
    """Reads images as :func:`images_of` gives them, so many at a time, on all cores.

    Yields what a detector sees: each one's path, or text of pixels ("image 3", or a file's); (n, S, S, 3) uint8; their sizes before.
    skipped: receives (name, reason) of each unreadable one, which is left out; where None, it raises.
    """

    def read(image, name: Path | str) -> tuple[np.ndarray, Original] | Exception:
        try:
            return transform.read(image, name)
        except (ValueError, OSError) as error:
            return error

    def drawn() -> Iterator[tuple]:
        for i, image in enumerate(images):
            of_file = isinstance(image, str | Path)
            name = Path(image) if of_file else _name_of_pixels(image) or f"image {i}"
            yield name, None if of_file else read(image, name)  # pixels at once: a generator may use their memory again

    given = drawn()
    while some := list(islice(given, at_a_time)):
        names = [name for name, _ in some]
        found = list(threaded(lambda name, done: done or read(name, name), *zip(*some, strict=True)))
        bad = [(name, f) for name, f in zip(names, found, strict=True) if isinstance(f, Exception)]
        if bad and skipped is None:
            raise bad[0][1]
        if bad:
            skipped += [(name, str(f)) for name, f in bad]
        good = [(n, *f) for n, f in zip(names, found, strict=True) if not isinstance(f, Exception)]
        if good:
            names, pixels, originals = zip(*good, strict=True)
            yield list(names), np.stack(pixels), list(originals)
