"""Ours beside the published: one tidy comparison, from which tables, sentences, CSV files and verdicts are made."""

import html
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from rcp.checks import require
from rcp.files import file_hash
from rcp.metrics import image_auroc
from rcp.paths import require_writable
from reproduce import paper

# Notebooks and their HTML pages would take what stands between two $ of a name for a formula.
pd.options.display.html.use_mathjax = pd.options.styler.html.mathjax = False
METRICS = {
    "image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AU-PRO", "d_prime": "d′",
    "position_r2": "R² of the position", "star": "highest point on the defect, %", "inference_ms": "ms an image",
    "iqr_ms": "interquartile range, ms", "images_per_second": "images/s", "peak_memory_mib": "peak memory, MiB",
    "fit_seconds": "seconds to fit",
}  # fmt: skip
AUROC = ("image_auroc", "pixel_auroc")
LESS = ("inference_ms", "iqr_ms", "peak_memory_mib", "fit_seconds")  # is better
_DIGITS = {"position_r2": 4}  # decimals shown; 2 where not named
COLUMNS = [
    "metric", "setting", "kind", "row", "n", "left_out", "why", "mean", "spread", "seeds", "of", "published", "difference",
]  # fmt: skip
# How a setting is written.
_WORDS = {
    "dim": "D {}", "coreset_ratio": "coreset {:g}%", "k": "k {}", "margin": "m {}", "alpha": "α {}", "layers": "levels {}",
    "patch_size": "patch {}", "projection_layer": "{} projection", "image_size": "{} px", "refinement": "{} refinement",
    "augmentation": "{} perturbations",
}  # fmt: skip


# ---- the comparison ----


def compare(
    frame: pd.DataFrame,
    printed: pd.DataFrame | None = None,
    *,
    by: Sequence[str] = (),
    metric: str | Sequence[str] = "image_auroc",
    groups: Mapping[str, Sequence[str]] | None = None,
    scale: float = 100.0,
) -> pd.DataFrame:
    """Means over categories, then over seeds, of each setting, beside what the paper prints for it; tidy.

    Args:
        frame: as :meth:`reproduce.run.Grid.frame` gives it: method, category, seed, settings, metrics, ``undefined`` (metric -> reason).
        printed: as :func:`targets` gives it.
        by: columns that tell the settings apart; the method always does, and is not named where it is alone.
        metric: one or several. scale: what they are multiplied by; the printed ones are in percent.
        groups: name -> categories; {} for rows of categories without groups, None for means over all categories only.

    Returns:
        Rows of metric, setting (a name), kind ("category", "group", "groups": the mean of the two groups' means, "all": the mean
        of all categories), row (the category, the group, or "all"), n (categories that the mean is of), left_out (categories in which the
        metric is undefined for some setting, joined by ", "), why (the reasons), mean and spread (standard deviation) over
        seeds of each seed's own mean, seeds (those that have every category), of (how many there should be), published (NaN
        for none) and difference (ours - published).

        A category's published value is its own. So is a mean's where it is over all categories of the printed average, or where the
        paper prints no categories; else it is the mean of the printed values of the same categories.
    """
    metrics = [metric] if isinstance(metric, str) else metric
    by = ["method", *(name for name in by if name != "method")]
    rows = []
    for name in metrics if len(frame) else ():
        methods = max(f["method"].nunique() for f in (frame, printed) if f is not None)
        reasons, seeds = _reasons(frame, name), frame["seed"].nunique()
        parts = _parts(list(dict.fromkeys(frame["category"])), groups, set(reasons))
        for key, part in frame.groupby(by, sort=False, dropna=False):
            where = dict(zip(by, key, strict=True))
            named = by if methods > 1 or len(by) == 1 else by[1:]
            about = {"metric": name, "setting": setting_name({column: where[column] for column in named}), "of": seeds}
            values = scale * part.astype({name: float}).pivot(index="seed", columns="category", values=name)
            published = pd.Series(dtype=float) if printed is None else _published(printed, where, name)
            rows += [about | _row(values, published, reasons, *which) for which in parts]
    found = pd.DataFrame(rows, columns=COLUMNS)
    return found.assign(difference=found["mean"] - found["published"])


