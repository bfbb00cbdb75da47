"""Other methods: SPADE against its formula, the machinery with a method that is made up, and what is refused."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rcp.data.perturb import Perturbation
from reproduce import effects, grids, peers, tables, views
from reproduce.entries import Entry
from reproduce.notebook import Settings
from reproduce.peers import Method, Peer
from reproduce.run import run, run_grid
from reproduce.spade import pyramid_distances, spade
from reproduce.store import Store, key_of


@pytest.fixture
def settings(small_demo) -> Settings:
    return Settings(data_root=str(small_demo), epochs=1, device="cpu")


def literal_distances(levels, gallery) -> torch.Tensor:
    """All levels brought to the first's size and joined; each pixel against every pixel of the gallery."""
    side = levels[0].shape[-1]
    joined = torch.cat([F.interpolate(m[None], side, mode="nearest")[0] for m in levels])
    images = torch.cat([F.interpolate(g, side, mode="nearest") for g in gallery], 1)
    found = torch.empty(side, side)
    for y in range(side):
        for x in range(side):
            found[y, x] = (images - joined[:, y, x][:, None, None]).norm(dim=1).min()
    return found


@pytest.mark.parametrize("name", ["SPADE", "PatchCore", "PaDiM"])
def test_a_peer_of_other_perturbations_or_another_blur_is_another(settings, name, tmp_path, monkeypatch):
    config = settings.config(representation="none", backbone="resnet18", weights="random:0")
    plain = Peer(settings.entries([config])[0], name)
    moved = dataclasses.replace(plain, entry=dataclasses.replace(plain.entry, perturbation=Perturbation()))
    softer = dataclasses.replace(plain.entry, config=plain.config.replace(blur=1.0))
    assert moved.identity() != plain.identity()
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    seen, texture = set(), tmp_path / "dtd/images/dotted/0.jpg"
    texture.parent.mkdir(parents=True)
    for level in (0, 99):
        Image.new("RGB", (64, 64), (level, 0, 0)).save(texture)
        seen.add(dataclasses.replace(plain, name="DRAEM").identity()["textures"])
    assert len(seen) == 2, "its textures are of its identity"
    assert (dataclasses.replace(plain, entry=softer).identity() != plain.identity()) == (name != "PaDiM")


@pytest.mark.parametrize(("sides", "rows"), [((8, 4, 2), 392), ((8, 4, 2), 7), ((7, 4, 2), 5), ((4,), 3)])
def test_spades_map_is_its_formula(sides, rows):
    torch.manual_seed(0)
    levels = [torch.randn(3 + i, s, s) for i, s in enumerate(sides)]
    gallery = [torch.randn(5, 3 + i, s, s) for i, s in enumerate(sides)]
    found = pyramid_distances(levels, gallery, rows)
    torch.testing.assert_close(found, literal_distances(levels, gallery), atol=1e-5, rtol=1e-5)


def test_spades_image_score_is_the_distance_to_the_nearest_images(settings):
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    c = settings.config(resize=64, image_size=64, representation="none")
    scores, maps = spade(c, images[:4], k=2)(images[3:])
    alone = spade(c, images[:4], k=1)(images[3:])[0]
    assert alone[0] == pytest.approx(0, abs=1e-7) and scores[0] > 0, "its own nearest, then the next as well"
    assert maps.shape == (2, 64, 64) and np.abs(maps[0]).max() < 0.05 < maps[1].min()


def test_a_peer_that_fails_is_named_and_the_others_go_on(settings, monkeypatch, tmp_path):
    monkeypatch.setitem(peers.METHODS, "PaDiM", Method("Padim"))
    monkeypatch.setattr(peers, "ANOMALIB", "0.0.1")
    store, lines, failed = Store(tmp_path), [], {}
    tasks = [t for t in grids.peers(settings, ["PaDiM", "SPADE"]) if t.name != "ReConPatch"]
    grid = run_grid(tasks, store, log=lines.append, failed=failed)
    assert {t.method for t in grid.entries} == {"PatchCore", "PatchCore (mean)", "SPADE"}
    (name,) = failed
    assert name.startswith("PaDiM, ") and "pip install 'anomalib==0.0.1'" in failed[name] and failed[name] in str(lines)
    own, entry = grid.results[0], Entry(tasks[0].config, settings.data_root, tasks[0].category)
    np.testing.assert_allclose(own.scores, run(entry, store).scores, rtol=1e-5, err_msg="not as the table's own entry")
    again = run_grid(tasks, store, render_only=True)
    assert len(again.results) == 3 and not any(r.computed for r in again.results), "found again"
    rows = tables.compare(grid.frame(), by=["backbone"], metric=["fit_seconds", "inference_ms"], scale=1)
    assert (rows["mean"] > 0).all() and "PatchCore is number 1 of 3" in effects.standings(grid)


