"""What a published run lacks, as a folder for a machine that has a GPU and nothing else: images, weights, code, tasks, one script.

Images travel as they are after resize and crop, without loss, and weights as they are: what is computed there has the identity of the same
entry here, so :meth:`reproduce.store.Store.unpack` merges it. The code must be the same; that is checked there.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rcp import backbone
from rcp.checks import require
from rcp.config import Config
from rcp.data import Dataset, Split, Transform
from rcp.detector import Timings
from rcp.files import file_hash
from reproduce.entries import Entry, features, representation
from reproduce.provenance import ROOT, code_upto, commit
from reproduce.run import load, run
from reproduce.store import Store, key_of

LIMIT = 50 * 2**20  # bytes of a bundle
_longest = 0.0  # seconds of a task or a training in this process
SCRIPT = '''"""Computes the tasks until the time is up: python run.py [--minutes 9] [--out results.zip]; goes on where it was."""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "code"))
from reproduce.bundle import compute

if __name__ == "__main__":  # the processes that it starts read it, too
    sys.exit(compute(here, sys.argv[1:]))
'''


@dataclass(frozen=True)
class Cropped(Transform):
    """Of images and masks that are cropped already: a mask may be empty or full."""

    def mask(self, path: Path, of: Path | None = None) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image) > 0


@dataclass(frozen=True)
class Bundled(Entry):
    """An entry whose images lie in a bundle, cropped: ``dataset`` is their folder, ``named`` its identity's JSON."""

    named: str = ""

    def data(self) -> Dataset:
        return _dataset(Path(self.dataset), self.category)

    def transform(self, split: str) -> Transform:
        c = self.config
        return Cropped(c.image_size, c.image_size, c.aspect, c.tiles, c.tile_overlap)

    def identity(self) -> dict:
        return json.loads(self.named)


@lru_cache
def _dataset(folder: Path, category: str) -> Dataset:
    about = json.loads((folder / "about.json").read_text())
    splits = {}
    for name in ("train", "test"):
        defects, masks = about[name]["defects"], about[name]["masks"]
        paths = tuple(folder / name / f"{i:04d}.webp" for i in range(len(defects)))
        of = tuple(path.with_suffix(".mask.png") if m else None for path, m in zip(paths, masks, strict=True))
        splits[name] = Split(paths, np.array([d != "good" for d in defects]), tuple(defects), of)
    return Dataset(folder, about["layout"], category, splits["train"], splits["test"], folder=folder)


def missing(tasks: Iterable, store: Store) -> tuple[list[Entry], list]:
    """-> (entries that the store lacks, other tasks that it lacks: they do not travel)."""
    lacking = [task for task in dict.fromkeys(tasks) if load(task, store) is None]
    found = {key_of(t.identity()): t for t in lacking if type(t) is Entry}
    return list(found.values()), [t for t in lacking if type(t) is not Entry]


