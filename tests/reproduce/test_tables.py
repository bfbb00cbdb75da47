"""The comparison: ours beside the published, means over what was run, and what is shown, said and written of it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from rcp import Config
from reproduce import paper, tables, views
from reproduce.entries import Ensemble
from reproduce.run import Grid, Result
from reproduce.store import Store

GROUPS = {"object": paper.OBJECTS, "texture": paper.TEXTURES}
TWO = {
    "PatchCore": {"bottle": [1.0, 0.98], "carpet": [0.97, 0.97]},
    "ReConPatch": {"bottle": [0.99, 0.99], "carpet": [0.96, 0.98]},
}


def frame(values: dict[str, dict[str, list]], metric="image_auroc", **columns) -> pd.DataFrame:
    """A frame as Grid.frame gives it: method -> category -> a value per seed; None is undefined."""
    return pd.DataFrame(
        {"method": m, "category": c, "seed": s, metric: v, "undefined": {} if v is not None else {metric: f"no {c}"}} | columns
        for m, of in values.items()
        for c, seeds in of.items()
        for s, v in enumerate(seeds)
    )  # fmt: skip


def at(rows: pd.DataFrame, kind: str, row: str = "all", setting: str | None = None) -> pd.Series:
    """The one row of this kind."""
    found = rows[(rows["kind"] == kind) & (rows["row"] == row) & ((setting is None) | (rows["setting"] == setting))]
    (index,) = found.index
    return found.loc[index]


# ---- compare ----


def test_ours_stand_beside_the_published_of_the_same_categories():
    rows = tables.compare(frame(TWO), tables.targets("5"), groups=GROUPS)
    assert list(rows) == tables.COLUMNS and list(dict.fromkeys(rows["setting"])) == ["PatchCore", "ReConPatch"]
    kinds = rows[rows["setting"] == "PatchCore"][["kind", "row"]].to_numpy().tolist()
    assert kinds == [
        ["category", "bottle"], ["category", "carpet"], ["group", "object"], ["group", "texture"], ["groups", "all"], ["all", "all"],
    ]  # fmt: skip
    bottle = at(rows, "category", "bottle", "PatchCore")
    assert (bottle["mean"], bottle["spread"]) == pytest.approx((99, np.std([100, 98], ddof=1)))
    assert (bottle["n"], bottle["seeds"], bottle["of"], bottle["left_out"], bottle["why"]) == (1, 2, 2, "", "")
    assert at(rows, "category", "carpet", "PatchCore")["difference"] == pytest.approx(97.0 - 98.7)
    mean = at(rows, "all", setting="PatchCore")
    assert mean["published"] == pytest.approx((100 + 98.7) / 2) and mean["n"] == 2, "of the same categories"
    assert mean["spread"] == pytest.approx(np.std([98.5, 97.5], ddof=1)), "of the seeds' own means"


def test_without_groups_there_are_categories_or_only_the_mean_of_all():
    assert tables.compare(frame(TWO), groups={})["kind"].tolist() == ["category", "category", "all"] * 2
    alone = tables.compare(frame(TWO), metric=["image_auroc", "image_auroc"])
    assert alone["kind"].tolist() == ["all"] * 4 and alone["published"].isna().all()


def test_all_categories_are_held_against_the_papers_own_averages():
    whole = frame({m: {c: [0.98] for c in paper.CATEGORIES} for m in TWO}).assign(pixel_auroc=0.98)
    rows = tables.compare(whole, tables.targets("5"), metric=tables.AUROC, groups=GROUPS)
    image, pixel = (at(part, "all", setting="ReConPatch") for _, part in rows.groupby("metric"))
    assert (image["published"], pixel["published"]) == (99.56, 98.07), "98.18 is another model's"
    assert np.isnan(image["spread"]), "one seed has no spread"


def test_the_permuted_pixel_column_is_never_a_target():
    pixel = tables.compare(frame(TWO, "pixel_auroc"), tables.targets("5"), metric="pixel_auroc", groups=GROUPS)
    assert pixel[pixel["setting"] == "ReConPatch"]["published"].isna().all()
    assert at(pixel, "category", "bottle", "PatchCore")["published"] == 98.6
    assert paper.table("5")["value"].notna().sum() > 200, "the paper's own table is as it was"


def test_an_undefined_category_is_left_out_of_every_mean_and_says_why():
    one_class = {"PatchCore": {"bottle": [0.99], "carpet": [None]}, "ReConPatch": {"bottle": [0.98], "carpet": [0.5]}}
    rows = tables.compare(frame(one_class), tables.targets("5"), groups=GROUPS)
    mean = at(rows, "all", setting="PatchCore")
    assert (mean["n"], mean["left_out"], mean["why"], mean["published"]) == (1, "carpet", "carpet: no carpet", 100)
    assert at(rows, "all", setting="ReConPatch")["mean"] == pytest.approx(98), "settings are over the same categories"
    carpet = at(rows, "category", "carpet", "PatchCore")
    assert np.isnan(carpet["mean"]) and (carpet["n"], carpet["why"], carpet["published"]) == (0, "no carpet", 98.7)
    assert not (rows["row"] == "texture").any(), "no mean of no texture"
    nothing = tables.compare(frame({"PatchCore": {"bottle": [None]}}))
    assert nothing["mean"].isna().all() and tables.in_words(nothing) == "Undefined or missing."


def test_a_seed_that_lacks_a_category_is_left_out_and_counted():
    values = {"PatchCore": {"bottle": [0.99, 0.97], "cable": [0.95, 0.95]}}
    values["ReConPatch"] = {"bottle": [0.99, 0.97], "cable": [0.95]}
    mean = at(tables.compare(frame(values), groups=GROUPS), "all", setting="ReConPatch")
    assert (mean["seeds"], mean["of"], mean["mean"]) == (1, 2, pytest.approx(97)) and np.isnan(mean["spread"])


def test_a_table_of_settings_stands_beside_averages_over_other_categories():
    values = {"ReConPatch": {"bottle": [0.99, 0.97], "cable": [0.95, 0.97]}}
    both = pd.concat([frame(values, k=3), frame(values, k=5), frame(values, k=7)])
    rows = tables.compare(both, tables.targets("S1"), by=["k"])
    assert rows["setting"].tolist() == ["k 3", "k 5", "k 7"], "a method that is alone is not named"
    assert rows["published"].tolist() == [99.5, 99.56, 99.55] and rows["spread"].tolist() == pytest.approx([0] * 3)
    detailed = tables.compare(both, tables.targets("S1"), by=["k"], groups=GROUPS)
    assert at(detailed, "category", "bottle", "k 3")[["published"]].isna().all(), "an average is of no category"


def test_settings_of_two_methods_are_told_apart_and_what_is_not_printed_has_no_target():
    values = pd.concat([frame(TWO, dim=512), frame(TWO, dim=7)])
    rows = tables.compare(values, tables.targets("2"), by=["dim"])
    assert rows["setting"].tolist() == ["PatchCore, D 512", "ReConPatch, D 512", "PatchCore, D 7", "ReConPatch, D 7"]
    published = rows.set_index("setting")["published"]
    assert published["PatchCore, D 512"] == 98.66 and np.isnan(published["ReConPatch, D 7"])
    alone = tables.compare(values[values["method"] == "PatchCore"], tables.targets("2"), by=["dim"])
    assert set(alone["setting"]) == {"PatchCore, D 512", "PatchCore, D 7"}, "named as beside ReConPatch"
    three = "wide_resnet101_2+resnext101_32x8d+densenet201"
    ensemble = frame({"ReConPatch": {"bottle": [0.9]}}, image_size=480, backbone=three)
    assert tables.compare(ensemble, tables.targets("6"), by=["image_size", "backbone"])["published"].tolist() == [99.72]


def test_btad_is_held_against_its_own_rows_where_the_backbone_is_known():
    three = frame({m: {c: [0.9] for c in ("01", "02", "03")} for m in TWO})
    rows = tables.compare(three, tables.targets("7"), groups={})
    assert rows[rows["setting"] == "ReConPatch"]["published"].tolist() == [99.7, 87.7, 100, 95.8]
    assert rows[rows["setting"] == "PatchCore"]["published"].isna().all()
    two = tables.compare(three[three["category"] != "03"], tables.targets("7"), groups={})
    assert at(two, "all", setting="ReConPatch")["published"] == pytest.approx((99.7 + 87.7) / 2)


def test_d_prime_of_bottle_is_the_one_that_is_printed():
    values = frame({"ReConPatch": {"bottle": [4.5, 5.1], "cable": [2.0, 2.0]}}, "d_prime")
    rows = tables.compare(values, tables.targets("F4"), metric="d_prime", scale=1, groups={})
    bottle = at(rows, "category", "bottle")
    assert (bottle["mean"], bottle["published"], bottle["difference"]) == pytest.approx((4.8, 4.92, -0.12))
    assert rows["published"].isna().tolist() == [False, True, True]


def test_nothing_computed_is_an_empty_table_with_all_columns():
    empty = Grid([], [], []).frame()
    rows = tables.compare(empty, tables.targets("2"), by=["dim"])
    assert rows.empty and list(rows) == tables.COLUMNS and tables.in_words(rows) == "Nothing is computed yet."
    assert "nothing is computed yet" in tables.show(rows, "c").to_html()
    assert tables.bank_memory(empty, rows).empty and tables.paired(Grid([], [], [])).empty
    assert all(f(empty).empty for f in (tables.drops, tables.gains)) and tables.one_at_a_time(empty, "k", k=5).empty


# ---- frames to compare ----


def test_each_drop_stands_beside_the_same_drop_of_the_printed_rows():
    """The paper's own rows of Table S5 as if we had computed them: its averages "with" are of another kind."""
    rows = "method == 'PatchCore' and category in @paper.CATEGORIES and augmentation != 'difference'"
    printed = paper.table("S5").query(rows).eval("image_auroc = value / 100").assign(seed=0)
    rows = tables.compare(tables.drops(printed), tables.targets("S5"), by=["augmentation"], groups=GROUPS)
    assert rows["difference"].abs().max() < 0.02, "the paper's own rows differ from themselves by rounding only"
    settings = [f"PatchCore, {how}" for how in ("without perturbations", "with perturbations", "drop")]
    assert list(dict.fromkeys(rows["setting"])) == settings
    assert at(rows, "all", setting=settings[2])["published"] == pytest.approx(3.83, abs=0.01)
    assert at(rows, "groups", setting=settings[1])["published"] == pytest.approx(95.48, abs=0.01)
    assert at(rows, "groups", setting=settings[2])["published"] == pytest.approx(3.59, abs=0.01)


