"""Where the paper contradicts itself: printed means and differences derived again, equal settings compared."""

from itertools import product
from math import nan, pi, sqrt

import numpy as np
import pandas as pd

from reproduce.paper.facts import CATEGORIES, OBJECTS, TEXTURES, published, table, tables

_AUROC = ["image_auroc", "pixel_auroc"]
_MEANS = {
    "mvtec": {"object": OBJECTS, "texture": TEXTURES, "average": CATEGORIES},
    "btad": {"average": ("01", "02", "03")},
}
# What a blank or absent setting means when numbers of different tables are compared: the paper's single model.
_DEFAULTS = {
    "dataset": "mvtec", "method": "", "backbone": "WRN-50", "image_size": 224, "layers": "2+3", "patch_size": 3, "dim": 512,
    "coreset_ratio": 0.01, "k": 5, "margin": 1.0, "alpha": 0.5, "projection_layer": "with", "augmentation": "without",
    "refinement": "without",
}  # fmt: skip
_SETTING = list(_DEFAULTS)


def _everything() -> pd.DataFrame:
    """All AUROC rows, every setting filled in, plus ``table`` and ``slack`` (what rounding can explain)."""
    frames = [table(name).astype(object).assign(table=name) for name in tables()]
    frame = pd.concat([f for f in frames if len(f)], ignore_index=True)
    frame = frame[frame["metric"].isin(_AUROC) & (frame["printed"] != "-")]
    frame = frame.assign(**{c: frame[c].where(frame[c].notna(), default) for c, default in _DEFAULTS.items()})
    # The paper strips trailing zeros ("100", "98.1"), so at least one decimal is meant.
    decimals = frame["printed"].str.partition(".")[2].str.len().clip(lower=1)
    return frame.astype({"value": float}).assign(slack=0.01 + 0.5 * 10.0**-decimals + 1e-9)


def _row(where: str, item: str, printed: float, recomputed: float, note: str) -> dict:
    numbers = {"printed": printed, "recomputed": recomputed, "difference": printed - recomputed}
    return {"table": where, "item": item, **numbers, "note": note}


def _flag(row: pd.Series, recomputed: float, note: str) -> dict:
    """The finding for one printed number; ``at`` marks its row of ``_everything``, so that it is reported once."""
    named = [row["method"], *(f"{c}={row[c]}" for c in _SETTING if c != "method" and row[c] != _DEFAULTS[c])]
    item = f"{', '.join(named)}: {row['category']} {row['metric']}"
    return _row(row["table"], item, row["value"], recomputed, note) | {"at": row.name}


def _differences(frame: pd.DataFrame) -> list[dict]:
    """Printed differences that are not 'without' minus 'with' of the same table."""
    key = ["table", *(c for c in _SETTING if c != "augmentation"), "category", "metric"]
    wide = frame.pivot_table(index=key, columns="augmentation", values="value", aggfunc="first")
    rows = frame[frame["augmentation"] == "difference"].join((wide["without"] - wide["with"]).rename("derived"), on=key)
    off = rows[(rows["value"] - rows["derived"]).abs() > rows["slack"]]
    return [_flag(row, row["derived"], "'without' minus 'with' of the same table") for _, row in off.iterrows()]


def _repeats(frame: pd.DataFrame) -> list[dict]:
    """The same figure printed in several places with different values; tables are compared in order, the prose last."""
    found, key = [], [*_SETTING, "category", "metric"]
    for _, rows in frame[frame.duplicated(key, keep=False)].groupby(key, sort=False):
        first = rows.iloc[0]
        for _, row in rows.iloc[1:].iterrows():
            if abs(row["value"] - first["value"]) > max(row["slack"], first["slack"]):
                found.append(_flag(row, first["value"], f"Table {first['table']} prints {first['printed']}"))
    return found


def _averages(frame: pd.DataFrame) -> list[dict]:
    """Printed means, wherever the rows of the same setting are printed too; the note is empty where they agree."""
    found = []
    for (dataset, *_), rows in frame.groupby([*_SETTING, "metric"], sort=False):
        by = rows.groupby("category")["value"].first()
        for _, row in rows[rows["category"].isin(_MEANS[dataset])].iterrows():
            members, note = list(_MEANS[dataset][row["category"]]), ""
            if not set(members) <= set(by.index):
                continue
            if abs(row["value"] - by[members].mean()) > row["slack"]:
                note = f"mean of the {len(members)} printed classes"
                if row["augmentation"] == "difference":
                    note += "; the printed number is the difference of the printed averages, one of which is itself off"
                elif abs(row["value"] - (by.get("object", nan) + by.get("texture", nan)) / 2) <= row["slack"]:
                    note += "; the printed number is the mean of the object and the texture mean"
            found.append(_flag(row, float(by[members].mean()), note))
    return found


def averages() -> pd.DataFrame:
    """Every printed mean whose rows are printed too; columns as of :func:`inconsistencies`.

    The note is empty unless they differ by more than 0.01 plus half the last printed digit.
    """
    return pd.DataFrame(_averages(_everything())).drop(columns="at")


