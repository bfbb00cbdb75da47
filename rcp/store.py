"""What was computed, on disk: small cells (JSON + npz) and large features (npy, memory-mapped).

Every entry is a folder that is written under a temporary name and renamed last, so a killed run leaves nothing half-written
and any number of processes can share a store. A damaged entry is set aside with a warning and computed again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock


def key_of(identity: dict) -> str:
    """Hash of a JSON-able description; the same for the same content in any order of its names."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


class Store:
    """Entries under ``root/KIND/KEY/``.

    Args:
        root: the store's folder; made when first written.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def folder(self, kind: str, identity: dict) -> Path:
        return self.root / kind / key_of(identity)

    @contextmanager
    def locked(self, kind: str, identity: dict):
        """One process at a time for this entry; the others wait and then find it there. The lock goes when a process dies."""
        folder = self.folder(kind, identity)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            yield folder

    def write(self, folder: Path, fill: Callable[[Path], None]) -> None:
        """Calls ``fill(temporary folder)`` and renames it to ``folder``; nothing is left if it raises."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            fill(temporary)
            temporary.chmod(0o755)  # mkdtemp's 0700 would lock others out of a shared store
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    # -- cells ---------------------------------------------------------------------------------------------------------

    def load_cell(self, identity: dict) -> tuple[dict, dict[str, np.ndarray]] | None:
        """(result, arrays) of a cell, or None where it is absent or was damaged."""
        return self.load_entry("cells", identity)

    def save_cell(self, identity: dict, result: dict, arrays: dict[str, np.ndarray]) -> None:
        self.save_entry("cells", identity, result, arrays)

    def load_entry(self, kind: str, identity: dict) -> tuple[dict, dict[str, np.ndarray]] | None:
        folder = self.folder(kind, identity)
        if not folder.exists():
            return None
        try:
            result = json.loads((folder / "result.json").read_text())
            with np.load(folder / "arrays.npz", allow_pickle=False) as file:
                arrays = dict(file)
            if result["checksum"] != _checksum(arrays):
                raise ValueError("arrays.npz does not match its checksum")
            return result, arrays
        except Exception as error:  # whatever is wrong with it, it is not used
            self._set_aside(folder, error)
            return None

    def save_entry(self, kind: str, identity: dict, result: dict, arrays: dict[str, np.ndarray]) -> None:
        def fill(folder: Path):
            np.savez_compressed(folder / "arrays.npz", **arrays)
            content = result | {"identity": identity, "checksum": _checksum(arrays)}
            (folder / "result.json").write_text(json.dumps(content, indent=1, allow_nan=False))

        self.write(self.folder(kind, identity), fill)

    # -- features ------------------------------------------------------------------------------------------------------

    def features(
        self, identity: dict, shape: tuple[int, ...], dtype: str, compute: Callable[[np.ndarray], None]
    ) -> np.ndarray:
        """A memory-mapped, read-only array; ``compute(out)`` fills it where it is absent. Its size and type are checked, not its content.

        Raises:
            OSError: the disk has no room; needed and free are named, before anything is computed.
        """
        with self.locked("features", identity) as folder:
            found = self._open_features(folder, shape, dtype)
            if found is None:
                for abandoned in folder.parent.glob(f".{folder.name}.*/"):  # by a process that was killed
                    shutil.rmtree(abandoned, ignore_errors=True)
                require_disk(self.root, int(np.prod(shape)) * np.dtype(dtype).itemsize, "patch features")

                def fill(temporary: Path):
                    out = np.lib.format.open_memmap(temporary / "features.npy", "w+", dtype, shape)
                    compute(out)
                    out.flush()
                    (temporary / "identity.json").write_text(json.dumps(identity, indent=1))

                self.write(folder, fill)
                found = self._open_features(folder, shape, dtype)
        return found

    def _open_features(self, folder: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
        if not folder.exists():
            return None
        try:
            array = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
            json.loads((folder / "identity.json").read_text())
            if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
                raise ValueError(f"features.npy holds {array.shape} {array.dtype}, expected {tuple(shape)} {dtype}")
            return array
        except Exception as error:
            self._set_aside(folder, error)
            return None

    def _set_aside(self, folder: Path, error: Exception) -> None:
        if isinstance(error, PermissionError | MemoryError):
            raise error
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".damaged-{folder.name}-"))
        try:
            os.replace(folder, aside)
        except FileNotFoundError:  # another process was faster
            aside.rmdir()
            return
        warnings.warn(
            f"damaged store entry {folder} set aside as {aside.name} and computed again ({error})", stacklevel=4
        )


def require_disk(folder: str | Path, needed: int, what: str) -> None:
    """Raises OSError, naming needed and free bytes, where the disk of ``folder`` has no room for ``needed`` bytes of ``what``."""
    there = Path(folder).resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"no disk space in {folder}: {what} need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
