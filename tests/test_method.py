"""Eq. 1 to 8 and the aggregation: the fast paths against their literal transcriptions."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcp.config import Config
from rcp.losses import relative_distances, relaxed_contrastive
from rcp.model import Representation, mini_batches, similarity_targets, train, update_ema
from rcp.patches import PatchAggregator, pool
from rcp.similarity import contextual, nearest_neighbours, pairwise, shared_neighbours, soft_labels, squared_distances


def points(seed: int, n: int = 14, d: int = 5, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), sigma=st.sampled_from([0.1, 1.0, 30.0]), offset=st.sampled_from([0.0, 100.0]))
def test_pairwise_is_eq_1(seed, sigma, offset):
    z = points(seed, offset=offset)
    np.testing.assert_allclose(pairwise(squared_distances(z), sigma), literal.pairwise(z.numpy(), sigma), atol=2e-4)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(2, 9),
    ceil=st.booleans(),
    gate=st.booleans(),
    self_neighbour=st.booleans(),
    expansion=st.sampled_from(["reciprocal", "plain"]),
    empty=st.sampled_from(["self", "zero"]),
)
def test_contextual_is_eq_2_to_5(seed, k, ceil, gate, self_neighbour, expansion, empty):
    z, k_half = points(seed), -(-k // 2) if ceil else k // 2
    variant = {"gate": gate, "self_neighbour": self_neighbour, "expansion": expansion, "empty": empty}
    got = contextual(squared_distances(z), k, k_half, **variant)
    np.testing.assert_allclose(got, literal.contextual(z.numpy(), k, k_half, **variant), atol=1e-6)
    torch.testing.assert_close(got, got.T)


def test_eq_2_by_hand():
    """On a line 0, 1, 2, 10, 11, 12 with k = 3 and self: the outer of each group see the same three, the groups nothing of each other."""
    z = torch.tensor([[0.0], [1.1], [2.0], [10.0], [11.1], [12.0]])
    shared = shared_neighbours(nearest_neighbours(squared_distances(z), 3))
    expected = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    torch.testing.assert_close(shared, expected)


def test_neighbours_hold_self_first_even_among_duplicates():
    z = torch.zeros(6, 3)
    neighbours = nearest_neighbours(squared_distances(z), 3)
    assert neighbours[:, 0].tolist() == list(range(6))
    others = nearest_neighbours(squared_distances(z), 3, self_neighbour=False)
    assert not (others == torch.arange(6)[:, None]).any()


def test_soft_labels_ends_are_pairwise_and_contextual():
    p, c = torch.rand(4, 4), torch.rand(4, 4)
    torch.testing.assert_close(soft_labels(p, c, 1.0), p)
    torch.testing.assert_close(soft_labels(p, c, 0.0), c)
    torch.testing.assert_close(soft_labels(p, c, 0.25), 0.25 * p + 0.75 * c)


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
    twice = torch.cat([z[:7], z[:7]]).requires_grad_()
    relaxed_contrastive(twice, omega).backward()
    assert twice.grad.isfinite().all()
    assert twice.grad.abs().max() > 0
    same = torch.ones(5, 3, requires_grad=True)
    relaxed_contrastive(same, torch.rand(5, 5)).backward()
    assert same.grad.isfinite().all()


def test_row_mean_of_relative_distances_is_one_and_diagonal_zero():
    delta = relative_distances(points(1))
    torch.testing.assert_close(delta.mean(1), torch.ones(14))
    assert (delta.diagonal() == 0).all()


def test_loss_variants_differ_as_said():
    z, omega = points(2), torch.rand(14, 14)
    whole, without = relaxed_contrastive(z, omega, 1.5), relaxed_contrastive(z, omega, 1.5, diagonal=False)
    torch.testing.assert_close(whole - without, ((1 - omega.diagonal()) * 1.5**2).mean())
    torch.testing.assert_close(relaxed_contrastive(z, omega, pairs="N(N-1)") * 13, relaxed_contrastive(z, omega))


def test_projection_is_g_of_f_in_one_product():
    for config in (
        Config(dim=8, projection=4),
        Config(dim=8, projection=4, bias=False),
        Config(dim=8, projection=None),
    ):
        model = Representation(16, config)
        p = torch.randn(5, 16)
        torch.testing.assert_close(model(p), model.g(model.f(p)))


def test_ema_is_eq_8():
    config = Config(dim=3, projection=2)
    teacher, student = Representation(4, config), Representation(4, config)
    before = [t.clone() for t in teacher.parameters()]
    update_ema(teacher, student, 0.9)
    for old, new, theta in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * theta)


def test_targets_mix_eq_1_and_eq_5():
    z, config = points(3), Config(k=4, alpha=0.3, sigma=2.0)
    omega, omega_p = similarity_targets(z, config)
    np.testing.assert_allclose(omega_p, literal.pairwise(z.numpy(), 2.0), atol=1e-5)
    expected = 0.3 * literal.pairwise(z.numpy(), 2.0) + 0.7 * literal.contextual(z.numpy(), 4, 2)
    np.testing.assert_allclose(omega, expected, atol=1e-5)
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    omega, omega_p = similarity_targets(z, Config(k=4, normalize_teacher=True))
    np.testing.assert_allclose(omega_p, literal.pairwise(unit, 1.0), atol=1e-5)
    np.testing.assert_allclose(2 * omega - omega_p, literal.contextual(unit, 4, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "sides", "p", "dim"),
    [
        ((128, 256), (8, 4), 3, 1024),  # ResNet-18, levels 2+3
        ((512, 1024), (6, 3), 3, 1024),  # WideResNet-50
        ((64, 128, 256), (16, 8, 4), 5, 1024),  # levels 1+2+3, patch 5
        ((512, 1792), (6, 3), 3, 1024),  # DenseNet-201
        ((48, 96), (9, 5), 5, 384),  # nothing divides anything
        ((32,), (7,), 1, 16),
    ],
)
def test_aggregation_is_patchcores_chain(channels, sides, p, dim):
    maps = [torch.randn(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    torch.testing.assert_close(
        PatchAggregator(channels, p, 1024, dim)(maps), literal.aggregate(maps, p, 1024, dim), atol=1e-4, rtol=0
    )


def test_pooling_in_two_steps_is_pooling_in_one_where_dimensions_divide():
    maps = [torch.randn(1, 128, 6, 6), torch.randn(1, 256, 3, 3)]
    stored = PatchAggregator((128, 256), 3, 1024, 1024)(maps)
    for dim in (512, 256, 64):
        torch.testing.assert_close(pool(stored[0], dim), literal.aggregate(maps, 3, 1024, dim)[0], atol=1e-5, rtol=0)


def test_mini_batches_cover_each_patch_at_most_once():
    config = Config(batch_size=10, k=3)
    batches = list(mini_batches(4, 8, config, torch.Generator().manual_seed(0)))
    flat = torch.cat(batches)
    assert [len(b) for b in batches] == [10, 10, 10]
    assert len(flat.unique()) == 30
    kept = list(mini_batches(4, 8, Config(batch_size=10, k=1 + 1, drop_last=False), torch.Generator().manual_seed(0)))
    assert [len(b) for b in kept] == [10, 10, 10], "two patches are no more than k"
    kept = list(mini_batches(5, 8, Config(batch_size=12, k=3, drop_last=False), torch.Generator().manual_seed(0)))
    assert [len(b) for b in kept] == [12, 12, 12, 4] and len(torch.cat(kept).unique()) == 40
    of_two = list(mini_batches(4, 8, Config(batch_size=10, k=3, batch_pictures=2), torch.Generator().manual_seed(0)))
    assert [len(b) for b in of_two] == [10, 10]
    assert all(len((b // 8).unique()) <= 2 for b in of_two)


def fake_features(n=6, patches=20, dim=16, seed=0):
    return torch.randn(n, patches, dim, generator=torch.Generator().manual_seed(seed))


SMALL = {"dim": 8, "projection": 4, "batch_size": 40, "k": 4, "lr": 1e-3}


def test_training_learns_and_repeats_itself():
    config = Config(**SMALL, epochs=3)
    lines: list[str] = []
    f, rows = train(fake_features(), config, lines.append)
    again, _ = train(fake_features(), config, lines.append)
    assert torch.equal(f.weight, again.weight)
    assert len(lines) == 6 and "loss" in lines[0] and "ω^P" in lines[0]
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert all(0 <= r["omega_p_05"] <= r["omega_p_50"] <= r["omega_p_95"] <= 1 for r in rows)
    other, _ = train(fake_features(), Config(**SMALL, epochs=3, seed=1), lines.append)
    assert not torch.allclose(f.weight, other.weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = Representation(16, config)
    assert not torch.allclose(f.weight, untrained.f.weight)


def test_training_lowers_the_loss_of_a_fixed_target():
    """With γ = 1 the teacher never moves, so Eq. 7 is an ordinary objective and must fall."""
    groups = (
        torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).repeat(20, 4, 1) * 3
    )  # five tight groups in each picture
    features = groups + fake_features(n=20) * 0.5
    _, rows = train(features, Config(**SMALL | {"lr": 1e-2}, epochs=10, gamma=1.0), lambda _line: None)
    assert rows[-1]["loss"] < rows[0]["loss"] * 0.97


@pytest.mark.parametrize("cosine", ["step", "epoch"])
def test_training_variants_run(cosine):
    config = Config(
        **SMALL | {"projection": None},
        epochs=2,
        cosine=cosine,
        batch_pictures=3,
        init="orthogonal",
        pairs="N(N-1)",
        bias=False,
    )
    f, _ = train(fake_features(), config, lambda _line: None)
    assert f.bias is None and f.weight.shape == (8, 16)


def test_nan_loss_names_epoch_step_and_cause():
    features = fake_features()
    features[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan at epoch 1, step \d of 3; likely cause"):
        train(features, Config(**SMALL, epochs=1), lambda _line: None)


def test_too_few_patches_for_k():
    with pytest.raises(ValueError, match="k: expected fewer than the 4 patches of a mini-batch"):
        train(fake_features(n=1, patches=4), Config(**SMALL, epochs=1), lambda _line: None)
