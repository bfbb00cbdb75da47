"""A function in a fresh process of its own, whose memory is watched from outside (a compiled kernel may hold the interpreter's lock)."""

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Held(NamedTuple):
    """Bytes. resident: all pages in memory; highest: the most that ever were; anonymous: those of them backed by no file."""

    resident: int
    highest: int
    anonymous: int


def held(process: int | str = "self") -> Held:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if "kB" in value}
    return Held(*(found.get(name, 0) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")))  # a dying process has none


def forget_highest() -> Held:
    """From now on ``highest`` of this process counts anew; -> what it holds now, without what it had freed but kept."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return held()


def alone(function: Callable, *arguments, **options) -> tuple[Any, Held]:
    """-> (what the function returned, the highest of each kind of memory in its process; anonymous every 5 ms).

    The function must be importable, and its modules are imported anew. Raises EOFError where the process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, arguments, options))
    process.start()
    theirs.close()
    anonymous = 0
    while not ours.poll(0.005):
        anonymous = max(anonymous, held(process.pid).anonymous)
    result, at_end = ours.recv()
    process.join()
    return result, at_end._replace(anonymous=max(anonymous, at_end.anonymous))


def _send(pipe, function: Callable, arguments: tuple, options: dict) -> None:
    result = function(*arguments, **options)
    pipe.send((result, held()))


def seconds(function: Callable, *arguments) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"
