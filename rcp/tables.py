"""What the notebooks show: the published value beside the computed one, and the difference in words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rcp import metrics as rcp_metrics
from rcp import paper

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}
# How a setting is written in a row's name.
_WORDS = {
    "dim": "D {}", "coreset_ratio": "coreset {:.0%}", "k": "k {}", "margin": "m {}", "alpha": "α {}", "layers": "levels {}",
    "patch_size": "patch {}", "projection_layer": "{} projection", "image_size": "{} px", "backbone": "{}", "category": "{}",
}  # fmt: skip
OVERALL = "mean of all {}"
PRINTED = "printed mean of 15"


def mean_and_spread(frame: pd.DataFrame, metric: str, by: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, in percent: columns mean, spread (NaN for one seed), seeds."""
    grouped = frame.assign(value=frame[metric].astype(float) * 100).groupby(list(by), sort=False)["value"]
    return grouped.agg(mean="mean", spread="std", seeds="count")


def table_5(frame: pd.DataFrame, metric: str, groups: dict[str, tuple[str, ...]] | None = None) -> pd.DataFrame:
    """Table 5, one metric: rows are categories, then object, texture and overall means; percent.

    Args:
        frame: as :meth:`rcp.experiment.Grid.frame` gives it.
        metric: "image_auroc" or "pixel_auroc".
        groups: {"object": names, "texture": names}; the paper's where left out.

    Returns:
        Columns (source, method): the published single models, then for PatchCore and ReConPatch our mean, spread and the
        difference to the published value. A mean of ours stands only over the categories that were run: its row says how
        many, and the published mean beside it is the one over the same categories where the paper prints them all.
    """
    groups = groups or {"object": paper.OBJECTS, "texture": paper.TEXTURES}
    if frame.empty:  # nothing computed yet
        return pd.DataFrame(
            columns=pd.MultiIndex.from_product([["published"], sorted(paper.table("5")["method"].unique())])
        )
    ours = mean_and_spread(frame, metric, ["method", "category"])
    there = list(dict.fromkeys(frame["category"]))
    known = [c for c in (*groups["object"], *groups["texture"]) if c in there]
    rows = [*known, *(c for c in there if c not in known)]
    published = _published(metric, rows, groups, _undefined(frame, metric))
    methods = [m for m in ("PatchCore", "ReConPatch") if m in frame["method"].unique()]
    per_seed = frame.assign(value=frame[metric].astype(float) * 100)
    members_of = _members(rows, groups, _undefined(frame, metric))
    computed = {}
    for method in methods:
        mine = ours.loc[method].reindex(rows)
        means = {
            name: _seed_means(per_seed[per_seed["method"] == method], members) for name, members in members_of.items()
        }
        block = pd.concat([mine[["mean", "spread"]], pd.DataFrame(means, index=["mean", "spread"]).T]).reindex(
            published.index
        )
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
        by: columns that tell the settings apart (a method that is alone is left out of the rows' names).

    Returns:
        One row per setting; columns (metric, mean | spread | published | difference). spread is the standard deviation over
        seeds of the mean over categories. A category in which the metric is undefined is left out, and the column says so.
    """
    published = paper.table(item)
    by, named = ["method", *by], [*(["method"] if frame["method"].nunique() > 1 else []), *by]
    if frame.empty:
        return pd.DataFrame(columns=pd.MultiIndex.from_tuples([(METRICS[m], "mean") for m in metrics]))
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
            without = f" (without {', '.join(sorted(undefined))})" if undefined else ""
            mean, spread = _seed_means(part.assign(value=part[metric].astype(float) * 100), members)
            beside = float(printed["value"].iloc[0]) if len(printed) == 1 else np.nan
            values = {"mean": mean, "spread": spread, "published": beside, "difference": mean - beside}
            row |= {(METRICS[metric] + without, name): value for name, value in values.items()}
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
        if part["published"].notna().any():
            words += f" (the paper: {part['published'].idxmax()} with {part['published'].max():.2f})"
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
        A row per setting and category, then one per setting for the mean of all; columns difference, low, high.
    """
    found: dict = {}
    for cell, result in grid.pairs():
        columns = cell.columns()
        setting = {name: columns[name] for name in by}
        group = found.setdefault((setting_name(setting), cell.category), {"labels": result.labels})
        group.setdefault(cell.method, []).append(result.scores)
    pairs = {key: group for key, group in found.items() if {"PatchCore", "ReConPatch"} <= set(group)}
    rows = {}
    for setting in dict.fromkeys(setting for setting, _ in pairs):
        mine = {
            c: (g["labels"], np.array(g["ReConPatch"]), np.array(g["PatchCore"]))
            for (s, c), g in pairs.items()
            if s == setting
        }
        for name, groups in {
            **{c: [g] for c, g in mine.items()},
            OVERALL.format(len(mine)): list(mine.values()),
        }.items():
            try:
                interval = rcp_metrics.paired_bootstrap(groups)
            except rcp_metrics.UndefinedMetric:
                interval = (np.nan, np.nan, np.nan)
            row = dict(zip(("difference", "low", "high"), (100 * v for v in interval), strict=True))
            rows[", ".join(filter(None, (setting, name)))] = row
    return pd.DataFrame.from_dict(rows, orient="index", columns=["difference", "low", "high"])


def paired_in_words(table: pd.DataFrame) -> str:
    """Of each setting's mean: does the interval leave zero out?"""
    sentences = []
    for name, row in table.loc[[name for name in table.index if OVERALL.format("") in name]].iterrows():
        side = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "not told apart from"
        interval = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        sentences.append(f"{name}: ReConPatch is {side} PatchCore in image AUROC: {interval}.")
    return "\n".join(sentences) or "Nothing to compare yet."


def table_4(frame: pd.DataFrame, method: str, groups: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    """Tables 4 and S5 for one method: image AUROC without and with perturbations, and the drop; percent.

    Returns:
        Rows are categories, then object, texture, the mean of the two groups (as the paper prints its augmented averages)
        and the mean of all (as it prints the others); columns (rcp | published, without | with | drop) and spreads of ours.
    """
    mine = frame[frame["method"] == method]
    there = list(dict.fromkeys(mine["category"]))
    rows = [*(c for names in groups.values() for c in names if c in there)]
    rows += [c for c in there if c not in rows]
    members = _members(rows, groups)
    printed = paper.table("S5")
    printed = printed[printed["method"] == method].pivot_table(index="category", columns="augmentation", values="value")
    columns = {}
    for augmentation in ("without", "with"):
        part = mine[mine["augmentation"] == augmentation].assign(value=lambda f: f["image_auroc"].astype(float) * 100)
        found = pd.DataFrame(
            {n: _seed_means(part, m) for n, m in ({c: [c] for c in rows} | members).items()}, index=["mean", "spread"]
        ).T
        columns["rcp", augmentation], columns["rcp", f"± {augmentation}"] = found["mean"], found["spread"]
        values = printed.reindex(rows)[augmentation]
        columns["published", augmentation] = pd.concat(
            [values, pd.Series({n: values.reindex(m).mean(skipna=False) for n, m in members.items()})]
        )
    table = pd.DataFrame(columns)
    of_groups = [name for name in members if not name.startswith(OVERALL.format(""))]
    if len(of_groups) == 2:
        table.loc["mean of the two groups"] = table.loc[of_groups].mean(skipna=False)
        table.loc["mean of the two groups", [("rcp", "± without"), ("rcp", "± with")]] = np.nan
    for source in ("rcp", "published"):
        table[source, "drop"] = table[source, "without"] - table[source, "with"]
    table.loc["printed average", "published"] = [printed.loc["average", a] for a in ("without", "with", "difference")]
    order = [("rcp", c) for c in ("without", "± without", "with", "± with", "drop")]
    return table[[*order, *(("published", c) for c in ("without", "with", "drop"))]]


def drops(found: dict[str, pd.DataFrame]) -> list[tuple[str, float, float, float]]:
    """(what, ours, spread, published) of each method's mean drop in what :func:`table_4` gives: over all, and over the two groups."""
    rows = []
    for method, table in found.items():
        overall = [i for i in table.index if i.startswith(OVERALL.format(""))][-1]
        for name, row in ((overall, table.loc[overall]), ("mean of the two groups", table.loc["printed average"])):
            if name in table.index:
                printed = row["published", "drop"]
                rows.append((f"{method}, drop, {name}:", table.loc[name, ("rcp", "drop")], np.nan, printed))
    return rows


def bank_memory(frame: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Figure S2's points: a row per method, size and metric, with the bank's bytes as measured and by Eq. S1 (means over categories).

    table: Table 2, as :func:`averages` gives it for the same frame.
    """
    rows = []
    for (method, dim), part in frame.groupby(["method", "dim"], sort=False) if len(frame) else ():
        measured = part["bank_bytes"].mean()
        eq_s1 = (part["dim"] * (part["coreset_ratio"] * part["patches"]).astype(int) * 4).mean()
        for metric in dict.fromkeys(c[0] for c in table.columns):
            values = table.loc[setting_name({"method": method, "dim": dim}), metric]
            sizes = {"method": method, "dim": dim, "measured": measured, "eq_s1": eq_s1, "megabytes": measured / 1e6}
            rows.append(sizes | {"metric": metric} | values[["mean", "spread", "published"]].to_dict())
    return pd.DataFrame(rows, columns=None if rows else ["method", "megabytes", "metric", "measured", "eq_s1"])


def one_at_a_time(frame: pd.DataFrame, varied: str, **defaults) -> pd.DataFrame:
    """The rows in which all but one of the named hyper-parameters are at their defaults, by ascending value of that one."""
    at_default = [frame[name] == value for name, value in defaults.items() if name != varied and len(frame)]
    return frame[np.all(at_default, axis=0)].sort_values(varied, kind="stable") if len(frame) else frame


def table_7(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Table 7 (BTAD), one metric, percent: rows are categories and their mean; columns as those of :func:`table_5`."""
    printed = paper.table("7")
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
        part = frame[frame["method"] == method].assign(value=frame[metric].astype(float) * 100)
        block = pd.DataFrame({n: _seed_means(part, m) for n, m in members_of.items()}, index=["mean", "spread"]).T
        computed[f"rcp {method}"] = block.assign(difference=block["mean"] - published[method])
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


def _undefined(frame: pd.DataFrame, metric: str) -> set[str]:
    """Categories in which the metric is undefined for some cell: they are left out of every mean, and the row says so."""
    return set(frame.loc[frame[metric].isna(), "category"])


def _members(
    rows: Sequence[str], groups: dict[str, tuple[str, ...]], undefined: set[str] = frozenset()
) -> dict[str, list[str]]:
    """Row name -> the categories that it is the mean of; groups that no category was run of are left out."""
    found = {}
    for group, names in {**groups, "": rows}.items():
        there = [c for c in rows if c in names]
        members = [c for c in there if c not in undefined]
        if not there:
            continue
        without = f" (without {', '.join(c for c in there if c in undefined)})" if len(members) < len(there) else ""
        name = (
            f"mean of {len(members)} {group}{'s' if len(members) > 1 else ''}"
            if group
            else OVERALL.format(len(members))
        )
        found[name + without] = members
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
    printed = OVERALL.format(len(paper.CATEGORIES)) if set(rows) - undefined == set(paper.CATEGORIES) else PRINTED
    out.loc[printed] = per_class.loc["average"]  # for some methods the paper prints only this
    return out


def _seed_means(frame: pd.DataFrame, members: list[str]) -> list[float]:
    """Mean over categories for each seed, then mean and spread over seeds; NaN where a category or a seed is missing."""
    by_seed = frame[frame["category"].isin(members)].pivot_table(
        index="seed", columns="category", values="value", dropna=False
    )
    means = by_seed.reindex(columns=members).mean(axis=1, skipna=False)
    return [means.mean(), means.std()]


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
        means = [c for c in table.columns if c[-1] == "mean"] if category in table.index else []
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


def write(table: pd.DataFrame, path: Path, index: str = "category", label: str = "") -> None:
    """CSV and Markdown beside each other, for the index page and for other programs.

    index: the first column's name. label: where the numbers are from, above the Markdown.
    """
    flat = table.copy()
    flat.columns = [" ".join(str(part) for part in c) if isinstance(c, tuple) else str(c) for c in flat.columns]
    flat.round(4).to_csv(path.with_suffix(".csv"), index_label=index)
    cells = flat.round(2).astype(object).where(flat.notna(), "–")
    lines = [[index, *flat.columns], ["---"] * (len(flat.columns) + 1)]
    lines += [[str(name), *map(str, row)] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.with_suffix(".md").write_text((f"*{label}*\n\n" if label else "") + rows + "\n")
