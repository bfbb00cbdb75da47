"""Greedy k-center coreset (Sec. 3.3): each pick is the patch farthest from all picks so far."""

from typing import Literal

import torch
from torch import Tensor

from rcp import fast
from rcp.checks import require
from rcp.fast import search


def coreset_size(ratio: float, patches: int) -> int:
    """⌊ratio · patches⌋, Eq. S1's number of memory entries.

    Raises:
        ValueError: the ratio selects nothing.
    """
    require("coreset_ratio", 0 < ratio <= 1, "a share of the patches, above 0 and at most 1", ratio)
    count = int(ratio * patches + 1e-9)  # 0.07 * 100 is 7.000000000000001, but 0.29 * 100 is 28.999999999999996
    require("coreset_ratio", count >= 1, f"at least {1 / patches:.2g}, which is one of {patches} patches", ratio)
    return count


def random_selection(patches: int, count: int, seed: int, among: Tensor | None = None) -> Tensor:
    """(count,) int64 indices drawn from the seed, each at most once. among: as in :func:`greedy_k_center`."""
    require("among", among is None or among.shape == (patches,), f"({patches},) of bool", among)
    allowed = torch.arange(patches) if among is None else among.nonzero()[:, 0]
    require("count", count <= len(allowed), f"at most {len(allowed)} (the number of patches)", count)
    return allowed[torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))[:count]]


def squared_distances_to(point: Tensor, x: Tensor) -> Tensor:
    """‖x_i - point‖²: (D,), (N, D) -> (N,). A megabyte at a time stays in the cache: ten times as fast as all at once."""
    d2, some = x.new_empty(len(x)), max(1, 2**18 // x.shape[1])
    for row, part in zip(d2.split(some), x.split(some), strict=True):
        row.copy_((part - point).square().sum(1))  # into one block: parts that are joined later scatter over the memory
    return d2


@torch.no_grad()
def greedy_k_center(
    features: Tensor,
    count: int,
    *,
    start: Literal["mean", "random"] = "mean",
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
    fits = features.ndim == 2 and features.numel() > 0 and features.dtype != torch.bool
    require("features", fits, "patches (N, D)", tuple(features.shape))
    n, dim = features.shape
    require("among", among is None or (among.shape == (n,) and among.dtype == torch.bool), f"({n},) of bool", among)
    allowed = torch.arange(n, device=features.device) if among is None else among.nonzero()[:, 0]
    require("count", 1 <= count <= len(allowed), f"1 to {len(allowed)} (the number of patches)", count)
    generator = torch.Generator().manual_seed(seed)
    x = features.float()
    if projection is not None:
        x = x @ (torch.randn(dim, projection, generator=generator) / projection**0.5).to(x)
    if start == "mean":
        mean = x.mean(0) if among is None else among.to(x) @ x / len(allowed)
        first = allowed[squared_distances_to(mean, x)[allowed].argmax()]
    else:
        first = allowed[torch.randint(len(allowed), (), generator=generator)]
    if fast.usable() and search.pays(x, count):
        return search.greedy_k_center(x, count, first, among)
    near = torch.full((n,), -1.0, device=x.device)
    near[allowed] = torch.inf  # squared distance to the nearest pick
    picks = []
    for _ in range(count):
        picks.append(first if not picks else near.argmax())
        near = torch.minimum(near, squared_distances_to(x[picks[-1]], x))
        near[picks[-1]] = -1  # never again
    return torch.stack(picks)
