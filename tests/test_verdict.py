"""The index's one line per item: never better than what was computed."""

import json

import numpy as np
import pandas as pd
import pytest

from rcp import notebook, paper
from rcp.notebook import Settings
from rcp.verdict import Comparison, note, of_averages, of_table_5, verdict


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
        ({"profile": "demo"}, "the demo's drawn pictures and random weights"),
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
    assert said.startswith("not run: 2 cells are missing; a 99.50 (paper 99.56)")


def test_what_is_not_about_pictures_is_checked(settings):
    assert note(settings, "paper_checks", "16 contradictions") == "checked: 16 contradictions"


def test_comparisons_are_read_from_tables():
    columns = pd.MultiIndex.from_product([["image AUROC"], ["mean", "spread", "published", "difference"]])
    table = pd.DataFrame([[99.0, 0.1, 99.5, -0.5]], ["k 3"], columns)
    assert of_averages(table) == [Comparison("image AUROC, k 3:", 99.0, 0.1, 99.5)]
    columns = pd.MultiIndex.from_tuples(
        [("published", "PatchCore"), *(("rcp PatchCore", n) for n in ("mean", "spread", "difference"))]
    )
    table = pd.DataFrame([[99.1, 99.0, 0.0, -0.1]], ["mean of all 15"], columns)
    (found,) = of_table_5(table, "image AUROC")
    assert found.what == "image AUROC, PatchCore:" and found.published == pytest.approx(99.1)
