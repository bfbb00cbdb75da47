"""Reading the published numbers.

One CSV per table beside this file, in the table's reading order, numbers exactly as printed: AUROC in percent, "-" for
a dash. What a table holds fixed has no column in its file (by default the single model: WRN-50, 224 px, layers 2+3,
patch 3, D_f 512, 1 % coreset). Not in the paper's extracted text, so taken from elsewhere: the patch sizes of Tables 3
and 5, Figure 4's d′, and PatchCore's 1024 dimensions in Tables 4, 5 and S5 (Table 2's entry that
equals their average).
"""

from collections.abc import Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from rcp.checks import nearest

OBJECTS = ("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper")
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
CATEGORIES = OBJECTS + TEXTURES  # the order of Table 5


class Counts(NamedTuple):
    """Images of one category: training (all normal), normal test and defective test."""

    train: int
    test_good: int
    test_defective: int


COUNTS = {
    "bottle": Counts(209, 20, 63),
    "cable": Counts(224, 58, 92),
    "capsule": Counts(219, 23, 109),
    "hazelnut": Counts(391, 40, 70),
    "metal_nut": Counts(220, 22, 93),
    "pill": Counts(267, 26, 141),
    "screw": Counts(320, 41, 119),
    "toothbrush": Counts(60, 12, 30),
    "transistor": Counts(213, 60, 40),
    "zipper": Counts(240, 32, 119),
    "carpet": Counts(280, 28, 89),
    "grid": Counts(264, 21, 57),
    "leather": Counts(245, 32, 92),
    "tile": Counts(230, 33, 84),
    "wood": Counts(247, 19, 60),
}

# The paper's short names of its backbones.
ABBREVIATIONS = {
    "wide_resnet50_2": "WRN-50",
    "wide_resnet101_2": "WRN-101",
    "resnext101_32x8d": "RNext-101",
    "densenet201": "DenseN-201",
}


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
    if name not in _FILES:
        raise ValueError(
            f"table: the paper has no table {name!r}.{nearest(name, _FILES)} Expected one of {', '.join(_FILES)}"
        )
    return _read(name).copy()


def published(name: str | int, /, **where) -> float:
    """The one number of a table with the given settings: ``published(2, method="PatchCore", dim=64)``; NaN for "-".

    Raises:
        ValueError: a column or value that is not there (the message names the nearest and lists the valid ones), more
            than one row left (it names the settings that still differ), or a table whose numbers are not available.
    """
    name, frame = str(name), table(name)
    if name in NOT_AVAILABLE:
        raise ValueError(f"table {name}: {NOT_AVAILABLE[name]}")
    for column, wanted in where.items():
        if column not in frame:
            raise ValueError(
                f"table {name} has no column {column!r}.{nearest(column, frame)} Valid: {', '.join(frame)}"
            )
        match = frame[(frame[column] == wanted).fillna(False)]
        if match.empty:
            said = f"no row with {column}={wanted!r}{_among(where, column)}"
            raise ValueError(f"table {name}: {said}.{_valid(frame[column], wanted)}")
        frame = match
    if len(frame) > 1:
        settings = frame.drop(columns=["printed", "value"])
        several = [c for c in settings if settings[c].nunique(dropna=False) > 1]
        differ = "; ".join(f"{c} ({', '.join(map(str, settings[c].unique()))})" for c in several)
        raise ValueError(f"table {name}: {len(frame)} rows match {where}; they differ in {differ}")
    return float(frame["value"].iloc[0])


def _among(where: Mapping, column: str) -> str:
    """The conditions that were already met when ``column`` was not."""
    met = list(where.items())[: list(where).index(column)]
    return f" among those with {', '.join(f'{c}={v!r}' for c, v in met)}" if met else ""


def _valid(column: pd.Series, wanted) -> str:
    valid = column.dropna().unique().tolist()
    numeric = isinstance(wanted, Real) and all(isinstance(v, Real) for v in valid)
    closest = min(valid, key=lambda v: abs(v - wanted)) if numeric and valid else None
    near = f" Did you mean {closest}?" if numeric and valid else nearest(wanted, valid)
    return f"{near} Valid: {', '.join(map(str, valid)) or 'none'}"


def group_means(values: Mapping[str, float] | pd.Series, objects=OBJECTS, textures=TEXTURES) -> dict[str, float]:
    """Means of per-category values, in both of the paper's ways.

    Args:
        values: category -> value; categories may be missing (means are over those given); NaN spreads to its means.
        objects, textures: which categories form the two groups.

    Returns:
        object, texture: means of the groups (NaN where no category is given); mean_of_classes: every category counts
        the same, as in Table 5; mean_of_groups: (object + texture) / 2, as in Table S5's augmented averages.

    Raises:
        ValueError: no values, or a category of neither group (the nearest is named).
    """
    values = dict(values)
    if not values:
        raise ValueError("values: expected at least one category, got none")
    for name in values:
        if name not in (*objects, *textures):
            near = nearest(name, (*objects, *textures))
            raise ValueError(f"values: category {name!r} is neither object nor texture.{near}")

    def mean(names) -> float:
        given = [float(values[name]) for name in names if name in values]
        return float(np.mean(given)) if given else float("nan")

    means = {"object": mean(objects), "texture": mean(textures), "mean_of_classes": mean((*objects, *textures))}
    return means | {"mean_of_groups": (means["object"] + means["texture"]) / 2}
