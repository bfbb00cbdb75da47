"""One grid cell computed once: identity, resumption, sharing of features, and errors before work."""

import dataclasses
import json

import numpy as np
import pytest

from rcp import experiment
from rcp.config import Config
from rcp.data import load_dataset
from rcp.experiment import Cell, code_version, identity_of, load, run, run_grid, shard_of
from rcp.store import Store

SMALL = Config.build(
    backbone="resnet18",
    weights="random:0",
    resize=64,
    image_size=64,
    dim=64,
    projection=16,
    epochs=1,
    batch_size=256,
    coreset_ratio=0.05,
)
PATCHCORE = dataclasses.replace(SMALL, represent=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def cell(demo_root):
    return Cell(SMALL, str(demo_root), "fabric")


def test_a_cell_is_computed_once_and_holds_what_made_it(cell, store):
    first, second = run(cell, store), run(cell, store)
    assert first.computed and not second.computed
    assert first.metrics == second.metrics and np.array_equal(first.scores, second.scores)
    info = second.info
    assert 0 <= info["metrics"]["image_auroc"] <= 1
    assert info["config"]["backbone"] == "resnet18" and info["data"]["category"] == "fabric"
    assert {"features", "training", "coreset", "scoring"} <= set(info["seconds"])
    assert info["process_peak_memory_bytes"] > 0 and info["versions"]["torch"] and len(info["history"]) == 1
    assert json.dumps(info, allow_nan=False)


def test_the_stored_cell_is_what_the_detector_gives(cell, store, demo_root):
    """Grid and interactive use are one pipeline."""
    from rcp import ReConPatch
    from rcp.metrics import evaluate

    data = load_dataset(demo_root, category="fabric")
    out = ReConPatch(**SMALL.asdict()).fit(data.train, log=len).predict(data.test)
    result = run(cell, store)
    np.testing.assert_allclose(result.scores, out.scores, rtol=1e-5)
    assert result.metrics["pixel_auroc"] == pytest.approx(evaluate(out, data.test)["pixel_auroc"], abs=1e-6)


def test_features_are_shared_by_cells_that_need_the_same(cell, store, monkeypatch):
    run(cell, store)
    monkeypatch.setattr(
        experiment.detector.PatchExtractor, "__call__", lambda *_a, **_k: pytest.fail("features were extracted again")
    )
    other = dataclasses.replace(cell, config=dataclasses.replace(SMALL, k=4, alpha=0.2, dim=32, coreset_ratio=0.02))
    assert run(other, store).computed
    assert run(dataclasses.replace(cell, config=PATCHCORE), store).computed


def test_identity_follows_what_matters_and_nothing_else(cell, demo_root, tmp_path):
    data = load_dataset(demo_root, category="fabric")
    same = identity_of(cell, data)
    assert identity_of(dataclasses.replace(cell, config=dataclasses.replace(SMALL, device="cpu")), data) == same
    for change in ({"k": 4}, {"seed": 1}, {"weights": "random:1"}, {"represent": False}):
        assert identity_of(dataclasses.replace(cell, config=dataclasses.replace(SMALL, **change)), data) != same
    assert identity_of(cell, load_dataset(demo_root, category="gear")) != same
    patchcore = [
        identity_of(dataclasses.replace(cell, config=dataclasses.replace(PATCHCORE, **c)), data)
        for c in ({}, {"k": 4}, {"seed": 7})
    ]
    assert patchcore[0] == patchcore[1] == patchcore[2], "nothing of f, and no seed, is in PatchCore's result"
    drawn = [dataclasses.replace(PATCHCORE, coreset_start="random", seed=s) for s in (0, 1)]
    assert identity_of(dataclasses.replace(cell, config=drawn[0]), data) != identity_of(
        dataclasses.replace(cell, config=drawn[1]), data
    )


def test_code_version_ignores_comments_and_follows_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for i, source in enumerate(['"""Doc."""\nx = 1  # why\n', "x = 1\n", "x = 2\n"]):
        (tmp_path / f"example{i}.py").write_text(source)
        versions.append(code_version((__import__(f"example{i}"),)))
    assert versions[0] == versions[1] != versions[2]


def test_a_damaged_cell_is_computed_again(demo_root, tmp_path):
    store, cell = Store(tmp_path), Cell(PATCHCORE, str(demo_root), "circuit")
    before = run(cell, store)
    folder = store.folder("cells", identity_of(cell, load_dataset(demo_root, category="circuit")))
    (folder / "result.json").write_text("{")
    with pytest.warns(UserWarning, match="set aside"):
        again = run(cell, store)
    assert again.computed and again.metrics == before.metrics


def test_a_grid_resumes_shards_and_renders(cell, store, tmp_path):
    cells = [dataclasses.replace(cell, config=dataclasses.replace(SMALL, seed=s)) for s in range(3)]
    fresh = Store(tmp_path)
    (tmp_path / "features").symlink_to(store.root / "features")
    grid = run_grid(cells, fresh, render_only=True)
    assert not grid.results and grid.missing == cells
    grid = run_grid(cells, fresh, shard="2/3")
    assert grid.cells == [cells[1]] and grid.missing == [cells[0], cells[2]]
    grid = run_grid(cells, fresh)
    assert [r.info["config"]["seed"] for r in grid.results] == [0, 1, 2] and not grid.missing
    frame = grid.frame()
    assert frame["seed"].tolist() == [0, 1, 2] and set(frame["method"]) == {"ReConPatch"}
    assert load(cells[0], fresh).metrics == grid.results[0].metrics


def test_shards_are_a_partition():
    cells = list(range(10))
    assert sorted(c for i in range(1, 4) for c in shard_of(cells, f"{i}/3")) == cells
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0", ""):
        with pytest.raises(ValueError, match="shard: expected 'i/n'"):
            shard_of(cells, wrong)


def test_bad_input_costs_no_features(demo_root, tmp_path, monkeypatch):
    import shutil

    root = tmp_path / "mvtec" / "fabric"
    shutil.copytree(demo_root / "fabric", root)
    bad = sorted((root / "test" / "good").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:500])
    monkeypatch.setattr(
        experiment.detector.PatchExtractor, "__call__", lambda *_a, **_k: pytest.fail("features were computed")
    )
    with pytest.raises(ValueError, match=bad.name):
        run(Cell(SMALL, str(root.parent), "fabric"), Store(tmp_path / "runs"))
    with pytest.raises(ValueError, match="coreset_ratio"):
        run(Cell(dataclasses.replace(SMALL, coreset_ratio=1e-5), str(demo_root), "gear"), Store(tmp_path / "runs"))


