"""From a grid's results to what the notebooks of figures, ensembles and times show."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from rcp import paper
from rcp.experiment import Cell, Ensemble, Grid, load
from rcp.metrics import UndefinedMetric, image_auroc
from rcp.scoring import modified_z_score
from rcp.store import Store
from rcp.tables import mean_and_spread
from rcp.verdict import Comparison

# ---- Figures 3 and S1 ----


def feature_spaces(grid: Grid, column: str = "", words: str = "{}") -> tuple[dict, dict, np.ndarray]:
    """-> (name -> (n, 2) embedding, name -> title with R², positions (n, 2)) of :class:`rcp.studies.FeatureSpace` results.

    column: what tells the detectors apart, written with ``words``; the spaces' own names (PatchCore, epoch n) where left out.
    """
    spaces, titles, positions = {}, {}, np.zeros((1, 2), int)
    for task, result in grid.pairs():
        positions = result.arrays["positions"]
        for name, r2 in result.metrics["position_r2"].items():
            shown = words.format(task.columns()[column]) if column else name
            spaces[shown], titles[shown] = result.arrays[name], f"{shown}: R² {r2:.3f}"
    return spaces, titles, positions


def position_table(grid: Grid) -> pd.DataFrame:
    """A row per feature space: R² of a patch's position predicted from its neighbours in other pictures."""
    rows = {name: r2 for result in grid.results for name, r2 in result.metrics["position_r2"].items()}
    return pd.DataFrame({"R²": pd.Series(rows, dtype=float)})


# ---- Figure 4 ----


