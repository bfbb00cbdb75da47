"""Training against the literal step: dense targets, autograd, the package's AdamP."""

import literal
import pytest
import torch
from adamp import AdamP as PackageAdamP

from rcp.config import Config
from rcp.model import Representation, learning_rates, mini_batches, train
from rcp.optimizer import AdamP


@pytest.mark.parametrize("orthogonal", [False, True])
def test_adamp_is_the_packages(orthogonal):
    """Random gradients leave an update as it is, gradients orthogonal to the rows are projected."""
    generator = torch.Generator().manual_seed(1)
    theirs = [torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in ((20, 30), (8, 20), (8,))]
    ours = [p.detach().clone() for p in theirs]
    rates = torch.linspace(1e-2, 1e-4, 100, dtype=torch.float64)
    package, own = PackageAdamP(theirs, lr=1e-2, weight_decay=1e-2), AdamP(ours, rates, 1e-2)
    for rate in rates:
        gradients = [torch.randn(p.shape, generator=generator) for p in theirs]
        if orthogonal:
            for p, gradient in zip(theirs[:2], gradients, strict=False):
                rows = torch.nn.functional.normalize(p.detach(), dim=1)
                gradient -= (gradient * rows).sum(1, keepdim=True) * rows
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        package.param_groups[0]["lr"] = rate.item()
        package.step()
        own.step(gradients)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [8, 24])
def test_loss_curve_is_the_literal_ones(projection):
    generator = torch.Generator().manual_seed(2)
    features = (torch.randn(6, 64, 32, generator=generator) + torch.randn(6, 1, 32, generator=generator)).half()
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
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
