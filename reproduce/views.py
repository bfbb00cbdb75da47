"""From a grid's results to what is compared or drawn: frames for :func:`reproduce.tables.compare`, arrays for the figures."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from rcp.checks import require
from rcp.metrics import image_auroc
from reproduce.entries import Ensemble, Entry
from reproduce.run import Grid, load, run_grid
from reproduce.store import Store

# ---- frames ----


def feature_spaces(grid: Grid, column: str = "", words: str = "{}") -> tuple[dict, np.ndarray, pd.DataFrame]:
    """-> (name -> (n, 2) embedding, positions (n, 2), frame) of :class:`reproduce.studies.FeatureSpace` results (Figures 3 and S1).

    column: what tells the detectors apart, written with ``words``; the spaces' own names (PatchCore, epoch n) where left out.
    """
    spaces, positions, rows = {}, np.zeros((1, 2), int), []
    for task, result in grid.pairs():
        positions = result.arrays["positions"]
        for name, r2 in result.metrics["position_r2"].items():
            shown = words.format(task.columns()[column]) if column else name
            spaces[shown] = result.arrays[name]
            rows.append({"method": shown, "category": task.category, "seed": task.config.seed, "position_r2": r2})
    return spaces, positions, pd.DataFrame(rows)


def stars(grid: Grid) -> pd.DataFrame:
    """Frame of ``star``: the share of the defective images in which the highest point of the map lies within the ground truth."""
    rows = []
    for entry, result in grid.pairs():
        of = {"method": entry.method, "category": entry.category, "seed": entry.config.seed, "star": None}
        test, why = entry.data().test, "the split has no masks"
        if test.has_masks:
            masks, maps = test.load_masks(entry.transform("test")), result.maps()
            seen, why = masks.any((1, 2)), "no defect lies within the crop"  # one that is cut off cannot be hit
            hit = masks.reshape(len(masks), -1)[np.arange(len(masks)), maps.reshape(len(maps), -1).argmax(1)]
            of["star"] = float(hit[seen].mean()) if seen.any() else None
        rows.append(of | {"undefined": {} if of["star"] is not None else {"star": why}})
    return pd.DataFrame(rows)


def times(grid: Grid) -> tuple[pd.DataFrame, list[str]]:
    """-> (frame, stages): ms an image, its interquartile range, images/s, peak memory, and the ms of each stage (Table S6)."""
    names = ["method", "category", "seed", "inference_ms", "iqr_ms", "images_per_second", "peak_memory_bytes"]
    frame = grid.frame().reindex(columns=names)
    frame["peak_memory_mib"] = frame["peak_memory_bytes"].astype(float) / 2**20
    of = [{name: ms["median_ms"] for name, ms in result.metrics["stages"].items()} for result in grid.results]
    stages = pd.DataFrame(of)
    return frame.join(stages), list(stages)


def with_members(grid: Grid, store: Store) -> pd.DataFrame:
    """The frame of a grid of ensembles with a row for each of their members too, from the store (Table 6); of a single one none."""
    several = (ensemble.members for ensemble in grid.entries if len(ensemble.members) > 1)
    members: list[Entry] = list(dict.fromkeys(m for of in several for m in of))
    frame = pd.concat([run_grid(members, store, render_only=True, log=len).frame(), grid.frame()], ignore_index=True)
    return frame.sort_values(["image_size", "method"], kind="stable") if len(frame) else frame


def ways_of_eq_11(grid: Grid, store: Store) -> pd.DataFrame:
    """Frame of the ensembles' image AUROC by the ``statistics`` that Eq. 11 takes: level and deviation."""
    rows = []
    for ensemble, result in grid.pairs():
        members, undefined = [load(member, store) for member in ensemble.members], result.metrics["undefined"]
        for level, deviation in product(("image", "patch"), ("median", "mean")) if all(members) else ():
            way = Ensemble(ensemble.members, level, deviation)
            scores = np.mean([way.normalized(member)[0] for member in members], 0)
            auroc = None if "image_auroc" in undefined else image_auroc(result.labels, scores)
            of = {"statistics": f"{level} scores, {deviation} deviation", "image_auroc": auroc, "undefined": undefined}
            rows.append(ensemble.columns() | of)
    return pd.DataFrame(rows)


