"""The refinement network: its parts and loss, what training it depends on, and what it is part of."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from literal import focal_and_l1 as literal_focal_and_l1
from literal import refiner as literal_refiner
from PIL import Image
from torch import nn

from rcp import PatchCore, ReConPatch, refinement
from reproduce import grids, tables, views
from reproduce.figures import plots
from rcp.config import Config
from rcp.data import draw_demo, load_dataset, load_images
from reproduce.entries import Cell, Ensemble, Grid, Refined, run, run_grid
from rcp.metrics import evaluate
from reproduce.notebook import Settings
from rcp.refinement import AtrousPyramid, Refinement, Refiner, ResidualBlock, Seen, focal_and_l1, train
from reproduce.store import Store, key_of
from rcp.refinement.simulation import Simulation, simulate

SIDE, GRID, DIM = 64, 8, 6
QUICK = {"channels": 8, "rates": (1, 2), "epochs": 3, "batch_size": 4, "foreground": False}
INPUTS = ["map", "features", "image", "map+image", "map+features+image"]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (10, GRID, GRID, 3)).astype(np.uint8)
    return smooth.repeat(SIDE // GRID, 1).repeat(SIDE // GRID, 2)


def seen_as(scores, distances=None):
    maps = nn.functional.interpolate(scores[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    return Seen(scores, maps, torch.rand(len(scores), GRID**2, DIM) if distances is None else distances)


class Eye:
    """Sees how far each cell of an image is from that of the normal ones it was shown: a detector in miniature."""

    def __init__(self, normal):
        self.normal, self.asked = normal, []

    def __call__(self, images, numbers):
        self.asked.append(list(numbers))
        n, cell = len(images), SIDE // GRID
        off = np.abs(images.astype(np.float32) - self.normal[numbers])
        cells = off.reshape(n, GRID, cell, GRID, cell, 3).mean((2, 4))
        scores = torch.from_numpy(cells.mean(-1))
        distances = torch.from_numpy(np.concatenate([cells, cells], -1)).reshape(n, GRID * GRID, DIM)
        return seen_as(scores, distances)


def quick(**changes):
    return Refinement.build(**(QUICK | changes))


# ---- the network ----


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("stride", [1, 4])
def test_shapes_and_gradients(inputs, stride, images):
    how = quick(inputs=inputs, stride=stride)
    refiner = Refiner(how, DIM)
    nn.init.normal_(refiner.head.out.weight)
    logits = refiner(Eye(images)(images[:3], range(3)), torch.from_numpy(images[:3]))
    assert logits.shape == (3, SIDE, SIDE) and logits.dtype == torch.float32
    logits.square().mean().backward()
    without = [n for n, p in refiner.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert {id(p) for g in refiner.parameter_groups() for p in g["params"]} == {id(p) for p in refiner.parameters()}


def test_the_skip_adds_what_is_found_to_the_normalised_map(images):
    seen = seen_as(torch.rand(2, GRID, GRID) * 9)
    shown = torch.from_numpy(images[:2])
    refiner = Refiner(quick(), DIM, center=2.0, deviation=0.5).eval()
    plain = Refiner(quick(skip=False), DIM, center=2.0, deviation=0.5).eval()
    plain.load_state_dict(refiner.state_dict())
    expected = (seen.maps - 2) / 0.5
    torch.testing.assert_close(refiner(seen, shown) - plain(seen, shown), expected, atol=1e-4, rtol=1e-4)
    nn.init.zeros_(refiner.head.out.weight)
    nn.init.zeros_(refiner.head.out.bias)
    torch.testing.assert_close(refiner(seen, shown), expected - 3.5, msg="3.5 deviations are even odds")


def test_a_residual_block_adds_to_its_input_and_the_pyramid_has_its_rates():
    block = ResidualBlock(4, 4).eval()
    nn.init.zeros_(block.second[0].weight)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(block(x), x.relu())
    pyramid = AtrousPyramid(4, (6, 12, 18))
    assert [branch[0].dilation[0] for branch in pyramid.branches] == [1, 6, 12, 18]
    assert [branch[0].kernel_size[0] for branch in pyramid.branches] == [1, 3, 3, 3]
    assert pyramid(torch.randn(2, 4, 40, 40)).shape == (2, 1, 40, 40)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("side", "stride", "skip"), [(24, 8, True), (20, 8, True), (24, 4, False), (8, 1, True)])
def test_the_network_is_the_literal_one(inputs, side, stride, skip):
    torch.manual_seed(0)
    how = Refinement.build(inputs=inputs, stride=stride, skip=skip, channels=4, rates=(1, 2, 5), outlier=2.5)
    network = Refiner(how, DIM, center=0.4, deviation=0.3).double().eval()
    for name, value in network.state_dict().items():  # nothing at its first value: all of it must be used
        if value.is_floating_point() and name not in ("center", "deviation"):
            value.copy_(torch.rand_like(value) + 0.2 if name.endswith("running_var") else torch.randn_like(value) / 2)
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    seen = Seen(torch.rand(2, 4, 4).double(), torch.rand(2, side, side).double(), torch.rand(2, 16, DIM).double())
    if "image" in inputs:
        network.float()
        seen = Seen(*(part.float() for part in seen))
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    found = network(seen, images)
    options = {"inputs": inputs, "stride": stride, "rates": (1, 2, 5), "outlier": 2.5, "skip": skip}
    for i, log_odds in enumerate(found):
        shown = (part[i].double().numpy() for part in (seen.maps, seen.distances, images))
        expected = literal_refiner(state, *shown, **options)
        np.testing.assert_allclose(log_odds.detach().numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_same_map_in_any_batch(images):
    refiner = Refiner(quick(), DIM).eval()
    nn.init.normal_(refiner.head.out.weight)
    seen = Eye(images[::-1])(images, range(10))
    whole = refiner.refine(seen, images)
    one = refiner.refine(Seen(*(part[3:4] for part in seen)), images[3:4])
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


def test_it_can_learn_one_batch_by_heart(images):
    torch.manual_seed(0)
    how = quick(
        kind="structure", opacity=(1.0, 1.0), stride=1, lr_head=0.1, l1_weight=1.0, inputs="map+features+image"
    )
    changed, masks = simulate(images[:4], how.simulation)
    seen, target = Eye(images)(changed, range(4)), torch.from_numpy(masks)
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


def test_training_is_deterministic_and_shows_normal_images_only(images):
    eye = Eye(images)
    first, rows = train(images, eye, quick(), (0.0, 1.0), log=len)
    second, _ = train(images, Eye(images), quick(), (0.0, 1.0), log=len)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert [row["epoch"] for row in rows] == [1, 2, 3] and all(row["anomalous"] > 0.5 for row in rows)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    shown = eye.asked[1:]  # after the first look at its shape
    for epoch in range(3):
        assert sorted(n for batch in shown[3 * epoch : 3 * epoch + 3] for n in batch) == list(range(10)), (
            "each image once an epoch"
        )
    other, _ = train(images, Eye(images), quick(seed=1), (0.0, 1.0), log=len)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(images, tmp_path):
    whole, rows = train(images, Eye(images), quick(), (0.0, 1.0), log=len)
    file = tmp_path / "deep" / "checkpoint.safetensors"

    def cut_off(line):
        if line.startswith("refinement epoch   1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(images, Eye(images), quick(), (0.0, 1.0), log=cut_off, checkpoint=file)
    eye = Eye(images)
    resumed, again = train(images, eye, quick(), (0.0, 1.0), log=len, checkpoint=file)
    assert len(eye.asked) == 1 + 2 * 3, "the first epoch is not trained again"
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert list(tmp_path.rglob("*")) == [file.parent, file], "nothing temporary is left"


def test_a_checkpoint_of_another_training_is_refused_and_a_damaged_one_set_aside(images, tmp_path, caplog):
    file = tmp_path / "checkpoint.safetensors"
    train(images, Eye(images), quick(epochs=1), (0.0, 1.0), log=len, checkpoint=file)
    with pytest.raises(ValueError, match=r"checkpoint: .* is of another training"):
        train(images, Eye(images), quick(epochs=2), (0.0, 1.0), log=len, checkpoint=file)
    file.write_bytes(file.read_bytes()[:50])
    _, rows = train(images, Eye(images), quick(epochs=1), (0.0, 1.0), log=len, checkpoint=file)
    assert "is damaged" in caplog.text and file.with_suffix(".damaged").stat().st_size == 50 and len(rows) == 1


def test_images_without_an_object_before_a_plain_background_are_named_before_any_work(images, caplog):
    images[3] = images[7] = 90
    names = [f"data/gear/train/good/{i:03}.png" for i in range(10)]

    def unseen(*_):
        raise InterruptedError

    for foreground in (False, True):
        with pytest.raises(InterruptedError):
            train(images, unseen, quick(foreground=foreground, tolerance=30), (0.0, 1.0), log=len, names=names)
        if not foreground:
            assert not caplog.text, "nothing was looked for"
    assert "in 2 of 10 training images nothing" in caplog.text and "by 30 grey levels" in caplog.text
    assert "(first: gear/train/good/003.png)" in caplog.text and "lower `tolerance`" in caplog.text


@pytest.mark.parametrize("method", ["fit", "cell"])
def test_a_category_without_an_object_is_named(method, tmp_path, caplog):
    for i in range(8):
        folder = tmp_path / "paper" / ("train/good" if i < 6 else "test/good" if i < 7 else "test/spot")
        folder.mkdir(parents=True, exist_ok=True)
        image = np.full((64, 64, 3), 200, np.uint8) + np.random.default_rng(i).integers(0, 6, (64, 64, 3), np.uint8)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    (tmp_path / "paper/ground_truth/spot").mkdir(parents=True)
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(tmp_path / "paper/ground_truth/spot/007_mask.png")
    if method == "fit":
        ReConPatch(**SMALL, refine=REFINE).fit(load_dataset(tmp_path, category="paper").train, log=len)
    else:
        cell = Refined(Cell(Config(**SMALL), str(tmp_path), "paper"), Refinement.build(**REFINE))
        run_grid([cell], Store(tmp_path / "runs"), log=len)
    assert "in 6 of 6 training images nothing" in caplog.text
    assert "(first: paper/train/good/000.png)" in caplog.text


def test_a_checkpoint_goes_on_where_the_textures_moved_and_not_where_they_are_others(images, tmp_path):
    import shutil

    from PIL import Image

    here, there, file = tmp_path / "here" / "dots", tmp_path / "there" / "dots", tmp_path / "checkpoint.safetensors"
    here.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)).save(
            here / f"{i}.png"
        )

    def trained(folder):
        how = quick(kind="texture", textures=str(folder.parent), epochs=1)
        return train(images, Eye(images), how, (0.0, 1.0), how.load_textures(SIDE), len, file)

    rows = trained(here)[1]
    shutil.move(here.parent, there.parent)
    assert trained(there)[1] == rows, "nothing was trained again, or its seconds would differ"
    (there / "0.png").unlink()
    with pytest.raises(ValueError, match=r"checkpoint: .* is of another training"):
        trained(there)


def test_a_loss_that_is_no_number_is_named(images):
    def blind(shown, _numbers):
        return seen_as(torch.full((len(shown), GRID, GRID), torch.nan))

    with pytest.raises(FloatingPointError, match="epoch 1; likely cause"):
        train(images, blind, quick(), (0.0, 1.0), log=len)


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
        ({"inputs": "map+feature"}, "inputs: expected some of map, features, image joined with '+', got 'map+feature'"),
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
    with pytest.raises(ValueError, match=re.escape(message)):
        Refinement.build(**given)


def test_missing_textures_and_images_that_are_too_small_are_said_before_any_work(images, tmp_path):
    def never(*_):
        pytest.fail("work was begun")

    with pytest.raises(FileNotFoundError, match=r"textures: no folder .*absent.*python -m reproduce download dtd"):
        quick(kind="texture", textures=str(tmp_path / "absent")).load_textures(SIDE)
    with pytest.raises(ValueError, match=f"textures: no images in {tmp_path}"):
        quick(kind="mixture", textures=str(tmp_path)).load_textures(SIDE)
    with pytest.raises(ValueError, match="textures: kind='texture' needs images of textures"):
        train(images, never, quick(kind="texture"), (0.0, 1.0))
    with pytest.raises(ValueError, match="images: expected at least 80 px a side for a grid of 80 cells, got 64"):
        train(images, never, quick(grid=80), (0.0, 1.0))
    how = quick(kind="texture", textures="drawn", epochs=1)
    drawn, _ = train(images, Eye(images), how, (0.0, 1.0), how.load_textures(SIDE), log=len)
    assert isinstance(drawn, refinement.Refiner)
    assert dataclasses.is_dataclass(drawn.how)


# ---- as part of a detector, and as a cell of a grid ----

SMALL = {
    "backbone": "resnet18", "weights": "random:0", "resize": 72, "image_size": 64, "dim": 16, "patch_dim": 32, "projection": None,
    "epochs": 1, "batch_size": 64, "coreset_ratio": 0.05, "device": "cpu",
}  # fmt: skip
REFINE = {"channels": 8, "rates": (1, 2), "epochs": 2, "batch_size": 4, "kind": "structure"}


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    root = draw_demo(tmp_path_factory.mktemp("refine"), train=6, good=2, per_defect=1)
    return root, load_dataset(root, category="gear")


@pytest.mark.parametrize("method", [ReConPatch, PatchCore])
@pytest.mark.parametrize("image_score", ["map", "patches"])
def test_a_detector_fits_predicts_saves_and_loads_it(method, image_score, tiny_set, tmp_path):
    _, data = tiny_set
    plain = method(**SMALL).fit(data.train, log=len).predict(data.test)
    detector = method(**SMALL, refine=REFINE | {"image_score": image_score}).fit(data.train, log=len)
    assert [row["epoch"] for row in detector.refinement_history_] == [1, 2]
    unrefined, found = detector.predict(data.test, refined=False), detector.predict(data.test)
    np.testing.assert_array_equal(unrefined.maps, plain.maps)
    np.testing.assert_array_equal(unrefined.scores, plain.scores)
    assert found.maps.shape == plain.maps.shape and found.maps.min() >= 0 and found.maps.max() <= 1
    assert not np.allclose(found.maps, plain.maps)
    if image_score == "map":
        np.testing.assert_array_equal(found.scores, found.maps.max((1, 2)))
        assert found.train_scores is None and unrefined.train_scores is not None, "held-out scores are unrefined"
    else:
        np.testing.assert_array_equal(found.scores, plain.scores)
        np.testing.assert_array_equal(found.train_scores, plain.train_scores)
    detector.save(tmp_path / "gear.rcp")
    loaded = method.load(tmp_path / "gear.rcp")
    assert loaded.refine == detector.refine and repr(loaded.refine) in repr(loaded)
    np.testing.assert_allclose(loaded.predict(data.test).maps, found.maps, atol=1e-5)
    np.testing.assert_allclose(loaded.predict(data.test, maps=False).scores, found.scores, atol=1e-5)


def test_what_cannot_be_refined_is_said_before_any_work(tiny_set, tmp_path):
    _, data = tiny_set
    with pytest.raises(ValueError, match=r"calibration_folds: expected 2 or more .*, got 0"):
        ReConPatch(**SMALL, calibration_folds=0, refine=True)
    with pytest.raises(ValueError, match=r"refine: unknown option 'epoch'. Did you mean 'epochs'\?"):
        ReConPatch(**SMALL, refine={"epoch": 3})
    with pytest.raises(ValueError, match="refine: expected True, a Refinement or a dict of its options, got 'yes'"):
        ReConPatch(**SMALL, refine="yes")
    with pytest.raises(ValueError, match="refine: expected options of the refinement"):
        refinement.fit(ReConPatch(**SMALL), np.zeros((1, 64, 64, 3), np.uint8))
    absent = REFINE | {"kind": "texture", "textures": str(tmp_path / "absent")}
    with pytest.raises(FileNotFoundError, match="textures: no folder"):
        ReConPatch(**SMALL, refine=absent).fit(data.train, log=lambda _line: pytest.fail("trained already"))
    with pytest.raises(ValueError, match="images: expected at least 80 px"):
        ReConPatch(**SMALL, refine=REFINE | {"grid": 80}).fit(
            data.train, log=lambda _line: pytest.fail("trained already")
        )


@pytest.mark.parametrize("inputs", ["map", "map+features"])
def test_training_images_are_seen_against_banks_of_other_images(inputs, tiny_set):
    _, data = tiny_set
    detector = ReConPatch(**SMALL, refine=REFINE | {"inputs": inputs})
    features = detector.extractor(load_images(data.train.paths, detector.transform))
    detector.fit_features(features, log=len)
    seen = refinement.see(detector, features, range(len(features)))
    np.testing.assert_array_equal(seen.scores.flatten(1), detector.train_patch_scores_)
    own = refinement.see(detector, features)
    assert own.scores.mean() < seen.scores.mean() and torch.equal(
        own.scores[:1], refinement.see(detector, features[:1]).scores
    )
    if inputs == "map":
        assert not seen.distances.numel()
    else:
        represented = detector.represent_patches(torch.from_numpy(features[1]))
        literal = torch.cdist(represented, detector.fold_banks_[1].entries).argmin(1)
        torch.testing.assert_close(seen.distances[1], (represented - detector.fold_banks_[1].entries[literal]).abs())
        assert not torch.equal(seen.distances[1], own.distances[1])
    unprepared = ReConPatch(**SMALL).fit_features(features, log=len)
    unprepared.refine = detector.refine
    with pytest.raises(ValueError, match="calibration_folds: expected a detector that was made with `refine`"):
        refinement.fit(unprepared, np.zeros((6, 64, 64, 3), np.uint8), log=len)


def test_a_refined_cell_is_computed_once_and_goes_on_after_a_kill(tiny_set, tmp_path, monkeypatch):
    root, data = tiny_set
    store, cell = Store(tmp_path), Cell(Config(**SMALL), str(root), "gear")
    task = Refined(cell, Refinement.build(**REFINE))

    def killed(line):
        if line.startswith("refinement epoch   1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, store, killed)
    assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 1
    lines = []
    result = run(task, store, lines.append)
    assert not any("refinement epoch   1" in line for line in lines) and result.computed
    assert not list((tmp_path / "checkpoints").glob("*.safetensors")), "done: no checkpoint is left"
    assert not run(task, store, pytest.fail).computed
    detector = ReConPatch(**SMALL, refine=REFINE).fit(data.train, log=len)
    direct = detector.predict(data.test)
    np.testing.assert_allclose(result.maps(), direct.maps, rtol=2e-2, atol=1e-4)  # kept in half precision
    np.testing.assert_allclose(result.scores, direct.scores, atol=1e-5)
    expected = evaluate(direct, data.test)
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert result.metrics[name] == pytest.approx(expected[name], abs=1e-5)
    assert task.columns()["refinement"] == "with" and cell.columns()["refinement"] == "without"
    assert task.columns()["simulation"] == "structure"


def test_identity_of_a_refined_cell(tiny_set, tmp_path):
    root, _ = tiny_set
    cell = Cell(Config(**SMALL), str(root), "gear")

    def key(**changes):
        return key_of(Refined(cell, Refinement.build(**(REFINE | changes))).identity())

    for folder in ("a", "b"):
        (tmp_path / folder / "dotted").mkdir(parents=True)
        Image.new("RGB", (80, 80), "red").save(tmp_path / folder / "dotted" / "1.png")
    textures = {n: {"kind": "texture", "textures": str(tmp_path / n)} for n in ("a", "b")}
    assert key() == key() and key(**textures["a"]) == key(**textures["b"]), (
        "where the same textures lie does not matter"
    )
    Image.new("RGB", (80, 80), "blue").save(tmp_path / "b" / "dotted" / "2.png")
    assert (
        len({key(), key(seed=1), key(epochs=3), key(opacity=(0.5, 1.0)), key(**textures["a"]), key(**textures["b"])})
        == 6
    )


def test_an_ensemble_of_refined_members_is_the_mean_of_their_maps(tiny_set, tmp_path):
    root, _ = tiny_set
    store = Store(tmp_path)
    cells = [Cell(Config(**(SMALL | {"weights": f"random:{i}"})), str(root), "gear") for i in range(2)]
    members = tuple(Refined(cell, Refinement.build(**REFINE)) for cell in cells)
    found = run(Ensemble(members), store, len)
    results = [run(m, store, pytest.fail) for m in members]
    np.testing.assert_allclose(found.scores, np.mean([r.scores for r in results], 0))
    assert Ensemble(members).columns()["refinement"] == "with"
    with pytest.raises(ValueError, match="members: expected all of them with a refinement network or none"):
        run(Ensemble((cells[0], members[1])), store, len)


# ---- what the notebook shows of it ----


def test_gains_are_of_the_same_category_and_seed():
    rows = [
        {"category": c, "seed": s, "refinement": r, "simulation": k, "image_auroc": 0.9, "pixel_auroc": v, "aupro": 0.5}
        for c, s, r, k, v in [
            ("a", 0, "without", "no refinement", 0.80), ("a", 1, "without", "no refinement", 0.90),
            ("b", 0, "without", "no refinement", 0.60), ("b", 1, "without", "no refinement", 0.60),
            ("a", 0, "with", "structure", 0.82), ("a", 1, "with", "structure", 0.96),
            ("b", 0, "with", "structure", 0.58), ("b", 1, "with", "structure", 0.60),
        ]
    ]  # fmt: skip
    gains = views.refinement_gains(pd.DataFrame(rows))
    assert list(gains.index) == ["structure, a", "structure, b", "structure, mean of all 2"]
    found = gains["pixel AUROC"]
    assert found["gain"].tolist() == pytest.approx([4, -1, 1.5])
    assert found["spread"].tolist() == pytest.approx(
        [np.std([2, 6], ddof=1), np.std([-2, 0], ddof=1), np.std([0, 3], ddof=1)]
    )
    sizes = pd.concat([pd.DataFrame(rows).assign(image_size=size) for size in (320, 480)])
    sizes.loc[(sizes["image_size"] == 480) & (sizes["refinement"] == "with"), "pixel_auroc"] += 0.01
    by_size = views.refinement_gains_by_size(sizes)
    assert list(by_size.index[[0, 3]]) == ["320 px, structure, a", "480 px, structure, a"] and len(by_size) == 6
    assert by_size["pixel AUROC"]["gain"].tolist() == pytest.approx([4, -1, 1.5, 5, 0, 2.5])
    assert views.refinement_gains_by_size(Grid([], [], []).frame()).empty
    words = views.refinement_in_words(gains)
    assert (
        words
        == "structure: image AUROC +0.00, pixel AUROC +1.50, AU-PRO +0.00; both pixel metrics gain in 0 of 2 categories."
    )
    for aupro, better in ((0.004, 0), (0.1, 1)):  # 0.004 points are shown as 0.00
        assert f"gain in {better} of 2" in views.refinement_in_words(gains.mask(gains == 0, aupro))
    assert views.refinement_gains(pd.DataFrame()).empty and "Nothing" in views.refinement_in_words(
        views.refinement_gains(pd.DataFrame())
    )


def test_refined_and_unrefined_maps_are_shown_apart(tiny_set, tmp_path):
    root, _ = tiny_set
    store, cell = Store(tmp_path), Cell(Config(**SMALL), str(root), "gear")
    tasks = [
        cell,
        *(
            Refined(cell, Refinement.build(**REFINE | {"kind": k, "epochs": 1, "textures": "drawn"}))
            for k in ("structure", "mixture")
        ),
    ]
    grid = run_grid(tasks, store, log=len)
    shown = views.shown_maps(views.part(grid, simulation={"no refinement", "structure"}), "gear")
    assert list(shown.maps) == ["ReConPatch", "refined, structure"] and shown.maps["refined, structure"].max() <= 1
    np.testing.assert_allclose(shown.maps["ReConPatch"][-1], grid.results[0].maps()[-1])
    figure = plots.refined_maps(*shown)
    assert len(figure.axes) == 4 * len(shown.masks), "image, two maps, ROC"
    assert len(figure.axes[-1].lines) == 2 * shown.masks[-1].any()
    table = tables.averages(grid.frame(), "S7", ["simulation"], tables.WITH_AUPRO)
    assert list(table.index) == ["no refinement", "structure", "mixture"]
    assert list(dict.fromkeys(c[0] for c in table.columns)) == ["image AUROC", "pixel AUROC", "AU-PRO"]


def test_grids_of_tables_s7_and_s8(demo_root):
    s = Settings(profile="paper", data_root=str(demo_root))
    s7, s8 = grids.table_s7(s), grids.table_s8(s)
    assert [t.columns()["simulation"] for t in s7[:: len(s.categories) * 3]] == [
        "no refinement",
        "texture",
        "structure",
    ]
    assert all(t.refine.seed == t.config.seed and t.refine.epochs == 500 for t in s7 if isinstance(t, Refined))
    assert {(t.config.image_size, t.columns()["refinement"]) for t in s8} == {
        (a, b) for a in (320, 480) for b in ("with", "without")
    }
    assert all(t.method == "ReConPatch" and len(t.members) == 3 for t in s8)
    plain = [t for t in grids.table_6(s) if t.config.represent]
    assert [t for t in s8 if t.columns()["refinement"] == "without"] == plain, "computed once, with Table 6"
    assert grids.refinement(s, epochs=7, opacity=[0.5, 1.0]).simulation.opacity == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"refine: unknown option 'epoch'"):
        grids.refinement(s, epoch=7)
