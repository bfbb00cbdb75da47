"""One line per table or figure for the index: is it reproduced?"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from reproduce.notebook import Settings
from reproduce.tables import OVERALL, PAPER_15, TWO_GROUPS

TOLERANCE = 0.1
D_PRIME_TOLERANCE = 0.3  # half of what lies between the two that the paper prints: no value agrees with both
RULE = f"""reproduced: every judged number agrees with the printed one; partly: some do; not: none does;
computed: the paper prints no number that ours could be held against (in part: a figure of the item is not drawn);
not run: not all of it is computed in the paper's setting, whatever else was computed. That setting is its backbone,
weights and epochs, the notebook's own parameters as the paper has them or as we infer them, and all categories that
the item is of. Judged are means over all categories (Table 4: without and with perturbations, and their drop), where
the paper prints them for the same model or they follow from its rows, and d′ of bottle (Figure 4). A single category,
a group, and a mean that had to leave a category out are shown, not judged. Two numbers agree within {TOLERANCE} percent
points ({D_PRIME_TOLERANCE} for d′) or two standard deviations of ours over seeds, whichever is more."""


class Comparison(NamedTuple):
    """One of our numbers beside the printed one, NaN where there is none to judge by; spread is over seeds, NaN for one."""

    what: str
    ours: float
    spread: float
    published: float
    tolerance: float = TOLERANCE

    @property
    def agrees(self) -> bool:
        return abs(self.ours - self.published) <= max(self.tolerance, 2 * np.nan_to_num(self.spread))

    def __str__(self) -> str:
        spread = "" if np.isnan(self.spread) else f" ± {self.spread:.2f}"
        beside = "–" if np.isnan(self.published) else f"{self.published:.2f}"
        return f"{self.what} {self.ours:.2f}{spread} (paper {beside})"


def of_averages(table: pd.DataFrame) -> list[Comparison]:
    """The comparisons in what :func:`reproduce.tables.averages` gives."""
    found = []
    for metric in dict.fromkeys(c[0] for c in table.columns):
        for name, row in table[metric].iterrows() if len(table) else ():
            printed = _of_whole(metric, row[PAPER_15])
            found.append(Comparison(f"{metric}, {name}:", row["mean"], row["spread"], printed))
    return found


def of_table_5(table: pd.DataFrame, what: str) -> list[Comparison]:
    """The comparisons of the overall means in what :func:`reproduce.tables.table_5` or ``table_7`` gives."""
    found = []
    for source in dict.fromkeys(c[0] for c in table.columns if c[0] != "published"):
        overall = [i for i in table.index if i.startswith(OVERALL.format(""))][-1]
        row = table.loc[overall, source]
        name = f"{what}, {source.removeprefix('rcp ')}:"
        found.append(Comparison(name, row["mean"], row["spread"], _of_whole(overall, row["mean"] - row["difference"])))
    return found


def of_table_4(found: dict[str, pd.DataFrame]) -> list[Comparison]:
    """The comparisons of both kinds of mean in what :func:`reproduce.tables.table_4` gives for each method."""
    return [
        Comparison(f"{method}, {what}, {name}:", *table.loc[name, [("rcp", what), ("rcp", f"± {what}")]],
                   _of_whole(name, table.loc[name, ("published", what)]))
        for method, table in found.items()
        for name in table.index if name.startswith((OVERALL.format(""), TWO_GROUPS))
        for what in ("without", "with", "drop")
    ]  # fmt: skip


def _of_whole(name: str, published: float) -> float:
    """No published value for a mean that leaves a category out: the printed one does not."""
    return np.nan if "(without " in name else published


def changed(**parameters: tuple) -> list[str]:
    """A notebook's own parameters, name=(value, the paper's), in words where they differ; an empty one is the profile's."""
    return [
        f"{name} {value} instead of {papers}"
        for name, (value, papers) in parameters.items()
        if value and value != papers
    ]


def verdict(
    settings: Settings,
    item: str,
    comparisons: Sequence[Comparison] | None,
    also: str = "",
    missing: Sequence = (),
    departures: Sequence[str] = (),
    categories: Sequence[str] | None = None,
) -> str:
    """Writes ``ITEM.verdict.json`` beside the executed notebooks, for the index, and returns it as a sentence (see RULE).

    Args:
        comparisons: all numbers of the item; those that are undefined on either side are not judged. None where the paper
            prints no number that ours could be held against.
        also: a figure in words.
        missing: entries that are not computed; with any, nothing is judged. Or words on a part of the item that is not there.
        departures: of the notebook's own parameters, as :func:`changed` gives them.
        categories: those that the item is of; all of the data set where None.
    """
    judged = [c for c in comparisons or () if np.isfinite(c.ours) and np.isfinite(c.published)]
    agree, departures = sum(c.agrees for c in judged), [*settings.departures(categories), *departures]
    parts, entries = ([m for m in missing if isinstance(m, str) == of_words] for of_words in (True, False))
    if entries or departures or (comparisons is not None and not judged):
        state = "not run"
    elif comparisons is None:
        state = "computed in part" if parts else "computed"
    else:
        state = "reproduced" if agree == len(judged) else "partly" if agree else "not"
    words = [f"{agree} of {len(judged)} numbers agree"] if state in ("reproduced", "partly", "not") else []
    words += [f"{len(entries)} entries are missing"] if entries else []
    words += parts
    words += [f"in another setting ({'; '.join(departures)})"] if departures else []
    shown = judged or [c for c in comparisons or () if np.isfinite(c.ours)]
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
