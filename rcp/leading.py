"""Lower bounds of distances from few numbers: what makes selection and search fast on a processor without changing their results."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("rcp")

CHUNK = 8192  # rows at a time where a whole copy would double the memory


class LeadingDirections:
    """x: (n, D) float32 -> y: (n, size) float32 with ‖y_i - y_j‖ <= ‖x_i - x_j‖, up to 1e-5 of it and ``error``.

    Columns: the length of what the leading principal directions leave over, then the coordinates in them; a rotation keeps distances.

    Args:
        x: (N, D) float32; the directions are the covariance's of about 4,096 rows of it.
        among: (N,) bool, the rows that count; None is all.
        size: columns of y.
    """

    def __init__(self, x: Tensor, among: Tensor | None = None, size: int = 32):
        rows = torch.arange(len(x)) if among is None else among.nonzero()[:, 0]
        sample = x[rows[:: max(1, len(rows) // 4096)]].double()
        mean = sample.mean(0)
        eigenvectors = torch.linalg.eigh((sample - mean).T @ (sample - mean)).eigenvectors
        directions = eigenvectors.flip(1).T[: size - 1]
        self.mean = mean.float()
        self.basis = torch.zeros(size, x.shape[1])  # a row of y is basis · x; the first number is the length's place
        self.basis[1 : 1 + len(directions)] = directions
        # of a length: the worst case of a D-term float32 sum in each of the coordinates
        self.error = size**0.5 * sample.shape[1] * 2**-24

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), len(self.basis))
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK] - self.mean
            y[start : start + CHUNK] = leading = product(part, self.basis)
            y[start : start + CHUNK, 0] = part.addmm_(leading, self.basis, alpha=-1).norm(dim=1)
        return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: (n, K), (m, K), (m,) float32 -> (n, m), as a 1×1 convolution.

    That goes to oneDNN, torch's matrix product to MKL: on an AMD EPYC the first was twice as fast; elsewhere it has not been measured.
    """
    columns = F.conv2d(x.reshape(1, len(x), 1, -1).permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return columns.permute(0, 2, 3, 1).reshape(len(x), len(weight))


@cache
def compiled():
    """:mod:`rcp.kernels`, or None, with a notice, where numba cannot be imported."""
    try:
        from rcp import kernels
    except ImportError as error:
        logger.warning("no numba (%s): coreset and search compare every patch with every entry, same results", error)
        return None
    return kernels
