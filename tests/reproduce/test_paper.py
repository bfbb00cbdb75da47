"""The published numbers: transcribed right, and contradictory only where the paper is."""

import math
import re

import pandas as pd
import pytest
from conftest import SHARED

from reproduce.paper import abbreviated, averages, inconsistencies, published, table, tables

OURS = {"method": "ReConPatch", "backbone": "WRN-50", "category": "average"}


# --- transcription -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper_lines() -> list[str]:
    path = SHARED / "paper.txt"
    if not path.exists():
        pytest.skip("the paper's text is not at hand: paper.txt (set RCP_SHARED to the folder that holds it)")
    return path.read_text(encoding="utf-8").splitlines()


# table -> how the line above its first row of numbers starts, how many rows of numbers follow
PLACES = {
    "1": ("Method | Ours-25%", 2), "2": ("Dimension | 1024", 2), "3": ("Metric | Detection", 3),
    "4": ("Object | Texture | Average", 6), "5": ("Class\\Method", 18), "6": ("Image size | 480480 | 480480 | 320320", 2),
    "7": ("Class | VT-ADL", 4), "S1": ("value | 3 | 5", 2), "S2": ("m value | 0.5", 2), "S3": ("0.0 | 0.25", 2),
    "S4": ("Projection layer |", 1), "S5": ("Class\\Aug. Method", 18), "S6": ("Method | Avg. inference", 2),
    "S8": ("Ensemble Backbone", 2),
}  # fmt: skip


def rows_of_text(lines: list[str], name: str) -> list[tuple[str, list[str]]]:
    """(label, numbers as printed) of each row of a table in the extracted text."""
    start, count = PLACES[name]
    (at,) = [i for i, line in enumerate(lines) if line.startswith(start)]
    rows = []
    for line in lines[at + 1 :]:
        label, *cells = (cell.strip() for cell in line.split("|"))
        cells = ", ".join(cells).replace("(", "").replace(")", "").split(", ")
        numbers = [cell for cell in cells if re.fullmatch(r"-|-?\d+(\.\d+)?", cell)]
        if numbers:
            rows.append((label, numbers))
        if len(rows) == count:
            return rows
    raise AssertionError(f"table {name}: the text ends after {len(rows)} of {count} rows")


@pytest.mark.parametrize("name", PLACES)
def test_every_number_is_as_printed(paper_lines, name):
    numbers = [number for _, numbers in rows_of_text(paper_lines, name) for number in numbers]
    assert table(name)["printed"].tolist() == numbers


def test_numbers_of_the_prose_are_in_the_prose(paper_lines):
    prose = " ".join(line for line in paper_lines if "|" not in line).replace(",", "")
    for number in table("text")["printed"]:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", prose), number


@pytest.mark.parametrize(("name", "where", "value"), [
    (2, {"method": "PatchCore", "dim": 64}, 97.75),
    ("3", {"layers": "2+3", "patch_size": 5, "metric": "image_auroc"}, 98.84),
    ("4", {"method": "PatchCore", "augmentation": "difference", "category": "object"}, 9.94),
    ("5", {"method": "PNI", "category": "tile", "metric": "pixel_auroc"}, 98.4),
    ("5", {"method": "CFLOW-AD", "category": "screw", "metric": "image_auroc"}, 91.89),
    ("5", {**OURS, "image_size": 224, "metric": "pixel_auroc"}, 98.18),
    ("5", {"method": "ReConPatch", "image_size": 480, "category": "pill", "metric": "image_auroc"}, 96.21),
    ("6", {"method": "PatchCore", "image_size": 320, "metric": "image_auroc"}, 99.6),
    ("7", {"method": "RD++", "category": "02", "metric": "image_auroc"}, 90.1),
    ("S1", {"k": 20, "metric": "image_auroc"}, 99.49),
    ("S4", {"projection_layer": "without"}, 99.42),
    ("S5", {"method": "ReConPatch", "augmentation": "with", "category": "screw"}, 89.96),
    ("S6", {"method": "ReConPatch"}, 38.09),
    ("S8", {"image_size": 320, "refinement": "with", "metric": "pixel_auroc"}, 98.96),
])  # fmt: skip
def test_spot_checks(name, where, value):
    assert published(name, **where) == value


def test_dashes_are_nan():
    assert math.isnan(published("5", method="CFA", category="bottle", metric="pixel_auroc"))
    assert table("5")["value"].isna().sum() == 3 * 17  # SPADE's and PaDiM's image, CFA's pixel column but its average
    assert table("7")["value"].isna().sum() == 4  # PNI on BTAD


def test_each_number_has_its_own_setting():
    for name in tables():
        frame = table(name)
        assert not frame.duplicated([c for c in frame if c not in ("value", "printed")]).any(), name


