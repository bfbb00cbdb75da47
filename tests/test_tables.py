"""Tables: the published value beside ours, means over what was run, and the difference in words."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reproduce import paper, tables, views
from rcp.config import Config
from reproduce.entries import Entry, Grid, Result


def frame(values: dict[str, dict[str, list[float]]], metric="image_auroc") -> pd.DataFrame:
    return pd.DataFrame(
        {"method": method, "category": category, "seed": seed, metric: value, "pixel_auroc": value}
        for method, per_category in values.items()
        for category, per_seed in per_category.items()
        for seed, value in enumerate(per_seed)
    )


TWO = {
    "PatchCore": {"bottle": [1.0, 0.98], "carpet": [0.97, 0.97]},
    "ReConPatch": {"bottle": [0.99, 0.99], "carpet": [0.96, 0.98]},
}


def test_ours_stand_beside_the_published_with_the_difference():
    table = tables.table_5(frame(TWO), "image_auroc")
    assert list(table.index) == [
        "bottle",
        "carpet",
        "mean of 1 object",
        "mean of 1 texture",
        "mean of all 2",
        "paper, 15 categories",
    ]
    assert table.loc["bottle", ("rcp PatchCore", "mean")] == pytest.approx(99.0)
    assert table.loc["bottle", ("rcp PatchCore", "spread")] == pytest.approx(np.std([100, 98], ddof=1))
    assert (
        table.loc["carpet", ("published", "PatchCore")] == 98.7
        and table.loc["carpet", ("published", "ReConPatch")] == 99.6
    )
    assert table.loc["carpet", ("rcp PatchCore", "difference")] == pytest.approx(97.0 - 98.7)
    last = table.loc["mean of all 2"]
    assert last[("published", "PatchCore")] == pytest.approx((100 + 98.7) / 2), "over the same categories"
    assert last[("rcp PatchCore", "spread")] == pytest.approx(np.std([98.5, 97.5], ddof=1)), "of the seeds' means"


def test_all_categories_give_the_papers_own_averages():
    whole = frame(
        {"PatchCore": {c: [0.99] for c in paper.CATEGORIES}, "ReConPatch": {c: [0.98] for c in paper.CATEGORIES}}
    )
    image, pixel = (tables.table_5(whole, metric).iloc[-1] for metric in ("image_auroc", "pixel_auroc"))
    assert image.name == "mean of all 15" and image[("published", "ReConPatch 480 px")] == 99.62
    assert image[("published", "ReConPatch")] == 99.56 and image[("published", "SPADE")] == 85.5
    assert image[("rcp ReConPatch", "difference")] == pytest.approx(98 - 99.56)
    assert pixel[("rcp ReConPatch", "difference")] == pytest.approx(98 - 98.07), "98.18 is another model's"
    assert np.isnan(image[("rcp PatchCore", "spread")]), "one seed has no spread"


def test_the_permuted_pixel_column_is_never_a_target():
    table = tables.table_5(frame(TWO), "pixel_auroc")
    assert table[("rcp ReConPatch", "difference")].isna().all()
    words = tables.in_words(table, "pixel AUROC").splitlines()
    assert words[1] == "ReConPatch: pixel AUROC 98.00 ± 0.71; the paper prints nothing to hold it against."
    assert words[0].startswith("PatchCore: pixel AUROC 98.00 ± 0.71, 0.80 below the paper's 98.80")


def test_words_say_how_well_it_agrees():
    words = tables.in_words(tables.table_5(frame({"PatchCore": {"bottle": [0.9995]}}), "image_auroc"), "image AUROC")
    assert words == "PatchCore: image AUROC 99.95, the same within 0.1 as the paper's 100.00 on the same categories."


def test_a_category_without_the_metric_is_left_out_of_the_mean_visibly():
    values = frame({"PatchCore": {"bottle": [0.99], "carpet": [np.nan]}})
    table = tables.table_5(values, "image_auroc")
    row = table.loc["mean of all 1 (without carpet)"]
    assert row[("rcp PatchCore", "mean")] == pytest.approx(99.0) and row[("published", "PatchCore")] == 100
    assert np.isnan(table.loc["carpet", ("rcp PatchCore", "mean")])
    assert tables.in_words(table, "image AUROC").startswith(
        "PatchCore: image AUROC 99.00, 1.00 below the paper's 100.00"
    )
    nothing = tables.table_5(frame({"PatchCore": {"bottle": [np.nan]}}), "image_auroc")
    assert "undefined" in tables.in_words(nothing, "image AUROC")


def test_own_categories_have_no_published_value_and_nothing_run_is_an_empty_table():
    table = tables.table_5(frame({"PatchCore": {"gear": [0.9]}}), "image_auroc", {"object": ("gear",), "texture": ()})
    assert list(table.index) == ["gear", "mean of 1 object", "mean of all 1", "paper, 15 categories"]
    assert table["published"].iloc[:-1].isna().all().all()
    assert table.loc["paper, 15 categories", ("published", "ReConPatch")] == 99.56
    assert np.isnan(table.loc["paper, 15 categories", ("rcp PatchCore", "mean")])
    empty = pd.DataFrame(columns=["method", "category", "seed", "image_auroc"])
    table = tables.table_5(empty, "image_auroc")
    assert table.empty and "nothing" in tables.in_words(table, "image AUROC")
    tables.show(table, "caption").to_html()


def test_written_tables_can_be_read_and_shown(tmp_path):
    table = tables.table_5(frame(TWO), "image_auroc")
    tables.write(table, tmp_path / "t")
    back = pd.read_csv(tmp_path / "t.csv", index_col=0)
    np.testing.assert_allclose(back["rcp PatchCore mean"], table[("rcp PatchCore", "mean")])
    assert "| bottle |" in (tmp_path / "t.md").read_text()
    small = pd.DataFrame(
        {"lr": [1e-5, 2.5e-4], "auroc": [0.98765432, np.nan], "drop": [-1e-14, -0.25]}, index=["a", "b"]
    )
    tables.write(small, tmp_path / "s")
    assert (tmp_path / "s.csv").read_text() == "category,lr,auroc,drop\na,1e-05,0.9877,0.0\nb,0.00025,,-0.25\n"
    html = tables.show(table, "Where the numbers are from").to_html()
    assert "Where the numbers are from" in html and "-1.70" in html and "–" in html


def test_an_undefined_cell_says_why_and_a_written_table_where_it_is_from(tmp_path):
    values = frame({"PatchCore": {"bottle": [0.99], "carpet": [np.nan]}})
    table = tables.table_5(values, "pixel_auroc")
    html = tables.show(table, "c", undefined={"carpet": "the split has no masks", "gear": "not here"}).to_html()
    assert (
        html.count("undefined: the split has no masks") == 1
        and "mean of all 1 (without carpet)" in html
        and "gear" not in html
    )
    tables.write(table, tmp_path / "t", label="bottle; resnet18, 10 epochs")
    assert (tmp_path / "t.md").read_text().startswith("*bottle; resnet18, 10 epochs*\n\n| category |")


def test_metrics_show_why_one_is_undefined():
    html = tables.show_metrics(
        {"PatchCore": {"image_auroc": None, "n_normal": 3, "undefined": {"image_auroc": "one class only"}}}, "c"
    ).to_html()
    assert "image_auroc (undefined: one class only)" in html


def entries(rows: list[dict]) -> pd.DataFrame:
    """A frame as Grid.frame gives it, from what differs."""
    base = {"method": "ReConPatch", "category": "bottle", "seed": 0, "augmentation": "without", "pixel_auroc": 0.9}
    return pd.DataFrame([base | row for row in rows])


def test_a_table_of_settings_stands_beside_the_papers_averages():
    rows = [
        {"k": k, "category": c, "seed": s, "image_auroc": a, "pixel_auroc": p}
        for k, c, s, a, p in [
            (3, "bottle", 0, 0.99, 0.97), (3, "bottle", 1, 0.97, 0.97), (3, "cable", 0, 0.95, None), (3, "cable", 1, 0.97, None),
            (5, "bottle", 0, 1.00, 0.98), (5, "bottle", 1, 1.00, 0.98), (5, "cable", 0, 0.90, None), (5, "cable", 1, 0.90, None),
        ]
    ]  # fmt: skip
    table = tables.averages(entries(rows), "S1", ["k"])
    assert list(table.index) == ["k 3", "k 5"]
    image = table["image AUROC"]
    assert list(image) == ["mean", "spread", "seeds", "paper, 15 categories", "difference"]
    row = image.loc["k 3"].drop("seeds").tolist()
    assert row == pytest.approx([97.0, 0.0, 99.5, 97.0 - 99.5]), "both seeds have the mean 97"
    assert (
        image.loc["k 5", "seeds"] == "2"
        and image.loc["k 5", "paper, 15 categories"] == 99.56
        and image.loc["k 5", "mean"] == pytest.approx(95)
    )
    pixel = table["pixel AUROC (without cable)"]
    assert pixel["mean"].tolist() == pytest.approx([97.0, 98.0]), "a category without masks is left out, visibly"
    words = tables.ablation_in_words(table)
    assert (
        "image AUROC: best is k 3 with 97.00 (the paper, 15 categories: k 5 with 99.56); settings differ by 2.00"
        in words
    )


def test_settings_of_two_methods_are_told_apart_and_what_is_not_printed_has_no_target():
    rows = [{"method": m, "dim": d, "image_auroc": 0.9} for m in ("PatchCore", "ReConPatch") for d in (512, 7)]
    table = tables.averages(entries(rows), "2", ["dim"])
    assert list(table.index) == ["PatchCore, D 512", "PatchCore, D 7", "ReConPatch, D 512", "ReConPatch, D 7"]
    assert table["image AUROC"]["paper, 15 categories"].tolist() == pytest.approx(
        [98.66, np.nan, 99.56, np.nan], nan_ok=True
    )
    assert table["pixel AUROC"]["paper, 15 categories"].isna().all()
    ensemble = entries(
        [{"image_size": 480, "backbone": "wide_resnet101_2+resnext101_32x8d+densenet201", "image_auroc": 0.9}]
    )
    assert tables.averages(ensemble, "6", ["image_size", "backbone"])["image AUROC"][
        "paper, 15 categories"
    ].tolist() == [99.72]
    empty = tables.averages(
        pd.DataFrame(columns=["method", "category", "seed", "image_auroc", "pixel_auroc", "dim"]), "2", ["dim"]
    )
    assert empty.empty and "Nothing is computed" in tables.ablation_in_words(empty)


def test_one_setting_varies_at_a_time():
    frame = entries(
        [{"k": k, "margin": m, "alpha": a} for k, m, a in ((5, 1.0, 0.5), (3, 1.0, 0.5), (5, 2.0, 0.5), (5, 1.0, 0.0))]
    )
    varied = tables.one_at_a_time(frame, "k", k=5, margin=1.0, alpha=0.5)
    assert varied[["k", "margin", "alpha"]].to_numpy().tolist() == [[3, 1.0, 0.5], [5, 1.0, 0.5]]
    assert tables.one_at_a_time(frame, "alpha", k=5, margin=1.0, alpha=0.5)["alpha"].tolist() == [0.0, 0.5]


PRINTED_S5 = paper.table("S5").query("method == 'PatchCore' and category in @paper.CATEGORIES")
GROUPS = {"object": paper.OBJECTS, "texture": paper.TEXTURES}


def as_printed(*categories: str) -> list[dict]:
    """The paper's own rows of Table S5 for PatchCore, as if we had computed them."""
    return [
        {
            "method": "PatchCore",
            "category": row.category,
            "augmentation": row.augmentation,
            "image_auroc": row.value / 100,
        }
        for row in PRINTED_S5[PRINTED_S5["augmentation"] != "difference"].itertuples()
        if row.category in (categories or paper.CATEGORIES)
    ]


