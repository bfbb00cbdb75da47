"""The Python interface, on drawn images and a backbone of random weights: fit, predict, save, load, and what is refused."""

import copy
import io
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from rcp import PatchCore, ReConPatch, backbone
from rcp.data import Transform, load_dataset
from rcp.detector import resolve_device

SMALL = {
    "backbone": "resnet18", "weights": "random:0", "resize": 64, "image_size": 64, "dim": 64, "projection": 16, "epochs": 2,
    "batch_size": 128, "coreset_ratio": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(demo_root):
    return load_dataset(demo_root, category="gear")


@pytest.fixture(scope="module")
def fitted(data):
    return ReConPatch(**SMALL).fit(data.train[:8], log=lambda _line: None)


def test_predict_gives_scores_and_maps(fitted, data):
    out = fitted.predict(data.test[:5])
    assert out.scores.shape == (5,) and out.scores.dtype == np.float32
    assert out.maps.shape == (5, 64, 64) and out.maps.dtype == np.float32
    assert np.isfinite(out.maps).all() and (out.scores > 0).all()
    assert fitted.predict(data.test[:5], maps=False).maps is None
    assert out.train_scores.shape == (8,)
    assert fitted.bank_.entries.shape == (int(0.1 * 8 * 64), 64)


def test_the_same_seed_gives_the_same_scores_and_another_does_not(data):
    scores = [ReConPatch(**SMALL, seed=s).fit(data.train[:4], log=len).predict(data.test[:3]).scores for s in (0, 0, 1)]
    assert np.array_equal(scores[0], scores[1]) and not np.allclose(scores[0], scores[2])


def test_what_the_caller_asked_of_autograd_changes_nothing(data):
    expected = ReConPatch(**SMALL).fit(data.train[:4], log=len).train_scores_
    for of_the_caller in (torch.no_grad(), torch.inference_mode()):
        with of_the_caller:
            assert np.array_equal(ReConPatch(**SMALL).fit(data.train[:4], log=len).train_scores_, expected)


def test_a_stream_that_lacks_a_letter_ends_no_fit(data, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    ReConPatch(**SMALL).fit(data.train[:4])
    assert b"\\u03c9^P" in stream.buffer.getvalue()


def test_another_config_is_another_detector(fitted):
    with pytest.raises(ValueError, match="config: expected it when the detector is made"):
        fitted.config = fitted.config.replace(neighbours=3)


def test_images_that_are_labelled_defective_are_not_trained_on(data):
    with pytest.raises(
        ValueError, match=r"images: expected images without defects to train on, got '\d+ that are labelled defective'"
    ):
        PatchCore(**SMALL).fit(data.test)


@pytest.mark.parametrize("cls", [ReConPatch, PatchCore])
def test_saved_and_loaded_scores_are_the_same(cls, data, tmp_path):
    detector = cls(**SMALL).fit(data.train[:4], log=lambda _line: None)
    detector.save(tmp_path / "gear.rcp")
    loaded = ReConPatch.load(tmp_path / "gear.rcp")
    assert type(loaded) is cls
    before, after = detector.predict(data.test[:4]), loaded.predict(data.test[:4])
    np.testing.assert_allclose(after.scores, before.scores, atol=1e-5)
    np.testing.assert_allclose(after.maps, before.maps, atol=1e-5)
    np.testing.assert_array_equal(after.train_scores, before.train_scores)
    assert loaded.config == detector.config
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(copied.predict(data.test[:4]).scores, before.scores)


def test_patchcore_is_the_pipeline_without_f(data):
    """The same scores as pooling p by hand, exact search and Eq. 10 over the same bank."""
    import literal

    detector = PatchCore(**SMALL).fit(data.train[:4], log=len)
    assert detector.f_ is None
    features = detector.extractor(_decoded(detector, data.test[:1]))[0].astype(np.float32)
    pooled = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(features)[:, None], 64)[:, 0].numpy()
    expected = max(literal.patch_score(q, detector.bank_.entries.cpu().numpy(), 9) for q in pooled)
    assert detector.predict(data.test[:1]).scores[0] == pytest.approx(expected, rel=1e-4)


def test_reconpatch_scores_f_of_p(fitted, data):
    import literal

    features = fitted.extractor(_decoded(fitted, data.test[:1]))[0].astype(np.float32)
    represented = features @ fitted.f_.weight.cpu().numpy().T + fitted.f_.bias.cpu().numpy()
    expected = max(literal.patch_score(q, fitted.bank_.entries.cpu().numpy(), 9) for q in represented)
    assert fitted.predict(data.test[:1]).scores[0] == pytest.approx(expected, rel=1e-3)


def _decoded(detector, paths):
    from rcp.data import load_images

    return load_images(paths, detector.transform)


def test_a_detector_is_assembled_from_f_and_p(fitted, data):
    p = fitted.extractor(_decoded(fitted, data.train[:8]))
    again = ReConPatch.assemble(fitted.config, fitted.f_, p, fitted.history_)
    assert type(again) is ReConPatch and again.history_ == fitted.history_
    np.testing.assert_array_equal(again.predict(data.test[:3]).scores, fitted.predict(data.test[:3]).scores)
    patchcore = ReConPatch.assemble(fitted.config.replace(representation="none"), None, p)
    assert type(patchcore) is PatchCore and patchcore.f_ is None


def test_training_scores_are_held_out(data):
    """With two folds an image is scored against the other fold's images only: its copy there gives 0, itself does not."""
    a, b, c = data.train[0], data.train[1], data.train[2]
    detector = PatchCore(**SMALL | {"coreset_ratio": 1.0}).fit([a, a, b, c], log=len)
    assert detector.train_scores_[:2] == pytest.approx([0, 0], abs=1e-3)
    assert (detector.train_scores_[2:] > 0.1).all()
    np.testing.assert_allclose(detector.predict([a, b, c]).scores, 0, atol=1e-3)
    by_hand = PatchCore(**SMALL | {"coreset_ratio": 1.0}).fit([a, b], log=len).predict([a, c]).scores
    assert detector.train_scores_[3] == pytest.approx(by_hand[1], rel=1e-4)
    for without in ({"calibration_folds": 0}, {"calibration_folds": 1}):
        detector = PatchCore(**SMALL, **without).fit([a, b], log=len)
        assert detector.train_scores_ is None and detector.predict([c]).train_scores is None
    assert PatchCore(**SMALL).fit([a], log=len).train_scores_ is None


def test_a_half_precision_bank_of_features_changes_scores_little(data):
    half, single = (
        PatchCore(**SMALL, feature_dtype=dtype).fit(data.train[:4], log=len).predict(data.test[:6]).scores
        for dtype in ("float16", "float32")
    )
    np.testing.assert_allclose(half, single, rtol=0.02)


def test_an_image_scores_the_same_alone_and_in_any_batch(data, fitted):
    """From its features on to the last bit, on a CPU; the CNN's own sums may be ordered by the size of its batch."""
    features = fitted.extractor(_decoded(fitted, data.test))
    together = fitted.predict_features(features)
    whole = fitted.predict(data.test)
    for i in (0, 7, len(features) - 1):
        alone = fitted.predict_features(features[i : i + 1])
        assert alone.scores[0] == together.scores[i]
        np.testing.assert_array_equal(alone.maps[0], together.maps[i])
        assert fitted.predict([data.test[i]]).scores[0] == pytest.approx(whole.scores[i], rel=1e-3)


def test_bfloat16_backbone_is_an_option(data):
    half, single = (
        PatchCore(**SMALL, backbone_dtype=dtype).fit(data.train[:4], log=len).predict(data.test[:6]).scores
        for dtype in ("bfloat16", "float32")
    )
    assert (half != single).any()
    np.testing.assert_allclose(half, single, rtol=0.1)
    with pytest.raises(ValueError, match="backbone_dtype: expected one of 'float32', 'bfloat16'"):
        PatchCore(**SMALL, backbone_dtype="float16")


def test_a_plain_list_of_paths_of_many_kinds_will_do(tmp_path, data):
    for i, (mode, suffix) in enumerate([("L", "png"), ("RGB", "jpg"), ("RGB", "bmp"), ("RGBA", "webp")]):
        Image.open(data.train[i]).convert(mode).save(tmp_path / f"{i}.{suffix}")
    detector = PatchCore(**SMALL).fit([str(p) for p in sorted(tmp_path.iterdir())], log=len)
    assert np.isfinite(detector.predict([str(tmp_path / "0.png")]).scores).all()


def test_what_fit_and_predict_refuse(tmp_path, data):
    with pytest.raises(ValueError, match="images: expected at least one image"):
        ReConPatch(**SMALL).fit([])
    with pytest.raises(ValueError, match="is not fitted"):
        ReConPatch(**SMALL).predict(data.test[:1])
    bad = tmp_path / "broken.png"
    bad.write_bytes(data.train[0].read_bytes()[:2000])
    with pytest.raises(ValueError, match=re.escape(str(bad))):
        ReConPatch(**SMALL).fit([*data.train[:2], bad])
    with pytest.raises(ValueError, match=r"coreset_ratio: expected at least 0\.0078, which is one of 128 patches"):
        ReConPatch(**SMALL | {"coreset_ratio": 0.001}).fit(data.train[:2])


def test_a_false_alarm_rate_beyond_so_few_images_is_refused_before_any_feature_is_computed(data, monkeypatch):
    detector = ReConPatch(**SMALL, false_alarm_rate=0.01)
    monkeypatch.setattr(type(detector.extractor), "__call__", lambda *_a, **_k: pytest.fail("features were computed"))
    with pytest.raises(ValueError, match=r"false_alarm_rate: expected at least .* with 4 images \(or 99 for this rate"):
        detector.fit(data.train[:4])


def test_training_images_that_stand_apart_are_named(data):
    few, said = [Transform(64, 64).image(path) for path in data.train[:12]], []
    PatchCore(**SMALL).fit([*few, 255 - few[0]], said.append)
    assert "1 of 13 training images score far above the others" in said[0] and said[0].endswith(": image 12")
    PatchCore(**SMALL).fit(few, said.append)
    assert len(said) == 3, "the threshold alone"


def test_weights_of_a_relative_path_are_found_from_elsewhere_and_missed_by_name(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = backbone.Backbone("resnet18", "random:0", (1, 2, 3)).trunk.state_dict()
    (tmp_path / "w.safetensors").write_bytes(save({name: t.contiguous() for name, t in state.items()}))
    PatchCore(**SMALL | {"weights": "w.safetensors"}).fit(data.train[:4], log=len).save("part.rcp")
    monkeypatch.chdir(tmp_path.parent)
    assert PatchCore.load(tmp_path / "part.rcp").predict(data.test[:1]).scores
    (tmp_path / "w.safetensors").rename(tmp_path / "v.safetensors")
    with pytest.raises(FileNotFoundError, match=r"part\.rcp: weights: no file .*; if they moved, name them as weights"):
        PatchCore.load(tmp_path / "part.rcp")
    assert PatchCore.load(tmp_path / "part.rcp", weights=tmp_path / "v.safetensors").bank_


def test_a_bad_image_is_named_before_any_feature_is_computed(tmp_path, data, monkeypatch):
    (tmp_path / "not_an_image.png").write_text("hello")
    detector = ReConPatch(**SMALL)
    monkeypatch.setattr(type(detector.extractor), "__call__", lambda *_a, **_k: pytest.fail("features were computed"))
    with pytest.raises(ValueError, match=r"not_an_image\.png"):
        detector.fit([*data.train[:3], tmp_path / "not_an_image.png"])


@pytest.mark.parametrize("at", ["_memorize", "_held_out_scores"])
def test_a_fit_that_is_interrupted_leaves_nothing_of_another_fit(data, monkeypatch, at):
    detector = ReConPatch(**SMALL, representation="random").fit(data.train[:4], log=len)
    monkeypatch.setattr(detector, at, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detector.fit(data.train[4:8], log=len)
    assert detector.bank_ is None or detector.threshold_ is detector.train_patch_scores_ is None


def test_nan_features_name_the_image_and_the_cause(data):
    detector = ReConPatch(**SMALL)
    next(iter(detector.extractor.backbone.parameters())).data.fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match=r"features of .*000.* hold NaN or infinity; likely cause: damaged weights"
    ):
        detector.fit(data.train[:3])


def test_features_of_another_width_are_refused(fitted, data):
    for detector, width in ((fitted, 1024), (PatchCore(**SMALL).fit(data.train[:2], log=len), 1024)):
        for shape in ((1, 64, width - 1), (64, width), (1, 64, 64)):
            with pytest.raises(ValueError, match=rf"p: expected features \(n, h · w, {width}\)"):
                detector.predict_features(np.zeros(shape, np.float32))
    other = ReConPatch.from_config(fitted.config.replace(aggregation="mean"))  # as a file may say
    other.f_, other.bank_ = fitted.f_, fitted.bank_
    with pytest.raises(ValueError, match=r"p: expected features \(n, h · w, 1024\)"):
        other.predict(data.test[:1])
    p = np.random.default_rng(0).random((2, 64, 1024), np.float32)
    turned = fitted.predict_features(p[::-1, :, ::-1][..., ::-1]).scores
    np.testing.assert_array_equal(turned[::-1], fitted.predict_features(p).scores)


def test_what_load_refuses(fitted, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no detector file"):
        ReConPatch.load(tmp_path / "absent.rcp")
    (tmp_path / "text.rcp").write_text("not a detector")
    with pytest.raises(ValueError, match="is not a detector saved by rcp"):
        ReConPatch.load(tmp_path / "text.rcp")
    fitted.save(tmp_path / "ok.rcp")
    with pytest.raises(ValueError, match="holds a ReConPatch, not a PatchCore"):
        PatchCore.load(tmp_path / "ok.rcp")
    with pytest.raises(ValueError, match=r"are not the weights .* was fitted with"):
        ReConPatch.load(tmp_path / "ok.rcp", weights="random:1")
    states = (backbone.Backbone("resnet18", f"random:{i}", (2, 3)).trunk.state_dict() for i in (0, 1))
    first, second = (save({n: t.contiguous() for n, t in state.items()}) for state in states)
    (file := tmp_path / "w.safetensors").write_bytes(first)
    detector = PatchCore(**SMALL | {"weights": str(file)}).fit(data.train[:2], log=len)
    file.write_bytes(second)
    detector.save(tmp_path / "first.rcp")
    with pytest.raises(ValueError, match=r"are not the weights .*first.rcp was fitted with"):
        ReConPatch.load(tmp_path / "first.rcp")
    file.write_bytes(first)
    loaded = ReConPatch.load(tmp_path / "first.rcp")
    file.write_bytes(second)
    with pytest.raises(ValueError, match="weights: expected those of the fit, resnet18/blake2b:"):
        loaded.predict(data.test[0])


def test_device_that_is_not_there():
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device: expected auto, cpu or an available cuda device, got 'cuda:99'"):
        resolve_device("cuda:99")


def test_repr_shows_what_differs_from_the_defaults():
    assert (
        repr(PatchCore(backbone="resnet18", weights="random:0")) == "PatchCore(backbone='resnet18', weights='random:0')"
    )