def test_a_gain_is_of_the_same_category_seed_and_size():
    def of(value: float, refinement: str, kind: str, size: int) -> pd.DataFrame:
        return frame({"ReConPatch": {"bottle": [value]}}, refinement=refinement, simulation=kind, image_size=size)

    parts = [of(0.9, "without", "no refinement", 320), of(0.8, "without", "no refinement", 480)]
    parts += [of(0.93, "with", "structure", 320), of(0.81, "with", "structure", 480), of(0.89, "with", "texture", 320)]
    rows = tables.compare(tables.gains(pd.concat(parts)), by=["image_size", "simulation"], groups={})
    means = rows[rows["kind"] == "all"].set_index("setting")["mean"]
    expected = {"320 px, structure": 3, "320 px, texture": -1, "480 px, structure": 1}
    assert means.to_dict() == pytest.approx(expected)


def test_one_setting_varies_at_a_time():
    varied = pd.DataFrame({"k": [5, 3, 5, 5], "margin": [1.0, 1.0, 2.0, 1.0], "alpha": [0.5, 0.5, 0.5, 0.0]})
    defaults = {"k": 5, "margin": 1.0, "alpha": 0.5}
    assert tables.one_at_a_time(varied, "k", **defaults)["k"].tolist() == [3, 5]
    assert tables.one_at_a_time(varied, "alpha", **defaults)["alpha"].tolist() == [0.0, 0.5]


