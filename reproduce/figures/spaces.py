"""Points in two dimensions: the space of patch features (Fig. 3, S1), and what ω^P and ω^C say of it (Fig. 2)."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from numpy import ndarray
from scipy.spatial import ConvexHull

from rcp.losses import contextual, nearest_neighbours, pairwise, squared_distances
from reproduce.figures.style import DEFECTIVE, GREY, NORMAL, nothing, plain, style, subplots


@style()
def feature_space(spaces: Mapping[str, ndarray], positions: ndarray) -> Figure:
    """Patch features in two dimensions, coloured by where in the image the patch lies; the last panel is the key (Fig. 3, S1).

    Args:
        spaces: name -> (n, 2) float.
        positions: (n, 2) int, row and column of each patch.
    """
    if not spaces:
        return nothing()
    widths = [*[1.9] * len(spaces), 1]
    figure, axes = subplots(1, len(widths), (sum(widths) + 0.1, 2.1), width_ratios=widths)
    *panels, key = axes[0]
    for axis, (name, points) in zip(panels, spaces.items(), strict=True):
        axis.scatter(*np.asarray(points).T, c=position_colours(positions), s=1.5, lw=0, rasterized=True)
        axis.set(title=plain(name), xticks=[], yticks=[], box_aspect=1)
    side = int(positions.max()) + 1
    key.imshow(position_colours(np.indices((side, side)).reshape(2, -1).T).reshape(side, side, 3))
    key.set(xticks=[], yticks=[], frame_on=False, title="place in\nthe image")
    return figure


def position_colours(positions: ndarray) -> ndarray:
    """(n, 2) row and column -> (n, 3) RGB: blue to yellow from left to right, dark to light from top to bottom.

    The two opponent hues are told apart with any common kind of colour blindness.
    """
    row, column = (positions / max(1, positions.max())).T[..., None]
    left, right = np.array([0.0, 0.35, 0.9]), np.array([0.95, 0.75, 0.0])
    return (left + column * (right - left)) * (0.45 + 0.55 * row)


def figure_2_points() -> dict[str, tuple[ndarray, ndarray]]:
    """Case -> (points (12, 2) float64, group of each point (12,) 0 or 1). Points 0 and 1 are i and j.

    They are equally far apart in both cases.
    (a) i and j lie at the rims of two groups that face each other; (b) both lie within one group.
    """
    pair = [(-0.4, 0.0), (0.4, 0.0)]
    left = [(-0.75, 0.12), (-0.62, -0.3), (-1.05, -0.25), (-0.68, 0.45), (-1.12, 0.28)]
    right = [(0.72, -0.2), (0.66, 0.27), (1.08, 0.1), (0.8, -0.52), (1.15, -0.33)]
    above = [(0.0, 0.2), (-1.0, 0.1), (-0.75, 0.8), (-0.05, 1.0), (0.75, 0.78)]
    below = [(0.02, -0.2), (1.05, -0.08), (0.72, -0.78), (0.0, -0.95), (-0.8, -0.75)]
    return {
        "(a) two groups": (np.array(pair + left + right), np.array([0, 1] + [0] * 5 + [1] * 5)),
        "(b) one group": (np.array(pair + above + below), np.zeros(12, int)),
    }


@style()
def figure_2(k: int = 5, sigma: float = 1.0) -> Figure:
    """Two configurations of points with the same ω^P_ij (Eq. 1) and different ω^C_ij (Eq. 2 to 5), computed (Fig. 2).

    Shaded: groups. Lines lead from i and from j to their k nearest neighbours; a ring marks what both have in common.
    """
    figure, axes = subplots(1, 2, (6.2, 2.7), sharex=True, sharey=True)
    for axis, (case, (points, group)) in zip(axes[0], figure_2_points().items(), strict=True):
        d2 = squared_distances(torch.from_numpy(points))
        omega_p, omega_c = pairwise(d2, sigma)[0, 1], contextual(d2, k)[0, 1]
        axis.set_title(rf"{case}: $\omega^P_{{ij}}$ = {omega_p:.3f}, $\omega^C_{{ij}}$ = {omega_c:.3f}")
        axis.set(xlim=(-1.45, 1.45), ylim=(-1.25, 1.25), aspect="equal")
        axis.axis("off")
        _groups_and_neighbours(axis, points, group, nearest_neighbours(d2, k).numpy())
    return figure


def _groups_and_neighbours(axis: Axes, points: ndarray, group: ndarray, neighbours: ndarray) -> None:
    """One panel of :func:`figure_2`. points: (n, 2) float, group: (n,) 0 or 1, neighbours: (n, k) indices."""
    for member in np.unique(group):
        hull = points[group == member][ConvexHull(points[group == member]).vertices]
        axis.add_patch(Polygon(hull, fc="#eeeeee", ec="#eeeeee", lw=26, joinstyle="round", zorder=0))
        axis.scatter(*points[2:][group[2:] == member].T, marker="os"[member], s=34, color=GREY, zorder=2)
    for end, (name, colour) in enumerate((("i", DEFECTIVE), ("j", NORMAL))):
        axis.annotate(f"${name}$", points[end], (0, -16), textcoords="offset points", ha="center", fontsize=11)
        axis.scatter(*points[end], marker="os"[group[end]], s=80, color=colour, zorder=3)
        for other in neighbours[end]:
            axis.plot(*points[[end, other]].T, color=colour, lw=1, alpha=0.7, zorder=1)
    axis.plot(*points[:2].T, color="black", lw=1, ls=":", zorder=1)
    axis.scatter(*points[np.intersect1d(*neighbours[:2])].T, s=120, fc="none", ec="black", lw=1, zorder=2)
