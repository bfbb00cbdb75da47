"""Parameters are checked before any work, notebooks keep to their form, and the batch resumes."""

import ast
import os
import re
from pathlib import Path

import matplotlib
import nbformat
import pytest

from reproduce import __main__ as cli
from reproduce import batch, grids, notebook, studies, views
from rcp import data
from rcp.data.perturb import Perturbation
from rcp.config import Config
from reproduce.entries import Cell, Ensemble, Result, run_grid
from reproduce.notebook import Settings, settings
from reproduce.store import Store
from reproduce.studies import FeatureSpace

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
    with pytest.raises(FileNotFoundError, match="python -m reproduce download mvtec"):
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


# ---- every notebook of a grid on a store that has nothing, or only a part ----

OF_GRIDS = [path for path in NOTEBOOKS if path.stem.startswith(("table_", "figure_"))]
PARAMETERS = {"categories": ["gear"], "epochs": 1, "device": "cpu", "seeds": [0, 1]}


@pytest.fixture(scope="module")
def tiny_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    few = {"train": 4, "good": 2, "per_defect": 1}
    return data.draw_demo(folder / "demo", **few), data.draw_demo_btad(folder / "btad", **few)


@pytest.fixture(scope="module")
def patchcore_only(tmp_path_factory, tiny_sets):
    """A store with all of the demo's cells of PatchCore, and none of ReConPatch."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCP_RUNS", str(runs))
        patch.setattr(studies, "embed", lambda features, *_: features[:, :2])  # UMAP takes long to compile
        shared = {name: notebook.plain(value) for name, value in PARAMETERS.items()}
        on_mvtec = Settings(data_root=str(tiny_sets[0]), **shared)
        on_btad = Settings(btad_root=str(tiny_sets[1]), dataset="btad", **(shared | {"categories": ("01",)}))
        of = {"mvtec": on_mvtec, "btad": on_btad}.get
        tasks = [task for item in grids.ITEMS for task in grids.cells(item, of) if task.method == "PatchCore"]
        run_grid([task for task in tasks if isinstance(task, Cell | Ensemble | FeatureSpace)], on_mvtec.store, log=len)
    return runs


def executed(path: Path, upto: int | None = None, **given) -> dict:
    """The names after a notebook's (first) code cells, run here as papermill would; what a cell shows is drawn as HTML."""
    first, *rest = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    given = {name: value for name, value in given.items() if re.search(rf"^{name}:", first, re.M)}
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items())
    names = {"In": [""], "display": lambda figure: figure.canvas.draw()}
    for source in (first, injected, *rest[: upto and upto - 1]):
        names["In"].append(source)
        body = ast.parse(source).body
        last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), path.stem, "exec"), names)
        shown = last and eval(compile(last, path.stem, "eval"), names)
        if hasattr(shown, "_repr_html_"):
            shown._repr_html_()
    return names


@pytest.mark.parametrize("path", OF_GRIDS, ids=lambda p: p.stem)
@pytest.mark.parametrize("there", ["nothing", "PatchCore only"])
def test_a_notebook_draws_what_the_store_has(path, there, request, tiny_sets, monkeypatch, capsys):
    if there != "nothing":
        monkeypatch.setenv("RCP_RUNS", str(request.getfixturevalue("patchcore_only")))
    matplotlib.use("Agg")
    roots = {"data_root": str(tiny_sets[0]), "btad_root": str(tiny_sets[1])}
    names = executed(path, render_only=True, **roots, **PARAMETERS)
    said = capsys.readouterr().out
    assert "missing: " in said or names["grid"].missing == []
    assert "not run: " in said and ("0 of" in said or there != "nothing")
    written = list(names["settings"].out("").glob(f"{path.stem}*.md"))
    assert written and all(file.read_text().startswith("*Demo: ") for file in written), "each says where it is from"


