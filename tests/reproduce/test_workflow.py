"""The batch in shards through Snakemake's local executor."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNAKEMAKE = shutil.which(str(ROOT / ".venv-grid" / "bin" / "snakemake")) or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is neither in .venv-grid nor on PATH")


def snakemake(*options: str, profile: str = "local", **settings) -> subprocess.CompletedProcess:
    where = ["--snakefile", "workflow/Snakefile", "--workflow-profile", f"workflow/profiles/{profile}"]
    settings = [f"{name}={value}" for name, value in ({"python": sys.executable} | settings).items()]
    command = [SNAKEMAKE, *where, *options, "--config", *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@needs_snakemake
def test_a_dry_run_names_its_shards_and_unknown_settings_are_refused(tmp_path):
    plan = snakemake("--dry-run", "--printshellcmds", runs=tmp_path, shards=3, categories="a b", weights="x;touch y")
    assert plan.returncode == 0, plan.stderr
    printed = plan.stdout + plan.stderr
    assert all(f"--shard {i}/3" in printed for i in (1, 2, 3)) and "--render-only" in printed
    assert "--categories a b" in printed and "--weights 'x;touch y'" in printed
    for name, value in {"shards": 0, "threads": "x", "runs": f"{tmp_path}/{{config}}", "notebooks": "it's"}.items():
        assert f"{name}: expected " in (said := str(snakemake("--dry-run", **{"runs": tmp_path, name: value}))), said
    mistyped = snakemake("--dry-run", runs=tmp_path, epoch=3)
    assert mistyped.returncode and "unknown setting epoch; there are: profile" in mistyped.stdout + mistyped.stderr


@pytest.mark.slow
@needs_snakemake
def test_a_shard_computes_a_table_and_a_last_job_draws_it(tmp_path, small_demo):
    of = {"notebooks": "table_5", "data_root": small_demo, "categories": "gear", "epochs": 1}
    ran = snakemake(runs=tmp_path, shards=1, **of)
    assert ran.returncode == 0, ran.stdout + ran.stderr + "".join(f.read_text() for f in tmp_path.rglob("*.log"))
    assert sorted(f.name for f in (tmp_path / "workflow").glob("*-of-?")) == ["1-of-1"]
    entries = [json.loads(f.read_text())["config"] for f in (tmp_path / "entries").glob("*/result.json")]
    assert sorted(entry["representation"] for entry in entries) == ["none", "trained"]
    out = tmp_path / "reproduce" / "demo"
    again = snakemake("--dry-run", runs=tmp_path, shards=1, **of)
    said = again.stdout + again.stderr
    assert "shard" in said and "Nothing to be done" not in said, "data may have changed: the store decides"
    assert (out / "table_5.csv").exists() and "table_5" in (out / "index.html").read_text()