def test_table_4_has_both_kinds_of_mean_beside_the_same_mean_of_the_printed_rows():
    table = tables.table_4(entries(as_printed()), "PatchCore", GROUPS)
    for name in ("mean of all 15", "mean of the two groups", "mean of 10 objects", "capsule"):
        ours = table.loc[name, [("rcp", v) for v in ("without", "with", "drop")]].tolist()
        assert ours == pytest.approx(table.loc[name, "published"].tolist()), (
            "the paper's own rows differ from themselves in nothing"
        )
    assert table.loc["mean of all 15", ("rcp", "drop")] == pytest.approx(3.83, abs=0.01)
    assert table.loc["mean of the two groups", ("published", "with")] == pytest.approx(95.48, abs=0.01)
    assert table.loc["mean of the two groups", ("published", "drop")] == pytest.approx(3.59, abs=0.01)
    assert table.loc["paper, 15 categories", ("published", "drop")] == pytest.approx(3.62), (
        "as printed: of two kinds of mean"
    )
    few = tables.table_4(entries(as_printed("bottle", "carpet", "wood")), "PatchCore", GROUPS)
    assert few.loc["mean of all 3", ("rcp", "drop")] == pytest.approx(few.loc["mean of all 3", ("published", "drop")])


def test_each_seed_has_its_own_drop_and_an_undefined_category_is_left_out():
    rows = [
        {"category": c, "seed": s, "augmentation": a, "image_auroc": v}
        for c, s, a, v in [
            ("bottle", 0, "without", 0.99), ("bottle", 0, "with", 0.90), ("bottle", 1, "without", 0.97), ("bottle", 1, "with", 0.94),
            *(("carpet", s, a, None) for s in (0, 1) for a in ("without", "with")),
        ]
    ]  # fmt: skip
    table = tables.table_4(entries(rows), "ReConPatch", GROUPS)
    name = "mean of all 1 (without carpet)"
    assert list(table.index) == ["bottle", "carpet", "mean of 1 object", name, "paper, 15 categories"], (
        "no mean of no texture"
    )
    assert table.loc[name, ("rcp", "drop")] == pytest.approx(6) and table.loc[name, ("rcp", "seeds")] == "2"
    assert table.loc[name, ("rcp", "± drop")] == pytest.approx(np.std([9, 3], ddof=1))
    assert tables.table_4(entries(rows), "PatchCore", GROUPS).empty
    html = tables.show(table, "c", undefined={"carpet": "one class only"}).to_html()
    assert html.count("undefined: one class only") == 2


