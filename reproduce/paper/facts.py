"""Reading the published numbers.

One CSV per table beside this file, in the table's reading order, numbers exactly as printed: AUROC in percent, "-" for
a dash. What a table holds fixed has no column in its file (by default the single model: WRN-50, 224 px, layers 2+3,
patch 3, D_f 512, 1 % coreset). Not in the paper's extracted text, so taken from elsewhere: the patch sizes of Tables 3
and 5, Figure 4's d′, and PatchCore's 1024 dimensions in Tables 4, 5 and S5 (Table 2's entry that
equals their average).
"""

from functools import cache
from pathlib import Path

import pandas as pd

from rcp.checks import check_names

OBJECTS = ("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper")
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
CATEGORIES = OBJECTS + TEXTURES  # the order of Table 5

# The paper's short names of its backbones.
ABBREVIATIONS = {
    "wide_resnet50_2": "WRN-50", "wide_resnet101_2": "WRN-101", "resnext101_32x8d": "RNext-101",
    "densenet201": "DenseN-201",
}  # fmt: skip


def abbreviated(backbones: str) -> str:
    """``wide_resnet101_2+densenet201`` as the paper writes it; a backbone that it has no name for stays as it is."""
    return "+".join(ABBREVIATIONS.get(name, name) for name in backbones.split("+"))


_FILES = {name: f"table_{name.lower()}.csv" for name in [*"1234567", *(f"S{n}" for n in range(1, 9))]}
_FILES |= {"F4": "figure_4.csv", "text": "text.csv"}
_TYPES = dict.fromkeys(["category", "layers", "section", "value"], "str")
_TYPES |= dict.fromkeys(["image_size", "patch_size", "dim", "k"], "Int64")

NOT_AVAILABLE = {
    "S7": "the text extraction of the paper lost the numbers of Table S7 (refinement, texture against structure)",
}


def tables() -> list[str]:
    """Names that ``table`` takes: "1" to "7", "S1" to "S8", "F4" (Figure 4) and "text" (numbers in the prose)."""
    return list(_FILES)


@cache
def _read(name: str) -> pd.DataFrame:
    frame = pd.read_csv(Path(__file__).parent / _FILES[name], dtype=_TYPES).rename(columns={"value": "printed"})
    return frame.assign(value=pd.to_numeric(frame["printed"].mask(frame["printed"] == "-")).astype("float64"))


def table(name: str | int) -> pd.DataFrame:
    """One published table, tidy: a row per printed number, in reading order.

    Columns: the settings that the table varies, named as in ``Config`` where it has them (method, backbone as the paper
    abbreviates it, image_size, layers such as "2+3", dim, k, ...; blank where the paper does not say); category (a
    folder name, or the printed means "object", "texture", "average"); metric (image_auroc and pixel_auroc in percent,
    d_prime, inference_ms); printed (str); value (float64, NaN for "-"). "Ours" is ReConPatch. ``augmentation`` is
    without, with, or difference (the printed "Diff"). Table S7 is empty: see ``NOT_AVAILABLE``.

    Raises:
        ValueError: no such table; the message lists the names.
    """
    name = str(name)
    check_names("the paper has no table", [name], _FILES)
    return _read(name).copy()


def published(name: str | int, /, **where) -> float:
    """The one number of a table with the given settings: ``published(2, method="PatchCore", dim=64)``; NaN for "-".

    Raises:
        ValueError: a column or value that is not there (the message names the nearest and lists the valid ones), not
            exactly one row left, or a table whose numbers are not available.
    """
    name, frame = str(name), table(name)
    if name in NOT_AVAILABLE:
        raise ValueError(f"table {name}: {NOT_AVAILABLE[name]}")
    for column, wanted in where.items():
        check_names(f"table {name} has no column", [column], list(frame))
        match = frame[(frame[column] == wanted).fillna(False)]
        if match.empty:
            check_names(f"table {name} has no {column}", [wanted], frame[column].dropna().unique().tolist())
        frame = match
    if len(frame) != 1:
        raise ValueError(f"table {name}: {len(frame)} rows match {where}, expected one")
    return float(frame["value"].iloc[0])
