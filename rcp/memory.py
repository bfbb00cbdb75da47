"""The memory bank M and exact nearest-neighbour search in it (Sec. 3.3)."""

from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from rcp.leading import LeadingDirections, compiled, product

_BOUNDS = 2**22  # numbers held at a time: 16 MB


@lru_cache
def _faiss():
    """faiss, or None where it cannot be imported; the exact torch search then serves, with the same results."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def search(queries: Tensor, bank: Tensor, k: int = 1, backend: str = "auto") -> Tensor:
    """Indices of the k nearest bank entries by Euclidean distance, nearest first.

    queries: (n, D) float32, bank: (M, D) float32, same device -> (n, k) int64.

    Args:
        backend: "faiss" (exact, processor), "torch" (exact, any device), or "auto": faiss on the processor where it is
            there, torch otherwise, so that on a GPU nothing leaves the GPU.
    """
    if k > len(bank):
        raise ValueError(f"k: expected at most {len(bank)} (the entries of the memory bank), got {k}")
    if backend == "auto":
        backend = "faiss" if queries.device.type == "cpu" and _faiss() else "torch"
    if backend == "faiss":
        index = _faiss().IndexFlatL2(bank.shape[1])
        index.add(bank.numpy())
        return torch.from_numpy(index.search(queries.contiguous().numpy(), k)[1])
    centre = bank.mean(0)
    bank = bank - centre
    norms = bank.square().sum(1)
    rows = max(1, 2**26 // len(bank))  # 256 MB of distances at a time
    parts = [(norms - 2 * (part - centre) @ bank.T).topk(k, largest=False).indices for part in queries.split(rows)]
    return torch.cat(parts)


class MemoryBank:
    """M and what Eq. 10 needs of it.

    Args:
        entries: (M, D) float32, the coreset of the training f(p).
        b: size of N_b(r*).
        self_in_neighbours: r* ∈ N_b(r*).
    """

    def __init__(self, entries: Tensor, b: int, self_in_neighbours: bool = True):
        self.entries = entries.contiguous()
        self.self_in_neighbours = self_in_neighbours
        self.b = b
        self._leading = None
        if entries.device.type == "cpu" and (kernels := compiled()):
            self._leading = LeadingDirections(self.entries, size=48)  # measured: 32 leave more to compare, 96 cost more
            y = self._leading(self.entries)
            unused = -len(y) % kernels.ENTRIES  # to whole blocks
            self._minus_2y = torch.nn.functional.pad(-2 * y, (0, 0, 0, unused))
            self._squares = torch.nn.functional.pad(y.square().sum(1), (0, unused), value=torch.inf)
            longest, rounding = y.norm(dim=1).max(), 2**-23 * (y.shape[1] + 4)  # of the product: twice the worst case
            self._margins = np.array([longest, self._leading.error, rounding], np.float32)

    @cached_property
    def neighbourhood(self) -> Tensor:
        """(M, b') int64: N_b(r) of each entry r; r stands first, also where duplicates are as near, or is left out."""
        b = min(self.b, len(self.entries) - (not self.self_in_neighbours))
        found = search(self.entries, self.entries, min(b + 1, len(self.entries)))
        own = torch.arange(len(found), device=found.device)[:, None]
        others = found[_first_others(found != own, found.shape[1] - 1)].reshape(len(found), -1)
        if self.self_in_neighbours:
            return torch.cat([own, others[:, : b - 1]], 1)
        return others[:, :b]

    def nearest(self, queries: Tensor) -> Tensor:
        """Eq. 9: index of r* in M. queries: (n, D) float32 -> (n,) int64."""
        if not self._leading:
            return search(queries, self.entries)[:, 0]
        kernels, found = compiled(), []
        for x in queries.split(max(1, _BOUNDS // len(self._squares))):
            y = self._leading(x)
            bounds = product(y, self._minus_2y, self._squares)  # ‖y - r‖² - ‖y‖²
            arrays = (a.numpy() for a in (x.contiguous(), bounds, y.square().sum(1), self.entries))
            found.append(kernels.nearest(*arrays, *self._margins, kernels.threads()))
        return torch.from_numpy(np.concatenate(found))

    def distances(self, queries: Tensor, index: Tensor) -> Tensor:
        """D(f(p), M[index]) squared. queries: (n, D), index: (n, j) -> (n, j); by differences, so that it is 0 for an entry itself."""
        if self._leading:
            kernels = compiled()
            x, bank = queries.contiguous().numpy(), self.entries.numpy()
            return torch.from_numpy(kernels.squared_distances(x, bank, index.numpy(), kernels.threads()))
        d2 = torch.empty(index.shape, dtype=queries.dtype, device=queries.device)
        for column in range(index.shape[1]):  # one (n, D) difference at a time keeps memory at one copy of the queries
            d2[:, column] = (queries - self.entries[index[:, column]]).square().sum(1)
        return d2


def _first_others(different: Tensor, count: int) -> Tensor:
    """(M, k) bool -> the same with only the first ``count`` true values of a row kept."""
    return different & (different.cumsum(1) <= count)
