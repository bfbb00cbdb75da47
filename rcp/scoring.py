"""The memory bank M and the anomaly scores (Sec. 3.3): Eq. 9 to 11, image scores and score maps."""

from functools import cached_property, lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from rcp import fast
from rcp.checks import require
from rcp.fast import search


def nearest_entries(queries: Tensor, entries: Tensor, k: int = 1) -> Tensor:
    """Indices of the k nearest entries by Euclidean distance, nearest first: exact.

    queries: (n, D), entries: (M, D) float32, same device -> (n, k) int64. By faiss on a CPU, where it is there; by torch on a GPU.
    """
    require("k", k <= len(entries), f"at most {len(entries)} (the entries of the memory bank)", k)
    if queries.device.type == "cpu" and (faiss := _faiss()):
        index = faiss.IndexFlatL2(entries.shape[1])
        index.add(entries.contiguous().numpy())
        return torch.from_numpy(index.search(queries.contiguous().numpy(), k)[1])
    centred = entries - entries.mean(0)
    norms, some = centred.square().sum(1), max(1, 2**26 // len(entries))  # 256 MB of distances at a time
    parts = ((norms - 2 * (part - entries.mean(0)) @ centred.T) for part in queries.split(some))
    return torch.cat([d2.topk(k, largest=False).indices for d2 in parts])


@lru_cache
def _faiss():
    """faiss, or None where it cannot be imported (it is not packaged for every machine)."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


class MemoryBank:
    """M and what Eq. 10 needs of it.

    Args:
        entries: (M, D) float32, the coreset of the training f(p).
        b: size of N_b(r*), r* among them.
    """

    def __init__(self, entries: Tensor, b: int):
        self.entries, self.b = entries.contiguous(), b
        on_cpu = entries.device.type == "cpu"
        self._quick = search.Index(self.entries) if on_cpu and fast.usable() else None

    @cached_property
    def neighbourhood(self) -> Tensor:
        """(M, b) int64: N_b(r) of each entry r, or as many as there are; r stands first, also where duplicates are as near."""
        b = min(self.b, len(self.entries))
        found = nearest_entries(self.entries, self.entries, b)
        own = torch.arange(len(found), device=found.device)[:, None]
        other = found != own
        other &= other.cumsum(1) <= b - 1  # where duplicates crowd r out of its own b nearest, one too many
        return torch.cat([own, found[other].reshape(len(found), b - 1)], 1)

    def nearest(self, queries: Tensor) -> Tensor:
        """Eq. 9: index of r* = argmin_{r ∈ M} D(f(p), r). queries: (n, D) float32 -> (n,) int64."""
        return self._quick.nearest(queries) if self._quick else nearest_entries(queries, self.entries)[:, 0]

    def distances(self, queries: Tensor, index: Tensor) -> Tensor:
        """D(f(p), M[index]). queries: (n, D), index: (n, j) -> (n, j); by differences, so that it is 0 for an entry itself."""
        if self._quick:
            return self._quick.squared_distances(queries, index).sqrt()
        columns = [(queries - self.entries[column]).square().sum(1) for column in index.T]  # (n, D) at a time
        return torch.stack(columns, 1).sqrt()


def patch_scores(queries: Tensor, bank: MemoryBank, weighting: str = "patches") -> Tensor:
    """Eq. 9 and 10: s = (1 - e^{D(f(p), r*)} / Σ_{r' ∈ N_b(r*)} e^{D(f(p), r')}) · D(f(p), r*), for every patch.

    queries: (n, D) = f(p) -> (n,) float32. ``weighting="none"`` is D(f(p), r*) alone, which
    also serves where M holds a single entry, for which Eq. 10 would be 0.
    """
    nearest = bank.nearest(queries)
    d = bank.distances(queries, nearest[:, None])[:, 0]
    if weighting == "none" or len(bank.entries) == 1:
        return d
    around = bank.distances(queries, bank.neighbourhood[nearest])  # (n, b)
    return (1 - torch.exp(d - around.logsumexp(1))) * d


def center_and_deviation(train_scores: np.ndarray, deviation: str = "median") -> tuple[float, float]:
    """median and MAD of Eq. 11, over scores of the training set: any shape -> (units of the score, the same).

    deviation: MAD is the "median" or the "mean" absolute deviation from the median. The paper's words say mean; its β = 1.4826
    is the constant that makes the *median* one a standard deviation of normal scores (the mean's is 1.2533).
    """
    require("deviation", deviation in ("median", "mean"), "'median' or 'mean'", deviation)
    scores = np.asarray(train_scores, np.float64)
    median = np.median(scores)
    return float(median), float(getattr(np, deviation)(np.abs(scores - median)))


def modified_z_score(scores: np.ndarray, median: float, mad: float, beta: float = 1.4826) -> np.ndarray:
    """Eq. 11: s̄ = (s - median) / (β · MAD). Any shape -> the same, float32, in standard deviations.

    Raises:
        ValueError: MAD is 0 (half or more of the training scores are equal), so that Eq. 11 divides by zero.
    """
    require("mad", mad > 0, "a deviation above 0 of the training scores (Eq. 11 divides by it)", mad)
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
