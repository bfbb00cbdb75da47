"""Figures: one style for all; every function takes arrays or fitted objects and returns a matplotlib Figure."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from matplotlib.patheffects import withStroke
from scipy.spatial import ConvexHull
from sklearn.metrics import roc_curve

from rcp import metrics
from rcp.config import Config
from rcp.detector import ReConPatch
from rcp.model import Representation
from rcp.similarity import contextual, nearest_neighbours, pairwise, squared_distances
from rcp.tables import PAPER_15

PALETTE = sns.color_palette("colorblind").as_hex()
NORMAL, TRUTH, THRESHOLD, DEFECTIVE, GREY = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[3], "#5f6368"
HEAT = "magma"  # lightness rises with the score, so it reads without colour vision and in grey


@contextmanager
def style() -> Iterator[None]:
    """The figures' rcParams, as a context or a decorator: legible at a paper's column width, 80 dpi in a notebook."""
    with plt.rc_context():
        sns.set_theme(context="paper", style="ticks", palette="colorblind", font="DejaVu Sans", font_scale=0.9)
        plt.rcParams.update(
            {
                "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.titlesize": 8.5,
                "figure.dpi": 80, "figure.constrained_layout.use": True, "legend.frameon": False,
                "pdf.fonttype": 42, "savefig.dpi": 180,
            }
        )  # fmt: skip
        yield


def save(figure: Figure, path: str | Path, label: str = "") -> tuple[Path, Path]:
    """Writes PATH.png (180 dpi) and PATH.pdf beside each other, without dates: the same figure is the same file.

    label: in small print below the figure, where its numbers are from.
    """
    if label:
        width = int(figure.get_figwidth() * 21)
        figure.supxlabel(fill(label, width), x=0.01, ha="left", fontsize=6, color=GREY)
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in {".png", ".pdf"} else path
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    with style():
        figure.savefig(written[0])
        figure.savefig(written[1], metadata={"CreationDate": None})
    return written


def _subplots(*shape: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """-> (Figure, (rows, columns) array of Axes). Closed for pyplot, so that a notebook shows it once."""
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, **options)
    plt.close(figure)
    return figure, axes


NOTHING = "nothing is computed yet"


def _nothing() -> Figure:
    """In the place of a figure for which the store has no results."""
    figure, axes = _subplots(1, 1, size=(3.3, 1.0))
    _say_nothing(axes[0, 0])
    return figure


def _say_nothing(axis: Axes) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, NOTHING, ha="center", va="center", color=GREY, transform=axis.transAxes)


# ---- what the detectors found ----


@style()
def score_histogram(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]], thresholds: Mapping[str, float] | None = None
) -> Figure:
    """Image scores of normal and defective pictures, one panel per method, with d′ and AUROC (Fig. 4).

    Args:
        groups: method -> (scores (n,) float, labels (n,) 0 normal / 1 defective).
        thresholds: method -> score that a line is drawn at.
    """
    if not groups:
        return _nothing()
    figure, axes = _subplots(1, len(groups), size=(3.3 * len(groups), 2.3), sharey=True)
    for axis, (method, (scores, labels)) in zip(axes[0], groups.items(), strict=True):
        scores, labels = np.asarray(scores, float), np.asarray(labels).astype(bool)
        bins = np.histogram_bin_edges(scores, bins=24)
        for name, chosen, colour in (("normal", ~labels, NORMAL), ("defective", labels, DEFECTIVE)):
            if chosen.any():
                label = f"{name} ({chosen.sum()})"
                sns.histplot(
                    x=scores[chosen],
                    bins=bins,
                    stat="percent",
                    color=colour,
                    element="step",
                    alpha=0.45,
                    label=label,
                    ax=axis,
                )
        if thresholds and method in thresholds:
            at = thresholds[method]
            axis.axvline(at, color=THRESHOLD, ls="--", lw=1.4, label=f"threshold {at:.3g}")
        auroc = _defined(metrics.image_auroc, labels, scores)
        axis.set_title(f"{method}: d′ = {_defined(metrics.d_prime, scores[~labels], scores[labels])}, AUROC = {auroc}")
        axis.set(xlabel="image score", ylabel="% of the group")
        axis.legend(frameon=True, framealpha=0.8, edgecolor="none")
    return figure


def _defined(metric, *arguments) -> str:
    try:
        return f"{metric(*arguments):.3f}"
    except metrics.UndefinedMetric:
        return "–"


@style()
def pictures(rows: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Rows of pictures, each (n, S, S, 3) uint8, with a title before each row."""
    figure, axes = _subplots(len(rows), len(rows[0]), size=(1.5 * len(rows[0]) + 0.3, 1.5 * len(rows)))
    for line, row, title in zip(axes, rows, titles, strict=True):
        line[0].set_ylabel(title)
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
    return figure