def test_bank_memory_is_table_2_with_bytes():
    values = frame({"PatchCore": {"bottle": [0.9]}}, dim=512, bank_bytes=2048, patches=150, coreset_ratio=0.01)
    found = tables.bank_memory(values, tables.compare(values, tables.targets("2"), by=["dim"]))
    (row,) = found.to_dict("records")
    assert (row["method"], row["dim"]) == ("PatchCore", 512)
    assert (row["measured"], row["eq_s1"], row["megabytes"]) == (2048, 2048, 0.002048)
    assert (row["mean"], row["published"]) == pytest.approx((90, 98.66))


class Task:
    """An entry, and its result: labels, scores; the highest point of the first ``hits`` of two maps lies within the corner."""

    def __init__(self, method, category, labels=(0, 1, 1), scores=(0, 1, 2), seed=0, hits=0, has_masks=True):
        self.method, self.category, self.config = method, category, SimpleNamespace(seed=seed)
        self.labels, self.scores, self.has_masks = np.array(labels), np.array(scores, float), has_masks
        self.metrics = {"undefined": {} if len(set(labels)) > 1 else {"image_auroc": "one class only"}}
        self.maps_ = np.zeros((2, 4, 4))
        self.maps_[:, 3, 3], self.maps_[:hits, 0, 0] = 1, 2

    def columns(self):
        return {"method": self.method, "category": self.category, "dim": 64, "seed": self.config.seed}

    def data(self):
        masks = np.zeros((2, 4, 4), bool)
        masks[:, 0, 0] = True
        return SimpleNamespace(test=SimpleNamespace(has_masks=self.has_masks, load_masks=lambda _transform: masks))

    def transform(self, _split):
        return None

    def maps(self):
        return self.maps_


