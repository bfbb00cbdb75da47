"""The relaxed contrastive loss: Eq. 7."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

    The gradient reaches z alone; omega is a target.

    Args:
        margin: m, in units of a row's mean distance.
        pairs: divide by "N" (printed) or "N(N-1)".
        diagonal: keep i = j, as printed; it adds mean((1 - ω_ii) m²) and no gradient.
    """
    n = len(z)
    total = _Sum.apply(z, omega, margin)
    if not diagonal:
        total = total - (1 - omega.diagonal()).sum() * margin**2
    return total / (n if pairs == "N" else n * (n - 1))


class _Sum(torch.autograd.Function):
    """Eq. 7's double sum, its gradient in closed form: two products with z in all, where autograd needs three and keeps every matrix.

    With ℓ_ij the term of a pair, g_ij = ∂ℓ_ij/∂δ_ij, d_ij = ‖z_i - z_j‖ and μ_i the mean of row i, so that δ_ij = d_ij / μ_i:
    ∂L/∂d_ij = (g_ij - mean_n g_in δ_in) / μ_i, and ∂L/∂z_i = Σ_j (K_ij + K_ji) (z_i - z_j)
    with K_ij = ∂L/∂d_ij / d_ij, or 0 where d_ij = 0.
    """

    @staticmethod
    def forward(ctx, z: Tensor, omega: Tensor, margin: float) -> Tensor:
        z = z - z.mean(0)
        d2, tiny = squared_distances(z), torch.finfo(z.dtype).tiny
        delta = d2.sqrt()
        delta.div_(delta.mean(1, keepdim=True).clamp_min(tiny))
        gap = (margin - delta).clamp_min_(0)
        attract, repel = omega * delta, gap - omega * gap
        total = (attract * delta).sum() + (repel * gap).sum()
        if ctx.needs_input_grad[0]:
            g = attract.sub_(repel).mul_(2)
            g.sub_((g * delta).mean(1, keepdim=True))
            k = g.mul_(delta).div_(d2.clamp_min_(tiny))  # δ / d² = 1 / (μ d), and 0 where d is 0
            k = k + k.T.contiguous()  # the copy halves the time: rows are read in order
            ctx.save_for_backward(torch.addmm(k.sum(1, keepdim=True) * z, k, z, alpha=-1))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return ctx.saved_tensors[0] * upstream, None, None
