"""What all figures share: colours, rcParams, how they are written, and what stands where results are missing."""

from functools import cache, partial
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font

# seaborn's "colorblind", and in paper.mplstyle its style "ticks": importing seaborn takes a quarter of a notebook's start
PALETTE = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"]
NORMAL, TRUTH, THRESHOLD, DEFECTIVE, GREY = *PALETTE[:4], "#5f6368"
NOTHING = "nothing is computed yet"

# DejaVu Sans comes with matplotlib; what it has no letters for, one of the others may, where it is installed.
OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Noto Sans",
)  # fmt: skip
FONTS = ["DejaVu Sans", *(name for name in OTHERS if name in fontManager.get_font_names())]

# The figures' style is a context, or a decorator.
PARAMETERS = rc_params_from_file(Path(__file__).with_name("paper.mplstyle"), use_default_template=False)
PARAMETERS["font.family"] = FONTS
style = partial(plt.rc_context, PARAMETERS)


def caption(figure: Figure, label: str) -> Figure:
    """The figure with where its numbers, or its images, are from in small print below it."""
    figure.supxlabel(plain(fill(label, int(figure.get_figwidth() * 21))), x=0.01, ha="left", fontsize=6, color=GREY)
    return figure


def save(figure: Figure, path: str | Path, label: str = "") -> tuple[Path, Path]:
    """Writes PATH.png (180 dpi) and PATH.pdf, without dates: the same figure is the same two files. label: its :func:`caption`."""
    if label:
        caption(figure, label)
    png, pdf = Path(f"{path}.png"), Path(f"{path}.pdf")
    png.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(png)
        figure.savefig(pdf, metadata={"CreationDate": None})
    return png, pdf


def plain(text: object) -> str:
    """A name that comes from data, such as ``a$b$c``, as text that matplotlib does not read as a formula.

    A letter that no font here has is shown by its number, such as \\u87ba, not as an empty box.
    """
    odd = {ord(c) for c in str(text)} - _letters() - {ord("\n")}
    shown = {n: chr(n).encode("unicode_escape", "backslashreplace").decode() for n in odd}
    return str(text).translate(shown).replace("$", r"\$")


@cache
def _letters() -> frozenset[int]:
    """Code points that the figures' fonts have."""
    return frozenset().union(*(get_font(fontManager.findfont(name)).get_charmap() for name in FONTS))


def subplots(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """-> (Figure of ``size`` inches, (rows, columns) array of Axes). Closed for pyplot: a notebook shows it once."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    plt.close(figure)
    return figure, axes


def legend(figure: Figure, columns: int = 2, **options) -> None:
    """One entry for each label of all panels, above them."""
    drawn = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn, loc="outside upper center", ncols=columns, **options)


def nothing(axis: Axes | None = None) -> Figure:
    """The panel, or the whole figure where ``axis`` is None, in the place of one for which there are no results."""
    axis = axis or subplots(1, 1, (3.3, 1.0))[1][0, 0]
    axis.set_axis_off()
    axis.text(0.5, 0.5, NOTHING, ha="center", va="center", color=GREY, transform=axis.transAxes)
    return axis.figure