def test_paired_is_between_the_methods_on_the_same_images():
    scores = {"PatchCore": (0, 2, 1, 3), "ReConPatch": (0, 1, 2, 3)}
    tasks = [Task(method, "bottle", (0, 0, 1, 1), of) for method, of in scores.items()]
    rows = tables.paired(Grid(tasks, tasks, []), ["dim"])
    bottle = at(rows, "category", "bottle", "ReConPatch - PatchCore, D 64")
    assert bottle["mean"] == pytest.approx(25) and bottle["low"] <= 25 <= bottle["high"]
    assert "bottle" in tables.markdown(rows) and "+25.00 [" in tables.in_words(rows)


def test_the_bootstrap_is_of_the_difference():
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], [7, 9])
    first, second = rng.integers(0, 6, (3, 16)), rng.integers(0, 6, (2, 16))  # ties, and other numbers of seeds
    estimate, low, high = found = tables.bootstrap([(labels, first, second)])
    each = [np.mean([roc_auc_score(labels, s) for s in scores]) for scores in (first, second)]
    assert low <= estimate <= high and estimate == pytest.approx(each[0] - each[1])
    np.testing.assert_array_equal(found, tables.bootstrap([(labels, first, second)]), "the draws have a seed")
    assert any(found != tables.bootstrap([(labels, first, second)], seed=1))
    assert not tables.bootstrap([(labels, first, first)]).any()
    groups = [(labels, labels + rng.normal(size=(1, 16)), labels + rng.normal(size=(1, 16))) for _ in range(8)]
    one, all_ = tables.bootstrap(groups[:1]), tables.bootstrap(groups)
    assert np.ptp(all_[1:]) < 0.6 * np.ptp(one[1:])
    assert all_[0] == pytest.approx(np.mean([tables.bootstrap([g])[0] for g in groups]))


