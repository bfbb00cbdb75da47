"""What belongs to each table and figure, and what is no grid of AUROCs: feature spaces and times."""

import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
from test_entries import PATCHCORE, SMALL

from reproduce import grids, notebook, studies
from reproduce.entries import Entry
from reproduce.notebook import Settings
from reproduce.run import run
from reproduce.store import Store
from reproduce.studies import FeatureSpace, InferenceTime

ON_CATEGORIES = [
    "table_1", "table_2", "table_3", "table_4", "table_5", "table_6", "table_7", "table_s1_s2_s3", "table_s4", "table_s7",
    "table_s8",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def settings(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    return Settings(profile="paper", data_root=str(demo_root), btad_root=str(demo_root), seeds=(0, 1))


@pytest.mark.parametrize("item", ON_CATEGORIES)
def test_every_item_covers_its_categories_and_seeds(item, settings):
    tasks = getattr(grids, item)(settings)
    assert {t.category for t in tasks} == {"gear", "fabric"} and {t.config.seed for t in tasks} == {0, 1}
    assert len(tasks) == len(set(tasks)), "nothing twice within an item"
    if item not in ("table_6", "table_7", "table_s8"):
        assert all((t.config.backbone, t.config.epochs) == ("wide_resnet50_2", 120) for t in tasks)


def test_the_papers_settings_are_what_is_computed(settings):
    ratios = {(c.config.dim, c.config.coreset_ratio) for c in grids.table_1(settings)}
    assert ratios == {(1024, 0.25), (1024, 0.1), (1024, 0.01)}
    assert {(c.method, c.config.dim) for c in grids.table_5(settings)} == {("PatchCore", 1024), ("ReConPatch", 512)}
    levels = {(c.config.layers, c.config.patch_size) for c in grids.table_3(settings)}
    assert levels > {((2, 3), 3), ((2, 3), 5), ((1, 2, 3), 5)}
    ensembles = grids.table_6(settings, level="patch", deviation="mean")
    configs = [e.config for e in ensembles]
    found = {(c.resize, c.image_size, c.dim, c.patch_size, c.epochs, c.lr) for c in configs}
    assert found == {(366, 320, 384, 3, 60, 1e-6), (512, 480, 512, 5, 120, 1e-6)}
    members = {m.config.backbone for e in ensembles for m in e.members}
    assert members == {"wide_resnet101_2", "resnext101_32x8d", "densenet201"}
    assert {(e.level, e.deviation) for e in ensembles} == {("patch", "mean")}
    with pytest.raises(ValueError, match="has a model 'densenet211'"):  # before the first is computed
        grids.table_6(settings, {"wide_resnet101_2": "random:0", "densenet211": "random:0"})
    btad = notebook.settings({"In": [], "profile": "paper", "btad_root": settings.btad_root}, dataset="btad")
    table_7 = {(c.config.backbone, c.config.image_size, c.config.aspect) for c in grids.table_7(btad, "squash")}
    assert table_7 == {("wide_resnet101_2", 480, "squash")}
    with pytest.raises(ValueError, match="image_sizes: expected some of 320, 480, got 300"):
        grids.table_6(settings, image_sizes=[300])
    chosen = {n: grids.figure_3(dataclasses.replace(settings, epochs=n))[1].epochs for n in (1, 2, 3, 4, 120)}
    assert chosen == {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 120: (1, 60, 120)}


def test_an_entry_that_several_tables_need_is_one_entry(settings):
    table_1, table_2, table_5 = (set(getattr(grids, n)(settings)) for n in ("table_1", "table_2", "table_5"))
    assert table_5 < table_2, "Table 5's models are Table 2's at 1024 and 512"
    assert len(table_1 & table_2) == 2 * 2, "Table 1's 1 % is Table 2's 1024"


def test_what_is_named_twice_is_computed_once(settings):
    once = grids.peers(settings, ["SPADE"])
    assert grids.peers(settings, ["SPADE", "SPADE", "PatchCore"]) == once
    assert grids.table_6(settings, image_sizes=[320, 320]) == grids.table_6(settings, image_sizes=[320])


def test_umap_is_given_the_exact_neighbours_itself_first(monkeypatch):
    """As UMAP has them: a distance to itself that is not 0 would count as the nearest of all."""
    x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    umap = mock.Mock()
    monkeypatch.setitem(sys.modules, "umap", umap)
    assert studies.embed(x, 5, 3) is umap.UMAP.return_value.fit_transform.return_value
    given = umap.UMAP.call_args.kwargs
    indices, distances = given["precomputed_knn"]
    d = np.linalg.norm(x[:, None] - x[None], axis=2)
    assert (indices == d.argsort(1)[:, :5]).all() and distances.dtype == np.float32 and not distances[:, 0].any()
    np.testing.assert_allclose(distances, np.sort(d, 1)[:, :5], rtol=1e-5)
    assert (given["n_neighbors"], given["random_state"], given["n_jobs"]) == (5, 3, 1)


def test_feature_spaces_are_computed_once_and_know_positions(store, demo_root, monkeypatch):
    monkeypatch.setattr(studies, "embed", lambda p, *_: p[:, :2])  # UMAP compiles itself for half a minute
    tasks = [FeatureSpace(Entry(c, str(demo_root), "gear"), e, 3, 5) for c, e in ((PATCHCORE, ()), (SMALL, (1,)))]
    for task, name in zip(tasks, ("PatchCore", "epoch 1"), strict=True):
        result = run(task, store)
        assert set(result.arrays) == {"positions", name} and list(result.metrics["position_r2"]) == [name]
        assert result.arrays["positions"].shape == (3 * 64, 2) and result.arrays["positions"].max() == 7
        assert result.arrays[name].shape == (3 * 64, 2) and np.isfinite(result.arrays[name]).all()
        assert not run(task, store).computed


def test_inference_is_timed_by_the_papers_protocol(store, demo_root):
    task = InferenceTime(Entry(PATCHCORE, str(demo_root), "gear"), batch=5, warm_ups=1, iterations=4)
    result = run(task, store)
    assert list(result.arrays) == ["all", "backbone", "features", "f", "search", "map"]
    table = np.array(list(result.arrays.values()))
    assert table.shape == (6, 4) and (table > 0).all() and (table[0] >= 0.999 * table[1:].sum(0)).all()
    assert result.metrics["inference_ms"] == pytest.approx(1e3 * np.median(table[0]) / 5)
    assert result.metrics["images_per_second"] == pytest.approx(5 / np.median(table[0]))
    assert result.metrics["peak_memory_bytes"] > 10**7 and not run(task, store).computed
    default = InferenceTime(Entry(PATCHCORE, str(demo_root), "gear"))
    assert (default.warm_ups, default.iterations, default.batch) == (10, 30, 1)
