"""MVTec AD, BTAD, VisA and own folders behind one dataset type (Sec. 4.1): which images, which label, which mask."""

import csv
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from itertools import groupby
from pathlib import Path
from unicodedata import normalize

import numpy as np

from rcp.checks import check_names, check_type, require
from rcp.data.images import IMAGE_SUFFIXES, Transform, image_size, named_as_image, threaded
from rcp.files import file_hash, stamp

# Of files that are no images.
BESIDE = (".txt", ".md", ".csv", ".json", ".jsonl", ".xml", ".html", ".pdf", ".db", ".ini", ".rcp")
VISA_TABLE = "split_csv/1cls.csv"
NORMAL = ("good", "ok", "normal")  # names of folders of normal images; a Split calls them all "good"


@dataclass(frozen=True, eq=False, repr=False)
class Split(Sequence):
    """Images of one split, a sequence of n paths; a slice is a Split again.

    labels: int64 (n,), 0 normal, 1 defective. defects: kind of defect per image, "good" where normal.
    masks: path of the ground truth per image, None for normal images and where there is none.
    """

    paths: tuple[Path, ...]
    labels: np.ndarray
    defects: tuple[str, ...]
    masks: tuple[Path | None, ...]

    def __post_init__(self):
        labels = np.asarray(check_type("labels", np.ndarray, self.labels))
        require("labels", labels.ndim == 1 and np.isin(labels, (0, 1)).all(), "one 0 or 1 for each image", self.labels)
        labels = labels.astype(np.int64)
        labels.flags.writeable = False
        object.__setattr__(self, "labels", labels)
        lengths = len(self.paths), len(labels), len(self.defects), len(self.masks)
        require("paths, labels, defects and masks", len(set(lengths)) == 1, "one length", lengths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Split(self.paths[index], self.labels[index], self.defects[index], self.masks[index])
        return self.paths[index]

    def __repr__(self) -> str:
        bad = int(self.labels.sum())
        return f"Split({len(self)} images: {len(self) - bad} good, {bad} defective{', masks' * self.has_masks})"

    @property
    def has_masks(self) -> bool:
        """Whether pixel metrics are possible: there are defective images, and each has its ground truth."""
        bad = [mask for mask, label in zip(self.masks, self.labels, strict=True) if label]
        return bool(bad) and None not in bad

    def load_masks(self, transform: Transform) -> np.ndarray:
        """-> bool (n, S, S), True where defective, all False for normal images.

        Errors: ValueError naming a defective image without ground truth, or an unreadable mask.
        """

        def read(path: Path, mask: Path | None, defective: bool) -> np.ndarray | bool:
            if mask is None and defective:
                raise ValueError(f"no ground truth for the defective image {path}: pixel metrics are undefined")
            return False if mask is None else transform.mask(mask, path)

        out = np.zeros((len(self), *transform.shape), bool)
        for i, mask in enumerate(threaded(read, self.paths, self.masks, self.labels)):
            out[i] = mask
        if large := [path for path, mask in zip(self.masks, out, strict=True) if mask.mean() > 0.8]:
            found = f"{len(large)} of {len(self)} images, such as {large[0]}"
            warnings.warn(f"masks of more than 80 % of the image (inverted?): {found}", stacklevel=2)
        return out


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """One category: normal images to train on, and labelled ones to test on.

    root: the folder that was asked for. layout: "mvtec", "btad", "visa" or "own". folder: the category's own folder.
    """

    root: Path
    layout: str
    category: str
    train: Split
    test: Split
    folder: Path = field(kw_only=True)

    def __repr__(self) -> str:
        return f"Dataset({self.category!r}, layout={self.layout!r}, train={self.train}, test={self.test})"

    def fingerprint(self) -> str:
        """Identity of the data, 32 hex digits: names, labels and content of all images and masks, not their place.

        Reads the files once per process, and again if the size or time of one of them has changed.
        """
        files = []
        for role, split in (("train", self.train), ("test", self.test)):
            for path, defect, mask in zip(split.paths, split.defects, split.masks, strict=True):
                files += [(f"{role}\0{defect}", path)] + ([(f"mask\0{defect}", mask)] if mask else [])
        named = [(f"{kind}\0{Path(os.path.relpath(path, self.folder)).as_posix()}", path) for kind, path in files]
        return content_hash(sorted(named))


def content_hash(named: Sequence[tuple[str, Path]]) -> str:
    """32 hex digits of names and content; files are read once by a process, and again where a size or time has changed."""
    return _content_hash(tuple((name, path, *stamp(path)) for name, path in named))


@lru_cache(maxsize=64)
def _content_hash(files: tuple[tuple, ...]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for (name, *_), digest in zip(files, threaded(lambda file: file_hash(file[1]).digest(), files), strict=True):
        total.update(hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest() + digest)
    return total.hexdigest()


# ---- finding images and masks -------------------------------------------------------------------------


def _natural(path: Path) -> tuple:
    """Sort key: 2.png before 10.png; the name itself decides between 1.png and 01.png."""
    parts = enumerate(re.split(r"([0-9]+)", path.name.casefold()))
    return [int(part) if i % 2 else part for i, part in parts], path.name


def images_in(folder: Path) -> list[Path]:
    """Images directly in a folder (none if it is absent), in natural order."""
    found = sorted(filter(named_as_image, folder.iterdir()), key=_natural) if folder.is_dir() else []
    for path in found:
        if not path.is_file():
            raise ValueError(f"named like an image, but no file (a folder, a pipe, a broken link): {path}")
    return found


def _of_a_system(name: str) -> bool:
    """Folders that a file manager, an editor or a file server leaves: .ipynb_checkpoints, @eaDir, __MACOSX."""
    return name.startswith(".") or name in ("@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "__MACOSX")


def _files_below(folder: Path) -> list[Path]:
    found, seen = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        whose = {name: os.path.realpath(Path(at, name)) for name in folders if not _of_a_system(name)}
        folders[:] = [name for name, of in whose.items() if of not in seen]  # a link may lead back
        seen |= {os.path.realpath(at), *whose.values()}
        found += [Path(at, f) for f in files if not f.startswith(".")]
    return found


def _images_below(folder: Path) -> list[Path]:
    return list(filter(named_as_image, _files_below(folder)))


def _folders(folder: Path) -> list[Path]:
    found = sorted((p for p in folder.glob("*") if p.is_dir() and not _of_a_system(p.name)), key=_natural)
    for one in found:
        os.scandir(one).close()  # raises where it may not be read, which would count as empty
    return found


def composed(name: str) -> str:
    """A name in Unicode's composed form: archives of some systems hold the decomposed one."""
    return normalize("NFC", name)


def say_what_is_left_out(folder: Path, used: Iterable[Path], there: Iterable[Path] = ()) -> None:
    """Warns, once, of files that are not used: in folders that mean nothing here, masks of no image, or of a kind that is not read.

    there: the files that are meant; all below the folder where it is empty.
    """
    used, there = set(used), list(there) or _files_below(folder)
    left = [p.relative_to(folder) for p in there if p not in used and p.suffix.lower() not in BESIDE]
    if places := Counter(f"{p.parent.as_posix()}/*{p.suffix.lower()}" for p in left):
        listed = ", ".join(f"{n} of {place}" for place, n in sorted(places.items(), key=lambda p: (-p[1], p[0]))[:8])
        more = f" and {len(places) - 8} more places" if len(places) > 8 else ""
        warnings.warn(f"files left out of {folder}: {listed}{more}", stacklevel=3)


def _masks_of(kind: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """Image -> its mask in ``kind``: of the image's name with ``_mask``, or else of its name; any suffix."""
    masks: dict[str, list[Path]] = {}
    for path in images_in(kind):
        masks.setdefault(composed(path.stem), []).append(path)
    image_of: dict[Path, Path] = {}
    stems = {composed(image.stem) for image in images}
    for image in images:
        stem = composed(image.stem)
        of_another = stem.endswith("_mask") and stem.removesuffix("_mask") in stems
        own = masks.get(f"{stem}_mask", []) + ([] if of_another else masks.get(stem, []))
        if len(own) > 1:
            raise ValueError(f"two masks for one image: {' and '.join(map(str, sorted(own, key=_natural)[:2]))}")
        for mask in own:
            if mask in image_of:
                raise ValueError(f"two images for one mask, {mask}: {image_of[mask]} and {image}")
            image_of[mask] = image
    return {image: mask for mask, image in image_of.items()}


def _check_masks(test: Split) -> None:
    """Every defective image has a mask of its own size, or none has one at all."""
    pairs = [(p, m) for p, m, label in zip(test.paths, test.masks, test.labels, strict=True) if label]
    if all(mask is None for _, mask in pairs):
        return
    shared = [m for m, n in Counter(m for pair in pairs for m in pair if m and m.is_file()).items() if n > 1]
    require("mask", not shared, "one of one image alone", shared[:1])
    for image, mask in pairs:
        if mask is None or not mask.is_file():
            raise ValueError(f"no mask for the defective image {image}: looked for {mask or 'its entry in the table'}")
        sizes = [image_size(path) for path in (mask, image)]
        if sizes[0] != sizes[1]:
            found = ", ".join(f"{path} is {w} x {h}" for path, (w, h) in zip((mask, image), sizes, strict=True))
            raise ValueError(f"mask and image differ in size (width x height, after EXIF rotation): {found}")


def _middle(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(file.stat().st_size // 2)
        return opened.read(4096)


def _say_twice(train: Split, test: Split) -> None:
    """Warns, once, of images whose bytes are another's of another label too; all is read of those alone whose size and middle are."""
    of = {**dict.fromkeys(train, "train"), **dict(zip(test, test.defects, strict=True))}
    for same in (os.path.getsize, _middle, lambda file: file_hash(file).digest()):
        alike = [list(files) for _, files in groupby(sorted(of, key=same), same)]
        of = {file: of[file] for files in alike if len({of[f] for f in files}) > 1 for file in files}
    if of:
        words = f"images that are there twice, to train and to test on or under two labels: {len(of)} files"
        warnings.warn(f"{words}, such as {' and '.join(map(str, [*of][:: len(of) - 1]))}", stacklevel=3)


def _split(rows: Iterable[tuple[Path, str, Path | None]]) -> Split:
    """(path, defect or "good", mask) of each image -> Split."""
    paths, defects, masks = zip(*rows, strict=True) if rows else ((), (), ())
    return Split(paths, np.array([defect != "good" for defect in defects]), defects, masks)


# ---- the layouts ----------------------------------------------------------------------------------------


def _read_tree(folder: Path) -> tuple[Split, Split]:
    """train/ and test/ of MVTec AD, BTAD and own folders; or a plain folder of normal images."""
    train_folder, truth = folder / "train", folder / "ground_truth"
    if not train_folder.is_dir():
        return _split([(path, "good", None) for path in images_in(folder)]), _split([])
    sources = [train_folder, *(f for f in _folders(train_folder) if f.name.lower() in NORMAL)]
    train = [(path, "good", None) for source in sources for path in images_in(source)]

    if unlabelled := images_in(folder / "test"):
        raise ValueError(f"test image without label: {unlabelled[0]}; move it to test/good/ or to test/NAME_OF_DEFECT/")
    truth_exists, truths = bool(_images_below(truth)), {composed(f.name): f for f in _folders(truth)}
    test: list[tuple[Path, str, Path | None]] = []
    for kind in _folders(folder / "test"):
        if kind.name.lower() in NORMAL:
            test += [(path, "good", None) for path in images_in(kind)]
            continue
        of_kind = truths.get(composed(kind.name), truth / kind.name)
        nested = not images_in(of_kind) and any(map(_images_below, _folders(of_kind)))
        require("ground_truth", not nested, "no folder for each image (MVTec LOCO's layout is not known)", str(of_kind))
        masks = _masks_of(of_kind, images_in(kind))
        for path in images_in(kind):
            looked_for = truth / kind.name / f"{path.stem}_mask.png" if truth_exists else None
            test.append((path, kind.name, masks.get(path, looked_for)))
    if unknown := [f.name for f in _folders(folder) if not test and f.name.startswith("test_") and _images_below(f)]:
        why = "a layout (MVTec AD 2's?) that is not known; rename or link one of them"
        raise ValueError(f"{folder} has no test/, but {', '.join(unknown)}: {why}")
    return _split(train), _split(test)


def _read_visa(folder: Path) -> tuple[Split, Split]:
    """The 1-class split of VisA; its CSV gives paths relative to the root."""
    table = folder.parent / VISA_TABLE
    require("split", table.is_file(), "a table that is a file", str(table))  # a pipe would be waited for
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names, rows = reader.fieldnames or (), [row for row in reader if row.get("object") == folder.name]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is no CSV in UTF-8 ({error})") from None
    if missing := [name for name in ("image", "label", "mask", "object", "split") if names.count(name) != 1]:
        raise ValueError(f"{table} has no column {', '.join(missing)}, or several; its columns are {names}")
    truth_exists = any((folder.parent / row["mask"]).is_file() for row in rows if row["mask"])
    splits: dict[str, list] = {"train": [], "test": []}
    for row in rows:
        named = [Path(row[name] or "") for name in ("image", "mask")]
        if not row["image"] or any(path.is_absolute() or ".." in path.parts for path in named):
            raise ValueError(f"{table}: expected paths inside {folder.parent}, got {row['image']!r}, {row['mask']!r}")
        path, split, label = folder.parent / row["image"], row["split"], row["label"]
        fits = (split, label) in (("train", "normal"), ("test", "normal"), ("test", "anomaly"))
        require(f"{table}: {row['image']}", fits, "train normal, test normal or anomaly", (split, label))
        if not path.is_file():
            raise FileNotFoundError(f"no such image: {path}, listed in {table}")
        mask = folder.parent / row["mask"] if label == "anomaly" and row["mask"] and truth_exists else None
        splits[split].append((path, "good" if label == "normal" else label, mask))
    again = [str(p) for p, n in Counter(p for listed in splits.values() for p, *_ in listed).items() if n > 1]
    require(str(table), not again, "each image once", again[:1])
    for listed in splits.values():
        listed.sort(key=lambda row: (row[1] == "good", _natural(row[0])))
    return _split(splits["train"]), _split(splits["test"])


# What a category's folder holds (``/``: a folder), and how that is said; detection takes the first that fits.
LAYOUTS = {
    "visa": (("Data/Images/", f"../{VISA_TABLE}"), f"{VISA_TABLE} beside CATEGORY/Data/Images"),
    "mvtec": (("train/good/", "test/"), "CATEGORY/train/good and CATEGORY/test"),
    "btad": (("train/ok/", "test/[ok][ko]/"), "CATEGORY/train/ok and CATEGORY/test/ok or ko"),
    "own": (("train/",), "train (images in it, or in train/good, ok, normal), or CATEGORY/train, or images themselves"),
}


def _fits(folder: Path, layout: str) -> bool:
    """Whether it is the folder of one category."""
    return all(glob(pattern, root_dir=folder) for pattern in LAYOUTS[layout][0])


def _find(root: Path, layout: str) -> tuple[str, dict[str, Path]]:
    """Layout of a folder, and the folder of each category: the root itself, or those below it."""
    check_names("unknown layout", [layout], ["auto", *LAYOUTS])
    if not root.exists():
        raise FileNotFoundError(f"no such data folder: {root}")
    if not root.is_dir():
        raise ValueError(f"the data folder is a file: {root}; if it is an archive, unpack it first")
    wanted = LAYOUTS if layout == "auto" else [layout]
    for name in wanted:
        if _fits(root, name):
            return name, {root.name: root}
        there = [folder for folder in _folders(root) if _fits(folder, name)]
        if found := {composed(folder.name): folder for folder in there}:
            require("root", len(found) == len(there), "names that differ in more than their Unicode form", str(root))
            others = [folder.name for folder in _folders(root) if folder not in there and _images_below(folder)]
            if others := others + [p.name for p in sorted(root.iterdir(), key=_natural) if named_as_image(p)]:
                warnings.warn(f"left out of {root}, for they are not {name}: {', '.join(others)}", stacklevel=3)
            return name, found
    if "own" in wanted and images_in(root):
        return "own", {root.name: root}

    there = [p.name + "/" * p.is_dir() for p in sorted(root.iterdir(), key=_natural)]
    listed = ", ".join(there[:12]) + (f" and {len(there) - 12} more" if len(there) > 12 else "") or "nothing"
    looked_for = "".join(f"\n  {name}: {LAYOUTS[name][1]}" for name in wanted)
    deeper = [p for p in _folders(root) if any(_fits(f, name) for f in _folders(p) for name in wanted)]
    deeper += [f for f in _folders(root) if f.name.lower() in NORMAL and any(map(named_as_image, f.glob("*")))]
    hint = f"\nDid you mean {deeper[0]}?" if deeper else ""
    raise ValueError(f"no known layout in {root}. Looked for{looked_for}\nFound: {listed}{hint}")


def _absolute(root: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(root)))  # not resolve(): a link's own name is the category's


def categories(root: str | Path, layout: str = "auto") -> list[str]:
    """Names of the categories in a data folder, in natural order. Errors: as `load_dataset`."""
    return list(_find(_absolute(root), layout)[1])


def load_dataset(root: str | Path, category: str | None = None, layout: str = "auto") -> Dataset:
    """One category of MVTec AD, BTAD, VisA, or of an own folder.

    root: folder of the categories, or of one of them. category: may be left out where there is only one.
    layout: "mvtec", "btad", "visa" or "own", or "auto" to detect it. An own folder holds ``train`` (normal images, in
    it or in its ``good``, ``ok`` or ``normal``), optionally ``test/good`` (or ok, normal), ``test/KIND_OF_DEFECT`` and
    ``ground_truth/KIND_OF_DEFECT``; a plain folder of images is training data alone. A mask bears its image's name,
    with or without ``_mask``, and any image extension. Without any ground truth, ``test.has_masks`` is False.

    Images that are in neither split are warned of, by place and number; so are images that are named as masks of others.

    Errors, all before any image is decoded and each naming the path: FileNotFoundError if there is no such folder;
    ValueError for an unknown layout or category, no training images, a test image without label, a defective
    image without mask where others have one, a mask whose size is not its image's.
    """
    root = _absolute(root)
    name, folders = _find(root, layout)
    if category is None and len(folders) > 1:
        raise ValueError(
            f"{root} holds {len(folders)} categories; name one with category=: {', '.join(folders)}; or give its folder"
        )
    if category is None and name == "own" and images_in(root) and root not in folders.values():
        raise ValueError(f"{root} holds images and {next(iter(folders))}/, a data set: name the one that is meant")
    category = next(iter(folders)) if category is None else composed(str(category))
    check_names(f"{root} (layout {name}) has no category", [category], folders)
    folder = folders[category]
    train, test = (_read_visa if name == "visa" else _read_tree)(folder)
    if not train:
        where = folder.parent / VISA_TABLE if name == "visa" else folder / "train"
        looked_for = f"{', '.join(IMAGE_SUFFIXES)}, directly or in {', '.join(NORMAL)}"
        raise ValueError(f"no training images of {category!r} in {where}: looked for {looked_for}")
    _check_masks(test)
    _say_twice(train, test)
    alone = {p.parent / composed(p.stem) for s in (train, test) for p, m in zip(s, s.masks, strict=True) if not m}
    if odd := [p for p in alone if p.name.endswith("_mask") and p.parent / p.name.removesuffix("_mask") in alone]:
        warnings.warn(f"named as masks, but read as images: {len(odd)}, such as {min(odd)}.*", stacklevel=2)
    say_what_is_left_out(folder, [*train, *test, *test.masks])
    return Dataset(root, name, category, train, test, folder=folder)
