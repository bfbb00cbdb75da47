"""Whether a difference is more than noise, which choices move the result, where the knee is, what can be chosen without labels."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from test_entries import PATCHCORE, SMALL

from rcp import detector
from rcp.data import load_dataset
from reproduce import effects, figures, grids, tables
from reproduce.entries import Entry
from reproduce.notebook import Settings
from reproduce.run import Grid, Result, run
from reproduce.store import Store
from reproduce.studies import HeldOut

LABELS = np.repeat([0, 1], 40)


def result(scores, **metrics) -> Result:
    info = {"metrics": {"undefined": {}, **metrics}, "data": {"train": 1}}
    return Result(info, {"scores": scores, "labels": LABELS}, False)


def grid_of(pairs: list[tuple]) -> Grid:
    """(entry, result) of each."""
    return Grid([entry for entry, _ in pairs], [found for _, found in pairs], [])


def of_auroc(config, category: str, value: float) -> tuple[Entry, Result]:
    return Entry(config, "", category), result(scored(0), image_auroc=value, pixel_auroc=value)


def scored(better: float, seed: int = 0) -> np.ndarray:
    """Scores whose AUROC rises with ``better``."""
    noise = np.random.default_rng(seed).normal(size=len(LABELS))
    return noise + better * LABELS


def a_grid(gains: dict, noise: float, seeds=(0, 1), category="one") -> Grid:
    """Methods whose scores are better by so much (per seed), and a coreset whose random starts spread so much in AUROC."""
    pairs = []
    for representation, gain in gains.items():
        for seed in seeds:
            config = dataclasses.replace(SMALL, representation=representation, coreset_ratio=0.01, seed=seed)
            of = gain[seed] if isinstance(gain[seed], np.ndarray) else scored(gain[seed])
            auroc = tables.image_auroc(LABELS, of)
            pairs.append((Entry(config, "", category), result(of, image_auroc=auroc, pixel_auroc=auroc)))
    for start, value in enumerate((0.9 - noise, 0.9, 0.9 + noise)):
        config = dataclasses.replace(PATCHCORE, coreset_ratio=0.01, coreset_start="random", seed=start)
        pairs.append(of_auroc(config, category, value))
    return grid_of(pairs)


def answer_of(gains: dict, noise: float) -> pd.Series:
    rows = effects.contrasts(a_grid(gains, noise), [("ReConPatch", "random f")])
    return rows[rows["kind"] == "category"].iloc[0]


def test_a_difference_counts_only_beyond_all_three_kinds_of_noise():
    clear = answer_of({"random": (0.0, 0.0), "trained": (3.0, 3.01)}, noise=0.001)
    assert clear["answer"] == "above" and clear["low"] > 0 and clear["mean"] > 2 * clear["spread"]
    assert answer_of({"random": (3.0, 3.01), "trained": (0.0, 0.0)}, noise=0.001)["answer"] == "below"
    by_coreset = answer_of({"random": (0.0, 0.0), "trained": (3.0, 3.01)}, noise=0.3)
    assert by_coreset["answer"] == "within noise" and by_coreset["low"] > 0 and by_coreset["noise"] == pytest.approx(30)
    by_seeds = answer_of({"random": (0.0, 0.0), "trained": (0.2, 3.0)}, noise=0.001)
    assert by_seeds["answer"] == "within noise" and by_seeds["low"] > 0, "one seed won, the other did not"
    other = scored(0.3, seed=5)
    by_images = answer_of({"random": (0.0, 0.0), "trained": (other, other)}, noise=0.0)
    assert by_images["answer"] == "within noise" and by_images["low"] <= 0 < by_images["mean"]


def test_where_the_default_start_stands_among_random_ones_is_said():
    say = effects.starts_in_words(a_grid({"none": (0.0, 0.0), "trained": (3.0, 3.0)}, 0.02))
    own, trained = (100 * tables.image_auroc(LABELS, scored(gain)) for gain in (0, 3))
    assert f"has {own:.2f} begun at the mean, 90.00 ± 2.00 begun at random (3 starts)" in say
    assert say.endswith(f"Minus the latter: ReConPatch {trained - 90:+.2f}.")
    assert effects.starts_in_words(Grid([], [], [])) == "Nothing is computed yet."
    other = [
        (Entry(e.config.replace(backbone="seresnet18"), "", "one"), r)
        for e, r in a_grid({"none": (1.0, 1.0)}, 0.0).pairs()
    ]
    both = effects.starts_in_words(grid_of(a_grid({"none": (0.0, 0.0)}, 0.02).pairs() + other)).splitlines()
    assert [line.partition(":")[0] for line in both] == ["resnet18", "seresnet18"] and f"has {own:.2f} begun" in both[0]
    of_a_shard = a_grid({"trained": (3.0, 3.0)}, 0.02)
    assert effects.starts_in_words(of_a_shard) == "Nothing is computed yet.", "PatchCore's own is in another shard"


def test_a_category_may_be_called_all():
    named = a_grid({"random": (0.0, 0.0), "trained": (3.0, 3.01)}, 0.3, category="all")
    other = a_grid({"random": (0.0, 0.0), "trained": (3.0, 3.01)}, 0.001, category="two")
    grid = grid_of(named.pairs() + other.pairs())
    rows = effects.contrasts(grid, [("ReConPatch", "random f")])
    assert rows["kind"].tolist() == ["category", "category", "all"]
    assert rows["noise"].tolist() == pytest.approx([30, 0.1, 15.05])
    assert effects.noise_of_means(grid)["image_auroc"] == pytest.approx(15.05)


def test_where_pixels_have_no_truth_the_rest_stands():
    without = [(e, Result(r.info | {"metrics": r.metrics | {"pixel_auroc": None}}, r.arrays, False)) for e, r in [
        of_auroc(SMALL.replace(sigma=s), "one", 0.9 + s / 100) for s in (1.0, 2.0)
    ]]  # fmt: skip
    rows = effects.moves(grid_of(without), {"sigma": (1.0, 2.0)}, {"sigma": 1.0})
    assert [axis.get_title() for axis in figures.tornado(rows, {}).axes] == ["image AUROC"]
    banks = pd.DataFrame(
        {"line": "PatchCore", "coreset_ratio": [0.01, 0.1], "image_auroc": [1.0, 2.0], "pixel_auroc": np.nan}
    )
    assert effects.knees(banks, dict.fromkeys(tables.AUROC, 0.1))["metric"].tolist() == ["image AUROC"]


def test_only_methods_that_have_every_category_are_ranked():
    one = a_grid({"none": (0.0, 0.0), "trained": (3.0, 3.0)}, 0.0)
    two = a_grid({"none": (0.0, 0.0)}, 0.0, category="two")
    say = effects.standings(grid_of(one.pairs() + two.pairs()))
    assert say.startswith("PatchCore is number 1 of 1 by mean image AUROC") and ", 2 categories)" in say
    assert "ReConPatch 0 / 1 of 1." in say and say.endswith("Not ranked, for they lack categories: ReConPatch.")


def test_the_noise_of_a_coreset_is_none_of_a_full_bank():
    grid = a_grid({"random": (0.0, 0.0), "trained": (3.0, 3.01)}, noise=0.3)
    whole = [Entry(e.config.replace(coreset_ratio=1.0), "", "one") if e.config.linear else e for e in grid.entries]
    rows = effects.contrasts(Grid(whole, grid.results, []), [("ReConPatch", "random f")])
    assert rows["noise"].isna().all() and set(rows["answer"]) == {"above"}


def test_the_answer_follows_from_the_numbers():
    say = effects.answers(effects.contrasts(a_grid({"random": (0.0, 0.0), "trained": (3.0, 3.01)}, 0.001)))
    assert say.startswith("ReConPatch against random f: it helps; above in 1, below in 0, within noise in 0, ")
    say = effects.answers(effects.contrasts(a_grid({"random": (0.0, 0.0), "trained": (0.0, 0.0)}, 0.001)))
    assert "no effect is shown; above in 0, below in 0, within noise in 0, equal on every draw in 1 of 1" in say
    assert say.endswith("+0.00 points, 0 of 1 by more than the draw of the test images.")
    assert effects.answers(effects.contrasts(Grid([], [], []))) == "Nothing is computed yet."


def test_the_spread_is_of_the_seeds_own_differences():
    grid = a_grid({"none": (0.0, 2.0), "trained": (1.0, 3.0)}, noise=0.0)
    row = tables.paired(grid.where(coreset_start={"mean"})).iloc[0]
    of = [100 * tables.image_auroc(LABELS, scored(gain)) for gain in range(4)]
    own = of[1] - of[0], of[3] - of[2]
    assert (row["mean"], row["spread"]) == pytest.approx((np.mean(own), np.std(own, ddof=1)))


# ---- one choice at a time ----


def test_a_move_is_measured_from_the_default_the_others_unmoved():
    choices = {"sigma": (0.1, 1.0), "coreset_projection": (128, None)}
    values = {(1.0, None): 0.90, (0.1, None): 0.93, (1.0, 128): 0.85, (0.1, 128): 0.10}
    pairs = [of_auroc(SMALL.replace(sigma=s, coreset_projection=p), "one", v) for (s, p), v in values.items()]
    rows = effects.moves(grid_of(pairs), choices, {"sigma": 1.0, "coreset_projection": None})
    image = rows[rows["metric"] == "image_auroc"].set_index("setting")["mean"]
    assert image.to_dict() == pytest.approx({"sigma 0.1": 3, "coreset_projection 128": -5})
    noise = {"image_auroc": 2.0, "pixel_auroc": 0.1}
    first, second = effects.moved_in_words(rows, noise).splitlines()
    assert first == "image AUROC: 1 of 2 choices move it, beyond the noise of ± 4.00: coreset_projection 128 (-5.00)."
    assert "2 of 2 choices move it" in second
    assert "noise is not measured" in effects.moved_in_words(rows, dict.fromkeys(noise, np.nan))


def test_what_is_missing_of_a_value_does_not_count_for_the_default_either():
    """One category's default is 20 points above the other's: where that one alone is computed, the choice must not seem to gain 10."""
    values = {(1.0, "easy"): 0.99, (1.0, "hard"): 0.79, (0.1, "easy"): 0.98}
    pairs = [of_auroc(SMALL.replace(sigma=s), c, v) for (s, c), v in values.items()]
    rows = effects.moves(grid_of(pairs), {"sigma": (0.1, 1.0)}, {"sigma": 1.0})
    assert rows["mean"].tolist() == pytest.approx([-1, -1])
    about = {"method": "PatchCore", "selection": "greedy", "seed": 0, "bank_bytes": 1e6, "pixel_auroc": 0.5}
    of = [("easy", 0.1, 0.99), ("easy", 0.01, 0.98), ("hard", 0.1, 0.79)]
    frame = pd.DataFrame([about | {"category": c, "coreset_ratio": r, "image_auroc": v} for c, r, v in of])
    table = effects.by_bank(frame, pd.DataFrame()).set_index("coreset_ratio")
    assert table["image_auroc"].to_dict() == pytest.approx({0.1: 99, 0.01: 98})
    assert len(figures.against(table.reset_index(), "coreset_ratio", {"image_auroc": "%", "ms": "ms"}, {}).axes) == 1


def test_every_open_choice_is_varied_around_its_default(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    s = Settings(profile="paper", data_root=str(demo_root), seeds=(0,))
    default = s.config()
    for name, values in grids.choices(s).items():
        assert getattr(default, name) in values and len(set(values)) == len(values) >= 2, name
    moved = [e.config for e in grids.open_choices(s) if e.method == "ReConPatch"]
    base = default.replace(calibration_folds=0)
    away = [[n for n in base.names() if getattr(c, n) != getattr(base, n)] for c in moved]
    assert max(map(len, away)) == 1 and {n for names in away for n in names} == set(grids.choices(s))
    some = {e.config for e in grids.open_choices(s, only=["sigma"]) if e.method == "ReConPatch"}
    assert {c.sigma for c in some} == {0.1, 1.0, 10.0} and len(some) == 3


# ---- the size of the bank ----


def test_the_banks_within_noise_of_the_best_are_named():
    aurocs = {"image_auroc": [80, 95, 97, 94], "pixel_auroc": 90.0}
    banks = pd.DataFrame({"line": "PatchCore, greedy", "coreset_ratio": [0.001, 0.01, 0.1, 1.0], **aurocs})
    found = effects.knees(banks, {"image_auroc": 1.2, "pixel_auroc": np.nan}).set_index("metric")
    image, pixel = found.loc["image AUROC"], found.loc["pixel AUROC"]
    assert image[["at", "within"]].tolist() == [0.1, "1.0%, 10.0%"], "of all patches it is not"
    assert image["all - 1 %"] == pytest.approx(-1) and pixel["within"][:4] == "0.1%"
    words = effects.knees_in_words(found.reset_index())
    assert "within noise of it with 1.0%, 10.0%; all patches instead of 1 %: -1.00." in words


def test_a_bank_of_all_patches_ends_both_lines(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    s = Settings(profile="paper", data_root=str(demo_root), seeds=(0,), categories=("gear",))
    entries = [e for e in grids.bank(s, starts=2) if e.config.coreset_start == "mean"]
    results = [result(scored(0), image_auroc=e.config.coreset_ratio, pixel_auroc=0.5) for e in entries]
    ms = pd.DataFrame({"coreset_ratio": [1.0], "inference_ms": [7.0]})
    table = effects.by_bank(Grid(entries, results, []).frame(), ms)
    ratios = {line: sorted(part["coreset_ratio"]) for line, part in table.groupby("line")}
    assert all(of == [0.001, 0.003, 0.01, 0.03, 0.1, 1.0] for of in ratios.values())
    assert table["line"].nunique() == 4 and set(table["ms"].dropna()) == {7.0}


# ---- choosing without labels ----


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, demo_root):
    task = HeldOut(Entry(PATCHCORE, str(demo_root), "fabric"), images=8)
    return task, run(task, Store(tmp_path_factory.mktemp("runs")))


def test_what_is_held_out_is_scored_by_a_bank_without_it(held_out):
    _, found = held_out
    normal, *changed = found.arrays["scores"]
    assert len(normal) == 8 and (normal > 0).all(), "an image that filled the bank would find its own patches"
    assert (changed[0] > normal).mean() > 0.5, "a blended texture scores higher than the same image without"
    assert all((of != normal).any() for of in changed)
    assert {f"{k}_{m}" for k in ("texture", "structure") for m in tables.AUROC} < set(found.metrics)
    assert found.metrics["steadiness"] > 0 and "image_auroc" not in found.metrics, "nothing of the test set"


def test_a_trained_f_is_refused_for_it_has_seen_what_is_held_out(demo_root, tmp_path):
    with pytest.raises(ValueError, match="representation: expected none or whitened"):
        run(HeldOut(Entry(SMALL, str(demo_root), "fabric")), Store(tmp_path))


def test_a_whitening_is_of_the_other_fold_alone(demo_root, tmp_path, monkeypatch):
    seen, represent = [], detector.represent

    def counted(p, *how):
        seen.append(len(p))
        return represent(p, *how)

    monkeypatch.setattr(detector, "represent", counted)
    run(HeldOut(Entry(SMALL.replace(representation="whitened"), str(demo_root), "fabric"), 8), Store(tmp_path))
    n = len(load_dataset(demo_root, category="fabric").train)
    assert sorted(seen) == [n // 2, n - n // 2]


TRUTH = np.arange(30) / 30


def criteria_rows(**columns) -> pd.DataFrame:
    of = {"category": "one", "image_auroc": TRUTH, "pixel_auroc": TRUTH[::-1]}
    return pd.DataFrame(of | dict.fromkeys(effects.CRITERIA, 0.0) | columns)


def test_rank_correlations_and_what_the_favourite_costs():
    rows = effects.rank_correlations(criteria_rows(texture_image_auroc=TRUTH**2, structure_image_auroc=-TRUTH))
    found = rows[rows["truth"] == "image_auroc"].set_index("setting")
    good, bad = (found.loc[effects.CRITERIA[name]] for name in ("texture_image_auroc", "structure_image_auroc"))
    assert (good["mean"], good["cost"], good["settings"]) == pytest.approx((1, 0, 30))
    assert (bad["mean"], bad["cost"]) == pytest.approx((-1, 100 * 29 / 30))
    alike = found.loc[effects.CRITERIA["steadiness"]]
    assert np.isnan(alike["mean"]) and alike["why"] == "all settings are alike"
    say = effects.can_be_chosen(rows)
    assert "simulated textures, ρ with image AUROC: yes (1 of 1" in say
    assert "simulated structure, ρ with image AUROC: no (0 of 1" in say
    assert list(rows)[: len(tables.COLUMNS)] == tables.COLUMNS


def test_a_criterion_must_hold_in_every_category():
    one, two = (criteria_rows(texture_image_auroc=of, category=c) for c, of in (("one", TRUTH), ("two", -TRUTH)))
    say = effects.can_be_chosen(effects.rank_correlations(pd.concat([one, two])))
    assert "simulated textures, ρ with image AUROC: it depends (1 of 2" in say


def test_a_setting_needs_both_its_entry_and_what_is_known_without_labels(held_out):
    task, known = held_out
    truth = result(scored(1), image_auroc=0.8, pixel_auroc=0.7)
    (row,) = effects.criteria(Grid([task.entry, task], [truth, known], [])).to_dict("records")
    assert (row["image_auroc"], row["steadiness"]) == (0.8, known.metrics["steadiness"])
    assert effects.criteria(Grid([task], [known], [])).empty
    assert effects.can_be_chosen(effects.rank_correlations(pd.DataFrame())) == "Nothing is computed yet."


def test_a_setting_counts_once_whatever_the_seeds(demo_root):
    s = Settings(data_root=str(demo_root), categories=("gear",))
    once = grids.choose_without_labels(s)
    assert grids.choose_without_labels(dataclasses.replace(s, seeds=(0, 1, 2))) == once and len(once) == 8


def test_no_setting_of_the_study_trains_f(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    s = Settings(profile="paper", data_root=str(demo_root), seeds=(0,), categories=("gear",))
    tasks = grids.choose_without_labels(s)
    assert len({t.config for t in tasks}) == len(tasks) / 2 == 36 and not any(t.config.linear for t in tasks)


def test_figures_are_drawn_of_nothing_and_of_something():
    gains = {"none": (0, 0), "random": (0, 0), "trained": (1, 1.1)}
    one, two = (a_grid(gains, 0.01, category=name) for name in ("one", "two"))
    rows, both = effects.contrasts(one), effects.contrasts(grid_of(one.pairs() + two.pairs()))
    for of, expected in ((rows, ["one"]), (both, ["one", "two", "mean"])):
        axis = figures.contrasts(of).axes[0]
        assert [t.get_text() for t in axis.get_yticklabels()] == expected
    empty = Grid([], [], [])
    for figure in (
        figures.contrasts(rows[:0]), figures.tornado(effects.moves(empty, {}, {}), {}),
        figures.against(effects.by_bank(pd.DataFrame(), pd.DataFrame()), "coreset_ratio", {"ms": "ms"}, {}),
        figures.ranks(effects.criteria(empty), "image_auroc", effects.CRITERIA),
    ):  # fmt: skip
        assert "nothing is computed yet" in figure.axes[0].texts[0].get_text()


def test_all_numbers_stand_in_a_column_per_method_and_bank_and_what_is_missing_is_blank():
    of = {"backbone": "resnet18", "category": "<b>gear</b>", "pixel_auroc": 0.9, "aupro": 0.8, "d_prime": 1.5}
    methods = {"method": ["a", "b"], "coreset_ratio": [0.01, 1.0], "image_auroc": [1.0, None]}
    text = effects.table(pd.DataFrame(of | methods))
    assert list(text) == [("a", "1%"), ("b", "100%")] and len(text) == 4
    assert text.loc[("image AUROC", "resnet18", "<b>gear</b>")].tolist() == ["100.00", ""]
    assert "<b>gear" not in tables.styled(text, "").to_html()
