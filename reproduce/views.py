"""From a grid's results to what the notebooks of figures, ensembles and times show."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pandas as pd

from reproduce import paper
from reproduce.entries import Entry, Ensemble, Grid, Result, load
from rcp.metrics import UndefinedMetric, image_auroc
from rcp.scoring import modified_z_score
from reproduce.store import Store
from reproduce.tables import OVERALL, WITH_AUPRO, mean_and_spread, mean_over
from reproduce.verdict import D_PRIME_TOLERANCE, Comparison


def of_seed(grid: Grid, seed: int, category: str = "") -> Grid:
    """The part of a grid that has this seed, and is of this category where one is named: what an image shows."""

    return part(grid, seed={seed}, **({"category": {category}} if category else {}))


def part(grid: Grid, **columns) -> Grid:
    """The entries, there or missing, whose columns have one of the values named: ``simulation={"structure"}``."""

    def wanted(entry) -> bool:
        own = entry.columns()
        return all(own[name] in of for name, of in columns.items())

    pairs = [(entry, result) for entry, result in grid.pairs() if wanted(entry)]
    missing = [entry for entry in grid.missing if wanted(entry)]
    return Grid([entry for entry, _ in pairs], [result for _, result in pairs], missing)


# ---- Figures 3 and S1 ----


def feature_spaces(grid: Grid, column: str = "", words: str = "{}") -> tuple[dict, dict, np.ndarray]:
    """-> (name -> (n, 2) embedding, name -> title with R², positions (n, 2)) of :class:`reproduce.studies.FeatureSpace` results.

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
    """A row per feature space: R² of a patch's position predicted from its neighbours in other images."""
    rows = {name: r2 for result in grid.results for name, r2 in result.metrics["position_r2"].items()}
    return pd.DataFrame({"R²": pd.Series(rows, dtype=float)})


# ---- Figure 4 ----


