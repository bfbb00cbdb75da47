"""Pairwise and contextual similarity of a mini-batch: Eq. 1 to 6. All matrices are (N, N) over the mini-batch only."""

import torch
from torch import Tensor


def squared_distances(z: Tensor) -> Tensor:
    """z: (N, d) -> ‖z_i - z_j‖²: (N, N), exact zeros on the diagonal. Centring first keeps small distances accurate."""
    z = z - z.mean(0).detach()
    norms = z.square().sum(1)
    return (norms[:, None] + norms).addmm_(z, z.T, alpha=-2).clamp_min_(0).fill_diagonal_(0)


def pairwise(d2: Tensor, sigma: float) -> Tensor:
    """Eq. 1: ω^P_ij = exp(-‖z̄_i - z̄_j‖² / σ). d2: (N, N) -> (N, N)."""
    return (d2 / -sigma).exp_()


def nearest_neighbours(d2: Tensor, k: int, self_neighbour: bool = True) -> Tensor:
    """N_k(i): (N, k) indices of the k nearest, nearest first; i itself comes first, or not at all.

    Exactly k: of several at the distance of the k-th, some are left out (the printed set would hold them all).
    """
    d2 = d2.clone().fill_diagonal_(-1.0 if self_neighbour else torch.inf)
    return d2.topk(k, dim=1, largest=False).indices


def membership(neighbours: Tensor, n: int) -> Tensor:
    """(N, k) indices -> (N, N) bool, true where j ∈ N(i)."""
    return torch.zeros(n, n, dtype=torch.bool, device=neighbours.device).scatter_(1, neighbours, True)


def shared_neighbours(neighbours: Tensor, gate: bool = True) -> Tensor:
    """Eq. 2: ω̃_ij = |N_k(i) ∩ N_k(j)| / |N_k(i)| if j ∈ N_k(i), else 0. neighbours: (N, k) -> (N, N) float32."""
    n, k = neighbours.shape
    if not gate:
        member = membership(neighbours, n).float()
        return member @ member.T / k
    return torch.zeros(n, n, device=neighbours.device).scatter_(1, neighbours, gated(neighbours))


def gated(neighbours: Tensor) -> Tensor:
    """Eq. 2's entries that can differ from 0: ω̃_ij for j = neighbours[i]. (N, k) -> (N, k); k³ comparisons a row, not N²."""
    theirs = neighbours[neighbours]  # (N, k, k): the neighbours of each neighbour
    common = (theirs.unsqueeze(-1) == neighbours[:, None, None, :]).sum((2, 3))
    return common.float() / neighbours.shape[1]


def trusted(half: Tensor, expansion: str = "reciprocal", empty: str = "self") -> tuple[Tensor, Tensor]:
    """Eq. 3: R_{k/2}(i) and the share of each member in Eq. 4's mean, 0 for one that is none. half: (N, k/2) = N_{k/2} -> two (N, m).

    R_{k/2}(i) keeps those j of N_{k/2}(i) that have i in N_{k/2}(j) ("plain" keeps all). Where it is empty, which
    takes ``self_neighbour=False``, ``empty="self"`` takes i alone (ω̂_ij = ω̃_ij), "zero" takes none.
    """
    own = torch.arange(len(half), device=half.device)[:, None]
    keep = (half[half] == own[:, :, None]).any(2) if expansion == "reciprocal" else torch.ones_like(half, dtype=bool)
    if empty == "self":
        half, keep = torch.cat([half, own], 1), torch.cat([keep, ~keep.any(1, keepdim=True)], 1)
    return half, keep / keep.sum(1, keepdim=True).clamp_min(1)


def expand_query(shared: Tensor, half: Tensor, expansion: str = "reciprocal", empty: str = "self") -> Tensor:
    """Eq. 4: ω̂_ij = mean of ω̃_lj over l ∈ R_{k/2}(i). shared: (N, N), half: (N, k/2) = N_{k/2} -> (N, N)."""
    members, shares = trusted(half, expansion, empty)
    return sum(shared[l] * share[:, None] for l, share in zip(members.T, shares.T, strict=True))  # noqa: E741


def contextual(
    d2: Tensor, k: int, k_half: int, *, gate=True, self_neighbour=True, expansion="reciprocal", empty="self"
) -> Tensor:
    """Eq. 2 to 5: ω^C_ij = ½ (ω̂_ij + ω̂_ji). d2: (N, N) teacher distances -> (N, N) float32 in [0, 1], symmetric.

    With the gate a row of ω̂ has at most k entries for each member of R_{k/2}(i), and only these are touched.
    """
    neighbours = nearest_neighbours(d2, k, self_neighbour)
    half = neighbours[:, :k_half]
    if not gate:
        expanded = expand_query(shared_neighbours(neighbours, gate), half, expansion, empty)
        return (expanded + expanded.T) / 2
    members, shares = trusted(half, expansion, empty)
    columns, values = neighbours[members], gated(neighbours)[members] * shares[:, :, None]  # (N, m, k)
    expanded = torch.zeros_like(d2, dtype=torch.float32)
    for member in range(members.shape[1]):  # one at a time: no column twice, so the sum has one order on a GPU too
        expanded.scatter_add_(1, columns[:, member], values[:, member])
    columns = columns.flatten(1)
    symmetric = (expanded.gather(1, columns) + expanded.T.gather(1, columns)) / 2
    expanded.scatter_(1, columns, symmetric)
    expanded.T.scatter_(1, columns, symmetric)
    return expanded


def soft_labels(omega_p: Tensor, omega_c: Tensor, alpha: float) -> Tensor:
    """Eq. 6: ω_ij = α ω^P_ij + (1 - α) ω^C_ij."""
    return alpha * omega_p + (1 - alpha) * omega_c
