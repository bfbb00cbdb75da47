"""What was computed, on disk: entries (JSON + npz) and patch features (npy, memory-mapped).

Every one is a folder that is written under a temporary name and renamed last, so a killed process leaves nothing half-written
and any number of processes can share a store. What is damaged is set aside with a warning and computed again.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock

from rcp.checks import check_type
from rcp.files import allocate, scratch, sweep, sync
from rcp.paths import PROJECT, require_disk, require_writable, root_of

FILES = ("result.json", "arrays.npz")  # of an entry


def runs_root(argument: str | Path | None = None) -> Path:
    """Folder of the store and of executed notebooks (``RCP_RUNS``, default ``runs/``)."""
    return root_of(argument, "RCP_RUNS", PROJECT / "runs")


def key_of(identity: dict) -> str:
    """Hash of a JSON-able description; the same for the same content in any order of its names."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


class Store:
    """Folders ``root/KIND/KEY/``; KIND is entries, representations (f) or features, KEY is :func:`key_of` an identity.

    Args:
        root: the store's folder; made when first written.
    """

    def __init__(self, root: str | Path):
        self.root = Path(check_type("the store", str | Path, root))

    def folder(self, kind: str, identity: dict) -> Path:
        return self.root / kind / key_of(identity)

    @contextmanager
    def locked(self, kind: str, identity: dict) -> Iterator[None]:
        """One process at a time for this folder; the others wait and then find it there. The lock goes when a process dies."""
        folder = self.folder(kind, identity)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            yield

    @contextmanager
    def _written(self, folder: Path) -> Iterator[Path]:
        """A temporary folder that is renamed to ``folder`` at the end; nothing is left if something raises."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch(folder) as temporary:
            yield temporary
            os.replace(temporary, folder)

    def sweep(self) -> None:
        """Removes what killed processes left half-written, of any entry."""
        for kind in self.root.glob("[!.]*/"):
            sweep(kind)

    # -- entries and f: JSON and small arrays --------------------------------------------------------------------------

    def load(self, kind: str, identity: dict) -> tuple[dict, dict[str, np.ndarray]] | None:
        """(info, arrays), or None where they are absent or were damaged."""
        return self._sound(self.folder(kind, identity), FILES, _entry)

    def _sound(self, folder: Path, files: Sequence[str], read: Callable):
        """What ``read`` makes of these files of a folder, or None where they are absent or were damaged. read: -> identity, content."""
        try:
            if not os.path.lexists(folder):
                return None
            if not all((folder / name).is_file() for name in files):  # a pipe would never end
                raise ValueError(f"{' or '.join(files)} is missing, or no file")
            identity, content = read(*(folder / name for name in files))
            if key_of(identity) != folder.name:
                raise ValueError("it holds the result of another identity")
            return content
        except Exception as error:  # whatever is wrong with it, it is not used
            self._set_aside(folder, error)
            return None

    def save(self, kind: str, identity: dict, info: dict, arrays: dict[str, np.ndarray]) -> None:
        with self._written(self.folder(kind, identity)) as folder:
            for name, content in zip(FILES, _written_as(info | {"identity": identity}, arrays), strict=True):
                (folder / name).write_bytes(content)
                sync(folder / name)

    # -- patch features ------------------------------------------------------------------------------------------------

    def open_array(self, identity: dict) -> np.ndarray | None:
        """A memory-mapped, read-only array, or None where it is absent or was damaged: its content is read once by each process."""
        return self._sound(self.folder("features", identity), ("features.npy", "identity.json"), _array)

    @contextmanager
    def new_array(self, identity: dict, shape: Sequence[int], dtype: str) -> Iterator[np.ndarray]:
        """A memory map to be filled; it is in the store at the end of the ``with``.

        Raises:
            OSError: the disk has no room; needed and free are named, before anything is computed.
        """
        require_disk(self.root, int(np.prod(shape)) * np.dtype(dtype).itemsize, "patch features")
        with self._written(self.folder("features", identity)) as folder:
            out = np.lib.format.open_memmap(folder / "features.npy", "w+", dtype, tuple(shape))
            with open(folder / "features.npy", "r+b") as file:
                allocate(file, "patch features")
            yield out
            out.flush()
            sync(folder / "features.npy")
            about = identity | {"crc": _crc_of(folder / "features.npy", 0, 0, 0)}
            (folder / "identity.json").write_text(json.dumps(about, indent=1))
            sync(folder / "identity.json")

    def _set_aside(self, folder: Path, error: Exception) -> None:
        if isinstance(error, MemoryError):
            raise MemoryError(f"{folder}: {error}") from error
        of_the_system = isinstance(error, OSError) and error.errno is not None  # a decoder's has no number
        if of_the_system and not isinstance(error, FileNotFoundError):
            raise error  # of this machine at this moment, not of the entry
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".damaged-{folder.name}-"))
        try:
            os.replace(folder, aside / folder.name)
        except FileNotFoundError:  # another process was faster
            aside.rmdir()
            return
        words = f"damaged store entry {folder} set aside as {aside.name} and computed again ({error})"
        warnings.warn(words, stacklevel=4)

    # -- results travel ------------------------------------------------------------------------------------------------

    def finished(self) -> Iterator[tuple[str, dict, dict[str, np.ndarray]]]:
        """(key, info, arrays) of each finished entry; as everywhere, a damaged one is set aside."""
        for folder in sorted((self.root / "entries").glob("[!.]*/")):
            if found := self._sound(folder, FILES, _entry):
                yield folder.name, *found

    def pack(self, file: str | Path, light: bool = False) -> int:
        """Writes the finished entries (JSON, scores, patch scores; no features, no images) into one zip; -> how many.

        Weights go by their name: where they lie is of this machine. light: without patch scores, a hundredth of the size: tables and
        intervals can be drawn from it, maps and ensembles cannot.
        """
        require_writable(file, "pack {} into", b"/result.json")
        file, how, n = Path(file).resolve(), zipfile.ZIP_LZMA if light else zipfile.ZIP_DEFLATED, 0
        with scratch(file) as folder:
            with zipfile.ZipFile(folder / file.name, "w", how) as packed:
                for key, info, arrays in self.finished():
                    if "config" in info:
                        info["config"]["weights"] = Path(info["config"]["weights"]).name
                    if light and "patch_scores" in arrays:
                        info["without"] = {"patch_scores": list(arrays.pop("patch_scores").shape)}
                    for name, content in zip(FILES, _written_as(info, arrays), strict=True):
                        packed.writestr(f"entries/{key}/{name}", content)
                    n += 1
            if not n:
                raise ValueError(f"pack: the store {self.root} has no finished entries")
            os.replace(folder / file.name, file)
        return n

    def unpack(self, file: str | Path) -> tuple[int, int]:
        """Merges a packed file's entries into this store; -> (how many are new, how many there are in the file).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a packed file; an entry is damaged, or its key is not that of its identity. Nothing is merged then.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"unpack: no file {file}")
        try:
            with zipfile.ZipFile(file) as packed:
                names = packed.namelist()
                keys = sorted({m[1] for n in names if (m := re.fullmatch(r"entries/([0-9a-f]{24})/result\.json", n))})
                expected = {f"entries/{k}/{name}" for k in keys for name in FILES}
                if foreign := sorted(set(names) ^ expected) or ["an entry"] * (not keys):
                    raise ValueError(f"{foreign[0]} is missing or does not belong there")
                if sum(member.file_size for member in packed.infolist()) > 100 * Path(file).stat().st_size + 2**28:
                    raise ValueError("it unpacks to more than a hundred times its size")
                found = {k: _checked(*(packed.read(f"entries/{k}/{n}") for n in FILES)) for k in keys}
            if foreign := [key for key, (info, _) in found.items() if key != key_of(info["identity"])]:
                raise ValueError(f"entry {foreign[0]} stands under another key than its identity's")
        except Exception as error:  # whatever zip, JSON and numpy make of a foreign file
            raise ValueError(f"unpack: {file} is not what `pack` writes, or is damaged: {error}") from None
        new = 0
        for info, arrays in found.values():
            identity = info.pop("identity")
            with self.locked("entries", identity):
                there = self.load("entries", identity)
                if there and not _equal(there[1], arrays):
                    warnings.warn(f"other numbers of one entry, kept as they are: {key_of(identity)}", stacklevel=2)
                elif there and len(there[1]) < len(arrays):  # of a light pack
                    shutil.rmtree(self.folder("entries", identity))
                    there = None
                if there is None:
                    self.save("entries", identity, info, arrays)
                    new += 1
        return new, len(found)