def test_no_disk_space_is_noticed_before_anything_is_decoded(cell, tmp_path, monkeypatch):
    from collections import namedtuple

    from rcp import store as store_module

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _path: usage(0, 0, 10**4))
    monkeypatch.setattr(experiment, "load_images", lambda *_a: pytest.fail("pictures were decoded"))
    with pytest.raises(OSError, match=r"patch features need 0\.01 GB, 0\.00 GB are free"):
        run(cell, Store(tmp_path))


def test_without_masks_image_metrics_still_stand(demo_root, tmp_path):
    import shutil

    shutil.copytree(demo_root / "fabric", tmp_path / "set" / "fabric", ignore=shutil.ignore_patterns("ground_truth"))
    result = run(Cell(PATCHCORE, str(tmp_path / "set"), "fabric"), Store(tmp_path / "runs"))
    assert result.metrics["pixel_auroc"] is None and "pixel_auroc" in result.metrics["undefined"]
    assert result.metrics["image_auroc"] == pytest.approx(
        run(Cell(PATCHCORE, str(demo_root), "fabric"), Store(tmp_path / "runs")).metrics["image_auroc"]
    )


def test_a_test_set_of_one_class_says_what_is_undefined(demo_root, tmp_path):
    import shutil

    shutil.copytree(demo_root / "fabric", tmp_path / "set" / "fabric")
    for folder in (tmp_path / "set" / "fabric" / "test").iterdir():
        if folder.name != "good":
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "set" / "fabric" / "ground_truth")
    result = run(Cell(PATCHCORE, str(tmp_path / "set"), "fabric"), Store(tmp_path / "runs"))
    assert result.metrics["image_auroc"] is None and "image_auroc" in result.metrics["undefined"]
    assert result.metrics["normal_threshold"] > 0


def test_on_each_demo_category_both_methods_tell_defects_apart():
    """The cells of the demo notebooks, from their own store: computed here or there, once."""
    from rcp.notebook import Settings

    settings = Settings()
    grid = run_grid(settings.cells([settings.config(represent=r) for r in (False, True)]), settings.store, log=len)
    frame = grid.frame()
    assert len(frame) == 6 and set(frame["category"]) == {"gear", "fabric", "circuit"}
    assert (frame["image_auroc"] > 0.9).all(), frame[["method", "category", "image_auroc"]]
