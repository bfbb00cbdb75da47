"""The store: atomic, shared by processes, and never trusting what is damaged."""

import multiprocessing
from collections import namedtuple

import numpy as np
import pytest

from reproduce import store as store_module
from reproduce.store import Store, key_of, require_disk

ARRAYS = {"scores": np.arange(3, dtype=np.float32), "labels": np.array([0, 1, 1])}


def test_a_cell_comes_back_as_it_went_in(tmp_path):
    store = Store(tmp_path)
    assert store.load_entry({"a": 1}) is None
    store.save_entry({"a": 1}, {"metrics": {"image_auroc": 0.5}}, ARRAYS)
    result, arrays = store.load_entry({"a": 1})
    assert result["metrics"] == {"image_auroc": 0.5} and result["identity"] == {"a": 1}
    assert all(np.array_equal(arrays[n], ARRAYS[n]) and arrays[n].dtype == ARRAYS[n].dtype for n in ARRAYS)


def test_key_depends_on_content_not_on_order():
    assert key_of({"a": 1, "b": [2, 3]}) == key_of({"b": [2, 3], "a": 1}) != key_of({"a": 1, "b": [3, 2]})


@pytest.mark.parametrize("damage", ["truncated json", "truncated npz", "other scores", "missing file"])
def test_a_damaged_cell_is_set_aside_with_a_warning(tmp_path, damage):
    store = Store(tmp_path)
    store.save_entry({"a": 1}, {}, ARRAYS)
    folder = store.folder("entries", {"a": 1})
    if damage == "truncated json":
        (folder / "result.json").write_text((folder / "result.json").read_text()[:20])
    elif damage == "truncated npz":
        (folder / "arrays.npz").write_bytes((folder / "arrays.npz").read_bytes()[:50])
    elif damage == "other scores":
        np.savez(folder / "arrays.npz", **ARRAYS | {"scores": ARRAYS["scores"] + 1})
    else:
        (folder / "arrays.npz").unlink()
    with pytest.warns(UserWarning, match="damaged store entry .* set aside"):
        assert store.load_entry({"a": 1}) is None
    assert not folder.exists() and list(tmp_path.glob("entries/.damaged-*"))
    store.save_entry({"a": 1}, {}, ARRAYS)
    assert store.load_entry({"a": 1}) is not None


def test_pickled_arrays_are_not_read(tmp_path):
    store = Store(tmp_path)
    store.save_entry({"a": 1}, {}, ARRAYS)
    np.savez(store.folder("entries", {"a": 1}) / "arrays.npz", scores=np.array([object()], dtype=object))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.load_entry({"a": 1}) is None


def test_a_run_killed_while_writing_leaves_no_entry(tmp_path):
    store = Store(tmp_path)

    def killed(out):
        out[:1] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.features({"f": 1}, (4, 2), "float16", killed)
    assert not store.folder("features", {"f": 1}).exists()
    got = store.features({"f": 1}, (4, 2), "float16", lambda out: out.fill(3))
    assert got.tolist() == [[3.0, 3.0]] * 4


def test_features_are_computed_once_memory_mapped_and_read_only(tmp_path):
    store, calls = Store(tmp_path), []

    def compute(out):
        calls.append(1)
        out[:] = 7

    for _ in range(2):
        got = store.features({"f": 1}, (4, 2), "float16", compute)
    assert len(calls) == 1 and isinstance(got, np.memmap) and not got.flags.writeable


def test_damaged_features_are_computed_again(tmp_path):
    store = Store(tmp_path)
    store.features({"f": 1}, (4, 2), "float16", lambda out: out.fill(1))
    file = store.folder("features", {"f": 1}) / "features.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="damaged"):
        assert store.features({"f": 1}, (4, 2), "float16", lambda out: out.fill(2)).tolist() == [[2.0, 2.0]] * 4


def test_no_disk_space_names_needed_and_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _path: usage(10, 0, 2 * 10**9))
    with pytest.raises(OSError, match=r"no disk space in .*: features need 5\.00 GB, 2\.00 GB are free"):
        require_disk(tmp_path / "not" / "yet", 5 * 10**9, "features")
    computed = []
    with pytest.raises(OSError, match="no disk space"):
        Store(tmp_path).features({"f": 1}, (10**6, 1024), "float32", computed.append)
    assert not computed


def _append(root, log):
    def compute(out):
        with open(log, "a") as file:
            file.write("computed\n")
        out[:] = 5

    Store(root).features({"f": 1}, (200, 200), "float32", compute)


def test_several_processes_compute_an_entry_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(tmp_path, tmp_path / "log")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [w.exitcode for w in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "computed\n"


def test_results_are_strict_json(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        Store(tmp_path).save_entry({"a": 1}, {"x": float("nan")}, ARRAYS)
    assert not list(tmp_path.glob("entries/*"))