def anomalib_results(csv: str | Path) -> pd.DataFrame:
    """A ``results.csv`` of ``anomalib benchmark`` as :func:`reproduce.tables.compare` takes it: method, category, seed, the two AUROCs.

    Raises:
        ValueError: no such table; names the file and the columns that it lacks.
    """
    require("anomalib_results", Path(csv).is_file(), "a results.csv of anomalib's benchmark", str(csv))
    try:
        found = pd.read_csv(csv, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own are of its kind, too
        raise ValueError(f"anomalib_results: {csv} is no table: {error}") from None
    endings = {
        "method": "model.class_path", "category": "category", "image_auroc": "image_AUROC", "pixel_auroc": "pixel_AUROC",
    }  # fmt: skip
    columns = {name: [c for c in found if c.endswith(end)] for name, end in endings.items()}
    if missing := [endings[name] for name, there in columns.items() if not there]:
        raise ValueError(f"anomalib_results: {csv} has no column {', '.join(missing)}; it has {', '.join(found)}")
    frame = pd.DataFrame({name: found[there[0]] for name, there in columns.items()}).assign(seed=0)
    frame["method"] = frame["method"].str.rpartition(".")[2] + " (anomalib's own run)"
    rates = frame[["image_auroc", "pixel_auroc"]].apply(pd.to_numeric, errors="coerce")
    fits = bool(((rates >= 0) & (rates <= 1)).to_numpy().all()) and not frame.duplicated(["method", "category"]).any()
    require(f"anomalib_results: {csv}", fits, "one row for each method and category, AUROCs from 0 to 1", len(frame))
    return frame.assign(**rates)


# ---- what figures show ----

NOTHING = (None, np.zeros((0, 1, 1), bool), {}, {}, [])


def shown_maps(grid: Grid, per_kind: int = 1, images: bool = True) -> tuple:
    """Images of each kind of defect (the last ones in their folders), and the maps of every method (Fig. 5 and S5).

    grid: of one category and seed. images: False leaves the images themselves out.

    Returns: what :func:`reproduce.figures.score_maps` draws: images (n, S, S, 3) uint8 or None, masks (n, S, S) bool, method ->
        maps, method -> threshold, titles.
    """
    if not grid.entries:
        return NOTHING
    entry, test = grid.entries[0], grid.entries[0].data().test
    kinds = sorted(set(test.defects) - {"good"})
    chosen = [i for kind in kinds for i in [i for i, k in enumerate(test.defects) if k == kind][-per_kind:]]
    if not chosen:
        return NOTHING
    transform = entry.transform("test")
    pixels = np.stack([transform.image(test.paths[i]) for i in chosen])
    empty = np.zeros(pixels.shape[1:3], bool)
    masks = [transform.mask(test.masks[i], test.paths[i]) if test.masks[i] else empty for i in chosen]
    results = {_shown_as(task): result for task, result in grid.pairs()}
    maps = {name: result.maps(chosen) for name, result in results.items()}
    found = {name: result.metrics["f1_threshold_pixel"] for name, result in results.items()}
    thresholds = {name: threshold for name, threshold in found.items() if threshold is not None}
    titles = [test.defects[i].replace("_", " ") for i in chosen]
    return pixels if images else None, np.stack(masks), maps, thresholds, titles


def _shown_as(task) -> str:
    columns = task.columns()
    return f"refined, {columns['simulation']}" if columns["refinement"] == "with" else columns["method"]


def one_of_each(grid: Grid, methods: Sequence[str] = ("ReConPatch",), some: int = 1, images: bool = True) -> tuple:
    """Defective images of every category that has one, each of another kind, with the maps of these methods (Fig. S3, S4).

    grid: of one seed. Returns: what :func:`reproduce.figures.score_map_sheet` draws, as :func:`shown_maps`.
    """
    chosen = grid.where(method=set(methods))
    of = {c: shown_maps(chosen.where(category={c})) for c in dict.fromkeys(entry.category for entry in chosen.entries)}
    of = {category: shown for category, shown in of.items() if len(shown[1]) and set(shown[2]) == set(methods)}
    if not of:
        return NOTHING
    pixels, masks, maps, at, kinds = zip(*of.values(), strict=True)
    pixels, masks = (np.concatenate([a[:some] for a in arrays]) for arrays in (pixels, masks))
    maps = {method: np.concatenate([found[method][:some] for found in maps]) for method in methods}
    titles = [f"{category}: {kind}" for category, names in zip(of, kinds, strict=True) for kind in names[:some]]
    thresholds = [of_all for of_all, names in zip(at, kinds, strict=True) for _ in names[:some]]
    return pixels if images else None, masks, maps, thresholds, titles
