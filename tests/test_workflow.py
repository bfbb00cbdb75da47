"""The grid through Snakemake's local executor: one cell fails, one run is killed, and the tables are those of the plain batch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from rcp.data import draw_demo
from rcp.notebook import Settings

ROOT = Path(__file__).parents[1]
SNAKEMAKE = shutil.which(str(ROOT / ".venv-grid" / "bin" / "snakemake")) or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(
    SNAKEMAKE is None, reason="snakemake is in neither .venv-grid nor PATH: make .venv-grid/.stamp"
)


def command(runs: Path, data: Path, *options: str) -> list[str]:
    settings = [f"runs={runs}", f"data_root={data}", "items=table_5", "epochs=1", f"python={sys.executable}"]
    where = [
        "--snakefile",
        str(ROOT / "workflow" / "Snakefile"),
        "--workflow-profile",
        str(ROOT / "workflow" / "profiles" / "local"),
    ]
    return [SNAKEMAKE, *where, *options, "--config", *settings]


def snakemake(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=600)


def done(runs: Path) -> dict[str, tuple[float, dict]]:
    """Finished cells: name -> (when, what)."""
    files = (runs / "workflow" / "cells").glob("*.json")
    return {file.stem: (file.stat().st_mtime, json.loads(file.read_text())) for file in files}


@pytest.mark.slow
@needs_snakemake
def test_a_failed_cell_a_killed_run_and_the_tables(tmp_path):
    data, runs = draw_demo(tmp_path / "data", train=6, good=2, per_defect=1), tmp_path / "runs"
    shutil.rmtree(data / "circuit")
    victim = data / "gear" / "test" / "good" / "000.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:500])

    failed = snakemake(runs, data)
    assert failed.returncode, failed.stderr
    first = done(runs)
    assert sorted(name.rpartition("-")[0] for name in first) == ["fabric-PatchCore", "fabric-ReConPatch"], failed.stderr
    (log,) = (runs / "workflow" / "logs").glob("gear-ReConPatch-*.log")
    assert f"unreadable picture {victim}" in log.read_text() and not (runs / "workflow" / "items").exists()

    victim.write_bytes(whole)
    running = subprocess.Popen(
        command(runs, data), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 300
    while len(done(runs)) == len(first) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = done(runs)
    assert len(before) == 3, "killed when the third of four cells was there"
    stored = {file: file.stat().st_mtime_ns for file in (runs / "cells").glob("*/result.json")}

    again = snakemake(runs, data)
    assert again.returncode == 0, again.stderr
    after = done(runs)
    assert len(after) == 4 and {name: after[name] for name in first} == first, "what was finished is not touched"
    assert all(file.stat().st_mtime_ns == when for file, when in stored.items()), (
        "nor computed again where it was not yet ticked off"
    )
    assert len(list((runs / "cells").glob("*/result.json"))) == 4
    assert json.loads((runs / "workflow" / "items" / "table_5.json").read_text())["item"] == "table_5"
    assert "Nothing to be done" in (idle := snakemake(runs, data)).stdout + idle.stderr

    plain = tmp_path / "plain"
    options = ["--data-root", str(data), "--epochs", "1", "--notebooks", str(ROOT / "notebooks" / "table_5.ipynb")]
    batch = [sys.executable, "-m", "rcp", "reproduce", *options]
    subprocess.run(
        batch, cwd=ROOT, check=True, capture_output=True, timeout=600, env=os.environ | {"RCP_RUNS": str(plain)}
    )
    for name in ("table_5_image_auroc.csv", "table_5_pixel_auroc.csv", "table_5_paired.csv"):
        tables = [pd.read_csv(folder / "reproduce" / "demo" / name) for folder in (runs, plain)]
        pd.testing.assert_frame_equal(*tables)


@needs_snakemake
def test_unknown_settings_and_missing_data_are_named_before_any_work(tmp_path):
    told = snakemake(tmp_path / "runs", tmp_path / "absent", "--dry-run")
    assert told.returncode and str(tmp_path / "absent") in told.stdout + told.stderr
    mistyped = subprocess.run(
        [*command(tmp_path / "runs", tmp_path), "epoch=3"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert mistyped.returncode and "unknown setting epoch" in mistyped.stdout + mistyped.stderr


def test_the_workflow_takes_the_parameters_of_the_notebooks():
    """No setting of the workflow that rcp would refuse, and none of rcp's left out."""
    known = set(yaml.safe_load((ROOT / "workflow" / "config.yaml").read_text()))
    parameters = set(Settings.__dataclass_fields__) - {
        "dataset",
        "shard",
        "render_only",
    }  # a scheduler shares out cells itself
    assert known == parameters | {"items", "python", "runs", "threads", "mem_mb", "gpu", "runtime"}


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_profiles_go_on_after_a_failure_and_ask_for_what_a_cell_needs(profile):
    found = yaml.safe_load((ROOT / "workflow" / "profiles" / profile / "config.yaml").read_text())
    assert found["keep-going"] and found["rerun-incomplete"]
    if profile != "local":
        assert (
            found["executor"] == profile and "gpu=1" in found["config"] and "gpu" in str(found["set-resources"]["cell"])
        )
