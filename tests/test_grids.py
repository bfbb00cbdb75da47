"""What belongs to each table and figure, and what its notebook shows of the results."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from test_experiment import PATCHCORE, SMALL

from rcp import __main__ as cli
from rcp import batch, experiment, grids, notebook, views
from rcp.experiment import Cell, Ensemble, run, run_grid
from rcp.notebook import Settings
from rcp.store import Store
from rcp.studies import FeatureSpace, InferenceTime, position_r2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def settings(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    return Settings(profile="paper", data_root=str(demo_root), btad_root=str(demo_root), seeds=(0, 1))


@pytest.fixture
def cells(demo_root):
    return [Cell(config, str(demo_root), category) for category in ("gear", "circuit") for config in (PATCHCORE, SMALL)]


# ---- what is computed ----


@pytest.mark.parametrize("item", grids.ITEMS)
def test_every_item_covers_its_categories_and_seeds(item, settings):
    tasks = grids.cells(item, settings)
    if item == "table_s4":
        assert len(grids.figure_s1(settings)) == 2 and set(grids.figure_s1(settings)) < set(tasks)
        tasks = grids.table_s4(settings)
    if item in ("figure_3", "table_s6"):
        assert len(tasks) == 2 and len({t.category for t in tasks}) == 1
        return
    seeds = {0} if item in ("figure_4", "figure_5") else {0, 1}
    assert {t.category for t in tasks} == {"gear", "fabric", "circuit"} and {t.config.seed for t in tasks} == seeds
    assert len(tasks) == len(set(tasks)), "nothing twice within an item"
    if item not in ("figure_4", "figure_5", "table_7", "table_6"):
        assert all((t.config.backbone, t.config.epochs) == ("wide_resnet50_2", 120) for t in tasks)


def test_the_papers_settings_are_what_is_computed(settings):
    assert {(c.config.dim, c.config.coreset_ratio) for c in grids.table_1(settings)} == {
        (1024, 0.25),
        (1024, 0.1),
        (1024, 0.01),
    }
    assert {(c.method, c.config.dim) for c in grids.table_5(settings)} == {("PatchCore", 1024), ("ReConPatch", 512)}
    assert {(c.config.layers, c.config.patch_size) for c in grids.table_3(settings)} > {
        ((2, 3), 3),
        ((2, 3), 5),
        ((1, 2, 3), 5),
    }
    ensembles = grids.table_6(settings, level="patch", deviation="mean")
    found = {
        (e.config.resize, e.config.image_size, e.config.dim, e.config.patch_size, e.config.epochs, e.config.lr)
        for e in ensembles
    }
    assert found == {(366, 320, 384, 3, 60, 1e-6), (512, 480, 512, 5, 120, 1e-6)}
    assert {m.config.backbone for e in ensembles for m in e.members} == {
        "wide_resnet101_2",
        "resnext101_32x8d",
        "densenet201",
    }
    assert {(e.level, e.deviation) for e in ensembles} == {("patch", "mean")}
    btad = notebook.settings({"In": [], "profile": "paper", "btad_root": settings.btad_root}, dataset="btad")
    table_7 = grids.table_7(btad, "squash")
    assert {(c.config.backbone, c.config.image_size, c.config.aspect) for c in table_7} == {
        ("wide_resnet101_2", 480, "squash")
    }
    with pytest.raises(ValueError, match="image_sizes: expected some of 320, 480, got 300"):
        grids.table_6(settings, image_sizes=[300])


def test_a_cell_that_several_tables_need_is_one_cell(settings):
    items = ("table_1", "table_2", "table_5", "table_s4", "table_s1_s2_s3")
    names = {item: dict(batch._named_cells(given(settings), item)) for item in items}
    assert set(names["table_5"]) < set(names["table_2"]), "Table 5's models are Table 2's at 1024 and 512"
    assert len(set(names["table_1"]) & set(names["table_2"])) == 2 * 3, "Table 1's 1 % is Table 2's 1024"
    assert (
        len(set(names["table_s4"]) & set(names["table_5"]))
        == len(set(names["table_s1_s2_s3"]) & set(names["table_5"]))
        == 2 * 3
    )
    for item in names:
        identities = [json.dumps(c.identity(), sort_keys=True) for c in names[item].values() if c.config.represent]
        assert len(set(identities)) == len(identities), "names tell apart what the store tells apart"


def given(settings: Settings) -> dict:
    return {"profile": "paper", "data_root": settings.data_root, "seeds": [0, 1]}


# ---- the plan: cell by cell, for a scheduler ----


def test_a_plan_names_cells_that_can_be_computed_one_by_one(tmp_path, demo_root, monkeypatch, capsys):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(
        grids, "_models", lambda s: [dataclasses.replace(c, seed=0, device="cpu") for c in (PATCHCORE, SMALL)]
    )
    plan, out = tmp_path / "plan.json", tmp_path / "cells" / "one.json"
    options = ["--data-root", str(demo_root), "--categories", "gear", "--epochs", "1"]
    assert cli.main(["plan", str(plan), "--items", "table_5", "paper_checks", *options]) == 0
    planned = json.loads(plan.read_text())
    assert planned["items"]["paper_checks"] == [] and len(planned["items"]["table_5"]) == 2
    assert planned["notebooks"]["table_5"]["path"] == "notebooks/table_5.ipynb" and planned["parameters"]["epochs"] == 1
    name = planned["items"]["table_5"][0]
    assert name.startswith("gear-PatchCore-") and not (tmp_path / "runs" / "cells").exists(), (
        "planning computes nothing"
    )
    assert cli.main(["cell", str(plan), name, str(out)]) == 0
    first = json.loads(out.read_text())
    assert first["computed"] and 0 <= first["metrics"]["image_auroc"] <= 1
    assert cli.main(["cell", str(plan), name, str(out)]) == 0 and not json.loads(out.read_text())["computed"]
    assert cli.main(["cell", str(plan), "gear-PatchCore-0", str(tmp_path / "absent.json")]) == 1
    assert (
        "no cell 'gear-PatchCore-0' in this plan" in capsys.readouterr().err and not (tmp_path / "absent.json").exists()
    )
    assert cli.main(["plan", str(plan), "--items", "table_55", *options]) == 1
    assert "Did you mean 'table_5'?" in capsys.readouterr().err


def test_a_plan_goes_on_where_an_items_data_are_missing(tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    plan = batch.plan({"profile": "paper", "data_root": str(demo_root)}, ["table_7", "table_5"])
    assert "python -m rcp download btad" in plan["errors"]["table_7"] and len(plan["items"]["table_5"]) == 2 * 3 * 3


# ---- what is shown ----


def test_feature_spaces_are_computed_once_and_know_positions(store, demo_root):
    tasks = [
        FeatureSpace(Cell(PATCHCORE, str(demo_root), "gear"), (), 3, 5),
        FeatureSpace(Cell(SMALL, str(demo_root), "gear"), (1,), 3, 5),
    ]
    grid = run_grid(tasks, store, log=len)
    spaces, titles, positions = views.feature_spaces(grid)
    assert list(spaces) == ["PatchCore", "epoch 1"] and positions.shape == (3 * 64, 2) and positions.max() == 7
    assert all(points.shape == (3 * 64, 2) and np.isfinite(points).all() for points in spaces.values())
    table = views.position_table(grid)
    assert titles["epoch 1"] == f"epoch 1: R² {table.loc['epoch 1', 'R²']:.3f}"
    assert not run(tasks[1], store).computed
    named, _, _ = views.feature_spaces(run_grid(tasks[1:], store, log=len), "projection_layer", "{} projection")
    assert list(named) == ["with projection"]


def test_position_is_predicted_from_other_pictures():
    rng = np.random.default_rng(0)
    positions = np.tile(np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1).reshape(-1, 2), (4, 1))
    picture = np.repeat(np.arange(4), 64)
    assert position_r2(positions + rng.normal(0, 0.1, positions.shape), positions, picture) > 0.95
    assert position_r2(rng.normal(size=(256, 5)), positions, picture) < 0.1
    own = np.eye(4)[picture] * 100 + np.pad(
        positions, ((0, 0), (0, 2))
    )  # a picture's own patches would give the place away
    assert position_r2(np.hstack([own[:, :4], rng.normal(size=(256, 1))]), positions, picture, k=3) <= 1


def test_inference_is_timed_by_the_papers_protocol(store, demo_root):
    task = InferenceTime(Cell(PATCHCORE, str(demo_root), "gear"), batch=2, warm_ups=1, iterations=4)
    result = run(task, store)
    assert (
        set(result.arrays) == {"all", "backbone", "features", "f", "search", "map"} and len(result.arrays["all"]) == 4
    )
    assert result.metrics["inference_ms"] == pytest.approx(1e3 * np.median(result.arrays["all"]) / 2)
    assert result.metrics["images_per_second"] == pytest.approx(2 / np.median(result.arrays["all"]))
    assert result.metrics["peak_memory_bytes"] > 10**7 and not run(task, store).computed
    default = InferenceTime(Cell(PATCHCORE, str(demo_root), "gear"))
    assert (default.warm_ups, default.iterations, default.batch) == (10, 30, 1)
    grid = experiment.Grid(
        [task, dataclasses.replace(task, cell=Cell(SMALL, str(demo_root), "gear"))], [result, result], []
    )
    table = views.inference_times(grid)
    assert table["paper's ms"].tolist() == [37.89, 38.09]
    assert "f and what follows cost +0.0% (paper +0.5%" in views.inference_in_words(table)
    assert list(views.inference_split(grid).columns) == ["all", "backbone", "features", "f", "search", "map"]
    assert views.inference_in_words(views.inference_times(experiment.Grid([], [], []))) == "nothing is computed yet"


def test_maps_stars_and_histograms_come_from_the_store(store, cells, monkeypatch):
    run_grid(cells, store, log=len)
    monkeypatch.setattr(
        experiment.detector.ReConPatch, "predict_features", lambda *_a, **_k: pytest.fail("computed again")
    )
    grid = run_grid(cells, store, render_only=True)
    shown = views.shown_maps(grid, "gear", per_kind=2)
    assert shown.pictures.shape == (8, 64, 64, 3) and set(shown.maps) == {"PatchCore", "ReConPatch"}
    assert (
        shown.masks.any((1, 2)).all() and shown.titles[0] == "broken tooth" and set(shown.thresholds) == set(shown.maps)
    )
    data = cells[0].data()
    best = grid.results[0].metrics["f1_threshold_pixel"]
    assert shown.thresholds["PatchCore"] == best
    with pytest.raises(ValueError, match="category: nothing of 'bottle' is computed; there are: "):
        views.shown_maps(grid, "bottle")
    table = views.star_table(grid)
    masks, maps = data.test.load_masks(cells[0].transform("test")), grid.results[0].maps()
    by_hand = [mask[np.unravel_index(m.argmax(), m.shape)] for mask, m in zip(masks, maps, strict=True) if mask.any()]
    assert table.loc["gear", "PatchCore"] == pytest.approx(100 * np.mean(by_hand))
    assert "PatchCore: the star lies on the defect in" in views.star_in_words(table)
    primes = views.d_primes(grid.frame())
    assert primes.loc["gear", ("ReConPatch", "d′")] == pytest.approx(grid.results[1].metrics["d_prime"])
    assert views.d_prime_comparisons(primes) == [], "the paper prints bottle only"


def test_d_prime_of_bottle_stands_beside_the_papers():
    frame = pd.DataFrame({"method": ["PatchCore", "ReConPatch"], "category": "bottle", "d_prime": [4.5, 5.0]})
    table = views.d_primes(frame)
    assert table.loc["bottle", ("PatchCore", "difference")] == pytest.approx(4.5 - 4.32)
    assert [(c.ours, c.published) for c in views.d_prime_comparisons(table)] == [(4.5, 4.32), (5.0, 4.92)]


def test_ensembles_stand_beside_their_members(store, cells):
    members = tuple(
        dataclasses.replace(cells[1], config=dataclasses.replace(SMALL, weights=f"random:{i}")) for i in (0, 1)
    )
    grid = run_grid([Ensemble(members)], store, log=len)
    frame = views.with_members(grid, store)
    assert frame["backbone"].tolist() == ["resnet18", "resnet18", "resnet18+resnet18"]
    ways = views.ways_of_eq_11(grid, store)
    assert list(ways.index) == [
        f"{level} scores, {d} deviation" for level in ("image", "patch") for d in ("median", "mean")
    ]
    mean = ways["ReConPatch, 64 px", "mean"]
    assert mean["image scores, median deviation"] == pytest.approx(100 * grid.results[0].metrics["image_auroc"])
    patch_level = run(Ensemble(members, level="patch", deviation="mean"), store)
    assert mean["patch scores, mean deviation"] == pytest.approx(100 * patch_level.metrics["image_auroc"])
    assert "Nothing is computed" in views.ensemble_in_words(pd.DataFrame())


def test_paired_differences_are_between_methods_on_the_same_pictures(store, cells):
    from rcp import tables
    from rcp.metrics import paired_bootstrap

    grid = run_grid(cells, store, log=len)
    table = tables.paired(grid)
    assert list(table.index) == ["gear", "circuit", "mean of all 2"]
    core, ours = (run(cell, store) for cell in cells[:2])
    expected = paired_bootstrap([(core.labels, ours.scores, core.scores)])
    assert table.loc["gear"].tolist() == pytest.approx([100 * v for v in expected])
    assert table.loc["mean of all 2", "difference"] == pytest.approx(table["difference"].iloc[:2].mean())
    assert "ReConPatch is" in tables.paired_in_words(table)
    assert tables.paired_in_words(tables.paired(experiment.Grid([], [], []))) == "Nothing to compare yet."
