"""The command line: three commands from a folder to a decision, exit statuses, and a watch that scores each image once."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from conftest import CAMPAIGN, REAL
from PIL import Image

from rcp.__main__ import main
from rcp.data import load_dataset
from rcp.detector import load
from rcp.files import file_hash
from rcp.prediction import Prediction, results_folder
from rcp.watch import watch

HOW = [
    "--backbone", "resnet18", "--weights", "random:0", "--set", "resize=64", "--set", "image_size=64", "--set", "patch_size=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(demo_root, attacked):
    return load_dataset(attacked[0], category="bottle") if REAL else load_dataset(demo_root, category="gear")


@pytest.fixture(scope="module")
def part(data, attacked, tmp_path_factory):
    file, how = tmp_path_factory.mktemp("part") / "part.rcp", [*HOW, "--weights", attacked[2]]
    assert main(["fit", str(data.folder / "train" / "good"), "-o", str(file), *how, "--set", "coreset_ratio=0.2"]) == 0
    return file


def test_loose_jpegs_without_labels_to_decisions(data, part, tmp_path, capsys):
    named = [f"{i}{'é' * 120 * (i == 3)}.jpg" for i in range(4)]  # as long as a name may be
    for path, name in zip(data.test, named, strict=False):
        Image.open(path).convert("RGB").save(tmp_path / name)
    out = tmp_path / "results"
    assert main(["predict", str(part), str(tmp_path), "--out", str(out), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [str(tmp_path / name) for name in named]
    assert all(row["defective"] == (row["score"] >= row["threshold"]) == bool(row["boxes"]) for row in rows)
    assert len(list(out.glob("*.jpg"))) == 4 and len((out / "predictions.csv").read_text().splitlines()) == 5
    with results_folder(tmp_path / "killed", []) as killed:
        shutil.copy(next(out.glob("*.jpg")), killed)
        assert main(["predict", str(part), str(tmp_path / "0.jpg"), "--out", str(killed)]) == 2
        assert "a folder that no other run writes in" in capsys.readouterr().err
    with results_folder(killed, []):
        pass  # what a killed run has left is taken
    (killed / "predictions.csv").write_bytes(b"path,score,defective,threshold\n\0,1\n" + b'"' + b"x" * 2**18)
    assert main(["predict", str(part), str(tmp_path / "0.jpg"), "--out", str(killed)]) == 0, "no longer a table"
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prediction, "save_overlay", lambda _self, _folder, _i, number: 1 // (3 - number))
        assert main(["predict", str(part), str(tmp_path), "--out", str(out)]) == 2
    assert len((out / "predictions.csv").read_text().splitlines()) == 4, "rows are written as they come"
    (tmp_path / "text.jpg").write_text("text")
    assert main(["predict", str(part), str(tmp_path / "1.jpg"), "--out", str(out)]) == 0
    assert main(["predict", str(part), str(tmp_path / "text.jpg"), "--out", str(out)]) == 2
    assert [p.name for p in out.glob("*.jpg")] == ["0001_1.jpg"], "where nothing can be read, what was there stays"
    capsys.readouterr()
    for names, left in ((["1.jpg", "text.jpg"], ["0001_1.jpg"]), (["text.jpg"], [])):
        given = [str(part), *(str(tmp_path / name) for name in names), "--skip-unreadable", "--out", str(out)]
        assert main(["predict", *given, "--fail", "--json"]) == 2, "what was not seen has not passed"
        assert [p.name for p in out.glob("*.jpg")] == left, "of the run before nothing is left"
        assert len((out / "predictions.csv").read_text().splitlines()) == 1 + len(names)
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["path"].endswith("text.jpg") and "none of PNG" in last["error"]
    assert main(["info", str(part)]) == 0
    assert "memory bank" in (said := capsys.readouterr().err) and "false alarms" in said and "whitened" in said


def test_exit_status(data, part, tmp_path, capsys):
    defect = str(next(p for p, label in zip(data.test.paths, data.test.labels, strict=True) if label))
    assert main(["predict", str(part), defect, "--false-alarm-rate", "0.9"]) == 0
    assert "DEFECTIVE" in capsys.readouterr().out
    (tmp_path / "odd").mkdir()
    shutil.copy(defect, odd := tmp_path / "odd" / "a\nnormal \x1b[2K.png")
    assert main(["predict", str(part), str(odd), "--false-alarm-rate", "0.9", "--fail"]) == 1
    assert capsys.readouterr().out.endswith("a\\nnormal \\x1b[2K.png\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "predictions.csv").write_text("not, ours")
    for wrong, words in (
        (["predict", str(part), str(tmp_path / "absent.png")], "absent.png"),
        (["predict", str(tmp_path / "absent.rcp"), defect], "no detector file"),
        (["predict", str(part), str(odd), "--out", str(odd.parent)], "out: expected another folder"),
        (["predict", str(part), str(odd), "--out", str(part)], "out: expected a folder, or a new name"),
        (["predict", str(part), str(odd), "--out", str(tmp_path)], "predictions.csv is an image, or not"),
        (["predict", str(part), "~none-such"], "no such image or folder: ~none-such"),
        (["fit", str(data.folder), "-o", str(odd), *HOW], ".png is an image, or not what rcp writes there"),
        (["predict", str(part), str(odd), "--out", str(data.folder / "train/good")], "out: expected a new folder"),
        (["watch", str(part), str(odd.parent), "--log", str(odd.parent / "b.png")], "b.png is an image, or not what"),
        (["predict", str(part), defect, "--false-alarm-rate", "0.001"], "false_alarm_rate: expected at least"),
        (["fit", str(tmp_path), "-o", str(tmp_path / "a.rcp"), *HOW], "no known layout"),
        (["fit", str(data.folder), "-o", str(tmp_path / "no" / "a.rcp"), *HOW], "no folder"),
        (["fit", str(data.folder), "-o", str(tmp_path / "pipe"), *HOW], "pipe is there, and is no file"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), "--set", "dim=" + "[" * 10**5], "dim: expected int"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), "--set", "dmi=3"], "Did you mean 'dim'?"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), "--set", "epochs=3"], "uses, got ['epochs']"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), "--set", "tiles=(0, 2)"], "got (0, 2)"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), *HOW, "--false-alarm-rate", "1e-4"], "for this rate"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), *HOW, "--backbone", ""], "has a model ''"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), *HOW, "--weights", ""], "weights: expected a tag"),
        (["info", str(part), "--device", "gpu"], "device: expected auto, cpu or an available cuda device"),
        (["fit", str(data.folder), "-o", str(tmp_path / "a.rcp"), "--set", "tile_overlap=8"], "overlap: expected 0"),
        (["watch", str(part), str(tmp_path / "absent")], "a folder that is there"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "a.rcp").exists()
    assert (tmp_path / "predictions.csv").read_text() == "not, ours" and list(odd.parent.iterdir()) == [odd]
    copies = tmp_path / "copies"
    copies.mkdir()
    for i in range(4):
        shutil.copy(data.train[0], copies / f"{i}.png")
    assert main(["fit", *map(str, copies.iterdir()), "-o", str(tmp_path / "c.rcp"), *HOW]) == 0
    assert main(["predict", str(tmp_path / "c.rcp"), defect, "--fail"]) == 2, "no threshold is no good part"
    assert "no decision: images: expected normal images that differ" in capsys.readouterr().err
    for usage in ([], [str(part), defect, "--out", ""]):
        with pytest.raises(SystemExit, match="2"):
            main(["predict", *usage])
    assert "--out: invalid path value: ''" in capsys.readouterr().err


def test_watch_scores_each_image_once_whatever_happens(data, part, tmp_path, capsys):
    detector, log = load(part), tmp_path / "log.jsonl"
    folder = tmp_path / "line"
    folder.mkdir()
    whole = [path.read_bytes() for path in data.test[:4]]
    (folder / "half.png").write_bytes(whole[0][:900])
    (folder / "note.txt").write_text("no image")
    shutil.copy(data.test[1], folder / "b.png")
    look = lambda n=3: list(watch(detector, folder, log, 0, n))  # noqa: E731
    first = look()
    assert [os.path.basename(row["path"]) for row in first] == ["b.png"], "half a file waits"
    (folder / "half.png").write_bytes(whole[0])
    (folder / "b.png").rename(folder / "c.png")
    assert [os.path.basename(row["path"]) for row in look()] == ["half.png"], "a renamed one is no new one"
    log.write_bytes(log.read_bytes() + b'{"path": "cut of')
    assert look() == [] and len(log.read_text().splitlines()) == 2, "a restart goes on; what a kill cut is removed"
    log.write_bytes(log.read_bytes()[:-1])
    assert len(look()) == 1 and len(log.read_text().splitlines()) == 2, "a line without its end was not written whole"
    (folder / "c.png").write_bytes(whole[2])
    assert len(look()) == 1, "written anew it is a new image"
    (folder / "d.png").symlink_to(folder / "absent")
    (folder / "e.png").mkdir()
    (folder / "f.png").symlink_to("f.png")
    assert look() == []
    (folder / "bad.png").write_bytes(b"never an image")
    assert "error" in look(15)[0] and look(15) == [], "reported once"
    (folder / "b.gif").touch()
    with pytest.warns(UserWarning, match=r"not watched in .*: \*\.gif, folders, what is no file"):
        assert look() == []
    running = watch(detector, folder, log, 0, 9)
    (folder / "g.png").write_bytes(whole[3])
    next(running)
    with pytest.raises(ValueError, match="log: expected one that no other watch writes"):
        look()
    running.close()
    (tmp_path / "notes.txt").write_text('{"no": "log"}')
    for wrong, words in (
        (tmp_path / "notes.txt", "lines of JSON that watch wrote, got '.*notes.txt, line 1"),
        (log, "2 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            list(watch(detector, folder, wrong, 0, 1 if wrong == log else 3))
    assert (tmp_path / "notes.txt").read_text() == '{"no": "log"}'
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="folder: expected a folder that is there"):
        look()


def test_an_image_that_is_replaced_while_it_is_scored_is_scored_as_what_it_is(data, part, tmp_path, monkeypatch):
    detector, file = load(part), tmp_path / "latest.png"
    shutil.copy(data.test[0], file)
    predict, seen = detector.predict, []

    def slow(paths):
        seen.append(paths)
        if len(seen) == 1:  # the line renames the image and writes the next one under its name
            file.rename(tmp_path / "0001.png")
            shutil.copy(data.test[5], file)
        return predict(paths)

    monkeypatch.setattr(detector, "predict", slow)
    found = list(watch(detector, tmp_path, tmp_path / "log.jsonl", 0, 6))
    expected = {"0001.png": data.test[0], "latest.png": data.test[5]}
    assert {os.path.basename(f["path"]): f["score"] for f in found} == pytest.approx(
        {name: predict([path]).scores.item() for name, path in expected.items()}, rel=1e-5
    )


def test_watch_tells_images_of_one_inode_size_and_time_apart(data, part, tmp_path):
    """As of uncompressed frames, dated in whole seconds, that a later station takes away."""
    detector, log, folder = load(part), tmp_path / "log.jsonl", tmp_path / "line"
    folder.mkdir()

    def found(file: Path) -> list[str]:
        os.utime(file, (1.7e9, 1.7e9))
        rows = list(watch(detector, folder, log, 0, 3))
        assert not any("digest" in row for row in rows)
        return [os.path.basename(row["path"]) for row in rows]

    for i, path in enumerate(data.test[:3]):
        Image.open(path).convert("RGB").save(file := folder / f"frame{i}.bmp")
        assert found(file) == [file.name]
        other = file.rename(folder / f"{i}.bmp")
        assert found(other) == [], "another name is no other image"
        with other.open("r+b") as out:
            out.seek(1000)
            out.write(b"another")
        assert found(other) == [other.name] and found(other) == [], "another content is one"
        with other.open("r+b") as out:
            out.seek(2000)
            out.write(b"the name stays, and the log holds it")
        assert found(other) == [other.name] and found(other) == []
        other.unlink()
    (folder / "0.png").write_bytes(data.test[0].read_bytes())
    (folder / "1.png").symlink_to("0.png")
    (folder / "2.png").hardlink_to(folder / "0.png")
    hashed = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rcp.watch.file_hash", lambda path: hashed.append(path) or file_hash(path))
        assert len(list(watch(detector, folder, log, 0, 30))) == 1 and len(hashed) < 9, "not at each look"
    for link in ("0.png", "1.png", "2.png"):
        (folder / link).unlink()
    shutil.copy2(data.test[0], folder / "last.png")
    with pytest.MonkeyPatch.context() as patched:  # a right that changes is no other image
        patched.setattr("time.sleep", lambda _: (folder / "last.png").chmod(0o644))
        assert len(list(watch(detector, folder, log, 0, 3))) == 1
    (folder / "last.png").unlink()
    shutil.copy2(data.test[0], folder / "last.png")
    assert found(folder / "last.png") == ["last.png"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({"path": line["path"], "key": line["key"]}) + "\n" for line in lines))
    assert found((folder / "last.png").rename(folder / "l.png")) == [], "of a log of before"


def test_watch_says_what_it_cannot_score(data, part, tmp_path, monkeypatch):
    detector, file, log = load(part), tmp_path / "latest.png", tmp_path / "log.jsonl"
    shutil.copy(data.test[0], file)
    with monkeypatch.context() as patched:
        patched.setattr("rcp.watch.file_hash", lambda path: (path / "no").open())
        with pytest.warns(UserWarning, match=r"latest\.png waits since 12 looks: .*Not a directory") as said:
            assert not list(watch(detector, tmp_path, log, 0, 30))
    assert len(said) == 1, [str(w.message) for w in said]
    times = count()
    with monkeypatch.context() as patched:
        patched.setattr("time.sleep", lambda _: os.utime(file, (next(times),) * 2))
        with pytest.warns(UserWarning, match=r"latest\.png waits since 12 looks: it is another at each look"):
            assert not list(watch(detector, tmp_path, log, 0, 14))
    assert len(list(watch(detector, tmp_path, log, 0, 3))) == 1, "it is scored as soon as it can be"
    detector.false_alarm_rate = 0.3
    with pytest.warns(UserWarning, match=r"holds decisions of the threshold [0-9.]+, not [0-9.]+, which stay"):
        assert not list(watch(detector, tmp_path, log, 0, 3)), "each image is scored once, whatever the detector"


def test_a_killed_watch_loses_and_repeats_nothing(data, part, tmp_path):
    folder, n = tmp_path / "line", 20 * CAMPAIGN or 24
    folder.mkdir()

    def write():
        for i in range(n):
            content = data.test[i % len(data.test)].read_bytes()
            with open(folder / f"{i:03d}.part", "wb") as file:
                file.write(content[:500])
                file.flush()
                time.sleep(0.05)
                file.write(content[500:])
            (folder / f"{i:03d}.part").rename(folder / f"{i:03d}.png")

    writer = threading.Thread(target=write)
    writer.start()
    command = [sys.executable, "-m", "rcp", "watch", str(part), str(folder), "--seconds", "0.05", "--json"]
    log = folder / "rcp.jsonl"

    def scored() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    for until in (n // 6, n // 2, n):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        ends = time.monotonic() + 120
        while scored() < until and time.monotonic() < ends:
            time.sleep(0.02)
        process.kill()
        process.wait()
    writer.join()
    names = [os.path.basename(json.loads(line)["path"]) for line in log.read_text().splitlines()]
    assert sorted(names) == [f"{i:03d}.png" for i in range(n)]
    print(f"\nwatch: {n} files, killed twice while they were written, each scored once")