def test_a_seed_that_lacks_a_category_is_left_out_and_counted():
    whole = {"PatchCore": {"bottle": [0.99, 0.97], "cable": [0.95, 0.95]}}
    partly = {"ReConPatch": {"bottle": [0.99, 0.97], "cable": [0.95]}}
    table = tables.table_5(frame(whole | partly), "image_auroc")
    mean = table.loc["mean of all 2"]
    assert mean["rcp PatchCore", "seeds"] == "2" and mean["rcp ReConPatch", "seeds"] == "1 of 2"
    assert mean["rcp ReConPatch", "mean"] == pytest.approx(97) and np.isnan(mean["rcp ReConPatch", "spread"])
    rows = [{"k": k, "seed": s, "image_auroc": 0.9 + s / 100} for k, s in ((3, 0), (3, 1), (5, 1))]
    assert tables.averages(entries(rows), "S1", ["k"])["image AUROC"]["seeds"].tolist() == ["2", "1 of 2"]


class Task:
    def __init__(self, method, category):
        self.method, self.category = method, category

    def columns(self):
        return {}


def grid_of(labels: dict[str, list[int]]):
    """A grid of both methods: category -> labels; a category of one class has the reason beside its metrics."""
    results = {}
    for category, of in labels.items():
        why = {} if len(set(of)) > 1 else {"image_auroc": "one class only"}
        results[category] = Result(
            {"undefined": why}, {}, {"scores": np.arange(len(of)), "labels": np.array(of)}, False
        )
    tasks = [Task(m, c) for c in labels for m in ("PatchCore", "ReConPatch")]
    return Grid(tasks, [results[task.category] for task in tasks], [])


