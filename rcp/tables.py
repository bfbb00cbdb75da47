"""What the notebooks show: the published value beside the computed one, and the difference in words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rcp import paper

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
    published = _published(metric, rows, groups)
    methods = [m for m in ("PatchCore", "ReConPatch") if m in frame["method"].unique()]
    per_seed = frame.assign(value=frame[metric].astype(float) * 100)
    computed = {}
    for method in methods:
        mine = ours.loc[method].reindex(rows)
        means = {
            name: _seed_means(per_seed[per_seed["method"] == method], members)
            for name, members in _members(rows, groups).items()
        }
        block = pd.concat([mine[["mean", "spread"]], pd.DataFrame(means, index=["mean", "spread"]).T]).reindex(
            published.index
        )
        block["difference"] = block["mean"] - _target(published[method], method, metric)
        computed[method] = block
    return pd.concat({"published": published} | {f"rcp {m}": block for m, block in computed.items()}, axis=1)


def _target(published: pd.Series, method: str, metric: str) -> pd.Series:
    """What ours may be held against. Not ReConPatch's printed pixel column: it is of another model (levels 1+2+3, patch 5), and looks
    permuted (``paper.inconsistencies``); for the model computed here the paper gives the 15-class mean only, in Table 3."""
    if (method, metric) != ("ReConPatch", "pixel_auroc"):
        return published
    target = pd.Series(np.nan, published.index)
    if (name := OVERALL.format(len(paper.CATEGORIES))) in target.index:
        target[name] = paper.published("3", metric=metric, layers="2+3", patch_size=3)
    return target


def _members(rows: list[str], groups: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Row name -> the categories that it is the mean of; groups that no category was run of are left out."""
    found = {}
    for group, names in groups.items():
        if members := [c for c in rows if c in names]:
            found[f"mean of {len(members)} {group}{'s' if len(members) > 1 else ''}"] = members
    return found | {OVERALL.format(len(rows)): rows}


def _published(metric: str, rows: list[str], groups: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    """The paper's single models for these categories, with the means over exactly them; then the printed 15-class means."""
    table = paper.table("5")
    single = table[table["metric"] == metric]
    large = single["image_size"] > 256
    single = single.assign(method=single["method"].where(~large, single["method"] + " 480 px"))
    per_class = single.pivot_table(index="category", columns="method", values="value", dropna=False, sort=False)
    out = per_class.reindex(rows)
    for name, members in _members(rows, groups).items():
        out.loc[name] = per_class.reindex(members).mean(skipna=False)
    printed = OVERALL.format(len(paper.CATEGORIES)) if set(rows) == set(paper.CATEGORIES) else PRINTED
    out.loc[printed] = per_class.loc["average"]  # for some methods the paper prints only this
    return out


def _seed_means(frame: pd.DataFrame, members: list[str]) -> list[float]:
    """Mean over categories for each seed, then mean and spread over seeds; NaN where a category lacks the metric."""
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


def show(table: pd.DataFrame, caption: str) -> "pd.io.formats.style.Styler":
    """The table as HTML: two decimals, a dash for what is absent, the caption saying where the numbers come from."""
    ours_first = sorted(table.columns, key=lambda c: c[0] == "published")  # the page may cut the right side off
    table = table[ours_first]
    signed = [c for c in ours_first if c[-1] == "difference"]
    styled = _styled(table, caption).format(lambda v: "–" if pd.isna(v) else f"{v:.2f}")
    return styled.format(lambda v: "–" if pd.isna(v) else f"{v:+.2f}", subset=signed)


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
            sentences.append(f"{method}: {what} is undefined for at least one category.")
        elif np.isnan(difference):
            sentences.append(f"{method}: {what} {mean:.2f}{spread_words}; the paper prints nothing to hold it against.")
        else:
            side = "above" if difference > 0 else "below"
            verdict = "the same within 0.1 as" if abs(difference) <= 0.1 else f"{abs(difference):.2f} {side}"
            held = f"{verdict} the paper's {mean - difference:.2f} on the same categories"
            sentences.append(f"{method}: {what} {mean:.2f}{spread_words}, {held}.")
    return "\n".join(sentences)


def write(table: pd.DataFrame, path: Path) -> None:
    """CSV and Markdown beside each other, for the index page and for other programs."""
    flat = table.copy()
    flat.columns = [" ".join(str(part) for part in c) if isinstance(c, tuple) else str(c) for c in flat.columns]
    flat.round(4).to_csv(path.with_suffix(".csv"), index_label="category")
    cells = flat.round(2).astype(object).where(flat.notna(), "–")
    lines = [["category", *flat.columns], ["---"] * (len(flat.columns) + 1)]
    lines += [[str(name), *map(str, row)] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    path.with_suffix(".md").write_text("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