def test_paired_is_of_seeds_that_both_have():
    seeds = {"PatchCore": (0, 1), "ReConPatch": (1, 2)}
    tasks = [Task(m, "bottle", (0, 0, 1, 1), (0, s, 1, 3), seed=s) for m, of in seeds.items() for s in of]
    row = at(tables.paired(Grid(tasks, tasks, [])), "all")
    assert (row["seeds"], row["mean"]) == (1, 0)
    assert tables.paired(Grid(tasks[::3], tasks[::3], [])).query("kind == 'category'").empty, "no seed in common"


def test_paired_leaves_a_category_of_one_class_out():
    labels = {"bottle": (0, 1, 1), "carpet": (1, 1, 1)}
    tasks = [Task(m, c, of) for c, of in labels.items() for m in ("PatchCore", "ReConPatch")]
    rows = tables.paired(Grid(tasks, tasks, []))
    mean, carpet = at(rows, "all"), at(rows, "category", "carpet")
    assert (mean["left_out"], mean["n"], mean["mean"], mean["low"]) == ("carpet", 1, 0, 0)
    assert np.isnan(carpet["mean"]) and carpet["why"] == "one class only"
    assert tables.in_words(rows).endswith("image AUROC +0.00 [+0.00, +0.00], zero is within.")


def test_the_star_is_a_share_of_the_defects_and_a_category_without_masks_says_why():
    tasks = [Task("ReConPatch", "bottle", seed=0, hits=2), Task("ReConPatch", "bottle", seed=1, hits=1)]
    tasks += [Task("ReConPatch", "carpet", seed=s, hits=2, has_masks=False) for s in (0, 1)]
    rows = tables.compare(views.stars(Grid(tasks, tasks, [])), metric="star", groups={})
    bottle = at(rows, "category", "bottle")
    assert (bottle["mean"], bottle["spread"]) == pytest.approx((75, np.std([100, 50], ddof=1)))
    assert at(rows, "category", "carpet")["why"] == "the split has no masks" and at(rows, "all")["left_out"] == "carpet"


def test_eq_11_has_four_ways_and_the_ensembles_own_is_one_of_them(monkeypatch):
    labels, scores = np.array([0, 0, 1, 1]), {"a": np.array([0.0, 2, 1, 3]), "b": np.array([0.0, 0, 9, 10])}
    statistics = {"image": {"median": (0, 1), "mean": (0, 2)}, "patch": {"median": (0, 1), "mean": (1, 100)}}
    info, columns = {"train_statistics": statistics}, {"method": "ReConPatch", "category": "bottle", "seed": 0}
    members = {name: Result(info, {"scores": s, "patch_scores": s}, False) for name, s in scores.items()}
    monkeypatch.setattr(views, "load", lambda member, _store: members[member])
    monkeypatch.setattr(Ensemble, "columns", lambda _self: columns | {"image_size": 320})
    monkeypatch.setattr(Ensemble, "__post_init__", lambda _self: None)
    own = Result({"metrics": {"undefined": {}}}, {"labels": labels}, False)
    ways = views.ways_of_eq_11(Grid([Ensemble(("a", "b"))], [own], []), None)
    settings = tables.compare(ways, by=["image_size", "statistics"]).set_index("setting")["mean"]
    assert len(settings) == 4 and settings["320 px, image scores, median deviation"] == 100


def test_times_are_a_row_per_method_beside_the_papers():
    stages = {"all": {"median_ms": 20.0}, "f": {"median_ms": 1.0}}
    m = {"inference_ms": 20.0, "iqr_ms": 1.0, "images_per_second": 50.0, "peak_memory_bytes": 2**21, "stages": stages}
    result = Result({"metrics": m}, {}, False)
    tasks = [Task("PatchCore", "bottle"), Task("ReConPatch", "bottle")]
    found, names = views.times(Grid(tasks, [result, result], []))
    rows = tables.compare(found, tables.targets("S6"), metric=["inference_ms", "peak_memory_mib", *names], scale=1)
    assert rows[rows["metric"] == "inference_ms"]["published"].tolist() == [37.89, 38.09]
    assert rows[rows["metric"] == "f"]["mean"].tolist() == [1, 1] and names == ["all", "f"]


