"""The index's one line per item: never better than what was computed."""

import json

import numpy as np
import pandas as pd
import pytest

from reproduce import notebook, paper
from reproduce.notebook import Settings
from reproduce.tables import COLUMNS
from reproduce.verdict import RULE, changed, check, note, verdict


@pytest.fixture
def settings(tmp_path, monkeypatch, demo_root):
    """The paper's setting, as far as names go."""
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    monkeypatch.setattr(notebook, "draw_demo", lambda _root: demo_root)
    monkeypatch.setattr(notebook, "categories", lambda _root: list(paper.CATEGORIES))
    return Settings(profile="paper", data_root=str(demo_root))


def rows(*means: tuple[float, float], published=99.56, **columns) -> pd.DataFrame:
    """Rows as compare gives them, from (mean, spread) of each setting."""
    about = {"metric": "image_auroc", "kind": "all", "row": "all", "left_out": "", "why": "", "published": published}
    found = [about | {"setting": f"k {n}", "mean": m, "spread": s} | columns for n, (m, s) in enumerate(means)]
    table = pd.DataFrame(found, columns=COLUMNS)
    return table.assign(difference=table["mean"] - table["published"])


GOOD, NEAR, BAD = (99.5, np.nan), (99.2, 0.2), (98.0, 0.1)


@pytest.mark.parametrize(("table", "state"), [
    (rows(GOOD, NEAR), "reproduced"),
    (rows(GOOD, BAD), "partly"),
    (rows(BAD), "not"),
    (rows(), "not run"),
    (None, "computed"),
    (rows(GOOD, published=np.nan), "not run"),
    (rows(GOOD, left_out="carpet"), "not run"),  # a mean over 14 categories is not judged by one over 15
    (rows(GOOD, kind="groups"), "not run"),
    (rows(GOOD, kind="category", row="bottle"), "not run"),
])  # fmt: skip
def test_states_follow_the_numbers(settings, table, state):
    assert settings.departures() == []
    assert verdict(settings, "table_1", table).startswith(f"{state}: ")
    written = json.loads(settings.out("table_1.verdict.json").read_text())
    assert written["state"] == state and written["item"] == "table_1"


def test_d_prime_is_judged_in_its_category_and_has_a_tolerance_of_its_own(settings):
    d_prime = {"metric": "d_prime", "kind": "category", "row": "bottle", "published": 4.32}
    assert verdict(settings, "figure_4", rows((4.6, np.nan), **d_prime)).startswith("reproduced")
    assert verdict(settings, "figure_4", rows((4.92, np.nan), **d_prime)).startswith("not"), "the other method's"
    assert verdict(settings, "figure_4", rows((4.6, np.nan), **(d_prime | {"kind": "all"}))).startswith("not run")


@pytest.mark.parametrize(("change", "words"), [
    ({"profile": "demo"}, "(the demo's size and coreset)"),
    ({"backbone": "resnet18"}, "backbone resnet18 instead of wide_resnet50_2"),
    ({"epochs": 10}, "epochs 10 instead of 120"),
    ({"weights": "random:0"}, "weights random:0 instead of IMAGENET1K_V1"),
    ({"categories": ("bottle", "carpet")}, "2 categories instead of the 15"),
])  # fmt: skip
def test_another_setting_is_never_called_reproduced(settings, demo_root, change, words):
    other = Settings(**{"profile": "paper", "data_root": str(demo_root)} | change)
    said = verdict(other, "table_1", rows(GOOD))
    assert said.startswith("not run: in another setting (") and words in said and "99.50 (paper 99.56)" in said


def test_only_the_demos_own_images_are_called_drawn(demo_root, monkeypatch):
    monkeypatch.setenv("RCP_RUNS", str(demo_root.parent))
    demo = Settings(data_root=str(demo_root))
    assert demo.departures() == ["the demo's drawn images, CNN, size and coreset"] and "drawn images" in demo.label


def test_with_entries_missing_nothing_is_judged(settings):
    said = verdict(settings, "table_1", rows(GOOD), missing=[1, 2])
    assert said.startswith("not run: 2 entries are missing; image AUROC, k 0: 99.50 (paper 99.56)")


def test_an_item_without_printed_numbers_is_computed_or_not(settings):
    assert verdict(settings, "figure_3", None, missing=[1]).startswith("not run: 1 entries are missing")
    why = "Figure S4 is not drawn: no data/btad"
    assert verdict(settings, "figure_5", None, missing=[why]).startswith(f"computed in part: {why}")
    assert "computed in part" not in RULE and "(in part:" in RULE and "within 0.1 percent" in RULE


def test_a_notebooks_own_parameter_can_be_a_departure(settings):
    own = changed(perturbed=("test", "both"), ranges=({}, {"blur": 1.0}), level=("image", "image"))
    assert own == ["perturbed test instead of both"], "an empty value is the profile's"
    said = verdict(settings, "table_4", rows(GOOD), departures=own)
    assert said.startswith("not run: in another setting (perturbed test instead of both)")


def test_an_item_of_one_category_needs_no_other(demo_root, settings):
    few = Settings(profile="paper", data_root=str(demo_root), categories=("bottle", "cable"))
    assert verdict(few, "figure_4", rows(GOOD), categories=["bottle"]).startswith("reproduced")
    assert "without carpet" in verdict(few, "figure_4", rows(GOOD), categories=["carpet"])


def test_a_run_is_checked_by_what_was_run_in_the_papers_setting(settings):
    folder = settings.out("")
    with pytest.raises(FileNotFoundError, match=r"folder: expected \*.verdict.json"):
        check(folder)
    tables = {"a": rows(GOOD), "b": rows(GOOD, BAD), "c": rows(BAD), "d": rows(BAD)}
    for item, table, missing in zip(tables, tables.values(), ([], [], [], [1]), strict=True):
        verdict(settings, item, table, missing=missing)
    note(settings, "e", "checked")
    for content in (b'{"item": "f", "sta', b"{}", b"[1]", b"\xff", b"3"):
        (folder / "f.verdict.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"f\.verdict\.json is no verdict, or half of one"):
            check(folder)
    (folder / "f.verdict.json").unlink()
    said = [line.partition(";")[0] for line in check(folder)]
    assert said == ["b: partly: 1 of 2 numbers agree", "c: not: 0 of 1 numbers agree"]
