"""How well scores and maps tell defective from normal: the numbers of Sec. 4.1 and Eq. 12.

One rule for every threshold here: an image (or pixel) counts as defective where score >= threshold.
"""

import os

import numpy as np
from scipy import ndimage

from rcp.checks import check_type, require
from rcp.maps import center_and_deviation


class UndefinedMetric(ValueError):
    """The data do not define this metric; the message says why."""


def image_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve. labels: (n,) bool or 0 / 1, scores: (n,) float -> fraction in [0, 1].

    Raises:
        UndefinedMetric: one class only.
        ValueError: shapes differ, labels other than 0 and 1, a score that is NaN or infinite.
    """
    _, below, up_to, normal = _rank(*_checked(labels, scores, "labels", "scores"))
    # the share of (defective, normal) pairs in which the defective item has the higher score; equal scores count half
    return int(below.sum() + up_to.sum()) / (2 * len(below) * normal)


def pixel_auroc(masks: np.ndarray, maps: np.ndarray) -> float:
    """AUROC over all pixels of all images. masks: (n, H, W) bool, maps: (n, H, W) float -> fraction in [0, 1].

    Raises: as ``image_auroc``.
    """
    return image_auroc(*_checked(masks, maps, "masks", "maps"))


def aupro(masks: np.ndarray, maps: np.ndarray, limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a pixel false positive rate of ``limit``, divided by ``limit``.

    masks: (n, H, W) bool, maps: (n, H, W) float -> fraction in [0, 1]. As in the evaluation code of MVTec AD, regions
    are the 8-connected components of each mask, every region has the same weight, and normal pixels are counted over
    all images. Equal scores enter together, so the curve is straight across a tie: a constant map has limit / 2.

    Raises:
        UndefinedMetric: no defective or no normal pixel.
        ValueError: as ``image_auroc``; ``limit`` outside (0, 1].
    """
    require("limit", 0 < limit <= 1, "a false positive rate in (0, 1]", limit)
    masks, maps = _checked(masks, maps, "masks", "maps")
    require("masks", masks.ndim == 3, "shape (n, H, W)", masks.shape)
    order, below, up_to, normal = _rank(masks, maps)
    regions = ndimage.label(masks, structure=_IN_PLANE)[0][masks]
    weights = 1 / np.bincount(regions)[regions]  # those of one region sum to 1
    # The curve is the weighted mean of one ramp per defective pixel: it rises from 0 to 1 while the false positive rate
    # goes from the share of normal pixels above its score to the share at or above it. So the area is a mean of ramp areas.
    above = (normal - up_to) / normal
    at_or_above = (normal - below) / normal
    reached = np.clip(limit, above, at_or_above)
    width = at_or_above - above
    on_ramp = np.divide((reached - above) ** 2, 2 * width, out=np.zeros_like(width), where=width > 0)
    share = np.average(on_ramp + np.maximum(limit - at_or_above, 0), weights=weights[order]) / limit
    return min(float(share), 1.0)  # rounding must not carry a perfect result over 1


# 8 neighbours within an image, none in the next
_IN_PLANE = np.pad(np.ones((1, 3, 3), bool), ((1, 1), (0, 0), (0, 0)))


