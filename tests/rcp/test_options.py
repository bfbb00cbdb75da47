"""What the paper does not have: the mean aggregation, the controls of f, random selection, a bank of all patches."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from rcp import Config, PatchCore, ReConPatch
from rcp.config import INSPECTION, NARROW
from rcp.coreset import random_selection
from rcp.model import initial, represent
from rcp.patches import aggregate_mean, pool

SMALL = {
    "backbone": "resnet18", "weights": "random:0", "resize": 72, "image_size": 64, "dim": 16, "coreset_ratio": 0.1,
    "calibration_folds": 0, "device": "cpu",
}  # fmt: skip


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (80, 80, 3), np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("sides", [(1, 1), (5, 3), (4, 2)])
def test_mean_is_each_channels_average_over_the_neighbourhood(size, sides):
    maps = [draw(i, 2, 3 + i, side, side) * 10 for i, side in enumerate(sides)]
    means = []
    for m in maps:
        side = m.shape[-1]
        literal, reach = torch.zeros_like(m), size // 2
        for y in range(side):
            for x in range(side):
                window = m[:, :, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
                literal[:, :, y, x] = window.sum((2, 3)) / size**2  # zeros outside the map count
        means.append(torch.nn.functional.interpolate(literal, size=(sides[0],) * 2, mode="bilinear"))
    expected = torch.cat(means, 1).permute(0, 2, 3, 1).reshape(2, sides[0] ** 2, -1)
    torch.testing.assert_close(aggregate_mean(maps, size), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["pooled", "mean"])
@pytest.mark.parametrize("odd", ["offset", "constant channel", "few patches", "duplicates", "huge"])
@pytest.mark.parametrize("lam", [1.0, 0.01])
def test_whitening_is_the_inverse_root_of_the_shrunk_covariance(odd, lam, aggregation):
    p = draw(0, 3, 30, 12) * torch.linspace(0.1, 3, 12)
    if odd == "offset":
        p += 100
    elif odd == "constant channel":
        p[..., :6] = 4.0
    elif odd == "few patches":
        p = p[:1, :5]
    elif odd == "duplicates":
        p[:] = p[:, :1].clone()
    elif odd == "huge":
        p *= 1e4
    config = Config(representation="whitened", whitening=lam, dim=6, aggregation=aggregation)
    f, history = represent(p, config)
    x = p.reshape(-1, 12).double()
    x = pool(x, 6) if aggregation == "pooled" else x
    c = np.cov(x.numpy().T, bias=True)
    shrunk = c + lam * np.trace(c) / len(c) * np.eye(len(c))
    root = np.linalg.inv(np.linalg.cholesky(shrunk))  # its Gram matrix is that of shrunk^-1/2: distances are equal
    z = (x - x.mean(0)).numpy() @ root.T
    expected = torch.cdist(torch.from_numpy(z), torch.from_numpy(z))
    found = f(p.reshape(-1, 12)).double()
    assert history == [] and not f.weight.requires_grad
    torch.testing.assert_close(
        torch.cdist(found, found), expected, rtol=2e-5, atol=2e-5 * (10 if odd == "offset" else 1)
    )


@pytest.mark.parametrize("change", [{"representation": "whitened"}, {"init": "pca", "dim": 4}])
def test_patches_without_variance_are_refused(change):
    with pytest.raises(ValueError, match="images: expected patches that differ, got '10 patches with zero variance'"):
        represent(torch.ones(2, 5, 8), Config(**{"epochs": 1, "batch_size": 8, **change}))


def test_random_f_is_where_training_begins():
    p = draw(0, 4, 32, 8)
    config = Config(dim=4, projection=None, epochs=1, lr=1e-12, weight_decay=0.0, batch_size=16)
    trained, rows = represent(p, config, log=len)
    begun, none = represent(p, dataclasses.replace(config, representation="random"))
    assert rows and none == []
    torch.testing.assert_close(begun.weight, trained.weight, rtol=0, atol=1e-7)
    assert represent(p, dataclasses.replace(config, representation="none")) == (None, [])


def test_pca_begins_with_the_principal_directions():
    p = draw(0, 4, 50, 8) * torch.tensor([5.0, 1, 1, 4, 1, 1, 1, 3]) + 7
    f = initial(p, Config(dim=3, init="pca")).f
    x = p.reshape(-1, 8)
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = (x - x.mean(0)) @ v[:3].T
    torch.testing.assert_close(f(x).abs(), expected.abs(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"dim: expected at most 8 .the size of p. with init='pca', got 9"):
        initial(p, Config(dim=9, init="pca"))


def test_random_selection_follows_the_seed_and_stays_inside():
    among = torch.arange(50) % 2 == 1
    picks = [random_selection(50, 20, seed, among).tolist() for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert len(set(picks[0])) == 20 and all(i % 2 for i in picks[0])
    assert sorted(random_selection(5, 5, 0).tolist()) == list(range(5))


@pytest.mark.parametrize("quick", ["0", "1"])
@pytest.mark.parametrize("cls", [PatchCore, ReConPatch])
def test_a_bank_of_all_patches_scores_the_distance_to_the_nearest(images, cls, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_FAST", quick)
    how = {} if cls is PatchCore else {"representation": "random"}
    detector = cls(**SMALL | {"coreset_ratio": 1.0}, **how).fit(images[:3])
    p = detector.represent_patches(torch.as_tensor(detector.extractor(_decoded(detector, images))))
    literal = torch.cdist(p[3].double(), p[:3].flatten(0, 1).double()).amin(1)
    out = detector.predict(images)
    np.testing.assert_allclose(out.patch_scores[3].ravel(), literal, rtol=1e-5, atol=1e-5)
    assert np.abs(out.scores[:3]).max() == 0, "each training patch is in the bank"
    detector.save(tmp_path / "part.rcp")
    np.testing.assert_array_equal(cls.load(tmp_path / "part.rcp").predict(images).scores, out.scores)


def _decoded(detector, images):
    from rcp.data import load_images

    return load_images(images, detector.transform)


@pytest.mark.parametrize("change", [
    {"aggregation": "mean"}, {"representation": "whitened"}, {"representation": "whitened", "aggregation": "mean"},
    {"selection": "random"}, {"representation": "random", "init": "pca", "aggregation": "mean"},
])  # fmt: skip
def test_each_option_fits_saves_and_loads_and_changes_the_scores(images, change, tmp_path):
    cls = ReConPatch if "representation" in change else PatchCore
    detector = cls(**SMALL | {"calibration_folds": 2} | change).fit(images[:3], log=len)
    if change.get("aggregation") == "mean":
        size = 384 if change.get("representation") != "random" else 16
        assert detector.bank_.entries.shape[1] == size, "128 + 256 channels, none pooled away"
    scores = detector.predict(images).scores
    detector.save(tmp_path / "part.rcp")
    np.testing.assert_array_equal(cls.load(tmp_path / "part.rcp").predict(images).scores, scores)
    plain = PatchCore(**SMALL).fit(images[:3]).predict(images).scores
    assert not np.allclose(scores, plain, rtol=1e-3)


def test_one_training_image_is_enough(images):
    for change in ({"representation": "whitened"}, {"representation": "random", "coreset_ratio": 1.0}):
        out = ReConPatch(**SMALL | {"calibration_folds": 2} | change).fit(images[:1]).predict(images)
        assert np.isfinite(out.scores).all() and out.train_scores is None


def test_what_does_not_fit_into_memory_is_refused_before_any_work(images, monkeypatch):
    monkeypatch.setattr("rcp.paths.free_memory", lambda device: 100_000)
    advice = (
        r"coreset_ratio: 256 patches of 64 numbers need 0.000131 GB with their memory bank, 0.0001 GB are free on cpu"
    )
    with pytest.raises(MemoryError, match=advice + r"; coreset_ratio=0\.525 would"):
        PatchCore(**SMALL | {"dim": 64, "coreset_ratio": 1.0}).fit(images)
    monkeypatch.setattr("rcp.paths.free_memory", lambda device: 10_000)
    with pytest.raises(MemoryError, match="no coreset_ratio would; take fewer or smaller images"):
        PatchCore(**SMALL | {"dim": 64}).fit(images)


def test_an_identity_holds_what_the_result_depends_on_and_no_more():
    def of(**values):
        return Config(**values).upto("scores")

    none, trained = {"representation": "none"}, {"representation": "trained"}
    assert of(**none) == of(**none, epochs=3, whitening=2.0, seed=1)
    assert of(representation="random") == of(representation="random", epochs=3, whitening=2.0)
    assert of(representation="random") != of(representation="random", seed=1)
    assert of(representation="whitened") != of(representation="whitened", whitening=2.0)
    assert of(**trained, coreset_ratio=1.0) == of(**trained, coreset_ratio=1.0, neighbours=3, selection="random")
    assert of(**none, selection="random") != of(**none, selection="random", seed=1)
    assert of(**none, aggregation="mean") == of(**none, aggregation="mean", dim=64)
    assert of(**trained, aggregation="mean") != of(**trained, aggregation="mean", dim=64)
    assert len({str(of(**trained, aggregation=a)) for a in ("mean", "pooled")}) == 2


# ---- the preset ----


@pytest.mark.parametrize(("backbone", "own"), [("resnet50", {}), ("resnet18", NARROW["resnet18"])])
def test_the_preset_is_a_config_that_whitens_and_trains_nothing(backbone, own):
    preset = Config.for_inspection(backbone=backbone, weights="random:0")
    assert preset == Config(**INSPECTION | own, backbone=backbone, weights="random:0") and preset.coreset_ratio == 0.01
    assert ReConPatch.from_config(preset).transform.window(300, 500) == (0, 0, 300, 500), "nothing is cropped"
    larger = Config.for_inspection(image_size=320, whitening=2.0), Config.for_inspection(resize=320, whitening=2.0)
    assert larger[0] == larger[1] and (larger[0].resize, larger[0].whitening) == (320, 2.0)
    with pytest.raises(ValueError, match=r"unknown hyper-parameter 'whitenign'\. Did you mean 'whitening'"):
        Config.for_inspection(whitenign=1.0)
    assert ReConPatch.from_config(preset).config == preset