@pytest.mark.parametrize(
    ("stem", "given", "words"),
    [
        ("table_4", {"perturbed": "test"}, "perturbed test instead of both"),
        ("table_4", {"ranges": {"blur": 2.0}}, "ranges Perturbation(rotation=10.0"),
        ("table_6", {"level": "patch"}, "level patch instead of image"),
        ("table_6", {"deviation": "mean"}, "deviation mean instead of median"),
        ("table_6", {"image_sizes": [160]}, "image_sizes [160] instead of [320, 480]"),
        ("table_6", {"members": {"resnet18": "random:0"}}, "members {'resnet18': 'random:0'} instead of"),
        ("table_7", {"aspect": "squash"}, "aspect squash instead of keep"),
        ("table_s6", {"batch": 2}, "batch 2 instead of 1"),
    ],
)
def test_an_own_parameter_of_another_value_is_in_the_verdict(stem, given, words, tiny_sets, capsys):
    roots = {"data_root": str(tiny_sets[0]), "btad_root": str(tiny_sets[1])}
    executed(NOTEBOOKS[0].with_name(f"{stem}.ipynb"), render_only=True, **roots, **PARAMETERS, **given)
    assert words in capsys.readouterr().out.split("in another setting (")[1]


def test_a_sheet_shows_one_defect_of_every_category(patchcore_only, tiny_sets):
    s = Settings(data_root=str(tiny_sets[0]), **{name: notebook.plain(value) for name, value in PARAMETERS.items()})
    grid = run_grid(grids.table_5(s), Store(patchcore_only), render_only=True)
    sheet = views.one_of_each(grid, "PatchCore", images=False)
    assert sheet.titles == ["gear: broken tooth"] and sheet.images is None and sheet.masks.any()
    shown = views.shown_maps(views.of_seed(grid, 0), "gear")
    assert (sheet.maps[0] == shown.maps["PatchCore"][0]).all() and sheet.thresholds == [shown.thresholds["PatchCore"]]
    whole = views.of_seed(grid, 0).results[0].maps()
    assert any((sheet.maps[0] == of).all() for of in whole), "the same map as among all"
    assert not len(views.one_of_each(grid, "ReConPatch").masks)


def test_where_btad_is_missing_figure_5_and_its_verdict_say_so(tiny_sets, tmp_path, capsys):
    roots = {"data_root": str(tiny_sets[0]), "btad_root": str(tmp_path / "absent")}
    names = executed(NOTEBOOKS[0].with_name("figure_5.ipynb"), render_only=True, **roots, **PARAMETERS)
    why = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Figure S4 is not drawn: "))
    assert "absent" in why and why in names["settings"].out("figure_5.verdict.json").read_text()
    written = {file.stem for file in names["settings"].out("").glob("figure_5*.pdf")}
    assert written == {"figure_5", "figure_5_s3"}


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
    monkeypatch.setattr(batch, "code_of_modules", lambda *_modules: "another rcp")
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


def test_rendering_leaves_a_notebook_alone_that_can_only_compute(tmp_path, demo_root):
    file = tiny(tmp_path, "only", "raise ValueError('it computes')")
    nb = nbformat.read(file, as_version=4)
    (parameters,) = (c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = "\n".join(line for line in parameters.source.splitlines() if "render_only" not in line)
    nbformat.write(nb, file)
    drawn = tiny(tmp_path, "drawn", "print(render_only)")
    said = []
    given = {"data_root": str(demo_root), "render_only": True}
    only, other = batch.reproduce(given, [file, drawn], say=said.append)
    assert only.seconds is None and not only.error and other.seconds and not other.error
    assert "[1/2] only: left as it is" in said


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
        "python -m reproduce download mvtec",
        "python -m reproduce weights wide_resnet50_2",
    ):
        assert part in out


def test_provenance_says_where_numbers_come_from():
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
    read_again = Result({}, info | {"identity": {"config": 1}, "checksum": "a"}, {}, False)
    other = Result({}, info | {"seconds": {"coreset": 1800.0}}, {}, True)
    line = " ".join(notebook.provenance([Result({}, info, {}, True), read_again, other], 3).split())
    assert line.startswith("3 of 3 cells done (2 results, the others are the same);") and "1.50 hours" in line, (
        "all seeds of a PatchCore are one result"
    )


