"""What makes inference fast, against the plain way of computing it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from rcp import PatchCore, ReConPatch, backbone
from rcp.backbone import Backbone, SinglePictureConvolution, normalize
from rcp.config import Config
from rcp.data import load_dataset
from rcp.patches import PatchExtractor, pool
from rcp.scoring import score_maps
from rcp.timing import inference


def interpolated_and_filtered(scores, size, blur):
    maps = F.interpolate(scores[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0].numpy()
    return gaussian_filter(maps, sigma=(0, blur, blur)) if blur else maps


@pytest.mark.parametrize(
    ("side", "size", "blur"), [(28, 224, 4.0), (60, 480, 4.0), (28, 224, 0), (4, 16, 9.0), (3, 50, 1.3)]
)
@pytest.mark.parametrize("kind", ["random", "constant", "one patch", "huge"])
def test_maps_are_what_interpolation_and_scipys_filter_give(side, size, blur, kind):
    scores = torch.rand(3, side, side)
    if kind == "constant":
        scores[:] = 2.5
    if kind == "one patch":
        scores = F.one_hot(torch.tensor([0, side, side**2 - 1]), side**2).float().reshape(3, side, side)
    if kind == "huge":
        scores *= 1e20
    expected = interpolated_and_filtered(scores, size, blur)
    got = score_maps(scores, size, blur)
    assert got.dtype == np.float32 and got.shape == (3, size, size)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("dim", [512, 256, 300, 1024])
def test_pooling_is_adaptive_average_pooling(dim):
    p = torch.randn(50, 1024).half().float()
    assert torch.equal(pool(p, dim), F.adaptive_avg_pool1d(p[:, None], dim)[:, 0])


def test_inference_is_timed_stage_by_stage(demo_root):
    dataset = load_dataset(demo_root, category="gear")
    for cls in (PatchCore, ReConPatch):
        detector = cls(
            backbone="resnet18", weights="random:0", resize=64, image_size=64, dim=64, epochs=1, coreset_ratio=0.1
        )
        detector.fit(dataset.train[:3], log=len)
        calls = []
        original = detector.score_patches
        detector.score_patches = lambda f, original=original, calls=calls: calls.append(f.shape) or original(f)
        seconds = inference(detector, np.zeros((5, 64, 64, 3), np.uint8), warm_ups=2, iterations=5)
        assert (
            list(seconds) == ["all", "backbone", "features", "f", "search", "map"]
            and calls == [(4, 64, 64), (1, 64, 64)] * 7
        )
        table = np.array(list(seconds.values()))
        assert table.shape == (6, 5) and (table > 0).all()
        assert (table[0] >= 0.999 * table[1:].sum(0)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_picture_gives_torchs_maps_to_the_last_bit(dtype):
    extractor = PatchExtractor(
        Config(backbone="resnet18", weights="random:2", backbone_dtype=dtype), torch.device("cpu")
    )
    plain = Backbone("resnet18", "random:2", (2, 3)).to(dtype=getattr(torch, dtype), memory_format=torch.channels_last)
    kept = [m for m in extractor.backbone.modules() if isinstance(m, SinglePictureConvolution)]
    assert len(kept) == (15 if backbone._lays_out(getattr(torch, dtype)) else 0)
    for count, size in ((3, 224), (1, 224), (1, 320), (3, 320), (1, 224)):
        pictures = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
        expected = plain(normalize(torch.from_numpy(pictures)).to(getattr(torch, dtype)))
        torch.testing.assert_close(extractor.maps(pictures), [m.float() for m in expected], atol=0, rtol=0)
        assert all(m._shape is None or m._shape[0] == 1 for m in kept), "a batch takes torch's way"
        if count == 1 and kept:
            first = next(m for m in kept if m.plain.in_channels == 3)
            assert first._shape == (1, 3, size, size), "laid out for this picture's size"
    again = [m._laid_out for m in kept]
    extractor.maps(pictures)
    assert all(m._laid_out is before for m, before in zip(kept, again, strict=True)), "kept"


def test_a_torch_that_cannot_keep_the_layout_says_so_and_gives_the_same(monkeypatch, caplog):
    def lacking(*_):
        raise AttributeError("no such operator")

    def maps():
        extractor = PatchExtractor(Config(backbone="resnet18", weights="random:2"), torch.device("cpu"))
        return extractor.maps(np.full((1, 64, 64, 3), 90, np.uint8))

    expected = maps()
    monkeypatch.setattr(SinglePictureConvolution, "forward", lacking)
    backbone._lays_out.cache_clear()
    try:
        torch.testing.assert_close(maps(), expected)
    finally:
        backbone._lays_out.cache_clear()
    assert [r.message for r in caplog.records] == [
        "single pictures take up to a fifth longer here, same results (no such operator)"
    ]
