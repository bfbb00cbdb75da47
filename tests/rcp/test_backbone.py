"""Backbones: levels by number, weights by tag, file and seed, and errors before any work; from their maps to p."""

import os
import re
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import literal
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from rcp import Config, backbone
from rcp.backbone import Backbone, check, normalize, weights_identity
from rcp.model import initial
from rcp.patches import aggregate, pool


@pytest.mark.parametrize(("name", "channels"), [
    ("resnet18", (128, 256)),
    ("wide_resnet50_2", (512, 1024)),
    ("densenet121", (512, 1024)),
    ("efficientnet_b0", (40, 112)),  # timm, as all that follow
    ("resnetv2_50", (512, 1024)),
    ("tf_efficientnet_lite0", (40, 112)),  # whose padding cannot be traced
])  # fmt: skip
def test_levels_2_and_3_have_strides_8_and_16(name, channels):
    backbone = Backbone(name, "random:0", (2, 3))
    maps = backbone(torch.rand(1, 3, 96, 96))
    assert backbone.channels == channels
    assert [m.shape[1:] for m in maps] == [(channels[0], 12, 12), (channels[1], 6, 6)]


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    a, b, c = (Backbone("resnet18", f"random:{s}", (1,)) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(a(x)[0], b(x)[0]) and not torch.equal(a(x)[0], c(x)[0])


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_from_a_file_may_lack_deeper_layers(tmp_path, kind):
    state = {k: v for k, v in models.resnet18(weights=None).state_dict().items() if not k.startswith(("layer4", "fc"))}
    path = tmp_path / f"w.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    backbone = Backbone("resnet18", str(path), (2, 3))
    assert torch.equal(backbone.trunk.state_dict()["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])


def test_weights_that_do_not_fit_name_missing_unexpected_and_shapes(tmp_path):
    state = models.resnet18(weights=None).state_dict()
    del state["layer2.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        Backbone("resnet18", str(tmp_path / "w.safetensors"), (2, 3))
    message = str(error.value)
    assert "w.safetensors does not fit resnet18" in message
    assert "1 missing: layer2.0.conv1.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in message


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ("owned",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"weights: .*evil\.pth"):
        Backbone("resnet18", str(tmp_path / "evil.pth"), (1,))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("name", "weights", "error", "message"), [
    (
        "resnet81",
        "random:0",
        ValueError,
        "neither torchvision nor timm has a model 'resnet81'. Did you mean 'resnet18'?",
    ),
    ("vgg1", "random:0", ValueError, "Did you mean 'vgg19'? Of torchvision's, ResNets and DenseNets are taken."),
    ("resnet18", "IMAGENET1K_V7", ValueError, "resnet18 has no weights 'IMAGENET1K_V7'; expected IMAGENET1K_V1"),
    ("resnet18", "random:zero", ValueError, "weights: expected random:SEED with a whole number, got 'random:zero'"),
    ("resnet18", "random:²", ValueError, "weights: expected random:SEED with a whole number, got 'random:²'"),
    ("resnet18", "no/such.safetensors", FileNotFoundError, "weights: no file no/such.safetensors"),
    ("resnet18", "SUCH.PTH", FileNotFoundError, "weights: no file SUCH.PTH"),
])  # fmt: skip
def test_wrong_names_are_refused_without_building_anything(name, weights, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check(name, weights)


def test_a_cnn_whose_channels_come_last_is_refused():
    with pytest.raises(
        ValueError, match=r"backbone: expected a CNN with maps \(n, C, h, w\), got 'mambaout_femto with"
    ):
        Backbone("mambaout_femto", "random:0", (2,))


def test_weights_of_timm_see_the_range_they_were_trained_with(monkeypatch):
    timm, white, black = (
        pytest.importorskip("timm"),
        torch.full((1, 32, 32, 3), 255, dtype=torch.uint8),
        torch.zeros(1, 32, 32, 3),
    )
    drawn = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: drawn)
    seen, cnn = [], Backbone("tf_efficientnet_lite0", "pretrained", (2,))
    cnn.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for image in (white, black.to(torch.uint8)):
        cnn(normalize(image))
    assert [round(float(x.max()), 4) for x in seen] == [round(float(x.min()), 4) for x in seen] == [1, -1]


def test_damage_within_a_pth_file_is_noticed(tmp_path):
    file = tmp_path / "resnet18.pth"
    torch.save(models.resnet18().state_dict(), file)
    Backbone("resnet18", str(file), (2,))
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(4096))
    with pytest.raises(ValueError, match=r"weights: .*resnet18.pth is damaged \("):
        Backbone("resnet18", str(file), (2,))


def test_a_transformer_of_one_size_is_refused_by_name(monkeypatch):
    def fails(*_):
        raise AssertionError("Input height doesn't match")

    monkeypatch.setattr(backbone, "_build", fails)
    with pytest.raises(
        ValueError, match=r"backbone: expected a CNN for images of any size, got resnet18 .AssertionError: Input"
    ):
        Backbone("resnet18", "random:0", (2,))


def test_weights_of_timm_that_cannot_be_fetched_are_named(monkeypatch):
    timm = pytest.importorskip("timm")

    def fails(*_, **__):
        raise OSError("no net")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(OSError, match=r"weights: efficientnet_b0 of timm could not be fetched \(no net\); name a file"):
        Backbone("efficientnet_b0", "pretrained", (2,))


def test_threads_draw_what_their_own_seed_says(monkeypatch):
    """The generator is the process's."""
    p, config = torch.zeros(1, 4, 8), Config(dim=4, patch_dim=8, projection=None)
    alone = [initial(p, config.replace(seed=seed)).f.weight for seed in range(4)]
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeded(seed), time.sleep(0.05)))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: initial(p, config.replace(seed=seed)).f.weight, range(4)))
    assert all(map(torch.equal, together, alone))


