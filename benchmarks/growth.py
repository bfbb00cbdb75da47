"""Time and memory against the number of patches (coreset), the size of the bank (search) and of an image (features), with exponents."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
from alone import forget_highest, held, seconds
from common import RESULTS, arguments, write
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from torch import Tensor

from rcp import PatchCore
from rcp.coreset import greedy_k_center
from rcp.data import load_dataset, load_images
from rcp.patches import pool
from rcp.scoring import MemoryBank, nearest_entries
from reproduce.figures.style import PALETTE, style
from reproduce.notebook import environment

FIXED = 1000  # picks, where they do not grow with the patches
QUERIES = 4 * 784  # patches of four images


def measured(work: Callable, limit: float = 5.0) -> tuple[float, float]:
    """-> (seconds, the least of three where one takes less than ``limit``; MiB at the peak beyond those before, at least 1)."""
    before = forget_highest().resident
    took = [seconds(work)[0]]
    peak = held().highest
    while took[0] < limit and len(took) < 3:
        took.append(seconds(work)[0])
    return min(took), max(1.0, (peak - before) / 2**20)


def resampled(features: Tensor, n: int) -> Tensor:
    """(N, D) -> (n, D): drawn without repetition, or beyond N again with a tenth of the difference of two others added."""
    generator = torch.Generator().manual_seed(n)
    total = len(features)
    out = torch.empty(n, features.shape[1])
    for start in range(0, n, total):
        part = out[start : start + total]
        torch.index_select(features, 0, torch.randperm(total, generator=generator)[: len(part)], out=part)
        if start:
            for rows in part.split(2**14):
                i, j = torch.randint(total, (2, len(rows)), generator=generator)
                rows += 0.1 * (features[i] - features[j])
    return out


def coreset(features: Tensor, sizes: list[int], budget: float):
    """Yields (series, patches, seconds, MiB); a series ends where its next point might take more than ``budget`` seconds or the memory."""
    greedy_k_center(features[:3000].clone(), 30)  # what is compiled, is compiled
    series = {f"{FIXED:,} picks": (lambda _n: FIXED, 1), "1 % picks": (lambda n: n // 100, 2)}
    took = dict.fromkeys(series, (0.0, 1))
    for n in sizes:
        if 1.5 * n * features.shape[1] * 4 > psutil.virtual_memory().available:
            return
        x = resampled(features, n)
        for name, (picks, power) in series.items():
            before, then = took[name]
            if before * (n / then) ** power <= budget:
                count = picks(n)
                s, memory = measured(lambda x=x, count=count: greedy_k_center(x, count))
                took[name] = s, n
                yield name, n, s, memory
            else:
                took[name] = np.inf, n
        del x


def searching(features: Tensor, sizes: list[int], _budget: float):
    queries = features[:: max(1, len(features) // QUERIES)][:QUERIES].contiguous()
    for n in sizes:
        bank = resampled(features, n)
        memory = MemoryBank(bank, 9)
        memory.nearest(queries[:10])
        yield "search", n, *measured(lambda m=memory: m.nearest(queries))
        yield "faiss", n, *measured(lambda bank=bank: nearest_entries(queries, bank))


def extracting(options, sides: list[int], batch: int = 16):
    paths = load_dataset(options.data, category=options.category).train.paths[:batch]
    for side in sides:
        detector = PatchCore(
            backbone=options.backbone, weights=options.weights, image_size=side, resize=side, device="cpu"
        )
        images = load_images(paths, detector.transform)
        detector.extractor(images[:2])
        took, memory = measured(lambda p=images, d=detector: d.extractor(p))
        yield "features", side, took, memory


def exponent(sizes: pd.Series, values: pd.Series) -> float:
    """Slope in log-log of the largest half of the points, at least three: below, fixed costs hide it."""
    last = max(3, (len(sizes) + 1) // 2)
    return np.polyfit(np.log(sizes[-last:]), np.log(values[-last:]), 1)[0]


@style()
def draw(frame: pd.DataFrame, axes_of: dict[str, list[str]]) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(7.4, 4.4), sharex="col")
    for column, (label, series) in zip(axes.T, axes_of.items(), strict=True):
        for axis, what in zip(column, ("seconds", "MiB"), strict=True):
            for name, colour, marker in zip(series, PALETTE, "os", strict=False):
                points = frame[frame["series"] == name]
                slope = exponent(points["size"], points[what])
                axis.plot(
                    points["size"], points[what], color=colour, marker=marker, label=f"{name}, $n^{{{slope:.2f}}}$"
                )
            values = np.log10(frame.loc[frame["series"].isin(series), what])
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.set_ylim(10 ** np.floor(values.min() - 0.1), 10 ** np.ceil(values.max() + 0.2))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.legend(loc="upper left")
        column[0].set_xlabel("")
    sides = frame.loc[frame["series"] == "features", "size"]
    axes[1, 2].set_xticks(sides, sides)
    axes[1, 2].xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MiB at the peak,\nbeyond what goes in")
    plt.close(figure)
    return figure


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--patches", type=float, nargs="+", default=[4, 4.5, 5, 5.5, 6, 6.5], help="powers of ten")
    parser.add_argument("--bank", type=float, nargs="+", default=[3, 3.5, 4, 4.5, 5], help="powers of ten")
    parser.add_argument("--sides", type=int, nargs="+", default=[112, 160, 224, 320, 448, 640], help="pixels")
    parser.add_argument("--budget", type=float, default=120, help="seconds that a point of the coreset may take")
    options = parser.parse_args()

    detector = PatchCore(backbone=options.backbone, weights=options.weights, device="cpu")
    train = load_images(load_dataset(options.data, category=options.category).train.paths, detector.transform)
    features = torch.cat([pool(p.float(), 512) for p in torch.from_numpy(detector.extractor(train))])
    points = []
    sizes = [round(10**power) for power in options.patches]
    for point in (
        *coreset(features, sizes, options.budget),
        *searching(features, [round(10**power) for power in options.bank], options.budget),
        *extracting(options, options.sides),
    ):
        points.append(point)
        print(*point, flush=True)
    frame = pd.DataFrame(points, columns=["series", "size", "seconds", "MiB"])

    axes_of = {
        "patches (coreset)": [f"{FIXED:,} picks", "1 % picks"],
        "bank entries (search)": ["search", "faiss"],
        "image side, pixels (features)": ["features"],
    }
    draw(frame, axes_of).savefig(RESULTS / "growth.png", dpi=180)
    what = {name: axis for axis, names in axes_of.items() for name in names}
    rows = [[what[p.series], p.series, f"{p.size:,}", f"{p.seconds:.3g}", f"{p.MiB:,.0f}"] for p in frame.itertuples()]
    for name, group in frame.groupby("series", sort=False):
        slopes = (f"**{exponent(group['size'], group[of]):.2f}**" for of in ("seconds", "MiB"))
        rows.append([what[name], name, "exponent", *slopes])
    write(
        "growth",
        f"Growth: {options.category}, {options.backbone}",
        ["against", "series", "size", "seconds", "MiB at the peak beyond what goes in"],
        rows,
        "![time and memory against size](growth.png)\n\n"
        f"Coreset and search: PatchCore's 512-d features of {len(train)} real images; beyond {len(features):,} patches the same "
        "again, each with a tenth of the difference of two others added. "
        f"Search: {QUERIES:,} patches in a bank that is there, faiss with its index built anew; "
        "features: 16 images. Exponents are slopes in log-log of each series' largest half of "
        "the points. A series of the coreset ends where its next point might take longer than "
        f"{options.budget:.0f} s. {environment('cpu')}",
    )