def test_paired_leaves_an_undefined_category_out_visibly():
    grid = grid_of({"bottle": [0, 1, 1], "carpet": [1, 1, 1]})
    table = tables.paired(grid)
    assert list(table.index) == ["bottle", "carpet", "mean of all 1 (without carpet)"]
    assert table.loc["mean of all 1 (without carpet)"].tolist() == table.loc["bottle"].tolist() == [0, 0, 0]
    assert table.loc["carpet"].isna().all()
    assert tables.paired_in_words(table).startswith("mean of all 1 (without carpet): ReConPatch is not told apart")


def test_why_a_metric_is_undefined_is_written_too(tmp_path):
    reasons = tables.reasons(grid_of({"bottle": [0, 1, 1], "carpet": [1, 1, 1]}))
    assert reasons == {"carpet": "image AUROC: one class only"}
    values = frame({"PatchCore": {"bottle": [0.99], "carpet": [np.nan]}})
    tables.write(tables.table_5(values, "image_auroc"), tmp_path / "t", undefined=reasons)
    back = pd.read_csv(tmp_path / "t.csv", index_col=0)["undefined"].dropna()
    assert back.to_dict() == reasons, "in the category's row, and in no other"
    of_settings = tables.averages(values.assign(k=5), "S1", ["k"])
    tables.write(of_settings, tmp_path / "s", undefined=reasons)
    assert "| carpet: image AUROC: one class only |" in (tmp_path / "s.md").read_text()
    tables.write(of_settings, tmp_path / "u", undefined={})
    assert "undefined" not in (tmp_path / "u.md").read_text()