def setting_name(where: Mapping) -> str:
    """``{"method": "ReConPatch", "dim": 64}`` -> "ReConPatch, D 64"."""
    if "coreset_ratio" in where:
        where = {**where, "coreset_ratio": 100 * where["coreset_ratio"]}
    return ", ".join("drop" if v == "difference" else _WORDS.get(name, "{}").format(v) for name, v in where.items())


def _reasons(frame: pd.DataFrame, metric: str) -> dict[str, str]:
    """category -> why the metric is undefined there, for some setting: it is then left out of every mean."""
    rows = frame[frame[metric].isna()]
    whys = rows["undefined"] if "undefined" in rows else [{}] * len(rows)
    return {c: (why or {}).get(metric, "") for c, why in zip(rows["category"], whys, strict=True)}


def _parts(categories: list[str], groups: Mapping | None, undefined: set[str]) -> list[tuple]:
    """(kind, row, lists of categories: the row is the mean of their means)."""
    if groups is None:
        return [("all", "all", [categories])]
    of = {group: [c for c in names if c in categories] for group, names in groups.items()}
    ordered = [c for names in of.values() for c in names]
    ordered += [c for c in categories if c not in ordered]
    of = {group: names for group, names in of.items() if set(names) - undefined}
    parts = [*(("category", c, [[c]]) for c in ordered), *(("group", group, [names]) for group, names in of.items())]
    parts += [("groups", "all", list(of.values()))] if len(of) == 2 else []
    return [*parts, ("all", "all", [ordered])]


def _row(values: pd.DataFrame, published: pd.Series, reasons: dict, kind: str, row: str, lists: list) -> dict:
    """One row. values: (seeds, categories); published: by category."""
    left_out = [c for names in lists for c in names if c in reasons]
    kept = [[c for c in names if c not in reasons] for names in lists]
    own = sum(values.reindex(columns=names).mean(axis=1, skipna=False) for names in kept) / len(kept)
    complete = own.astype(float).dropna()
    beside = [_target(published, names, kind) for names in (lists if kind == "category" else kept)]
    why = "; ".join(reasons[c] if kind == "category" else f"{c}: {reasons[c]}" for c in left_out if reasons[c])
    return {
        "kind": kind, "row": row, "n": sum(map(len, kept)), "left_out": ", ".join(left_out), "why": why,
        "mean": complete.mean(), "spread": complete.std(), "seeds": len(complete), "published": float(np.mean(beside)),
    }  # fmt: skip


def _published(printed: pd.DataFrame, where: Mapping, metric: str) -> pd.Series:
    """What is printed for one setting, by category (also "object", "texture", "average")."""
    found = printed[printed["metric"] == metric]
    for column, value in where.items():
        if column in found:
            found = found[found[column] == (paper.abbreviated(value) if column == "backbone" else value)]
    return found.set_index("category")["value"]


def _target(published: pd.Series, names: list[str], kind: str) -> float:
    of = published.drop(["object", "texture", "average"], errors="ignore")  # an own category may have such a name
    if kind == "all" and "average" in published and (of.empty or set(of.index) == set(names)):
        return published["average"]
    return of.reindex(names).mean(skipna=False)


def targets(item: str) -> pd.DataFrame:
    """:func:`reproduce.paper.table`, as far as a number computed here may be held against it.

    "5": the methods at 224 px. Not ReConPatch's pixel column: it is of another model (levels 1+2+3, patch 5), and looks permuted
    (:func:`reproduce.paper.inconsistencies`); for the model computed here the paper gives the mean of 15 categories only, in Table 3.
    "S5": its categories, because its averages are of two kinds. "7": not PatchCore, whose backbone and size the paper does not name.
    """
    printed = paper.table(item)
    if item == "5":
        printed = printed[printed["image_size"] == 224]
        other = (printed["method"] == "ReConPatch") & (printed["metric"] == "pixel_auroc")
        mean = paper.published("3", metric="pixel_auroc", layers="2+3", patch_size=3)
        printed.loc[other, "value"] = np.where(printed.loc[other, "category"] == "average", mean, np.nan)
    elif item == "S5":
        printed = printed[printed["category"].isin(paper.CATEGORIES)]
    elif item == "7":
        printed = printed[printed["backbone"].notna()]
    return printed if "category" in printed else printed.assign(category="average")


# ---- frames to compare ----