def write(folder: Path, tasks: Sequence[Entry]) -> tuple[int, list[Entry]]:
    """Writes a bundle of as many of these entries as its limit admits; -> its size in bytes, and the entries for the next one.

    The images of the entries that are left out may be larger than what is free; entries that see the same pixels go together.

    Raises:
        ValueError: nothing to compute; the folder is not empty; weights that are no file; an entry that alone is larger than 50 MiB.
    """
    require("bundle", len(tasks) > 0, "entries that the store lacks", "none")
    require_new(folder)
    for weights in dict.fromkeys(task.config.weights for task in tasks):
        require("weights", Path(weights).is_file(), "a file, which can travel", weights)
    for name in ("rcp", "reproduce"):
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "weights").mkdir()
    (folder / "code" / "COMMIT").write_text(commit())
    (folder / "run.py").write_text(SCRIPT)
    lines, left, beyond, sources = [], [], set(), {}
    for task in tasks:
        weights, images = Path(task.config.weights), _name_of(task)
        other = sources.setdefault(weights.name, weights)
        require("weights", other.resolve() == weights.resolve(), "files of different names", [str(other), str(weights)])
        added = [folder / "data" / images, folder / "weights" / weights.name]
        new = [path for path in added if not path.exists()]
        if not beyond.isdisjoint(added):
            left.append(task)
            continue
        if added[0] in new:
            _prepare(task, added[0])
        if added[1] in new:  # a second CNN may see the same pixels
            shutil.copyfile(weights, added[1])
        line = {
            "config": task.config.asdict() | {"weights": weights.name}, "category": task.category,
            "images": images, "identity": task.identity(),
        }  # fmt: skip
        text = json.dumps([*lines, line], indent=0)
        if _size(folder) + len(text) <= LIMIT:
            lines.append(line)
            (folder / "tasks.json").write_text(text)
            continue
        mib = {path.name: _size(path) / 2**20 for path in added}
        words = f"at most {LIMIT / 2**20:.0f} MiB with one entry's images and weights"
        require("bundle", lines, words, ", ".join(f"{name} {size:.1f}" for name, size in mib.items()) + " MiB")
        for path in new:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        beyond |= set(new)
        left.append(task)
    (folder / "DIGEST").write_text(_digest(folder))
    return _size(folder), left


def _digest(folder: Path) -> str:
    """Of a bundle's tasks, images, masks and labels; its code and weights are in the tasks' identities."""
    files = [folder / "tasks.json", *sorted((folder / "data").rglob("*.*"))]
    hashes = [f"{f.relative_to(folder).as_posix()} {file_hash(f).hexdigest()}" for f in files if f.is_file()]
    return hashlib.blake2b("\n".join(hashes).encode(), digest_size=16).hexdigest()


def require_new(folder: Path) -> None:
    """Raises ValueError where something lies there."""
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require("folder", empty, "a new or empty folder", str(folder))


def _name_of(task: Entry) -> str:
    """The same for tasks that see the same pixels."""
    how = [repr(task.transform(split)) for split in ("train", "test")]
    digest = hashlib.blake2b(json.dumps([how, task.data().fingerprint()]).encode(), digest_size=6).hexdigest()
    return f"{task.category}-{digest}"


def _prepare(task: Entry, folder: Path) -> None:
    """The images and masks of a category as a detector sees them, and what they are."""
    data, about = task.data(), {"layout": task.data().layout}
    for name in ("train", "test"):
        split, transform = getattr(data, name), task.transform(name)
        about[name] = {"defects": list(split.defects), "masks": [mask is not None for mask in split.masks]}
        (folder / name).mkdir(parents=True)
        for i, (path, mask) in enumerate(zip(split.paths, split.masks, strict=True)):
            file = folder / name / f"{i:04d}.webp"
            Image.fromarray(transform.image(path)).save(file, lossless=True, quality=80, method=4, exact=True)
            if mask is not None:
                Image.fromarray(transform.mask(mask, path)).save(file.with_suffix(".mask.png"))
    (folder / "about.json").write_text(json.dumps(about))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file())


# ---- on the other machine ----


