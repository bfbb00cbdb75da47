"""One line per table or figure for the index: is it reproduced?"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from rcp.notebook import Settings

TOLERANCE = 0.1
RULE = f"""reproduced: every number that was computed in the paper's setting agrees with the printed one; partly: some do; not: none does;
not run: nothing was computed in the paper's setting (its backbone, weights and epochs, all its categories), whatever else was computed.
Two numbers agree within {TOLERANCE} percent points or two standard deviations of ours over seeds, whichever is more."""


class Comparison(NamedTuple):
    """One of our numbers beside the printed one; spread is over seeds, NaN for one seed."""

    what: str
    ours: float
    spread: float
    published: float

    @property
    def agrees(self) -> bool:
        return abs(self.ours - self.published) <= max(TOLERANCE, 2 * np.nan_to_num(self.spread))

    def __str__(self) -> str:
        spread = "" if np.isnan(self.spread) else f" ± {self.spread:.2f}"
        beside = "–" if np.isnan(self.published) else f"{self.published:.2f}"
        return f"{self.what} {self.ours:.2f}{spread} (paper {beside})"


def of_averages(table: pd.DataFrame) -> list[Comparison]:
    """The comparisons in what :func:`rcp.tables.averages` gives."""
    found = []
    for metric in dict.fromkeys(c[0] for c in table.columns):
        for name, row in table[metric].iterrows() if len(table) else ():
            found.append(Comparison(f"{metric}, {name}:", *(row[n] for n in ("mean", "spread", "published"))))
    return found


def of_table_5(table: pd.DataFrame, what: str) -> list[Comparison]:
    """The comparisons of the overall means in what :func:`rcp.tables.table_5` gives."""
    found = []
    for source in dict.fromkeys(c[0] for c in table.columns if c[0] != "published"):
        row = table.loc[[i for i in table.index if i.startswith("mean of all ")][-1], source]
        name = f"{what}, {source.removeprefix('rcp ')}:"
        found.append(Comparison(name, row["mean"], row["spread"], row["mean"] - row["difference"]))
    return found


def verdict(
    settings: Settings, item: str, comparisons: Sequence[Comparison], also: str = "", missing: Sequence = ()
) -> str:
    """Writes ``ITEM.verdict.json`` beside the executed notebooks, for the index, and returns it as a sentence.

    comparisons: all numbers of the item; those that are undefined on either side are not judged. also: a figure in words.
    missing: cells that are not computed; with any, nothing is judged.
    """
    judged = [c for c in comparisons if np.isfinite(c.ours) and np.isfinite(c.published)]
    agree, departures = sum(c.agrees for c in judged), settings.departures()
    if missing or departures or not judged:
        state = "not run"
    else:
        state = "reproduced" if agree == len(judged) else "partly" if agree else "not"
    words = [f"{agree} of {len(judged)} numbers agree"] if state != "not run" else []
    words += [f"{len(missing)} cells are missing"] if missing else []
    words += [f"in another setting ({'; '.join(departures)})"] if departures else []
    shown = judged or [c for c in comparisons if np.isfinite(c.ours)]
    words += [str(c) for c in shown[:4]] + ([f"and {len(shown) - 4} more"] if len(shown) > 4 else [])
    words += [also] if also else []
    return _write(settings, item, state, "; ".join(words))


def note(settings: Settings, item: str, words: str) -> str:
    """As :func:`verdict`, for what there is nothing to reproduce of: arithmetic on the printed numbers."""
    return _write(settings, item, "checked", words)


def _write(settings: Settings, item: str, state: str, words: str) -> str:
    settings.out(f"{item}.verdict.json").write_text(
        json.dumps({"item": item, "state": state, "words": words}, indent=1)
    )
    return f"{state}: {words}"
