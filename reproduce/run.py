"""A task is looked up in the store, else computed and stored. Notebooks, papermill, batches and tests all go through :func:`run`.

A task has ``identity()`` (JSON-able: all that its result depends on) and ``compute(store, log)`` (-> info for JSON, arrays).
"""

import datetime
import logging
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from rcp.checks import require
from rcp.data import Transform
from rcp.maps import score_maps
from reproduce.provenance import ChangedCode, commit, versions
from reproduce.store import Store, runs_root

logger = logging.getLogger("rcp")


@dataclass(frozen=True, eq=False)
class Result:
    """What a task gave.

    metrics: as :func:`rcp.metrics.evaluate` returns them, or the task's own. info: config, data, timings, versions, device, history.
    arrays: of an entry scores, labels (n_test,), patch_scores (n_test, h, w), train_scores (n_train,) where held out.
    computed: in this call, instead of read from the store.
    """

    info: dict
    arrays: dict[str, np.ndarray]
    computed: bool

    metrics = property(lambda self: self.info["metrics"])
    scores = property(lambda self: self.arrays["scores"])
    labels = property(lambda self: self.arrays["labels"])

    @property
    def patches(self) -> int | None:
        """Patches of the training set: N_images · h · w."""
        left_out = self.info.get("without", {}).get("patch_scores")
        if left_out is None and "patch_scores" not in self.arrays:
            return None
        return self.info["data"]["train"] * int(np.prod((left_out or self.arrays["patch_scores"].shape)[1:]))

    @property
    def patch_scores(self) -> np.ndarray:
        """(n_test, h, w).

        Raises:
            ValueError: they were left out when the result was packed.
        """
        if "patch_scores" not in self.arrays:
            of = f"{self.info['config']['backbone']}, {self.info['data']['category']}"
            words = "is of a light pack, without them; remove it to compute it again"
            raise ValueError(f"patch scores: the result ({of}) {words}")
        return self.arrays["patch_scores"]

    def maps(self, some: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """(n, S, S) float32 score maps of test images, drawn again from what is stored."""
        if "log_odds" in self.arrays:  # of a refinement network
            return 1 / (1 + np.exp(-self.arrays["log_odds"][some].astype(np.float32)))
        c = self.info["config"]
        seen = Transform(c["resize"], c["image_size"], c["aspect"], c.get("tiles", (1, 1)), c.get("tile_overlap", 0))
        return score_maps(torch.from_numpy(self.patch_scores[some]), seen.shape, c["blur"])


def run(task, store: Store | None = None, log: Callable[[str], None] = logger.info) -> Result:
    """A task's result, from the store or computed into it.

    All images are decoded before any feature is computed, and disk space is checked before that, so that bad input costs no work.

    Raises:
        ValueError, FileNotFoundError: bad data, weights or hyper-parameters, named.
        ValueError: what the result depends on was changed while it was computed.
        OSError: no disk space.
    """
    store = store or Store(runs_root())
    identity = task.identity()
    if found := store.load("entries", identity):
        return Result(*found, computed=False)
    with store.locked("entries", identity):
        if found := store.load("entries", identity):  # another process computed it while this one waited
            return Result(*found, computed=False)
        started = datetime.datetime.now(datetime.UTC)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        info, arrays = task.compute(store, log)
        with suppress(ChangedCode):  # what was loaded has computed it
            same = "images and weights as they were when it began; nothing is stored, run it again"
            require("identity", task.identity() == identity, same, "others, changed meanwhile")
        info |= {
            "started": started.isoformat(timespec="seconds"),
            "process_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "versions": versions(),
            "commit": commit(),
        }  # fmt: skip
        store.save("entries", identity, info, arrays)
    return Result(info, arrays, computed=True)


def load(task, store: Store) -> Result | None:
    """A task's result from the store, or None; computes nothing."""
    found = store.load("entries", task.identity())
    return Result(*found, computed=False) if found else None


@dataclass(frozen=True, eq=False)
class Grid:
    """The tasks of one table whose results are there, in order, their results, and the tasks whose results are missing."""

    entries: list
    results: list[Result]
    missing: list

    def pairs(self) -> list[tuple]:
        """(task, result) of each that is there."""
        return list(zip(self.entries, self.results, strict=True))

    def where(self, **columns) -> "Grid":
        """The tasks, there or missing, whose columns have one of the values named: ``simulation={"structure"}``."""

        def wanted(task) -> bool:
            return all(task.columns()[name] in of for name, of in columns.items())

        pairs = [(task, result) for task, result in self.pairs() if wanted(task)]
        return Grid([t for t, _ in pairs], [r for _, r in pairs], [t for t in self.missing if wanted(t)])

    def frame(self) -> pd.DataFrame:
        """One row per task: its columns (method, category, every hyper-parameter) and every metric (fractions)."""
        rows = [
            task.columns() | {"bank_bytes": result.info.get("bank_bytes"), "patches": result.patches} | result.metrics
            for task, result in self.pairs()
        ]
        return pd.DataFrame(rows)


def run_grid(
    tasks: Sequence,
    store: Store,
    *,
    shard: str = "1/1",
    render_only: bool = False,
    log=print,
    failed: dict | None = None,
) -> Grid:
    """Every task of this shard through :func:`run`, with a line each; the rest from the store where it is there.

    Args:
        shard: "i/n" computes every n-th task from the i-th.
        render_only: computes nothing; what the store lacks is in ``missing``.
        failed: where given, a task that fails is put there ("method, category" -> reason), and the others go on.
    """
    mine, done = [] if render_only else shard_of(tasks, shard), {}
    if mine:
        store.sweep()
    for i, task in enumerate(mine, 1):
        name = f"[{i}/{len(mine)}] {task.category} {task.method} seed {task.config.seed}"
        log(f"{name} ...")
        try:
            result = done[id(task)] = run(task, store, _seldom(log))
        except Exception as error:
            if failed is None:
                raise
            failed[f"{task.method}, {task.category}"] = why = f"{type(error).__name__}: {error}"
            log(f"{name}: failed, {why}")
            continue
        took = f"{sum(result.info['seconds'].values()):.0f} s" if result.computed else "from the store"
        if "image_auroc" in result.metrics:  # a feature space or a time has none
            auroc = result.metrics["image_auroc"]
            took = f"image AUROC {'undefined' if auroc is None else f'{auroc:.4f}'}, {took}"
        log(f"{name}: {took}")
    found = {id(task): done.get(id(task)) or load(task, store) for task in tasks}
    there = [task for task in tasks if found[id(task)]]
    return Grid(there, [found[id(task)] for task in there], [task for task in tasks if not found[id(task)]])


def _seldom(log: Callable[[str], None]) -> Callable[[str], None]:
    """At most one line in half a minute: a long training says where it is, a quick one nothing."""
    last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= 30:
            last = time.monotonic()
            log(line)

    return say


def shard_of(tasks: Sequence, shard: str) -> list:
    """The share "i/n" of a sequence: every n-th from the i-th, counted from 1.

    Raises:
        ValueError: not "i/n" with 1 <= i <= n.
    """
    i, _, n = str(shard).partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"shard: expected 'i/n' with 1 <= i <= n, such as '3/8', got {shard!r}")
    return list(tasks)[int(i) - 1 :: int(n)]
