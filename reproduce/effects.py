"""Does a choice change the result by more than chance? Differences beside three kinds of noise, and answers by rule.

The noise: which images the test set happens to hold (95 % bootstrap interval), the seeds of f, and where the greedy coreset begins.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from reproduce.studies import HeldOut
from reproduce.tables import AUROC, COLUMNS, METRICS, compare, paired, with_all_categories

RULE = """A difference counts where all three agree: the bootstrap interval over test images leaves zero out; it is more than two
standard deviations of the seeds' own differences; and, where the bank is a coreset, more than two of the coreset's noise
(PatchCore with 1 %, begun at random patches). With one seed there is no deviation, and that kind is not asked."""
PAIRS = [("ReConPatch", "random f"), ("ReConPatch", "PatchCore"), ("random f", "PatchCore"), ("whitened", "PatchCore")]

# ---- between methods ----


def contrasts(grid, pairs: Sequence[tuple[str, str]] = PAIRS, by: Sequence[str] = ("backbone", "coreset_ratio")):
    """Rows of :func:`reproduce.tables.paired` for each pair of methods, with columns first, second, noise and answer (see RULE).

    grid: as of :func:`reproduce.grids.does_training_help`. noise: NaN where the bank is no coreset. answer: "above", "below", "within
    noise", or "equal on every draw" of the test images (as where both are at 100).
    """
    fixed, of = grid.where(coreset_start={"mean"}), noise(grid)
    rows = [paired(fixed, by, {"method": a}, {"method": b}).assign(first=a, second=b) for a, b in pairs]
    rows = pd.concat(rows, ignore_index=True)
    of = of[of["metric"] == "image_auroc"].rename(columns={"spread": "noise"})[["backbone", "kind", "row", "noise"]]
    rows = rows.merge(of.astype({"noise": float}), on=["backbone", "kind", "row"], how="left")
    rows.loc[rows["coreset_ratio"] == 1, "noise"] = np.nan
    counts, size = (rows["low"] > 0) | (rows["high"] < 0), rows["mean"].abs()
    for kind in ("spread", "noise"):
        counts &= ~(size <= 2 * rows[kind].astype(float))
    equal = (rows["low"] == 0) & (rows["high"] == 0)
    kinds = {"equal on every draw": equal, "above": counts & (rows["mean"] > 0), "below": counts}
    return rows.assign(answer=np.select(list(kinds.values()), list(kinds), "within noise"))


def starts_in_words(grid) -> str:
    """A sentence for each CNN: where the greedy bank begun at the mean stands among those begun at random patches, and the other methods
    held against the mean of these; image AUROC with 1 %, means over categories and seeds.
    """
    of, found = noise(grid, "image_auroc"), []
    frame = grid.where(coreset_start={"mean"}, coreset_ratio={0.01}).frame()
    for r in of[of["kind"] == "all"].dropna(subset="mean").to_dict("records"):
        of_cnn = frame[frame["backbone"] == r["backbone"]]
        own = {name: compare(part)["mean"].item() for name, part in of_cnn.groupby("method", sort=False)}
        if np.isnan(own.get("PatchCore", np.nan)):
            continue
        away = [f"{name} {v - r['mean']:+.2f}" for name, v in own.items() if name != "PatchCore"]
        found.append(
            f"{r['backbone']}: PatchCore with 1 % has {own['PatchCore']:.2f} begun at the mean, {r['mean']:.2f} ± {r['spread']:.2f} "
            f"begun at random ({r['seeds']} starts). Minus the latter: {', '.join(away)}."
        )
    return "\n".join(found) or "Nothing is computed yet."


def noise(grid, metric: str | Sequence[str] = AUROC) -> pd.DataFrame:
    """What the start of the coreset alone changes: rows of :func:`reproduce.tables.compare` whose spread is over the random starts.

    grid: holds :func:`reproduce.grids.coreset_noise`. Column backbone follows.
    """
    frame, parts = grid.where(coreset_start={"random"}, method={"PatchCore"}).frame(), []
    for name, part in frame.groupby("backbone", sort=False) if len(frame) else ():
        rows = compare(part, by=["backbone"], metric=metric, groups={})
        parts.append(rows.assign(backbone=name, setting=f"PatchCore, {name}, random starts"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS, "backbone"])


def noise_of_means(grid) -> dict[str, float]:
    """Metric -> standard deviation of the mean over categories, over the coreset's starts, percent points; NaN where there are none."""
    rows = noise(grid)
    of = rows[rows["kind"] == "all"].set_index("metric")["spread"].astype(float)
    return {metric: float(of.get(metric, np.nan)) for metric in AUROC}