def test_a_level_that_is_not_there():
    with pytest.raises(ValueError, match=re.escape("layers: resnet18 has no level 5 (stride 64); it has [1, 2, 3, 4]")):
        Backbone("resnet18", "random:0", (2, 5))


def test_identity_is_the_content_of_a_file_not_its_place(tmp_path):
    state = models.resnet18(weights=None).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    a, b = (weights_identity("resnet18", str(tmp_path / f"{n}.safetensors")) for n in "ab")
    assert a == b != weights_identity("resnet18", "random:0")


def test_weights_by_tag_come_from_the_weights_folder_and_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("RCP_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name
    state = models.resnet18(weights=None).state_dict()
    torch.save(state, file)
    with pytest.raises(
        ValueError,
        match=r"weights: expected resnet18 IMAGENET1K_V1 as published .*; remove .*resnet18-",
    ):
        Backbone("resnet18", "IMAGENET1K_V1", (2,))
    found = SimpleNamespace(hexdigest=lambda: file.stem.rpartition("-")[2] * 8)  # as if it were the published file
    monkeypatch.setattr("rcp.backbone.hashlib.file_digest", lambda *_: found)
    backbone = Backbone("resnet18", "IMAGENET1K_V1", (2,))
    assert torch.equal(backbone.trunk.state_dict()["conv1.weight"], state["conv1.weight"])
    torch.save({"conv1.weight": Evil()}, file)
    with pytest.raises(Exception, match=r"(?i)weights"):
        Backbone("resnet18", "IMAGENET1K_V1", (2,))
    assert not (tmp_path / "owned").exists()


def test_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path, monkeypatch):
    from urllib.error import URLError

    monkeypatch.setenv("RCP_WEIGHTS", str(tmp_path))

    def refused(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(
        OSError, match=r"resnet18 IMAGENET1K_V1 could not be fetched .*; place .* at .*resnet18-.*\.pth"
    ):
        Backbone("resnet18", "IMAGENET1K_V1", (2,))


def test_weights_that_are_not_dense_finite_real_numbers_are_named(tmp_path):
    state, path = models.resnet18(weights=None).state_dict(), tmp_path / "w.pth"
    one = state["conv1.weight"]
    for odd in (one.to_sparse(), one.to("meta"), one.long(), one.to(torch.complex64), one * torch.nan):
        torch.save(state | {"conv1.weight": odd}, path)
        with pytest.raises(
            ValueError, match=r"w.pth does not fit resnet18; 1 not dense finite real numbers: conv1.weight"
        ):
            Backbone("resnet18", str(path), (1,))
    with pytest.raises(
        ValueError, match=r'weights: expected a tag such as IMAGENET1K_V1, a file, or "random:SEED", got'
    ):
        Backbone("resnet18", "", (1,))


@pytest.mark.parametrize("content", [[1, 2], {"conv1.weight": "text"}])
def test_a_pth_that_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        Backbone("resnet18", str(tmp_path / "w.pth"), (1,))


def test_a_cnn_does_without_torchs_compiler_which_is_there_when_asked_for():
    """It takes 2 s of what a first score waits for."""
    code = (
        "import sys, torch, rcp.backbone as b; b.Backbone('resnet18', 'random:0', (2,));"
        "b.Backbone('efficientnet_lite0', 'random:0', (2,)); assert 'torch._dynamo' not in sys.modules;"
        "import torchvision; boxes = torch.tensor([[0, 0.0, 0, 8, 8]]);"
        "assert torchvision.ops.roi_align(torch.rand(1, 3, 16, 16), boxes, 4).shape == (1, 3, 4, 4);"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_that_wait_give_their_core_away_unless_the_user_says_otherwise():
    code = (
        "import os, sys; sys.modules['torch'] = None\n"  # which reads it when it is imported: it must stand there before
        "try: import rcp\nexcept ImportError: print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | (
            {"OMP_WAIT_POLICY": given} if given else {}
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_a_cnn_that_is_no_longer_used_goes_when_the_next_is_built():
    """Its trace is a reference cycle; 50 detectors one after the other would hold 50 of them."""
    gone = weakref.ref(Backbone("resnet18", "random:0", (2,)).trunk)
    Backbone("resnet18", "random:0", (2,))
    assert gone() is None


@pytest.mark.parametrize(("channels", "sides", "p", "dim"), [
    ((128, 256), (8, 4), 3, 1024),  # ResNet-18, levels 2+3
    ((512, 1024), (6, 3), 3, 1024),  # WideResNet-50
    ((64, 128, 256), (16, 8, 4), 5, 1024),  # levels 1+2+3, patch 5
    ((512, 1792), (6, 3), 3, 1024),  # DenseNet-201
    ((48, 96), (9, 5), 5, 384),  # nothing divides anything
    ((32,), (7,), 1, 16),
])  # fmt: skip
def test_aggregation_is_the_references_chain(channels, sides, p, dim):
    maps = [torch.randn(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    maps[0][1] = 3.0  # constant
    found = aggregate(maps, p, 1024, dim)
    assert found.shape == (2, sides[0] ** 2, dim)
    torch.testing.assert_close(found, literal.aggregate(maps, p, 1024, dim), atol=1e-5, rtol=1e-5)


def test_pooling_in_two_steps_is_pooling_in_one_where_dimensions_divide():
    maps = [torch.randn(1, 128, 6, 6), torch.randn(1, 256, 3, 3)]
    stored = aggregate(maps, 3, 1024, 1024)[0]
    for dim in (1024, 512, 256, 64):
        torch.testing.assert_close(pool(stored, dim), aggregate(maps, 3, 1024, dim)[0], atol=1e-5, rtol=0)