def d_primes(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per category: d′ (Eq. 12) of both methods, ours and the paper's where it prints one (bottle)."""
    printed = paper.table("F4").pivot(index="category", columns="method", values="value")
    columns = {}
    for method in dict.fromkeys(frame["method"]):
        ours = frame[frame["method"] == method].groupby("category", sort=False)["d_prime"].mean()
        columns[method, "d′"] = ours
        columns[method, "paper"] = printed[method].reindex(ours.index)
        columns[method, "difference"] = columns[method, "d′"] - columns[method, "paper"]
    return pd.DataFrame(columns) if columns else pd.DataFrame(columns=pd.MultiIndex.from_tuples([("ReConPatch", "d′")]))


def d_prime_comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Those rows of :func:`d_primes` for which the paper prints a number."""
    methods = [m for m in dict.fromkeys(c[0] for c in table.columns) if (m, "paper") in table]
    return [
        Comparison(f"d′, {method}, {category}:", row["d′"], np.nan, row["paper"])
        for method in methods
        for category, row in table[method].dropna().iterrows()
    ]


# ---- Figures 5, S3, S4 ----


class Shown(NamedTuple):
    """What :func:`rcp.plots.score_maps` draws: pictures (n, S, S, 3) uint8, masks (n, S, S) bool, method -> maps, thresholds; titles."""

    pictures: np.ndarray
    masks: np.ndarray
    maps: dict[str, np.ndarray]
    thresholds: dict[str, float]
    titles: list[str]


def shown_maps(grid: Grid, category: str, per_kind: int = 1) -> Shown:
    """Pictures of each kind of defect (the last ones in their folders), their masks, and the maps of every method there.

    Raises:
        ValueError: nothing of this category is computed.
    """
    there = [(c, r) for c, r in grid.pairs() if c.category == category]
    if not there:
        raise ValueError(
            f"category: nothing of {category!r} is computed; there are: {sorted({c.category for c in grid.cells})}"
        )
    cell, test = there[0][0], there[0][0].data().test
    kinds = {
        kind: [i for i, k in enumerate(test.defects) if k == kind] for kind in sorted(set(test.defects) - {"good"})
    }
    chosen = [i for places in kinds.values() for i in places[-per_kind:]]
    transform = cell.transform("test")
    pictures = np.stack([transform.image(test.paths[i]) for i in chosen])
    masks = np.stack([
        transform.mask(test.masks[i], test.paths[i]) if test.masks[i] else np.zeros(pictures.shape[1:3], bool) for i in chosen
    ])  # fmt: skip
    maps = {c.method: r.maps()[chosen] for c, r in there}
    found = {c.method: r.metrics["f1_threshold_pixel"] for c, r in there}
    titles = [test.defects[i].replace("_", " ") for i in chosen]
    return Shown(pictures, masks, maps, {m: t for m, t in found.items() if t is not None}, titles)


def star_table(grid: Grid) -> pd.DataFrame:
    """A row per category: in how many % of the defective pictures the highest point of the map lies within the ground truth."""
    found: dict = {}
    for cell, result in grid.pairs():
        test = cell.data().test
        if not test.has_masks:
            found.setdefault(cell.method, {})[cell.category] = np.nan
            continue
        masks, maps = test.load_masks(cell.transform("test")), result.maps()
        seen = masks.any((1, 2))  # a defect that the crop cut off cannot be hit
        highest = maps.reshape(len(maps), -1).argmax(1)
        hit = masks.reshape(len(masks), -1)[np.arange(len(masks)), highest]
        found.setdefault(cell.method, {})[cell.category] = 100 * float(hit[seen].mean()) if seen.any() else np.nan
    return pd.DataFrame(found)


def star_in_words(table: pd.DataFrame) -> str:
    """The mean over categories of :func:`star_table`, a method each."""
    return (
        "; ".join(f"{method}: the star lies on the defect in {table[method].mean():.1f} %" for method in table)
        or "nothing is computed yet"
    )


# ---- Table S6 ----


def inference_times(grid: Grid) -> pd.DataFrame:
    """A row per method: median and interquartile range of ms per picture, pictures per second, peak memory; the paper's ms."""
    rows = {}
    for task, result in grid.pairs():
        m = result.metrics
        printed = paper.published("S6", method=task.method)
        rows[task.method] = {
            "ms a picture": m["inference_ms"], "IQR": m["iqr_ms"], "pictures/s": m["images_per_second"],
            "peak memory, MiB": np.nan if m["peak_memory_bytes"] is None else m["peak_memory_bytes"] / 2**20,
            "bank entries": result.info["bank"][0], "paper's ms": printed, "device": result.info["device"],
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index", columns=None if rows else ["ms a picture"])


def inference_split(grid: Grid) -> pd.DataFrame:
    """A row per method: median ms of a whole pass and of each stage."""
    rows = {
        task.method: {stage: ms["median_ms"] for stage, ms in result.metrics["stages"].items()}
        for task, result in grid.pairs()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=None if rows else ["all"])


def inference_in_words(table: pd.DataFrame) -> str:
    """What f costs, here and in the paper."""
    if not {"PatchCore", "ReConPatch"} <= set(table.index):
        return "nothing is computed yet"
    ours, theirs = (table.loc["ReConPatch", c] / table.loc["PatchCore", c] - 1 for c in ("ms a picture", "paper's ms"))
    times = " and ".join(
        f"{method} {table.loc[method, 'ms a picture']:.2f} ms" for method in ("PatchCore", "ReConPatch")
    )
    return f"{times} a picture on {table['device'].iloc[0]}: f and what follows cost {ours:+.1%} (paper {theirs:+.1%}, another machine)"


# ---- Table 6 ----


def with_members(grid: Grid, store: Store) -> pd.DataFrame:
    """The frame of a grid of ensembles with a row for each of their members too, from the store."""
    members: list[Cell] = list(dict.fromkeys(m for ensemble in grid.cells for m in ensemble.members))
    found = {member: load(member, store) for member in members}
    there = [member for member in members if found[member]]
    both = Grid([*there, *grid.cells], [*(found[m] for m in there), *grid.results], [])
    return both.frame().sort_values(["image_size", "method"], kind="stable")


def ensemble_in_words(table: pd.DataFrame) -> str:
    """Per method and size: the ensemble beside the best of its members."""
    sentences = []
    for metric in dict.fromkeys(c[0] for c in table.columns):
        means = table[metric]["mean"] if len(table) else pd.Series(dtype=float)
        for name in (n for n in means.index if "+" in n):
            stem = name.rpartition(", ")[0]
            members = means[[n for n in means.index if n.startswith(f"{stem}, ") and n != name]]
            if len(members):
                gain = means[name] - members.max()
                sentences.append(
                    f"{metric}, {stem}: ensemble {means[name]:.2f}, {gain:+.2f} against its best member ({members.idxmax()})."
                )
    return "\n".join(sentences) or "Nothing is computed yet."


def ways_of_eq_11(grid: Grid, store: Store) -> pd.DataFrame:
    """Image AUROC of the ensembles by the statistics that Eq. 11 takes (level and deviation), mean and spread over seeds, percent."""
    rows = []
    for ensemble in dict.fromkeys(Ensemble(e.members) for e in grid.cells):
        results = [load(member, store) for member in ensemble.members]
        if not all(results):
            continue
        for level in ("image", "patch"):
            for deviation in ("median", "mean"):
                scores = [modified_z_score(r.scores, *r.info["train_statistics"][level][deviation]) for r in results]
                try:
                    auroc = image_auroc(results[0].labels, np.mean(scores, 0))
                except UndefinedMetric:
                    auroc = np.nan
                how = {
                    "statistics": f"{level} scores, {deviation} deviation",
                    "setting": f"{ensemble.method}, {ensemble.config.image_size} px",
                }
                rows.append(how | {"category": ensemble.category, "seed": ensemble.config.seed, "auroc": auroc})
    if not rows:
        return pd.DataFrame(columns=["nothing is computed yet"])
    per_seed = pd.DataFrame(rows).groupby(["statistics", "setting", "seed"], sort=False, as_index=False)["auroc"].mean()
    wide = (
        mean_and_spread(per_seed, "auroc", ["statistics", "setting"])[["mean", "spread"]]
        .unstack("setting")
        .swaplevel(axis=1)
    )
    return wide.sort_index(axis=1).reindex(dict.fromkeys(r["statistics"] for r in rows))
