"""One entry computed once: identity, resumption, sharing of features and f, and errors before work."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple

import numpy as np
import pytest

from rcp import ReConPatch, paths
from rcp.config import STAGES, Config, of_f, option
from rcp.data import load_dataset
from rcp.data.perturb import Perturbation
from rcp.detector import Prediction
from rcp.metrics import evaluate
from rcp.patches import PatchExtractor
from reproduce import entries as entries_module
from reproduce import provenance
from reproduce.entries import Ensemble, Entry, fit
from reproduce.notebook import Settings
from reproduce.provenance import ROOT, ChangedCode, code_of, code_upto
from reproduce.run import load, run, run_grid, shard_of
from reproduce.store import Store, key_of
from reproduce.studies import FeatureSpace, HeldOut

SMALL = Config(
    backbone="resnet18", weights="random:0", resize=64, image_size=64, dim=64, projection=16, epochs=1, batch_size=256,
    coreset_ratio=0.05,
)  # fmt: skip
PATCHCORE = dataclasses.replace(SMALL, representation="none")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def entry(demo_root):
    return Entry(SMALL, str(demo_root), "fabric")


def test_an_entry_is_computed_once_and_holds_what_made_it(entry, store):
    first, second = run(entry, store), run(entry, store)
    assert first.computed and not second.computed
    assert first.metrics == second.metrics and np.array_equal(first.scores, second.scores)
    info = second.info
    assert 0 <= info["metrics"]["image_auroc"] <= 1
    assert info["config"]["backbone"] == "resnet18" and info["data"]["category"] == "fabric"
    assert {"features", "training", "coreset", "scoring"} <= set(info["seconds"])
    assert info["process_peak_memory_bytes"] > 0 and info["versions"]["torch"] and len(info["history"]) == 1
    assert json.dumps(info, allow_nan=False)


def test_the_stored_entry_is_what_the_detector_gives(entry, store, demo_root):
    """Grid and interactive use are one pipeline."""
    data = load_dataset(demo_root, category="fabric")
    out = ReConPatch(**SMALL.asdict()).fit(data.train, log=len).predict(data.test)
    result = run(entry, store)
    np.testing.assert_allclose(result.scores, out.scores, rtol=1e-5)
    assert result.metrics["pixel_auroc"] == pytest.approx(evaluate(out, data.test)["pixel_auroc"], abs=1e-6)


def test_features_are_shared_by_entries_that_need_the_same(entry, store, monkeypatch):
    run(entry, store)
    monkeypatch.setattr(PatchExtractor, "__call__", lambda *_a, **_k: pytest.fail("features were extracted again"))
    other = dataclasses.replace(entry, config=dataclasses.replace(SMALL, k=4, alpha=0.2, dim=32, coreset_ratio=0.02))
    assert run(other, store).computed
    assert run(dataclasses.replace(entry, config=PATCHCORE), store).computed


def test_identity_follows_what_matters_and_nothing_else(entry):
    def changed(config=SMALL, **changes):
        return dataclasses.replace(entry, config=dataclasses.replace(config, **changes)).identity()

    same = entry.identity()
    assert changed(device="cpu") == same
    for change in ({"k": 4}, {"seed": 1}, {"weights": "random:1"}, {"representation": "none"}):
        assert changed(**change) != same
    assert dataclasses.replace(entry, category="gear").identity() != same
    patchcore = [changed(PATCHCORE, **c) for c in ({}, {"k": 4}, {"seed": 7})]
    assert patchcore[0] == patchcore[1] == patchcore[2], "nothing of f, and no seed, is in PatchCore's result"
    drawn = [changed(PATCHCORE, coreset_start="random", seed=s) for s in (0, 1)]
    assert drawn[0] != drawn[1]
    turned = [
        dataclasses.replace(entry, perturbation=Perturbation(rotation=r), perturbed=p)
        for r, p in ((5, "both"), (5, "test"), (6, "both"))
    ]
    assert len({key_of(same), *(key_of(t.identity()) for t in turned)}) == 4


def test_a_hyper_parameter_that_is_only_declared_is_part_of_the_identity(entry, store):
    """The value of one that no list names decides which f is looked up: two values never share one f."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(Config):
        temperature: float = of_f(1.0, "divides the loss [?]")

    def own(value):
        return dataclasses.replace(entry, config=Longer(**SMALL.asdict() | {"temperature": value}))

    data = entry.data()
    for stage, differs in (("features", False), ("training", True), ("bank", True), ("scores", True)):
        first, second = (own(value).identity_upto(stage, data, ("train",)) for value in (1.0, 2.0))
        assert (first != second) == differs, stage
    with pytest.raises(ValueError, match="stage: expected one of 'features', 'training'"):
        option("trainig", 1.0, "mistyped")


