"""The quick twins of greedy selection and of exact search: distances are bounded from few numbers before they are computed.

The plain algorithms compare every patch with every pick, and every query with every entry. On a CPU these skip what cannot matter, and
find the same:

- A patch's distance to its nearest pick only shrinks. What is held of it (``near``) may therefore be old, that is too large, as long as
  it is brought up to date before the patch is picked; a patch whose old value is under another's true one waits (lazy evaluation).
- Bringing a patch up to date, a pick counts only if it is nearer than ``near``. The distance in the leading principal directions and
  of the lengths of what they leave over is never larger than the true one (a rotation keeps distances), so most picks are ruled out by it.

Selection: 86 times as fast as anomalib's, 1.4 s instead of 119 s for 163,856 × 512; on an H200, as a CUDA graph, 5,563 picks a second.
Search: 3.6 times as fast as faiss's exact one; among 163,856 entries, which lie in cells around a thousand of them, up to 4.8 times,
and never over 1.25 times as slow.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rcp.fast import captured

CHUNK = 8192  # rows at a time where a whole copy would double the memory
_BOUNDS = 2**22  # numbers held at a time: 16 MB
IN_CELLS = 20_000  # entries from which on cells are quicker than a bound of each


@lru_cache
def _kernels():
    from rcp.fast import kernels  # numba takes half a second to import

    return kernels


def pays(x: Tensor, count: int) -> bool:
    """Whether the quick selection is quicker: always on a GPU; on a CPU from 400,000 distances on (6,400 patches, 64 picks)."""
    return x.is_cuda or len(x) * count >= 400_000


def greedy_k_center(x: Tensor, count: int, first: Tensor, among: Tensor | None = None) -> Tensor:
    """Twin of the loop in :func:`rcp.coreset.greedy_k_center`: x (N, D) float32, first: () -> (count,) int64 picks."""
    if x.is_cuda:
        return _greedy_step_by_step(x, count, first, among)
    leading = LeadingDirections(x, among)
    y = leading(x)
    error = 2 * leading.error * y.norm(dim=1).max().item()
    near = np.full(len(x), np.inf, np.float32)
    if among is not None:
        near[~among.numpy()] = -1
    kernels, arrays = _kernels(), (x.contiguous().numpy(), y.numpy(), near)
    return torch.from_numpy(kernels.lazy_greedy(*arrays, count, int(first), np.float32(error), kernels.threads()))


def _greedy_step_by_step(x: Tensor, count: int, first: Tensor, among: Tensor | None) -> Tensor:
    """The plain loop without waiting for the device: on a GPU one step is captured as a CUDA graph and replayed for each pick."""
    x = x - x.mean(0)  # distances stay, and small ones keep their digits
    norms = x.square().sum(1)
    near = torch.full_like(norms, torch.inf)
    if among is not None:
        near[~among] = -1
    picks = torch.empty(count, dtype=torch.int64, device=x.device)
    pick, number = first.reshape(1).clone(), torch.zeros(1, dtype=torch.int64, device=x.device)

    def step():
        picks.index_copy_(0, number, pick)
        number.add_(1)
        center = x.index_select(0, pick)[0]
        d2 = torch.addmv(norms + norms.index_select(0, pick), x, center, alpha=-2).clamp_min_(0)
        torch.minimum(near, d2, out=near)
        near.index_fill_(0, pick, -1)
        torch.argmax(near, 0, keepdim=True, out=pick)

    replay = captured(step, (near, picks, pick, number), what="coreset") if x.is_cuda else step
    for _ in range(count):
        replay()
    return picks


class Index:
    """Exact nearest-neighbour search among entries (M, D) float32 on a CPU; twin of :func:`rcp.scoring.nearest_entries` for k = 1."""

    def __init__(self, entries: Tensor):
        self.entries, self._cells, in_cells = entries, None, len(entries) >= IN_CELLS
        self._leading = LeadingDirections(entries, size=96 if in_cells else 48)  # fewer leave more to compare
        y = self._leading(entries)
        longest, rounding = y.norm(dim=1).max(), 2**-23 * (y.shape[1] + 4)  # of the product: twice the worst case
        self._margins = np.array([longest, self._leading.error, rounding], np.float32)
        if in_cells:
            self._to_cells(y)
            return
        unused = -len(y) % _kernels().ENTRIES  # to whole blocks
        self._minus_2y = F.pad(-2 * y, (0, 0, 0, unused))
        self._squares = F.pad(y.square().sum(1), (0, unused), value=torch.inf)

    def _to_cells(self, y: Tensor) -> None:
        """Puts entries, by their leading numbers y (M, d), into cells around a thousand of them."""
        drawn = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:1024]
        self._pivots = y[drawn]
        cell = torch.cat([torch.cdist(part, self._pivots).argmin(1) for part in y.split(CHUNK)])
        parts = zip(y.split(CHUNK), cell.split(CHUNK), strict=True)
        radius = torch.cat([(part - self._pivots[c]).norm(dim=1) for part, c in parts])
        order = radius.argsort()
        order = order[cell[order].argsort(stable=True)]
        starts = F.pad(torch.bincount(cell, minlength=len(drawn)).cumsum(0), (1, 0))
        self._cells = [a.numpy() for a in (y[order], order, starts, radius[order])]

    def nearest(self, queries: Tensor) -> Tensor | None:
        """(n, D) float32 -> (n,) int64, the lowest index of equals.

        None where the bounds rule so little out that comparing with all entries is quicker, as after whitening.
        """
        kernels, found = _kernels(), []
        if self._cells:
            return self._nearest_in_cells(queries)
        if self._leading.share < 0.6:  # measured
            return None
        for x in queries.split(max(1, _BOUNDS // len(self._squares))):
            y = self._leading(x)
            bounds = _product(y, self._minus_2y, self._squares)  # ‖y - r‖² - ‖y‖²
            arrays = (a.numpy() for a in (x.contiguous(), bounds, y.square().sum(1), self.entries))
            found.append(kernels.nearest(*arrays, *self._margins, kernels.threads()))
        return torch.from_numpy(np.concatenate(found))

    def _nearest_in_cells(self, queries: Tensor) -> Tensor | None:
        few = queries[:: len(queries) // 32 + 1], len(self.entries) // 2
        for x, most in (few, (queries, 2**62)):  # some of them, with a limit, tell whether it is worth while
            y = self._leading(x)
            tensors = x.contiguous(), y, _lengths(y, self._pivots), y.norm(dim=1), self.entries
            arrays = [a.numpy() for a in tensors] + self._cells
            found = _kernels().nearest_in_cells(*arrays, *self._margins[:2], most, _kernels().threads())
            if (found < 0).mean() > 0.3:
                return None
        return torch.from_numpy(found)

    def squared_distances(self, queries: Tensor, index: Tensor) -> Tensor:
        """(n, D) float32, (n, j) int64 -> (n, j) float32, by differences."""
        arrays = queries.contiguous().numpy(), self.entries.numpy(), index.numpy()
        return torch.from_numpy(_kernels().squared_distances(*arrays, _kernels().threads()))


class LeadingDirections:
    """x: (n, D) float32 -> y: (n, size) float32 with ‖y_i - y_j‖ <= ‖x_i - x_j‖, up to 1e-5 of it and ``error``.

    Columns: the length of what the leading principal directions leave over, then the coordinates in them; a rotation keeps distances.

    Args:
        x: (N, D) float32; the directions are the covariance's of about 4,096 rows of it.
        among: (N,) bool, the rows that count; None is all.
        size: columns of y.
    """

    def __init__(self, x: Tensor, among: Tensor | None = None, size: int = 32):
        rows = torch.arange(len(x)) if among is None else among.nonzero()[:, 0]
        sample = x[rows[:: max(1, len(rows) // 4096)]].double()
        mean = sample.mean(0)
        eigenvalues, eigenvectors = torch.linalg.eigh((sample - mean).T @ (sample - mean))
        directions = eigenvectors.flip(1).T[: size - 1]
        total = eigenvalues.sum().item()
        self.share = eigenvalues[1 - size :].sum().item() / total if total > 0 else 1.0  # of the variance
        self.mean = mean.float()
        self.basis = torch.zeros(size, x.shape[1])  # a row of y is basis · x; the first number is the length's place
        self.basis[1 : 1 + len(directions)] = directions
        # of a length: the worst case of a D-term float32 sum in each of the coordinates
        self.error = size**0.5 * sample.shape[1] * 2**-24

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), len(self.basis))
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK] - self.mean
            y[start : start + CHUNK] = leading = _product(part, self.basis)
            y[start : start + CHUNK, 0] = part.addmm_(leading, self.basis, alpha=-1).norm(dim=1)
        return y


def _lengths(x: Tensor, centers: Tensor) -> Tensor:
    """‖x_i - c_j‖: (n, d), (K, d) -> (n, K); by differences, so that small ones keep their digits."""
    return torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: (n, K), (m, K), (m,) float32 -> (n, m), as a 1×1 convolution.

    That goes to oneDNN, torch's matrix product to MKL: on an AMD EPYC the first was twice as fast; elsewhere it has not been measured.
    """
    columns = F.conv2d(x.reshape(1, len(x), 1, -1).permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return columns.permute(0, 2, 3, 1).reshape(len(x), len(weight))
