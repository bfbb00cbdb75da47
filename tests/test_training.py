"""Training against the literal step: dense targets, autograd, the package's AdamP."""

import literal
import pytest
import torch
from adamp import AdamP as PackageAdamP

from rcp.config import Config
from rcp.graphs import captured
from rcp.model import Representation, learning_rates, mini_batches, train
from rcp.optimizer import AdamP


@pytest.mark.parametrize("orthogonal_to", ["nothing", "rows", "whole"])
def test_adamp_is_the_packages(orthogonal_to):
    """Gradients orthogonal to nothing leave an update as it is; to every row or to the matrix as a whole, it is projected."""
    generator = torch.Generator().manual_seed(1)
    theirs = [torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in ((20, 30), (8, 20), (8,))]
    ours = [p.detach().clone() for p in theirs]
    rates = torch.linspace(1e-2, 1e-4, 100, dtype=torch.float64)
    package, own = PackageAdamP(theirs, lr=1e-2, weight_decay=1e-2), AdamP(ours, rates, 1e-2)
    for rate in rates:
        gradients = [torch.randn(p.shape, generator=generator) for p in theirs]
        for p, gradient in zip(theirs[:2], gradients, strict=False):
            rows = p.detach()
            if orthogonal_to == "rows":
                gradient -= (gradient * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows
            if orthogonal_to == "whole":
                gradient[:2] += torch.tensor([[3.0], [-3.0]]) * rows[:2]  # not to these rows
                gradient -= (gradient * rows).sum() / rows.square().sum() * rows
                cosines = torch.nn.functional.cosine_similarity(gradient, rows).abs()
                assert cosines.max() > AdamP.delta / rows.shape[1] ** 0.5, "the rows must not do it"
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        package.param_groups[0]["lr"] = rate.item()
        package.step()
        own.step(gradients)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [8, 24])
@pytest.mark.parametrize("kind", ["random", "duplicates", "one outlier"])
def test_loss_curve_is_the_literal_ones(projection, kind):
    generator = torch.Generator().manual_seed(2)
    features = (torch.randn(6, 64, 32, generator=generator) + torch.randn(6, 1, 32, generator=generator)).half()
    if kind == "duplicates":
        features[3:] = features[:3]
    if kind == "one outlier":
        features[0, 0] = 3e4
    config = Config(
        dim=24,
        projection=projection,
        bias=False,
        epochs=4,
        batch_size=96,
        lr=1e-3,
        gamma=0.9,
        sigma=20.0,
        half_k="floor",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        start = Representation(32, config)
    drawn = torch.Generator().manual_seed(config.seed)
    batches = [batch for _ in range(config.epochs) for batch in mini_batches(6, 64, config, drawn)]
    c = config
    losses = literal.autograd_training(
        features.flatten(0, 1), batches, start.f.weight.detach(), start.g.weight.detach(), c.k, c.k_half, c.sigma,
        c.alpha, c.margin, c.gamma, learning_rates(c, len(batches) // c.epochs).tolist(), c.weight_decay,
    )  # fmt: skip
    expected = torch.stack(list(losses)).reshape(c.epochs, -1).mean(1)
    found = torch.tensor([row["loss"] for row in train(features, c, log=len)[1]])
    assert (expected[0] / expected[-1] - 1).abs() > 1e-3, "the curve must move"
    torch.testing.assert_close(found, expected, rtol=1e-4 if kind == "random" else 1e-3, atol=0)  # ties go either way


@pytest.mark.parametrize("kind", ["constant", "huge norm"])
def test_training_stays_finite(kind):
    """All patches alike: every distance is 0. Patches near float16's largest: every ω^P is 0."""
    features = torch.full((2, 40, 16), 2.0) if kind == "constant" else 6e4 * torch.randn(2, 40, 16).clamp(-1, 1)
    f, rows = train(features.half(), Config(dim=8, projection=4, epochs=2, batch_size=32), log=len)
    assert f.weight.isfinite().all() and all(row["loss"] >= 0 for row in rows)


class FakeGraph:
    """Counts what a CUDA graph would be asked, where there is no GPU."""

    replayed = 0

    def replay(self):
        FakeGraph.replayed += 1


@pytest.mark.parametrize("fails", [False, True])
def test_capture_leaves_the_state_and_falls_back_with_a_notice(fails, monkeypatch, caplog):
    from contextlib import contextmanager, nullcontext
    from types import SimpleNamespace

    @contextmanager
    def graph(_):
        if fails:
            raise RuntimeError("operation not permitted")
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "CUDAGraph": FakeGraph, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(), "graph": graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    total, example, replayed = torch.zeros(3), torch.ones(3), FakeGraph.replayed

    def step(x):
        return total.add_(x)

    with caplog.at_level("WARNING", logger="rcp"):
        replay = captured(step, [total], [example], what="training")
    assert torch.equal(total, torch.zeros(3))
    replay(torch.full((3,), 5.0))
    if fails:
        assert replay is step and "training: no CUDA graph (operation not permitted)" in caplog.text
        assert total.tolist() == [5.0] * 3
    else:
        assert example.tolist() == [5.0] * 3 and FakeGraph.replayed == replayed + 1 and not caplog.text