def test_a_changed_line_of_the_loss_trains_again_and_one_of_the_scores_does_not(tmp_path):
    shutil.copytree(ROOT / "rcp", tmp_path / "rcp", ignore=shutil.ignore_patterns("__pycache__"))

    def versions():
        provenance._code_of.cache_clear()
        return {stage: code_upto(stage, tmp_path) for stage in STAGES}

    def changed(module, before, after):
        file, old = tmp_path / "rcp" / module, versions()
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after, 1))
        return {stage for stage, version in versions().items() if version != old[stage]}

    assert changed("losses.py", "(1 - omega) * (margin", "(2 - omega) * (margin") == {"training", "bank", "scores"}
    assert changed("fast/training.py", "gap - omega * gap", "gap + omega * gap") == {"training", "bank", "scores"}
    assert changed("scoring.py", "scores.amax(1)", "scores.mean(1)") == {"scores"}
    assert changed("backbone.py", "0.485", "0.486") == set(STAGES)
    assert changed("losses.py", '"""The relaxed', '"""A relaxed') == set()
    assert changed("losses.py", "import torch\n", "import torch  # why\n\n") == set()


def test_code_is_utf_8_in_any_locale():
    words = "from reproduce.provenance import code_upto; print(code_upto('scores'))"
    how = {"env": os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}, "cwd": ROOT, "capture_output": True, "text": True}
    assert subprocess.run([sys.executable, "-c", words], check=True, **how).stdout.strip() == code_upto("scores")


def test_a_result_of_code_images_or_weights_that_changed_meanwhile_is_not_stored(entry, tmp_path, monkeypatch):
    shutil.copytree(entry.dataset, tmp_path / "data")
    mine, store = dataclasses.replace(entry, dataset=str(tmp_path / "data"), config=PATCHCORE), Store(tmp_path / "runs")
    changed, after = sorted((tmp_path / "data/fabric/ground_truth").rglob("*.png"))[:2]
    evaluate, extract = entries_module.metrics.evaluate, PatchExtractor.__call__

    def corrected(*given):
        shutil.copy(after, changed)
        return evaluate(*given)

    monkeypatch.setattr(entries_module.metrics, "evaluate", corrected)
    with pytest.raises(ValueError, match="identity: expected images and weights as they were when it began"):
        run(mine, store)
    assert not [*(store.root / "entries").glob("[!.]*")] and len([*(store.root / "features").glob("[!.]*")]) == 2

    def replaced(*given, **how):
        image = mine.data().train[0]
        image.write_bytes(mine.data().train[1].read_bytes())
        return extract(*given, **how)

    monkeypatch.setattr(PatchExtractor, "__call__", replaced)
    with pytest.raises(ValueError, match="features: expected images and weights as they were"):
        run(dataclasses.replace(mine, config=PATCHCORE.replace(layers=(2,))), store)
    assert len([*(store.root / "features").glob("[!.]*")]) == 2
    monkeypatch.undo()
    file = ROOT / "rcp/scoring.py"
    text, _ = provenance.LOADED[file]
    monkeypatch.setitem(provenance.LOADED, file, (f"# why\n{text}", ()))
    assert code_of("rcp.scoring"), "a comment is no code"
    edited = text.replace("amax", "mean"), ()

    def during_an_edit(*given):
        provenance.LOADED[file] = edited
        return evaluate(*given)

    monkeypatch.setattr(entries_module.metrics, "evaluate", during_an_edit)
    assert run(mine, store).computed, "what was loaded has computed it"
    with pytest.raises(ChangedCode, match=r"scoring\.py is no longer the code that this Python has loaded: restart"):
        code_of("rcp.scoring")
    assert code_of("rcp.losses", alone=True), "of other code"


def test_f_is_trained_once_for_all_entries_that_share_it(entry, store, monkeypatch):
    run(entry, store)
    monkeypatch.setattr(entries_module, "represent", lambda *_a, **_k: pytest.fail("f was trained again"))
    other = run(dataclasses.replace(entry, config=dataclasses.replace(SMALL, coreset_ratio=0.03, neighbours=5)), store)
    assert other.computed and len(other.info["history"]) == 1
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run(dataclasses.replace(entry, config=dataclasses.replace(SMALL, gamma=0.9)), store)


def test_maps_can_be_drawn_again_from_what_is_stored(entry, store, demo_root):
    data = load_dataset(demo_root, category="fabric")
    fitted, test = fit(entry, data, store, log=len)
    out, result = fitted.predict_features(test), run(entry, store)
    np.testing.assert_allclose(result.maps(), out.maps, rtol=1e-5)
    np.testing.assert_allclose(result.arrays["patch_scores"].max((1, 2)), out.scores, rtol=1e-6)
    tiled = PATCHCORE.replace(aspect="squash", tiles=(1, 2), tile_overlap=32)
    assert run(dataclasses.replace(entry, config=tiled), store).maps().shape == (len(data.test), 64, 96)


