"""The refinement network: its parts and loss, what training it depends on, and what it is part of."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from literal import focal_and_l1 as literal_focal_and_l1
from torch import nn

from rcp import refinement
from rcp.refinement import AtrousPyramid, Refinement, Refiner, ResidualBlock, Seen, focal_and_l1, train
from rcp.synthesis import Simulation, simulate

SIDE, GRID, DIM = 64, 8, 6
QUICK = {"channels": 8, "rates": (1, 2), "epochs": 3, "batch_size": 4, "foreground": False}
INPUTS = ["map", "features", "picture", "map+picture", "map+features+picture"]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (10, GRID, GRID, 3)).astype(np.uint8)
    return smooth.repeat(SIDE // GRID, 1).repeat(SIDE // GRID, 2)


class Eye:
    """Sees how far each cell of a picture is from that of the normal ones it was shown: a detector in miniature."""

    def __init__(self, normal):
        self.normal, self.asked = normal, []

    def __call__(self, pictures, numbers):
        self.asked.append(list(numbers))
        n, cell = len(pictures), SIDE // GRID
        off = np.abs(pictures.astype(np.float32) - self.normal[numbers])
        cells = off.reshape(n, GRID, cell, GRID, cell, 3).mean((2, 4))
        scores = torch.from_numpy(cells.mean(-1))
        distances = torch.from_numpy(np.concatenate([cells, cells], -1)).reshape(n, GRID * GRID, DIM)
        return Seen(scores, distances)


def quick(**changes):
    return Refinement.build(**(QUICK | changes))


# ---- the network ----


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("stride", [1, 4])
def test_shapes_and_gradients(inputs, stride, pictures):
    how = quick(inputs=inputs, stride=stride)
    refiner = Refiner(how, DIM)
    nn.init.normal_(refiner.head.out.weight)
    logits = refiner(Eye(pictures)(pictures[:3], range(3)), torch.from_numpy(pictures[:3]))
    assert logits.shape == (3, SIDE, SIDE) and logits.dtype == torch.float32
    logits.square().mean().backward()
    without = [n for n, p in refiner.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert {id(p) for g in refiner.parameter_groups() for p in g["params"]} == {id(p) for p in refiner.parameters()}


def test_untrained_it_orders_pixels_as_the_map_does(pictures):
    """The skip: training starts from what is to be refined."""
    scores = torch.rand(2, GRID, GRID) * 9
    seen = Seen(scores, torch.rand(2, GRID * GRID, DIM))
    refiner = Refiner(quick(stride=8), DIM, center=2.0, deviation=0.5).eval()
    logits = refiner(seen, torch.from_numpy(pictures[:2]))
    expected = nn.functional.interpolate(((scores - 2) / 0.5 - 3.5)[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    torch.testing.assert_close(logits, expected)
    plain = Refiner(quick(stride=8, skip=False), DIM).eval()(seen, torch.from_numpy(pictures[:2]))
    assert plain.std() == 0, "without the skip nothing is known before training"


def test_a_residual_block_adds_to_its_input_and_the_pyramid_has_its_rates():
    block = ResidualBlock(4, 4).eval()
    nn.init.zeros_(block.second[0].weight)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(block(x), x.relu())
    pyramid = AtrousPyramid(4, (6, 12, 18))
    assert [branch[0].dilation[0] for branch in pyramid.branches] == [1, 6, 12, 18]
    assert [branch[0].kernel_size[0] for branch in pyramid.branches] == [1, 3, 3, 3]
    assert pyramid(torch.randn(2, 4, 40, 40)).shape == (2, 1, 40, 40)


def test_the_same_map_in_any_batch(pictures):
    refiner = Refiner(quick(), DIM).eval()
    nn.init.normal_(refiner.head.out.weight)
    seen = Eye(pictures[::-1])(pictures, range(10))
    whole = refiner.refine(seen, pictures)
    one = refiner.refine(Seen(seen.scores[3:4], seen.distances[3:4]), pictures[3:4])
    assert whole.dtype == np.float32 and whole.min() >= 0 and whole.max() <= 1
    np.testing.assert_allclose(one[0], whole[3], atol=1e-6)


@pytest.mark.parametrize(("gamma", "focal", "l1"), [(4.0, 1.0, 1.0), (0.0, 1.0, 0.0), (2.0, 0.3, 2.0)])
def test_loss_is_the_literal_one(gamma, focal, l1):
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 7, 7, dtype=torch.float64) * 4, torch.rand(3, 7, 7) < 0.3
    how = quick(focal_gamma=gamma, focal_weight=focal, l1_weight=l1)
    expected = literal_focal_and_l1(logits.sigmoid(), masks, gamma, focal, l1)
    torch.testing.assert_close(focal_and_l1(logits, masks, how), expected)


def test_the_loss_has_a_finite_gradient_where_it_is_sure():
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    for masks in (torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])):
        (gradient,) = torch.autograd.grad(focal_and_l1(logits, masks, quick()), logits)
        assert gradient.isfinite().all()


# ---- its training ----


def test_it_can_learn_one_batch_by_heart(pictures):
    torch.manual_seed(0)
    how = quick(kind="structure", opacity=(1.0, 1.0), stride=1)
    changed, masks = simulate(pictures[:4], how.simulation)
    seen, target = Eye(pictures)(changed, range(4)), torch.from_numpy(masks)
    refiner = Refiner(how, DIM, 1.0, 5.0).train()
    optimizer = torch.optim.SGD(refiner.parameter_groups(), momentum=0.9)
    losses = []
    for _ in range(150):
        loss = focal_and_l1(refiner(seen, torch.from_numpy(changed)), target, how)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    found = refiner(seen, torch.from_numpy(changed)) > 0
    assert (found == target).float().mean() > 0.97


def test_training_is_deterministic_and_shows_normal_pictures_only(pictures):
    eye = Eye(pictures)
    first, rows = train(pictures, eye, quick(), (0.0, 1.0), log=len)
    second, _ = train(pictures, Eye(pictures), quick(), (0.0, 1.0), log=len)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert [row["epoch"] for row in rows] == [1, 2, 3] and all(row["anomalous"] > 0.5 for row in rows)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    shown = eye.asked[1:]  # after the first look at its shape
    for epoch in range(3):
        assert sorted(sum(shown[3 * epoch : 3 * epoch + 3], [])) == list(range(10)), "each picture once an epoch"
    other, _ = train(pictures, Eye(pictures), quick(seed=1), (0.0, 1.0), log=len)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(pictures, tmp_path):
    whole, rows = train(pictures, Eye(pictures), quick(), (0.0, 1.0), log=len)
    file = tmp_path / "deep" / "checkpoint.safetensors"

    def cut_off(line):
        if line.startswith("refinement epoch   2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pictures, Eye(pictures), quick(), (0.0, 1.0), log=cut_off, checkpoint=file)
    eye = Eye(pictures)
    resumed, again = train(pictures, eye, quick(), (0.0, 1.0), log=len, checkpoint=file)
    assert len(eye.asked) == 1 + 2 * 3, "the first epoch is not trained again"
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert list(tmp_path.rglob("*")) == [file.parent, file], "nothing temporary is left"


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(pictures, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    train(pictures, Eye(pictures), quick(epochs=1), (0.0, 1.0), log=len, checkpoint=file)
    with pytest.raises(ValueError, match=r"checkpoint: .* is of another training"):
        train(pictures, Eye(pictures), quick(epochs=2), (0.0, 1.0), log=len, checkpoint=file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"checkpoint: .* is damaged"):
        train(pictures, Eye(pictures), quick(epochs=1), (0.0, 1.0), log=len, checkpoint=file)


def test_a_loss_that_is_no_number_is_named(pictures):
    with pytest.raises(FloatingPointError, match="epoch 1; likely cause"):
        train(pictures, lambda p, n: Seen(torch.full((len(p), GRID, GRID), torch.nan), torch.zeros(len(p), GRID**2, DIM)),
              quick(), (0.0, 1.0), log=len)  # fmt: skip


# ---- its options, and bad input ----


def test_options_survive_a_round_trip_and_reach_the_simulation():
    how = Refinement.build(kind="mixture", grid=4, opacity=[0.5, 1.0], epochs=7, rates=[1, 2], seed=3)
    assert how.simulation == Simulation(kind="mixture", grid=4, opacity=(0.5, 1.0)) and how.epochs == 7
    assert Refinement.build(**json.loads(json.dumps(how.asdict()))) == how
    assert Refinement() == Refinement.build() and Refinement().epochs == 500 and Refinement().batch_size == 16
    assert Refinement().simulation.kind == "structure", "the paper's choice"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "refine: unknown option 'epoch'. Did you mean 'epochs'?"),
        ({"inputs": "map+feature"}, "inputs: expected some of map, features, picture joined with '+', got 'map+feature'"),
        ({"kind": "textures"}, "kind: expected one of 'texture', 'structure', 'mixture', got 'textures'"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"stride": 3}, "stride: expected a power of two, got 3"),
        ({"rates": ()}, "rates: expected rates from 1"),
        ({"momentum": 1.0}, "momentum: expected a momentum from 0 and below 1, got 1.0"),
        ({"image_score": "maps"}, "image_score: expected one of 'map', 'patches', got 'maps'"),
        ({"lr_head": "0.1"}, "lr_head: expected float, got '0.1' (str)"),
    ],
)  # fmt: skip
def test_bad_options_are_named(given, message):
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        Refinement.build(**given)


def test_missing_textures_and_pictures_that_are_too_small_are_said_before_any_work(pictures, tmp_path):
    def never(*_):
        pytest.fail("work was begun")

    with pytest.raises(FileNotFoundError, match="textures: no folder .*absent.*python -m rcp download dtd"):
        quick(kind="texture", textures=str(tmp_path / "absent")).load_textures(SIDE)
    with pytest.raises(ValueError, match=f"textures: no pictures in {tmp_path}"):
        quick(kind="mixture", textures=str(tmp_path)).load_textures(SIDE)
    with pytest.raises(ValueError, match="textures: kind='texture' needs pictures of textures"):
        train(pictures, never, quick(kind="texture"), (0.0, 1.0))
    with pytest.raises(ValueError, match="pictures: expected at least 80 px a side for a grid of 80 cells, got 64"):
        train(pictures, never, quick(grid=80), (0.0, 1.0))
    how = quick(kind="texture", textures="drawn", epochs=1)
    drawn, _ = train(pictures, Eye(pictures), how, (0.0, 1.0), how.load_textures(SIDE), log=len)
    assert isinstance(drawn, refinement.Refiner)
    assert dataclasses.is_dataclass(drawn.how)
