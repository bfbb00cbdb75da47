"""Pairwise and contextual similarity of a mini-batch: Eq. 1 to 6. All matrices are (N, N) over the mini-batch only."""

import torch
from torch import Tensor


def squared_distances(z: Tensor) -> Tensor:
    """z: (N, d) -> ‖z_i - z_j‖²: (N, N), exact zeros on the diagonal. Centring first keeps small distances accurate."""
    z = z - z.mean(0).detach()
    norms = z.square().sum(1)
    d2 = (norms[:, None] + norms[None, :] - 2 * z @ z.T).clamp_min(0)
    return d2 * (1 - torch.eye(len(z), dtype=z.dtype, device=z.device))


def pairwise(d2: Tensor, sigma: float) -> Tensor:
    """Eq. 1: ω^P_ij = exp(-‖z̄_i - z̄_j‖² / σ). d2: (N, N) -> (N, N)."""
    return torch.exp(-d2 / sigma)


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
    """Eq. 2: ω̃_ij = |N_k(i) ∩ N_k(j)| / |N_k(i)| if j ∈ N_k(i), else 0. neighbours: (N, k) -> (N, N) float32.

    With the gate only the k entries of N_k(i) can differ from zero, so k³ comparisons a row replace N².
    """
    n, k = neighbours.shape
    if not gate:
        member = membership(neighbours, n).float()
        return member @ member.T / k
    theirs = neighbours[neighbours]  # (N, k, k): the neighbours of each neighbour
    common = (theirs.unsqueeze(-1) == neighbours[:, None, None, :]).sum((2, 3))  # (N, k)
    out = torch.zeros(n, n, device=neighbours.device)
    return out.scatter_(1, neighbours, common.float() / k)


def expand_query(shared: Tensor, half: Tensor, expansion: str = "reciprocal", empty: str = "self") -> Tensor:
    """Eq. 3 and 4: ω̂_ij = mean of ω̃_lj over l ∈ R_{k/2}(i). shared: (N, N), half: (N, k/2) = N_{k/2} -> (N, N).

    R_{k/2}(i) keeps those j of N_{k/2}(i) that have i in N_{k/2}(j) ("plain" keeps all). Where it is empty, which
    takes ``self_neighbour=False``, ``empty="self"`` takes i alone (ω̂_ij = ω̃_ij), "zero" takes 0.
    """
    n = len(shared)
    keep = torch.ones_like(half, dtype=torch.bool)
    if expansion == "reciprocal":
        keep = (half[half] == torch.arange(n, device=half.device)[:, None, None]).any(2)  # (N, k/2)
    count = keep.sum(1, keepdim=True)
    out = torch.where(count == 0, shared, 0) if empty == "self" else torch.zeros_like(shared)
    for column in range(half.shape[1]):
        out += shared[half[:, column]] * (keep[:, column, None] / count.clamp_min(1))
    return out


def contextual(
    d2: Tensor, k: int, k_half: int, *, gate=True, self_neighbour=True, expansion="reciprocal", empty="self"
) -> Tensor:
    """Eq. 2 to 5: ω^C_ij = ½ (ω̂_ij + ω̂_ji). d2: (N, N) teacher distances -> (N, N) float32 in [0, 1], symmetric."""
    neighbours = nearest_neighbours(d2, k, self_neighbour)
    expanded = expand_query(shared_neighbours(neighbours, gate), neighbours[:, :k_half], expansion, empty)
    return (expanded + expanded.T) / 2


def soft_labels(omega_p: Tensor, omega_c: Tensor, alpha: float) -> Tensor:
    """Eq. 6: ω_ij = α ω^P_ij + (1 - α) ω^C_ij."""
    return alpha * omega_p + (1 - alpha) * omega_c