def test_a_label_says_what_the_cells_are(demo_root):
    demo = Settings(epochs=4)
    ensembles = demo.label_of(grids.table_6(demo))
    assert (
        "resnet18 + resnext50_32x4d + densenet121 with weights random:0, 2 epochs at 160 px, 4 at 224 px." in ensembles
    )
    assert demo.label == demo.label_of(demo.cells([demo.config()])) and ", 4 epochs. The numbers" in demo.label
    paper = Settings(profile="paper", data_root=str(demo_root))
    assert paper.label_of(grids.table_6(paper)).endswith(
        "; wide_resnet101_2 + resnext101_32x8d + densenet201 (IMAGENET1K_V1), 60 epochs at 320 px, 120 at 480 px, 3 seeds."
    )
    assert paper.label_of(grids.figure_3(paper, "gear")).startswith(
        "gear; wide_resnet50_2 (IMAGENET1K_V1), 120 epochs, 1 seed."
    )
    btad = Settings(profile="paper", btad_root=str(demo_root), dataset="btad")
    assert "wide_resnet101_2" in btad.label_of(grids.table_7(btad))


@pytest.mark.parametrize(
    ("stem", "given", "message"),
    [
        ("figure_3", {"category": "gaer"}, "category: this run has no 'gaer'. Did you mean 'gear'? There are: "),
        ("figure_4", {"category": "gaer"}, "category: this run has no 'gaer'. Did you mean 'gear'?"),
        ("figure_5", {"category": "gaer"}, "category: this run has no 'gaer'. Did you mean 'gear'?"),
        ("table_s4", {"category": "gaer"}, "category: this run has no 'gaer'. Did you mean 'gear'?"),
        ("table_s6", {"category": "gaer"}, "category: this run has no 'gaer'. Did you mean 'gear'?"),
        ("figure_3", {"epochs": 3, "at_epochs": [1, 4]}, "at_epochs: expected epochs from 1 to 3, got 4"),
        ("figure_3", {"at_epochs": ["1"]}, "at_epochs: expected a list of int"),
        ("figure_3", {"images": 1}, "images: expected 2 or more, got 1"),
        ("table_s4", {"images": 1}, "images: expected 2 or more, got 1"),
        ("figure_5", {"per_kind": 0}, "per_kind: expected 1 or more, got 0"),
        ("table_s6", {"batch": "2"}, "batch: expected int, got '2' (str)"),
        ("table_4", {"ranges": {"rotaton": 5.0}}, "ranges: unknown key 'rotaton'. Did you mean 'rotation'? Valid: rotation, "),
        ("table_4", {"ranges": {"rotation": 500.0}}, "rotation: expected a range from 0 to 180, got 500.0"),
    ],
)  # fmt: skip
def test_a_notebooks_own_parameter_is_refused_in_its_second_cell(stem, given, message):
    path = NOTEBOOKS[0].with_name(f"{stem}.ipynb")
    with pytest.raises(ValueError, match=re.escape(message)):
        executed(path, upto=2, **given)


def test_own_parameters_that_are_right_are_taken(demo_root):
    s = Settings()
    assert s.one_category() == s.categories[0] and s.one_category(prefer="gear") == "gear"
    assert s.one_category("fabric", prefer="gear") == "fabric" and s.one_category(prefer="bottle") == s.categories[0]
    assert s.some_epochs([1, 3]) == [1, 3] and s.some_epochs([]) == []
    assert notebook.built(Perturbation, "ranges", {"blur": 2.0}) == Perturbation(blur=2.0)


def test_a_log_line_has_an_auroc_only_where_there_is_one(patchcore_only, tiny_sets):
    said: list[str] = []
    shared = {name: notebook.plain(value) for name, value in PARAMETERS.items()}
    s = Settings(data_root=str(tiny_sets[0]), **shared)
    cell, space = grids.table_5(s)[0], grids.figure_3(s)[0]
    run_grid([cell, space], Store(patchcore_only), log=said.append)
    assert "image AUROC 0." in said[1] or "image AUROC 1." in said[1]
    assert said[3] == "[2/2] gear PatchCore seed 0: from the store"
