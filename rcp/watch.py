"""Scores every new image of a folder once, as long as it runs: bounded memory, half-written files wait, a restart goes on where it was."""

import json
import os
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from rcp.checks import checked, require
from rcp.data.images import named_as_image
from rcp.data.layouts import BESIDE
from rcp.detector import ReConPatch
from rcp.files import hold
from rcp.paths import require_writable

GIVEN_UP = 10  # looks at an unreadable file that no longer changes, before it is reported as such
KEPT = 100_000  # images that are remembered though their files are gone: about 10 MB


@checked
def watch(
    detector: ReConPatch, folder: Path, log: Path, seconds: float = 1.0, looks: int | None = None
) -> Iterator[dict]:
    """Yields a record of each new image, after it was appended to ``log`` as a line of JSON.

    A file is one image as long as its inode, size and time stay: renamed it is not scored again, written anew it is. It is scored
    once two looks found it the same and it can be read. What the log holds already is done.

    Args:
        log: JSON lines; a last line that was cut by a kill is removed.
        seconds: between two looks. looks: how many, then it ends; None goes on.

    Raises:
        ValueError: no such folder, also where it vanishes; ``log`` is no such log, or another watch's; fewer than two looks.
    """
    require("folder", folder.is_dir(), "a folder that is there", str(folder))
    require("seconds", seconds <= 10**6, "at most a million", seconds)
    if log.absolute().parent.is_dir() and not os.path.lexists(log) and not named_as_image(log):
        log.touch()  # which require_writable would remove again, from under another watch's lock
    require_writable(log, "log in {}")
    with log.open("a") as lock:
        alone = hold(lock.fileno()) is not False and log.exists()  # another's start may have removed it
        alone = alone and os.path.samestat(os.fstat(lock.fileno()), log.stat())
        require("log", alone, "one that no other watch writes", str(log))
        yield from _look(detector, folder, log, seconds, looks)


def _look(detector: ReConPatch, folder: Path, log: Path, seconds: float, looks: int | None) -> Iterator[dict]:
    done, waiting, _ = _done(log), {}, detector.extractor  # weights that cannot be had are no fault of an image
    said: set[str] = set()
    while looks is None or looks > 0:
        require("folder", folder.is_dir(), "a folder that is there", str(folder))
        there, again = dict(_files(folder)), {}
        if left := {_kind(p) for p in folder.iterdir() if p not in there and _kind(p)} - said:
            said |= left
            warnings.warn(f"not watched in {folder}: {', '.join(sorted(left))}", stacklevel=3)
        if len(done) > KEPT + len(there):
            done = dict.fromkeys(done.keys() & set(there.values()))
        for path, key in there.items():
            if key in done:
                continue
            before, same = waiting.get(path, (None, 0))
            again[path] = (key, same + 1 if before == key else 0)
            if again[path][1] and (found := _scored(detector, path, key, again[path][1])):
                with log.open("a") as file:  # one write: a kill leaves all of the line or a cut one
                    file.write(json.dumps(found | {"key": key}) + "\n")
                done[key] = None
                yield found
        waiting, looks = again, None if looks is None else looks - 1
        time.sleep(seconds)


def _kind(path: Path) -> str:
    """What to call what is not watched: a suffix, or that it is no file; "" for what lies beside images."""
    if path.name.startswith(".") or path.suffix.lower() in BESIDE or (named_as_image(path) and path.is_file()):
        return ""
    return f"*{path.suffix.lower()}" if path.is_file() else "folders" if path.is_dir() else "what is no file"


def _scored(detector: ReConPatch, path: Path, key: str, looks: int) -> dict | None:
    """The record of a file; None where it is not whole yet, was replaced meanwhile, or the disk or the right to read it fails."""
    try:
        (found,) = detector.predict([path]).records()
        return found if _key(path.stat()) == key else None
    except OSError:
        return None
    except ValueError as error:
        of_disk = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
        return {"path": str(path), "error": str(error)} if looks >= GIVEN_UP and not of_disk else None


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        if named_as_image(path):
            try:
                status = path.stat()
            except OSError:  # renamed or removed since the folder was read, or a link to itself
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, _key(status)


def _key(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


def _done(log: Path) -> dict[str, None]:
    """Keys of the images that the log holds, in order; a cut last line is removed."""
    done, whole = {}, 0
    for number, line in enumerate(log.open("rb") if log.exists() else (), 1):
        try:
            require("log", line.endswith(b"\n"), "whole lines", line)
            done[json.loads(line)["key"]] = None
            whole += len(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            cut = not line.endswith(b"\n") and (whole or b'{"path"'.startswith(line[:7]))
            require("log", cut, "lines of JSON that watch wrote", f"{log}, line {number}")
            os.truncate(log, whole)
    return done