def _two_models(frame: pd.DataFrame) -> list[dict]:
    """Columns of Table 5 whose image and pixel numbers come from different settings, so that no one model has both."""
    column = ["method", "backbone", "image_size"]
    means = frame[(frame["category"] == "average") & (frame["augmentation"] == "without")]
    found = []
    for _, rows in means[means["table"] == "5"].groupby(column, sort=False):
        image, pixel = (rows[rows["metric"] == m].iloc[0] if (rows["metric"] == m).any() else None for m in _AUROC)
        if image is None or pixel is None or (image[_SETTING] == pixel[_SETTING]).all():
            continue
        same = means[(means[_SETTING] == pixel[_SETTING]).all(axis=1) & (means["metric"] == "image_auroc")].iloc[0]
        note = (
            f"two models: the image column is layers {image['layers']}, patch {image['patch_size']}; "
            f"the pixel column ({pixel['printed']}) is layers {pixel['layers']}, patch {pixel['patch_size']}, "
            f"whose own image AUROC is {same['printed']} (Table {same['table']})"
        )
        item = f"{image['method']} {image['backbone']} {image['image_size']}: (image, pixel) average is not one model's"
        found.append(_row("5", item, image["value"], same["value"], note))
    return found


def pixel_column_evidence(method: str = "ReConPatch", backbone: str = "WRN-50") -> dict[str, float]:
    """How well a method's per-class pixel column of Table 5 fits the other methods' columns.

    Returns:
        spearman: median rank correlation with the other columns; spearman_patchcore: with PatchCore's;
        others_patchcore: the lowest of any other method with PatchCore's;
        gap: mean absolute difference from PatchCore's column as printed, in percent points;
        gap_sorted: the same with both columns sorted, the smallest that any permutation of the column can reach;
        gap_shifted: the smallest where the column is read in the table's, the alphabetical or the textures-first order,
        forwards or backwards, shifted by any number of rows.
    """
    columns = _pixel_columns()
    this, patchcore = columns[method, backbone].to_numpy(), columns["PatchCore", "WRN-50"].to_numpy()
    rank = columns.corr(method="spearman")
    others = rank.drop(index=[(method, backbone)])
    orders = (CATEGORIES, tuple(sorted(CATEGORIES)), TEXTURES + OBJECTS)
    shifted = [
        np.roll(this[::step], n)[[order.index(name) for name in CATEGORIES]]
        for order, step, n in product(orders, (1, -1), range(len(CATEGORIES)))
    ]
    return {
        "spearman": float(others[method, backbone].median()),
        "spearman_patchcore": float(rank.loc[(method, backbone), ("PatchCore", "WRN-50")]),
        "others_patchcore": float(others["PatchCore", "WRN-50"].min()), "gap": float(np.abs(this - patchcore).mean()),
        "gap_sorted": float(np.abs(np.sort(this) - np.sort(patchcore)).mean()),
        "gap_shifted": float(min(np.abs(column - patchcore).mean() for column in shifted)),
    }  # fmt: skip


def _pixel_columns() -> pd.DataFrame:
    """Table 5's complete pixel columns: 15 rows in ``CATEGORIES`` order, one column per (method, backbone)."""
    rows = table("5").query("metric == 'pixel_auroc' and category in @CATEGORIES")
    columns = rows.pivot(index="category", columns=["method", "backbone"], values="value").loc[list(CATEGORIES)]
    return columns.dropna(axis="columns")


def _permuted() -> list[dict]:
    """Pixel columns of Table 5 that rank the classes against all other methods: the mark of rows that slipped."""
    found = []
    for method, backbone in _pixel_columns():
        seen = pixel_column_evidence(method, backbone)
        if seen["spearman"] >= 0:
            continue
        note = (
            f"looks permuted: rank correlation with PatchCore's column {seen['spearman_patchcore']:.2f}, every other "
            f"method's at least {seen['others_patchcore']:.2f}; mean gap to PatchCore {seen['gap']:.2f} as printed, "
            f"{seen['gap_sorted']:.2f} with both columns sorted, {seen['gap_shifted']:.2f} at best by a shift or "
            "reversal of a natural class order, so which permutation stays unknown. "
            "The column's means are consistent; its classes are no target"
        )
        found.append(_row("5", f"{method} {backbone}: per-class pixel_auroc column", nan, nan, note))
    return found


def _prose() -> list[dict]:
    """Eq. 11's constant (for normal scores σ is 1.4826 times the *median* absolute deviation), and one point of wording."""
    note = "Eq. 11 calls MAD the mean absolute deviation, whose constant is sqrt(π/2); 1.4826 is that of the median one"
    shown = "the prose names metal nut among the classes of Figure 5 where the figure shows screw"
    beta = _row("text", "constant β of Eq. 11", published("text", metric="mad_constant"), sqrt(pi / 2), note)
    return [beta, _row("text", "Figure 5: metal nut or screw", nan, nan, shown)]


def inconsistencies() -> pd.DataFrame:
    """The paper's contradictions, computed from the printed numbers (all but one point of wording).

    A number is listed where it differs from what other printed numbers give by more than 0.01 plus half its last digit.

    Returns:
        DataFrame with table (as ``table`` takes it), item (method, settings, number), printed, recomputed, difference
        (printed - recomputed; percent points for AUROC) and note. NaN where the point is not about one number.
    """
    frame, found = _everything(), []
    for check in (_differences, _repeats, _averages):
        known = [row for row in check(frame) if row["note"]]
        found += known
        frame = frame.drop(index=[row.pop("at") for row in known])
    found += _two_models(_everything()) + _permuted() + _prose()
    return pd.DataFrame(found).sort_values(
        "table", key=lambda names: names.map(tables().index), kind="stable", ignore_index=True
    )