def test_a_method_is_trained_as_it_is_published_unless_told_otherwise(settings, monkeypatch, tmp_path):
    seen = []

    def made_up(peer, train):
        seen.append(peer.training)
        return lambda images: (-images.mean((1, 2, 3)), np.zeros(images.shape[:3], np.float32))

    monkeypatch.setattr(peers, "anomalib", made_up)
    monkeypatch.setattr(peers, "check_anomalib", lambda: None)
    of = settings.config(representation="none", backbone="resnet18", weights="random:0")
    entry = Entry(of, settings.data_root, "gear")
    made = [Peer(entry, "CFA"), Peer(entry, "CFA", epochs=2), Peer(entry, "PaDiM", epochs=2)]
    run_grid(made, Store(tmp_path), log=len)
    assert seen == [{"epochs": 30, "batch": 4, "lr": 1e-3}, {"epochs": 2, "batch": 4, "lr": 1e-3}, {}]
    ids = {key_of(task.identity()) for task in (*made, Peer(entry, "PaDiM"))}
    assert len(ids) == 3, "epochs tell two results apart where something is trained, and only there"
    assert [task.method for task in made] == ["CFA", "CFA (2 of 30 epochs)", "PaDiM"], "said in every table"
    assert [t.epochs for t in grids.peers(settings, ["CFA"], epochs={"CFA": 2}) if t.name == "CFA"][:1] == [2]
    with pytest.raises(ValueError, match=r"epochs: anomalib has no method 'CfA'\. Did you mean 'CFA'\?"):
        grids.peers(settings, epochs={"CfA": 2})


@pytest.mark.parametrize(("given", "message"), [
    ({"name": "PaDim"}, "Did you mean 'PaDiM'"),
    ({"name": "CFA", "epochs": -1}, "epochs: expected 0 or more, got -1"),
    ({"name": "CFA", "epochs": "5"}, "epochs: expected int, got '5'"),
    ({"name": "CFA", "backbone": "densenet121"}, "one that CFA can use: resnet18, resnet50, "),
])  # fmt: skip
def test_what_no_peer_can_be_is_refused_before_any_work(given, message, settings):
    config = settings.config(backbone=given.pop("backbone", "resnet18"), weights="random:0")
    with pytest.raises(ValueError, match=message):
        Peer(Entry(config, settings.data_root, "gear"), **given)


def test_one_training_image_is_refused(settings, tmp_path):
    for part in ("train/good", "test/good", "test/bad"):
        (tmp_path / "part" / part).mkdir(parents=True)
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "part" / part / "0.png")
    entry = Entry(settings.config(representation="none"), str(tmp_path), "part")
    with pytest.raises(ValueError, match="two training images or more for SPADE"):
        run_grid([Peer(entry, "SPADE")], Store(tmp_path / "runs"), log=len)


def test_a_results_file_of_anomalib_is_read(tmp_path):
    file = tmp_path / "results.csv"
    head = "accelerator,model.class_path,data.class_path,data.init_args.category,image_AUROC,pixel_AUROC\n"
    row = "cpu,anomalib.models.Padim,anomalib.data.MVTecAD,bottle,0.99,0.97\n"
    for wrong in (head + row.replace("0.97", "97.1"), head + 2 * row, head + row.replace("0.97", ""), ""):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"anomalib_results: .*results\.csv"):
            views.anomalib_results(file)
    file.write_text(head + row)
    (row,) = views.anomalib_results(file).to_dict("records")
    assert list(row) == ["method", "category", "image_auroc", "pixel_auroc", "seed"]
    assert list(row.values()) == ["Padim (anomalib's own run)", "bottle", 0.99, 0.97, 0]
    with pytest.raises(ValueError, match=r"anomalib_results: expected a results\.csv .*absent"):
        views.anomalib_results(tmp_path / "absent")
    file.write_text(head.replace("pixel_AUROC", "pixel"))
    with pytest.raises(ValueError, match=r"results\.csv has no column pixel_AUROC; it has accelerator"):
        views.anomalib_results(file)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("anomalib"), reason="anomalib is not installed (extra `peers`)")
@pytest.mark.parametrize("name", peers.METHODS)
def test_anomalibs_methods_run(name, settings, tmp_path, monkeypatch, request):
    if name == "DRAEM":
        monkeypatch.setenv("RCP_DATA", str(request.getfixturevalue("shared_data")))
    config = settings.config(representation="none", backbone="resnet18", weights="random:0")
    grid = run_grid([Peer(Entry(config, settings.data_root, "gear"), name, epochs=1)], Store(tmp_path), log=len)
    assert np.isfinite(grid.results[0].scores).all()