def compute(folder: Path, arguments: Sequence[str]) -> int:
    """What ``run.py`` does: the tasks that are not there yet, until the time is up; then packs what is there.

    Tasks are shared by ``--jobs`` processes. On a GPU this one trains every f first: six beside it computed 84 entries in 126 s on an
    H200, where one entry takes 3 to 15 s.
    """
    parser = argparse.ArgumentParser(description="compute this bundle's tasks")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all, after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=folder / "results.zip")
    words = "processes; 0: one on a CPU, six beside the training on a GPU"
    parser.add_argument("--jobs", type=int, default=0, help=words)
    options, store, tasks = parser.parse_args(arguments), Store(folder / "runs"), tasks_of(folder)
    until, on_gpu = time.time() + 60 * options.minutes, torch.cuda.is_available()

    def waits(task: Bundled) -> bool:
        """Whether this process is to train f before the others begin the task."""
        identity = task.identity_upto("training", task.data(), ("train",))
        trained = task.config.representation != "trained" or store.folder("representations", identity).exists()
        return on_gpu and not trained

    lacking = [(i, task) for i, task in enumerate(tasks, 1) if load(task, store) is None]
    jobs, context, begun = options.jobs or (6 if on_gpu else 1), multiprocessing.get_context("spawn"), []
    try:
        with ProcessPoolExecutor(jobs, context, _end_with_parent) as pool:
            for i, task in sorted(lacking, key=lambda numbered: waits(numbered[1])):
                c, at = task.config, f"[{i}/{len(tasks)}]"
                words = f"{at} {c.backbone} {task.category} {task.method} {c.coreset_ratio:.0%} seed {c.seed}"
                if time.time() < until and (not waits(task) or _in_time(until, words, _train, task, store)):
                    begun.append(pool.submit(_one, until, words, task, store))
            for one in begun:
                one.result()
    except BrokenProcessPool as killed:  # by the system, for its memory say: what is there is packed all the same
        print(f"{killed} Fewer --jobs need less memory.", flush=True)
    if left := sum(load(task, store) is None for task in tasks):
        print(f"time is up: {left} of {len(tasks)} are left; the same command goes on", flush=True)
    print(f"{store.pack(options.out, light=True)} results in {options.out}", flush=True)
    return 0


def _end_with_parent() -> None:
    """A process of the pool ends when the one that began it does, however that ends."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _one(until: float, words: str, task: Bundled, store: Store) -> None:
    began = time.time()
    if result := _in_time(until, words, run, task, store, len):
        print(f"{words}: image AUROC {result.metrics['image_auroc']}, {time.time() - began:.0f} s", flush=True)


def _train(task: Bundled, store: Store):
    timings = Timings()
    p = features(task, task.data(), ("train",), store, timings)["train"]
    return representation(task, task.data(), p, store, timings, len)


def _in_time(until: float, words: str, work: Callable, *arguments):
    """What the work gives; None where the longest so far in this process would not fit the time, or where it fails, which is named."""
    global _longest
    began = time.time()
    if began + _longest > until:
        return None
    try:
        found = work(*arguments)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{words}: {type(error).__name__}: {error}", flush=True)
        return None
    _longest = max(_longest, time.time() - began)
    return found


def tasks_of(folder: Path) -> list[Bundled]:
    """The tasks of a bundle, in order.

    Raises:
        ValueError: its tasks, images, weights or code are not what it was made with.
    """
    sound = (folder / "DIGEST").read_text() == _digest(folder)
    require("bundle", sound, "tasks, images and masks as they were written", f"damage in {folder}: copy it again")
    tasks = []
    for line in json.loads((folder / "tasks.json").read_text()):
        config = Config.build(**line["config"] | {"weights": str(folder / "weights" / line["config"]["weights"])})
        expected, weights = line["identity"], backbone.weights_identity(config.backbone, config.weights)
        require("weights", weights == expected["config"]["weights"], expected["config"]["weights"], weights)
        code = code_upto("scores", folder / "code")
        require("code", code == expected["code"], f"the code of {expected['code']}", code)
        images = str(folder / "data" / line["images"])
        tasks.append(Bundled(config, images, line["category"], named=json.dumps(expected)))
    return tasks


def describe(tasks: Sequence, others: Sequence) -> str:
    """What a bundle holds and what does not travel, in a line each."""
    trained = {repr([t.config.upto("training"), t.category]) for t in tasks if t.config.representation == "trained"}
    words = f"{len(tasks)} entries, about {len(trained)} trainings of f"
    kinds = ", ".join(sorted({type(t).__name__ for t in others}))
    return words + (f"; left out: {len(others)} tasks of other kinds ({kinds})" if others else "")