def answers(rows: pd.DataFrame) -> str:
    """A sentence for each pair of methods: in how many comparisons the first is above, below, within noise, and what follows."""
    found = []
    for (first, second), part in rows.dropna(subset="mean").groupby(["first", "second"], sort=False):
        single, means = part[part["kind"] == "category"], part[part["kind"] == "all"]
        n = {a: (single["answer"] == a).sum() for a in ("above", "below", "within noise", "equal on every draw")}
        drawn = ((means["low"] > 0) | (means["high"] < 0)).sum()
        follows = {(True, False): "it helps", (False, True): "it hurts", (True, True): "it depends"}
        some = " in some" if 0 < n["above"] + n["below"] < len(single) else ""
        follows = follows.get((n["above"] > 0, n["below"] > 0), "no effect is shown") + some
        found.append(
            f"{first} against {second}: {follows}; {', '.join(f'{a} in {k}' for a, k in n.items())} of {len(single)} (CNN, bank, "
            f"category). Means over categories from {means['mean'].min():+.2f} to {means['mean'].max():+.2f} points, "
            f"{drawn} of {len(means)} by more than the draw of the test images."
        )
    return "\n".join(found) or "Nothing is computed yet."


def standings(grid) -> str:
    """A sentence for each of ours: its rank by mean image AUROC among the methods that have every category, and against each other method
    in how many categories it is above or below, the 95 % interval over test images leaving zero out. What is not ranked is named.
    """
    frame = grid.frame()
    if frame.empty:
        return "Nothing is computed yet."
    whole = with_all_categories(frame)
    wide = whole.astype({"image_auroc": float}).pivot_table("image_auroc", "category", "method", sort=False).dropna()
    means, found = 100 * wide.mean().sort_values(ascending=False), []
    for own in (name for name in ("ReConPatch", "PatchCore") if name in means):
        rank, beside = 1 + (means.round(2) > round(means[own], 2)).sum(), []
        for other in dict.fromkeys(name for name in frame["method"] if name != own):
            rows = paired(grid, (), {"method": own}, {"method": other})
            rows = rows[rows["kind"] == "category"]
            beside.append(f"{other} {(rows['low'] > 0).sum()} / {(rows['high'] < 0).sum()} of {len(rows)}")
        words = f"{own} is number {rank} of {len(means)} by mean image AUROC ({means[own]:.2f}, {len(wide)} categories)"
        beside = ", ".join(beside) or "no other is there"
        found.append(f"{words}; above / below by more than the draw of the test images explains: {beside}.")
    left = ", ".join(dict.fromkeys(frame["method"][~frame["method"].isin(means.index)]))
    return "\n".join([*found, *[f"Not ranked, for they lack categories: {left}."] * bool(left)])


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds (percent, but for d′), as text: a row per metric, CNN and category, a column per method and bank."""
    long = frame.melt(["backbone", "coreset_ratio", "category", "method"], [*AUROC, "aupro", "d_prime"], "metric")
    value = long["value"].astype(float) * np.where(long["metric"] == "d_prime", 1, 100)
    long = long.assign(value=value, metric=long["metric"].map(METRICS), bank=long["coreset_ratio"].map("{:.0%}".format))
    wide = long.pivot_table("value", ["metric", "backbone", "category"], ["method", "bank"], sort=False)
    return wide.map("{:.2f}".format).replace("nan", "").rename_axis([None] * 3).rename_axis([None] * 2, axis=1)


# ---- one choice at a time ----


def moves(grid, choices: Mapping[str, Sequence], defaults: Mapping) -> pd.DataFrame:
    """How far each value of each choice moves the mean over categories and seeds from the default's.

    grid: as of :func:`reproduce.grids.open_choices`.

    Returns:
        Rows of :func:`reproduce.tables.compare`, whose mean is the move in percent points; columns choice and value follow.
    """

    def part(where: Mapping) -> pd.DataFrame:
        return grid.where(method={"ReConPatch"}, **{name: {value} for name, value in where.items()}).frame()

    rows, start = [], part(defaults)
    for choice, value in ((c, v) for c, values in choices.items() for v in values if v != defaults[c]):
        own, of = part({**defaults, choice: value}), ["category", "seed"]
        if len(start) and len(own) and len(own := own.merge(start[of])):  # of what is missing, neither counts
            moved, same = compare(own, metric=AUROC), compare(start.merge(own[of]), metric=AUROC)
            moved = moved.assign(mean=moved["mean"] - same["mean"], spread=np.nan, setting=f"{choice} {value}")
            rows.append(moved.assign(choice=choice, value=str(value)))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=[*COLUMNS, "choice", "value"])


def moved_in_words(rows: pd.DataFrame, noise_: Mapping[str, float]) -> str:
    """For each metric: the choices that move it by more than two deviations of the coreset's noise, the greatest first."""
    found = []
    for metric, part in rows.dropna(subset="mean").groupby("metric", sort=False):
        largest = part.assign(size=part["mean"].abs()).sort_values("size", ascending=False).drop_duplicates("choice")
        bound = 2 * noise_[metric]
        beyond = [f"{r['setting']} ({r['mean']:+.2f})" for r in largest.to_dict("records") if not r["size"] <= bound]
        said = f"beyond the noise of ± {bound:.2f}: {', '.join(beyond) or 'none'}"
        if np.isnan(bound):
            said = f"the noise is not measured; the greatest is {beyond[0]}"
        found.append(f"{METRICS[metric]}: {len(beyond)} of {len(largest)} choices move it, {said}.")
    return "\n".join(found) or "Nothing is computed yet."


