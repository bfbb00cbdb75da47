"""From scores to a decision: a threshold from held-out normal images at a false-alarm rate, and what so few images can promise."""

import math

import numpy as np

from rcp.checks import check_type, require

DEFAULT_RATE = 0.01


def threshold(held_out: np.ndarray, rate: float | None = None) -> float:
    """Where an image counts as defective: score >= threshold, flagging at most the share ``rate`` of normal images.

    The smallest number above the ⌈(n + 1)(1 - rate)⌉-th of the n held-out scores (split conformal): a further normal image, drawn
    as the training images were, reaches it with a probability of at most ``rate``, whatever the scores' distribution. That is a
    mean over training sets; :func:`false_alarms` gives the interval. 60 images can promise no rate below 1 / 61. Scores held
    out against smaller banks are a little high, so the rate is rather kept than reached.

    Args:
        held_out: (n,) scores of normal images, each against a bank without it.
        rate: None is 0.01, or 1 / (n + 1) where n images support no less.

    Raises:
        ValueError: a rate outside (0, 1), or one that so few images do not support; more than half of the scores are the same.
    """
    scores = np.sort(np.asarray(held_out, np.float64).ravel())
    require("held_out", (np.abs(scores) < 3e38).all(), "finite scores of float32", held_out)
    n = len(scores)
    rate = rate_of(n, rate)
    differing = "normal images that differ (a threshold needs the spread of their scores)"
    require("images", np.median(np.abs(scores - np.median(scores))) > 0, differing, f"{n} with one score")
    return float(np.nextafter(np.float32(scores[_rank(n, rate) - 1]), np.float32(np.inf)))


def rate_of(n: int, rate: float | None) -> float:
    """The rate that is meant with n held-out images: 0.01, or 1 / (n + 1) where they support no less, for None.

    Raises:
        ValueError: a rate outside (0, 1), or one that so few images do not support.
    """
    rate = max(DEFAULT_RATE, 1 / (n + 1)) if rate is None else check_rate(rate)
    enough = f"at least 1 / (n + 1) = {1 / (n + 1):.4f} with {n} images (or {math.ceil(1 / rate - 1)} for this rate)"
    require("false_alarm_rate", n >= 1 and _rank(n, rate) <= n, enough, rate)
    return rate


def check_rate(rate: float) -> float:
    """Raises ValueError where it is no share between 0 and 1."""
    rate = check_type("false_alarm_rate", float, rate)
    require("false_alarm_rate", 0 < rate < 1, "a share of the normal images, above 0 and below 1", rate)
    return rate


def false_alarms(n: int, rate: float | None, m: int) -> tuple[float, float]:
    """Between which shares of m further normal images the false alarms lie, in 95 of 100 cases: beta-binomial, n held-out scores."""
    from scipy.stats import betabinom  # a second to import, that a score does without

    k = _rank(n, rate_of(n, rate))
    low, high = betabinom(m, n + 1 - k, k).interval(0.95)
    return float(low / m), float(high / m)


def _rank(n: int, rate: float) -> int:
    return max(1, math.ceil((n + 1) * (1 - rate) - 1e-9))
