"""Flipped bits, zeroed blocks, cut and foreign files: each is noticed by its content, and named."""

import json
import os
import random
from unittest import mock

import numpy as np
import pytest
from conftest import BOTTLE, CAMPAIGN, REAL, WEIGHTS
from safetensors.torch import save_file

from rcp import Config, PatchCore, ReConPatch
from rcp.data import Transform, load_images
from rcp.detector import load
from rcp.files import read_tensors
from rcp.paths import require_writable

TINY = {"backbone": "resnet18", "weights": "random:0", "resize": 64, "image_size": 64, "dim": 32, "coreset_ratio": 0.1}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
if REAL:
    TINY["weights"] = str(WEIGHTS)
    IMAGES = load_images(sorted((BOTTLE / "train" / "good").iterdir())[:4], Transform(64, 64))
KINDS = {
    "PatchCore": lambda: PatchCore(**TINY),
    "ReConPatch": lambda: ReConPatch(**TINY, representation="random"),
    "refined": lambda: PatchCore(**TINY, refine={"epochs": 1, "channels": 8, "textures": "drawn"}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    files = {}
    for kind, made in KINDS.items():
        files[kind] = tmp_path_factory.mktemp("saved") / f"{kind}.rcp"
        made().fit(IMAGES, log=len).save(files[kind])
    return files


def test_a_loaded_detector_does_not_follow_its_file(saved, tmp_path):
    file, other = tmp_path / "a.rcp", tmp_path / "b.rcp"
    file.write_bytes(saved["PatchCore"].read_bytes())
    PatchCore(**TINY).fit(255 - IMAGES, log=len).save(other)
    detector = load(file)
    expected = detector.predict(IMAGES).scores
    with file.open("r+b") as opened:  # as `cp` does, in place
        opened.write(other.read_bytes())
    np.testing.assert_array_equal(detector.predict(IMAGES).scores, expected)
    os.truncate(file, 100)  # of a map this ends the process
    np.testing.assert_array_equal(detector.predict(IMAGES).scores, expected)


def test_a_detector_is_for_all_to_read_and_a_link_to_it_stays(saved, tmp_path):
    detector, link = load(saved["PatchCore"]), tmp_path / "current.rcp"
    detector.save(tmp_path / "part.rcp")
    link.symlink_to("part.rcp")
    load(saved["ReConPatch"]).save(link)
    assert load(tmp_path / "part.rcp").f_
    assert link.is_symlink() and (tmp_path / "part.rcp").is_file()
    with mock.patch("pathlib.Path.mkdir", side_effect=PermissionError(13, "Permission denied")):
        with pytest.raises(PermissionError, match=r"Permission denied: .*part\.rcp'$"):  # and no hidden folder's name
            require_writable(tmp_path / "part.rcp", "save {} in", b"rcp-detector")
        require_writable(tmp_path / "part.rcp", "log in {}", b"rcp-detector", appended=True)
    (tmp_path / "new").touch()
    assert (tmp_path / "part.rcp").stat().st_mode == (tmp_path / "new").stat().st_mode
    with (
        mock.patch("builtins.open", side_effect=PermissionError(13, "Permission denied")),
        pytest.raises(PermissionError, match="Permission denied"),
    ):
        load(link)


ROUNDS = CAMPAIGN or 1


def damaged(content: bytes, rng: random.Random):
    """(what was done, the bytes) of flips in the header and anywhere, zeroed blocks and cuts."""
    for _ in range(20 * ROUNDS):
        for most in (min(3000, len(content)), len(content)):
            at = rng.randrange(most)
            yield f"bit at {at}", content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    for _ in range(8 * ROUNDS):
        at, size = rng.randrange(len(content)), rng.choice([16, 512, 4096])
        yield f"{size} zeros at {at}", content[:at] + bytes(len(content[at : at + size])) + content[at + size :]
        yield f"cut at {at}", content[:at]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_detector_is_refused_by_its_path(saved, kind, tmp_path):
    content, bad, tried = saved[kind].read_bytes(), tmp_path / "bad.rcp", 0
    for what, changed in damaged(content, random.Random(kind)):
        if changed == content:
            continue
        bad.write_bytes(changed)
        with pytest.raises(ValueError, match=r"bad\.rcp"):
            load(bad)
            pytest.fail(f"silent: {what}")
        tried += 1
    print(f"\ndetector, {kind}: {tried} damaged files (seed {kind!r}), 0 silent")


def test_a_file_of_today_s_format_without_its_hash_is_refused(saved, tmp_path):
    header, tensors = read_tensors(saved["ReConPatch"], "rcp-detector")
    save_file(tensors, tmp_path / "bad.rcp", header)
    with pytest.raises(ValueError, match="is damaged: its content is not what was written"):
        load(tmp_path / "bad.rcp")


def test_a_kill_while_saving_leaves_what_was_there(saved, tmp_path, monkeypatch):
    file = tmp_path / "part.rcp"
    file.write_bytes(saved["PatchCore"].read_bytes())
    monkeypatch.setattr("rcp.files.sync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        load(file).save(file)
    assert file.read_bytes() == saved["PatchCore"].read_bytes() and list(tmp_path.iterdir()) == [file]


ABSURD = {"dim": 10**11, "blur": 1e9, "seed": 2**63, "lr": 1e300, "epochs": 10**12, "image_size": 10**6, "sigma": 1e200}
ABSURD |= {"patch_size": 33}


@pytest.mark.parametrize(("name", "value"), ABSURD.items())
def test_absurd_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected at most"):
        Config(**{"resize": 2**14, "batch_size": 64} | {name: value})


def test_json_of_a_config_survives_a_file(saved):
    header, _ = read_tensors(saved["PatchCore"], "rcp-detector")
    assert Config.build(**json.loads(header["config"])).representation == "none"
