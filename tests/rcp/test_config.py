"""Hyper-parameters: defaults are the paper's, and a wrong one is refused with the argument, what was expected, what came."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch

from rcp import Config, PatchCore, ReConPatch
from rcp.model import initial


def test_defaults_are_the_papers_single_model():
    c = Config()
    assert (c.backbone, c.layers, c.patch_size, c.dim, c.coreset_ratio) == ("wide_resnet50_2", (2, 3), 3, 512, 0.01)
    assert (c.epochs, c.lr, c.weight_decay, c.k, c.margin, c.alpha) == (120, 1e-5, 1e-2, 5, 1.0, 0.5)
    assert (c.resize, c.image_size) == (256, 224)


def test_every_hyper_parameter_is_documented_with_its_provenance_and_in_the_signature():
    doc, signature = inspect.getdoc(Config), inspect.signature(ReConPatch).parameters
    for field in dataclasses.fields(Config):
        assert f"{field.name}: {field.metadata['meaning']}" in doc
        if field.name not in ("representation", "device", "seed", "calibration_folds"):
            assert re.search(r"\[(P|I|\?)\]", field.metadata["meaning"]), f"{field.name} has no provenance mark"
        if field.name != "representation":
            assert signature[field.name].default == field.default


def test_numbers_that_numpy_computed_are_numbers_also_within_a_tuple():
    one, two = np.int64(1), np.int64(2)
    c = Config(layers=(two, np.int64(3)), tiles=(one, two), aspect="squash")
    assert json.dumps(c.asdict()) == json.dumps(Config(tiles=(1, 2), aspect="squash").asdict())


@pytest.mark.parametrize(("values", "message"), [
    ({"image_size": 300}, "image_size: expected at most resize=256 (the crop lies inside the image), got 300"),
    ({"margin": -0.5}, "margin: expected 0 or more, got -0.5"),
    ({"k": 64, "batch_size": 64}, "k: expected fewer than batch_size=64 patches, got 64"),
    ({"k": 1}, "k: expected 2 or more"),
    ({"coreset_ratio": 0.0}, "coreset_ratio: expected a number above 0, got 0.0"),
    ({"coreset_ratio": 1.5}, "coreset_ratio: expected at most 1, got 1.5"),
    ({"patch_size": 4}, "patch_size: expected an odd number, got 4"),
    ({"alpha": 2}, "alpha: expected at most 1, got 2"),
    ({"alpha": -1}, "alpha: expected 0 or more"),
    ({"gamma": 1.5}, "gamma: expected at most 1, got 1.5"),
    ({"projection": 0}, "projection: expected a number above 0"),
    ({"layers": (0, 2)}, "layers: expected hierarchy levels from 1 such as (2, 3), got (0, 2)"),
    ({"layers": "2,3"}, "layers: expected hierarchy levels"),
    ({"epochs": "120"}, "epochs: expected int, got '120' (str)"),
    ({"normalize_teacher": 1}, "normalize_teacher: expected bool, got 1 (int)"),
    ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
    ({"coreset_start": "men"}, "coreset_start: expected one of 'mean', 'random', got 'men'. Did you mean 'mean'?"),
    ({"margni": 1.0}, "unknown hyper-parameter 'margni'. Did you mean 'margin'?"),
    ({"neighbours": 1}, "neighbours: expected 2 or more"),
    ({"representation": "none", "dim": 2048}, "dim: expected at most patch_dim=1024"),
    ({"aggregation": "mean", "patch_dim": 1024}, "patch_dim: expected None with aggregation='mean'"),
    ({"representation": "whitened", "whitening": 0.0}, "whitening: expected a number above 0, got 0.0"),
])  # fmt: skip
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.build(**values)


def test_patchcore_and_reconpatch_differ_by_one_switch():
    small = {"backbone": "resnet18", "weights": "random:0"}
    with_f, without = ReConPatch(**small).config.asdict(), PatchCore(**small).config.asdict()
    assert {name for name in with_f if with_f[name] != without[name]} == {"representation"}
    with pytest.raises(ValueError, match="representation: expected 'none' of a PatchCore, got 'trained'"):
        PatchCore(**small, representation="trained")


def test_the_size_of_g_counts_for_a_random_f_where_f_is_drawn_after_it():
    x = torch.zeros(1, 1, 32)
    for init in ("default", "orthogonal"):
        a, b = (Config(representation="random", init=init, dim=16, projection=n) for n in (8, 4))
        same = torch.equal(*(initial(x, c).f.weight for c in (a, b)))
        assert (a.upto("scores") == b.upto("scores")) == same == (init == "default")


def test_patchcore_extracts_another_dimension_only_where_pooling_in_steps_is_not_exact():
    assert Config(representation="none", dim=256).extracted_dim == 1024
    assert Config(representation="none", dim=384).extracted_dim == 384
    assert Config(dim=384).extracted_dim == 1024
