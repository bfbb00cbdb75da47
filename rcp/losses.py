"""The relaxed contrastive loss: Eq. 7."""

import torch
from torch import Tensor

from rcp.similarity import squared_distances


def relative_distances(z: Tensor) -> Tensor:
    """δ_ij = ‖z_i - z_j‖ / ((1/N) Σ_n ‖z_i - z_n‖). z: (N, d) -> (N, N); the gradient flows through the row mean.

    Blind to the scale of z. A zero distance (the diagonal, duplicates) has gradient 0 instead of NaN.
    """
    d2 = squared_distances(z)
    tiny = torch.finfo(z.dtype).tiny
    distances = torch.where(d2 > tiny, d2.clamp_min(tiny).sqrt(), 0)
    return distances / distances.mean(1, keepdim=True).clamp_min(tiny)


def relaxed_contrastive(
    z: Tensor, omega: Tensor, margin: float = 1.0, *, pairs: str = "N", diagonal: bool = True
) -> Tensor:
    """Eq. 7: L = (1/N) Σ_i Σ_j [ω_ij δ_ij² + (1 - ω_ij) max(m - δ_ij, 0)²]. z: (N, d), omega: (N, N) -> scalar.

    Args:
        margin: m, in units of a row's mean distance.
        pairs: divide by "N" (printed) or "N(N-1)".
        diagonal: keep i = j, as printed; it adds mean((1 - ω_ii) m²) and no gradient.
    """
    delta = relative_distances(z)
    terms = omega * delta.square() + (1 - omega) * (margin - delta).clamp_min(0).square()
    n = len(z)
    if not diagonal:
        terms = terms * (1 - torch.eye(n, dtype=z.dtype, device=z.device))
    return terms.sum() / (n if pairs == "N" else n * (n - 1))
