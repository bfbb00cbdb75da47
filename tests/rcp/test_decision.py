"""The threshold keeps its promise on fresh scores, says what few images can promise, and refuses what they cannot."""

import numpy as np
import pytest

from rcp.decision import false_alarms, threshold


@pytest.mark.parametrize(("n", "rate"), [(60, 0.05), (209, 0.01), (25, 0.1), (12, None)])
def test_false_alarms_are_on_average_at_most_the_rate_and_within_the_interval_in_19_of_20_cases(n, rate):
    rng, m = np.random.default_rng(0), 50
    low, high = false_alarms(n, rate, m)
    shares = []
    for _ in range(2000):
        scores = rng.lognormal(size=n + m)
        shares.append((scores[n:] >= threshold(scores[:n], rate)).mean())
    expected = max(0.01, 1 / (n + 1)) if rate is None else rate
    assert np.mean(shares) <= expected + 3 * np.std(shares) / 2000**0.5
    assert np.mean(shares) >= expected - 1 / (n + 1) - 3 * np.std(shares) / 2000**0.5, (
        "not lower than so many images make it"
    )
    inside = [low - 1e-9 <= share <= high + 1e-9 for share in shares]
    assert np.mean(inside) > 0.94 and (np.mean(inside) < 0.999 or high > 0.3 or low == 0)


def test_the_literal_rank_and_ties():
    scores = np.arange(1.0, 20.0)  # 19 images: rank 19 of 19 at 0.05
    assert threshold(scores, 0.05) > 19 and threshold(scores, 0.1) > 18 and threshold(scores, 0.1) < 19
    assert threshold(np.r_[scores, 19.0], 0.05) > 19, "equal scores are not flagged"
    assert threshold(scores, 1 - 1e-12) < 2, "at least the lowest score is held out"


@pytest.mark.parametrize(("scores", "rate", "words"), [
    (np.arange(60.0), 0.01, r"at least 1 / \(n \+ 1\) = 0.0164 with 60 images \(or 99 for"),
    (np.arange(60.0), 1.5, "above 0 and below 1"),
    (np.arange(60.0), 0, "above 0 and below 1"),
    (np.arange(60.0), "much", "rate: expected float or None"),
    (np.ones(60), 0.05, "normal images that differ"),
    (np.r_[np.zeros(40), np.arange(20.0)], 0.05, "normal images that differ"),
    (np.array([]), 0.05, "with 0 images"),
])  # fmt: skip
def test_what_has_no_threshold(scores, rate, words):
    with pytest.raises(ValueError, match=words):
        threshold(scores, rate)