@style()
def score_maps(
    pictures: np.ndarray | None,
    masks: np.ndarray,
    maps: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Score maps over the pictures they belong to, with ground truth, threshold contour and maximum (Fig. 5).

    One row per picture; a method's column has one colour scale, so its rows can be compared.

    Args:
        pictures: (n, S, S, 3) uint8; None draws the maps alone, where pictures must not be shown (their licence).
        masks: (n, S, S) bool, all False for a normal picture or where there is no ground truth.
        maps: method -> (n, S, S) float32.
        thresholds: method -> score that the green contour is drawn at; a method left out has none.
        titles: a word for each row.
    """
    n = len(masks)
    if not n:
        return _nothing()
    shown = _or_blank(pictures, masks)
    figure, axes = _subplots(n, 1 + len(maps), size=(1.7 * (1 + len(maps)), 1.7 * n + 0.5))
    _bare(axes)
    for row, (axis, picture, mask) in enumerate(zip(axes[:, 0], shown, masks, strict=True)):
        axis.imshow(picture)
        _contour(axis, mask, 0.5, TRUTH)
        axis.set_ylabel(titles[row] if titles is not None else "")
    axes[0, 0].set_title("input, ground truth")
    for column, (method, scores) in zip(axes.T[1:], maps.items(), strict=True):
        limits, threshold = (float(np.min(scores)), float(np.max(scores))), thresholds.get(method)
        for axis, picture, score, mask in zip(column, shown, scores, masks, strict=True):
            heat = _score_map(axis, picture, score, mask, limits, threshold)
        column[0].set_title(method)
        bar = figure.colorbar(heat, ax=column.tolist(), location="bottom", aspect=22, pad=0.02)
        bar.outline.set_visible(False)
        if threshold is not None:
            bar.ax.axvline(threshold, color=THRESHOLD, lw=2)
        bar.set_label("score")
    return figure


@style()
def refined_maps(
    pictures: np.ndarray | None,
    masks: np.ndarray,
    maps: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float],
    titles: Sequence[str],
    few: float = 0.1,
) -> Figure:
    """A column per picture: it and its ground truth, each method's map on its own scale, and the pixel ROC of all (Fig. S5).

    few: false positives, as a share, up to which the ROC is drawn; the other arguments are those of :func:`score_maps`.
    """
    if not len(masks) or not maps:
        return _nothing()
    figure, axes = _subplots(2 + len(maps), len(masks), size=(1.6 * len(masks) + 0.4, 1.65 * (2 + len(maps))))
    _bare(axes[:-1])
    shown = _or_blank(pictures, masks)
    for axis, picture, mask, title in zip(axes[0], shown, masks, titles, strict=True):
        _shown_picture(axis, picture, mask, title)
    for row, (method, scores) in zip(axes[1:-1], maps.items(), strict=True):
        for axis, picture, score, mask in zip(row, shown, scores, masks, strict=True):
            _score_map(axis, picture, score, mask, (float(score.min()), float(score.max())), thresholds.get(method))
        row[0].set_ylabel(method)
    for axis, *of_each, mask in zip(axes[-1], *maps.values(), masks, strict=True):
        for colour, score in zip(PALETTE, of_each, strict=False):
            if mask.any() and not mask.all():
                false, true, _ = roc_curve(mask.ravel(), score.ravel())
                axis.plot(false, true, color=colour, lw=1.2)
        axis.set(xlim=(0, few), ylim=(0, 1.02), xticks=[0, few], yticks=[0, 1], xlabel="false positives")
        axis.set_box_aspect(1)
    axes[-1, 0].set_ylabel("true positives")
    lines = [Line2D([], [], color=colour, label=method) for colour, method in zip(PALETTE, maps, strict=False)]
    axes[-1, -1].legend(handles=lines, fontsize=6, loc="lower right")
    return figure


@style()
def score_map_sheet(
    pictures: np.ndarray | None,
    masks: np.ndarray,
    maps: np.ndarray,
    thresholds: Sequence[float | None],
    titles: Sequence[str],
    columns: int = 5,
) -> Figure:
    """Many pictures, each with its map below it on a scale of its own (Fig. S3, S4); marks as in :func:`score_maps`.

    Args:
        pictures: (n, S, S, 3) uint8, or None. masks: (n, S, S) bool. maps: (n, S, S) float32.
        thresholds: of each map, or None. titles: of each picture.
    """
    if not len(masks):
        return _nothing()
    columns = min(columns, len(masks))
    lines = -(-len(masks) // columns)
    figure, axes = _subplots(2 * lines, columns, size=(1.5 * columns, 3.1 * lines + 0.3))
    _bare(axes)
    panels = axes.reshape(lines, 2, columns).transpose(0, 2, 1).reshape(-1, 2)
    for pair in panels[len(masks) :]:
        for axis in pair:
            axis.set_axis_off()
    of_each = zip(panels, _or_blank(pictures, masks), masks, maps, thresholds, titles, strict=False)
    for (above, below), picture, mask, score, threshold, title in of_each:
        _shown_picture(above, picture, mask, title)
        _score_map(below, picture, score, mask, (float(score.min()), float(score.max())), threshold)
    return figure


def _or_blank(pictures: np.ndarray | None, masks: np.ndarray) -> np.ndarray:
    return np.full((*masks.shape, 3), 235, np.uint8) if pictures is None else pictures


def _bare(axes: np.ndarray) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)


def _shown_picture(axis: Axes, picture: np.ndarray, mask: np.ndarray, title: str) -> None:
    axis.imshow(picture)
    _contour(axis, mask, 0.5, TRUTH)
    axis.set_title(fill(title, 18), fontsize=7)


def _score_map(axis: Axes, picture, score, mask, limits: tuple[float, float], threshold: float | None):
    """One map over its picture, with ground truth, threshold contour and star -> its heat."""
    low, high = limits
    axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
    opacity = 0.2 + 0.65 * (score - low) / max(high - low, 1e-12)  # the picture shows through where nothing is found
    heat = axis.imshow(score, cmap=HEAT, vmin=low, vmax=high, alpha=opacity)
    _contour(axis, mask, 0.5, TRUTH)
    if threshold is not None:
        _contour(axis, score, threshold, THRESHOLD)
    y, x = np.unravel_index(score.argmax(), score.shape)
    axis.plot(x, y, "*", ms=9, color=THRESHOLD, mec="white", mew=0.7, clip_on=False)
    return heat


def _contour(axis: Axes, values: np.ndarray, level: float, colour: str) -> None:
    if values.min() < level <= values.max():  # matplotlib warns of a level that is not there
        line = axis.contour(values, levels=[level], colors=[colour], linewidths=1.3)
        line.set_path_effects([withStroke(linewidth=2.3, foreground="white")])


@style()
def training_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss (Eq. 7) and the 5 / 50 / 95 % quantiles of ω^P (Eq. 1) per epoch.

    history: rows with epoch, loss, omega_p_05, omega_p_50, omega_p_95, as :func:`rcp.model.train` returns them.
    """
    column = {
        name: [row[name] for row in history] for name in ("epoch", "loss", "omega_p_05", "omega_p_50", "omega_p_95")
    }
    epoch = column["epoch"]
    figure, axes = _subplots(1, 2, size=(6.2, 2.1))
    loss, omega = axes[0]
    loss.plot(epoch, column["loss"], "o-", ms=3, color=NORMAL)
    loss.set(xlabel="epoch", ylabel=r"$\mathcal{L}_{RC}$ (Eq. 7)")
    omega.fill_between(
        epoch, column["omega_p_05"], column["omega_p_95"], color=NORMAL, alpha=0.25, lw=0, label="5 to 95 %"
    )
    omega.plot(epoch, column["omega_p_50"], "o-", ms=3, color=NORMAL, label="median")
    omega.set(xlabel="epoch", ylabel=r"$\omega^P$ (Eq. 1)", ylim=(-0.03, 1.03))
    omega.legend()
    for axis in (loss, omega):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


# ---- tables as pictures ----


@style()
def bank_memory(table: pd.DataFrame) -> Figure:
    """AUROC against the size of the memory bank, published beside ours (Fig. S2).

    table: as :func:`rcp.tables.bank_memory` gives it; megabytes are on a log axis.
    """
    if table.empty:
        return _nothing()
    names = list(dict.fromkeys(table["metric"]))
    figure, axes = _subplots(1, len(names), size=(3.3 * len(names), 2.8))
    for axis, metric in zip(axes[0], names, strict=True):
        for method, colour in (("PatchCore", NORMAL), ("ReConPatch", DEFECTIVE)):
            part = table[(table["metric"] == metric) & (table["method"] == method)].sort_values("megabytes")
            spread = part["spread"].fillna(0)
            axis.errorbar(
                part["megabytes"], part["mean"], spread, fmt="o-", ms=4, capsize=2, color=colour, label=method
            )
            label = f"{method}, {PAPER_15}"
            axis.plot(part["megabytes"], part[PAPER_15], "s:", ms=3.5, color=colour, mfc="white", label=label)
        axis.set(xscale="log", xlabel="memory bank, MB", ylabel=f"{metric}, %")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7)
    return figure


