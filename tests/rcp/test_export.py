"""A detector as one file: what runs it gives what ``predict`` gives."""

import importlib.util

import numpy as np
import pytest
import torch

from rcp import PatchCore, ReConPatch
from rcp.__main__ import main
from rcp.export import Deployed, _check, export

TINY = {
    "backbone": "resnet18", "weights": "random:0", "resize": 64, "image_size": 64, "coreset_ratio": 0.1, "device": "cpu",
}  # fmt: skip
IMAGES = np.random.default_rng(1).integers(0, 256, (8, 64, 64, 3), np.uint8)
ODD = np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), IMAGES[0]])


def fitted(**how):
    kind = ReConPatch if "representation" in how else PatchCore
    return kind(**TINY | how).fit(IMAGES, lambda _line: None)


@pytest.fixture(scope="module")
def detector():
    return fitted(dim=64, false_alarm_rate=0.2)


def assert_same(detector, found, images):
    own = detector.predict(images)
    np.testing.assert_allclose(found[0], own.scores, rtol=1e-4)
    np.testing.assert_allclose(found[1], own.maps, atol=1e-3 * own.maps.max())
    assert (np.asarray(found[2]) == own.defective).all()


@pytest.mark.parametrize(
    "how",
    [
        {"dim": 64},
        {"aggregation": "mean", "representation": "whitened"},
        {"coreset_ratio": 1.0, "dim": 64},
        {"weighting": "none", "dim": 64},
        {"backbone_dtype": "bfloat16", "dim": 64},
    ],
    ids=["pooled", "whitened mean", "full bank", "Eq. 9 alone", "bfloat16"],
)
def test_what_is_exported_gives_what_predict_gives(how):
    detector = fitted(**how, false_alarm_rate=0.2)
    for images in (IMAGES[:1], ODD, IMAGES):
        with torch.no_grad():
            found = Deployed(detector)(torch.from_numpy(images))
        assert_same(detector, [out.numpy() for out in found], images)


def test_onnxruntime_gives_what_predict_gives(detector, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(detector.export(tmp_path / "part.onnx"))
    assert "threshold" in session.get_modelmeta().custom_metadata_map["rcp"]
    for images in (IMAGES[:1], ODD, IMAGES):
        assert_same(detector, session.run(["scores", "maps", "defective"], {"images": images}), images)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_detector_without_a_threshold_exports_no_decision(suffix, tmp_path):
    file, detector = tmp_path / f"part{suffix}", fitted(dim=64, calibration_folds=0)
    if suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(detector.export(file))
        assert [out.name for out in session.get_outputs()] == ["scores", "maps"]
    else:
        scores, _maps = torch.export.load(detector.export(file)).module()(torch.from_numpy(ODD))
        np.testing.assert_allclose(scores, detector.predict(ODD).scores, rtol=1e-4)


def test_what_differs_from_predict_is_refused(detector):
    own = detector.predict(IMAGES)
    _check(detector, IMAGES, [own.scores, own.maps])
    with pytest.raises(ValueError, match=r"export: expected scores within 0.0001 of predict's, got '0.01'"):
        _check(detector, IMAGES, [own.scores * 1.01, own.maps])
    with pytest.raises(ValueError, match=r"export: expected maps within 0.001 of predict's, got"):
        _check(detector, IMAGES, [own.scores, own.maps[:, ::-1]])


def test_what_cannot_be_exported_is_refused_before_work(detector, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .onnx or .pt2, got 'part.zip'"):
        detector.export("part.zip")
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent to export"):
        detector.export(tmp_path / "absent" / "part.onnx")
    with pytest.raises(ValueError, match="backbone_dtype: expected float32 for an ONNX file"):
        fitted(dim=64, backbone_dtype="bfloat16").export(tmp_path / "part.onnx")
    with pytest.raises(ValueError, match="tiles: expected"):
        fitted(dim=64, tiles=(2, 2), aspect="squash").export(tmp_path / "part.pt2")
    with pytest.raises(ValueError, match="not fitted"):
        PatchCore(**TINY).export(tmp_path / "part.pt2")
    monkeypatch.setattr(torch.export, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detector.export(tmp_path / "part.pt2")
    assert not list(tmp_path.iterdir()), "nothing is left of what was begun"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs the extra export: pip install "rcp\[export\]"'):
        export(detector, tmp_path / "part.onnx")


def test_the_command_line_exports_a_pt2_file(detector, tmp_path, capsys):
    detector.save(tmp_path / "part.rcp")
    assert main(["export", str(tmp_path / "part.rcp"), str(tmp_path / "part.pt2"), "--device", "cpu"]) == 0
    assert "exported" in capsys.readouterr().err
    run = torch.export.load(tmp_path / "part.pt2").module()
    assert_same(detector, [out.numpy() for out in run(torch.from_numpy(ODD))], ODD)
    assert main(["export", str(tmp_path / "part.rcp"), str(tmp_path / "part.txt")]) == 2
    assert "path: expected a name that ends in" in capsys.readouterr().err
