"""The memory bank M and the anomaly scores of patches and images (Sec. 3.3): Eq. 9 and 10."""

from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from rcp import fast
from rcp.checks import require
from rcp.fast import search


def nearest_entries(queries: Tensor, entries: Tensor, k: int = 1) -> Tensor:
    """Indices of the k nearest entries by Euclidean distance, nearest first: exact.

    queries: (n, D), entries: (M, D) float32, same device -> (n, k) int64. By faiss on a CPU, where it is there; by torch on a GPU.
    """
    fits = queries.ndim == entries.ndim == 2 and queries.shape[1] == entries.shape[1]
    require("queries, entries", fits, "(n, D) and (M, D)", (tuple(queries.shape), tuple(entries.shape)))
    require("k", k <= len(entries), f"at most {len(entries)} (the entries of the memory bank)", k)
    if queries.device.type == "cpu" and (faiss := _faiss()):
        return torch.from_numpy(faiss.knn(queries.contiguous().numpy(), entries.contiguous().numpy(), k)[1])
    centred = entries - (mean := entries.mean(0))
    norms, some = centred.square().sum(1), max(1, 2**26 // len(entries))  # 256 MB of distances at a time
    parts = (torch.addmm(norms, part - mean, centred.T, alpha=-2) for part in queries.split(some))
    return torch.cat([d2.argmin(1, keepdim=True) if k == 1 else d2.topk(k, largest=False).indices for d2 in parts])


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
        b: size of N_b(r*), r* among them; at most M.
    """

    def __init__(self, entries: Tensor, b: int):
        require("entries", entries.ndim == 2 and entries.numel() > 0, "patches (M, D)", tuple(entries.shape))
        self.entries, self.b = entries.float().contiguous(), min(b, len(entries))
        large = entries.device.type == "cpu" and len(entries) >= search.IN_CELLS
        self._quick = search.Cells(self.entries) if large and fast.usable() else None

    @cached_property
    def neighbourhood(self) -> Tensor:
        """(M, b) int64: N_b(r) of each entry r; r stands first, also where duplicates are as near."""
        found = nearest_entries(self.entries, self.entries, self.b)
        own = torch.arange(len(found), device=found.device)[:, None]
        other = found != own
        other &= other.cumsum(1) <= self.b - 1  # b others are found where duplicates take the place of r: keep b - 1
        return torch.cat([own, found[other].reshape(len(found), self.b - 1)], 1)

    def nearest(self, queries: Tensor) -> Tensor:
        """Eq. 9: index of r* = argmin_{r ∈ M} D(f(p), r). queries: (n, D) float32 -> (n,) int64."""
        found = self._quick.nearest(queries) if self._quick else None
        return nearest_entries(queries, self.entries)[:, 0] if found is None else found

    def distances(self, queries: Tensor, index: Tensor) -> Tensor:
        """D(f(p), M[index]). queries: (n, D), index: (n, j) -> (n, j); by differences, so that it is 0 for an entry itself."""
        columns = [(queries - self.entries[column]).square().sum(1) for column in index.T]  # (n, D) at a time
        return torch.stack(columns, 1).sqrt()


def patch_scores(queries: Tensor, bank: MemoryBank, weighting: Literal["patches", "none"] = "patches") -> Tensor:
    """Eq. 9 and 10: s = (1 - e^{D(f(p), r*)} / Σ_{r' ∈ N_b(r*)} e^{D(f(p), r')}) · D(f(p), r*), for every patch.

    queries: (n, D) = f(p) -> (n,) float32. ``weighting="none"`` is D(f(p), r*) alone, which
    also serves where N_b(r*) is r* alone (``b`` is 1, or M a single entry), for which Eq. 10 would be 0.
    """
    width = bank.entries.shape[1]
    require("queries", queries.ndim == 2 and queries.shape[1] == width, f"(n, {width})", tuple(queries.shape))
    nearest = bank.nearest(queries := queries.float())
    d = bank.distances(queries, nearest[:, None])[:, 0]
    if weighting == "none" or bank.b == 1:
        return d
    around = bank.distances(queries, bank.neighbourhood[nearest])  # (n, b)
    return (1 - torch.exp(d - around.logsumexp(1))) * d


def image_scores(scores: Tensor) -> Tensor:
    """Image score = max over patches. scores: (n, h · w) -> (n,)."""
    require("scores", scores.ndim == 2 and scores.numel() > 0, "(n, h · w)", tuple(scores.shape))
    return scores.amax(1)
