"""Tables: the published value beside ours, means over what was run, and the difference in words."""

import numpy as np
import pandas as pd
import pytest

from rcp import paper, tables


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
        "printed mean of 15",
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
    assert list(table.index) == ["gear", "mean of 1 object", "mean of all 1", "printed mean of 15"]
    assert table["published"].iloc[:-1].isna().all().all()
    assert table.loc["printed mean of 15", ("published", "ReConPatch")] == 99.56
    assert np.isnan(table.loc["printed mean of 15", ("rcp PatchCore", "mean")])
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


def cells(rows: list[dict]) -> pd.DataFrame:
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
    table = tables.averages(cells(rows), "S1", ["k"])
    assert list(table.index) == ["k 3", "k 5"]
    image = table["image AUROC"]
    assert image.loc["k 3"].tolist() == pytest.approx([97.0, 0.0, 99.5, 97.0 - 99.5]), "both seeds have the mean 97"
    assert image.loc["k 5", "published"] == 99.56 and image.loc["k 5", "mean"] == pytest.approx(95)
    pixel = table["pixel AUROC (without cable)"]
    assert pixel["mean"].tolist() == pytest.approx([97.0, 98.0]), "a category without masks is left out, visibly"
    words = tables.ablation_in_words(table)
    assert "image AUROC: best is k 3 with 97.00 (the paper: k 5 with 99.56); settings differ by 2.00" in words


def test_settings_of_two_methods_are_told_apart_and_what_is_not_printed_has_no_target():
    rows = [{"method": m, "dim": d, "image_auroc": 0.9} for m in ("PatchCore", "ReConPatch") for d in (512, 7)]
    table = tables.averages(cells(rows), "2", ["dim"])
    assert list(table.index) == ["PatchCore, D 512", "PatchCore, D 7", "ReConPatch, D 512", "ReConPatch, D 7"]
    assert table["image AUROC"]["published"].tolist() == pytest.approx([98.66, np.nan, 99.56, np.nan], nan_ok=True)
    assert table["pixel AUROC"]["published"].isna().all()
    ensemble = cells(
        [{"image_size": 480, "backbone": "wide_resnet101_2+resnext101_32x8d+densenet201", "image_auroc": 0.9}]
    )
    assert tables.averages(ensemble, "6", ["image_size", "backbone"])["image AUROC"]["published"].tolist() == [99.72]
    empty = tables.averages(
        pd.DataFrame(columns=["method", "category", "seed", "image_auroc", "pixel_auroc", "dim"]), "2", ["dim"]
    )
    assert empty.empty and "Nothing is computed" in tables.ablation_in_words(empty)


def test_one_setting_varies_at_a_time():
    frame = cells(
        [{"k": k, "margin": m, "alpha": a} for k, m, a in ((5, 1.0, 0.5), (3, 1.0, 0.5), (5, 2.0, 0.5), (5, 1.0, 0.0))]
    )
    varied = tables.one_at_a_time(frame, "k", k=5, margin=1.0, alpha=0.5)
    assert varied[["k", "margin", "alpha"]].to_numpy().tolist() == [[3, 1.0, 0.5], [5, 1.0, 0.5]]
    assert tables.one_at_a_time(frame, "alpha", k=5, margin=1.0, alpha=0.5)["alpha"].tolist() == [0.0, 0.5]


def test_table_4_has_both_kinds_of_mean():
    whole = [
        {"method": "PatchCore", "category": c, "augmentation": a, "image_auroc": value / 100}
        for a in ("without", "with")
        for c, value in paper.table("S5")
        .query("method == 'PatchCore' and augmentation == @a")
        .set_index("category")["value"]
        .items()
        if c in paper.CATEGORIES
    ]
    table = tables.table_4(cells(whole), "PatchCore", {"object": paper.OBJECTS, "texture": paper.TEXTURES})
    assert table.loc["mean of all 15", ("rcp", "drop")] == pytest.approx(3.83, abs=0.01), "the paper's own rows"
    assert table.loc["mean of the two groups", ("rcp", "with")] == pytest.approx(95.48, abs=0.01)
    assert table.loc["printed average", ("published", "drop")] == pytest.approx(3.62)
    assert table.loc["capsule", ("published", "with")] == 82.73
    drops = tables.drops({"PatchCore": table})
    assert [round(d[1], 2) for d in drops] == [3.83, 3.59] and drops[1][3] == pytest.approx(3.62)


def test_table_7_compares_with_btads_rows():
    rows = [{"category": c, "image_auroc": 0.9} for c in ("01", "02", "03")]
    table = tables.table_7(cells(rows), "image_auroc")
    assert list(table.index) == ["01", "02", "03", "mean of all 3"]
    assert table["published", "ReConPatch"].tolist() == [99.7, 87.7, 100, 95.8]
    assert table.loc["mean of all 3", ("rcp ReConPatch", "difference")] == pytest.approx(90 - 95.8)
    part = tables.table_7(cells(rows[:2]), "image_auroc")
    assert part.loc["mean of all 2", ("published", "ReConPatch")] == pytest.approx((99.7 + 87.7) / 2)


def test_averages_are_computed_again_with_their_table_named():
    table = tables.recomputed_averages()
    off = table[table["off"]]
    assert len(off) and off["difference"].abs().min() > 0.01 and len(off) < len(table)
    assert any(name.startswith("Table S5: PatchCore") and "average" in name for name in off.index)
