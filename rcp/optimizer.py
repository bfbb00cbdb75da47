"""AdamP (Heo et al., 2021; the package ``adamp``) as a step that never waits for the device."""

import torch
from torch import Tensor


class AdamP:
    """Adam that takes out of a weight matrix's update the part along the matrix, where its gradient is orthogonal to it.

    The package decides that in Python, which on a GPU waits for the device at every step; here ``torch.where`` decides, and the
    scalars of every step lie on the device beforehand. The updates are the package's (``tests/test_training.py``).

    Args:
        parameters: matrices and vectors, updated in place.
        rates: the learning rate of every step that will be taken.
        weight_decay: decoupled, as a share of the learning rate; a tenth of it where the update is projected.
    """

    betas, eps, delta, projected_decay = (0.9, 0.999), 1e-8, 0.1, 0.1  # the package's defaults

    def __init__(self, parameters: list[Tensor], rates: Tensor, weight_decay: float):
        self.parameters = parameters
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        self.steps = torch.zeros(1, dtype=torch.int64, device=parameters[0].device)
        rates, t = rates.double().cpu(), torch.arange(1, len(rates) + 1, dtype=torch.float64)
        first, second = (1 - beta**t for beta in self.betas)  # bias corrections; in float32 they would be off by 1e-4
        self.scalars = torch.stack([rates / first, second.rsqrt(), rates * weight_decay], 1).to(parameters[0])

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes, the parameters included."""
        return [*self.parameters, *self.mean, *self.square, self.steps]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """θ ← θ - rate · (projected Adam update) - rate · decay · θ."""
        beta1, beta2 = self.betas
        rate, correction, decay = self.scalars.index_select(0, self.steps).unbind(1)
        self.steps.add_(1)
        torch._foreach_lerp_(self.mean, gradients, 1 - beta1)
        torch._foreach_mul_(self.square, beta2)
        torch._foreach_addcmul_(self.square, gradients, gradients, value=1 - beta2)
        root = torch._foreach_sqrt(self.square)
        torch._foreach_mul_(root, correction[0])
        torch._foreach_add_(root, self.eps)
        updates = torch._foreach_div(self.mean, root)
        for p, gradient, update in zip(self.parameters, gradients, updates, strict=True):
            along, share = self._projection(p, gradient, update) if p.ndim > 1 else (0.0, 1.0)
            p.mul_(1 - decay * share + rate * along)
        torch._foreach_mul_(updates, rate[0])
        torch._foreach_sub_(self.parameters, updates)

    def _projection(self, p: Tensor, gradient: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 1): how much of each row of p is in its update, to be taken out, and the share of the decay that is kept.

        Row by row where the gradient is nearly orthogonal to every row, else as a whole where it is to p as a whole.
        """
        sums = torch.cat([(p * torch.stack([p, update, gradient])).sum(2), gradient.square().sum(1)[None]])
        sums = torch.cat([sums, sums.sum(1, keepdim=True)], 1)  # the last column is p as a whole
        _, p_update, p_gradient, _ = sums
        p_norm, _, _, gradient_norm = sums.sqrt()  # the other two mean nothing
        cosine = p_gradient.abs() / (p_norm.clamp_min(self.eps) * gradient_norm.clamp_min(self.eps))
        rows = cosine[:-1].max() < self.delta / p.shape[1] ** 0.5
        whole = cosine[-1] < self.delta / p.numel() ** 0.5
        along = p_update / (p_norm + self.eps) ** 2
        along = torch.where(rows, along[:-1], along[-1] * whole)
        return along[:, None], torch.where(rows | whole, self.projected_decay, 1.0)
