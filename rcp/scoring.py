"""Anomaly scores: Eq. 9 and 10, image scores and score maps (Sec. 3.3)."""

from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from rcp.memory import MemoryBank


def patch_scores(queries: Tensor, bank: MemoryBank, *, squared=False, weighting="patches") -> Tensor:
    """Eq. 9 and 10: s = (1 - e^{D(f(p), r*)} / Σ_{r' ∈ N_b(r*)} e^{D(f(p), r')}) · D(f(p), r*), for every patch.

    queries: (n, D) = f(p) -> (n,) float32. ``weighting="none"`` is D(f(p), r*) alone, which
    also serves where M holds a single entry, for which Eq. 10 would be 0.
    """
    nearest = bank.nearest(queries)
    power = 1 if squared else 0.5  # of the squared distance
    d = bank.distances(queries, nearest[:, None])[:, 0] ** power
    if weighting == "none" or bank.neighbourhood.shape[1] < 1 + bank.self_in_neighbours:
        return d
    around = bank.distances(queries, bank.neighbourhood[nearest]) ** power  # (n, b)
    return (1 - torch.exp(d - around.logsumexp(1))) * d


def center_and_deviation(train_scores: np.ndarray, deviation: str = "median") -> tuple[float, float]:
    """median and MAD of Eq. 11, over scores of the training set: any shape -> (units of the score, the same).

    deviation: MAD is the "median" or the "mean" absolute deviation from the median. The paper's words say mean; its β = 1.4826
    is the constant that makes the *median* one a standard deviation of normal scores (the mean's is 1.2533).
    """
    if deviation not in ("median", "mean"):
        raise ValueError(f"deviation: expected 'median' or 'mean', got {deviation!r}")
    scores = np.asarray(train_scores, np.float64)
    median = np.median(scores)
    return float(median), float(getattr(np, deviation)(np.abs(scores - median)))


def modified_z_score(scores: np.ndarray, median: float, mad: float, beta: float = 1.4826) -> np.ndarray:
    """Eq. 11: s̄ = (s - median) / (β · MAD). Any shape -> the same, float32, in standard deviations.

    Raises:
        ValueError: MAD is 0 (half or more of the training scores are equal), so that Eq. 11 divides by zero.
    """
    if not mad > 0:
        raise ValueError(f"mad: expected a deviation above 0 of the training scores, got {mad}; Eq. 11 divides by it")
    return ((np.asarray(scores, np.float64) - median) / (beta * mad)).astype(np.float32)


def image_scores(scores: Tensor) -> Tensor:
    """Image score = max over patches. scores: (n, h · w) -> (n,)."""
    return scores.amax(1)


def score_maps(scores: Tensor, size: int, blur: float) -> np.ndarray:
    """scores: (n, h, w) -> (n, size, size) float32: bilinear to the crop's size, then a Gaussian of σ ``blur`` pixels.

    Both are linear and act on each axis by itself, so a map is A_h s A_wᵀ.
    """
    rows, columns = (_axis_operator(side, size, blur).to(scores) for side in scores.shape[1:])
    return (rows @ scores @ columns.T).cpu().numpy()


@lru_cache
def _axis_operator(side: int, size: int, blur: float) -> Tensor:
    """(size, side) float64: bilinear interpolation of one axis, then scipy's Gaussian (4 σ to each side, mirrored at the border)."""
    units = torch.eye(side, dtype=torch.float64)[None]
    linear = torch.nn.functional.interpolate(units, size=size, mode="linear", align_corners=False)[0].T.numpy()
    return torch.from_numpy(gaussian_filter1d(linear, blur, axis=0) if blur else linear)