def d_primes(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per category: d′ (Eq. 12) of both methods over seeds, and the paper's where it prints one (bottle)."""
    printed = paper.table("F4").pivot(index="category", columns="method", values="value")
    blocks = {}
    for method in dict.fromkeys(frame["method"]):
        ours = mean_and_spread(frame[frame["method"] == method], "d_prime", ["category"], scale=1)
        block = ours.rename(columns={"mean": "d′"}).assign(paper=printed[method].reindex(ours.index))
        blocks[method] = block.assign(difference=block["d′"] - block["paper"])
    if not blocks:
        return pd.DataFrame(columns=pd.MultiIndex.from_tuples([("ReConPatch", "d′")]))
    return pd.concat(blocks, axis=1)


def d_primes_in_words(table: pd.DataFrame) -> str:
    """In how many categories ReConPatch separates better."""
    if not {("PatchCore", "d′"), ("ReConPatch", "d′")} <= set(table.columns):
        return "Nothing to compare yet."
    both = table.xs("d′", axis=1, level=1).dropna()
    above = (both["ReConPatch"] > both["PatchCore"]).sum()
    return f"d′ of ReConPatch is above PatchCore's in {above} of {len(both)} categories"


def d_prime_comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Those rows of :func:`d_primes` for which the paper prints a number."""
    methods = [m for m in dict.fromkeys(c[0] for c in table.columns) if (m, "paper") in table]
    return [
        Comparison(f"d′, {method}, {category}:", row["d′"], row["spread"], row["paper"], D_PRIME_TOLERANCE)
        for method in methods
        for category, row in table[method].dropna(subset=["d′", "paper"]).iterrows()
    ]


# ---- Figures 5, S3, S4 ----


class Shown(NamedTuple):
    """What :func:`reproduce.figures.plots.score_maps` draws.

    images (n, S, S, 3) uint8 or None, masks (n, S, S) bool, method -> maps, method -> threshold, titles.
    """

    images: np.ndarray | None
    masks: np.ndarray
    maps: dict[str, np.ndarray]
    thresholds: dict[str, float]
    titles: list[str]


def shown_maps(grid: Grid, category: str, per_kind: int = 1, images: bool = True) -> Shown:
    """Images of each kind of defect (the last ones in their folders), their masks, and the maps of every method there.

    images: False leaves the images themselves out. Where nothing is computed yet, there are no masks.

    Raises:
        ValueError: the grid is not of this category.
    """
    there = [(c, r) for c, r in grid.pairs() if c.category == category]
    asked = {c.category for c in [*grid.entries, *grid.missing]}
    if asked and category not in asked:
        raise ValueError(f"category: nothing of {category!r} is computed; there are: {sorted(asked)}")
    nothing = Shown(None, np.zeros((0, 1, 1), bool), {}, {}, [])
    if not there:
        return nothing
    entry, test = there[0][0], there[0][0].data().test
    kinds = {
        kind: [i for i, k in enumerate(test.defects) if k == kind] for kind in sorted(set(test.defects) - {"good"})
    }
    chosen = [i for places in kinds.values() for i in places[-per_kind:]]
    if not chosen:
        return nothing
    transform = entry.transform("test")
    images = np.stack([transform.image(test.paths[i]) for i in chosen])
    masks = np.stack([
        transform.mask(test.masks[i], test.paths[i]) if test.masks[i] else np.zeros(images.shape[1:3], bool) for i in chosen
    ])  # fmt: skip
    maps = {_shown_as(c): _maps(r, chosen) for c, r in there}
    found = {_shown_as(c): r.metrics["f1_threshold_pixel"] for c, r in there}
    titles = [test.defects[i].replace("_", " ") for i in chosen]
    thresholds = {m: t for m, t in found.items() if t is not None}
    return Shown(images if images else None, masks, maps, thresholds, titles)


def _maps(result: Result, chosen: list[int]) -> np.ndarray:
    """Score maps of these test images only."""
    few = {n: result.arrays[n][chosen] for n in ("patch_scores", "log_odds") if n in result.arrays}
    return dataclasses.replace(result, arrays=few).maps()


def _shown_as(entry) -> str:
    columns = entry.columns()
    return f"refined, {columns['simulation']}" if columns["refinement"] == "with" else columns["method"]


class Sheet(NamedTuple):
    """What :func:`reproduce.figures.plots.score_map_sheet` draws: as :class:`Shown`, of one method, a threshold or None per image."""

    images: np.ndarray | None
    masks: np.ndarray
    maps: np.ndarray
    thresholds: list[float | None]
    titles: list[str]


def one_of_each(grid: Grid, method: str = "ReConPatch", images: bool = True) -> Sheet:
    """One defective image of every category that has one, with one method's map (Fig. S3, S4); empty where none is there."""
    found = {}
    for entry, result in grid.pairs():
        if entry.method == method:
            found[entry.category] = shown_maps(Grid([entry], [result], []), entry.category)
    found = {category: shown for category, shown in found.items() if len(shown.masks)}
    if not found:
        return Sheet(None, np.zeros((0, 1, 1), bool), np.zeros((0, 1, 1)), [], [])
    images, masks, maps = (
        np.stack(parts)
        for parts in zip(*((s.images[0], s.masks[0], s.maps[method][0]) for s in found.values()), strict=True)
    )
    thresholds = [shown.thresholds.get(method) for shown in found.values()]
    titles = [f"{category}: {shown.titles[0]}" for category, shown in found.items()]
    return Sheet(images if images else None, masks, maps, thresholds, titles)


def star_table(grid: Grid) -> pd.DataFrame:
    """A row per category: in how many % of the defective images the highest point of the map lies within the ground truth.

    A column per method, its spread and its number of seeds; where a category has none, why.
    """
    rows, why = [], {}
    for entry, result in grid.pairs():
        row = {"method": entry.method, "category": entry.category, "star": np.nan}
        rows.append(row)
        test = entry.data().test
        if not test.has_masks:
            why[entry.category] = "the split has no masks"
            continue
        masks, maps = test.load_masks(entry.transform("test")), result.maps()
        seen = masks.any((1, 2))  # a defect that the crop cut off cannot be hit
        highest = maps.reshape(len(maps), -1).argmax(1)
        hit = masks.reshape(len(masks), -1)[np.arange(len(masks)), highest]
        if seen.any():
            row["star"] = 100 * float(hit[seen].mean())
        else:
            why[entry.category] = "no defect lies within the crop"
    columns = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        found = mean_and_spread(pd.DataFrame([r for r in rows if r["method"] == method]), "star", ["category"], scale=1)
        columns |= {method: found["mean"], f"± {method}": found["spread"], f"seeds {method}": found["seeds"]}
    return pd.DataFrame(columns | ({"undefined": pd.Series(why)} if why else {}))


def star_in_words(table: pd.DataFrame) -> str:
    """The mean over categories of :func:`star_table`, a method each."""
    means = {m: table[m].dropna() for m in ("PatchCore", "ReConPatch") if m in table}
    return (
        "; ".join(
            f"{method}: the star lies on the defect in {of.mean():.1f} % (mean of {len(of)})"
            for method, of in means.items()
            if len(of)
        )
        or "nothing is computed yet"
    )


# ---- Table S6 ----


def inference_times(grid: Grid) -> pd.DataFrame:
    """A row per method: median and interquartile range of ms per image, images per second, peak memory; the paper's ms."""
    rows = {}
    for task, result in grid.pairs():
        m = result.metrics
        printed = paper.published("S6", method=task.method)
        rows[task.method] = {
            "ms an image": m["inference_ms"], "IQR": m["iqr_ms"], "images/s": m["images_per_second"],
            "peak memory, MiB": np.nan if m["peak_memory_bytes"] is None else m["peak_memory_bytes"] / 2**20,
            "bank entries": result.info["bank"][0], "paper's ms": printed, "device": result.info["device"],
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index", columns=None if rows else ["ms an image"])


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
    ours, theirs = (table.loc["ReConPatch", c] / table.loc["PatchCore", c] - 1 for c in ("ms an image", "paper's ms"))
    times = " and ".join(
        f"{method} {table.loc[method, 'ms an image']:.2f} ms" for method in ("PatchCore", "ReConPatch")
    )
    return f"{times} an image on {table['device'].iloc[0]}: f and what follows cost {ours:+.1%} (paper {theirs:+.1%}, another machine)"


# ---- Table 6 ----


def with_members(grid: Grid, store: Store) -> pd.DataFrame:
    """The frame of a grid of ensembles with a row for each of their members too, from the store."""
    members: list[Entry] = list(dict.fromkeys(m for ensemble in grid.entries for m in ensemble.members))
    found = {member: load(member, store) for member in members}
    there = [member for member in members if found[member]]
    both = Grid([*there, *grid.entries], [*(found[m] for m in there), *grid.results], [])
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
    """Image AUROC of the ensembles by the statistics that Eq. 11 takes (level and deviation), percent.

    Columns (setting, mean | spread | seeds); a category in which it is undefined is left out, and the name says so.
    """
    rows = []
    for ensemble in dict.fromkeys(Ensemble(e.members) for e in grid.entries):
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
                rows.append(how | {"category": ensemble.category, "seed": ensemble.config.seed, "image_auroc": auroc})
    if not rows:
        return pd.DataFrame(columns=["nothing is computed yet"])
    frame = pd.DataFrame(rows)
    undefined = set(frame.loc[frame["image_auroc"].isna(), "category"])
    members = [c for c in dict.fromkeys(frame["category"]) if c not in undefined]
    without = f" (without {', '.join(sorted(undefined))})" if undefined else ""
    blocks = {}
    for setting, part in frame.groupby("setting"):
        ways = {
            way: mean_over(of, "image_auroc", {way: members}, frame["seed"].nunique())
            for way, of in part.groupby("statistics", sort=False)
        }
        blocks[setting + without] = pd.concat(ways.values())
    return pd.concat(blocks, axis=1)


# ---- Tables S7 and S8 ----


def refinement_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """What the refinement changes, percent points: each refined entry minus the unrefined one of its category and seed.

    Returns:
        Rows (kind of simulation, category), then the kind's mean of all; columns (metric, gain | spread), the spread over seeds.
    """
    keys, metrics = ["category", "seed"], list(WITH_AUPRO)
    if frame.empty or "simulation" not in frame:
        return pd.DataFrame(columns=pd.MultiIndex.from_product([WITH_AUPRO.values(), ["gain", "spread"]]))
    plain = frame[frame["refinement"] == "without"].set_index(keys)[metrics].astype(float)
    blocks = {}
    for kind, part in frame[frame["refinement"] == "with"].groupby("simulation", sort=False):
        gain = 100 * (part.set_index(keys)[metrics].astype(float) - plain).dropna(how="all")
        of_all = OVERALL.format(gain.index.unique("category").size)
        whole = gain.groupby("seed").mean().assign(category=of_all).set_index("category", append=True).swaplevel()
        for name, of in pd.concat([gain, whole]).groupby("category", sort=False):
            blocks[f"{kind}, {name}"] = {
                (title, word): value
                for metric, title in WITH_AUPRO.items()
                for word, value in (("gain", of[metric].mean()), ("spread", of[metric].std()))
            }
    return pd.DataFrame.from_dict(blocks, orient="index")


def refinement_gains_by_size(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`refinement_gains` at each size of the images (Table S8); rows (size, kind of simulation, category)."""
    parts = [
        refinement_gains(part).rename(index=f"{size} px, {{}}".format) for size, part in frame.groupby("image_size")
    ]
    return pd.concat(parts) if parts else refinement_gains(frame)


def refinement_in_words(gains: pd.DataFrame) -> str:
    """Per kind of simulation: does the refined map gain in every category? What is shown as 0.00 is no gain."""
    sentences = []
    for name in (n for n in gains.index if OVERALL.format("") in n):
        kind = name.partition(",")[0]
        of = gains.loc[[n for n in gains.index if n.startswith(f"{kind}, ") and n != name]]
        changes = ", ".join(f"{m} {gains.loc[name, (m, 'gain')]:+.2f}" for m in WITH_AUPRO.values())
        better = (of[[("pixel AUROC", "gain"), ("AU-PRO", "gain")]].round(2) > 0).all(axis=1).sum()
        sentences.append(f"{kind}: {changes}; both pixel metrics gain in {better} of {len(of)} categories.")
    return "\n".join(sentences) or "Nothing to compare yet."
