"""What a published run lacks travels to another machine and comes back as the same entries; light packs; every entry in one CSV."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from test_entries import SMALL

from rcp.data import load_dataset
from reproduce import bundle, grids
from reproduce.__main__ import BUNDLED, main
from reproduce.entries import Entry
from reproduce.notebook import Settings
from reproduce.run import load, run
from reproduce.store import Store


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file, as a real CNN has one."""
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    from torchvision import models

    state = models.resnet18().state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def tasks(weights, demo_root):
    config = SMALL.replace(weights=weights, device="cpu")
    return [Entry(c, str(demo_root), "fabric") for c in (config, config.replace(representation="none"))]


@pytest.fixture(scope="module")
def made(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    size, left = bundle.write(folder, tasks)
    assert left == [] and size == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < bundle.LIMIT
    return folder


@pytest.fixture(scope="module")
def results(made, tmp_path_factory):
    """The bundle's script, in a process that finds nothing of this project, nor what is not on that machine."""
    out, elsewhere = tmp_path_factory.mktemp("out") / "results.zip", tmp_path_factory.mktemp("elsewhere")
    blocked = [
        "pooch", "requests", "faiss", "adamp", "seaborn", "matplotlib", "nbformat", "papermill", "jupyter", "umap",
    ]  # fmt: skip
    (elsewhere / "sitecustomize.py").write_text(
        "import sys\n"
        f"class Absent:\n    def find_spec(self, name, *_):\n        if name.split('.')[0] in {blocked}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.path[:] = [p for p in sys.path if not p.endswith({os.path.basename(os.getcwd())!r})]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(elsewhere)}
    command = [sys.executable, str(made / "run.py"), "--out", str(out), "--jobs", "2"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 results in" in done.stdout
    return out


def test_a_bundle_is_what_the_detector_sees_without_loss(made, tasks, demo_root):
    data, there = load_dataset(demo_root, category="fabric"), bundle.tasks_of(made)[0]
    seen, transform = there.data(), tasks[0].transform("test")
    assert len(seen.train) == len(data.train) and (seen.test.labels == data.test.labels).all()
    for i in range(len(data.test)):
        assert np.array_equal(there.transform("test").image(seen.test.paths[i]), transform.image(data.test.paths[i]))
    assert np.array_equal(seen.test.load_masks(there.transform("test")), data.test.load_masks(transform))


def test_what_comes_back_is_the_same_entry(results, tasks, tmp_path):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    assert there.unpack(results) == (2, 2)
    for task in tasks:
        own, back = run(task, here), load(task, there)
        np.testing.assert_allclose(back.scores, own.scores, rtol=1e-5)
        assert back.metrics["pixel_auroc"] == pytest.approx(own.metrics["pixel_auroc"], abs=1e-6)
        assert back.metrics["n_masks_cropped_away"] == own.metrics["n_masks_cropped_away"]
        assert back.patches == own.patches, "Figure S2 needs the number of patches"
    assert bundle.missing(tasks, there) == ([], [])


def test_a_light_pack_names_no_path_and_says_what_it_lacks(results, tasks, tmp_path):
    with zipfile.ZipFile(results) as packed:
        text = "".join(packed.read(name).decode() for name in packed.namelist() if name.endswith("json"))
    assert str(tasks[0].config.weights) not in text and "tiny.safetensors" in text
    store = Store(tmp_path)
    store.unpack(results)
    with pytest.raises(ValueError, match=r"patch scores: the result \(resnet18, fabric\) is of a light pack"):
        load(tasks[0], store).maps()


def test_the_time_that_is_given_is_kept(made, capsys, tmp_path):
    fresh = shutil.copytree(made, tmp_path / "bundle", ignore=lambda *_: ["runs"])
    with pytest.raises(ValueError, match="no finished entries"):
        bundle.compute(fresh, ["--minutes", "0", "--out", str(tmp_path / "none.zip")])
    assert "time is up: 2 of 2 are left" in capsys.readouterr().out


def test_other_weights_or_other_code_are_refused(made, tmp_path):
    fresh = shutil.copytree(made, tmp_path / "bundle", ignore=lambda *_: ["runs"])
    code = fresh / "code" / "rcp" / "losses.py"
    code.write_text(code.read_text() + "\nOTHER = 1\n")
    with pytest.raises(ValueError, match="code: expected the code of"):
        bundle.tasks_of(fresh)
    file = fresh / "weights" / "tiny.safetensors"
    state = load_file(file)
    save_file({name: value + 1 for name, value in state.items()}, file)
    with pytest.raises(ValueError, match="weights: expected resnet18/blake2b:"):
        bundle.tasks_of(fresh)
    image = next((fresh / "data").rglob("*.webp"))
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"bundle: expected tasks, images and masks as they were .*: copy it again"):
        bundle.tasks_of(fresh)


def test_bad_bundles_are_refused_before_work(tasks, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="entries that the store lacks"):
        bundle.write(tmp_path / "a", [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="a new or empty folder"):
        bundle.write(tmp_path / "full", tasks)
    drawn = dataclasses.replace(tasks[0], config=tasks[0].config.replace(weights="random:0"))
    with pytest.raises(ValueError, match="weights: expected a file, which can travel"):
        bundle.write(tmp_path / "b", [drawn])
    assert not (tmp_path / "b").exists()
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "tiny.safetensors"
    same.touch()
    other = dataclasses.replace(tasks[0], config=tasks[0].config.replace(weights=same))
    with pytest.raises(ValueError, match="weights: expected files of different names"):
        bundle.write(tmp_path / "d", [tasks[0], other])
    monkeypatch.setattr(bundle, "LIMIT", 1 << 20)
    with pytest.raises(ValueError, match=r"at most 1 MiB with one entry's .*fabric-\w+ \d.*, tiny.safetensors \d+"):
        bundle.write(tmp_path / "c", tasks)


def test_what_does_not_fit_is_for_the_next_bundle(tasks, tmp_path, monkeypatch):
    other = [dataclasses.replace(task, category="gear") for task in tasks]
    size, _ = bundle.write(tmp_path / "whole", tasks)
    monkeypatch.setattr(bundle, "LIMIT", size + 10_000)
    first, left = bundle.write(tmp_path / "first", [tasks[0], *other, tasks[1]])
    assert left == other and first <= size + 10_000 and len(bundle.tasks_of(tmp_path / "first")) == 2
    assert [path.name[:6] for path in (tmp_path / "first" / "data").iterdir()] == ["fabric"]
    assert bundle.write(tmp_path / "second", left)[1] == []


def test_two_cnns_that_see_the_same_pixels_both_travel(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "LIMIT", 1 << 30)
    other = tmp_path / "other.safetensors"
    save_file({name: value + 1 for name, value in load_file(tasks[0].config.weights).items()}, other)
    second = dataclasses.replace(tasks[0], config=tasks[0].config.replace(weights=other))
    bundle.write(tmp_path / "bundle", [tasks[0], second])
    assert len(bundle.tasks_of(tmp_path / "bundle")) == 2 and len(list((tmp_path / "bundle" / "data").iterdir())) == 1


def test_what_is_no_entry_does_not_travel_and_is_named(tasks, tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    s = Settings(profile="paper", data_root=str(demo_root), categories=("gear",), seeds=(0, 1))
    assert all(type(task) is Entry for name in BUNDLED for task in getattr(grids, name)(s))
    found, others = bundle.missing([*grids.table_5(s), *grids.bank_times(s)], Store(tmp_path))
    assert len(found) == 3, "PatchCore's two seeds are one entry"
    assert "left out: 4" in bundle.describe(found, others) or "left out: 6" in bundle.describe(found, others)


def test_the_command_line(tmp_path, demo_root, weights, monkeypatch, capsys):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    options = ["--profile", "paper", "--data-root", str(demo_root), "--backbone", "resnet18", "--weights", str(weights)]
    options += ["--categories", "fabric", "--seeds", "0", "--epochs", "1"]
    monkeypatch.setattr(bundle, "_prepare", lambda task, folder: folder.mkdir(parents=True))
    assert main(["bundle", str(tmp_path / "bundle"), "--grids", "table_5", *options]) == 0
    assert "2 entries, about 1 trainings of f" in capsys.readouterr().out
    lines = json.loads((tmp_path / "bundle" / "tasks.json").read_text())
    assert [line["config"]["weights"] for line in lines] == ["tiny.safetensors"] * 2


def test_every_entry_is_a_row_with_seed_device_hours_commit(results, tmp_path, capsys):
    Store(tmp_path / "runs").unpack(results)
    assert main(["entries", str(tmp_path / "entries.csv"), "--runs", str(tmp_path / "runs")]) == 0
    assert "2 rows in" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "entries.csv")
    assert set(rows["representation"]) == {"none", "trained"} and set(rows["weights"]) == {"tiny.safetensors"}
    known = rows[["seed", "device", "commit", "started", "image_auroc", "aupro"]].notna()
    assert (rows["hours"] > 0).all() and known.all(axis=None)