def test_nothing_computed_is_a_table_with_all_columns():
    empty = Grid([], [], []).frame()
    assert {"method", "dim", "image_size", "augmentation", "image_auroc", "aupro", "d_prime", "f1"} <= set(
        empty.columns
    )
    columns = ["mean", "spread", "seeds", "paper, 15 categories", "difference"]
    table = tables.averages(empty, "2", ["dim"])
    assert list(table.columns) == [(m, c) for m in ("image AUROC", "pixel AUROC") for c in columns]
    assert tables.bank_memory(empty, table).empty and tables.table_4(empty, "PatchCore", GROUPS).empty


def test_bank_memory_of_one_method_alone():
    rows = [
        {"method": "PatchCore", "dim": 512, "image_auroc": 0.9, "bank_bytes": 8, "patches": 100, "coreset_ratio": 0.01}
    ]
    frame = entries(rows)
    table = tables.averages(frame, "2", ["dim"])
    assert list(table.index) == ["PatchCore, D 512"], "named as beside ReConPatch"
    assert tables.bank_memory(frame, table)["mean"].tolist() == pytest.approx([90, 90])


def test_table_7_compares_with_btads_rows():
    rows = [{"category": c, "image_auroc": 0.9} for c in ("01", "02", "03")]
    table = tables.table_7(entries(rows), "image_auroc")
    assert list(table.index) == ["01", "02", "03", "mean of all 3"]
    assert table["published", "ReConPatch"].tolist() == [99.7, 87.7, 100, 95.8]
    assert table.loc["mean of all 3", ("rcp ReConPatch", "difference")] == pytest.approx(90 - 95.8)
    core = tables.table_7(entries([row | {"method": "PatchCore"} for row in rows]), "image_auroc")
    assert core["rcp PatchCore", "difference"].isna().all(), "its published row is of no known backbone"
    part = tables.table_7(entries(rows[:2]), "image_auroc")
    assert part.loc["mean of all 2", ("published", "ReConPatch")] == pytest.approx((99.7 + 87.7) / 2)


def test_averages_are_computed_again_with_their_table_named():
    table = tables.recomputed_averages()
    off = table[table["off"]]
    assert len(off) and off["difference"].abs().min() > 0.01 and len(off) < len(table)
    assert any(name.startswith("Table S5: PatchCore") and "average" in name for name in off.index)


# ---- figures in numbers ----