def test_what_is_published_keeps_its_identity():
    """A new option that is at its default joins no identity; the code's hash and the weights' are not of the config."""
    packed = map(zipfile.ZipFile, (ROOT / "results").glob("entries_*.zip"))
    found = [json.loads(z.read(name)) for z in packed for name in z.namelist() if name.endswith("result.json")]
    for info in found:
        of = info["identity"].get("entry", info["identity"])["config"]  # a study's is of its entry
        own = json.loads(json.dumps(Config.build(**info["config"]).upto("scores")))
        foreign = info["identity"].get("name") not in (None, "PatchCore", "ReConPatch")  # a peer, of a few of them
        assert foreign or own | {"weights": of["weights"]} == of
    assert len(found) > 200


def test_an_ensemble_is_the_mean_of_its_members_in_units_of_the_training_scores(entry, store, demo_root):
    """Eq. 11 by hand; the test set is never used to normalise."""
    members = (entry, dataclasses.replace(entry, config=dataclasses.replace(SMALL, weights="random:1")))
    result = run(Ensemble(members), store)
    singles = [run(member, store) for member in members]
    by_hand, maps = [], []
    for single in singles:
        train = single.arrays["train_scores"].astype(float)
        median = np.median(train)
        mad = np.median(np.abs(train - median))
        by_hand.append((single.scores - median) / (1.4826 * mad))
        maps.append((single.maps() - median) / (1.4826 * mad))
    np.testing.assert_allclose(result.scores, np.mean(by_hand, 0), rtol=1e-5)
    np.testing.assert_allclose(result.maps(), np.mean(maps, 0), rtol=1e-4, atol=1e-4)
    transform = entry.transform("test")
    prediction = Prediction(result.scores, np.mean(maps, 0).astype(np.float32), transform, None)
    expected = evaluate(prediction, load_dataset(demo_root, category="fabric").test)
    assert result.metrics["pixel_auroc"] == pytest.approx(expected["pixel_auroc"], abs=1e-6)
    assert not run(Ensemble(members), store).computed
    others = [Ensemble(members, deviation="mean"), Ensemble(members, level="patch"), Ensemble(members[:1])]
    assert len({round(float(run(e, store).scores[0]), 5) for e in (Ensemble(members), *others)}) == 4
    no_folds = dataclasses.replace(entry, config=dataclasses.replace(SMALL, calibration_folds=0))
    with pytest.raises(ValueError, match="calibration_folds: expected 2 or more"):
        run(Ensemble((no_folds,)), store)


def test_a_perturbed_entry_differs_in_the_splits_that_are_perturbed(entry, store):
    plain = run(entry, store)
    darker = dataclasses.replace(entry, perturbation=Perturbation(brightness=0.9, contrast=0.9))
    of_test, of_train = (dataclasses.replace(darker, perturbed=split) for split in ("test", "train"))
    held_out, scores = plain.arrays["train_scores"], run(of_test, store).scores
    assert np.array_equal(run(of_test, store).arrays["train_scores"], held_out), "the training set is as it was"
    assert not np.allclose(scores, plain.scores)
    assert not np.allclose(run(of_train, store).arrays["train_scores"], held_out)
    grid = run_grid([entry, of_test], store, log=len)
    assert grid.frame()["augmentation"].tolist() == ["without", "with"]


def test_mistyped_ways_are_named_before_any_work(entry):
    words = r"perturbed: expected one of 'both', 'train', 'test', got 'tset'\. Did you mean 'test'"
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(entry, perturbed="tset")
    with pytest.raises(ValueError, match="deviation: expected one of 'median', 'mean', got 'medium'"):
        Ensemble((entry,), deviation="medium")
    with pytest.raises(ValueError, match="level: expected one of 'image', 'patch'"):
        Ensemble((entry,), level="pixel")


def test_a_damaged_entry_is_computed_again(demo_root, tmp_path):
    store, entry = Store(tmp_path), Entry(PATCHCORE, str(demo_root), "gear")
    before = run(entry, store)
    folder = store.folder("entries", entry.identity())
    (folder / "result.json").write_text("{")
    with pytest.warns(UserWarning, match="set aside"):
        again = run(entry, store)
    assert again.computed and again.metrics == before.metrics


