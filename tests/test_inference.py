"""What makes inference fast, against the plain way of computing it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from rcp.patches import pool
from rcp.scoring import score_maps


def interpolated_and_filtered(scores, size, blur):
    maps = F.interpolate(scores[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0].numpy()
    return gaussian_filter(maps, sigma=(0, blur, blur)) if blur else maps


@pytest.mark.parametrize(
    ("side", "size", "blur"), [(28, 224, 4.0), (60, 480, 4.0), (28, 224, 0), (4, 16, 9.0), (3, 50, 1.3)]
)
@pytest.mark.parametrize("kind", ["random", "constant", "one patch", "huge"])
def test_maps_are_what_interpolation_and_scipys_filter_give(side, size, blur, kind):
    scores = torch.rand(3, side, side)
    if kind == "constant":
        scores[:] = 2.5
    if kind == "one patch":
        scores = F.one_hot(torch.tensor([0, side, side**2 - 1]), side**2).float().reshape(3, side, side)
    if kind == "huge":
        scores *= 1e20
    expected = interpolated_and_filtered(scores, size, blur)
    got = score_maps(scores, size, blur)
    assert got.dtype == np.float32 and got.shape == (3, size, size)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("dim", [512, 256, 300, 1024])
def test_pooling_is_adaptive_average_pooling(dim):
    p = torch.randn(50, 1024).half().float()
    assert torch.equal(pool(p, dim), F.adaptive_avg_pool1d(p[:, None], dim)[:, 0])
