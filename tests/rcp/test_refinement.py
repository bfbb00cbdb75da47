"""The refinement network: it is the literal one, its training is deterministic and resumes, its options are checked."""

import json
import os
import re

import numpy as np
import pytest
import torch
from literal import focal_and_l1 as literal_focal_and_l1
from literal import refiner as literal_refiner
from torch import nn

from rcp import PatchCore, ReConPatch
from rcp.data import load_dataset, load_images
from rcp.refinement import Refinement, RefinementConfig
from rcp.refinement.network import RefinementNet, focal_and_l1
from rcp.refinement.simulation import Simulation
from rcp.refinement.training import train

SIDE, GRID = 64, 8
QUICK = {"channels": 8, "rates": (1, 2), "epochs": 3, "batch_size": 4, "foreground": False}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (10, GRID, GRID, 3)).astype(np.uint8)
    return smooth.repeat(SIDE // GRID, 1).repeat(SIDE // GRID, 2)


class Eye:
    """Sees how far each cell of an image is from that of the normal ones it was shown: a detector in miniature."""

    def __init__(self, normal):
        self.normal, self.asked = normal, []

    def __call__(self, images, numbers):
        self.asked.append(list(numbers))
        n, cell = len(images), SIDE // GRID
        off = np.abs(images.astype(np.float32) - self.normal[numbers])
        scores = torch.from_numpy(off.reshape(n, GRID, cell, GRID, cell, 3).mean((2, 4, 5)))
        return nn.functional.interpolate(scores[:, None], (SIDE, SIDE), mode="bilinear")[:, 0].numpy()


def quick(**changes):
    return RefinementConfig.build(**(QUICK | changes))


def trained(images, how=None, eye=None, log=len, **options):
    return train(images, eye or Eye(images), how or quick(), (0.0, 1.0), log=log, **options)


# ---- the network ----


@pytest.mark.parametrize(("side", "stride"), [(24, 8), (20, 8), (24, 4), (8, 1)])
def test_the_network_is_the_literal_one(side, stride):
    torch.manual_seed(0)
    how = RefinementConfig.build(stride=stride, channels=4, rates=(1, 2, 5), outlier=2.5)
    network = RefinementNet(how, center=0.4, deviation=0.3).double().eval()
    for name, value in network.state_dict().items():  # nothing at its first value: all of it must be used
        if value.is_floating_point() and name not in ("center", "deviation"):
            value.copy_(torch.rand_like(value) + 0.2 if name.endswith("running_var") else torch.randn_like(value) / 2)
    state, maps = {n: v.numpy() for n, v in network.state_dict().items()}, torch.rand(2, side, side).double()
    for one, log_odds in zip(maps, network(maps), strict=True):
        expected = literal_refiner(state, one.numpy(), stride=stride, rates=(1, 2, 5), outlier=2.5)
        np.testing.assert_allclose(log_odds.detach(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_it_starts_as_the_map_itself_and_every_weight_learns():
    maps, network = torch.rand(2, SIDE, SIDE) * 9, RefinementNet(quick(), center=2.0, deviation=0.5)
    torch.testing.assert_close(network.eval()(maps), (maps - 2) / 0.5 - 3.5, msg="3.5 deviations are even odds")
    nn.init.normal_(network.head.out.weight)
    network.train()(maps).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    groups = network.parameter_groups()
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in network.parameters()}
    assert [g["lr"] for g in groups] == [0.1, 0.01]


@pytest.mark.parametrize(("gamma", "focal", "l1"), [(4.0, 1.0, 1.0), (0.0, 1.0, 0.0), (2.0, 0.3, 2.0)])
def test_loss_is_the_literal_one(gamma, focal, l1):
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 7, 7, dtype=torch.float64) * 4, torch.rand(3, 7, 7) < 0.3
    how = quick(focal_gamma=gamma, focal_weight=focal, l1_weight=l1)
    expected = literal_focal_and_l1(logits.sigmoid(), masks, gamma, focal, l1)
    torch.testing.assert_close(focal_and_l1(logits, masks, how), expected)
    sure = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    for mask in ([[[True, False]]], [[[False, True]]]):
        assert torch.autograd.grad(focal_and_l1(sure, torch.tensor(mask), how), sure)[0].isfinite().all()


# ---- its training ----


def test_training_is_deterministic_and_shows_each_image_once_an_epoch(images):
    eye = Eye(images)
    (first, rows), (second, _), (other, _) = trained(images, eye=eye), trained(images), trained(images, quick(seed=1))
    states = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert [row["epoch"] for row in rows] == [1, 2, 3] and all(row["anomalous"] > 0.5 for row in rows)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    for epoch in range(3):
        assert sorted(n for batch in eye.asked[3 * epoch : 3 * epoch + 3] for n in batch) == list(range(10))


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(images, tmp_path):
    whole, rows = trained(images)
    file = tmp_path / "deep" / "checkpoint.safetensors"

    def cut_off(line):
        if line.startswith("refinement epoch   1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(images, log=cut_off, checkpoint=file)
    resumed, again = trained(images, eye=(eye := Eye(images)), checkpoint=file)
    assert len(eye.asked) == 2 * 3 + 1, "the first epoch is not trained again; the last look is whether it diverged"
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert list(tmp_path.rglob("*")) == [file.parent, file], "nothing temporary is left"


def test_a_checkpoint_of_another_training_is_refused_and_a_damaged_one_set_aside(images, tmp_path, caplog):
    file = tmp_path / "checkpoint.safetensors"
    trained(images, quick(epochs=1), checkpoint=file)
    for other, epochs, of in ((images, 2, None), (images[::-1], 1, None), (images, 1, {"blur": 0.0})):
        with pytest.raises(ValueError, match=r"checkpoint: expected one of these options, .*; remove it to start anew"):
            trained(other, quick(epochs=epochs), checkpoint=file, of=of)
    file.write_bytes(file.read_bytes()[:50])
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    with pytest.raises(ValueError, match=r"checkpoint: expected a file, got .*pipe"):
        trained(images, quick(epochs=1), checkpoint=tmp_path / "pipe")
    _, rows = trained(images, quick(epochs=1), checkpoint=file)
    assert "is damaged" in caplog.text and file.with_suffix(".damaged").stat().st_size == 50 and len(rows) == 1


def test_images_without_an_object_before_a_plain_background_are_named_before_any_work(images, caplog):
    images[3] = images[7] = 90
    names = [f"data/gear/train/good/{i:03}.png" for i in range(10)]

    def unseen(*_):
        raise InterruptedError

    for foreground in (False, True):
        assert not caplog.text, "without foreground nothing is looked for"
        with pytest.raises(InterruptedError):
            trained(images, quick(foreground=foreground, tolerance=30), unseen, names=names)
    assert "in 2 of 10 training images nothing" in caplog.text and "by 30 grey levels" in caplog.text
    assert "(first: gear/train/good/003.png)" in caplog.text and "lower `tolerance`" in caplog.text


def test_a_loss_that_is_no_number_is_named(images):
    with pytest.raises(FloatingPointError, match="epoch 1; likely cause"):
        trained(images, eye=lambda shown, _numbers: np.full((len(shown), SIDE, SIDE), np.nan, np.float32))


def test_a_last_step_that_diverges_is_noticed_too(images, monkeypatch):
    step = torch.optim.SGD.step

    def diverging(self, *given):
        step(self, *given)
        self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", diverging)
    with pytest.raises(FloatingPointError, match="diverged in its last step"):
        trained(images[:2], quick(epochs=1, batch_size=2))
    monkeypatch.undo()
    with pytest.raises(FloatingPointError, match="diverged in its last step"):  # finite, but what it gives is not
        trained(images, quick(epochs=1, batch_size=16, lr_blocks=1e9, lr_head=1e9))


# ---- its options, and bad input ----


def test_options_survive_a_round_trip_and_reach_the_simulation():
    how = Refinement.build(kind="mixture", grid=4, opacity=[0.5, 1.0], epochs=7, rates=[1, 2], seed=3)
    assert how.simulation == Simulation(kind="mixture", grid=4, opacity=(0.5, 1.0)) and how.epochs == 7
    assert Refinement.build(**json.loads(json.dumps(how.asdict()))) == how
    assert Refinement() == Refinement.build() and Refinement().epochs == 500 and Refinement().batch_size == 16
    assert Refinement().simulation.kind == "structure", "the paper's choice"


@pytest.mark.parametrize(("given", "message"), [
    ({"epoch": 3}, "refine: unknown option 'epoch'. Did you mean 'epochs'?"),
    ({"kind": "textures"}, "kind: expected one of 'texture', 'structure', 'mixture', got 'textures'"),
    ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
    ({"stride": 3}, "stride: expected a power of two, got 3"),
    ({"rates": ()}, "rates: expected rates from 1"),
    ({"momentum": 1.0}, "momentum: expected a momentum from 0 and below 1, got 1.0"),
    ({"lr_head": "0.1"}, "lr_head: expected float, got '0.1' (str)"),
])  # fmt: skip
def test_bad_options_are_named(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RefinementConfig.build(**given)


def test_missing_textures_and_images_that_are_too_small_are_said_before_any_work(images, tmp_path):
    def never(*_):
        pytest.fail("work was begun")

    with pytest.raises(FileNotFoundError, match=r"textures: no folder .*absent.*python -m reproduce download dtd"):
        quick(kind="texture", textures=str(tmp_path / "absent")).load_textures(SIDE)
    with pytest.raises(ValueError, match=f"textures: no images in {tmp_path}"):
        quick(kind="mixture", textures=str(tmp_path)).load_textures(SIDE)
    with pytest.raises(ValueError, match="textures: expected images of textures"):
        trained(images, quick(kind="texture"), never)
    with pytest.raises(ValueError, match="images: expected at least 80 px a side for as many cells, got 64"):
        trained(images, quick(grid=80), never)
    how = quick(kind="texture", textures="drawn", epochs=1)
    assert isinstance(trained(images, how, textures=how.load_textures(SIDE))[0], RefinementNet)


# ---- as part of a detector ----

SMALL = {
    "backbone": "resnet18", "weights": "random:0", "resize": 72, "image_size": 64, "dim": 16, "patch_dim": 32, "projection": None,
    "epochs": 1, "batch_size": 64, "coreset_ratio": 0.05, "device": "cpu",
}  # fmt: skip
REFINE = {"channels": 8, "rates": (1, 2), "epochs": 2, "batch_size": 4, "kind": "structure"}


@pytest.fixture(scope="module")
def data(small_demo):
    return load_dataset(small_demo, category="gear")


@pytest.mark.parametrize("method", [ReConPatch, PatchCore])
def test_a_detector_fits_predicts_saves_and_loads_it(method, data, tmp_path):
    plain = method(**SMALL).fit(data.train, log=len).predict(data.test)
    detector = method(**SMALL, refine=REFINE).fit(data.train, log=len)
    assert detector.threshold_ is None, "that of unrefined scores"
    assert [row["epoch"] for row in detector.refinement_history_] == [1, 2]
    unrefined, found = detector.predict(data.test, refined=False), detector.predict(data.test)
    np.testing.assert_array_equal(unrefined.maps, plain.maps)
    np.testing.assert_array_equal(unrefined.scores, plain.scores)
    assert found.maps.shape == plain.maps.shape and found.maps.min() >= 0 and found.maps.max() <= 1
    assert not np.allclose(found.maps, plain.maps)
    np.testing.assert_array_equal(found.scores, found.maps.max((1, 2)))
    assert found.train_scores is None and unrefined.train_scores is not None, "held-out scores are unrefined"
    detector.save(tmp_path / "gear.rcp")
    loaded = method.load(tmp_path / "gear.rcp")
    assert loaded.refine == detector.refine and repr(loaded.refine) in repr(loaded)
    np.testing.assert_allclose(loaded.predict(data.test).maps, found.maps, atol=1e-5)
    np.testing.assert_allclose(loaded.predict(data.test, maps=False).scores, found.scores, atol=1e-5)


def test_where_its_training_was_interrupted_nothing_passes_as_refined(data):
    def stop(line):
        if "refinement epoch" in line:
            raise KeyboardInterrupt

    detector = PatchCore(**SMALL, refine=REFINE)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(data.train, stop)
    with pytest.raises(ValueError, match="refined: expected False: its training did not end"):
        detector.predict(data.test)


def test_what_cannot_be_refined_is_said_before_any_work(data, tmp_path):
    with pytest.raises(ValueError, match=r"calibration_folds: expected 2 or more .*, got 0"):
        ReConPatch(**SMALL, calibration_folds=0, refine=True)
    with pytest.raises(ValueError, match="refine: expected True, a Refinement or a dict of its options, got 'yes'"):
        ReConPatch(**SMALL, refine="yes")
    with pytest.raises(ValueError, match="refine: expected options of the refinement"):
        ReConPatch(**SMALL).fit_refinement(np.zeros((1, 64, 64, 3), np.uint8))
    absent = REFINE | {"kind": "texture", "textures": str(tmp_path / "absent")}
    for refine, error, message in (
        (absent, FileNotFoundError, "textures: no folder"),
        (REFINE | {"grid": 80}, ValueError, "images: expected at least 80 px"),
    ):
        with pytest.raises(error, match=message):
            ReConPatch(**SMALL, refine=refine).fit(data.train, log=lambda _line: pytest.fail("trained already"))


def test_training_images_are_seen_against_banks_of_other_images(data, monkeypatch):
    """The map of an unchanged training image is that of its held-out scores, not of a bank that holds its own patches."""
    seen = []

    def look(images, see, *_):
        seen.append(see(images[:2], np.arange(2)))
        return None, []

    monkeypatch.setattr("rcp.refinement.training.train", look)
    images = load_images(data.train.paths, ReConPatch(**SMALL).transform)
    p = ReConPatch(**SMALL).extractor(images)
    f, history = ReConPatch(**SMALL).train(p, len)
    detector = ReConPatch.assemble(ReConPatch(**SMALL).config, f, p, history, refine=RefinementConfig.build(**REFINE))
    detector.fit_refinement(images, log=len)
    assert seen[0].max() == pytest.approx(detector.train_patch_scores_[:2].max(), rel=0.2)
    assert detector.predict_features(p, refined=False).maps[:2].mean() < 0.8 * seen[0].mean()
