"""The store: atomic, shared by processes, never trusting what is damaged; and entries that travel in one file."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import warnings
import zipfile
from collections import namedtuple
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import CAMPAIGN

from rcp import paths
from rcp.files import scratch, sweep
from rcp.paths import require_disk
from reproduce import store as store_module
from reproduce.__main__ import main
from reproduce.run import run_grid
from reproduce.store import FILES, Store, key_of

ARRAYS = {"scores": np.arange(3, dtype=np.float32), "labels": np.array([0, 1, 1])}
ONE = {"a": 1}


def saved(root, identity=ONE, **info) -> Store:
    store = Store(root)
    store.save("entries", identity, info, ARRAYS)
    return store


def computed(store, compute, shape=(4, 2), dtype="float16"):
    """Features as :mod:`reproduce.entries` computes them: once, whoever asks first."""
    with store.locked("features", ONE):
        if (found := store.open_array(ONE)) is None:
            with store.new_array(ONE, shape, dtype) as out:
                compute(out)
            found = store.open_array(ONE)
    return found


def test_an_entry_comes_back_as_it_went_in(tmp_path):
    assert Store(tmp_path).load("entries", ONE) is None
    info, arrays = saved(tmp_path, metrics={"image_auroc": 0.5}).load("entries", ONE)
    assert info["metrics"] == {"image_auroc": 0.5} and info["identity"] == ONE
    assert all(np.array_equal(arrays[n], ARRAYS[n]) and arrays[n].dtype == ARRAYS[n].dtype for n in ARRAYS)
    assert key_of({"a": 1, "b": [2, 3]}) == key_of({"b": [2, 3], "a": 1}) != key_of({"a": 1, "b": [3, 2]})
    with pytest.raises(ValueError, match="Out of range float"):
        saved(tmp_path / "other", x=float("nan"))
    assert not list(tmp_path.glob("other/entries/*"))


@pytest.mark.parametrize("damage", [
    "truncated json", "truncated npz", "other scores", "missing file", "pickled", "a folder", "a pipe", "a file", "a link",
    "a shape of terabytes",
])  # fmt: skip
def test_a_damaged_entry_is_set_aside_with_a_warning(tmp_path, damage):
    store = saved(tmp_path)
    folder = store.folder("entries", ONE)
    if damage == "truncated json":
        (folder / "result.json").write_text((folder / "result.json").read_text()[:20])
    elif damage == "truncated npz":
        (folder / "arrays.npz").write_bytes((folder / "arrays.npz").read_bytes()[:50])
    elif damage in ("missing file", "a folder", "a pipe"):
        (folder / "arrays.npz").unlink()
        {"a folder": os.mkdir, "a pipe": os.mkfifo}.get(damage, str)(folder / "arrays.npz")
    elif damage == "a shape of terabytes":
        np.savez(folder / "arrays.npz", scores=np.zeros(10**5))
        content = (folder / "arrays.npz").read_bytes()
        (folder / "arrays.npz").write_bytes(content.replace(b"(100000,), }" + b" " * 8, b"(%d,), }" % 10**13, 1))
    elif damage in ("a file", "a link"):  # in the folder's place; the link leads nowhere
        shutil.rmtree(folder)
        folder.touch() if damage == "a file" else folder.symlink_to("nowhere")
    else:
        other = ARRAYS["scores"] + 1 if damage == "other scores" else np.array([object()], dtype=object)
        np.savez(folder / "arrays.npz", **ARRAYS | {"scores": other})
    with pytest.warns(UserWarning, match=r"damaged store entry .* set aside"):
        assert store.load("entries", ONE) is None
    assert not os.path.lexists(folder) and list(tmp_path.glob("entries/.damaged-*"))
    assert saved(tmp_path).load("entries", ONE) is not None


@pytest.mark.parametrize("name", ["result.json", "arrays.npz", "features.npy", "identity.json"])
def test_no_flipped_bit_and_no_zeroed_block_changes_a_number(tmp_path, name):
    """What is damaged is set aside; where a flip changes nothing that is read (a zip's spare fields), the result is the same."""
    rng, kind = random.Random(name), "entries" if name in FILES else "features"
    store = saved(tmp_path, metrics={"image_auroc": 0.5}, seconds={"training": 1.25})
    expected = store.load("entries", ONE)
    computed(store, lambda out: out.__setitem__(slice(None), np.arange(8).reshape(4, 2)))
    file = store.folder(kind, ONE) / name
    content, noticed = file.read_bytes(), 0
    for i in range(60 * max(CAMPAIGN, 1)):
        at, size = rng.randrange(len(content)), rng.choice([1, 4, 16])
        flipped = bytes([content[at] ^ 1 << rng.randrange(8)]) if i % 2 else bytes(len(content[at : at + size]))
        changed = content[:at] + flipped + content[at + len(flipped) :]
        if changed == content:
            continue
        shutil.copytree(tmp_path / kind, other := tmp_path / f"{i}" / kind)
        (other / file.parent.name / name).write_bytes(changed)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            there = Store(other.parent)
            found = there.load("entries", ONE) if kind == "entries" else there.open_array(ONE)
        noticed += found is None
        assert (found is None) == bool(said)
        if found is not None and kind == "entries":
            assert found[0] == expected[0] and all((found[1][n] == expected[1][n]).all() for n in ARRAYS)
        elif found is not None:
            assert (found == np.arange(8).reshape(4, 2)).all()
    assert noticed > 20
    of = f"{i + 1} damaged files (seed {name!r}), {noticed} set aside"
    print(f"\nstore, {name}: {of}, the others gave the same result, 0 silent")


def test_another_identitys_result_is_not_used(tmp_path):
    store = saved(tmp_path)
    computed(store, lambda out: out.fill(1))
    for kind in ("entries", "features"):
        store.folder(kind, ONE).rename(store.folder(kind, {"a": 2}))
    with pytest.warns(UserWarning, match="another identity"):
        assert store.load("entries", {"a": 2}) is None
    with pytest.warns(UserWarning, match="another identity"):
        assert store.open_array({"a": 2}) is None


def test_an_error_of_the_machine_does_not_remove_a_sound_entry(tmp_path, monkeypatch):
    store = saved(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        with pytest.raises(OSError, match="Too many open files"):
            store.load("entries", ONE)
    assert store.load("entries", ONE)


def test_an_open_map_stays_valid_when_features_are_made_again(tmp_path):
    store = Store(tmp_path)
    old = computed(store, lambda out: out.fill(1))
    shutil.rmtree(store.folder("features", ONE))
    assert (computed(store, lambda out: out.fill(2)) == 2).all() and (old == 1).all()


@pytest.mark.parametrize("root", [None, 3, "", "a\0b"])
def test_a_store_that_is_no_path_is_refused(root):
    with pytest.raises(ValueError, match="the store"):
        Store(root)


def test_features_are_computed_once_memory_mapped_and_read_only(tmp_path):
    store, calls = Store(tmp_path), []

    def compute(out):
        calls.append(1)
        out[:] = 7

    def killed(out):
        out[:1] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        computed(store, killed)
    assert store.open_array(ONE) is None and not list(tmp_path.glob("features/.*/"))
    for _ in range(2):
        found = computed(store, compute)
    assert len(calls) == 1 and isinstance(found, np.memmap) and not found.flags.writeable and (found == 7).all()
    file = store.folder("features", ONE) / "features.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="damaged"):
        assert computed(store, lambda out: out.fill(2)).tolist() == [[2.0, 2.0]] * 4


def _killed(work, *arguments) -> None:
    """A process that does the work, and is killed within it."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def _half(root, kind):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if kind == "features":
        computed(Store(root), kill)
    with mock.patch("reproduce.store._written_as" if kind == "pack" else "reproduce.store.sync", kill):
        Store(root).pack(root.parent / "all.zip") if kind == "pack" else saved(root, {"a": 9})


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path):
    root = tmp_path / "runs"
    store = saved(root)
    for kind in ("features", "entries", "pack"):
        _killed(_half, root, kind)
    left = [p.parent.name for p in tmp_path.rglob(".*.rcp-*")]
    assert sorted(left) == sorted(["features", "entries", tmp_path.name])
    (mine := tmp_path / ".all.zip.rcp-mine").mkdir()
    os.mkfifo(pipe := tmp_path / ".all.zip.rcp-00000000")
    run_grid([], store, log=len)  # nothing to compute, nothing to remove
    assert len(list(root.rglob(".*.rcp-*"))) == 2
    with pytest.raises(AttributeError):
        run_grid([None], store, log=len)
    assert not list(root.rglob(".*.rcp-*"))
    (tmp_path / "link.zip").symlink_to("all.zip")
    store.pack(tmp_path / "all.zip")
    store.pack(tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink()
    assert {*tmp_path.rglob(".*.rcp-*")} == {mine, pipe}, "nothing else bears such a name"
    assert len(Store(root).load("entries", ONE)) == 2


def test_what_a_running_process_writes_is_not_removed(tmp_path):
    """Also where many write, and sweep, at once."""
    with scratch(tmp_path / "all.zip") as folder:
        sweep(tmp_path)
        with scratch(tmp_path / "all.zip") as other:
            assert folder.is_dir() and other.is_dir() and other != folder

    def work():
        for i in range(200):
            with scratch(tmp_path / "x") as folder:
                sweep(tmp_path)
                (folder / "x").write_text(str(i))
                os.replace(folder / "x", tmp_path / "x")

    _side_by_side(6, work)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_no_disk_space_names_needed_and_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _path: usage(10, 0, 2 * 10**9))
    with pytest.raises(OSError, match=r"no disk space in .*: features need 5 GB, 2 GB are free"):
        require_disk(tmp_path / "not" / "yet", 5 * 10**9, "features")
    with pytest.raises(OSError, match="no disk space"):
        computed(Store(tmp_path), lambda _out: pytest.fail("computed"), (10**6, 1024), "float32")


def _side_by_side(count, work, *arguments) -> None:
    """So many processes that all do the work, to its end."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * count


def test_several_processes_compute_features_once(tmp_path):
    def compute(out):
        with open(tmp_path / "log", "a") as file:
            file.write("computed\n")
        out[:] = 5

    _side_by_side(4, computed, Store(tmp_path), compute, (200, 200))
    assert (tmp_path / "log").read_text() == "computed\n"


def test_packed_entries_travel(tmp_path, capsys):
    for i in range(3):
        saved(tmp_path / "gpu", {"a": i}, n=i)
    store, file = saved(tmp_path / "laptop", {"a": 2}, n=2), tmp_path / "entries.zip"
    assert main(["pack", str(file), "--runs", str(tmp_path / "gpu")]) == 0
    assert main(["unpack", str(file), "--runs", str(tmp_path / "laptop")]) == 0
    assert "2 of 3 entries are new" in capsys.readouterr().out
    for i in range(3):
        info, arrays = store.load("entries", {"a": i})
        assert info["n"] == i and np.array_equal(arrays["scores"], ARRAYS["scores"])
    assert store.unpack(file) == (0, 3)
    more = {"patch_scores": np.ones((3, 2, 2)), **ARRAYS}
    Store(tmp_path / "full").save("entries", {"a": 0}, {"n": 0}, more)
    Store(tmp_path / "full").save("entries", {"a": 1}, {"n": 1}, more | {"scores": ARRAYS["scores"] + 1})
    Store(tmp_path / "full").pack(tmp_path / "full.zip")
    with pytest.warns(UserWarning, match="other numbers of one entry, kept as they are: " + key_of({"a": 1})):
        assert store.unpack(tmp_path / "full.zip") == (1, 2), "what a light pack left out comes with a whole one"
    assert ["patch_scores" in store.load("entries", {"a": i})[1] for i in (0, 1)] == [True, False]
    assert main(["pack", str(file), "--runs", str(tmp_path / "empty")]) == 1
    assert "has no finished entries" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert main(["pack", str(tmp_path / "pipe"), "--runs", str(tmp_path / "gpu")]) == 1
    assert "pipe is there, and is no file" in capsys.readouterr().err
    (mine := tmp_path / "mine").write_bytes(b"PK, and mine")
    (tmp_path / "a.csv").write_text("row\n1")
    for command in (["pack", str(mine)], ["entries", str(mine)], ["gather", str(tmp_path), "--csv", str(mine)]):
        assert main([*command, *["--runs", str(tmp_path / "gpu")] * (command[0] != "gather")]) == 1
        assert "mine is an image, or not what rcp writes" in capsys.readouterr().err
        assert mine.read_bytes() == b"PK, and mine"
    assert main(["entries", str(tmp_path / "new.csv"), "--runs", str(tmp_path / "gpu")]) == 1
    assert capsys.readouterr().err == "entries: KeyError: 'metrics'\n", "no traceback"
    with pytest.raises(SystemExit, match="2"):
        main(["unpack", str(file), "--runs", ""])
    for i, (command, name, content) in enumerate(product(("pack", "entries"), FILES, (b"", b"{}", b"PK", b"[1]"))):
        broken = saved(tmp_path / f"broken {i}", {"a": 1}, n=1).folder("entries", {"a": 1})
        (broken / name).write_bytes(content)
        with pytest.warns(UserWarning, match=f"damaged store entry .*{broken.name} set aside"):
            assert main([command, str(tmp_path / "new"), "--runs", str(tmp_path / f"broken {i}")]) == 1
        assert "finished entries" in capsys.readouterr().err and not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("how", ["no zip", "absent", "outside", "damaged", "another key", "null", "deep", "a bomb",
                                 "a bomb within", "empty", "NaN"])  # fmt: skip
def test_a_file_that_pack_did_not_write_is_refused_whole(tmp_path, how):
    saved(tmp_path / "gpu").pack(file := tmp_path / "entries.zip")
    with zipfile.ZipFile(file) as packed:
        contents = {name: packed.read(name) for name in packed.namelist() if how != "empty"}
    if how == "another key":
        contents = {name.replace(key_of(ONE), key_of({"a": 2})): data for name, data in contents.items()}
    if how == "outside":
        contents["../evil.txt"] = b"out"
    if how in ("null", "deep", "a bomb"):
        added = {"null": b"null", "deep": b"[" * 10**6, "a bomb": bytes(2**28 + 2**26)}[how]
        contents = {name: added if name.endswith("json") else data for name, data in contents.items()}
    if how == "a bomb within":
        np.savez_compressed(inner := tmp_path / "bomb.npz", scores=np.zeros(2**28 + 2**27, np.uint8))
        contents = {name: data if name.endswith("json") else inner.read_bytes() for name, data in contents.items()}
    if how == "NaN":
        info, arrays = Store(tmp_path / "gpu").load("entries", ONE)
        info, of = info | {"metrics": {"image_auroc": float("nan")}}, json.dumps
        with mock.patch("reproduce.store.json.dumps", lambda *a, **k: of(*a, **k | {"allow_nan": True})):
            changed = json.dumps(info | {"checksum": store_module._checksum(info, arrays)}).encode()
        contents = {name: changed if name.endswith("json") else data for name, data in contents.items()}
    if how == "damaged":
        contents = {n: d.replace(b'checksum": "', b'checksum": "0') for n, d in contents.items()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in contents.items():
            packed.writestr(name, data)
    if how == "no zip":
        file.write_text("text")
    if how == "absent":
        file.unlink()
    why = r"entries\.zip" + ".* unpacks to more than" * how.startswith("a bomb")
    with pytest.raises(FileNotFoundError if how == "absent" else ValueError, match=f"unpack: .*{why}"):
        Store(tmp_path / "laptop").unpack(file)
    assert not list((tmp_path / "laptop").rglob("*.json")) and not (tmp_path / "evil.txt").exists()