def drops(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with rows of augmentation "difference" added: without minus with perturbations (Tables 4 and S5)."""
    if frame.empty:
        return frame
    without, perturbed = (frame[frame["augmentation"] == how] for how in ("without", "with"))
    return pd.concat([frame, _minus(without, perturbed).assign(augmentation="difference")], ignore_index=True)


def gains(frame: pd.DataFrame) -> pd.DataFrame:
    """Refined minus unrefined, for each kind of simulation (Tables S7 and S8)."""
    return frame if frame.empty else _minus(*(frame[frame["refinement"] == how] for how in ("with", "without")))


def _minus(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Differences of the metrics between rows of the same method, category, seed and size."""
    keys = [name for name in ("method", "category", "seed", "image_size") if name in first]
    metrics = [name for name in METRICS if name in first]
    both = first.merge(second[keys + metrics], on=keys, suffixes=("", " of the second"))
    for name in metrics:
        both[name] = both[name].astype(float) - both[f"{name} of the second"].astype(float)
    return both[list(first)]


def with_all_categories(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the methods that have every category of the one that has most: means of the others would be of other images."""
    has = frame.groupby("method", sort=False)["category"].agg(set) if len(frame) else {}
    most = max(has, key=len, default=set())
    return frame[frame["method"].map(lambda name: most <= has[name]) & frame["category"].isin(most)] if most else frame


def one_at_a_time(frame: pd.DataFrame, varied: str, **defaults) -> pd.DataFrame:
    """The rows in which all but one of the named hyper-parameters are at their defaults, by ascending value of that one."""
    at_default = [frame[name] == value for name, value in defaults.items() if name != varied and len(frame)]
    return frame[np.all(at_default, axis=0)].sort_values(varied, kind="stable") if len(frame) else frame


def paired(
    grid, by: Sequence[str] = (), first: Mapping = {"method": "ReConPatch"}, second: Mapping = {"method": "PatchCore"}
) -> pd.DataFrame:
    """The first minus the second, image AUROC in percent points: spread over seeds, and a 95 % bootstrap interval over test images.

    Args:
        grid: :class:`reproduce.run.Grid` with entries of both.
        by: settings that both must share, such as ["dim"].
        first, second: columns and values that tell the entries of each from the others.

    Returns:
        Rows as of :func:`compare`, of kinds "category" and "all"; mean is the difference, spread the standard deviation of the
        seeds' own differences; columns low and high follow, and those of ``by``.
    """
    found: dict = {}
    for entry, result in grid.pairs():
        columns = entry.columns()
        side = [name for name, of in (("first", first), ("second", second)) if of.items() <= columns.items()]
        if side:
            group = found.setdefault(tuple(columns[name] for name in by), {})
            group = group.setdefault(entry.category, {"labels": np.asarray(result.labels), "first": {}, "second": {}})
            group["why"] = result.metrics["undefined"].get("image_auroc", "")
            group[side[0]][entry.config.seed] = result.scores
    rows, words = [], f"{setting_name(first)} - {setting_name(second)}"
    for key, groups in found.items():
        where = dict(zip(by, key, strict=True))
        for g in groups.values():
            seeds = [s for s in g["first"] if s in g["second"]]  # that both have
            g |= {side: {s: g[side][s] for s in seeds} for side in ("first", "second")}
        both = {c: g for c, g in groups.items() if g["first"]}
        undefined = {c: g["why"] for c, g in both.items() if len(np.unique(g["labels"])) < 2}
        for kind, row, (names,) in _parts(list(both), {}, set()):
            some = [both[c] for c in names if c not in undefined]
            three = [(g["labels"], *(np.array(list(g[n].values())) for n in ("first", "second"))) for g in some]
            interval = bootstrap(three) if some else [np.nan] * 3
            left_out = {c: undefined[c] for c in names if c in undefined}
            about = {"metric": "image_auroc", "setting": setting_name({"": words} | where), "kind": kind, "row": row}
            about |= {"left_out": ", ".join(left_out), "why": "; ".join(filter(None, left_out.values())), **where}
            about |= {"seeds": min((len(g["first"]) for g in some), default=0), "n": len(some), "spread": _spread(some)}
            rows.append(about | dict(zip(("mean", "low", "high"), (100 * v for v in interval), strict=True)))
    table = pd.DataFrame(rows, columns=[*COLUMNS, "low", "high", *by])
    return table.assign(of=table["seeds"].max())


def bootstrap(groups: Sequence[tuple], seed: int = 0) -> np.ndarray:
    """Image AUROC of the first method minus that of the second, a mean over categories, and its 95 % percentile interval: fractions.

    Test images are drawn with replacement, normal and defective ones apart and the same ones for both methods. The
    interval is about the choice of test images; seeds are averaged, not drawn.

    groups: of every category labels (n,), of both classes, scores of the first (seeds, n) and of the second (seeds, n); their numbers
        of seeds may differ.
    """
    rng, draws, differences = np.random.default_rng(seed), 2000, 0
    more = [_wins(labels > 0, first) - _wins(labels > 0, second) for labels, first, second in groups]
    for wins in more:
        defective, normal = (rng.multinomial(n, np.full(n, 1 / n), draws) / n for n in wins.shape)
        differences += np.einsum("di,ij,dj->d", defective, wins, normal, optimize=True)
    return np.array([np.mean([w.mean() for w in more]), *np.quantile(differences / len(more), [0.025, 0.975])])


def _wins(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """labels (n,) bool, scores (seeds, n) -> (defective, normal): share of seeds in which the defective one is higher; ties count half."""
    scores = np.asarray(scores, np.float64)
    return ((np.sign(scores[:, labels, None] - scores[:, None, ~labels]) + 1) / 2).mean(0)


def _spread(groups: Sequence[Mapping]) -> float:
    """Standard deviation, in percent points, of the seeds' own differences, each a mean over categories; NaN for one seed."""
    seeds = set.intersection(*(set(g["first"]) & set(g["second"]) for g in groups)) if groups else ()
    each = [[image_auroc(g["labels"], g[n][s]) for n in ("first", "second") for g in groups] for s in seeds]
    own = [100 * (np.mean(v[: len(groups)]) - np.mean(v[len(groups) :])) for v in each]
    return float(np.std(own, ddof=1)) if len(own) > 1 else np.nan


def bank_memory(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Figure S2's points: rows of Table 2 with method, dim, bytes of the bank as measured and by Eq. S1 (means over categories), megabytes.

    rows: as :func:`compare` gives them for the same frame by dim.
    """
    sizes = []
    for (method, dim), part in frame.groupby(["method", "dim"], sort=False) if len(frame) else ():
        eq_s1 = (part["dim"] * (part["coreset_ratio"] * part["patches"]).astype(int) * 4).mean()
        sizes.append((setting_name({"method": method, "dim": dim}), method, dim, part["bank_bytes"].mean(), eq_s1))
    found = rows.merge(pd.DataFrame(sizes, columns=["setting", "method", "dim", "measured", "eq_s1"]), on="setting")
    return found.assign(megabytes=found["measured"] / 1e6)


def checked(found: pd.DataFrame) -> pd.DataFrame:
    """Printed numbers computed again (columns table, item, printed, recomputed, note) as rows of :func:`compare`.

    mean is the recomputed number, why the note.
    """
    of = found["table"].map(lambda name: "text: " if name == "text" else f"Table {name}: ")
    rows = found.assign(metric="", setting=of + found["item"], kind="all", row="all", left_out="", why=found["note"])
    rows = rows.assign(mean=found["recomputed"], published=found["printed"])
    return rows.assign(difference=rows["mean"] - rows["published"]).reindex(columns=COLUMNS)


# ---- what is shown and written ----


def show(rows: pd.DataFrame, caption: str) -> Styler:
    """The rows as an HTML table; the caption says where the numbers come from. See :func:`readable`."""
    return styled(readable(rows, "\x02{}\x03"), caption)


def styled(text: pd.DataFrame, caption: str) -> Styler:
    """A frame of text as an HTML table, all rows of it, every name escaped."""
    text = text if len(text) else pd.DataFrame({"": ["nothing is computed yet"]})
    props = {
        "caption": "caption-side: top; text-align: left; font-weight: bold; padding: 0.4em 0",
        "td, th": "padding: 0.15em 0.3em; text-align: right; font-size: 85%",
        "th.col_heading.level0[colspan]": "text-align: center; border-bottom: 1px solid",
        "th.row_heading": "text-align: left; white-space: nowrap; position: sticky; left: 0; background: inherit",
    }
    table = text.style.format(_escaped).format_index(escape="html", axis=0).format_index(escape="html", axis=1)
    styles = [{"selector": selector, "props": of} for selector, of in props.items()]
    return table.set_caption(html.escape(caption)).set_uuid("t").set_table_styles(styles)


def _escaped(text: str) -> str:
    return html.escape(text).replace("\x02", "<b>").replace("\x03", "</b>")  # a name's own tags stay text


def readable(rows: pd.DataFrame, best: str = "{}") -> pd.DataFrame:
    """Text: a row per category and mean and a column per setting; where there are only means of all, a row per setting.

    Ours is mean ± spread over seeds. Published, difference and 95 % interval have columns where there is one. Wider than a page, the
    table is turned. best: how the best of several settings is written; of differences with an interval none is.
    """
    table: dict = {}
    sign = rows["metric"].map(lambda metric: -1 if metric in LESS else 1)
    shown = [
        round(v, _DIGITS.get(metric, 2)) for v, metric in zip(rows["mean"].astype(float), rows["metric"], strict=True)
    ]
    value = sign * pd.Series(shown, rows.index, float)
    of = value.groupby([rows["metric"], rows["kind"], rows["row"]])
    is_best = (value == of.transform("max")) & (of.transform("nunique") > 1) & ("low" not in rows)
    settings_alone, several = (rows["kind"] == "all").all(), [rows[c].nunique() > 1 for c in ("setting", "metric")]
    for r, wins in zip(rows.to_dict("records"), is_best, strict=True):
        title, digits = METRICS.get(r["metric"], r["metric"]), _DIGITS.get(r["metric"], 2)
        without = f" (without {r['left_out']})" if r["left_out"] and r["kind"] != "category" else ""
        line, column = r["setting"], title + without
        if not settings_alone:
            line = _line(r) + without
            column = ", ".join([r["setting"]] * several[0] + [title] * several[1]) or r["setting"]
        found = {"ours": (best if wins else "{}").format(_ours(r, digits))}
        for name, sign in (("published", ""), ("difference", "+")):
            found[name] = "" if np.isnan(r[name]) else f"{r[name]:{sign}.{digits}f}"
        if not np.isnan(r.get("low", np.nan)):
            found["95 % interval"] = f"[{r['low']:+.{digits}f}, {r['high']:+.{digits}f}]"
        table.setdefault(line, {}).update({(column, name): text for name, text in found.items()})
    text = pd.DataFrame.from_dict(table, orient="index").fillna("")
    text = text.loc[:, [c for c in text if c[1] == "ours" or text[c].any()]]
    return text.T if len(text.columns) > 12 > len(text) else text


def _line(r: Mapping) -> str:
    group = f"mean of {r['n']:.0f} {r['row']}{'s' if r['n'] > 1 else ''}"
    names = {"category": r["row"], "group": group, "groups": "mean of the two groups"}
    return names.get(r["kind"], f"mean of all {r['n']:.0f}")


def _ours(r: Mapping, digits: int = 2) -> str:
    if np.isnan(r["mean"]):
        return f"undefined: {r['why'] or ''}".removesuffix(": ") if r["left_out"] and r["n"] == 0 else "–"
    spread = "" if np.isnan(r["spread"]) else f" ± {r['spread']:.{digits}f}"
    return f"{r['mean']:.{digits}f}{spread}" + (f" ({r['seeds']} of {r['of']} seeds)" if r["seeds"] < r["of"] else "")


def in_words(rows: pd.DataFrame) -> str:
    """What the rows say of the means over all categories: a sentence for each metric, or for each setting.

    Settings alone: the best here and in the paper, and how far the settings differ beside the spread over seeds. With
    categories: each setting beside the paper, and of two settings in how many categories the second is above the first.
    Of :func:`paired`: whether the interval leaves zero out.
    """
    means = rows[rows["kind"] == "all"].dropna(subset="mean")
    if means.empty:
        return "Undefined or missing." if len(rows) else "Nothing is computed yet."
    several = rows["kind"].nunique() == 1 and rows["setting"].nunique() > 1
    if "low" in rows:
        found = [_interval_in_words(r) for r in means.to_dict("records")]
    elif several:
        found = [_best_in_words(METRICS.get(m, m), part) for m, part in means.groupby("metric", sort=False)]
    else:
        found = [_beside_in_words(r) for r in means.to_dict("records")]
        found += [_above_in_words(METRICS.get(m, m), part) for m, part in rows.groupby("metric", sort=False)]
    return "\n".join(filter(None, found))


def _interval_in_words(r: Mapping) -> str:
    beyond = "more than the draw of the test images explains" if r["low"] > 0 or r["high"] < 0 else "zero is within"
    return f"{r['setting']}: {METRICS[r['metric']]} {r['mean']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}], {beyond}."


def _best_in_words(title: str, part: pd.DataFrame) -> str:
    sign = -1 if part["metric"].iloc[0] in LESS else 1
    best, published = part.loc[(sign * part["mean"]).idxmax()], part["published"].dropna()
    words = f"{title}: best is {best['setting']} with {best['mean']:.2f}"
    if len(published):
        printed = part.loc[(sign * published).idxmax()]
        words += f" (in the paper {printed['setting']} with {printed['published']:.2f})"
    within = "" if part["spread"].isna().all() else f", seeds by up to ± {part['spread'].max():.2f} within one"
    return f"{words}; settings differ by {np.ptp(part['mean']):.2f} from best to worst{within}."


def _beside_in_words(r: Mapping) -> str:
    words = f"{r['setting']}: {METRICS.get(r['metric'], r['metric'])} {_ours(r, _DIGITS.get(r['metric'], 2))}"
    if np.isnan(r["difference"]):
        return f"{words}."
    away = f"{abs(r['difference']):.2f} {'above' if r['difference'] > 0 else 'below'}"
    return f"{words}, {'the same within 0.1 as' if abs(r['difference']) <= 0.1 else away} the paper's {r['published']:.2f}."


def _above_in_words(title: str, part: pd.DataFrame) -> str:
    """As shown, to two decimals: what is shown as equal is not above."""
    both = part[part["kind"] == "category"].pivot(index="row", columns="setting", values="mean").dropna().round(2)
    if len(both.columns) != 2 or both.empty:
        return ""
    first, second = dict.fromkeys(part["setting"])
    return f"{title}: {second} is above {first} in {(both[second] > both[first]).sum()} of {len(both)} categories."


def write(tables: Mapping[str, pd.DataFrame], path: Path, label: str = "") -> None:
    """One CSV of all rows of a notebook's tables, for the index page and for other programs.

    tables: name -> rows as of :func:`compare`. label: where the numbers are from; rows that have a column of that name keep it.
    Numbers have four decimals, and small ones, such as a learning rate, four significant digits.
    """
    found = [rows.assign(table=name, label=rows.get("label", label)) for name, rows in tables.items() if len(rows)]
    table = pd.concat(found) if found else pd.DataFrame(columns=["table", *COLUMNS, "label"])
    more = [name for name in table if name not in (*COLUMNS, "table", "label")]
    table[["table", *COLUMNS, *more, "label"]].to_csv(path, index=False, float_format=_four_digits)


def _four_digits(v: float) -> str:
    return f"{v:.4g}" if 1e-9 < abs(v) < 1e-2 else str(round(v, 4) + 0.0)  # no -0.0


def read(path: Path) -> pd.DataFrame:
    """What :func:`write` wrote."""
    words = ["item", "table", "metric", "setting", "kind", "row", "left_out", "why", "label"]
    # a category may be called NA
    how = {"dtype": dict.fromkeys(words, str), "keep_default_na": False, "na_values": [""]}
    try:
        frame = pd.read_csv(path, **how)
    except ValueError as error:
        raise ValueError(f"{path} is no table: {error}") from None
    return frame.fillna(dict.fromkeys(words, ""))


def of_store(store, csv: Path) -> int:
    """Writes every finished entry of a store into one CSV, a row each, and returns how many.

    Columns: what was computed (entry, or the study's name), category, every hyper-parameter (weights by name), every metric, and seconds in
    all, hours, device, commit, when it began.
    """
    require_writable(csv, "write {} in", b"task,category,")
    rows, kinds = [], {"members": "ensemble", "refinement": "refined"}
    for _, info, _ in store.finished():
        identity, measured = info["identity"], info["metrics"]
        kind = next((name for key, name in kinds.items() if key in identity), "entry")
        of = {"task": identity.get("study", kind), "category": info.get("data", {}).get("category", "")}
        config = info["config"] | {"weights": Path(info["config"]["weights"]).name}
        if peer := identity.get("name"):  # of what it does not use nothing is said
            config = {n: v for n, v in config.items() if n in ("seed", *identity["config"])}
            how = identity["training"]
            config |= {"epochs": how["epochs"], "batch_size": how["batch"], "lr": how["lr"]} if how else {}
        perturbation = {split: how for split, how in (identity.get("perturbation") or {}).items() if how}
        of |= config | {"peer": peer, "perturbed": bool(perturbation)}
        others = {"perturbation": perturbation, "refinement": info.get("refinement"), "members": info.get("members")}
        of |= {name: json.dumps(how, sort_keys=True) for name, how in others.items() if how}
        of |= {name: identity[name] for name in ("level", "deviation") if name in identity}
        of |= {n: v for n, v in measured.items() if isinstance(v, int | float)}
        seconds = sum(info["seconds"].values())
        of |= {"hours": seconds / 3600, "device": info["device"], "commit": info["commit"], "started": info["started"]}
        rows.append(of)
    require("store", len(rows) > 0, "one with finished entries", str(store.root))
    names = ["task", "category", "backbone", "representation", "coreset_ratio", "seed"]
    table = pd.DataFrame(rows).convert_dtypes(convert_floating=False)
    known = [name for name in names if name in table]  # anomalib's have no representation
    table = table.sort_values(known, kind="stable")
    table.to_csv(csv, index=False, float_format=_four_digits)
    return len(table)


def as_written(files: Sequence[Path]) -> list[Path]:
    """Those of a run's files that a finished notebook wrote; all, where no batch has left its stamps (:mod:`reproduce.batch`) beside them.

    Raises:
        ValueError: one was changed since; names it.
    """
    folders, hashes, found = {f.parent for f in files}, {}, []
    of_batch = any(next(folder.glob(name), None) for folder in folders for name in (".*.json", ".batch.lock"))
    for stamp in (stamp for folder in folders for stamp in folder.glob(".*.json")):
        with suppress(ValueError, KeyError, TypeError):  # half a stamp is none
            hashes |= json.loads(stamp.read_text())["outputs"]
    for file in files:
        same = hashes.get(file.name) in (None, file_hash(file).hexdigest())
        require(str(file), same, "what its notebook wrote (run it again)", "a file that was changed since")
        if not of_batch or file.name in hashes:
            found.append(file)
        else:
            warnings.warn(f"left out, its notebook did not finish: {file}", stacklevel=3)
    return found


def gather(run: Path, csv: Path) -> Path:
    """Writes the rows of all notebooks of a run's folder into one CSV, with a first column ``item``, and returns the file."""
    there = [f for f in sorted(run.glob("*.csv")) if not f.stem.endswith("_entries") and f.resolve() != csv.resolve()]
    files = {file.stem: read(file) for file in as_written(there)}
    require("folder", len(files) > 0, "one of a finished run, with CSV files", str(run))
    require_writable(csv, "write {} in", b"item,table,")
    pd.concat([rows.assign(item=item) for item, rows in files.items()]).set_index("item").to_csv(csv)
    return csv


def markdown(rows: pd.DataFrame) -> str:
    """The rows as a Markdown table. See :func:`readable`."""
    text = readable(rows, "**{}**")
    heads = ["", *(c[0] if c[1] == "ours" else f"{c[0]}: {c[1]}" for c in text)]
    lines = [heads, ["---"] * len(heads), *text.reset_index().to_numpy()]
    return "".join("| " + " | ".join(_in_markdown(cell) for cell in line) + " |\n" for line in lines)


def _in_markdown(cell: object) -> str:
    return html.escape(" ".join(str(cell).split()), quote=False).replace("|", "\\|")


def views(csv: Path, folder: Path) -> list[Path]:
    """Writes ITEM.md into the folder for every item of a CSV that :func:`gather` made, and returns the files."""
    files, found = [], read(csv)
    require(str(csv), {"item", "table", *COLUMNS} <= set(found), "the columns that `gather` writes", list(found)[:9])
    for item, rows in found.groupby("item", sort=False):
        require(f"{csv}: item", item and Path(item).name == item, "the name of a notebook", item)
        parts = [f"# {_in_markdown(item)}\n"]
        for (table, label), part in rows.groupby(["table", "label"], sort=False):
            heads = f"## {_in_markdown(table)}\n", f"*{_in_markdown(label)}*\n" * bool(label)
            parts.append("\n".join(filter(None, (*heads, markdown(part)))))
        files.append(folder / f"{item}.md")
        require_writable(files[-1], "write {} in", parts[0].encode())
        files[-1].write_text("\n".join(parts))
    return files
