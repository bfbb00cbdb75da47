"""Ours beside the published: metrics, in percent, against the settings of an ablation or the size of the memory bank."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduce.figures.style import DEFECTIVE, GREY, NORMAL, PALETTE, legend, nothing, plain, style, subplots
from reproduce.tables import METRICS, with_all_categories


@style()
def ablation(tables: Mapping[str, pd.DataFrame], line: bool = True) -> Figure:
    """Averages over all categories against the settings: a row of panels per metric, a column per table (Tables 1, 3, S1 to S3).

    Args:
        tables: title -> as :func:`reproduce.tables.compare` gives it. Drawn are the rows of kind "all": mean and spread
            over seeds (NaN for one), published and the categories left out; all in percent.
        line: join the settings; not where they have no order.
    """
    averages = {title: table[table["kind"] == "all"] for title, table in tables.items()}
    found = list(dict.fromkeys(metric for table in averages.values() for metric in table["metric"]))
    if not found:
        return nothing()
    widths = [max(2, table["setting"].nunique()) for table in averages.values()]
    size = max(3.3, 0.42 * sum(widths) + 0.8 * len(averages)), 1.9 * len(found) + 0.7
    figure, axes = subplots(len(found), len(averages), size, sharey="row", sharex="col", width_ratios=widths)
    for row, metric in zip(axes, found, strict=True):
        for axis, table in zip(row, averages.values(), strict=True):
            _settings(axis, table[table["metric"] == metric], line)
        row[0].set_ylabel(f"{METRICS[metric]}, %")
    for axis, title in zip(axes[0], averages, strict=True):
        axis.set_title(plain(title))
    legend(figure)
    return figure


def _settings(axis: Axes, table: pd.DataFrame, line: bool):
    """One panel of :func:`ablation`: one metric of one table."""
    if table.empty:
        return nothing(axis)
    table = table.reset_index(drop=True)
    _ours_and_published(axis, table, NORMAL, DEFECTIVE, line=line, fewer=(table["n"] < 15).any())
    words = [plain(setting).replace(", ", "\n") for setting in table["setting"]]
    axis.set_xticks(table.index, words, rotation=0 if line and len(table) < 4 else 45)
    axis.set_xlim(-0.5, len(table) - 0.5)
    if left_out := "; ".join(dict.fromkeys(filter(None, table["left_out"]))):
        words = f"without {plain(left_out)}"
        axis.text(0.5, 0.02, words, fontsize=6, color=GREY, ha="center", transform=axis.transAxes)


@style()
def bank_memory(table: pd.DataFrame) -> Figure:
    """AUROC against the size of the memory bank, in MB on a log axis, a panel per metric (Fig. S2).

    table: rows of method, megabytes, metric, and mean, spread (over seeds, NaN for one) and published, in percent.
    """
    if table.empty:
        return nothing()
    by_metric = dict(list(table.sort_values("megabytes").groupby("metric", sort=False)))
    figure, axes = subplots(1, len(by_metric), (3.3 * len(by_metric), 2.8))
    for axis, (metric, part) in zip(axes[0], by_metric.items(), strict=True):
        for method, colour in (("PatchCore", NORMAL), ("ReConPatch", DEFECTIVE)):
            rows = part[part["method"] == method].set_index("megabytes")
            _ours_and_published(axis, rows, colour, colour, of=f"{method}, ")
        axis.set_xscale("log", base=2)  # sizes double: each has its tick
        axis.set(xlabel="memory bank, MB", ylabel=f"{METRICS[metric]}, %")
        axis.xaxis.set(major_formatter="{x:g}", minor_formatter="")
    legend(figure, fontsize=7)
    return figure


@style()
def against_time(frame: pd.DataFrame, metric: str = "image_auroc") -> Figure:
    """Accuracy against the time of an image and the time to fit (log axes): a dot for each method that has every category, its mean.

    frame: rows of method, category, the metric (a fraction), inference_ms and fit_seconds.
    """
    if frame.empty:
        return nothing()
    frame = with_all_categories(frame.dropna(subset=metric))
    names = frame["category"].drop_duplicates()
    means = frame.groupby("method", sort=False)[[metric, "inference_ms", "fit_seconds"]].mean()
    figure, axes = subplots(1, 2, (7.2, 3.0), sharey=True)
    for axis, column in zip(axes[0], ("inference_ms", "fit_seconds"), strict=True):
        for i, (name, row) in enumerate(means.iterrows()):
            shape = "s" if name in ("PatchCore", "ReConPatch") else "o"
            axis.plot(row[column], 100 * row[metric], shape, ms=6, color=PALETTE[i % len(PALETTE)], label=plain(name))
        axis.set(xscale="log", xlabel=METRICS[column])
        axis.margins(x=0.25)
    axes[0, 0].set_ylabel(f"{METRICS[metric]}, %\n({plain(', '.join(names))})")
    legend(figure, 4, fontsize=7)
    return figure


def _ours_and_published(axis: Axes, table: pd.DataFrame, ours: str, published: str, *, of="", line=True, fewer=False):
    """Ours with the spread over seeds as error bars; the published values, where there are any, dotted. x: the index.

    fewer: ours is of fewer categories than the published, which are means over 15.
    """
    spread, (solid, dotted) = table["spread"].fillna(0), ("o-", "s:") if line else ("o", "s")
    axis.errorbar(table.index, table["mean"], spread, fmt=solid, ms=4, capsize=2, color=ours, label=f"{of}ours")
    if table["published"].notna().any():
        label = f"{of}published, 15 categories" if fewer else f"{of}published"
        axis.plot(table["published"], dotted, ms=4, mfc="white", color=published, label=label)
