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


def test_metrics_show_why_one_is_undefined():
    html = tables.show_metrics(
        {"PatchCore": {"image_auroc": None, "n_normal": 3, "undefined": {"image_auroc": "one class only"}}}, "c"
    ).to_html()
    assert "image_auroc (undefined: one class only)" in html