# ---- the size of the bank ----


def times(grid) -> pd.DataFrame:
    """Frame of ``inference_ms`` by the ratio of the bank, of :class:`reproduce.studies.InferenceTime` results."""
    return grid.frame().reindex(columns=["method", "category", "seed", "coreset_ratio", "inference_ms"])


def by_bank(frame: pd.DataFrame, ms: pd.DataFrame) -> pd.DataFrame:
    """Means over categories and seeds by ratio and line (method and selection): percent, MB of the bank, ms an image (NaN where not timed).

    ms: as of :func:`times`. A bank of all patches selects nothing: it ends the lines of both selections. A category and seed of which
    some banks are missing is left out, else the lines would compare different images.
    """
    if frame.empty:
        return pd.DataFrame(columns=["line", "coreset_ratio", *AUROC, "megabytes", "ms"])
    both = pd.concat([frame, frame[frame["coreset_ratio"] == 1].assign(selection="random")], ignore_index=True)
    entries = both.groupby(["category", "seed"])["method"].transform("size")
    both = both[entries == entries.max()].copy()
    both["line"] = both["method"] + ", " + both["selection"]
    both["megabytes"] = both["bank_bytes"].astype(float) / 1e6
    names = [*AUROC, "megabytes"]
    both[names] = both[names].astype(float)
    found = both.groupby(["line", "coreset_ratio"], sort=False)[names].mean().reset_index()
    found[list(AUROC)] *= 100
    of = dict(zip(ms["coreset_ratio"], ms["inference_ms"], strict=True)) if len(ms) else {}
    return found.assign(ms=found["coreset_ratio"].map(of).astype(float))


def knees(banks: pd.DataFrame, noise_: Mapping[str, float]) -> pd.DataFrame:
    """The banks of each line and metric whose mean is within two deviations of the coreset's noise of the line's best.

    banks: of :func:`by_bank`. Columns line, metric, best, at (a ratio), within (their ratios, in words), and
    "all - 1 %": what the paper's 1 % loses, in points.
    """
    rows = []
    for (line, part), metric in ((group, m) for group in banks.groupby("line", sort=False) for m in noise_):
        if part[metric].isna().all():
            continue
        best, of = part.loc[part[metric].idxmax()], part.set_index("coreset_ratio")[metric]
        there = sorted(part[part[metric] >= best[metric] - 2 * np.nan_to_num(noise_[metric])]["coreset_ratio"])
        row = {"line": line, "metric": METRICS[metric], "best": best[metric], "at": best["coreset_ratio"]}
        row |= {"within": ", ".join(map("{:.1%}".format, there))}
        rows.append(row | {"all - 1 %": of.get(1.0, np.nan) - of.get(0.01, np.nan)})
    return pd.DataFrame(rows, columns=["line", "metric", "best", "at", "within", "all - 1 %"])