@style()
def ablation(tables: Mapping[str, pd.DataFrame], line: bool = True) -> Figure:
    """Tables of settings as pictures: a column of panels per table, a row per metric; ours with its spread over seeds, the paper's dotted.

    Args:
        tables: title -> as :func:`rcp.tables.averages` gives it.
        line: join the settings; not where they have no order.
    """
    names = list(dict.fromkeys(_metric(c[0]) for table in tables.values() if len(table) for c in table.columns))
    if not names:
        return _nothing()
    widths = [max(2, len(table)) for table in tables.values()]
    size = (max(3.3, 0.42 * sum(widths) + 0.8 * len(tables)), 1.9 * len(names) + 0.7)
    figure, axes = _subplots(len(names), len(tables), size=size, sharey="row", sharex="col", width_ratios=widths)
    solid, dotted = ("o-", "s:") if line else ("o", "s")
    for row, metric in zip(axes, names, strict=True):
        for axis, table in zip(row, tables.values(), strict=True):
            column = next((c[0] for c in table.columns if len(table) and _metric(c[0]) == metric), None)
            if column is None:
                _say_nothing(axis)
                continue
            part, x = table[column], np.arange(len(table))
            axis.errorbar(
                x, part["mean"], part["spread"].fillna(0), fmt=solid, ms=4, capsize=2, color=NORMAL, label="rcp"
            )
            axis.plot(x, part[PAPER_15], dotted, ms=4, color=DEFECTIVE, mfc="white", label=PAPER_15)
            axis.set(xticks=x, xlim=(-0.5, len(table) - 0.5))
            axis.set_xticklabels(
                [str(n).replace(", ", "\n") for n in table.index], rotation=0 if line and len(table) < 4 else 45
            )
            if without := column.removeprefix(metric).strip(" ()"):  # a category in which it is undefined
                axis.text(0.5, 0.02, without, ha="center", fontsize=6, color=GREY, transform=axis.transAxes)
        row[0].set_ylabel(f"{metric}, %")
    for axis, title in zip(axes[0], tables, strict=True):
        axis.set_title(title)
    drawn = next(axis for axis in axes.flat if axis.lines)
    figure.legend(*drawn.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _metric(column: str) -> str:
    """``pixel AUROC (without carpet)`` -> ``pixel AUROC``, so that tables that leave others out share a row of panels."""
    return column.partition(" (")[0]


# ---- Figures 3 and S1: the space of patch features ----


@style()
def feature_space(
    spaces: Mapping[str, np.ndarray], positions: np.ndarray, titles: Mapping[str, str] | None = None
) -> Figure:
    """Patch features in two dimensions, coloured by where in the picture the patch lies; the last panel is the key (Fig. 3, S1).

    Args:
        spaces: name -> (n, 2). positions: (n, 2) row and column of each patch. titles: name -> what stands over its panel.
    """
    if not spaces:
        return _nothing()
    colours = position_colours(positions)
    figure, axes = _subplots(
        1, len(spaces) + 1, size=(1.9 * len(spaces) + 1.1, 2.1), width_ratios=[*[1.9] * len(spaces), 1]
    )
    for axis, (name, points) in zip(axes[0], spaces.items(), strict=False):
        axis.scatter(*np.asarray(points).T, c=colours, s=1.5, lw=0, rasterized=True)
        axis.set_title((titles or {}).get(name, name))
        axis.set(xticks=[], yticks=[])
        axis.set_box_aspect(1)
    side = int(positions.max()) + 1
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
    key = axes[0, -1]
    key.imshow(position_colours(grid).reshape(side, side, 3))
    key.set(xticks=[], yticks=[])
    key.set_title("place in\nthe picture")
    for axis in axes.flat:
        sns.despine(ax=axis, left=axis is key, bottom=axis is key)
    return figure


def position_colours(positions: np.ndarray) -> np.ndarray:
    """(n, 2) row and column -> (n, 3) RGB: blue to yellow from left to right, dark to light from top to bottom.

    The two opponent hues are told apart with any common kind of colour blindness.
    """
    row, column = (positions / max(1, positions.max())).T[..., None]
    left, right = np.array([0.0, 0.35, 0.9]), np.array([0.95, 0.75, 0.0])
    return (left + column * (right - left)) * (0.45 + 0.55 * row)


# ---- Figure 2: equal pairwise, different contextual similarity ----


def figure_2_points() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Case -> (points (12, 2) float64, group of each point (12,) 0 or 1). Points 0 and 1 are i and j.

    They are equally far apart in both cases.
    (a) i and j lie at the rims of two groups that face each other; (b) both lie within one group.
    """
    pair = [[-0.4, 0.0], [0.4, 0.0]]
    left = [[-0.75, 0.12], [-0.62, -0.3], [-1.05, -0.25], [-0.68, 0.45], [-1.12, 0.28]]
    right = [[0.72, -0.2], [0.66, 0.27], [1.08, 0.1], [0.8, -0.52], [1.15, -0.33]]
    between = [[0.0, 0.2], [0.02, -0.2]]
    around = [
        [-1.0, 0.1],
        [-0.75, 0.8],
        [-0.05, 1.0],
        [0.75, 0.78],
        [1.05, -0.08],
        [0.72, -0.78],
        [0.0, -0.95],
        [-0.8, -0.75],
    ]
    return {
        "a": (np.array(pair + left + right), np.array([0, 1] + [0] * 5 + [1] * 5)),
        "b": (np.array(pair + between + around), np.zeros(12, int)),
    }


@style()
def figure_2(config: Config | None = None) -> Figure:
    """Two configurations of points with the same ω^P_ij and different ω^C_ij, both computed (Fig. 2).

    config: k, half_k and sigma are used; the defaults where left out.

    Shaded: groups. Lines lead from i and from j to their k nearest neighbours; a ring marks what both have in common.
    """
    config = config or Config()
    figure, axes = _subplots(1, 2, size=(6.2, 2.7), sharex=True, sharey=True)
    words = {"a": "(a) two groups", "b": "(b) one group"}
    for axis, (case, (points, group)) in zip(axes[0], figure_2_points().items(), strict=True):
        d2 = squared_distances(torch.from_numpy(points))
        omega_p = pairwise(d2, config.sigma)[0, 1].item()
        omega_c = contextual(d2, config.k, config.k_half)[0, 1].item()
        neighbours = nearest_neighbours(d2, config.k).numpy()
        for member in np.unique(group):
            hull = points[group == member][ConvexHull(points[group == member]).vertices]
            axis.add_patch(Polygon(hull, fc="#eeeeee", ec="#eeeeee", lw=26, joinstyle="round", zorder=0))
        for end, colour in ((0, DEFECTIVE), (1, NORMAL)):
            for j in neighbours[end]:
                axis.plot(*points[[end, j]].T, color=colour, lw=1, alpha=0.7, zorder=1)
        axis.plot(*points[:2].T, color="black", lw=1, ls=":", zorder=1)
        for member, marker in ((0, "o"), (1, "s")):
            axis.scatter(*points[2:][group[2:] == member].T, marker=marker, s=34, color=GREY, zorder=2)
        shared = np.intersect1d(neighbours[0], neighbours[1])
        axis.scatter(*points[shared].T, s=120, facecolors="none", edgecolors="black", lw=1, zorder=2)
        for index, (name, colour) in enumerate((("i", DEFECTIVE), ("j", NORMAL))):
            axis.scatter(*points[index], marker="os"[group[index]], s=80, color=colour, zorder=3)
            axis.annotate(f"${name}$", points[index], (0, -16), textcoords="offset points", ha="center", fontsize=11)
        axis.set_title(rf"{words[case]}: $\omega^P_{{ij}}$ = {omega_p:.3f}, $\omega^C_{{ij}}$ = {omega_c:.3f}")
        axis.set(xlim=(-1.45, 1.45), ylim=(-1.25, 1.25), aspect="equal")
        axis.axis("off")
    return figure


# ---- Figure 1: the structure, read from the objects ----


@style()
def figure_1(detector: ReConPatch, normal: np.ndarray | None = None, defective: np.ndarray | None = None) -> Figure:
    """Overall structure in training and inference (Fig. 1), every size read from the detector's own modules.

    Args:
        detector: fitted or not; a fitted one also tells how many entries its memory bank has.
        normal, defective: (S, S, 3) uint8, shown as the training and the test picture.

    Raises:
        ValueError: a PatchCore, which has no training phase.
    """
    if not detector.config.represent:
        raise ValueError(
            f"detector: expected a ReConPatch (Figure 1 shows how f is trained), got a {type(detector).__name__}"
        )
    c, s = detector.config, _structure(detector)
    figure, axes = _subplots(1, 1, size=(7.6, 4.3))
    axis = axes[0, 0]
    axis.set(xlim=(0, 152), ylim=(0, 86))
    axis.axis("off")
    for y, height, colour, name in (
        (43, 42, NORMAL, "Training: f and g learn"),
        (23, 18, NORMAL, "Memory bank: f is fixed, g is dropped"),
        (1, 20, DEFECTIVE, "Inference"),
    ):
        axis.add_patch(Rectangle((76, y), 75, height, color=colour, alpha=0.09, lw=0))
        _text(axis, 77.5, y + height - 2.4, name, ha="left", weight="bold", color=colour)

    _picture(axis, 1, 55, normal, f"normal pictures\n{c.image_size} × {c.image_size} × 3", NORMAL)
    _picture(axis, 1, 4, defective, f"test picture\n{c.image_size} × {c.image_size} × 3", DEFECTIVE)
    _box(axis, 22, 1, 27, 84, "")
    _text(axis, 35.5, 79.5, s["backbone"])
    _levels(axis, 35.5, c.layers, s["maps"])
    _box(axis, 54, 1, 17, 84, "")
    _text(axis, 62.5, 43, s["patches"])
    for y, colour in ((63, NORMAL), (12, DEFECTIVE)):
        _arrow(axis, (18, y), (22, y), colour)
        _arrow(axis, (49, y), (54, y), colour)

    f, g = s["f"], s["g"]
    for y, lane, bar in ((72, NORMAL, ""), (52, NORMAL, r"\bar "), (30, NORMAL, ""), (9, DEFECTIVE, "")):
        _arrow(axis, (71, y), (78, y), lane)
        _box(axis, 78, y - 4, 14, 8, f"${bar}f$\n{f}", PALETTE[4], dashed=bool(bar))
    for y, bar in ((72, ""), (52, r"\bar ")):
        _arrow(axis, (92, y), (97, y), NORMAL)
        _box(axis, 97, y - 4, 14, 8, f"${bar}g$\n{g}", PALETTE[4], dashed=bool(bar))
    for x in (85, 104):
        _arrow(axis, (x, 68), (x, 56), GREY, dashed=True)
    _text(axis, 94.5, 62, f"EMA, Eq. 8\nγ = {c.gamma:g}")
    _arrow(axis, (111, 72), (127, 72), NORMAL, "$z$")
    _box(axis, 127, 67, 22, 10, r"$\mathcal{L}_{RC}$ of δ and ω" + f"\nEq. 7, m = {c.margin:g}", TRUTH)
    for y, text in ((57, r"$\omega^P$, Eq. 1" + f"\nσ = {c.sigma:g}"), (48, r"$\omega^C$, Eq. 2–5" + f"\nk = {c.k}")):
        axis.plot([111, 113.5, 113.5], [52, 52, y], color=NORMAL, lw=1)
        _arrow(axis, (113.5, y), (116, y), NORMAL)
        _box(axis, 116, y - 4, 14, 8, text, TRUTH)
        _arrow(axis, (130, y), (135, 52.5 + (y - 52.5) * 0.4), NORMAL)
    _text(axis, 112.3, 54, r"$\bar z$")
    _box(axis, 135, 48.5, 14, 8, "ω, Eq. 6\n" + f"α = {c.alpha:g}", TRUTH)
    _arrow(axis, (142, 56.5), (142, 67), NORMAL)

    _arrow(axis, (92, 30), (97, 30), NORMAL)
    _box(axis, 97, 26, 18, 8, f"greedy k-center\n{100 * c.coreset_ratio:g} % of f(p)")
    _arrow(axis, (115, 30), (120, 30), NORMAL)
    _box(axis, 120, 26, 29, 8, s["bank"], TRUTH)
    _arrow(axis, (92, 9), (97, 9), DEFECTIVE)
    axis.plot([122.5, 122.5, 106], [26, 21.5, 21.5], color=NORMAL, lw=1)
    _arrow(axis, (106, 21.5), (106, 13), NORMAL)
    _box(axis, 97, 5, 18, 8, "nearest r* in M\nEq. 9")
    _arrow(axis, (115, 9), (117.5, 9), DEFECTIVE)
    _box(axis, 117.5, 5, 11, 8, f"s, Eq. 10\nb = {c.neighbours}")
    for y, text in ((14, "image score:\nmax of s"), (5, f"score map\n{c.image_size} × {c.image_size}")):
        _arrow(axis, (128.5, 9), (132, y), DEFECTIVE)
        _box(axis, 132, y - 3.8, 17, 7.6, text)
    return figure


def _structure(detector: ReConPatch) -> dict:
    """What Figure 1 says, read from the modules themselves, the maps' sizes from one blank picture."""
    c, extractor = detector.config, detector.extractor
    with torch.inference_mode():
        maps = extractor.maps(np.zeros((1, c.image_size, c.image_size, 3), np.uint8))
        h, w, dim = (*maps[0].shape[-2:], extractor.aggregate(maps).shape[-1])
    with torch.random.fork_rng(devices=[]):
        layers = Representation(dim, c)
    f = getattr(detector, "f_", None) or layers.f
    g = f"{layers.g.in_features} → {layers.g.out_features}" if isinstance(layers.g, torch.nn.Linear) else "identity"
    bank = "memory bank M" if detector.bank_ is None else "memory bank M\n{} × {}".format(*detector.bank_.entries.shape)
    return {
        "maps": [(m.shape[1], m.shape[2]) for m in maps],
        "patches": f"{c.patch_size} × {c.patch_size}\naggregation\n\n{h} × {w}\npatches,\neach\n"
        + rf"$p \in \mathbb{{R}}^{{{dim}}}$",
        "f": f"{f.in_features} → {f.out_features}",
        "g": g,
        "bank": bank,
        "backbone": "\n".join(fill(name, 18) for name in (c.backbone, f"{Path(c.weights).stem}, frozen")),
    }


def _levels(
    axis: Axes, x: float, layers: Sequence[int], maps: Sequence[tuple[int, int]], top=75.0, height=70.0
) -> None:
    """One stack of sheets per level below each other, their sides in proportion to the maps'."""
    slot, bottom = height / len(layers), None
    for n, (level, (channels, side)) in enumerate(zip(layers, maps, strict=True)):
        middle, size = top - (n + 0.5) * slot + 2, min(slot - 10, 16) * side / maps[0][1]
        for shift in (1.6, 0.8, 0):
            corner = (x - size / 2 + shift, middle - size / 2 + shift)
            axis.add_patch(Rectangle(corner, size, size, fc="white", ec=GREY, lw=0.8))
        if n:
            _arrow(axis, (x, bottom), (x, middle + size / 2 + 2), GREY)
        _text(axis, x, middle - size / 2 - 2.5, f"level {level}: {channels} × {side} × {side}")
        bottom = middle - size / 2 - 4.5


def _text(axis: Axes, x: float, y: float, text: str, *, size: float = 7, ha: str = "center", **options) -> None:
    axis.text(x, y, text, fontsize=size, ha=ha, va="center", linespacing=1.25, **options)


def _box(axis: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = GREY, *, dashed=False) -> None:
    outline = {"ec": colour, "lw": 1.1, "ls": "--" if dashed else "-", "mutation_aspect": 1}
    axis.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1", fc="white", **outline))
    _text(axis, x + w / 2, y + h / 2, text)


def _arrow(axis: Axes, start: tuple, end: tuple, colour: str, text: str = "", *, dashed=False) -> None:
    props = {"arrowstyle": "-|>", "color": colour, "lw": 1, "ls": "--" if dashed else "-", "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=props | {"mutation_scale": 8})
    if text:
        _text(axis, (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2, text)


def _picture(
    axis: Axes, x: float, y: float, picture: np.ndarray | None, text: str, colour: str, side: float = 17
) -> None:
    if picture is not None:
        axis.imshow(picture, extent=(x, x + side, y, y + side), aspect="auto", interpolation="antialiased")
    axis.add_patch(Rectangle((x, y), side, side, fill=False, ec=colour, lw=1.2))
    _text(axis, x + side / 2, y + side + 3.4, text)