class Masked:
    """A test split of two images; the ground truth is the upper left corner."""

    def __init__(self, has_masks=True):
        self.has_masks = has_masks

    def load_masks(self, _transform):
        masks = np.zeros((2, 4, 4), bool)
        masks[:, 0, 0] = True
        return masks


class Mapped:
    """An entry, or its result: the highest point of one map, of both or of none lies within the corner."""

    def __init__(self, method, seed, hits, category="bottle", has_masks=True):
        self.method, self.category, self.config = method, category, SimpleNamespace(seed=seed)
        self.maps_ = np.zeros((2, 4, 4))
        self.maps_[:, 3, 3], self.maps_[:hits, 0, 0] = 1, 2
        self.has_masks = has_masks

    def columns(self):
        return {"method": self.method, "category": self.category, "seed": self.config.seed}

    def data(self):
        return SimpleNamespace(test=Masked(self.has_masks))

    def transform(self, _split):
        return None

    def maps(self):
        return self.maps_


def test_the_star_is_counted_over_seeds_and_a_category_without_masks_says_why():
    cells_ = [Mapped("ReConPatch", 0, 2), Mapped("ReConPatch", 1, 1), Mapped("PatchCore", 0, 2)]
    table = views.star_table(Grid(cells_, cells_, []))
    assert table.loc["bottle", "ReConPatch"] == 75 and table.loc["bottle", "± ReConPatch"] == pytest.approx(
        np.std([100, 50], ddof=1)
    )
    assert table.loc["bottle", "seeds ReConPatch"] == "2" and "undefined" not in table
    cells_.append(Mapped("ReConPatch", 0, 2, "carpet", has_masks=False))
    table = views.star_table(Grid(cells_, cells_, []))
    assert table.loc["carpet", "undefined"] == "the split has no masks" and pd.isna(table.loc["bottle", "undefined"])
    assert "ReConPatch: the star lies on the defect in 75.0 % (mean of 1)" in views.star_in_words(table)
    assert views.star_in_words(views.star_table(Grid([], [], []))) == "nothing is computed yet"
    assert len(views.of_seed(Grid(cells_, cells_, [cells_[1]]), 1).entries) == 1


def test_markdown_has_as_many_decimals_as_asked_for(tmp_path):
    table = pd.DataFrame({"R²": [0.99672]}, index=["PatchCore"])
    for digits, shown in ((2, "| PatchCore | 1.0 |"), (4, "| PatchCore | 0.9967 |")):
        tables.write(table, tmp_path / "t", digits=digits)
        assert shown in (tmp_path / "t.md").read_text() and "0.9967" in (tmp_path / "t.csv").read_text()


@pytest.mark.parametrize(
    ("given", "shown"), [("IMAGENET1K_V1", "IMAGENET1K_V1"), ("random:0", "random:0"), ("some/where/a.pth", "a.pth")]
)
def test_weights_go_by_their_name_wherever_they_lie(given, shown):
    assert Entry(Config(weights=given), "data", "bottle").columns()["weights"] == shown


def test_d_prime_is_over_seeds_and_compares_what_is_there():
    rows = [("PatchCore", 0, 4.0), ("PatchCore", 1, 4.0), ("ReConPatch", 0, 4.5), ("ReConPatch", 1, 5.1)]
    frame = pd.DataFrame([{"method": m, "category": "bottle", "seed": s, "d_prime": d} for m, s, d in rows])
    table = views.d_primes(frame)
    assert table.loc["bottle", ("ReConPatch", "d′")] == pytest.approx(4.8)
    assert table.loc["bottle", ("ReConPatch", "spread")] == pytest.approx(np.std([4.5, 5.1], ddof=1))
    assert "above PatchCore's in 1 of 1 categories" in views.d_primes_in_words(table)
    assert [c.agrees for c in views.d_prime_comparisons(table)] == [False, True], "4.0 is 0.32 from 4.32"
    alone = views.d_primes(frame[frame["method"] == "PatchCore"])
    assert (
        views.d_primes_in_words(alone)
        == views.d_primes_in_words(views.d_primes(frame.iloc[:0]))
        == "Nothing to compare yet."
    )
