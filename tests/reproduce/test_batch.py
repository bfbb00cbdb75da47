"""The batch runs notebooks through papermill, goes on after a failure, resumes, and indexes; the command line says what is wrong."""

import base64
import html
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from filelock import FileLock
from papermill.exceptions import PapermillExecutionError

from rcp.paths import PROJECT
from reproduce import __main__ as cli
from reproduce import batch, notebook, tables

DECLARED = 'profile: str = "demo"\ndata_root: str = ""\nepochs: int = 0\nseeds: list = []\nrender_only: bool = False'
VERDICT = """import pandas as pd
from reproduce import notebook, verdict
settings = notebook.settings(globals())
row = dict(metric="image_auroc", setting="ReConPatch", kind="all", left_out="", mean=99.0, spread=0.1, published=99.5, difference=-0.5)
print(verdict.verdict(settings, "table_1", pd.DataFrame([row])), settings.epochs)"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, small_demo) -> Path:
    """Where the batch writes in the demo profile."""
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(notebook, "draw_demo", lambda _root: small_demo)
    return tmp_path / "runs" / "reproduce" / "demo"


def tiny(folder: Path, name: str, last: str, declared: str = DECLARED, tags: tuple = ()) -> Path:
    nb = nbformat.v4.new_notebook()
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.cells = [
        nbformat.v4.new_markdown_cell(f"# A title for {name} & others"),
        nbformat.v4.new_code_cell(declared, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(last, metadata={"tags": list(tags)}),
    ]
    nbformat.write(nb, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def test_a_batch_goes_on_after_a_failure_resumes_and_indexes(tmp_path, small_demo, folder):
    given = {"data_root": str(small_demo), "epochs": 3}
    row = "\nmain,image_auroc,01,category,gear,1,,,99,,1,1,98,1\n"
    wrote = {"table_1_extra.csv": "a,b\n1,2\n", "table_1.csv": ",".join(["table", *tables.COLUMNS]) + row}
    wrote["table_1_entries.csv"] = "\n"  # of an empty store
    alone = VERDICT.replace("pd.DataFrame([row])", "None, '99.00 & more'")  # the paper prints no number
    writes = f"{alone}\nfor name, text in {wrote!r}.items():\n    settings.out(name).write_text(text)"
    files = [tiny(tmp_path, "table_1", writes), tiny(tmp_path, "bad", "raise ValueError('the <reason>')")]
    said: list[str] = []
    good, bad = batch.reproduce(given, files, say=said.append)
    assert nbformat.read(folder / "table_1.ipynb", as_version=4).cells[-1].outputs[0].text.endswith(" 3\n")
    assert not good.error and good.seconds > 0 and bad.error == "ValueError: the <reason>"
    again, bad_again = batch.reproduce(given, files, say=said.append)
    assert again.seconds is None and bad_again.error, "what is finished is not run again, what failed is"
    assert "[1/2] table_1: up to date" in said
    index = (folder / "index.html").read_text()
    assert index.index('id="verdicts"') < index.index("<h2") and "not the paper" in index and "<reason>" not in index
    assert all(shown in index for shown in ("<h3>main</h3>", "01", "99.00", "98.00", "+1.00"))
    first, second = re.findall(r"<tr><td>.*?</tr>", index)
    assert "A title for table_1 &amp; others" in first and "99.00 &amp; more" in first
    assert 'href="./table_1.html"' in first and 'href="./table_1_extra.csv"' in first
    assert (folder / "table_1.html").exists()
    assert ">demo<" in first and re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d; commit \w+", index), "when, and of which code"
    assert "not run" in second and "ValueError: the &lt;reason&gt;" in second
    changed, _ = batch.reproduce(given | {"seeds": [0]}, files, say=said.append)
    assert changed.seconds is not None, "other parameters are another run"


def test_what_was_cut_deleted_or_half_written_is_made_again(tmp_path, small_demo, folder):
    written = json.dumps({"state": "reproduced", "words": ""})
    file = tiny(tmp_path, "table_1", f"open({str(folder / 'table_1.verdict.json')!r}, 'w').write({written!r})")
    assert not batch.reproduce({"data_root": str(small_demo)}, [file], say=len)[0].error
    for name, left in ((".table_1.json", 0.5), ("table_1.html", 0.5), ("table_1.verdict.json", 0)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(left * len(content))]) if left else (folder / name).unlink()
        (outcome,) = batch.reproduce({"data_root": str(small_demo)}, [file], say=len)
        assert outcome.seconds and not outcome.error, name
    assert batch.reproduce({"data_root": str(small_demo)}, [file], say=len)[0].seconds is None
    of_file = tiny(tmp_path, "named", "print(open(anomalib_results).read())", DECLARED + '\nanomalib_results: str = ""')
    for content in ("one", "other"):
        (tmp_path / "an.csv").write_text(content)
        given = {"data_root": str(small_demo), "anomalib_results": str(tmp_path / "an.csv")}
        assert batch.reproduce(given, [of_file], say=len)[0].seconds, "a file that a parameter names has changed"


def test_relative_folders_are_those_of_where_one_stands_and_may_have_braces(tmp_path, small_demo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RCP_RUNS", "runs{n}")
    monkeypatch.setenv("RCP_DATA", "data")
    says = "import os\nsettings.out('table_1.csv').write_text(os.environ['RCP_DATA'] + ',b\\n')"
    (outcome,) = batch.reproduce(
        {"data_root": str(small_demo)}, [tiny(tmp_path, "table_1", f"{VERDICT}\n{says}")], say=len
    )
    there = tmp_path / "runs{n}" / "reproduce" / "demo"
    assert outcome.error == "" and {"index.html", "table_1.ipynb"} <= {f.name for f in there.iterdir()}
    assert (there / "table_1.csv").read_text() == f"{tmp_path}/data,b\n"
    with pytest.raises(ValueError, match="notebooks: expected another name than index"):
        batch.reproduce({}, [tiny(tmp_path, "index", VERDICT)])


def test_two_batches_do_not_write_into_one_folder(tmp_path, small_demo, folder):
    folder.mkdir(parents=True)
    with (
        FileLock(folder / ".batch.lock"),
        pytest.raises(OSError, match=r"another batch writes into .*: wait for it, or set RCP_RUNS or SHARD"),
    ):
        batch.reproduce({"data_root": str(small_demo)}, [tiny(tmp_path, "one", VERDICT)], say=len)


def test_a_killed_batch_leaves_no_kernel(tmp_path, small_demo):
    says = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    file = tiny(tmp_path, "sleeps", f"{VERDICT}\n{says}\ntime.sleep(600)")
    command = [sys.executable, "-m", "reproduce", "reproduce", "--data-root", str(small_demo), "--notebooks", str(file)]
    running = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    written = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    running.kill()
    running.wait()
    proc = Path(f"/proc/{written}")
    assert written and wait_for(lambda: not proc.exists() or "State:\tZ" in (proc / "status").read_text())


def wait_for(what, seconds: float = 60):
    until = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def test_rendering_computes_nothing(tmp_path, small_demo, folder):
    without = "\n".join(line for line in DECLARED.splitlines() if "render_only" not in line)
    said, drawn = [], tiny(tmp_path, "drawn", "print(render_only)")
    files = [tiny(tmp_path, "only", "raise ValueError('it computes')", without), drawn]
    only, drawn = batch.reproduce({"data_root": str(small_demo), "render_only": True}, files, say=said.append)
    assert only.seconds is None and not only.error and "[1/2] only: left as it is" in said
    assert drawn.seconds and not drawn.error and "True" in (folder / "drawn.ipynb").read_text()
    (stamp,) = folder.glob(".*.json")
    assert json.loads(stamp.read_text())["version"] == {}, "what is only drawn is not ticked off"
    (folder / "only.verdict.json").write_text('{"state": "repro')
    batch.reproduce({"data_root": str(small_demo), "render_only": True}, files)
    assert "only.verdict.json is no verdict, or half of one" in (folder / "index.html").read_text()


def test_papermill_alone_refuses_a_mistyped_parameter(tmp_path, small_demo):
    file, out = str(tiny(tmp_path, "one", VERDICT)), str(tmp_path / "out.ipynb")
    with pytest.raises(PapermillExecutionError, match=r"unknown parameter 'epoch'\. Did you mean 'epochs'"):
        papermill.execute_notebook(file, out, {"epoch": 3}, progress_bar=False)


def test_unknown_parameters_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_run", lambda *_a: pytest.fail("a notebook was run"))
    more = '\ndevice: str = ""\nbtad_root: str = ""\nmembers: dict = {}\nweights: str = ""'
    file = tiny(tmp_path, "good", "1", DECLARED + more)
    (tmp_path / "text.pth").write_text("text")
    mistyped = {"resnet18": "random:0", "resnet81": "random:0"}
    for given, words in (
        ({"epoch": 3}, r"unknown parameter 'epoch'. Did you mean 'epochs'\?"), ({"profile": "papre"}, "profile: expected one of"),
        *(({"epochs": n}, f"epochs: expected a number above 0.* got {n}$") for n in (-1, 0, 2**31)),
        ({"weights": str(tmp_path / "text.pth")}, "weights: .*text.pth is not a plain file of tensors"),
        ({"device": "gpu"}, "device: expected auto, cpu"), ({"seeds": [0, 10**20]}, "seeds: expected different numbers from 0"),
        ({"weights": 3}, "weights: expected str, got 3"), ({"members": ["a"]}, "members: expected dict"),
        ({"members": {"a": 1}}, "members: expected str"),
        ({"btad_root": "no"}, "btad_root: expected a folder, got .*no"), ({"members": mistyped}, "has a model 'resnet81'"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            batch.reproduce(given, [file])
    with pytest.raises(ValueError, match=r"unknown notebook 'tabel_5'. Did you mean 'table_5'\?"):
        batch.reproduce({}, ["tabel_5"])


def test_a_notebook_is_stale_by_its_own_cells_and_keeps_the_outputs_of_checked_ones(tmp_path):
    file = tiny(tmp_path, "one", "print(epochs)", tags=(batch.CHECKED,))
    assert batch.stale(file), "never executed"
    batch.execute(file)
    nb = nbformat.read(file, as_version=4)
    assert not batch.stale(file) and nb.cells[-1].outputs[0].text == "0\n"
    nb.cells[0].source += "\n\nMore words."
    nbformat.write(nb, file)
    assert not batch.stale(file)
    nb.cells[-1].source = "print(epochs + 1)"
    nbformat.write(nb, file)
    assert batch.stale(file)
    failing = tiny(tmp_path, "two", "print(1)\nraise ValueError('the reason')")
    before = failing.read_bytes()
    with pytest.raises(Exception, match="the reason"):
        batch.execute(failing)
    assert failing.read_bytes() == before
    batch.execute(tiny(tmp_path, "two", "print(1)"))
    assert nbformat.read(failing, as_version=4).cells[-1].outputs == [], "not checked, so nothing is kept"


def test_command_line_says_what_is_wrong_and_fails(capsys, tmp_path, small_demo):
    file = tiny(tmp_path, "bad", "raise ValueError('the reason')")
    assert cli.main(["reproduce", "--data-root", str(small_demo), "--notebooks", str(file)]) == 1
    assert "failed: bad: ValueError: the reason" in capsys.readouterr().err
    assert cli.main(["reproduce", "--data-root", str(tmp_path / "absent"), "--notebooks", str(file)]) == 1
    assert "absent" in capsys.readouterr().err
    assert cli.main(["download", "mvtek"]) == 1
    assert "Did you mean 'mvtec'?" in capsys.readouterr().err
    assert cli.main(["publish", str(tmp_path / "no"), "--into", str(new := tmp_path / "new")]) == 1 and not new.exists()
    assert cli.main(["check", str(tmp_path)]) == 1 and "verdict.json" in capsys.readouterr().err


def test_what_is_published_names_no_machine_and_leaves_out_what_failed(tmp_path, small_demo, folder, capsys):
    shown = "import os\nprint(data_root, [data_root + '/gear'], epochs, os.environ['RCP_RUNS'] + '/reproduce/demo/x')"
    shown += "\n1 / (3 - epochs)"
    files = [tiny(tmp_path, name, shown) for name in ("table_1", "table_2")]
    assert len(batch.reproduce({"data_root": str(small_demo), "epochs": 2}, files[:1] * 2)) == 1
    batch.reproduce({"data_root": str(small_demo), "epochs": 3}, files[1:])
    into = tmp_path / "published"
    assert cli.main(["publish", str(folder), "--into", str(into)]) == 0
    assert "table_2: left out, division by zero" in capsys.readouterr().out
    (file,) = into.iterdir()
    text, name = file.read_text(), small_demo.name
    assert str(small_demo.parent) not in text and str(batch.PROJECT) not in text and "start_time" not in text
    assert f"{name} ['{name}/gear'] 2 demo/x" in text, "what is published keeps its outputs"
    assert cli.main(["publish", str(folder), "--into", str(into)]) == 0, "again"
    image = base64.b64encode(os.urandom(3000)).decode()
    page = f'<img src="data:image/png;base64,{image}">'
    for root in ("/d", "/ds", "/jürgen & söhne/mvtec"):
        executed = nbformat.read(folder / "table_1.ipynb", 4)
        executed.metadata["papermill"]["parameters"]["data_root"] = root
        text = f"{root}, data{root}, {root}-venv, -I{root}"
        shown = {"image/png": image, "text/html": f"{page} {html.escape(root)}/x", "text/plain": text}
        executed.cells[-1].outputs = [nbformat.v4.new_output("display_data", shown)]
        nbformat.write(executed, folder / "table_1.ipynb")
        assert cli.main(["publish", str(folder), "--into", str(into)]) == 0
        (found,) = nbformat.read(file, 4).cells[-1].outputs
        name = root.rpartition("/")[2]
        text = f"{name}, data{root}, {name}-venv, -I{root}"
        assert found.data == shown | {"text/html": f"{page} {name}/x", "text/plain": text}
    file.write_text("mine")
    for to in (into, batch.PROJECT / "notebooks"):
        assert cli.main(["publish", str(folder), "--into", str(to)]) == 1
    assert file.read_text() == "mine"


def test_doctor_names_what_is_missing_and_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    monkeypatch.setenv("RCP_WEIGHTS", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    commands = "reproduce download mvtec", "reproduce weights wide_resnet50_2"
    assert all(part in out for part in ("device", "torch", "faiss", "GB free", *commands))


def test_a_category_with_a_space_survives_a_list_that_was_split_at_its_spaces():
    there = ["01", "metal nut", "nut", "metal nut screw"]
    for words, expected in (
        (["metal", "nut"], ["metal nut"]), (["01", "metal", "nut", "nut"], ["01", "metal nut", "nut"]), (["nut", "01"], ["nut", "01"]),
        (["metal", "nut", "screw"], ["metal nut screw"]), (["metal nut"], ["metal nut"]), (["absent", "nut"], ["absent", "nut"]),
    ):  # fmt: skip
        assert batch._joined(words, there) == expected
    assert batch._joined(["metal", "nut"], [*there, "metal"]) == ["metal", "nut"], "names that are there win"
    with pytest.raises(ValueError, match="categories: expected a list of str"):
        batch._joined([1], there)


def test_a_notebook_keeps_its_files_beside_one_of_a_shorter_name(tmp_path, small_demo, folder):
    writes = "from reproduce import notebook\nnotebook.settings(globals()).out('NAME.csv').write_text('a\\n1\\n')"
    files = [tiny(tmp_path, name, writes.replace("NAME", name)) for name in ("mine_longer", "mine")]
    given = {"data_root": str(small_demo)}
    for file in files:
        assert not batch.reproduce(given, [file], say=len)[0].error
    assert {f"mine_longer.{kind}" for kind in ("csv", "html", "ipynb")} <= {f.name for f in folder.iterdir()}
    assert [o.seconds for o in batch.reproduce(given, files, say=len)] == [None, None], "both are up to date"
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="notebooks: expected one of each name"):
        batch.reproduce(given, [files[0], tiny(tmp_path / "other", "mine_longer", "1")], say=len)


def test_what_was_changed_or_did_not_finish_is_not_passed_on(tmp_path, small_demo, folder, capsys):
    row = ",".join(["table", *tables.COLUMNS]) + "\nmain,image_auroc,01,category,gear,1,,,50.0,,1,1,98,1\n"
    wrote = f"{VERDICT}\nfor kind in ('csv', 'txt'):\n    settings.out(f'NAME.{{kind}}').write_text({row!r})"
    files = [tiny(tmp_path, "sound", wrote.replace("NAME", "sound"))]
    files.append(tiny(tmp_path, "bad", wrote.replace("NAME", "bad") + "\nraise ValueError('late')"))
    assert [bool(o.error) for o in batch.reproduce({"data_root": str(small_demo)}, files, say=len)] == [False, True]
    with pytest.warns(UserWarning, match=r"left out, its notebook did not finish: .*bad\.csv"):
        tables.gather(folder, tmp_path / "all.csv")
    assert set(tables.read(tmp_path / "all.csv")["item"]) == {"sound"}
    executed = nbformat.read(folder / "sound.ipynb", as_version=4)
    for cells in (executed.cells[-1:], executed.cells):
        for cell in cells:
            cell.metadata["papermill"]["status"] = "pending"
        nbformat.write(executed, folder / "sound.ipynb")
        assert cli.main(["publish", str(folder), "--into", str(tmp_path / "new")]) == 0
        assert "sound: left out, it was not run to its end" in capsys.readouterr().out
    (folder / "sound.csv").write_text(row.replace("50.0", "59.0"))
    with pytest.raises(ValueError, match=r"sound\.csv: expected what its notebook wrote \(run it again\)"):
        tables.gather(folder, tmp_path / "all.csv")
    without = tiny(tmp_path, "sound", "1", DECLARED.rpartition("\n")[0])
    given = {"data_root": str(small_demo), "render_only": True}
    outcome, _ = batch.reproduce(given, [without, tiny(tmp_path, "drawn", "1")], say=len)
    index = (folder / "index.html").read_text()
    assert outcome.seconds is None and "59.0" not in index and "run it again" in index


def test_a_notebook_is_executed_in_place_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tiny(tmp_path, "mine", "print(1)")
    before, write = file.read_bytes(), nbformat.write

    def full(_notebook, path):
        Path(path).write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(batch.nbformat, "write", full)
    with pytest.raises(OSError, match="no space"):
        batch.execute(file)
    assert file.read_bytes() == before and [*tmp_path.glob("*.ipynb")] == [file] and write is not full