# --- one number, or a message --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "where", "says"), [
    ("9", {}, r"no table '9'.* Valid: 1, 2, .*S8, F4, text"),
    ("5", {"methd": "CFA"}, r"no column 'methd'. Did you mean 'method'"),
    ("5", {"method": "Patchcore"}, r"no method 'Patchcore'. Did you mean 'PatchCore'\? Valid: PNI, "),
    ("2", {"method": "PatchCore", "dim": 500}, r"no dim 500. Valid: 1024, 512, 256, 128, 64"),
    ("5", {"method": "CFA", "category": "metal nut"}, r"Did you mean 'metal_nut'"),
    ("2", {"method": "PatchCore"}, r"5 rows match .*, expected one"),
    ("S7", {"metric": "image_auroc"}, r"lost the numbers of Table S7"),
])  # fmt: skip
def test_published_names_what_would_be_right(name, where, says):
    with pytest.raises(ValueError, match=says):
        published(name, **where)


def test_the_lost_table_is_empty_not_invented():
    assert "S7" in tables() and table("S7").empty


# --- contradictions ------------------------------------------------------------------------------------------------

DROP = "augmentation=difference: average image_auroc"
WITH = "augmentation=with: average image_auroc"
KNOWN = {
    # 1: augmented averages are means of group means, so the drops are off too (and the prose repeats them); and 9.94
    *((name, f"{method}, {WITH}") for name in ("4", "S5") for method in ("PatchCore, dim=1024", "ReConPatch")),
    *((name, f"{method}, {DROP}") for name in ("4", "S5", "text") for method in ("PatchCore, dim=1024", "ReConPatch")),
    ("4", "PatchCore, dim=1024, augmentation=difference: object image_auroc"),
    ("5", "ReConPatch WRN-50 224: (image, pixel) average is not one model's"),  # 2
    ("5", "ReConPatch WRN-50: per-class pixel_auroc column"),  # 3
    ("text", "CFA: average image_auroc"),  # 4
    ("text", "Figure 5: metal nut or screw"),  # 4
    ("text", "constant β of Eq. 11"),  # 5
}


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    return inconsistencies()


def test_the_list_is_exactly_the_known_one(found):
    assert list(found) == ["table", "item", "printed", "recomputed", "difference", "note"]
    items = list(zip(found["table"], found["item"], strict=True))
    assert len(items) == len(set(items))
    assert set(items) == KNOWN


@pytest.mark.parametrize(("name", "item", "printed", "recomputed", "note"), [
    ("S5", f"PatchCore, dim=1024, {WITH}", 95.48, 95.27, "mean of the object and the texture mean"),
    ("S5", f"ReConPatch, {WITH}", 98.56, 98.26, "mean of the object and the texture mean"),
    ("4", f"PatchCore, dim=1024, {DROP}", 3.62, 3.83, "printed averages"),
    ("4", f"ReConPatch, {DROP}", 1.0, 1.30, "printed averages"),
    ("4", "PatchCore, dim=1024, augmentation=difference: object image_auroc", 9.94, 4.31, "same table"),
    ("5", "ReConPatch WRN-50 224: (image, pixel) average is not one model's", 99.56, 98.7, r"layers 1\+2\+3, patch 5"),
    ("text", "CFA: average image_auroc", 99.3, 99.2, "Table 5 prints 99.2"),
    ("text", "constant β of Eq. 11", 1.4826, 1.2533, "median"),
])  # fmt: skip
def test_contradictions_in_numbers(found, name, item, printed, recomputed, note):
    (row,) = found[(found["table"] == name) & (found["item"] == item)].itertuples()
    assert row.printed == printed
    assert row.recomputed == pytest.approx(recomputed, abs=0.005)
    assert row.difference == pytest.approx(row.printed - row.recomputed)
    assert re.search(note, row.note)


def test_backbones_have_the_papers_short_names():
    assert abbreviated("wide_resnet101_2+resnext101_32x8d+densenet201") == "WRN-101+RNext-101+DenseN-201"
    assert abbreviated("resnet18") == "resnet18"
    used = set(table("6")["backbone"]) | set(table("5")["backbone"].dropna())
    assert abbreviated("wide_resnet101_2+resnext101_32x8d+densenet201") in used and "WRN-50" in used


def test_every_average_that_can_be_computed_again_is_listed():
    rows = averages()
    assert list(rows) == ["table", "item", "printed", "recomputed", "difference", "note"]
    ours = rows[(rows["table"] == "5") & (rows["item"] == "ReConPatch: average image_auroc")].iloc[0]
    assert ours["printed"] == 99.56 and ours["recomputed"] == pytest.approx(99.56, abs=0.01) and not ours["note"]
    off = rows[(rows["table"] == "S5") & (rows["note"] != "")]
    recomputed = dict(zip(off["printed"], off["recomputed"].round(2), strict=True))
    assert (recomputed[95.48], recomputed[98.56]) == (95.27, 98.26)
