"""The index's one line per item: never better than what was computed."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reproduce import notebook, paper
from reproduce.notebook import Settings
from reproduce.verdict import D_PRIME_TOLERANCE, RULE, Comparison, changed, note, of_averages, of_table_4, of_table_5, verdict


@pytest.fixture
def settings(tmp_path, monkeypatch, demo_root):
    """The paper's setting, as far as names go."""
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    monkeypatch.setattr(notebook, "draw_demo", lambda _root: demo_root)
    monkeypatch.setattr(notebook, "categories", lambda _root: list(paper.CATEGORIES))
    return Settings(profile="paper", data_root=str(demo_root))


GOOD, NEAR, BAD = (
    Comparison("a", value, spread, 99.56) for value, spread in ((99.5, np.nan), (99.2, 0.2), (98.0, 0.1))
)


@pytest.mark.parametrize(
    ("comparisons", "state"),
    [
        ([GOOD, NEAR], "reproduced"),
        ([GOOD, BAD], "partly"),
        ([BAD], "not"),
        ([], "not run"),
        (None, "computed"),
        ([Comparison("a", 99.0, 0, np.nan)], "not run"),
    ],
)
def test_states_follow_the_numbers(settings, comparisons, state):
    assert settings.departures() == []
    said = verdict(settings, "table_1", comparisons)
    assert said.startswith(f"{state}: ")
    written = json.loads(settings.out("table_1.verdict.json").read_text())
    assert written["state"] == state and written["item"] == "table_1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"profile": "demo"}, "the demo's drawn images and random weights"),
        ({"backbone": "resnet18"}, "backbone resnet18 instead of wide_resnet50_2"),
        ({"epochs": 10}, "epochs 10 instead of 120"),
        ({"weights": "random:0"}, "weights random:0 instead of IMAGENET1K_V1"),
        ({"categories": ("bottle", "carpet")}, "2 categories instead of the 15"),
    ],
)
def test_another_setting_is_never_called_reproduced(settings, demo_root, change, words):
    other = Settings(**{"profile": "paper", "data_root": str(demo_root)} | change)
    said = verdict(other, "table_1", [GOOD])
    assert said.startswith("not run: in another setting (") and words in said and "99.50 (paper 99.56)" in said


def test_with_cells_missing_nothing_is_judged(settings):
    said = verdict(settings, "table_1", [GOOD], missing=[1, 2])
    assert said.startswith("not run: 2 entries are missing; a 99.50 (paper 99.56)")


def test_what_is_not_about_images_is_checked(settings):
    assert note(settings, "paper_checks", "16 contradictions") == "checked: 16 contradictions"


def test_an_item_without_printed_numbers_is_computed_or_not(settings):
    assert verdict(settings, "figure_3", None, missing=[1]).startswith("not run: 1 entries are missing")
    why = "Figure S4 is not drawn: no data/btad"
    assert verdict(settings, "figure_5", None, missing=[why]).startswith(f"computed in part: {why}")
    assert "computed in part" not in RULE and "(in part:" in RULE


def test_a_notebooks_own_parameter_can_be_a_departure(settings):
    own = changed(perturbed=("test", "both"), ranges=({}, {"blur": 1.0}), level=("image", "image"))
    assert own == ["perturbed test instead of both"], "an empty value is the profile's"
    said = verdict(settings, "table_4", [GOOD], departures=own)
    assert said.startswith("not run: in another setting (perturbed test instead of both)")


def test_an_item_of_one_category_needs_no_other(demo_root, settings):
    few = Settings(profile="paper", data_root=str(demo_root), categories=("bottle", "cable"))
    assert verdict(few, "figure_4", [GOOD], categories=["bottle"]).startswith("reproduced")
    assert "without carpet" in verdict(few, "figure_4", [GOOD], categories=["carpet"])


def test_published_weights_in_a_file_are_the_published_weights(demo_root, tmp_path, monkeypatch, settings):
    content = b"as if it were the published file"
    digits = hashlib.sha256(content).hexdigest()[:8]
    url = f"https://example.net/models/wide_resnet50_2-{digits}.pth"
    tags = [SimpleNamespace(name="IMAGENET1K_V1", url=url)]
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _name: tags)
    for name, written, departures in [
        (f"wide_resnet50_2-{digits}.pth", content, []),
        (f"mine-{digits}.pth", content + b"!", [f"weights from the file mine-{digits}.pth instead of IMAGENET1K_V1"]),
        ("mine-0000abcd.pth", content, ["weights from the file mine-0000abcd.pth instead of IMAGENET1K_V1"]),
        ("mine.pth", content, ["weights from the file mine.pth instead of IMAGENET1K_V1"]),
    ]:
        (tmp_path / name).write_bytes(written)
        other = Settings(profile="paper", data_root=str(demo_root), weights=str(tmp_path / name))
        assert other.departures() == departures
    assert notebook.by_tag({"wide_resnet50_2": str(tmp_path / f"wide_resnet50_2-{digits}.pth")}) == {
        "wide_resnet50_2": "IMAGENET1K_V1"
    }


def test_d_prime_has_a_tolerance_of_its_own():
    assert Comparison("d′", 4.5, np.nan, 4.32, D_PRIME_TOLERANCE).agrees
    assert not Comparison("d′", 4.32, np.nan, 4.92, D_PRIME_TOLERANCE).agrees, "PatchCore's is not ReConPatch's"


def test_comparisons_are_read_from_tables():
    names = ["mean", "spread", "seeds", "paper, 15 categories", "difference"]
    columns = pd.MultiIndex.from_product([["image AUROC", "pixel AUROC (without carpet)"], names])
    table = pd.DataFrame([[99.0, 0.1, "2", 99.5, -0.5, 98.0, 0.1, "2", 98.0, 0.0]], ["k 3"], columns)
    image, pixel = of_averages(table)
    assert image == Comparison("image AUROC, k 3:", 99.0, 0.1, 99.5)
    assert np.isnan(pixel.published), "a mean over 14 categories is not judged by one over 15"
    columns = pd.MultiIndex.from_tuples(
        [("published", "PatchCore"), *(("rcp PatchCore", n) for n in ("mean", "spread", "difference"))]
    )
    table = pd.DataFrame([[99.1, 99.0, 0.0, -0.1]], ["mean of all 15"], columns)
    (found,) = of_table_5(table, "image AUROC")
    assert found.what == "image AUROC, PatchCore:" and found.published == pytest.approx(99.1)
    (found,) = of_table_5(table.set_axis(["mean of all 14 (without carpet)"]), "image AUROC")
    assert np.isnan(found.published)


def test_table_4_is_judged_by_its_means_and_drops():
    values = [99.0, 0.1, 95.0, 0.2, 4.0, 0.3, "2", 99.1, 95.3, 3.8]
    ours = [(w, s) for v in ("without", "with", "drop") for w, s in ((("rcp", v), ("rcp", f"± {v}")),)]
    columns = [c for pair in ours for c in pair] + [
        ("rcp", "seeds"),
        *(("published", v) for v in ("without", "with", "drop")),
    ]
    names = ["bottle", "mean of all 15", "mean of the two groups", "paper, 15 categories"]
    table = pd.DataFrame([values] * 4, names, pd.MultiIndex.from_tuples(columns))
    found = of_table_4({"PatchCore": table, "ReConPatch": table.iloc[:0]})
    assert [c.what for c in found[:3]] == [f"PatchCore, {v}, mean of all 15:" for v in ("without", "with", "drop")]
    assert len(found) == 6 and found[2] == ("PatchCore, drop, mean of all 15:", 4.0, 0.3, 3.8, 0.1)