def _equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first.keys() & second.keys())


def _written_as(info: dict, arrays: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    """result.json, with the checksum of itself and of the arrays, and arrays.npz."""
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays)
    info = json.loads(json.dumps(info, allow_nan=False))
    return json.dumps(info | {"checksum": _checksum(info, arrays)}, indent=1).encode(), archive.getvalue()


def _entry(*files: Path) -> tuple[dict, tuple[dict, dict[str, np.ndarray]]]:
    info, arrays = _checked(*(file.read_bytes() for file in files))
    return info["identity"], (info, arrays)


def _array(features: Path, about: Path) -> tuple[dict, np.ndarray]:
    array = np.load(features, mmap_mode="r", allow_pickle=False)
    identity, status = json.loads(about.read_text()), features.stat()
    if _crc_of(features, status.st_ino, status.st_size, status.st_mtime_ns) != identity.pop("crc"):
        raise ValueError("features.npy does not match its checksum")
    return identity, array


def _checked(text: bytes, archive: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """result.json and arrays.npz, read and held against their checksum."""
    info = json.loads(text)
    with np.load(io.BytesIO(archive), allow_pickle=False) as file:
        if sum(member.file_size for member in file.zip.infolist()) > 100 * len(archive) + 2**28 or file.zip.testzip():
            raise ValueError("arrays.npz unpacks to more than a hundred times its size, or not to what was packed")
        arrays = dict(file)
    if info["checksum"] != _checksum(info, arrays):
        raise ValueError("result.json and arrays.npz do not match their checksum")
    return info, arrays


def _checksum(info: dict, arrays: dict[str, np.ndarray]) -> str:
    said = {name: value for name, value in info.items() if name != "checksum"}
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True, allow_nan=False).encode(), digest_size=12)
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _crc_of(file: Path, *_stamp: int) -> int:
    """CRC-32 of a file, of half a gigabyte in a quarter of a second: it shows damage, which is all that is asked."""
    crc = 0
    with file.open("rb") as content:
        while part := content.read(2**24):
            crc = zlib.crc32(part, crc)
    return crc
