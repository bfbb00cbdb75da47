"""Eq. 1 to 7, plain and quick, against their literal transcriptions."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcp.config import Config
from rcp.losses import (
    contextual,
    nearest_neighbours,
    pairwise,
    relative_distances,
    relaxed_contrastive,
    soft_labels,
    squared_distances,
)
from rcp.model import targets


@pytest.fixture(params=["0", "1"], ids=["plain", "quick"], autouse=True)
def form(request):
    """Every test of this file is of both forms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCP_FAST", request.param)
        yield


def points(seed: int, n: int = 14, d: int = 5, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), sigma=st.sampled_from([0.1, 1.0, 30.0]), offset=st.sampled_from([0.0, 100.0]))
def test_pairwise_is_eq_1(seed, sigma, offset):
    z = points(seed, offset=offset)
    np.testing.assert_allclose(pairwise(squared_distances(z), sigma), literal.pairwise(z.numpy(), sigma), atol=2e-4)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 9), expansion=st.sampled_from(["reciprocal", "plain"]))
def test_contextual_is_eq_2_to_5(seed, k, expansion):
    z = points(seed)
    got = contextual(squared_distances(z), k, expansion)
    np.testing.assert_allclose(got, literal.contextual(z.numpy(), k, expansion), atol=1e-6)
    torch.testing.assert_close(got, got.T)


def test_neighbours_hold_self_first_even_among_duplicates():
    neighbours = nearest_neighbours(squared_distances(torch.zeros(6, 3)), 3)
    assert neighbours[:, 0].tolist() == list(range(6))
    assert all(len(set(row)) == 3 for row in neighbours.tolist())


def test_soft_labels_are_eq_6():
    p, c = torch.rand(4, 4), torch.rand(4, 4)
    for alpha, expected in ((1.0, p), (0.0, c), (0.25, 0.25 * p + 0.75 * c)):
        torch.testing.assert_close(soft_labels(p, c, alpha), expected)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), m=st.sampled_from([0.0, 0.5, 1.0, 2.0]), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_loss_and_gradient_are_eq_7(seed, m, scale):
    z = points(seed, n=7, scale=scale).requires_grad_()
    omega = torch.rand(7, 7, generator=torch.Generator().manual_seed(seed))
    loss = relaxed_contrastive(z, omega, m)
    loss.backward()
    assert loss.item() == pytest.approx(literal.relaxed_contrastive(z.detach().numpy(), omega.numpy(), m), rel=1e-4)
    z64 = z.detach().double().requires_grad_()
    literal.relaxed_contrastive_autograd(z64, omega.double(), m).backward()
    np.testing.assert_allclose(z.grad * scale, z64.grad * scale, atol=2e-4)


def test_loss_is_blind_to_scale_and_its_gradient_is_finite_on_duplicates():
    z, omega = points(0), torch.rand(14, 14)
    torch.testing.assert_close(relaxed_contrastive(z, omega), relaxed_contrastive(z * 7, omega), rtol=1e-4, atol=1e-5)
    for odd in (torch.cat([z[:7], z[:7]]), torch.ones(14, 3)):
        odd.requires_grad_()
        relaxed_contrastive(odd, omega).backward()
        assert odd.grad.isfinite().all()
    delta = relative_distances(z)
    torch.testing.assert_close(delta.mean(1), torch.ones(14))
    assert (delta.diagonal() == 0).all()


def test_targets_mix_eq_1_and_eq_5_of_the_teacher():
    z = points(3)
    unit = z / z.norm(dim=1, keepdim=True)
    for config, of in ((Config(k=4, alpha=0.3, sigma=2.0), z), (Config(k=4, normalize_teacher=True), unit)):
        omega, omega_p = targets(z, config)
        expected_p = literal.pairwise(of.numpy(), config.sigma)
        expected = config.alpha * expected_p + (1 - config.alpha) * literal.contextual(of.numpy(), 4)
        np.testing.assert_allclose(omega_p, expected_p, atol=1e-5)
        np.testing.assert_allclose(omega, expected, atol=1e-5)