def test_of_times_the_shortest_is_best_in_words_too():
    rows = tables.compare(
        frame({"PatchCore": {"a": [10.0]}, "ReConPatch": {"a": [20.0]}}, "inference_ms"),
        tables.targets("S6"),
        metric="inference_ms",
        scale=1,
    )
    assert tables.in_words(rows).startswith("ms an image: best is PatchCore with 10.00 (in the paper PatchCore with")


def test_a_category_that_is_named_as_a_group_of_the_paper_is_none():
    rows = tables.compare(frame({"PatchCore": {"texture": [0.9], "average": [0.8]}}), tables.targets("5"), groups={})
    assert rows["published"].isna().all()


def test_small_banks_are_told_apart():
    assert (
        tables.setting_name({"coreset_ratio": 0.003}) == "coreset 0.3%" != tables.setting_name({"coreset_ratio": 0.001})
    )
    assert tables.setting_name({"coreset_ratio": 0.07}) == "coreset 7%"


def test_the_best_is_the_best_of_what_is_shown():
    rows = tables.compare(
        frame({"PatchCore": {"a": [0.9912]}, "ReConPatch": {"a": [0.9934]}}, "position_r2"),
        metric="position_r2",
        scale=1,
    )
    assert tables.readable(rows, "**{}**").to_numpy().ravel().tolist() == ["0.9912", "**0.9934**"]


def test_printed_numbers_computed_again_are_rows_too():
    rows = tables.checked(paper.inconsistencies())
    assert list(rows) == tables.COLUMNS and (rows["why"] != "").all() and rows["mean"].isna().any()
    assert any(setting.startswith("Table 4: PatchCore") for setting in rows["setting"])


# ---- what is shown, said and written ----


def test_a_shown_table_has_published_columns_only_where_something_is_published():
    values = frame(TWO, dim=64).assign(pixel_auroc=0.9)
    text = tables.readable(tables.compare(values, tables.targets("2"), by=["dim"], metric=tables.AUROC))
    of_image = [("image AUROC", column) for column in ("ours", "published", "difference")]
    assert list(text) == [*of_image, ("pixel AUROC", "ours")]
    assert text.loc["PatchCore, D 64", "image AUROC"].tolist() == ["98.00 ± 0.71", "97.75", "+0.25"]


def test_a_shown_table_is_escaped_and_says_why_a_number_is_undefined():
    values = {"PatchCore": {"bottle": [0.99], "<b>x</b>": [None]}}
    rows = tables.compare(frame(values), groups={})
    markup = tables.show(rows, "from <i>here</i>").to_html()
    assert "<b>x" not in markup and "<i>" not in markup and 'class="tex2jax_ignore' in markup, "and a $ is no formula"
    assert "| &lt;b&gt;x&lt;/b&gt; |" in tables.markdown(rows)
    two = tables.compare(frame({"PatchCore": {"bottle": [0.9]}, "ReConPatch": {"bottle": [0.8]}}), groups={})
    assert "<b>90.00</b>" in tables.show(two, "").to_html() and "<b>80" not in tables.show(two, "").to_html()
    assert "<b>" not in tables.show(two.assign(low=0.0, high=1.0), "").to_html(), "of differences none is best"
    assert "undefined: no &lt;b&gt;x" in markup and "mean of all 1 (without &lt;b&gt;x" in markup
    text = tables.readable(tables.compare(frame(values)))
    assert list(text) == [("image AUROC (without <b>x</b>)", "ours")]


def test_a_shown_table_that_is_wider_than_a_page_is_turned():
    values = {f"{n}": {"bottle": [n / 100], "pill": [0.5]} for n in range(13)}
    turned = tables.readable(tables.compare(frame(values), groups={}))
    assert turned.shape == (13, 3) and turned.loc[("7", "ours"), "bottle"] == "7.00"
    assert tables.readable(tables.compare(frame(dict(list(values.items())[:12])), groups={})).shape == (3, 12)


