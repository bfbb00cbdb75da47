"""A small grid that is killed, one whose disk is full, and one of 8 processes: nothing is lost, wrong, done twice or left lying."""

import dataclasses
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import CAMPAIGN
from test_entries import PATCHCORE, SMALL

from rcp.refinement import RefinementConfig
from reproduce import entries, store
from reproduce.entries import Entry, Refined
from reproduce.run import run_grid
from reproduce.store import Store

pytestmark = pytest.mark.skipif(not CAMPAIGN, reason="minutes: make campaign")


@pytest.fixture(scope="module")
def whole(attacked, tmp_path_factory):
    """The tasks, a finished store of them, and the seconds that it took."""
    folder, category, weights = attacked
    how = [dataclasses.replace(c, weights=weights) for c in (PATCHCORE, SMALL)]
    tasks, root = [Entry(c, str(folder), category) for c in how], tmp_path_factory.mktemp("whole")
    print(f"\nattacked: {category}, weights {os.path.basename(weights)}")
    tasks.append(Refined(tasks[0], RefinementConfig.build(epochs=2, channels=8)))
    began = time.time()
    assert _ends(tasks, root) == 0
    return tasks, root, time.time() - began


def _forked(tasks, root, log=len) -> int:
    """A fork, with all imports, that computes the tasks: it ends with 0, or 3 where an OSError said that the disk is full."""
    if pid := os.fork():
        return pid
    try:
        run_grid(tasks, Store(root), log=log)
    except BaseException as error:
        os._exit(3 if isinstance(error, OSError) and "space" in str(error) else 1)
    os._exit(0)


def _ends(tasks, root) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_forked(tasks, root), 0)[1])


def _as_whole(tasks, root, whole) -> bool:
    """Whether a further run ends with the same results and leaves nothing behind."""
    ended = _ends(tasks, root)
    pairs = [[r.arrays for r in run_grid(tasks, Store(of), render_only=True, log=len).results] for of in (root, whole)]
    same = all(np.array_equal(a[n], b[n]) for a, b in zip(*pairs, strict=True) for n in b)
    return ended == 0 and same and not [p for p in root.rglob(".*") if not p.name.endswith(".lock")]


def test_killed_at_any_moment(whole, tmp_path):
    (tasks, expected, took), rng, wrong = whole, random.Random(0), []
    for i in range(5 * CAMPAIGN):
        pid, moment = _forked(tasks, tmp_path / str(i)), took * rng.random()
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wrong += [] if _as_whole(tasks, tmp_path / str(i), expected) else [moment]
    print(f"\nkills: {5 * CAMPAIGN} (seed 0), lost, wrong or left lying: {len(wrong)}")
    assert not wrong


def test_eight_processes_on_one_store(whole, tmp_path):
    (tasks, expected, _), log, stores = whole, tmp_path / "log", CAMPAIGN // 2

    def say(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    for i in range(stores):
        children = [_forked(random.Random(n).sample(tasks, len(tasks)), tmp_path / str(i), say) for n in range(8)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
        assert _as_whole(tasks, tmp_path / str(i), expected)
    lines = [line for line in log.read_text().splitlines() if not line.endswith("...")]
    computed = sum(not line.endswith("from the store") for line in lines)
    of = f"8 (seeds 0 to 7) on {stores} stores of {len(tasks)} entries"
    print(f"\nprocesses: {of}, asked {len(lines)}, computed {computed}, all as alone")
    assert (len(lines), computed) == (8 * stores * len(tasks), stores * len(tasks))


def test_a_full_disk(whole, tmp_path, monkeypatch):
    (tasks, expected, _), wrong = whole, []
    size, points = sum(f.stat().st_size for f in expected.rglob("*") if f.is_file()), 2 * CAMPAIGN
    for i in range(points):
        how = ["mount", "-t", "tmpfs", "-o", f"size={8192 + int(size * (i + 0.5) / points)}", "tmpfs", str(tmp_path)]
        if subprocess.run(how, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a small disk")
        try:
            with monkeypatch.context() as patched:
                for module in (entries, store) if i % 2 else ():  # the disk is filled by another after it was looked at
                    patched.setattr(module, "require_disk", lambda *_: None)
                said = _ends(tasks, tmp_path / "runs")
            subprocess.run(["mount", "-o", "remount,size=200m", str(tmp_path)], check=True)
            wrong += [] if said == 3 and _as_whole(tasks, tmp_path / "runs", expected) else [(i, said)]
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
    print(f"\nfull disks: {points}, unclear, killed or wrong: {len(wrong)}")
    assert not wrong, wrong