def f1_threshold(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The threshold with the best F1, and that F1. An **oracle**: chosen on the labels that it is then judged by.

    labels: any shape, bool or 0 / 1, scores: the same shape, float (images or pixels) -> (threshold in units of the
    score, F1 as a fraction). The threshold is the score of a defective item; among equal F1 it is the lowest.

    Raises: as ``image_auroc``.
    """
    labels, scores = _checked(labels, scores, "labels", "scores")
    order, below, _, normal = _rank(labels, scores)
    # Between two defective scores a lower threshold only adds false alarms, so only defective scores can be best. Of
    # equal scores the first has the right number of hits and the later ones have too few, so argmax takes the first.
    defective = len(order)
    hits = defective - np.arange(defective)
    f1 = 2 * hits / (hits + normal - below + defective)
    best = f1.argmax()
    return float(scores[labels][order[best]]), float(f1[best])


def normal_threshold(train_scores: np.ndarray | None, z: float = 3.5, beta: float = 1.4826) -> float:
    """median + z · beta · MAD of the scores of normal training images: Eq. 11's s̄ = z, solved for s.

    It uses no test data. MAD is the median absolute deviation, to which the constant 1.4826 belongs (the paper's text
    says mean); z = 3.5 is Iglewicz and Hoaglin's usual bound of the modified z-score.

    Args:
        train_scores: (n,) float, each image scored **without itself in the memory bank**: one that finds its own
            patches there scores too low.
    Returns: threshold in units of the score.
    Raises:
        UndefinedMetric: None, or fewer than two scores; no spread (MAD is 0), as of identical images.
        ValueError: a score that is NaN or infinite.
    """
    scores = np.asarray(() if train_scores is None else train_scores, dtype=np.float64).ravel()
    if len(scores) < 2:
        raise UndefinedMetric(f"a spread of training scores needs at least two, found {len(scores)}")
    _need_finite(scores, "train_scores")
    median, mad = center_and_deviation(scores)
    if not mad:
        raise UndefinedMetric("no spread: half or more of the training scores are the same (MAD is 0)")
    return float(median + z * beta * mad)


def d_prime(scores_normal: np.ndarray, scores_defective: np.ndarray, *, ddof: int = 0) -> float:
    """Eq. 12: d′ = |μ_a - μ_n| / sqrt((σ_a² + σ_n²) / 2). Scores: (n,), (m,) float -> distance in standard deviations.

    Args:
        ddof: 0 divides the squared deviations by n, 1 by n - 1; the paper does not say which.
    Raises:
        UndefinedMetric: at most ``ddof`` scores in a group, or no spread in either.
        ValueError: a score that is NaN or infinite.
    """
    means, variances = [], []
    for name, values in (("normal", scores_normal), ("defective", scores_defective)):
        scores = np.asarray(values, dtype=np.float64).ravel()
        if len(scores) <= ddof:
            raise UndefinedMetric(f"d′ needs at least {ddof + 1} {name} images, found {len(scores)}")
        _need_finite(scores, f"scores_{name}")
        means.append(scores.mean())
        # the mean of equal numbers can be off by a rounding, which would pass for a spread
        variances.append(scores.var(ddof=ddof) if np.ptp(scores) > 0 else 0.0)
    if not any(variances):
        raise UndefinedMetric("d′ divides by the spread of the scores, and neither group has any")
    return float(abs(means[1] - means[0]) / np.sqrt(np.mean(variances)))


def evaluate(prediction, split) -> dict[str, float | int | dict[str, str] | None]:
    """All metrics of a prediction on a test split, ready for JSON.

    Args:
        prediction: has scores (n,), maps (n, S, S) or None, transform, and train_scores (n_train,) or None: the
            held-out scores of the training images; perhaps paths, which must be the split's, in its order.
        split: has paths, labels (n,), has_masks and load_masks(transform) -> (n, S, S) bool.
    Returns: name -> float, int or None. Rates and areas are fractions; thresholds have the unit of the scores; ``f1``
        and ``f1_pixel`` belong to the oracle thresholds. ``n_masks_cropped_away`` counts defective images with no
        defective pixel left after the crop: they stay in the image metrics, and all their pixels count as normal.
        ``undefined`` maps each name whose value is None to the reason.
    Raises:
        ValueError: numbers of scores or maps and of images differ, or their paths, a score or map with NaN or infinity (names the
            image), maps of another shape than the masks.
    """
    require("prediction", hasattr(prediction, "scores"), "what predict gives", prediction)
    require("split", hasattr(split, "has_masks"), "dataset.test, or what has its attributes", split)
    labels, scores = _checked(split.labels, prediction.scores, "labels", "scores", split.paths)
    _check_order(getattr(prediction, "paths", ()), split.paths)
    report = {"n_normal": int((~labels).sum()), "n_defective": int(labels.sum()), "undefined": {}}
    _add(report, ["image_auroc"], image_auroc, labels, scores)
    _add(report, ["d_prime"], d_prime, scores[~labels], scores[labels])
    _add(report, ["f1_threshold", "f1"], f1_threshold, labels, scores)
    _add(report, ["normal_threshold"], normal_threshold, prediction.train_scores)
    threshold = report["normal_threshold"]
    _add(report, ["normal_threshold_false_positive_rate"], _flagged, scores[~labels], threshold, "normal")
    _add(report, ["normal_threshold_true_positive_rate"], _flagged, scores[labels], threshold, "defective")
    of_pixels = ["pixel_auroc", "aupro", "f1_threshold_pixel", "f1_pixel"]
    if prediction.maps is None or not split.has_masks:
        reason = "the prediction has no maps" if prediction.maps is None else "the split has no masks"
        _leave_out(report, [*of_pixels, "n_masks_cropped_away"], reason)
        return report
    masks, maps = _checked(split.load_masks(prediction.transform), prediction.maps, "masks", "maps", split.paths)
    report["n_masks_cropped_away"] = int((labels & ~masks.any(axis=(1, 2))).sum())
    if not masks.any():
        reason = f"the masks of all {report['n_defective']} defective images are empty after the crop"
        _leave_out(report, of_pixels, reason)
        return report
    _add(report, ["pixel_auroc"], pixel_auroc, masks, maps)
    _add(report, ["aupro"], aupro, masks, maps)
    _add(report, ["f1_threshold_pixel", "f1_pixel"], f1_threshold, masks, maps)
    return report


def _add(report: dict, names: list[str], metric, *arguments) -> None:
    """Put what the metric returns under the names, or None and the reason where it is undefined."""
    try:
        values = metric(*arguments)
        report.update(zip(names, values if isinstance(values, tuple) else (values,), strict=True))
    except UndefinedMetric as reason:
        _leave_out(report, names, str(reason))


def _leave_out(report: dict, names: list[str], reason: str) -> None:
    report.update(dict.fromkeys(names))
    report["undefined"].update(dict.fromkeys(names, reason))


def _flagged(scores: np.ndarray, threshold: float | None, kind: str) -> float:
    """Share of the scores that the threshold calls defective."""
    if threshold is None:
        raise UndefinedMetric("normal_threshold is undefined")
    if not len(scores):
        raise UndefinedMetric(f"one class only: there are no {kind} images")
    return float((scores >= threshold).mean())


def _rank(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Where the m defective items stand among the normal ones: what every metric here needs of all the scores.

    Returns: (m,) int64, the defective items by ascending score; of each in that order, the number of normal items with a
        lower score, and with the same or a lower one, both (m,) int64; how many normal items there are.
    """
    for kind, missing in (("defective", not labels.any()), ("normal", labels.all())):
        if missing:
            raise UndefinedMetric(f"one class only: there are no {kind} {'images' if labels.ndim == 1 else 'pixels'}")
    defective, normal = scores[labels], scores[~labels]
    order = defective.argsort()  # searching in order is several times faster
    normal.sort()
    below, up_to = (np.searchsorted(normal, defective[order], side) for side in ("left", "right"))
    return order, below, up_to, len(normal)


def _checked(labels, scores, labels_name: str, scores_name: str, paths=None) -> tuple[np.ndarray, np.ndarray]:
    """labels as bool, scores as float array, of one shape and finite; of the images at ``paths``, where they are given."""
    labels = np.atleast_1d(check_type(labels_name, np.ndarray, labels))
    scores = np.atleast_1d(check_type(scores_name, np.ndarray, scores))
    of = len(scores if paths is None else paths)
    require(scores_name, len(scores) == of, f"one for each of the {of} images of the split", len(scores))
    require(scores_name, labels.shape == scores.shape, f"the shape of {labels_name} {labels.shape}", scores.shape)
    if labels.dtype != bool:
        others = labels[(labels != 0) & (labels != 1)]
        require(labels_name, not len(others), "0 (normal) and 1 (defective) only", others[:1].tolist())
        labels = labels.astype(bool)
    _need_finite(scores, scores_name, paths)
    return labels, scores


def _need_finite(values: np.ndarray, name: str, paths=None) -> None:
    """Refuse NaN and infinity in values (n, ...), naming the first image."""
    bad = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if bad.any():
        i = int(bad.argmax())
        image = f" ({paths[i]})" if paths is not None else ""
        raise ValueError(f"{name}: NaN or infinite at index {i}{image}; {int(bad.sum())} of {len(bad)} are")


def _check_order(paths, expected) -> None:
    """Refuse scores of other images than the labels, or in another order; what came as pixels has no path."""
    for i, (path, other) in enumerate(zip(paths, expected, strict=False)):
        of_pixels = isinstance(path, str) and path.startswith("image ")
        same = of_pixels or os.path.realpath(path) == os.path.realpath(other)
        words = f"the split's images in its order; image {i} is {path}, the split has {other}"
        require("scores", same, words, "another")