def test_a_category_called_na_or_01_stays_itself(tmp_path):
    rows = pd.DataFrame(dict.fromkeys(tables.COLUMNS, "") | {"row": ["NA", "01", "null"], "mean": 1.0})
    tables.write({"one": rows}, tmp_path / "t.csv")
    assert list(tables.read(tmp_path / "t.csv")["row"]) == ["NA", "01", "null"]


def test_entries_that_differ_are_rows_that_differ(tmp_path):
    store, of = Store(tmp_path / "runs"), {"metrics": {"image_auroc": 0.5}, "seconds": {}}
    of |= {"config": Config().asdict(), **dict.fromkeys(("device", "commit", "started"), "x")}
    trained = {"training": {"epochs": 40, "batch": 32, "lr": 2e-4}, "config": {"backbone": "resnet18"}}
    for identity in (*({"perturbation": {"test": {"rotation": r}}} for r in (5, 40)), {"name": "CFLOW-AD"} | trained):
        store.save("entries", identity, of, {})
    assert tables.of_store(store, tmp_path / "entries.csv") == 3
    rows = pd.read_csv(tmp_path / "entries.csv")
    assert rows["perturbation"].nunique() == 2 and rows["perturbed"].sum() == 2
    (peer,) = rows[rows["peer"].notna()].to_dict("records")
    assert (peer["epochs"], peer["batch_size"], peer["lr"], peer["seed"]) == (40, 32, 2e-4, 0) and np.isnan(peer["k"])


def test_what_is_written_can_be_read_gathered_and_viewed(tmp_path):
    rows = tables.compare(frame({"PatchCore": {"01": [0.98765432], "02": [None]}}), tables.targets("7"), groups={})
    tables.write(
        {"image AUROC": rows, "more": rows.assign(low=-1e-14, high=1.0, label="of its own")}, tmp_path / "table_7.csv",
        "btad; 10 epochs",
    )  # fmt: skip
    back = tables.read(tmp_path / "table_7.csv")
    assert list(back) == ["table", *tables.COLUMNS, "low", "high", "label"]
    assert back["row"].tolist()[:3] == ["01", "02", "all"]
    assert back["mean"].iloc[0] == 98.7654 and back["label"].unique().tolist() == ["btad; 10 epochs", "of its own"]
    assert tables.in_words(back[back["table"] == "image AUROC"].drop(columns=["low", "high"])) == tables.in_words(rows)
    (tmp_path / "table_5_entries.csv").write_text("method,dim\nPatchCore,64\n")
    tables.write({"Table 1": rows.iloc[:0]}, tmp_path / "table_1.csv")
    for _ in range(2):  # its own file is none of the run's
        tables.gather(tmp_path, tmp_path / "published.csv")
    assert len(tables.read(tmp_path / "published.csv")) == len(back)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/table_7.md").write_text("mine")
    with pytest.raises(OSError, match=r"table_7\.md is an image, or not what rcp writes there"):
        tables.views(tmp_path / "published.csv", tmp_path / "mine")
    (view,) = tables.views(tmp_path / "published.csv", tmp_path)
    text = view.read_text()
    assert view.name == "table_7.md" and text.startswith("# table_7\n\n## image AUROC\n\n*btad; 10 epochs*\n\n|")
    raw = (tmp_path / "published.csv").read_text().replace("btad; 10 epochs", "<img src=x onerror=alert(1)>")
    (tmp_path / "raw.csv").write_text(raw)
    (tmp_path / "raw").mkdir()
    assert "<img" not in tables.views(tmp_path / "raw.csv", tmp_path / "raw")[0].read_text()
    elsewhere = (tmp_path / "published.csv").read_text().replace("\ntable_7,", "\n../elsewhere,")
    (tmp_path / "other.csv").write_text(elsewhere)
    with pytest.raises(ValueError, match=r"other\.csv: item: expected the name of a notebook, got '\.\./elsewhere'"):
        tables.views(tmp_path / "other.csv", tmp_path)
    assert "| 02 | undefined: no 02 |" in text and "| mean of all 1 (without 02) | 98.77 |" in text
