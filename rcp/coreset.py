"""Greedy k-center coreset (Sec. 3.3): each pick is the patch farthest from all picks so far.

The plain algorithm compares every patch with every pick. The processor's path skips what cannot matter and picks the same:

- A patch's distance to its nearest pick only shrinks. What is held of it (``near``) may therefore be old, that is too large, as long as
  it is brought up to date before the patch is picked; a patch whose old value is under another's true one waits (lazy evaluation).
- Bringing a patch up to date, a pick counts only if it is nearer than ``near``. The distance in the 31 leading principal directions and
  of the lengths of what they leave over is never larger than the true one (a rotation keeps distances), so most picks are ruled out by it.
"""

import numpy as np
import torch
from torch import Tensor

from rcp.graphs import captured
from rcp.leading import CHUNK, LeadingDirections, compiled


def coreset_size(ratio: float, patches: int) -> int:
    """⌊ratio · patches⌋, Eq. S1's number of memory entries.

    Raises:
        ValueError: the ratio selects nothing.
    """
    count = int(ratio * patches + 1e-9)  # 0.07 * 100 is 7.000000000000001, but 0.29 * 100 is 28.999999999999996
    if count < 1:
        raise ValueError(
            f"coreset_ratio: {ratio} of {patches} patches selects nothing; expected at least {1 / patches:.2g}"
        )
    return count


@torch.no_grad()
def greedy_k_center(
    features: Tensor,
    count: int,
    *,
    start: str = "mean",
    projection: int | None = None,
    seed: int = 0,
    among: Tensor | None = None,
) -> Tensor:
    """features: (N, D) float32 -> (count,) int64 indices in the order of picking; exact, deterministic by seed.

    Args:
        count: number of picks, at most N.
        start: "mean" begins with the patch farthest from the mean, "random" with one drawn from the seed.
        projection: compare patches by a Gaussian random projection to this size instead of by themselves.
        seed: of the projection and of the random start; without either the picks do not depend on it.
        among: (N,) bool, the patches that may be picked (and need covering); None is all. Spares a copy of them.

    Of patches at the same distance the lowest index comes first; no index comes twice.
    """
    n, dim = features.shape
    allowed = n if among is None else int(among.sum())
    if not 1 <= count <= allowed:
        raise ValueError(f"count: expected 1 to {allowed} (the number of patches), got {count}")
    generator = torch.Generator().manual_seed(seed)
    x = features
    if projection is not None:
        x = x @ (torch.randn(dim, projection, generator=generator) / projection**0.5).to(x)
    if start == "mean":
        mean = x.mean(0) if among is None else among.to(x) @ x / allowed
        from_mean = x.new_empty(
            n
        )  # filled in place: small tensors kept between large ones would tear holes into the heap
        for rows, part in zip(from_mean.split(CHUNK), x.split(CHUNK), strict=True):
            rows.copy_((part - mean).square_().sum(1))
        first = (from_mean if among is None else from_mean.where(among, -1)).argmax()
    else:
        first = torch.randint(allowed, (), generator=generator).to(x.device)
        first = first if among is None else among.nonzero()[first, 0]
    if not x.is_cuda and compiled():
        return _lazy_greedy(x, count, int(first), among)
    return plain_greedy(x, count, first, among)


def plain_greedy(x: Tensor, count: int, first: Tensor, among: Tensor | None = None) -> Tensor:
    """Every pick compared with every patch: x: (N, D) float32, any device -> (count,) int64.

    Nothing is waited for: on a GPU one step is captured as a graph and replayed for each pick.
    """
    x = x - x.mean(0)  # distances stay, and small ones keep their digits
    norms = x.square().sum(1)
    near = torch.full_like(norms, torch.inf)  # squared distance to the nearest pick
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
        near.index_fill_(0, pick, -1)  # never again
        torch.argmax(near, 0, keepdim=True, out=pick)

    replay = captured(step, (near, picks, pick, number), what="coreset") if x.is_cuda else step
    for _ in range(count):
        replay()
    return picks


def _lazy_greedy(x: Tensor, count: int, first: int, among: Tensor | None) -> Tensor:
    """:func:`plain_greedy`'s picks by :func:`rcp.kernels.lazy_greedy`."""
    leading = LeadingDirections(x, among)
    y = leading(x)
    error = 2 * leading.error * y.norm(dim=1).max().item()
    near = np.full(len(x), np.inf, np.float32)
    if among is not None:
        near[~among.numpy()] = -1
    kernels = compiled()
    picks = kernels.lazy_greedy(
        x.contiguous().numpy(), y.numpy(), near, count, first, np.float32(error), kernels.threads()
    )
    return torch.from_numpy(picks)
