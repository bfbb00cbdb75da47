"""What a choice moves, beside the noise: differences with intervals by category, a tornado, the size of the bank, rank against rank."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reproduce.figures.style import GREY, PALETTE, legend, nothing, plain, style, subplots
from reproduce.tables import METRICS

BAND = "#dcdcdc"  # of the noise
NOISE = "± 2 sd of the coreset's start"


@style()
def contrasts(rows: pd.DataFrame) -> Figure:
    """Differences of image AUROC in percent points, a row per category, a panel per bank (columns) and CNN (rows).

    rows: as :func:`reproduce.effects.contrasts`. Thin line: 95 % interval over test images; thick: ± the seeds' standard deviation;
    grey: noise of the coreset.
    """
    rows = rows.dropna(subset="mean")
    if rows.empty:
        return nothing()
    rows = rows[(rows["kind"] == "category") | (rows["n"] > 1)]  # the mean of one category is that category
    cnns, banks, names = (list(dict.fromkeys(rows[c])) for c in ("backbone", "coreset_ratio", "row"))
    pairs = list(dict.fromkeys(zip(rows["first"], rows["second"], strict=True)))
    size = 1.2 + 2.2 * len(banks), 0.9 + (0.28 * len(pairs) * len(names) / 1.6 + 0.35) * len(cnns)
    figure, axes = subplots(len(cnns), len(banks), size, sharex=True, sharey=True)
    for (cnn, bank), axis in zip(((c, b) for c in cnns for b in sorted(banks)), axes.flat, strict=True):
        part = rows[(rows["backbone"] == cnn) & (rows["coreset_ratio"] == bank)]
        for r in part.to_dict("records"):
            pair = pairs.index((r["first"], r["second"]))
            y = names.index(r["row"]) + 0.8 * ((pair + 0.5) / len(pairs) - 0.5)
            axis.plot([r["low"], r["high"]], [y, y], lw=0.9, color=(colour := PALETTE[pair]))
            axis.errorbar(r["mean"], y, xerr=np.nan_to_num(r["spread"]), elinewidth=3, alpha=0.6, color=colour)
            axis.plot(r["mean"], y, "o", ms=4, color=colour, label=f"{r['first']} - {r['second']}")
            if r["seeds"] < r["of"]:
                axis.plot(r["mean"], y, "o", ms=2, color="w")
            if np.isfinite(r["noise"]):
                at = names.index(r["row"]) + np.array([-0.45, 0.45])
                axis.fill_betweenx(at, -2 * r["noise"], 2 * r["noise"], color=BAND, lw=0, zorder=0, label=NOISE)
        axis.axvline(0, lw=0.7, color=GREY, zorder=0.5)
        axis.set_title(f"{cnn}, bank of {bank:.0%}")
    for how, words in (({"lw": 0.9}, "95 %, test images"), ({"lw": 3, "alpha": 0.6}, "± sd of the seeds")):
        axes[0, 0].plot([], [], color=GREY, label=words, **how)
    if (rows["seeds"] < rows["of"]).any():
        axes[0, 0].plot([], [], "o", ms=4, color=GREY, mfc="w", label="fewer seeds")
    axes[0, 0].set_yticks(range(len(names)), ["mean" if name == "all" else plain(name) for name in names])
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    for axis in axes[-1]:
        axis.set_xlabel("image AUROC, percent points", fontsize=8)
    legend(figure, 3, fontsize=7)
    return figure


@style()
def tornado(rows: pd.DataFrame, noise: Mapping[str, float]) -> Figure:
    """From the least to the greatest move of each choice, the greatest span on top; a panel per metric.

    rows: as :func:`reproduce.effects.moves`. noise: metric -> standard deviation over the coreset's starts, in percent points.
    """
    rows = rows.dropna(subset="mean")
    if rows.empty:
        return nothing()
    metrics = list(dict.fromkeys(rows["metric"]))
    order = list(rows.groupby("choice")["mean"].agg(lambda v: max(v.max(), 0) - min(v.min(), 0)).sort_values().index)
    figure, axes = subplots(1, len(metrics), (1.3 + 3.0 * len(metrics), 0.9 + 0.3 * len(order)), sharey=True)
    for axis, metric in zip(axes[0], metrics, strict=True):
        if np.isfinite(width := 2 * noise.get(metric, np.nan)):
            axis.axvspan(-width, width, color=BAND, lw=0, label=NOISE)
        for choice, part in rows[rows["metric"] == metric].groupby("choice"):
            low, high, y = min(part["mean"].min(), 0), max(part["mean"].max(), 0), order.index(choice)
            axis.barh(y, high - low, 0.6, left=low, color=PALETTE[0], alpha=0.35)
            axis.plot(part["mean"], [y] * len(part), "o", ms=3, color=PALETTE[0])
            for end, side, of in ((low, "right", part["mean"].idxmin()), (high, "left", part["mean"].idxmax())):
                if abs(end - part.loc[of, "mean"]) < 1e-12:
                    words = f" {plain(part.loc[of, 'value'])} "
                    axis.text(end, y, words, ha=side, va="center", fontsize=6, color=GREY)
        axis.axvline(0, lw=0.7, color=GREY)
        axis.use_sticky_edges = False  # else the longest bar ends at the frame, and its words behind it
        axis.margins(x=0.2)
        axis.set(title=METRICS[metric], xlabel="moved from the default, percent points")
    axes[0, 0].set_yticks(range(len(order)), order)
    legend(figure, 1, fontsize=7)
    return figure


@style()
def against(table: pd.DataFrame, x: str, panels: Mapping[str, str], noise: Mapping[str, float]) -> Figure:
    """Against the ratio of the bank (log axis), a panel per column of ``panels`` (column -> its label): lines of those in ``noise``.

    noise: column -> standard deviation over the coreset's starts; drawn below the best of the column.
    """
    if table.empty:
        return nothing()
    panels = {column: label for column, label in panels.items() if table[column].notna().any()}  # times may be missing
    figure, axes = subplots(1, len(panels), (2.7 * len(panels), 2.8))
    for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
        known = table.dropna(subset=column).sort_values(x)
        if column in noise:
            for colour, (line, part) in zip(PALETTE, known.groupby("line"), strict=False):
                axis.plot(part[x], part[column], "o-", ms=3.5, color=colour, label=plain(line))
            if np.isfinite(noise[column]):
                best = known[column].max()
                axis.axhspan(best - 2 * noise[column], best, color=BAND, lw=0, label=NOISE)
        else:  # memory and time: all lines are one
            axis.plot(known[x], known[column], "o-", ms=3.5, color=GREY)
            axis.set_ylim(0)
        axis.set(xscale="log", xlabel="bank, share of all patches", ylabel=label)
        axis.xaxis.set(major_formatter=lambda v, _: f"{100 * v:g} %", minor_formatter="")
    legend(figure, 3, fontsize=7)
    return figure


@style()
def ranks(rows: pd.DataFrame, truth: str, criteria: Mapping[str, str]) -> Figure:
    """The truth against each criterion (name -> label), a dot per setting: a panel per category (columns) and criterion (rows)."""
    if rows.empty:
        return nothing()
    categories = list(dict.fromkeys(rows["category"]))
    size = 0.6 + 2.0 * len(categories), 0.5 + 1.7 * len(criteria)
    figure, axes = subplots(len(criteria), len(categories), size)
    for row, criterion in zip(axes, criteria, strict=True):
        for axis, category in zip(row, categories, strict=True):
            part = rows[rows["category"] == category]
            for colour, (method, some) in zip(PALETTE, part.groupby("method", sort=False), strict=False):
                axis.plot(some[criterion], some[truth], "o", ms=3, color=colour, label=plain(method))
            axis.tick_params(labelsize=6)
            axis.set_xlabel(criteria[criterion], fontsize=6)
        row[0].set_ylabel(f"{METRICS[truth]} by labels", fontsize=7)
    for axis, category in zip(axes[0], categories, strict=True):
        axis.set_title(plain(category))
    legend(figure, 4, fontsize=7)
    return figure
