"""Lower bounds of distances from few numbers: what makes selection and search fast on a processor without changing their results."""

import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger("rcp")

CHUNK = 8192  # rows at a time where a whole copy would double the memory


class LeadingDirections:
    """x: (n, D) float32 -> y: (n, 32) float32 with ‖y_i - y_j‖ <= ‖x_i - x_j‖, up to 1e-5 of it and ``error``.

    Columns: the length of what the 31 leading principal directions leave over, then the coordinates in them; a rotation keeps distances.

    Args:
        x: (N, D) float32; the directions are the covariance's of about 4,096 rows of it.
        among: (N,) bool, the rows that count; None is all.
    """

    SIZE = 32

    def __init__(self, x: Tensor, among: Tensor | None = None):
        rows = torch.arange(len(x)) if among is None else among.nonzero()[:, 0]
        sample = x[rows[:: max(1, len(rows) // 4096)]].double()
        mean = sample.mean(0)
        eigenvectors = torch.linalg.eigh((sample - mean).T @ (sample - mean)).eigenvectors
        self.mean = mean.float()
        self.basis = eigenvectors.flip(1)[:, : self.SIZE - 1].float().contiguous()
        # of a length: the worst case of a D-term float32 sum in each of 32 coordinates
        self.error = self.SIZE**0.5 * sample.shape[1] * 2**-24

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), self.SIZE)
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK] - self.mean
            rows = y[start : start + CHUNK]
            rows[:, 1 : 1 + self.basis.shape[1]] = leading = part @ self.basis
            rows[:, 0] = part.addmm_(leading, self.basis.T, alpha=-1).norm(dim=1)
        return y


@cache
def compiled():
    """:mod:`rcp.kernels`, or None, with a notice, where numba cannot be imported."""
    try:
        from rcp import kernels
    except ImportError as error:
        logger.warning("no numba (%s): coreset and search compare every patch with every entry, same results", error)
        return None
    return kernels
