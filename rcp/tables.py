"""What the notebooks show: the published value beside the computed one, and the difference in words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rcp import metrics as rcp_metrics
from rcp import paper

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}
WITH_AUPRO = METRICS | {"aupro": "AU-PRO"}  # what refined maps are judged by
# How a setting is written in a row's name.
_WORDS = {
    "dim": "D {}", "coreset_ratio": "coreset {:.0%}", "k": "k {}", "margin": "m {}", "alpha": "α {}", "layers": "levels {}",
    "patch_size": "patch {}", "projection_layer": "{} projection", "image_size": "{} px", "backbone": "{}", "category": "{}",
    "refinement": "{} refinement", "simulation": "{}",
}  # fmt: skip
OVERALL = "mean of all {}"
TWO_GROUPS = "mean of the two groups"
# The paper's printed average, over all of MVTec AD, whatever was run here.
PAPER_15 = f"paper, {len(paper.CATEGORIES)} categories"


def mean_and_spread(frame: pd.DataFrame, metric: str, by: Sequence[str], scale: float = 100) -> pd.DataFrame:
    """Over seeds, in percent unless scaled otherwise: columns mean, spread (NaN for one seed), seeds."""
    grouped = frame.assign(value=frame[metric].astype(float) * scale).groupby(list(by), sort=False)["value"]
    found = grouped.agg(mean="mean", spread="std", seeds="count")
    return found.assign(seeds=[_counted(n, found["seeds"].max()) for n in found["seeds"]])


def mean_over(frame: pd.DataFrame, metric: str, members_of: dict[str, list[str]], seeds: int) -> pd.DataFrame:
    """Each seed's mean over the members, then over seeds mean, spread and how many they are; percent.

    members_of: row name -> categories. seeds: how many there should be; one that lacks a member is left out, and the row
    says so.
    """
    rows = {name: _over_seeds(_per_seed(frame, metric, members), seeds) for name, members in members_of.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "spread", "seeds"])


def table_5(frame: pd.DataFrame, metric: str, groups: dict[str, tuple[str, ...]] | None = None) -> pd.DataFrame:
    """Table 5, one metric: rows are categories, then object, texture and overall means; percent.

    Args:
        frame: as :meth:`rcp.experiment.Grid.frame` gives it.
        metric: "image_auroc" or "pixel_auroc".
        groups: {"object": names, "texture": names}; the paper's where left out.

    Returns:
        Columns (source, method): the published single models, then for PatchCore and ReConPatch our mean, spread, number of
        seeds and the difference to the published value. A mean of ours stands only over the categories that were run: its row says how
        many, and the published mean beside it is the one over the same categories where the paper prints them all.
    """
    groups = groups or {"object": paper.OBJECTS, "texture": paper.TEXTURES}
    if frame.empty:  # nothing computed yet
        return pd.DataFrame(
            columns=pd.MultiIndex.from_product([["published"], sorted(paper.table("5")["method"].unique())])
        )
    there = list(dict.fromkeys(frame["category"]))
    known = [c for c in (*groups["object"], *groups["texture"]) if c in there]
    rows = [*known, *(c for c in there if c not in known)]
    published = _published(metric, rows, groups, _undefined(frame, metric))
    methods = [m for m in ("PatchCore", "ReConPatch") if m in frame["method"].unique()]
    members_of = {c: [c] for c in rows} | _members(rows, groups, _undefined(frame, metric))
    computed = {}
    for method in methods:
        block = mean_over(frame[frame["method"] == method], metric, members_of, frame["seed"].nunique())
        block = block.reindex(published.index)
        block["difference"] = block["mean"] - _target(published[method], method, metric)
        computed[method] = block
    return pd.concat({"published": published} | {f"rcp {m}": block for m, block in computed.items()}, axis=1)


def averages(
    frame: pd.DataFrame, item: str, by: Sequence[str], metrics: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """A table of settings: each one's mean over all categories, beside the average that the paper prints; percent.

    Args:
        frame: as :meth:`rcp.experiment.Grid.frame` gives it.
        item: the published table, as :func:`rcp.paper.table` takes it.
        by: columns that tell the settings apart (a method that is alone in the published table is not in the rows' names).

    Returns:
        One row per setting; columns (metric, mean | spread | seeds | ``PAPER_15`` | difference). spread is the standard
        deviation over seeds of the mean over categories. A category in which the metric is undefined is left out, and the
        column says so.
    """
    published = paper.table(item)
    alone = max(published["method"].nunique(), frame["method"].nunique()) == 1
    by, named = ["method", *by], [*([] if alone else ["method"]), *by]
    if frame.empty:
        columns = ["mean", "spread", "seeds", PAPER_15, "difference"]
        return pd.DataFrame(columns=pd.MultiIndex.from_product([[WITH_AUPRO[m] for m in metrics], columns]))
    rows = {}
    for key, part in frame.groupby(by, sort=False):
        where = dict(zip(by, key, strict=True))
        row = {}
        for metric in metrics:
            printed = published[(published["metric"] == metric) & (published["category"] == "average")]
            for column, value in where.items():
                value = paper.abbreviated(value) if column == "backbone" else value
                printed = printed[printed[column] == value] if column in printed else printed
            undefined = _undefined(frame, metric)
            members = [c for c in dict.fromkeys(frame["category"]) if c not in undefined]
            without = _without(sorted(undefined))
            beside = float(printed["value"].iloc[0]) if len(printed) == 1 else np.nan
            values = _over_seeds(_per_seed(part, metric, members), frame["seed"].nunique())
            values |= {PAPER_15: beside, "difference": values["mean"] - beside}
            row |= {(WITH_AUPRO[metric] + without, name): value for name, value in values.items()}
        rows[setting_name({name: where[name] for name in named})] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def setting_name(where: dict) -> str:
    """``{"method": "ReConPatch", "dim": 64}`` -> "ReConPatch, D 64"."""
    return ", ".join(_WORDS.get(column, "{}").format(value) for column, value in where.items())


def ablation_in_words(table: pd.DataFrame) -> str:
    """What a table of settings says, per metric: which is best here and in the paper, and how far the settings differ at all."""
    sentences = [] if len(table) else ["Nothing is computed yet."]
    for metric in dict.fromkeys(c[0] for c in table.columns):
        part = table[metric].dropna(subset=["mean"]) if len(table) else table
        if part.empty:
            continue
        best, spread = part["mean"].idxmax(), part["spread"].max()
        words = f"{metric}: best is {best} with {part['mean'].max():.2f}"
        if part[PAPER_15].notna().any():
            words += f" (the {PAPER_15}: {part[PAPER_15].idxmax()} with {part[PAPER_15].max():.2f})"
        if len(part) > 1:
            words += f"; settings differ by {np.ptp(part['mean']):.2f} from best to worst"
            words += "" if np.isnan(spread) else f", seeds by up to ± {spread:.2f} within one"
        sentences.append(words + ".")
    return "\n".join(sentences)


def paired(grid, by: Sequence[str] = ()) -> pd.DataFrame:
    """ReConPatch - PatchCore, image AUROC in percent points, with a 95 % bootstrap interval over test pictures.

    Args:
        grid: :class:`rcp.experiment.Grid` with cells of both methods.
        by: settings that both must share, such as ["dim"].

    Returns:
        A row per setting and category, then one per setting for the mean of all; columns difference, low, high. A category
        of one class only is left out of the mean, whose name says so.
    """
    found: dict = {}
    for cell, result in grid.pairs():
        columns = cell.columns()
        setting = setting_name({name: columns[name] for name in by})
        group = found.setdefault(setting, {}).setdefault(cell.category, {"labels": np.asarray(result.labels)})
        group.setdefault(cell.method, []).append(result.scores)
    rows = {}
    for setting, groups in found.items():
        both = {c: g for c, g in groups.items() if {"PatchCore", "ReConPatch"} <= set(g)}
        mine = {c: (g["labels"], np.array(g["ReConPatch"]), np.array(g["PatchCore"])) for c, g in both.items()}
        undefined = {c for c, g in both.items() if len(np.unique(g["labels"])) < 2}
        for name, members in ({c: [c] for c in mine} | _members(list(mine), {}, undefined)).items():
            try:
                interval = rcp_metrics.paired_bootstrap([mine[c] for c in members])
            except rcp_metrics.UndefinedMetric:
                interval = (np.nan, np.nan, np.nan)
            row = dict(zip(("difference", "low", "high"), (100 * v for v in interval), strict=True))
            rows[", ".join(filter(None, (setting, name)))] = row
    return pd.DataFrame.from_dict(rows, orient="index", columns=["difference", "low", "high"])


def paired_in_words(table: pd.DataFrame) -> str:
    """Of each setting's mean: does the interval leave zero out?"""
    sentences = []
    of_all = table.loc[[name for name in table.index if OVERALL.format("") in name]]
    for name, row in of_all.dropna().iterrows():
        side = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "not told apart from"
        interval = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        sentences.append(f"{name}: ReConPatch is {side} PatchCore in image AUROC: {interval}.")
    return "\n".join(sentences) or "Nothing to compare yet."


def table_4(frame: pd.DataFrame, method: str, groups: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    """Tables 4 and S5 for one method: image AUROC without and with perturbations, and the drop; percent.

    Returns:
        Rows are categories, then object, texture, the mean of all (as the paper prints its averages without) and the mean
        of the two groups (as it prints those with), then what it prints. Columns (rcp | published, without | with | drop):
        ours with the spread over seeds, each seed having its own drop; the published ones are of the row's own categories,
        from the printed rows of Table S5. A category in which the AUROC is undefined is left out, and the row says so.
    """
    values = ["without", "with", "drop"]
    mine = frame[frame["method"] == method]
    if mine.empty:
        return pd.DataFrame(columns=pd.MultiIndex.from_product([["rcp", "published"], values]))
    there = list(dict.fromkeys(mine["category"]))
    rows = [*(c for names in groups.values() for c in names if c in there)]
    rows += [c for c in there if c not in rows]
    undefined = _undefined(mine, "image_auroc")
    members = {c: [c] for c in rows} | _members(rows, groups, undefined)
    of_groups = list(members)[len(rows) : -1]
    printed = paper.table("S5")
    printed = printed[printed["method"] == method].pivot_table(index="category", columns="augmentation", values="value")
    ours, theirs = {}, {}
    for name, of in members.items():
        ours[name] = pd.DataFrame(
            {a: _per_seed(mine[mine["augmentation"] == a], "image_auroc", of) for a in ("without", "with")}
        )
        theirs[name] = printed.reindex(of)[["without", "with"]].mean(skipna=False)
    if len(of_groups) == 2:
        name = TWO_GROUPS + _without(c for c in rows if c in undefined)
        ours[name], theirs[name] = (sum(of[g] for g in of_groups) / 2 for of in (ours, theirs))
    found = {}
    for name, seeds in ours.items():
        seeds["drop"], theirs[name]["drop"] = (of["without"] - of["with"] for of in (seeds, theirs[name]))
        each = {v: _over_seeds(seeds[v], frame["seed"].nunique()) for v in values}
        found[name] = {("rcp", v): each[v]["mean"] for v in values} | {
            ("rcp", f"± {v}"): each[v]["spread"] for v in values
        }
        found[name] |= {("rcp", "seeds"): each["drop"]["seeds"]} | {("published", v): theirs[name][v] for v in values}
    table = pd.DataFrame.from_dict(found, orient="index")
    table.loc[PAPER_15, "published"] = printed.loc["average", ["without", "with", "difference"]].to_numpy()
    order = [("rcp", c) for v in values for c in (v, f"± {v}")]
    return table[[*order, ("rcp", "seeds"), *(("published", v) for v in values)]]


def bank_memory(frame: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Figure S2's points: a row per method, size and metric, with the bank's bytes as measured and by Eq. S1 (means over categories).

    table: Table 2, as :func:`averages` gives it for the same frame.
    """
    shown = ["mean", "spread", PAPER_15]
    rows = []
    for (method, dim), part in frame.groupby(["method", "dim"], sort=False) if len(frame) else ():
        measured = part["bank_bytes"].mean()
        eq_s1 = (part["dim"] * (part["coreset_ratio"] * part["patches"]).astype(int) * 4).mean()
        for metric in dict.fromkeys(c[0] for c in table.columns):
            values = table.loc[setting_name({"method": method, "dim": dim}), metric]
            sizes = {"method": method, "dim": dim, "measured": measured, "eq_s1": eq_s1, "megabytes": measured / 1e6}
            rows.append(sizes | {"metric": metric} | values[shown].to_dict())
    return pd.DataFrame(rows, columns=["method", "dim", "measured", "eq_s1", "megabytes", "metric", *shown])


def one_at_a_time(frame: pd.DataFrame, varied: str, **defaults) -> pd.DataFrame:
    """The rows in which all but one of the named hyper-parameters are at their defaults, by ascending value of that one."""
    at_default = [frame[name] == value for name, value in defaults.items() if name != varied and len(frame)]
    return frame[np.all(at_default, axis=0)].sort_values(varied, kind="stable") if len(frame) else frame


def table_7(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Table 7 (BTAD), one metric, percent: rows are categories and their mean; columns as those of :func:`table_5`.

    Ours has a difference only to a published model whose backbone the paper names; PatchCore's there is unknown.
    """
    printed = paper.table("7")
    named = set(printed.loc[printed["backbone"].notna(), "method"])
    printed = printed[printed["metric"] == metric].pivot_table(
        index="category", columns="method", values="value", dropna=False, sort=False
    )
    if frame.empty:
        return pd.DataFrame(columns=pd.MultiIndex.from_product([["published"], printed.columns]))
    rows = list(dict.fromkeys(frame["category"]))
    members_of = {c: [c] for c in rows} | _members(rows, {}, _undefined(frame, metric))
    published = printed.reindex(rows)
    for name, members in list(members_of.items())[len(rows) :]:
        whole = members == [c for c in printed.index if c != "average"]
        published.loc[name] = printed.loc["average"] if whole else published.reindex(members).mean(skipna=False)
    computed = {}
    for method in dict.fromkeys(frame["method"]):
        block = mean_over(frame[frame["method"] == method], metric, members_of, frame["seed"].nunique())
        target = published[method] if method in named else np.nan
        computed[f"rcp {method}"] = block.assign(difference=block["mean"] - target)
    return pd.concat({"published": published} | computed, axis=1)


def recomputed_averages() -> pd.DataFrame:
    """Every printed average that can be computed from printed rows of its own table: printed, recomputed, difference, off.

    off: they differ by more than rounding explains. One row each, named by its table and setting.
    """
    rows = [
        {"average": f"Table {r['table']}: {r['setting']}, {r['category']}, {r['metric']}", "printed": r["printed"],
         "recomputed": r["recomputed"], "difference": r["printed"] - r["recomputed"], "off": r["off"]}
        for r in paper.averages()
    ]  # fmt: skip
    return pd.DataFrame(rows).set_index("average")


def _target(published: pd.Series, method: str, metric: str) -> pd.Series:
    """What ours may be held against. Not ReConPatch's printed pixel column: it is of another model (levels 1+2+3, patch 5), and looks
    permuted (``paper.inconsistencies``); for the model computed here the paper gives the 15-class mean only, in Table 3."""
    if (method, metric) != ("ReConPatch", "pixel_auroc"):
        return published
    target = pd.Series(np.nan, published.index)
    if (name := OVERALL.format(len(paper.CATEGORIES))) in target.index:
        target[name] = paper.published("3", metric=metric, layers="2+3", patch_size=3)
    return target


def reasons(grid, metric: str = "") -> dict[str, str]:
    """category -> why this metric is undefined there; where none is named, which of image and pixel AUROC is, and why."""
    found: dict = {}
    for cell, result in grid.pairs():
        for name in [metric] if metric else METRICS:
            if why := result.metrics["undefined"].get(name):
                found.setdefault(cell.category, {})[why if metric else f"{METRICS[name]}: {why}"] = None
    return {category: "; ".join(whys) for category, whys in found.items()}


def _undefined(frame: pd.DataFrame, metric: str) -> set[str]:
    """Categories in which the metric is undefined for some cell: they are left out of every mean, and the row says so."""
    return set(frame.loc[frame[metric].isna(), "category"])


def _without(categories) -> str:
    names = ", ".join(categories)
    return f" (without {names})" if names else ""


def _members(
    rows: Sequence[str], groups: dict[str, tuple[str, ...]], undefined: set[str] = frozenset()
) -> dict[str, list[str]]:
    """Row name -> the categories that it is the mean of, all of them last; a group of which nothing is left has no row."""
    found = {}
    for group, names in {**groups, "": rows}.items():
        there = [c for c in rows if c in names]
        members = [c for c in there if c not in undefined]
        if not there or (group and not members):
            continue
        name = (
            f"mean of {len(members)} {group}{'s' if len(members) > 1 else ''}"
            if group
            else OVERALL.format(len(members))
        )
        found[name + _without(c for c in there if c in undefined)] = members
    return found


def _published(
    metric: str, rows: list[str], groups: dict[str, tuple[str, ...]], undefined: set[str] = frozenset()
) -> pd.DataFrame:
    """The paper's single models for these categories, with the means over exactly them; then the printed 15-class means."""
    table = paper.table("5")
    single = table[table["metric"] == metric]
    large = single["image_size"] > 256
    single = single.assign(method=single["method"].where(~large, single["method"] + " 480 px"))
    per_class = single.pivot_table(index="category", columns="method", values="value", dropna=False, sort=False)
    out = per_class.reindex(rows)
    for name, members in _members(rows, groups, undefined).items():
        out.loc[name] = per_class.reindex(members).mean(skipna=False)
    printed = OVERALL.format(len(paper.CATEGORIES)) if set(rows) - undefined == set(paper.CATEGORIES) else PAPER_15
    out.loc[printed] = per_class.loc["average"]  # for some methods the paper prints only this
    return out


def _per_seed(frame: pd.DataFrame, metric: str, members: list[str]) -> pd.Series:
    """seed -> mean over these categories, percent; NaN where one of them is missing."""
    of_members = frame[frame["category"].isin(members)].assign(value=lambda f: f[metric].astype(float) * 100)
    by_seed = of_members.pivot_table(index="seed", columns="category", values="value", dropna=False)
    return by_seed.reindex(columns=members).mean(axis=1, skipna=False)


def _over_seeds(means: pd.Series, seeds: int) -> dict:
    """Mean and spread over the seeds that are complete, and how many of ``seeds`` these are."""
    complete = means.dropna()
    return {"mean": complete.mean(), "spread": complete.std(), "seeds": _counted(len(complete), seeds)}


def _counted(n: int, of: int) -> str:
    return f"{n}" if n == of else f"{n} of {of}"


def show_metrics(metrics: dict[str, dict], caption: str) -> "pd.io.formats.style.Styler":
    """What :func:`rcp.metrics.evaluate` returned, a column per method, with the reason beside what is undefined."""
    reasons = {name: why for m in metrics.values() for name, why in m["undefined"].items()}
    names = [name for name in next(iter(metrics.values())) if name != "undefined"]
    frame = pd.DataFrame(
        {method: [m[name] for name in names] for method, m in metrics.items()}, index=names, dtype=object
    )
    frame.index = [f"{name} (undefined: {reasons[name]})" if name in reasons else name for name in names]
    return _styled(frame.map(lambda v: "–" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v)), caption)


def show(
    table: pd.DataFrame, caption: str, digits: int = 2, undefined: dict[str, str] | None = None
) -> "pd.io.formats.style.Styler":
    """The table as HTML: ``digits`` decimals, a dash for what is absent, the caption saying where the numbers come from.

    undefined: category -> why its metric is undefined; said in the category's own cells.
    """
    if isinstance(table.columns, pd.MultiIndex):
        table = table[sorted(table.columns, key=lambda c: c[0] == "published")]  # the page may cut the right side off
    table = table.astype(object)
    for category, why in (undefined or {}).items():
        means = [
            c for c in table.columns if c[-1] in ("mean", "d′") or (c[0] == "rcp" and c[-1] in ("without", "with"))
        ]
        means = means if category in table.index else []
        table.loc[[category] if means else [], means] = f"undefined: {why}"
    signed = [
        c for c in table.columns if (c[-1] if isinstance(c, tuple) else c) in ("difference", "low", "high", "drop")
    ]
    styled = _styled(table, caption).format(
        lambda v: v if isinstance(v, str) else "–" if pd.isna(v) else f"{v:.{digits}f}"
    )
    return styled.format(lambda v: "–" if pd.isna(v) else f"{v:+.{digits}f}", subset=signed)


def _styled(frame: pd.DataFrame, caption: str) -> "pd.io.formats.style.Styler":
    styles = [
        {"selector": "caption", "props": "caption-side: top; text-align: left; font-weight: bold; padding: 0.4em 0"},
        {"selector": "td, th", "props": "padding: 0.15em 0.3em; text-align: right; font-size: 85%"},
        {"selector": "th.row_heading", "props": "text-align: left; white-space: nowrap"},
    ]
    return frame.style.set_caption(caption).set_table_styles(styles).set_uuid("t")


def in_words(table: pd.DataFrame, what: str) -> str:
    """The difference to the paper in one sentence per method, over all categories that were run."""
    sentences = [] if len(table) else [f"{what}: nothing is computed yet."]
    for source in dict.fromkeys(c[0] for c in table.columns if c[0] != "published"):
        method, row = (
            source.removeprefix("rcp "),
            table.loc[[i for i in table.index if i.startswith(OVERALL.format(""))][-1]],
        )
        mean, spread, difference = (row[(source, name)] for name in ("mean", "spread", "difference"))
        spread_words = "" if np.isnan(spread) else f" ± {spread:.2f}"
        if np.isnan(mean):
            sentences.append(f"{method}: {what} is undefined or missing.")
        elif np.isnan(difference):
            sentences.append(f"{method}: {what} {mean:.2f}{spread_words}; the paper prints nothing to hold it against.")
        else:
            side = "above" if difference > 0 else "below"
            verdict = "the same within 0.1 as" if abs(difference) <= 0.1 else f"{abs(difference):.2f} {side}"
            held = f"{verdict} the paper's {mean - difference:.2f} on the same categories"
            sentences.append(f"{method}: {what} {mean:.2f}{spread_words}, {held}.")
    return "\n".join(sentences)


def write(
    table: pd.DataFrame,
    path: Path,
    index: str = "category",
    label: str = "",
    undefined: dict[str, str] | None = None,
    digits: int = 2,
) -> None:
    """CSV and Markdown beside each other, for the index page and for other programs.

    index: the first column's name. label: where the numbers are from, above the Markdown. undefined: category -> why a
    metric is undefined there, for a last column: in the category's own rows, or in every row where no row is a category's.
    digits: decimals of the Markdown; the CSV has four, and of small numbers, such as a learning rate, four significant ones.
    """
    flat = table.copy()
    flat.columns = [" ".join(str(part) for part in c) if isinstance(c, tuple) else str(c) for c in flat.columns]
    if undefined:
        of = [str(name).rpartition(", ")[2] for name in flat.index]
        every = None if set(of) & set(undefined) else "; ".join(f"{c}: {why}" for c, why in undefined.items())
        flat["undefined"] = [undefined.get(category, every) for category in of]
    flat.to_csv(path.with_suffix(".csv"), index_label=index, float_format=_four_digits)
    cells = flat.round(digits).astype(object).where(flat.notna(), "–")
    lines = [[index, *flat.columns], ["---"] * (len(flat.columns) + 1)]
    lines += [[str(name), *map(str, row)] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.with_suffix(".md").write_text((f"*{label}*\n\n" if label else "") + rows + "\n")


def _four_digits(v: float) -> str:
    return f"{v:.4g}" if 1e-9 < abs(v) < 1e-2 else str(round(v, 4) + 0.0)  # no -0.0
