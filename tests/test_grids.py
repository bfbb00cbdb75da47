"""What belongs to each table and figure, and what its notebook shows of the results."""

import ast
import dataclasses
import json
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_experiment import PATCHCORE, SMALL
from test_notebooks import tiny

from reproduce import __main__ as cli
from reproduce import batch, entries, grids, notebook, views
from rcp.data.perturb import Perturbation
from rcp.data import draw_demo, draw_demo_btad
from reproduce.entries import Entry, Ensemble, run, run_grid
from reproduce.notebook import Settings
from reproduce.store import Store
from reproduce.studies import FeatureSpace, InferenceTime, position_r2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def settings(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    return Settings(profile="paper", data_root=str(demo_root), btad_root=str(demo_root), seeds=(0, 1))


@pytest.fixture
def entries(demo_root):
    return [Entry(config, str(demo_root), category) for category in ("gear", "circuit") for config in (PATCHCORE, SMALL)]


# ---- what is computed ----


@pytest.mark.parametrize("item", grids.ITEMS)
def test_every_item_covers_its_categories_and_seeds(item, settings):
    tasks = grids.entries(item, lambda _dataset: settings)
    for also, of in ((grids.figure_s1, "table_s4"), (grids.figure_s4, "figure_5")):
        if item == of:
            assert len(also(settings)) in (2, 6) and set(also(settings)) < set(tasks)
            tasks = [task for task in tasks if task not in also(settings)]
    if item in ("figure_3", "table_s6"):
        assert len(tasks) == 2 and len({t.category for t in tasks}) == 1
        return
    assert {t.category for t in tasks} == {"gear", "fabric", "circuit"} and {t.config.seed for t in tasks} == {0, 1}
    assert len(tasks) == len(set(tasks)), "nothing twice within an item"
    if item not in ("table_7", "table_6", "table_s7_s8"):
        assert all((t.config.backbone, t.config.epochs) == ("wide_resnet50_2", 120) for t in tasks)


def on_both(settings: Settings) -> dict[str, Settings]:
    return {"mvtec": settings, "btad": Settings(profile="paper", btad_root=settings.btad_root, dataset="btad")}


@pytest.mark.parametrize("item", grids.ITEMS)
def test_what_is_planned_is_what_the_notebook_looks_up(item, settings):
    """Every call of grids in the notebook, with the defaults of its parameters entry, gives together what grids.entries does."""
    source = nbformat.read(Path(__file__).parents[1] / "notebooks" / f"{item}.ipynb", as_version=4)
    code = [entry.source for entry in source.entries if entry.cell_type == "code"]
    both = on_both(settings)
    names: dict = {"grids": grids, "btad_settings": both["btad"], "perturbation": Perturbation()}
    exec(code[0], names)
    names["settings"] = both["btad" if "btad" in code[1] else "mvtec"]
    calls = [call for text in code for call in ast.walk(ast.parse(text)) if isinstance(call, ast.Call)]
    calls = [
        c
        for c in calls
        if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "grids" and c.func.attr != "refinement"
    ]
    shown = [task for call in calls for task in eval(ast.unparse(call), names)]
    assert shown and shown == grids.entries(item, both.__getitem__)


def test_what_is_shown_besides_is_left_out_without_its_data(settings):
    """Figure S4 is, as its notebook does; Table 7 has nothing else to show."""

    def without_btad(dataset):
        if dataset == "btad":
            raise FileNotFoundError("no data/btad")
        return settings

    assert grids.entries("figure_5", without_btad) == grids.table_5(settings)
    with pytest.raises(FileNotFoundError, match="no data/btad"):
        grids.entries("table_7", without_btad)


def test_figure_3_shows_the_first_the_middle_and_the_last_epoch(settings):
    chosen = {n: grids.figure_3(dataclasses.replace(settings, epochs=n))[1].epochs for n in (1, 2, 3, 4, 120)}
    assert chosen == {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 120: (1, 60, 120)}


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
    names = {item: batch._named_entries(given(settings), item) for item in items}
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


# ---- the plan: entry by entry, for a scheduler ----


def test_a_plan_names_cells_that_can_be_computed_one_by_one(tmp_path, demo_root, monkeypatch, capsys):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(
        grids, "_models", lambda s: [dataclasses.replace(c, seed=0, device="cpu") for c in (PATCHCORE, SMALL)]
    )
    plan, out = tmp_path / "plan.json", tmp_path / "entries" / "one.json"
    options = ["--data-root", str(demo_root), "--categories", "gear", "--epochs", "1"]
    assert cli.main(["plan", str(plan), "--items", "table_5", "paper_checks", *options]) == 0
    planned = json.loads(plan.read_text())
    assert planned["items"]["paper_checks"] == {} and len(planned["items"]["table_5"]) == 2
    assert planned["notebooks"]["table_5"]["path"] == "notebooks/table_5.ipynb" and planned["parameters"]["epochs"] == 1
    name = next(iter(planned["items"]["table_5"]))
    assert name.startswith("gear-PatchCore-") and not (tmp_path / "runs" / "entries").exists(), (
        "planning computes nothing"
    )
    assert cli.main(["entry", str(plan), name, str(out)]) == 0
    first = json.loads(out.read_text())
    assert first["computed"] and 0 <= first["metrics"]["image_auroc"] <= 1
    assert (tmp_path / "runs" / first["entry"] / "result.json").exists()
    assert cli.main(["entry", str(plan), name, str(out)]) == 0 and not json.loads(out.read_text())["computed"]
    assert cli.main(["entry", str(plan), "gear-PatchCore-0", str(tmp_path / "absent.json")]) == 1
    assert (
        "no entry 'gear-PatchCore-0' in this plan" in capsys.readouterr().err and not (tmp_path / "absent.json").exists()
    )
    assert cli.main(["plan", str(plan), "--items", "table_55", *options]) == 1
    assert "Did you mean 'table_5'?" in capsys.readouterr().err


def test_a_plan_goes_on_where_an_items_data_are_missing(tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    plan = batch.plan({"profile": "paper", "data_root": str(demo_root)}, ["table_7", "table_5"])
    assert "python -m reproduce download btad" in plan["errors"]["table_7"] and len(plan["items"]["table_5"]) == 2 * 3 * 3


def test_a_plans_versions_change_with_data_and_code_and_only_where_they_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    sets = {
        "data_root": draw_demo(tmp_path / "mvtec", train=3, good=2, per_defect=1),
        "btad_root": draw_demo_btad(tmp_path / "btad", train=3, good=2),
    }
    items = ["figure_5", "table_5", "table_7", "table_s6", "paper_checks", "table_6"]

    def plan(**more) -> dict:
        return batch.plan({name: str(root) for name, root in sets.items()} | more, items)

    def changed(before: dict, after: dict) -> tuple[set[str], set[str]]:
        """Notebooks, and categories of entries, that have other versions."""
        notebooks = {i for i in items if before["notebooks"][i]["version"] != after["notebooks"][i]["version"]}
        pairs = ((name, v, before["items"][i].get(name)) for i in items for name, v in after["items"][i].items())
        return notebooks, {name.partition("-")[0] for name, new, old in pairs if new != old}

    first = plan()
    assert changed(first, plan()) == (set(), set())
    assert {n.partition("-")[0] for n in first["items"]["figure_5"]} == {"gear", "fabric", "circuit", "01", "02", "03"}
    assert first["items"]["table_s6"] == {}, "a time is taken where it is shown"
    redraw(sets["data_root"] / "gear" / "train" / "good" / "000.png")
    second = plan()
    assert changed(first, second) == ({"figure_5", "table_5", "table_s6", "table_6"}, {"gear"})
    redraw(sets["btad_root"] / "01" / "train" / "ok" / "0000.bmp")
    third = plan()
    assert changed(second, third) == ({"figure_5", "table_7"}, {"01"})
    assert changed(third, plan(epochs=2))[0] == set(items) - {"paper_checks"}
    monkeypatch.setitem(grids.MEMBERS, "demo", dict.fromkeys(grids.MEMBERS["demo"], "random:1"))
    assert changed(third, plan())[0] == {"table_6"}
    monkeypatch.undo()
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(batch, "code_of_modules", lambda *_modules: "another rcp")
    assert changed(third, plan())[0] == set(items)


def redraw(image: Path) -> None:
    with Image.open(image) as image:
        image.rotate(180).save(image)


def test_a_category_that_cannot_be_read_leaves_the_others_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    data = draw_demo(tmp_path / "data", train=3, good=2, per_defect=1)
    next((data / "gear" / "ground_truth").rglob("*.png")).write_bytes(b"")
    plan = batch.plan({"data_root": str(data)}, ["table_5"])
    assert not plan["errors"]
    assert {n.partition("-")[0]: v == "unreadable" for n, v in plan["items"]["table_5"].items()} == {
        "gear": True,
        "fabric": False,
        "circuit": False,
    }


def test_rendering_fails_where_the_store_lacks_entries(tmp_path, demo_root, monkeypatch, capsys):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(batch, "_run", lambda *_job: pytest.fail("rendered"))
    plan, out = tmp_path / "plan.json", tmp_path / "table_5.json"
    assert cli.main(["plan", str(plan), "--items", "table_5", "--data-root", str(demo_root)]) == 0
    assert cli.main(["render", str(plan), "table_5", str(out)]) == 1 and not out.exists()
    assert "table_5: 6 of 6 entries are not in the store" in capsys.readouterr().err


def test_the_index_of_a_plan_shows_what_is_rendered_and_says_what_is_not(tmp_path, demo_root, monkeypatch, capsys):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    items, plan = ["paper_checks", "table_1", "table_5", "table_7"], tmp_path / "plan.json"
    options = ["--profile", "paper", "--data-root", str(demo_root), "--categories", "gear"]
    assert cli.main(["plan", str(plan), "--items", *items, *options]) == 0
    assert cli.main(["render", str(plan), "paper_checks", str(tmp_path / "paper_checks.json")]) == 0
    (tmp_path / "table_1.json").write_text('{"version": "of an earlier plan"}')
    folder = tmp_path / "runs" / "reproduce" / "paper"
    for name in ("table_1", "table_7_image_auroc"):
        (folder / f"{name}.csv").write_text("a,b\n1,2\n")
    assert cli.main(["index", str(plan), str(tmp_path)]) == 0
    index = (folder / "index.html").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "index.html")
    assert "1 of 4 notebooks done, 3 failed" in index and "paper_checks.csv" in index
    assert "download btad" in index and index.count("not rendered; its log") == 2 * 2
    assert "table_1.csv" not in index and "table_7_image_auroc.csv" not in index


# ---- the batch ----

WRITES = """
from reproduce import notebook
settings = notebook.settings(globals())
if epochs == 1:
    settings.out("table_9.csv").write_text("a,b\\n1,2\\n")
    settings.out("table_9_more.png").write_bytes(b"")
assert epochs < 3
"""


def test_the_index_shows_nothing_that_an_earlier_run_wrote(tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    file, folder = tiny(tmp_path, "table_9", WRITES), tmp_path / "runs" / "reproduce" / "demo"

    def index(epochs: int) -> str:
        (outcome,) = batch.reproduce({"data_root": str(demo_root), "epochs": epochs}, [file], say=len)
        assert bool(outcome.error) == (epochs == 3)
        return (folder / "index.html").read_text()

    assert "table_9.csv" in index(1) and "table_9_more.png" in index(1), "up to date the second time"
    assert "table_9.csv" not in (failed := index(3)) and "table_9_more.png" not in failed
    assert "table_9.csv" in index(1)
    assert "table_9.csv" not in (silent := index(2)) and "table_9_more.png" not in silent
    assert not list(folder.glob("table_9*.csv"))


def test_a_page_is_written_while_the_next_notebook_runs_and_its_failure_is_the_items(tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    begun, ticks = tmp_path / "begun", tmp_path / "runs" / "reproduce" / "demo"
    files = [tiny(tmp_path, "one", "1"), tiny(tmp_path, "two", f"open({str(begun)!r}, 'w').close()")]

    def to_html(executed: Path) -> None:
        if executed.stem == "two":
            raise OSError("no space left")
        until = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < until, "the next notebook waits for this page"
            time.sleep(0.05)

    monkeypatch.setattr(batch, "_to_html", to_html)
    one, two = batch.reproduce({"data_root": str(demo_root)}, files, say=len)
    assert not one.error and two.error == "its HTML page: OSError: no space left"
    assert (ticks / ".one.json").exists() and not (ticks / ".two.json").exists(), "only what is whole is ticked off"
    assert "no space left" in (ticks / "index.html").read_text()


# ---- what is shown ----


def test_feature_spaces_are_computed_once_and_know_positions(store, demo_root):
    tasks = [
        FeatureSpace(Entry(PATCHCORE, str(demo_root), "gear"), (), 3, 5),
        FeatureSpace(Entry(SMALL, str(demo_root), "gear"), (1,), 3, 5),
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


def test_position_is_predicted_from_other_images():
    rng = np.random.default_rng(0)
    positions = np.tile(np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1).reshape(-1, 2), (4, 1))
    image = np.repeat(np.arange(4), 64)
    assert position_r2(positions + rng.normal(0, 0.1, positions.shape), positions, image) > 0.95
    assert position_r2(rng.normal(size=(256, 5)), positions, image) < 0.1
    own = np.eye(4)[image] * 100 + np.pad(
        positions, ((0, 0), (0, 2))
    )  # an image's own patches would give the place away
    assert position_r2(np.hstack([own[:, :4], rng.normal(size=(256, 1))]), positions, image, k=3) <= 1


def test_inference_is_timed_by_the_papers_protocol(store, demo_root):
    task = InferenceTime(Entry(PATCHCORE, str(demo_root), "gear"), batch=2, warm_ups=1, iterations=4)
    result = run(task, store)
    assert (
        set(result.arrays) == {"all", "backbone", "features", "f", "search", "map"} and len(result.arrays["all"]) == 4
    )
    assert result.metrics["inference_ms"] == pytest.approx(1e3 * np.median(result.arrays["all"]) / 2)
    assert result.metrics["images_per_second"] == pytest.approx(2 / np.median(result.arrays["all"]))
    assert result.metrics["peak_memory_bytes"] > 10**7 and not run(task, store).computed
    default = InferenceTime(Entry(PATCHCORE, str(demo_root), "gear"))
    assert (default.warm_ups, default.iterations, default.batch) == (10, 30, 1)
    grid = experiment.Grid(
        [task, dataclasses.replace(task, entry=Entry(SMALL, str(demo_root), "gear"))], [result, result], []
    )
    table = views.inference_times(grid)
    assert table["paper's ms"].tolist() == [37.89, 38.09]
    assert "f and what follows cost +0.0% (paper +0.5%" in views.inference_in_words(table)
    assert list(views.inference_split(grid).columns) == ["all", "backbone", "features", "f", "search", "map"]
    assert views.inference_in_words(views.inference_times(experiment.Grid([], [], []))) == "nothing is computed yet"


def test_maps_stars_and_histograms_come_from_the_store(store, entries, monkeypatch):
    run_grid(entries, store, log=len)
    monkeypatch.setattr(
        experiment.detector.ReConPatch, "predict_features", lambda *_a, **_k: pytest.fail("computed again")
    )
    grid = run_grid(entries, store, render_only=True)
    shown = views.shown_maps(grid, "gear", per_kind=2)
    assert shown.images.shape == (8, 64, 64, 3) and set(shown.maps) == {"PatchCore", "ReConPatch"}
    assert (
        shown.masks.any((1, 2)).all() and shown.titles[0] == "broken tooth" and set(shown.thresholds) == set(shown.maps)
    )
    data = entries[0].data()
    best = grid.results[0].metrics["f1_threshold_pixel"]
    assert shown.thresholds["PatchCore"] == best
    with pytest.raises(ValueError, match="category: nothing of 'bottle' is computed; there are: "):
        views.shown_maps(grid, "bottle")
    table = views.star_table(grid)
    masks, maps = data.test.load_masks(entries[0].transform("test")), grid.results[0].maps()
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


def test_ensembles_stand_beside_their_members(store, entries):
    members = tuple(
        dataclasses.replace(entries[1], config=dataclasses.replace(SMALL, weights=f"random:{i}")) for i in (0, 1)
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


def test_paired_differences_are_between_methods_on_the_same_images(store, entries):
    from reproduce import tables
    from rcp.metrics import paired_bootstrap

    grid = run_grid(entries, store, log=len)
    table = tables.paired(grid)
    assert list(table.index) == ["gear", "circuit", "mean of all 2"]
    core, ours = (run(entry, store) for entry in entries[:2])
    expected = paired_bootstrap([(core.labels, ours.scores, core.scores)])
    assert table.loc["gear"].tolist() == pytest.approx([100 * v for v in expected])
    assert table.loc["mean of all 2", "difference"] == pytest.approx(table["difference"].iloc[:2].mean())
    assert "ReConPatch is" in tables.paired_in_words(table)
    assert tables.paired_in_words(tables.paired(experiment.Grid([], [], []))) == "Nothing to compare yet."
