"""The relaxed contrastive loss and its soft labels (Sec. 3.2): Eq. 1 to 7 over one mini-batch of N patches."""

import torch
from torch import Tensor

from rcp import fast
from rcp.fast import training


def squared_distances(z: Tensor) -> Tensor:
    """z: (N, d) -> ‖z_i - z_j‖²: (N, N), zeros on the diagonal. Centring first keeps small distances accurate."""
    z = z - z.mean(0).detach()
    norms = z.square().sum(1)
    return (norms[:, None] + norms).addmm_(z, z.T, alpha=-2).clamp_min_(0).fill_diagonal_(0)


def pairwise(d2: Tensor, sigma: float) -> Tensor:
    """Eq. 1: ω^P_ij = exp(-‖z̄_i - z̄_j‖² / σ). d2: (N, N) -> (N, N)."""
    return torch.exp(d2 / -sigma)


def nearest_neighbours(d2: Tensor, k: int) -> Tensor:
    """N_k(i): d2 (N, N) -> (N, k) indices of the k nearest of each i, nearest first, i itself first of all.

    Exactly k: of several at the distance of the k-th, some are left out (the printed set would hold them all).
    """
    return d2.clone().fill_diagonal_(-1.0).topk(k, dim=1, largest=False).indices


def membership(neighbours: Tensor) -> Tensor:
    """(N, k) indices -> (N, N) float32, 1 where j ∈ N_k(i)."""
    return torch.zeros(len(neighbours), len(neighbours), device=neighbours.device).scatter_(1, neighbours, 1.0)


def contextual(d2: Tensor, k: int, expansion: str = "reciprocal") -> Tensor:
    """Eq. 2 to 5: ω^C. d2: (N, N) of the teacher -> (N, N) float32 in [0, 1], symmetric.

    expansion: Eq. 4 averages over R_{k/2}(i), or over all of N_{k/2}(i) where it is "plain".
    """
    neighbours = nearest_neighbours(d2, k)
    if fast.usable():
        return training.contextual(neighbours, k // 2, expansion)
    near, half = membership(neighbours), membership(neighbours[:, : k // 2])
    shared = near * (near @ near.T) / k  # Eq. 2
    trusted = half * half.T if expansion == "reciprocal" else half  # Eq. 3
    expanded = trusted @ shared / trusted.sum(1, keepdim=True)  # Eq. 4
    return (expanded + expanded.T) / 2  # Eq. 5


def soft_labels(omega_p: Tensor, omega_c: Tensor, alpha: float) -> Tensor:
    """Eq. 6: ω_ij = α ω^P_ij + (1 - α) ω^C_ij."""
    return alpha * omega_p + (1 - alpha) * omega_c


def relative_distances(z: Tensor) -> Tensor:
    """δ_ij = ‖z_i - z_j‖ / ((1/N) Σ_n ‖z_i - z_n‖). z: (N, d) -> (N, N); the gradient flows through the row mean.

    Blind to the scale of z. A zero distance (the diagonal, duplicates) has gradient 0 instead of NaN.
    """
    d2, tiny = squared_distances(z), torch.finfo(z.dtype).tiny
    distances = torch.where(d2 > tiny, d2.clamp_min(tiny).sqrt(), 0)
    return distances / distances.mean(1, keepdim=True).clamp_min(tiny)


def relaxed_contrastive(z: Tensor, omega: Tensor, margin: float = 1.0) -> Tensor:
    """Eq. 7: L = (1/N) Σ_i Σ_j [ω_ij δ_ij² + (1 - ω_ij) max(m - δ_ij, 0)²]. z: (N, d), omega: (N, N) -> scalar.

    The gradient reaches z alone; omega is a target. margin: m, in units of a row's mean distance. Unless ``RCP_FAST=0``
    it is computed by its twin in :mod:`rcp.fast.training`: change both.
    """
    if fast.usable():
        return training.relaxed_contrastive(z, squared_distances(z.detach()), omega, margin)
    delta = relative_distances(z)
    return (omega * delta**2 + (1 - omega) * (margin - delta).clamp_min(0) ** 2).sum() / len(z)
