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
