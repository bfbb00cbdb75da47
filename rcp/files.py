"""Tensors in a file whose content is checked when it is read; nothing is unpickled."""

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """One safetensors file, written under a temporary name and renamed last. header: of text; a hash of all content joins it."""
    path = Path(path).resolve()  # a link stays one
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        with scratch(path) as folder:
            save_file(tensors, folder / path.name, metadata=header | {"digest": _digest(tensors, header)})
            (folder / path.name).chmod(folder.stat().st_mode & 0o666)  # safetensors' own is its owner's alone
            sync(folder / path.name)
            os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:  # which is also that of a full disk
        raise OSError(f"{path} could not be written ({error})") from error


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """-> (header, tensors) of what :func:`write_tensors` wrote. kind: how the header's ``format`` begins.

    Raises:
        ValueError: another file, or one that is damaged; names the file.
    """
    what = kind.removeprefix("rcp-").replace("-", " ")
    open(path, "rb").close()  # of one that may not be read, safetensors says that it is not there
    try:
        with safe_open(path, "pt") as file:
            header = dict(file.metadata() or {})
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118 - of the file itself it is a map
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not a {what} saved by rcp, or is damaged ({error})") from None
    digest, format_ = header.pop("digest", None), header.get("format")
    if format_ != f"{kind}-2":
        raise ValueError(f"{path} is not a {what} saved by rcp, or is damaged (format {format_!r})")
    if digest != _digest(tensors, header):
        raise ValueError(f"{path} is damaged: its content is not what was written")
    for name, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise ValueError(f"{path} is damaged: {name} holds NaN or infinity")
    return header, tensors


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``, to write in and rename from; it goes at the end, as does what killed processes left."""
    sweep(target.parent, glob.escape(target.name[:50]))
    held = None
    while held is None:
        folder = target.with_name(f".{target.name[:50]}.rcp-{secrets.token_hex(4)}")
        folder.mkdir()
        with suppress(FileNotFoundError):  # another's sweep came between the two lines, or the next two
            held = os.open(folder, os.O_RDONLY)
            if hold(held) is False or not folder.exists():
                held = os.close(held)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def sweep(folder: Path, name: str = "*") -> None:
    """Removes what :func:`scratch` left in a folder where its process was killed. name: of the targets, as a pattern."""
    for left in folder.glob(f".{name}.rcp-{'[0-9a-f]' * 8}/"):
        with suppress(OSError):  # another was faster
            held = os.open(left, os.O_RDONLY)
            if hold(held):
                shutil.rmtree(left, ignore_errors=True)
            os.close(held)


def hold(file: int) -> bool | None:
    """Takes the lock of an open file or folder, which goes with the process: whether it could; None where there are no such locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def stamp(path: Path) -> tuple[int, ...]:
    """What differs where a file's content may: inode, size and times, that of its last change of any kind included."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def file_hash(path: str | Path, algorithm: str | Callable = "blake2b"):
    """hashlib's hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm)


def allocate(file, what: str) -> None:
    """Has the disk give all space of an open file now: a disk that is full later kills the process (SIGBUS) where a map of it is written.

    Raises:
        OSError: it has not so much; names ``what`` and the size.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise OSError(error.errno, f"no disk space: {what} need {size / 1e9:.3g} GB ({error.strerror})") from error


def sync(path: Path) -> None:
    """Has the file's content on the disk before it is renamed: else a power cut can leave an empty file under the right name."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _digest(tensors: Mapping[str, Tensor], header: dict[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