def knees_in_words(found: pd.DataFrame) -> str:
    """A sentence for each line and metric."""
    words = [
        f"{r['line']}: {r['metric']} is best with {r['at']:.1%} ({r['best']:.2f}), within noise of it with {r['within']}"
        + (f"; all patches instead of 1 %: {r['all - 1 %']:+.2f}." if np.isfinite(r["all - 1 %"]) else ".")
        for r in found.to_dict("records")
    ]
    return "\n".join(words) or "Nothing is computed yet."


# ---- choosing without labels ----

CRITERIA = {
    "texture_image_auroc": "image AUROC, simulated textures", "structure_image_auroc": "image AUROC, simulated structure",
    "texture_pixel_auroc": "pixel AUROC, simulated textures", "structure_pixel_auroc": "pixel AUROC, simulated structure",
    "steadiness": "median / MAD of held-out normal scores",
}  # fmt: skip
CHOICE_RULE = """A criterion chooses where its rank correlation with the true AUROC is positive beyond chance (p < 0.05) in every category;
"no" where in none; else it depends on the category, which nobody knows without labels."""


def criteria(grid) -> pd.DataFrame:
    """A row per setting and category: the test set's image and pixel AUROC, beside what was known without labels (CRITERIA)."""
    known = {task.entry: result.metrics for task, result in grid.pairs() if isinstance(task, HeldOut)}
    rows = [
        {"category": e.category, "method": e.method, "setting": repr(e.config)} | {n: r.metrics[n] for n in AUROC} | known[e]
        for e, r in grid.pairs() if e in known
    ]  # fmt: skip
    return pd.DataFrame(rows).drop(columns="undefined") if rows else pd.DataFrame(rows)


def rank_correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ over the settings of a category, of each criterion with the AUROC it is meant for (steadiness with both).

    Returns:
        Rows of :func:`reproduce.tables.compare`, whose mean is ρ, NaN where all are alike; columns truth, settings, p and cost:
        the best setting's true AUROC minus that of the criterion's favourite, in percent points.
    """
    found = []
    for category, part in rows.groupby("category", sort=False) if len(rows) else ():
        for criterion, truth in ((k, t) for k in CRITERIA for t in AUROC):
            if criterion == "steadiness" or criterion.endswith(truth):
                some = part[[criterion, truth]].astype(float).dropna()
                alike = len(some) < 3 or (some.nunique() < 2).any()
                rho, p = (np.nan, np.nan) if alike else spearmanr(some[criterion], some[truth])
                cost = 100 * (some[truth].max() - some.loc[some[criterion].idxmax(), truth]) if len(some) else np.nan
                about = {"metric": f"ρ with {METRICS[truth]}", "setting": CRITERIA[criterion], "kind": "category"}
                about |= {"row": category, "left_out": "", "why": "all settings are alike" * bool(alike), "mean": rho}
                found.append(about | {"truth": truth, "settings": len(some), "p": p, "cost": cost})
    return pd.DataFrame(found, columns=[*COLUMNS, "truth", "settings", "p", "cost"])


def can_be_chosen(found: pd.DataFrame) -> str:
    """A sentence for each criterion by CHOICE_RULE."""
    words = []
    for (criterion, metric), part in found.dropna(subset="mean").groupby(["setting", "metric"], sort=False):
        good = (part["mean"] > 0) & (part["p"] < 0.05)
        answer = "yes" if good.all() else "no" if not good.any() else "it depends"
        words.append(
            f"{criterion}, {metric}: {answer} ({good.sum()} of {len(part)} categories; ρ {part['mean'].min():+.2f} to "
            f"{part['mean'].max():+.2f}; its favourite costs up to {part['cost'].max():.2f} points)."
        )
    return "\n".join(words) or "Nothing is computed yet."
