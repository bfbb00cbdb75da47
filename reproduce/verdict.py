"""One line per table or figure for the index: is it reproduced?"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from reproduce.notebook import Settings
from reproduce.tables import METRICS, as_written

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


def changed(**parameters: tuple) -> list[str]:
    """A notebook's own parameters, name=(value, the paper's), in words where they differ; an empty one is the profile's."""
    return [f"{name} {value} instead of {of}" for name, (value, of) in parameters.items() if value and value != of]


def verdict(settings: Settings, item: str, rows, also="", missing=(), departures=(), categories=None) -> str:
    """Writes ``ITEM.verdict.json`` beside the executed notebooks, for the index, and returns it as a sentence (see RULE).

    Args:
        rows: all of the item, a DataFrame as of :func:`reproduce.tables.compare`. None where the paper prints no number that ours could
            be held against.
        also: a figure in words.
        missing: entries that are not computed; with any, nothing is judged. Or words on a part of the item that is not there.
        departures: of the notebook's own parameters, as :func:`changed` gives them.
        categories: those that the item is of; all of the data set where None.
    """
    candidates = [] if rows is None else _candidates(rows)
    judged = [r for r in candidates if np.isfinite(r["difference"])]
    agree, departures = sum(map(_agrees, judged)), [*settings.departures(categories), *departures]
    parts, entries = ([m for m in missing if isinstance(m, str) == of_words] for of_words in (True, False))
    if entries or departures or (rows is not None and not judged):
        state = "not run"
    elif rows is None:
        state = "computed in part" if parts else "computed"
    else:
        state = "reproduced" if agree == len(judged) else "partly" if agree else "not"
    shown = judged or [r for r in candidates if np.isfinite(r["mean"])]
    words = [f"{agree} of {len(judged)} numbers agree" * (state in ("reproduced", "partly", "not"))]
    words += [f"{len(entries)} entries are missing" * bool(entries), *parts]
    words += [f"in another setting ({'; '.join(departures)})" * bool(departures), *map(_in_words, shown[:4])]
    words += [f"and {len(shown) - 4} more" * (len(shown) > 4), also.replace("\n", " ")]
    return _write(settings, item, state, "; ".join(filter(None, words)))


def _candidates(rows: pd.DataFrame) -> list[dict]:
    """What could be judged: means of all categories that leave none out, d′ of each category."""
    kinds = np.where(rows["metric"] == "d_prime", "category", "all")
    return rows[(rows["kind"] == kinds) & (rows["left_out"] == "")].to_dict("records")


def _agrees(r: dict) -> bool:
    tolerance = D_PRIME_TOLERANCE if r["metric"] == "d_prime" else TOLERANCE
    return round(abs(r["difference"]), 9) <= max(tolerance, 2 * np.nan_to_num(r["spread"]))


def _in_words(r: dict) -> str:
    spread = "" if np.isnan(r["spread"]) else f" ± {r['spread']:.2f}"
    beside = "" if np.isnan(r["published"]) else f" (paper {r['published']:.2f})"
    of = f", {r['row']}" if r["kind"] == "category" else ""
    return f"{METRICS[r['metric']]}, {r['setting']}{of}: {r['mean']:.2f}{spread}{beside}"


def note(settings: Settings, item: str, words: str) -> str:
    """As :func:`verdict`, for what there is nothing to reproduce of: arithmetic on the printed numbers."""
    return _write(settings, item, "checked", words)


def _write(settings: Settings, item: str, state: str, words: str) -> str:
    found = {"item": item, "state": state, "words": words}
    settings.out(f"{item}.verdict.json").write_text(json.dumps(found, indent=1))
    return f"{state}: {words}"


def check(folder: str | Path) -> list[str]:
    """A line for each item of a run's folder that was run in the paper's setting and is not, or only partly, reproduced.

    Raises:
        FileNotFoundError: no verdicts there, so that nothing was checked.
        ValueError: a file that is no verdict, or half of one; names it.
    """
    files = as_written(sorted(Path(folder).glob("*.verdict.json")))
    if not files:
        raise FileNotFoundError(f"folder: expected *.verdict.json of a finished run, found none in {folder}")
    return [f"{item}: {state}: {words}" for item, state, words in map(read, files) if state in ("partly", "not")]


def read(file: Path) -> list[str]:
    """Item, state and words of a verdict. Raises ValueError for a file that is none, or half of one; names it."""
    try:
        found = json.loads(file.read_text())
        return [found[name] for name in ("item", "state", "words")]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no verdict, or half of one ({type(error).__name__}: {error})") from None
