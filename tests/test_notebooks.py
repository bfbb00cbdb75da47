"""Parameters are checked before any work, notebooks keep to their form, and the batch resumes."""

import os
import re
from pathlib import Path

import nbformat
import pytest

from rcp import __main__ as cli
from rcp import batch, notebook
from rcp.config import Config
from rcp.notebook import Settings, settings

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
DECLARED = 'profile: str = "demo"  # demo | paper\ndata_root: str = ""\nepochs: int = 0\nseeds: list = []\nrender_only: bool = False'


@pytest.fixture(autouse=True)
def _own_runs(tmp_path, monkeypatch, demo_root):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(notebook, "draw_demo", lambda _root: demo_root)


def run_cells(*sources: str) -> dict:
    """The names a kernel would hold after these cells."""
    names: dict = {"In": ["", *sources]}
    for source in sources:
        exec(source, names)
    return names


def test_the_demo_profile_needs_nothing(demo_root):
    s = settings(run_cells(DECLARED))
    assert (s.profile, s.backbone, s.weights, s.seeds) == ("demo", "resnet18", "random:0", (0,))
    assert s.data_root == str(demo_root) and set(s.categories) == {"gear", "fabric", "circuit"}
    assert "not the paper's" in s.label


def test_the_paper_profile_is_the_papers(demo_root, monkeypatch, tmp_path):
    s = Settings(profile="paper", data_root=str(demo_root))
    assert s.config() == Config(), "the paper profile is the defaults of Config, which are the paper's"
    assert s.seeds == (0, 1, 2) and len(s.cells([s.config()])) == 9
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m rcp download mvtec"):
        Settings(profile="paper")


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("epoch = 3", "unknown parameter 'epoch'. Did you mean 'epochs'?"),
        ("render_only = 'false'", "render_only: expected bool, got 'false' (str)"),
        ("epochs = '3'", "epochs: expected int, got '3' (str)"),
        ("seeds = ['0']", "seeds: expected a list of int, got ('0',)"),
        ("profile = 'papre'", "profile: expected one of 'demo', 'paper', got 'papre'. Did you mean 'paper'?"),
        ("data_root = 'no/such/folder'", "no/such/folder"),
    ],
)
def test_what_papermill_injects_is_checked(injected, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        settings(run_cells(DECLARED, "# Parameters\n" + injected))


def test_names_of_other_cells_are_no_parameters():
    s = settings(run_cells(DECLARED, "# Parameters\nepochs = 2", "frame = 3"))
    assert s.epochs == 2


def test_unknown_categories_name_those_there(demo_root):
    with pytest.raises(ValueError, match=r"has no 'gaer'. Did you mean 'gear'\? There are: "):
        Settings(categories=("gaer",))
    with pytest.raises(ValueError, match="shard: expected 'i/n'"):
        Settings(shard="0/4")
    with pytest.raises(ValueError, match="neither torchvision nor timm has a model 'resnet81'"):
        Settings(backbone="resnet81")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form_of_a_notebook(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", []), "the first code cell holds the parameters"
    assert all(re.match(r"\w+: \w+ = .+  # .+", line) for line in code[0].source.splitlines()), (
        "typed, one a line, with help"
    )
    assert re.search(r"notebook\.settings\(globals\(\)(, dataset=\"\w+\")?\)", code[1].source), (
        "the next builds the config and refuses what is unknown"
    )
    assert len(nb.cells) <= 30 and max(len(c.source.splitlines()) for c in code) <= 15
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    checked = [c for c in code if "NBVAL_CHECK_OUTPUT" in c.source]
    assert checked and all(c.outputs for c in checked), "checked cells are compared with their stored outputs"
    assert path.stat().st_size < 2**20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_an_executed_notebook_is_not_older_than_its_code(path):
    assert not batch.stale(path), "run: make notebooks"


def test_a_change_of_code_makes_outputs_stale_and_a_change_of_words_does_not(tmp_path, monkeypatch):
    file = tiny(tmp_path, "one", "print(epochs)")
    assert batch.stale(file), "never executed"
    batch.execute(file)
    assert not batch.stale(file)
    nb = nbformat.read(file, as_version=4)
    assert nb.cells[-1].outputs[0].text == "0\n" and "execution" not in nb.cells[-1].metadata
    nb.cells[0].source += "\n\nMore words."
    nbformat.write(nb, file)
    assert not batch.stale(file)
    monkeypatch.setattr(batch.experiment, "code_version", lambda _modules: "another rcp")
    assert batch.stale(file)
    monkeypatch.undo()
    nb.cells[-1].source = "print(epochs + 1)"
    nbformat.write(nb, file)
    assert batch.stale(file)
    failing = tiny(tmp_path, "two", "raise ValueError('the reason')")
    before = failing.read_bytes()
    with pytest.raises(Exception, match="the reason"):
        batch.execute(failing)
    assert failing.read_bytes() == before


def tiny(folder: Path, name: str, last: str) -> Path:
    nb = nbformat.v4.new_notebook()
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.cells = [
        nbformat.v4.new_markdown_cell(f"# A title for {name}"),
        nbformat.v4.new_code_cell(DECLARED, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(last),
    ]
    nbformat.write(nb, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def test_a_batch_goes_on_after_a_failure_resumes_and_indexes(tmp_path, demo_root):
    given = {"data_root": str(demo_root), "epochs": 3}
    files = [
        tiny(tmp_path, "good", "assert epochs == 3\nprint('fine')"),
        tiny(tmp_path, "bad", "raise ValueError('the reason')"),
    ]
    said: list[str] = []
    good, bad = batch.reproduce(given, files, say=said.append)
    assert not good.error and good.seconds > 0
    assert bad.error == "ValueError: the reason"
    index = (tmp_path / "runs" / "reproduce" / "demo" / "index.html").read_text()
    assert "A title for good" in index and "failed: ValueError: the reason" in index and "not the paper" in index
    assert (tmp_path / "runs" / "reproduce" / "demo" / "good.html").exists()
    again, bad_again = batch.reproduce(given, files, say=said.append)
    assert again.seconds is None and bad_again.error, "what is finished is not run again, what failed is"
    changed, _ = batch.reproduce(given | {"epochs": 3, "seeds": [0]}, files, say=said.append)
    assert changed.seconds is not None, "other parameters are another run"


VERDICT = """from rcp import notebook, verdict
settings = notebook.settings(globals())
print(verdict.verdict(settings, "{}", [verdict.Comparison("image AUROC:", 99.0, 0.1, 99.5)]))"""


def test_the_index_opens_with_a_verdict_per_item_and_its_links(tmp_path, demo_root):
    files = [
        tiny(tmp_path, "table_1", VERDICT.format("table_1")),
        tiny(tmp_path, "table_2", "raise OSError('no data/btad')"),
    ]
    batch.reproduce({"data_root": str(demo_root)}, files, say=len)
    folder = tmp_path / "runs" / "reproduce" / "demo"
    (folder / "table_1_extra.csv").write_text("a,b\n1,2\n")
    batch.reproduce({"data_root": str(demo_root)}, files, say=len)
    index = (folder / "index.html").read_text()
    assert index.index('id="verdicts"') < index.index("<h2")
    first, second = re.findall(r"<tr><td>.*?</tr>", index)
    assert "not run" in first and "99.00 ± 0.10 (paper 99.50)" in first
    assert 'href="table_1.html"' in first and 'href="table_1_extra.csv"' in first
    assert "not run" in second and "OSError: no data/btad" in second


def test_rendering_computes_nothing_and_shares_the_cores(tmp_path, demo_root):
    look = (
        "import os, time\nstarted = time.time()\ntime.sleep(4)\nprint(render_only, os.getpid(), started, time.time())"
    )
    files = [tiny(tmp_path, name, look) for name in ("one", "two")]
    outcomes = batch.reproduce({"data_root": str(demo_root), "render_only": True}, files, say=len)
    assert [o.name for o in outcomes] == ["one", "two"] and not any(o.error for o in outcomes)
    folder = tmp_path / "runs" / "reproduce" / "demo"
    said = [nbformat.read(folder / f"{o.name}.ipynb", as_version=4).cells[-1].outputs[0].text.split() for o in outcomes]
    assert {words[0] for words in said} == {"True"} and said[0][1] != said[1][1]
    if (os.cpu_count() or 1) > 1:
        assert max(float(w[2]) for w in said) < min(float(w[3]) for w in said), "side by side"
    assert not list(folder.glob(".*.json")), "what is only drawn is not ticked off"


def test_papermill_alone_refuses_a_mistyped_parameter(tmp_path, demo_root):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    file = tiny(
        tmp_path, "one", "from rcp import notebook\nsettings = notebook.settings(globals())\nprint(settings.epochs)"
    )
    given = {"data_root": str(demo_root), "epochs": 3}
    done = papermill.execute_notebook(str(file), str(tmp_path / "out.ipynb"), given, progress_bar=False)
    assert done.cells[-1].outputs[0].text == "3\n"
    with pytest.raises(PapermillExecutionError, match=r"unknown parameter 'epoch'\. Did you mean 'epochs'"):
        papermill.execute_notebook(str(file), str(tmp_path / "out.ipynb"), {"epoch": 3}, progress_bar=False)


def test_the_batch_refuses_unknown_parameters_before_any_work(tmp_path, demo_root, monkeypatch):
    monkeypatch.setattr(batch, "_run", lambda *_a: pytest.fail("a notebook was run"))
    file = tiny(tmp_path, "good", "1")
    with pytest.raises(ValueError, match=r"unknown parameter 'epoch'. Did you mean 'epochs'\?"):
        batch.reproduce({"epoch": 3}, [file])
    with pytest.raises(ValueError, match="profile: expected one of"):
        batch.reproduce({"profile": "papre"}, [file])


def test_command_line_says_what_is_wrong_and_fails(capsys, tmp_path, demo_root, monkeypatch):
    file = tiny(tmp_path, "bad", "raise ValueError('the reason')")
    assert cli.main(["reproduce", "--data-root", str(demo_root), "--notebooks", str(file)]) == 1
    assert "failed: bad: ValueError: the reason" in capsys.readouterr().err
    assert cli.main(["reproduce", "--data-root", str(tmp_path / "absent"), "--notebooks", str(file)]) == 1
    assert "absent" in capsys.readouterr().err
    assert cli.main(["download", "mvtek"]) == 1
    assert "Did you mean 'mvtec'?" in capsys.readouterr().err


def test_doctor_names_what_is_missing_and_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    monkeypatch.setenv("RCP_WEIGHTS", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (
        "device",
        "torch",
        "faiss",
        "GB free",
        "python -m rcp download mvtec",
        "python -m rcp weights wide_resnet50_2",
    ):
        assert part in out


def test_provenance_says_where_numbers_come_from():
    from rcp.experiment import Result

    versions = dict.fromkeys(("rcp", "torch", "torchvision", "faiss-gpu", "adamp"), "1.0")
    info = {
        "seconds": {"coreset": 3600.0},
        "commit": "abc",
        "device": "cpu, 2 threads",
        "config": {"seed": 4},
        "versions": versions,
    }
    line = notebook.provenance([Result({}, info, {}, True)], 3)
    assert line.startswith("1 of 3 cells done; commit abc") and "1.00 hours" in line and line.endswith("seeds 4")
