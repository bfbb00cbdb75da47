"""The grid through Snakemake's local executor: one cell fails, one run is killed, and the tables are those of the plain batch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from reproduce import batch, entries
from rcp.data import draw_demo, draw_demo_btad
from reproduce.notebook import Settings

ROOT = Path(__file__).parents[1]
SNAKEMAKE = shutil.which(str(ROOT / ".venv-grid" / "bin" / "snakemake")) or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(
    SNAKEMAKE is None, reason="snakemake is in neither .venv-grid nor PATH: make .venv-grid/.stamp"
)


PROFILES = ROOT / "workflow" / "profiles"


def command(runs: Path, data: Path, *options: str, cluster: Path = PROFILES / "local", **others) -> list[str]:
    settings = {"runs": runs, "data_root": data, "items": "table_5", "epochs": 1, "python": sys.executable} | others
    where = ["--snakefile", str(ROOT / "workflow" / "Snakefile"), "--workflow-profile", str(cluster)]
    return [SNAKEMAKE, *where, *options, "--config", *(f"{name}={value}" for name, value in settings.items())]


def snakemake(runs: Path, data: Path, *options: str, **others) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(runs, data, *options, **others), cwd=ROOT, capture_output=True, text=True, timeout=600
    )


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
    assert sorted(name.split("-")[:2] for name in first) == [["fabric", "PatchCore"], ["fabric", "ReConPatch"]]
    (log,) = (runs / "workflow" / "logs").glob("gear-ReConPatch-*.log")
    assert f"unreadable image {victim}" in log.read_text() and not (runs / "workflow" / "items").exists()
    index = runs / "reproduce" / "demo" / "index.html"
    assert "0 of 1 notebooks done, 1 failed" in index.read_text()

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
    assert "1 of 1 notebooks done" in index.read_text() and "table_5_paired.csv" in index.read_text()
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


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, Path]:
    """One category of each data set, and a store with the cells of a figure."""
    folder = tmp_path_factory.mktemp("few")
    data = draw_demo(folder / "mvtec", train=6, good=2, per_defect=1)
    btad = draw_demo_btad(folder / "btad", train=4, good=2)
    for other in (data / "circuit", data / "fabric", btad / "02", btad / "03"):
        shutil.rmtree(other)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RCP_RUNS", str(folder / "runs"))
        plan = batch.plan({"data_root": str(data), "btad_root": str(btad), "epochs": 1}, ["figure_5"])
        for name in {name for names in plan["items"].values() for name in names}:
            experiment.run(batch.planned_cell(plan, name))
    return {"runs": folder / "runs", "data": data, "btad_root": btad}


def due(told: subprocess.CompletedProcess) -> set[str]:
    """What a dry run would do: items, and cells as category-method."""
    assert told.returncode == 0, told.stderr
    return set(re.findall(r"wildcards: (?:item=(?=\w)|cell=(?=\w))([^-\W]+(?:-\w+)?)", told.stdout + told.stderr))


@pytest.mark.slow
@needs_snakemake
def test_figures_times_and_notebooks_without_cells(few):
    """What notebooks look up is what was planned; Figure S4 is, too; a change of data, and a loss, are computed again."""
    items, btad = "figure_5 table_s6", few["btad_root"]
    ran = snakemake(few["runs"], few["data"], btad_root=btad, items=items)
    assert ran.returncode == 0, ran.stderr
    assert not any(cell["computed"] for _, cell in done(few["runs"]).values()) and len(done(few["runs"])) == 4
    out = few["runs"] / "reproduce" / "demo"
    for item in ("figure_5", "table_s6"):
        assert "missing" not in json.loads((out / f"{item}.verdict.json").read_text())["words"]
    assert len(pd.read_csv(out / "table_s6.csv")) == 2 and (out / "figure_5_s4.png").exists()
    index = (out / "index.html").read_text()
    assert "2 of 2 notebooks done" in index
    assert all(f in index for f in ("figure_5_s4.png", "table_s6.csv"))

    image = few["data"] / "gear" / "train" / "good" / "000.png"
    whole = image.read_bytes()
    shutil.copy(image.with_name("001.png"), image)
    on_gear = {"gear-PatchCore", "gear-ReConPatch", "figure_5", "table_s6"}
    assert due(snakemake(few["runs"], few["data"], "--dry-run", btad_root=btad, items=items)) == on_gear
    image.write_bytes(whole)
    (lost,) = (cell["entry"] for name, (_, cell) in done(few["runs"]).items() if name.startswith("01-PatchCore"))
    shutil.rmtree(few["runs"] / lost)
    (few["runs"] / "workflow" / "items" / "figure_5.json").unlink()  # to be rendered again: its cells must be there
    again = snakemake(few["runs"], few["data"], "--dry-run", btad_root=btad, items=items)
    assert due(again) == {"01-PatchCore", "figure_5"}


@needs_snakemake
def test_an_item_without_its_data_fails_the_run_after_the_others(few, tmp_path, monkeypatch):
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    told = snakemake(tmp_path / "runs", few["data"], items="table_7 paper_checks", profile="paper")
    assert told.returncode, "the run fails"
    assert f"table_7: left out: btad_root: no {tmp_path / 'btad'}" in told.stderr
    assert (tmp_path / "runs" / "workflow" / "items" / "paper_checks.json").exists(), told.stderr
    index = (tmp_path / "runs" / "reproduce" / "paper" / "index.html").read_text()
    assert "1 of 2 notebooks done, 1 failed" in index and "python -m reproduce download btad" in index


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
def test_profiles_go_on_after_a_failure(profile):
    found = yaml.safe_load((PROFILES / profile / "config.yaml").read_text())
    assert found["keep-going"] and found["rerun-incomplete"] and found.get("executor", "local") == profile


@needs_snakemake
@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_what_jobs_ask_a_cluster_for(profile, few, tmp_path):
    """As Snakemake resolves it, with settings on the command line. The executors' plugins refuse what is checked here."""
    found = yaml.safe_load((PROFILES / profile / "config.yaml").read_text())
    del found["executor"]  # its plugin is not installed
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    asked = snakemake(
        tmp_path / "runs", few["data"], "--dry-run", "--cores=8", cluster=tmp_path, items="table_5 table_s6"
    )
    assert asked.returncode == 0, asked.stderr
    jobs = {}
    for rule, text in re.findall(r"^rule (\w+):\n((?:    .*\n)+)", asked.stdout + asked.stderr, re.MULTILINE):
        (resources,) = re.findall(r"resources: (.*)", text)
        jobs[rule] = dict(pair.split("=", 1) for pair in resources.split(", "))
        jobs[rule]["threads"] = "".join(re.findall(r"threads: (\d+)", text))
    for rule in ("cell", "computing_notebook"):
        assert (jobs[rule]["gpu"], jobs[rule]["threads"]) == ("1", "8")
    assert "gpu" not in jobs["notebook"] and int(jobs["notebook"]["runtime"]) > 0
    if profile == "kubernetes":  # any "gpu", 0 too, is refused without
        assert all(job["gpu_manufacturer"] == "nvidia" for job in jobs.values() if "gpu" in job)
    else:  # --gpus comes of gpu; the plugin refuses it, and --gres, as an extra
        assert not any(word in jobs[rule] for rule in jobs for word in ("slurm_extra", "gres"))
