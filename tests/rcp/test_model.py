"""f, g, Eq. 8 and the training loop, plain and quick, against the literal steps with the package's AdamP."""

import literal
import pytest
import torch

from rcp.config import Config
from rcp.model import Representation, mini_batches, train, update_ema

SMALL = {"dim": 8, "projection": 4, "batch_size": 40, "k": 4, "lr": 1e-3}


def fake_features(n=6, patches=20, dim=16, seed=0):
    return torch.randn(n, patches, dim, generator=torch.Generator().manual_seed(seed))


def test_projection_is_g_of_f_in_one_product():
    for config in (Config(dim=8, projection=4), Config(dim=8, projection=None)):
        model, p = Representation(16, config), torch.randn(5, 16)
        torch.testing.assert_close(model(p), model.g(model.f(p)))


def test_ema_is_eq_8():
    teacher, student = (Representation(4, Config(dim=3, projection=2)) for _ in range(2))
    before = [t.clone() for t in teacher.parameters()]
    update_ema(teacher, student, 0.9)
    for old, new, theta in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * theta)


def test_mini_batches_cover_each_patch_at_most_once():
    batches = list(mini_batches(4, 8, Config(batch_size=10, k=3), torch.Generator().manual_seed(0)))
    assert [len(b) for b in batches] == [10, 10, 10] and len(torch.cat(batches).unique()) == 30
    of_two = list(mini_batches(4, 8, Config(batch_size=10, k=3, batch_images=2), torch.Generator().manual_seed(0)))
    assert [len(b) for b in of_two] == [10, 10] and all(len((b // 8).unique()) <= 2 for b in of_two)


@pytest.mark.parametrize("fast", ["0", "1"])
@pytest.mark.parametrize("projection", [8, 24])
@pytest.mark.parametrize("kind", ["random", "duplicates", "one outlier"])
def test_loss_curve_is_the_literal_ones(fast, projection, kind, monkeypatch):
    monkeypatch.setenv("RCP_FAST", fast)
    generator = torch.Generator().manual_seed(2)
    features = (torch.randn(6, 64, 32, generator=generator) + torch.randn(6, 1, 32, generator=generator)).half()
    if kind == "duplicates":
        features[3:] = features[:3]
    if kind == "one outlier":
        features[0, 0] = 3e4
    c = Config(dim=24, projection=projection, epochs=4, batch_size=96, lr=1e-3, gamma=0.9, sigma=20.0)
    with torch.random.fork_rng():
        torch.manual_seed(c.seed)
        start = Representation(32, c)
    drawn = torch.Generator().manual_seed(c.seed)
    batches = [batch for _ in range(c.epochs) for batch in mini_batches(6, 64, c, drawn)]
    losses = literal.autograd_training(features.flatten(0, 1), batches, start, c)
    expected = torch.stack(list(losses)).reshape(c.epochs, -1).mean(1)
    found = torch.tensor([row["loss"] for row in train(features, c, log=len)[1]])
    assert (expected[0] / expected[-1] - 1).abs() > 1e-3, "the curve must move"
    torch.testing.assert_close(found, expected, rtol=1e-4 if kind == "random" else 1e-3, atol=0)  # ties go either way


def test_training_repeats_itself_and_says_one_line_per_epoch():
    config, lines = Config(**SMALL, epochs=3), []
    f, rows = train(fake_features(), config, lines.append)
    again, _ = train(fake_features(), config, len)
    other, _ = train(fake_features(), Config(**SMALL, epochs=3, seed=1), len)
    assert torch.equal(f.weight, again.weight) and not torch.allclose(f.weight, other.weight)
    assert len(lines) == 3 and "loss" in lines[0] and "ω^P" in lines[0]
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert all(0 <= r["omega_p_05"] <= r["omega_p_50"] <= r["omega_p_95"] <= 1 for r in rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.allclose(f.weight, Representation(16, config).f.weight)


@pytest.mark.parametrize("fast", ["0", "1"])
@pytest.mark.parametrize("kind", ["constant", "huge norm"])
def test_training_stays_finite(fast, kind, monkeypatch):
    """All patches alike: every distance is 0. Patches near float16's largest: every ω^P is 0."""
    monkeypatch.setenv("RCP_FAST", fast)
    features = torch.full((2, 40, 16), 2.0) if kind == "constant" else 6e4 * torch.randn(2, 40, 16).clamp(-1, 1)
    f, rows = train(features.half(), Config(dim=8, projection=4, epochs=2, batch_size=32), log=len)
    assert f.weight.isfinite().all() and all(row["loss"] >= 0 for row in rows)


def test_options_reach_the_training():
    plain = train(fake_features(), Config(**SMALL, epochs=2), len)[0].weight
    changes = {"batch_images": 3, "init": "orthogonal", "normalize_teacher": True, "sigma": 5.0, "gamma": 0.5}
    changes |= {"alpha": 0.1, "margin": 0.5, "weight_decay": 10.0, "k": 7}
    for name, value in changes.items():
        f, _ = train(fake_features(), Config(**SMALL | {"epochs": 2, name: value}), len)
        assert not torch.equal(f.weight, plain), name
    assert train(fake_features(), Config(**SMALL | {"projection": None}, epochs=1), len)[0].weight.shape == (8, 16)


def test_what_cannot_be_trained_is_named():
    features = fake_features()
    features[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"features: expected finite .*, some NaN or infinite"):
        train(features, Config(**SMALL, epochs=1), len)
    with pytest.raises(FloatingPointError, match=r"loss is nan at epoch 1, step \d of 3; likely cause"):
        train.__wrapped__(features, Config(**SMALL, epochs=1), len)  # as where finite ones diverge
    with pytest.raises(ValueError, match="k: expected fewer than the 4 patches of a mini-batch"):
        train(fake_features(n=1, patches=4), Config(**SMALL, epochs=1), len)
    of_two = Config(**SMALL, epochs=1, batch_images=2)
    assert train(fake_features(n=4, patches=4), of_two, len)[1], "those of two images together are enough"
