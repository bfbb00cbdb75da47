"""Tensors in a file whose content is checked when it is read; nothing is unpickled."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """One safetensors file, written under a temporary name and renamed last. header: of text; a hash of all content joins it."""
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata=header | {"digest": _digest(tensors, header)})
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # which is also that of a full disk
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """-> (header, tensors) of what :func:`write_tensors` wrote. kind: how the header's ``format`` begins.

    Raises:
        ValueError: another file, or one that is damaged; names the file.
    """
    what = kind.removeprefix("rcp-").replace("-", " ")
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
