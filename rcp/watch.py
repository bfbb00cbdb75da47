"""Scores every new image of a folder once, as long as it runs: bounded memory, half-written files wait, a restart goes on where it was."""

import json
import os
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rcp.checks import checked, require
from rcp.data.images import named_as_image
from rcp.data.layouts import BESIDE
from rcp.detector import ReConPatch
from rcp.files import file_hash, hold, stamp
from rcp.paths import require_writable

OF_A_FILE = ("key", "changed", "digest")  # inode, size and time; that of the last change of any kind; of the content
GIVEN_UP = 10  # looks at an unreadable file that no longer changes, before it is reported as such
KEPT = 100_000  # images that are remembered though their files are gone: about 30 MB


@checked
def watch(
    detector: ReConPatch, folder: Path, log: Path, seconds: float = 1.0, looks: int | None = None
) -> Iterator[dict]:
    """Yields a record of each new image, after it was appended to ``log`` as a line of JSON.

    A file is one image as long as its inode, size, time and content stay: renamed it is not scored again, written anew it is. It is
    scored once two looks found it the same and it can be read; one that waits for long is warned of. What the log holds is done.

    Args:
        log: JSON lines; a last line that was cut by a kill is removed.
        seconds: between two looks. looks: how many, then it ends; None goes on.

    Raises:
        ValueError: no such folder, also where it vanishes; ``log`` is no such log, or another watch's; fewer than two looks.
    """
    require("folder", folder.is_dir(), "a folder that is there", str(folder))
    require("seconds", seconds <= 10**6, "at most a million", seconds)
    require_writable(log, "log in {}", appended=True)
    with log.open("a") as lock:
        require("log", hold(lock.fileno()) is not False, "one that no other watch writes", str(log))
        yield from _look(detector, folder, log, seconds, looks)


def _look(detector: ReConPatch, folder: Path, log: Path, seconds: float, looks: int | None) -> Iterator[dict]:
    (done, before), waiting, said, _ = _done(log), {}, set(), detector.extractor  # its weights are no fault of an image
    if before not in (None, now := detector.threshold_):
        words = "which stay; to score all images anew, name another log"
        warnings.warn(f"{log} holds decisions of the threshold {before}, not {now}, {words}", stacklevel=3)
    while looks is None or looks > 0:
        require("folder", folder.is_dir(), "a folder that is there", str(folder))
        there, again = dict(_files(folder)), {}
        if left := {_kind(p) for p in folder.iterdir() if p not in there and _kind(p)} - said:
            said |= left
            warnings.warn(f"not watched in {folder}: {', '.join(sorted(left))}", stacklevel=3)
        if len(done) > KEPT + len(there):
            done = {key: done[key] for key in done.keys() & set(map(_key, there.values()))}
        for path, now in there.items():
            if _is_done(done, path, now):
                continue
            before, same, looked = waiting.get(path, (None, 0, 0))
            again[path] = _, same, looked = _key(now), same + 1 if before == _key(now) else 0, looked + 1
            found, why = _scored(detector, path, now, same) if same else (None, "it is another at each look")
            if found:
                with log.open("a") as file:  # one write: a kill leaves all of the line or a cut one
                    file.write(json.dumps(found) + "\n")
                done |= _entry(found)
                yield {name: value for name, value in found.items() if name not in OF_A_FILE}
            elif looked == GIVEN_UP + 2:  # an unreadable one was reported the look before
                warnings.warn(f"{path} waits since {looked} looks: {why}", stacklevel=3)
        waiting, looks = again, None if looks is None else looks - 1
        time.sleep(seconds)


def _kind(path: Path) -> str:
    """What to call what is not watched: a suffix, or that it is no file; "" for what lies beside images."""
    if path.name.startswith(".") or path.suffix.lower() in BESIDE or (named_as_image(path) and path.is_file()):
        return ""
    return f"*{path.suffix.lower()}" if path.is_file() else "folders" if path.is_dir() else "what is no file"


def _scored(detector: ReConPatch, path: Path, now: tuple, looks: int) -> tuple[dict | None, str]:
    """The record of a file, or None and why: it is not whole yet, was replaced meanwhile, or the disk or the right to read it fails."""
    try:
        about = dict(zip(OF_A_FILE, (_key(now), now[3], _digest(path)), strict=True))
        try:
            (found,) = detector.predict([path]).records()
        except ValueError as error:
            of_disk = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
            given_up = looks >= GIVEN_UP and not of_disk
            return {"path": str(path), "error": str(error)} | about if given_up else None, str(error)
        same = _key(stamp(path)) == about["key"] and (stamp(path) == now or _digest(path) == about["digest"])
        return found | about if same else None, "it was replaced meanwhile"
    except OSError as error:
        return None, str(error)


def _is_done(done: dict, path: Path, now: tuple) -> bool:
    """Whether the file is an image that was scored, renamed perhaps: an inode, size and time may come again with another content."""
    digest, changed = done.get(_key(now), ("", {}))
    with suppress(OSError):
        if changed.get(path.name) != now[3] and digest and digest == _digest(path):
            changed[path.name] = now[3]
    return digest is None or changed.get(path.name) == now[3]


def _digest(path: Path) -> str:
    return file_hash(path).hexdigest()[:16]


def _files(folder: Path) -> Iterator[tuple[Path, tuple]]:
    for path in sorted(folder.iterdir()):
        with suppress(OSError):  # renamed or removed since the folder was read, or a link to itself
            if named_as_image(path) and stat.S_ISREG(path.stat().st_mode):
                yield path, stamp(path)


def _key(now: tuple) -> str:
    return "-".join(map(str, now[:3]))  # inode, size and time: what a new name leaves as it is


def _entry(found: dict) -> dict[str, tuple]:
    """Key -> digest (None in a log of before), and the time of the last change under each name: a link has another."""
    return {found["key"]: (found.get("digest"), {Path(found["path"]).name: found.get("changed")})}


def _done(log: Path) -> tuple[dict[str, tuple], float | None]:
    """The images that the log holds, in order, and the threshold of the last decision; a cut last line is removed."""
    done, whole, threshold = {}, 0, None
    with log.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                require("log", line.endswith(b"\n"), "whole lines", line)
                done |= _entry(found := json.loads(line))
                whole, threshold = whole + len(line), found.get("threshold", threshold)
            except (ValueError, TypeError, KeyError, RecursionError):
                cut = not line.endswith(b"\n") and (whole or b'{"path"'.startswith(line[:7]))
                require("log", cut, "lines of JSON that watch wrote", f"{log}, line {number}")
                os.truncate(log, whole)
    return done, threshold
