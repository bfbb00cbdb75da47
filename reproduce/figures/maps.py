"""What a detector finds: histograms of its image scores, score maps on images, the curve of its training.

In all functions masks are (n, S, S) bool, all False for a normal image. Orange is the outline of the ground truth,
green and dashed the contour at the threshold, where there is one, a star the maximum of a map.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy import ndarray

from rcp import metrics
from reproduce.figures.style import DEFECTIVE, NORMAL, PALETTE, THRESHOLD, TRUTH, nothing, plain, style, subplots

Images = ndarray | None  # (n, S, S, 3) uint8; None where their licence forbids to show them: grey panels
Maps = Mapping[str, ndarray]  # method -> (n, S, S) float32, in units of the score
Thresholds = Mapping[str, float]  # method -> score; a method that has none is left out
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # a panel that holds an image


@style()
def score_histogram(groups: Mapping[str, tuple], thresholds: Thresholds | None = None) -> Figure:
    """Image scores of normal and defective images, one panel per method, with d′ and AUROC (Fig. 4).

    Args:
        groups: method -> (scores (n,) float, labels (n,) 0 normal / 1 defective).
        thresholds: method -> score that a line is drawn at.
    """
    import seaborn as sns

    if not groups:
        return nothing()
    figure, axes = subplots(1, len(groups), (3.3 * len(groups), 2.3), sharey=True)
    for axis, (method, (scores, labels)) in zip(axes[0], groups.items(), strict=True):
        scores, labels = np.asarray(scores, float), np.asarray(labels).astype(bool)
        bins = np.histogram_bin_edges(scores, bins=24)
        for name, chosen, colour in (("normal", ~labels, NORMAL), ("defective", labels, DEFECTIVE)):
            if chosen.any():
                look = {"color": colour, "alpha": 0.45, "element": "step", "label": f"{name} ({chosen.sum()})"}
                sns.histplot(x=scores[chosen], bins=bins, stat="percent", ax=axis, **look)
        if thresholds and method in thresholds:
            at = thresholds[method]
            axis.axvline(at, color=THRESHOLD, ls="--", lw=1.4, label=f"threshold {at:.3g}")
        d_prime = _defined(metrics.d_prime, scores[~labels], scores[labels])
        auroc = _defined(metrics.image_auroc, labels, scores)
        # of one class there is nothing to tell
        axis.set_title(plain(method) + f": d′ = {d_prime}, AUROC = {auroc}" * bool(0 < labels.mean() < 1))
        axis.set(xlabel="image score", ylabel="% of the group")
        axis.legend(frameon=True, framealpha=0.8, edgecolor="none")
    return figure


def _defined(metric, *arguments) -> str:
    try:
        return f"{metric(*arguments):.3f}"
    except metrics.UndefinedMetric:
        return "–"


@style()
def images(rows: Sequence[ndarray], titles: Sequence[str]) -> Figure:
    """Rows of images, each (n, S, S, 3) uint8, with a title before each row."""
    figure, axes = subplots(len(rows), len(rows[0]), (1.5 * len(rows[0]) + 0.3, 1.5 * len(rows)), subplot_kw=BARE)
    for line, row, title in zip(axes, rows, titles, strict=True):
        line[0].set_ylabel(plain(title))
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image)
    return figure


@style()
def score_maps(images: Images, masks: ndarray, maps: Maps, thresholds: Thresholds, titles: Sequence = ()) -> Figure:
    """A row per image, a column per method on one colour scale, so that its rows can be compared (Fig. 5).

    titles: of the rows, or none.
    """
    if not len(masks):
        return nothing()
    rows, columns = len(masks), 1 + len(maps)
    figure, axes = subplots(rows, columns, (1.7 * columns, 1.7 * rows + 0.5), subplot_kw=BARE)
    for n, row in enumerate(axes):
        _panels(row, n, images, masks, maps, thresholds, one_scale=True)
        row[0].set_ylabel(plain(titles[n]) if titles else "")
    for axis, title in zip(axes[0], ["input, ground truth", *maps], strict=True):
        axis.set_title(plain(title))
    for column, method in zip(axes.T[1:], maps, strict=True):
        look = {"location": "bottom", "aspect": 22, "pad": 0.02, "label": "score"}
        bar = figure.colorbar(column[0].images[-1], ax=column.tolist(), **look)
        bar.outline.set_visible(False)
        if method in thresholds:
            bar.ax.axvline(thresholds[method], color=THRESHOLD, lw=2)
    return figure


@style()
def refined_maps(images: Images, masks: ndarray, maps: Maps, thresholds: Thresholds, titles: Sequence) -> Figure:
    """A column per image: it, each method's map on a scale of its own, and the pixel ROC of all methods (Fig. S5).

    titles: of the columns. The ROC is drawn up to 10 % false positives.
    """
    from sklearn.metrics import roc_curve

    if not len(masks) or not maps:
        return nothing()
    rows, columns = 2 + len(maps), len(masks)
    figure, axes = subplots(rows, columns, (1.6 * columns + 0.4, 1.65 * rows), subplot_kw=BARE)
    for n, (*panels, roc) in enumerate(axes.T):
        _panels(panels, n, images, masks, maps, thresholds, title=titles[n])
        for colour, (method, scores) in zip(PALETTE, maps.items(), strict=False):
            points = roc_curve(masks[n].ravel(), scores[n].ravel())[:2] if 0 < masks[n].mean() < 1 else ([], [])
            roc.plot(*points, color=colour, lw=1.2, label=plain(method))
        roc.set(xlim=(0, 0.1), ylim=(0, 1.02), xticks=[0, 0.1], yticks=[0, 1], xlabel="false positives")
        roc.set(frame_on=True, box_aspect=1)
    for axis, name in zip(axes[1:, 0], [*maps, "true positives"], strict=True):
        axis.set_ylabel(plain(name))
    axes[-1, -1].legend(fontsize=6, loc="lower right")
    return figure


@style()
def score_map_sheet(
    images: Images, masks: ndarray, maps: Maps, thresholds: Sequence[Thresholds], titles: Sequence, columns=5
) -> Figure:
    """Many images, each with its maps below it on a scale of their own (Fig. S3, S4).

    thresholds: of each image. titles: of the images.
    """
    if not len(masks):
        return nothing()
    columns, rows = min(columns, len(masks)), 1 + len(maps)
    lines = -(-len(masks) // columns)
    figure, axes = subplots(rows * lines, columns, (1.5 * columns, 1.55 * rows * lines + 0.3), subplot_kw=BARE)
    for n, title in enumerate(titles):
        line, column = divmod(n, columns)
        _panels(axes[rows * line :, column][:rows], n, images, masks, maps, thresholds[n], title=title)
    for axis, name in zip(axes[1:, 0], list(maps) * (len(maps) > 1), strict=False):
        axis.set_ylabel(plain(name))
    return figure


def _panels(axes, n: int, images: Images, masks, maps: Maps, thresholds, *, title="", one_scale=False) -> None:
    """Image n with its ground truth, then each method's map on it, which is grey: 1 + methods Axes.

    The colours span the scores of the map, or with ``one_scale`` those of all maps of its method.
    """
    image = np.full((*masks[n].shape, 3), 235, np.uint8) if images is None else images[n]
    axes[0].imshow(image)
    _contour(axes[0], masks[n], 0.5, TRUTH)
    axes[0].set_title(plain(fill(title, 18)), fontsize=7)
    for axis, (method, scores) in zip(axes[1:], maps.items(), strict=True):
        score, scale = scores[n], scores if one_scale else scores[n]
        low, high = float(np.min(scale)), float(np.max(scale))
        opacity = 0.2 + 0.65 * (score - low) / max(high - low, 1e-12)  # the image shows where nothing is found
        axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
        axis.imshow(score, cmap="magma", vmin=low, vmax=high, alpha=opacity)  # reads without colour vision and in grey
        _contour(axis, masks[n], 0.5, TRUTH)
        _contour(axis, score, thresholds.get(method), THRESHOLD, "dashed")  # apart from the truth in grey, too
        y, x = np.unravel_index(score.argmax(), score.shape)
        axis.plot(x, y, "*", ms=9, color=THRESHOLD, mec="white", mew=0.7, clip_on=False)


def _contour(axis: Axes, values: ndarray, level: float | None, colour: str, how: str = "solid") -> None:
    if level is not None and values.min() < level <= values.max():  # matplotlib warns of a level that is not there
        line = axis.contour(values, levels=[level], colors=[colour], linewidths=1.3, linestyles=how)
        line.set_path_effects([withStroke(linewidth=2.3, foreground="white")])


@style()
def training_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss (Eq. 7) and the 5 / 50 / 95 % quantiles of ω^P (Eq. 1) per epoch.

    history: rows with epoch, loss, omega_p_05, omega_p_50, omega_p_95, as a fitted detector holds them.
    """
    rows = pd.DataFrame(history).set_index("epoch")
    low, median, high = (rows[f"omega_p_{share}"] for share in ("05", "50", "95"))
    figure, ((loss, omega),) = subplots(1, 2, (6.2, 2.1))
    loss.plot(rows["loss"], "o-", ms=3, color=NORMAL)
    loss.set(xlabel="epoch", ylabel=r"$\mathcal{L}_{RC}$ (Eq. 7)")
    omega.fill_between(rows.index, low, high, color=NORMAL, alpha=0.25, lw=0, label="5 to 95 %")
    omega.plot(median, "o-", ms=3, color=NORMAL, label="median")
    omega.set(xlabel="epoch", ylabel=r"$\omega^P$ (Eq. 1)", ylim=(-0.03, 1.03))
    omega.legend()
    for axis in (loss, omega):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure
