"""Metrics against literal transcriptions of their definitions, their invariances, and every way to be undefined."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from rcp.metrics import (
    UndefinedMetric,
    aupro,
    d_prime,
    evaluate,
    f1_threshold,
    image_auroc,
    normal_threshold,
    pixel_auroc,
)

thorough = settings(max_examples=60)


@st.composite
def small_maps(draw, levels=6):
    """masks (n, h, w) with both classes, maps (n, h, w) float32 of a few whole values, so that ties abound."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7)))
    masks = draw(hnp.arrays(bool, shape))
    assume(masks.any() and not masks.all())
    maps = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, levels)))
    return masks, maps.astype(np.float32)


@st.composite
def small_scores(draw):
    """labels (n,) with both classes, scores (n,) float32 with ties."""
    n = draw(st.integers(2, 25))
    labels = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 1)))
    assume(0 < labels.sum() < n)
    return labels, draw(hnp.arrays(np.int64, n, elements=st.integers(-4, 4))).astype(np.float32)


def literal_aupro(masks, maps, limit):
    """Every threshold, every region: overlap, false positive rate, then the trapezoids up to the limit."""
    regions = []
    for i, mask in enumerate(masks):
        components, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(i, components == c) for c in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        found = maps >= threshold
        rates.append(found[~masks].mean())
        overlaps.append(np.mean([found[i][region].mean() for i, region in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        if x0 < limit < x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@thorough
@given(small_maps(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_aupro_is_the_literal_integral(case, limit):
    masks, maps = case
    assert aupro(masks, maps, limit) == pytest.approx(literal_aupro(masks, maps, limit), abs=1e-12)


def test_aupro_joins_pixels_that_touch_at_a_corner():
    """Three pixels on a diagonal, two found, and one alone, missed: (2/3 + 0) / 2 with 8 neighbours, 2/4 with 4."""
    masks = np.zeros((1, 9, 9), bool)
    masks[0, [0, 1, 2, 8], [0, 1, 2, 8]] = True
    maps = np.ones((1, 9, 9), np.float32)
    maps[0, [0, 1, 2, 8], [0, 1, 2, 8]] = [2, 2, 0, 0]
    assert aupro(masks, maps) == pytest.approx((2 / 3 + 0) / 2)


@thorough
@given(small_maps())
def test_perfect_maps_reach_one_and_inverted_maps_zero(case):
    masks, maps = case
    perfect = maps + 100 * masks
    for area in (aupro, pixel_auroc):
        assert area(masks, perfect) == pytest.approx(1, abs=1e-12) and area(masks, perfect) <= 1
        assert area(masks, -perfect) == pytest.approx(0, abs=1e-12)


@thorough
@given(small_scores())
def test_image_auroc_is_the_chance_that_a_defective_image_scores_higher(case):
    labels, scores = case
    normal, defective = scores[labels == 0], scores[labels == 1]
    wins = (defective[:, None] > normal).mean() + (defective[:, None] == normal).mean() / 2
    assert image_auroc(labels, scores) == pytest.approx(wins, abs=1e-12)
    assert image_auroc(labels, -scores) == pytest.approx(1 - wins, abs=1e-12)
    assert image_auroc(labels, np.full(len(labels), 3.0)) == 0.5


@thorough
@given(small_maps(), small_scores())
def test_auroc_is_scikit_learns(pixels, images):
    for auroc, (labels, scores) in ((pixel_auroc, pixels), (image_auroc, images)):
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels.ravel(), scores.ravel()), abs=1e-12)


def literal_f1(labels, found):
    hits, alarms, missed = (found & labels).sum(), (found & ~labels).sum(), (~found & labels).sum()
    return 2 * hits / (2 * hits + alarms + missed)


@thorough
@given(small_scores())
def test_f1_threshold_is_the_best_of_all_thresholds(case):
    labels, scores = case[0] == 1, case[1]
    threshold, best = f1_threshold(labels, scores)
    assert best == literal_f1(labels, scores >= threshold)
    every = [(literal_f1(labels, scores >= t), t) for t in np.unique(scores)]
    assert best == max(every)[0]
    assert threshold == min(t for f1, t in every if f1 == best)  # the lowest among equals


def test_normal_threshold_solves_eq_11():
    scores = np.array([1, 2, 3, 4, 100], np.float32)  # median 3, deviations 2 1 0 1 97: MAD 1, their mean 20.2
    assert normal_threshold(scores) == pytest.approx(3 + 3.5 * 1.4826)
    threshold = normal_threshold(scores, z=2, beta=1.25)
    assert (threshold - 3) / (1.25 * 1) == pytest.approx(2)


@thorough
@given(small_scores())
def test_d_prime_is_eq_12(case):
    labels, scores = case
    normal, defective = scores[labels == 0].tolist(), scores[labels == 1].tolist()

    def moments(values):
        mean = sum(values) / len(values)
        return mean, sum((v - mean) ** 2 for v in values) / len(values)

    (mean_n, var_n), (mean_a, var_a) = moments(normal), moments(defective)
    assume(len({*normal}) > 1 or len({*defective}) > 1)
    expected = abs(mean_a - mean_n) / ((var_a + var_n) / 2) ** 0.5
    assert d_prime(normal, defective) == pytest.approx(expected)
    assert d_prime(defective, normal) == pytest.approx(expected)


@pytest.mark.parametrize("compute, reason", [
    (lambda: image_auroc([0, 0], [0.1, 0.2]), "no defective images"),
    (lambda: image_auroc([1, 1], [0.1, 0.2]), "no normal images"),
    (lambda: image_auroc([], []), "no defective images"),
    (lambda: f1_threshold([1, 1], [0.1, 0.2]), "no normal images"),
    (lambda: pixel_auroc(np.zeros((1, 2, 2), bool), np.ones((1, 2, 2))), "no defective pixels"),
    (lambda: aupro(np.ones((1, 2, 2), bool), np.ones((1, 2, 2))), "no normal pixels"),
    (lambda: d_prime([], [1.0, 2.0]), "1 normal images, found 0"),
    (lambda: d_prime([1.0, 2.0], [3.0], ddof=1), "2 defective images, found 1"),
    (lambda: d_prime([0.1] * 3, [0.7] * 3), "spread"),
    (lambda: normal_threshold([0.5]), "at least two, found 1"),
])  # fmt: skip
def test_what_is_undefined_says_why(compute, reason):
    with pytest.raises(UndefinedMetric, match=reason):
        compute()


@pytest.mark.parametrize("compute, message", [
    (lambda: image_auroc([0, 1, 1], [0.1, 0.2]), r"scores: expected the shape of labels \(3,\), got \(2,\)"),
    (lambda: image_auroc([0, 2], [0.1, 0.2]), "labels: expected 0 .* and 1 .*, got .2"),
    (lambda: image_auroc([0, 1, 1], [0.1, 0.2, np.nan]), "scores: NaN or infinite at index 2"),
    (lambda: pixel_auroc(np.eye(2)[None] > 0, np.ones((1, 3, 3))), r"maps: .* \(1, 2, 2\), got \(1, 3, 3\)"),
    (lambda: pixel_auroc(255 * np.eye(2, dtype=np.uint8)[None], np.ones((1, 2, 2))), "masks: .*got .255"),
    (lambda: aupro(np.eye(2)[None] > 0, np.full((1, 2, 2), np.inf)), "maps: NaN or infinite at index 0"),
    (lambda: aupro(np.eye(2) > 0, np.ones((2, 2))), r"expected shape \(n, H, W\), got \(2, 2\)"),
    (lambda: aupro(np.eye(2)[None] > 0, np.ones((1, 2, 2)), limit=30), "limit: .* got 30"),
    (lambda: normal_threshold([0.1, np.nan]), "train_scores: NaN or infinite at index 1"),
    (lambda: d_prime([0.1, 0.2], [np.inf]), "scores_defective: NaN or infinite at index 0"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(compute, message):
    with pytest.raises(ValueError, match=message) as caught:
        compute()
    assert not isinstance(caught.value, UndefinedMetric)


# evaluate, on small stand-ins for a prediction and a split

SIZE = 12
NAMES = {
    *("image_auroc", "pixel_auroc", "aupro", "d_prime", "f1_threshold", "f1", "f1_threshold_pixel", "f1_pixel"),
    *("normal_threshold", "normal_threshold_false_positive_rate", "normal_threshold_true_positive_rate"),
    *("n_normal", "n_defective", "n_masks_cropped_away", "undefined"),
}
PIXEL_NAMES = {"pixel_auroc", "aupro", "f1_threshold_pixel", "f1_pixel"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def case(rng):
    """(prediction, split, masks): 5 normal and 5 defective images with a region each, separated but not perfectly."""
    labels = np.array([0, 1] * 5)
    masks = np.zeros((10, SIZE, SIZE), bool)
    masks[labels == 1, 2:6, 3:7] = True
    maps = (rng.random(masks.shape) + 0.5 * masks).astype(np.float32)
    scores = (rng.random(10) + 0.5 * labels).astype(np.float32)
    asked = []

    def load_masks(transform):
        asked.append(transform)
        return masks

    paths = tuple(Path(f"test/{'broken' if label else 'good'}/{i:03}.png") for i, label in enumerate(labels))
    split = SimpleNamespace(paths=paths, labels=labels, has_masks=True, load_masks=load_masks, asked=asked)
    train_scores = np.linspace(0, 0.5, 20, dtype=np.float32)
    prediction = SimpleNamespace(scores=scores, maps=maps, transform="a transform", train_scores=train_scores)
    return prediction, split, masks


def assert_undefined(report, names, reason):
    """Exactly these names are None, each with this reason, and the report is strict JSON (so without NaN)."""
    assert set(report) == NAMES
    assert {name for name, value in report.items() if value is None} == set(report["undefined"]) == set(names)
    assert all(reason in report["undefined"][name] for name in names)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_evaluate_reports_each_metric_under_its_name(case):
    prediction, split, masks = case
    scores, maps, defective = prediction.scores, prediction.maps, split.labels == 1
    report = evaluate(prediction, split)
    assert_undefined(report, [], "")
    assert split.asked == ["a transform"]  # the masks go through the transform of the images
    assert report["image_auroc"] == image_auroc(split.labels, scores)
    assert report["d_prime"] == d_prime(scores[~defective], scores[defective])
    assert (report["f1_threshold"], report["f1"]) == f1_threshold(split.labels, scores)
    assert report["pixel_auroc"] == pixel_auroc(masks, maps)
    assert report["aupro"] == aupro(masks, maps, 0.3)
    assert (report["f1_threshold_pixel"], report["f1_pixel"]) == f1_threshold(masks, maps)
    assert report["normal_threshold"] == normal_threshold(prediction.train_scores)
    assert (report["n_normal"], report["n_defective"], report["n_masks_cropped_away"]) == (5, 5, 0)


def test_copies_of_one_training_image_give_no_threshold(case):
    prediction, split, _ = case
    prediction.train_scores = np.array([0.0, 0, 0, 0, 1])
    report = evaluate(prediction, split)
    assert report["normal_threshold"] is None and "no spread" in report["undefined"]["normal_threshold"]


def test_evaluate_rates_the_normal_threshold(case):
    prediction, split, _ = case
    prediction.train_scores, prediction.scores = np.array([0.3, 0.4, 0.5]), prediction.scores.astype(np.float64)
    threshold = normal_threshold(prediction.train_scores)
    prediction.scores[split.labels == 0] = [0.1, 0.2, 0.3, 0.4, threshold]  # at the threshold counts as defective
    prediction.scores[split.labels == 1] = [0.9, 1.1, 1.2, 1.3, 0.1]
    report = evaluate(prediction, split)
    assert report["normal_threshold"] == threshold == pytest.approx(0.4 + 3.5 * 1.4826 * 0.1)
    assert report["normal_threshold_false_positive_rate"] == pytest.approx(1 / 5)
    assert report["normal_threshold_true_positive_rate"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("only, missing, rate", [(0, "defective", "true"), (1, "normal", "false")])
def test_evaluate_one_class_only(case, only, missing, rate):
    prediction, split, masks = case
    split.labels = np.full(10, only)
    masks[:] = only
    image_names = {"image_auroc", "d_prime", "f1_threshold", "f1", f"normal_threshold_{rate}_positive_rate"}
    report = evaluate(prediction, split)
    assert_undefined(report, image_names | PIXEL_NAMES, f"{missing} ")
    assert report["normal_threshold"] is not None


def test_evaluate_without_masks_keeps_the_image_metrics(case):
    prediction, split, _ = case
    split.has_masks = False
    assert_undefined(evaluate(prediction, split), PIXEL_NAMES | {"n_masks_cropped_away"}, "the split has no masks")
    assert split.asked == []


def test_evaluate_without_maps_keeps_the_image_metrics(case):
    prediction, split, _ = case
    prediction.maps = None
    assert_undefined(evaluate(prediction, split), PIXEL_NAMES | {"n_masks_cropped_away"}, "the prediction has no maps")


def test_evaluate_counts_masks_that_the_crop_removed(case):
    prediction, split, masks = case
    masks[[1, 3]] = False
    report = evaluate(prediction, split)
    assert report["n_masks_cropped_away"] == 2
    assert report["n_defective"] == 5  # still defective images
    assert report["pixel_auroc"] == pixel_auroc(masks, prediction.maps)


def test_evaluate_without_training_scores(case):
    prediction, split, _ = case
    names = {name for name in NAMES if name.startswith("normal_threshold")}
    for train_scores in (None, np.zeros(0, np.float32)):
        prediction.train_scores = train_scores
        report = evaluate(prediction, split)
        assert_undefined(report, names, "")
        assert "training" in report["undefined"]["normal_threshold"]


@pytest.mark.parametrize("what", ["scores", "maps"])
def test_evaluate_names_both_numbers_when_they_differ(case, what):
    prediction, split, _ = case
    setattr(prediction, what, getattr(prediction, what)[:7])
    with pytest.raises(ValueError, match=f"{what}: .*10 images.* got 7"):
        evaluate(prediction, split)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["scores", "maps"])
def test_evaluate_names_the_image_of_a_bad_number(case, what, bad):
    prediction, split, _ = case
    np.ravel(getattr(prediction, what)[7:8])[-1] = bad  # a view: the last pixel of image 7, or its score
    with pytest.raises(ValueError, match=rf"{what}: .*index 7 \(test/broken/007.png\); 1 of 10"):
        evaluate(prediction, split)
