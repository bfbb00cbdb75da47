"""Greedy k-center coreset (Sec. 3.3): each pick is the patch farthest from all picks so far."""

import torch
from torch import Tensor


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
    features: Tensor, count: int, *, start: str = "mean", projection: int | None = None, seed: int = 0
) -> Tensor:
    """features: (N, D) float32 -> (count,) int64 indices in the order of picking; exact, deterministic by seed.

    Args:
        count: number of picks, at most N.
        start: "mean" begins with the patch farthest from the mean, "random" with one drawn from the seed.
        projection: compare patches by a Gaussian random projection to this size instead of by themselves.
        seed: of the projection and of the random start; without either the picks do not depend on it.

    Where all remaining patches coincide with picks, the lowest index not yet picked follows: no index comes twice.
    """
    n, dim = features.shape
    if not 1 <= count <= n:
        raise ValueError(f"count: expected 1 to {n} (the number of patches), got {count}")
    generator = torch.Generator().manual_seed(seed)
    x = features
    if projection is not None:
        x = x @ (torch.randn(dim, projection, generator=generator) / projection**0.5).to(x)
    x = x - x.mean(0)  # distances stay, and small ones keep their digits
    norms = x.square().sum(1)
    first = norms.argmax() if start == "mean" else torch.randint(n, (), generator=generator).to(x.device)
    picks = torch.empty(count, dtype=torch.int64, device=x.device)
    centers = torch.empty(count, x.shape[1], dtype=x.dtype, device=x.device)
    nearest = torch.full_like(norms, torch.inf)  # squared distance to the nearest pick
    owner = torch.zeros(n, dtype=torch.int64, device=x.device)  # which pick that is
    for i in range(count):
        pick = first if i == 0 else nearest.argmax()
        picks[i], centers[i] = pick, x[pick]
        some = _can_be_closer(i, centers, nearest, owner)
        part, part_norms = (x, norms) if some is None else (x[some], norms[some])
        d2 = torch.addmv(part_norms, part, centers[i], alpha=-2).add_(norms[pick]).clamp_min_(0)
        if some is None:
            owner[d2 < nearest] = i
            torch.minimum(nearest, d2, out=nearest)
        else:
            closer = d2 < nearest[some]
            nearest[some[closer]], owner[some[closer]] = d2[closer], i
        nearest[pick] = -1  # never again
    return picks


def _can_be_closer(i: int, centers: Tensor, nearest: Tensor, owner: Tensor) -> Tensor | None:
    """Indices of the patches that pick i may be nearer to than their nearest pick so far; None where that is most of them.

    By the triangle inequality a patch keeps its pick c where ‖c - new‖ >= 2 ‖patch - c‖ (1e-4 to spare for rounding). On a
    GPU the answer would have to be waited for, and costs more than it saves.
    """
    if i == 0 or nearest.is_cuda:
        return None
    gap = (centers[:i] - centers[i]).square().sum(1)
    some = (gap[owner] < 4 * 1.0001 * nearest).nonzero().flatten()
    return some if len(some) < len(nearest) // 3 else None
