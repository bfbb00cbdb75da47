"""Where data and weights lie: an argument, else an environment variable, else a folder. And whether the disk has room."""

import mmap
import os
import shutil
from pathlib import Path

import torch

from rcp.checks import require
from rcp.files import scratch

_PARENT = Path(__file__).resolve().parents[1]
PROJECT = _PARENT if (_PARENT / "pyproject.toml").exists() else Path.cwd()  # installed as a package: where one works


def root_of(argument: str | Path | None, variable: str, default: Path) -> Path:
    """The folder named by the argument, else by the environment variable, else ``default``; absolute. Raises ValueError for a file."""
    root = Path(os.path.expanduser(argument or os.environ.get(variable) or default)).absolute()
    require(variable, root.is_dir() or not os.path.lexists(root), "a folder", str(root))
    return root


def data_root(argument: str | Path | None = None) -> Path:
    """Folder of data sets, one sub-folder each (``RCP_DATA``, default ``data/``)."""
    return root_of(argument, "RCP_DATA", PROJECT / "data")


def weights_root(argument: str | Path | None = None) -> Path:
    """Folder that weights given by tag are kept in (``RCP_WEIGHTS``, default torch.hub's own)."""
    return root_of(argument, "RCP_WEIGHTS", Path(torch.hub.get_dir()) / "checkpoints")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a torch device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").is_file():
        return None
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def require_memory(device, patches: int, bank: int, what: str) -> None:
    """Raises MemoryError where ``patches`` bytes and those of their memory ``bank`` do not fit on the device.

    The message gives the bytes needed, the bytes there, and the coreset_ratio that would fit. Silent where the system does not tell.
    """
    free = free_memory(device)
    if free is not None and patches + bank > free:
        fits = int((free / patches - 1) * 1000) / 1000
        advice = f"coreset_ratio={fits} would" if fits > 0 else "no coreset_ratio would; take fewer or smaller images"
        there = f"{(patches + bank) / 1e9:.3g} GB with their memory bank, {free / 1e9:.3g} GB are free on {device}"
        raise MemoryError(f"coreset_ratio: {what} need {there}; {advice}")


def require_writable(file: str | Path, to: str, mark: bytes = b"", appended: bool = False) -> None:
    """Raises OSError before the work where ``file`` could not be written; "no folder FOLDER to ..." where that is why. to: "save {} in".

    Also where it is a folder, a device or a pipe: to rename a file to it would take its place; where it is named as an image, or a file
    that is there does not hold ``mark``, as all do that are written under such a name. appended: it is, not replaced by another.
    """
    from rcp.data.images import IMAGE_SUFFIXES  # which needs this module

    file, there = Path(file), os.path.lexists(file)
    if there and not file.is_file():
        raise OSError(f"{file} is there, and is no file")
    if file.suffix.lower() in IMAGE_SUFFIXES or (there and not holds(file, mark)):
        raise OSError(f"{file} is an image, or not what rcp writes there: give another name, or remove it first")
    if not (folder := file.absolute().parent).is_dir():
        raise FileNotFoundError(f"no folder {folder} to {to.format(file)}")
    if there:
        file.open("ab").close()
    if there and appended:
        return
    try:
        with scratch(file.resolve()) as beside:
            (beside / file.name).touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def holds(file: Path, mark: bytes) -> bool:
    """Whether the bytes are somewhere in a file, or it is empty."""
    with file.open("rb") as opened:
        return not file.stat().st_size or mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ).find(mark) >= 0


def require_disk(folder: str | Path, needed: int, what: str) -> None:
    """Raises OSError, naming needed and free bytes, where the disk of ``folder`` has no room for ``needed`` bytes of ``what``."""
    resolved = Path(folder).resolve()
    free = shutil.disk_usage(next(p for p in (resolved, *resolved.parents) if p.exists())).free
    if free < needed:
        raise OSError(f"no disk space in {folder}: {what} need {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
