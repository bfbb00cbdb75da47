"""From patch scores to a map as large as the image, and Eq. 11, which brings the scores of several detectors to one scale."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from rcp.checks import require


def score_maps(scores: Tensor, size: int | tuple[int, int], blur: float) -> np.ndarray:
    """scores: (n, h, w) -> (n, S, S) float32: bilinear to the crop's size S (or height and width), then a Gaussian of σ ``blur`` pixels.

    Both are linear and act on each axis by itself, so a map is A_h s A_wᵀ.
    """
    require("scores", scores.ndim == 3 and scores.numel() > 0, "(n, h, w)", tuple(scores.shape))
    sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
    fits = len(sizes) == 2 and all(0 < n <= 2**15 for n in sizes)
    require("size", fits, "one or two sides of 1 to 32768 pixels", size)
    require("blur", blur <= 2**15, "at most 32768 pixels", blur)
    rows, columns = (axis_operator(n, s, blur).to(scores) for n, s in zip(scores.shape[1:], sizes, strict=True))
    return (rows @ scores @ columns.T).cpu().numpy()


@lru_cache
def axis_operator(side: int, size: int, blur: float) -> Tensor:
    """(size, side) float64: bilinear interpolation of one axis, then scipy's Gaussian (4 σ to each side, mirrored at the border)."""
    units = torch.eye(side, dtype=torch.float64)[None]
    linear = torch.nn.functional.interpolate(units, size=size, mode="linear", align_corners=False)[0].T.numpy()
    return torch.from_numpy(gaussian_filter1d(linear, blur, axis=0) if blur else linear)


Deviation = Literal["median", "mean"]


def center_and_deviation(train_scores: np.ndarray, deviation: Deviation = "median") -> tuple[float, float]:
    """median and MAD of Eq. 11, over scores of the training set: any shape -> (units of the score, the same).

    deviation: MAD is the "median" or the "mean" absolute deviation from the median. The paper's words say mean; its β = 1.4826
    is the constant that makes the *median* one a standard deviation of normal scores (the mean's is 1.2533).
    """
    scores = np.asarray(train_scores, np.float64)
    require("train_scores", scores.size > 0 and np.isfinite(scores).all(), "one finite score or more", train_scores)
    median = np.median(scores)
    return float(median), float(getattr(np, deviation)(np.abs(scores - median)))


def modified_z_score(scores: np.ndarray, median: float, mad: float, beta: float = 1.4826) -> np.ndarray:
    """Eq. 11: s̄ = (s - median) / (β · MAD). Any shape -> the same, float32, in standard deviations.

    Raises:
        ValueError: MAD is 0 (half or more of the training scores are equal), so that Eq. 11 divides by zero.
    """
    require("mad", mad > 0, "a deviation above 0 of the training scores (Eq. 11 divides by it)", mad)
    return ((np.asarray(scores, np.float64) - median) / (beta * mad)).astype(np.float32)