def test_a_grid_resumes_shards_and_renders(entry, store, tmp_path):
    entries = [dataclasses.replace(entry, config=dataclasses.replace(SMALL, seed=s)) for s in range(3)]
    fresh = Store(tmp_path)
    (store.root / "features").mkdir(parents=True, exist_ok=True)  # also where no test came before
    (tmp_path / "features").symlink_to(store.root / "features")
    grid = run_grid(entries, fresh, render_only=True)
    assert not grid.results and grid.missing == entries
    grid = run_grid(entries, fresh, shard="2/3")
    assert grid.entries == [entries[1]] and grid.missing == [entries[0], entries[2]]
    grid = run_grid(entries, fresh)
    assert [r.info["config"]["seed"] for r in grid.results] == [0, 1, 2] and not grid.missing
    frame = grid.frame()
    assert frame["seed"].tolist() == [0, 1, 2] and set(frame["method"]) == {"ReConPatch"}
    assert load(entries[0], fresh).metrics == grid.results[0].metrics


def test_shards_are_a_partition():
    entries = list(range(10))
    assert sorted(c for i in range(1, 4) for c in shard_of(entries, f"{i}/3")) == entries
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0", "", "²/3"):
        with pytest.raises(ValueError, match="shard: expected 'i/n'"):
            shard_of(entries, wrong)


def test_bad_input_costs_no_features(demo_root, tmp_path, monkeypatch):
    root = tmp_path / "mvtec" / "fabric"
    shutil.copytree(demo_root / "fabric", root)
    bad = sorted((root / "test" / "good").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:500])
    monkeypatch.setattr(PatchExtractor, "__call__", lambda *_a, **_k: pytest.fail("features were computed"))
    with pytest.raises(ValueError, match=bad.name):
        run(Entry(SMALL, str(root.parent), "fabric"), Store(tmp_path / "runs"))
    with pytest.raises(ValueError, match="coreset_ratio"):
        run(Entry(dataclasses.replace(SMALL, coreset_ratio=1e-5), str(demo_root), "gear"), Store(tmp_path / "runs"))


def test_a_category_without_test_images_or_with_one_training_image_is_named(demo_root, tmp_path):
    shutil.copytree(demo_root / "gear" / "train", tmp_path / "set" / "gear" / "train")
    entry = Entry(PATCHCORE, str(tmp_path / "set"), "gear")
    with pytest.raises(ValueError, match=r"test: expected images of the category 'gear' in .*set, got 'none'"):
        run(entry, Store(tmp_path / "runs"))
    for image in sorted((tmp_path / "set" / "gear" / "train" / "good").iterdir())[1:]:
        image.unlink()
    for study in (FeatureSpace(entry), HeldOut(entry)):
        with pytest.raises(ValueError, match="two training images or more of the category 'gear'"):
            run(study, Store(tmp_path / "runs"))


def test_no_disk_space_is_noticed_before_anything_is_decoded(entry, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _path: usage(0, 0, 10**4))
    monkeypatch.setattr(entries_module, "load_images", lambda *_a: pytest.fail("images were decoded"))
    with pytest.raises(OSError, match=r"patch features need 0\.0\d+ GB, 1e-05 GB are free"):
        run(entry, Store(tmp_path))


def test_without_masks_image_metrics_still_stand(demo_root, tmp_path):
    shutil.copytree(demo_root / "fabric", tmp_path / "set" / "fabric", ignore=shutil.ignore_patterns("ground_truth"))
    roots, store = (tmp_path / "set", demo_root), Store(tmp_path / "runs")
    without, whole = (run(Entry(PATCHCORE, str(root), "fabric"), store).metrics for root in roots)
    assert without["pixel_auroc"] is None and "pixel_auroc" in without["undefined"]
    assert without["image_auroc"] == pytest.approx(whole["image_auroc"])


def test_a_test_set_of_one_class_says_what_is_undefined(demo_root, tmp_path):
    shutil.copytree(demo_root / "fabric", tmp_path / "set" / "fabric")
    for folder in (tmp_path / "set" / "fabric" / "test").iterdir():
        if folder.name != "good":
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "set" / "fabric" / "ground_truth")
    result = run(Entry(PATCHCORE, str(tmp_path / "set"), "fabric"), Store(tmp_path / "runs"))
    assert result.metrics["image_auroc"] is None and "image_auroc" in result.metrics["undefined"]
    assert result.metrics["normal_threshold"] > 0


def test_on_each_demo_category_both_methods_tell_defects_apart():
    """The entries of the demo notebooks, from their own store: computed here or there, once."""
    settings = Settings()
    configs = [settings.config(representation=r) for r in ("none", "trained")]
    frame = run_grid(settings.entries(configs), settings.store, log=len).frame()
    assert len(frame) == 4 and set(frame["category"]) == {"gear", "fabric"}
    assert (frame["image_auroc"] > 0.7).all() and (frame["pixel_auroc"] > 0.8).all(), frame["image_auroc"]
