"""Notebooks keep to their form, refuse bad parameters before any work, and draw what the store has."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest

from rcp.config import Config
from reproduce import batch, grids, notebook, studies, tables, views
from reproduce.demo import demo_weights
from reproduce.entries import Entry
from reproduce.notebook import Settings, settings
from reproduce.run import run_grid
from reproduce.store import Store

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
DECLARED = 'profile: str = "demo"\ndata_root: str = ""\nepochs: int = 0\nseeds: list = []\nrender_only: bool = False'


@pytest.fixture(autouse=True)
def _own_runs(tmp_path, monkeypatch, small_demo):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(notebook, "draw_demo", lambda _root: small_demo)


def after(*sources: str) -> dict:
    """The names a kernel would hold after these cells."""
    names: dict = {"In": ["", *sources]}
    for source in sources:
        exec(source, names)
    return names


def test_the_demo_profile_needs_nothing(small_demo):
    s = settings(after(DECLARED))
    assert (s.profile, s.backbone, s.seeds) == ("demo", "tf_efficientnet_lite0", (0,))
    assert s.weights == str(demo_weights()) and Settings(backbone="resnet18").weights == "random:0"
    assert s.data_root == str(small_demo) and set(s.categories) == {"gear", "fabric"}
    assert "not the paper's" in s.label


def test_the_paper_profile_is_the_papers(small_demo, monkeypatch, tmp_path):
    s = Settings(profile="paper", data_root=str(small_demo))
    assert s.config() == Config(), "the paper profile is the defaults of Config, which are the paper's"
    assert s.seeds == (0, 1, 2) and len(s.entries([s.config()])) == 6
    monkeypatch.setenv("RCP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m reproduce download mvtec"):
        Settings(profile="paper")


@pytest.mark.parametrize(("injected", "message"), [
    ("epoch = 3", "unknown parameter 'epoch'. Did you mean 'epochs'?"),
    ("render_only = 'false'", "render_only: expected bool, got 'false' (str)"),
    ("epochs = '3'", "epochs: expected int, got '3' (str)"),
    ("seeds = ['0']", "seeds: expected a list of int, got ('0',)"),
    ("profile = 'papre'", "profile: expected one of 'demo', 'paper', got 'papre'. Did you mean 'paper'?"),
    ("data_root = 'no/such/folder'", "data_root: expected a folder, got 'no/such/folder'"),
])  # fmt: skip
def test_what_papermill_injects_is_checked(injected, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        settings(after(DECLARED, "# Parameters\n" + injected))


WRONG = {"str": (3, None, []), "int": ("3", None, 1.5, True, -1, 2**70), "float": ("x", None, -1.0, [], 2.0)}
WRONG |= {"bool": (1, "no", None), "list": ("x", None, 3, [[1]], [None], [1.5], [-1]), "dict": ([], None, {1: 2})}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_of_a_notebook_is_checked_in_its_first_cell(path):
    first, second, *_ = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for name, kind in re.findall(r"^(\w+): (\w+)", first, re.M):
        for value in WRONG[kind]:
            with pytest.raises((ValueError, FileNotFoundError), match=name):
                exec(second, after(first, f"# Parameters\n{name} = {value!r}"))
                pytest.fail(f"silent: {name} = {value!r}")
    if "members" in first:
        with pytest.raises(ValueError, match="has a model 'resnet81'"):
            exec(second, after(first, "# Parameters\nmembers = {'resnet81': 'random:0'}"))
    if path.stem == "table_s7_s8":
        with pytest.raises(ValueError, match="image_sizes: expected some of"):
            exec(second, after(first, "# Parameters\nimage_sizes = [7]"))


def test_a_mistyped_name_in_the_cell_of_parameters_is_refused():
    with pytest.raises(ValueError, match=r"'epoch' in the cell of parameters\. Did you mean 'epochs'"):
        settings(after(DECLARED.replace("epochs", "epoch")))


def test_names_of_other_cells_are_no_parameters():
    assert settings(after(DECLARED, "# Parameters\nepochs = 2", "frame = 3")).epochs == 2


def test_what_is_not_there_or_twice_is_named_with_what_is(tmp_path, small_demo):
    shutil.copytree(small_demo / "gear", (odd := tmp_path / "odd") / "caf\udce9")
    for given, words in (
        ({"categories": ("gaer",)}, r"has no 'gaer'. Did you mean 'gear'\? Valid: "),
        ({"categories": ("gear", "gear")}, "categories: expected different names, got .*gear"),
        ({"shard": "0/4"}, "shard: expected 'i/n'"),
        ({"data_root": str(odd)}, "categories: expected names in UTF-8, .*got .*udce9"),
        ({"backbone": "resnet81"}, "neither torchvision nor timm has a model 'resnet81'"),
    ):
        with pytest.raises(ValueError, match=words):
            Settings(**given)


# ---- their form ----


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form_of_a_notebook(path):
    nb = nbformat.read(path, as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code" and c.id != "colab"]
    assert "parameters" in code[0].metadata.get("tags", []), "the first code cell holds the parameters"
    asked = re.search(r"^label = f?\"?\{?settings\.label_of\(entries\)", "\n".join(c.source for c in code), re.M)
    assert not asked, "a caption says what is there, not what was asked for"
    typed = r"\w+: \w+ = .+  # .+"
    assert all(re.match(typed, line) for line in code[0].source.splitlines()), "typed, one a line, with help"
    assert re.search(r"notebook\.settings\(globals\(\)(, dataset=\"\w+\")?\)", code[1].source)
    assert len(nb.cells) <= 30 and max(len(c.source.splitlines()) for c in code) <= 15
    checked = [c for c in code if batch.CHECKED in c.metadata.get("tags", [])]
    assert all(c.outputs for c in checked), "checked cells are compared with their stored outputs"
    assert not any(c.outputs for c in code if c not in checked), "no other cell has outputs"
    assert any(re.search(r"\d", str(c.outputs)) for c in checked), "a number that another score would change"
    assert not batch.stale(path), "run: make notebooks"


def test_on_colab_the_first_cell_fetches_the_project(tmp_path):
    cells = [nbformat.read(path, 4).cells[1] for path in NOTEBOOKS if path.stem in ("00_start_here", "02_your_images")]
    assert [cell.id for cell in cells] == ["colab", "colab"] and cells[0].source == cells[1].source
    made = "git init -q from && cd from && touch a && git add a && git -c user.name=a -c user.email=a@b commit -qm a"
    subprocess.run(made, shell=True, cwd=tmp_path, check=True)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@" > pip.said')
    pip.chmod(0o755)
    run = "from IPython.core.interactiveshell import InteractiveShell as S; import builtins, sys; sys.modules['reproduce'] = None\n"
    run += f"builtins.input = lambda _: {str(tmp_path / 'from')!r}; S.instance().run_cell({cells[0].source!r}).raise_error()"
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "IPYTHONDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=os.environ | paths, check=True)
    assert (tmp_path / "pip.said").read_text() == "install --quiet --editable rcp-project[notebooks]\n"
    assert (tmp_path / "rcp-project/a").is_file()


# ---- on a store that has nothing, or only a part ----

BEYOND = ("does_training_help", "open_choices", "bank", "choose_without_labels", "peers")  # what the paper does not ask
OF_GRIDS = [path for path in NOTEBOOKS if path.stem.startswith(("table_", "figure_", *BEYOND))]
PARAMETERS = {"categories": ["gear"], "epochs": 1, "device": "cpu", "seeds": [0, 1]}


def shared(root) -> Settings:
    return Settings(data_root=str(root), **PARAMETERS)


@pytest.fixture(scope="module")
def patchcore_only(tmp_path_factory, small_demo):
    """A store with PatchCore's entries of Tables 4, 5 and 6, the first of Table 2, and its feature space, and none of ReConPatch."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCP_RUNS", str(runs))
        patch.setattr(studies, "embed", lambda features, *_: features[:, :2])  # UMAP takes long to compile
        s = shared(small_demo)
        ensembles = grids.table_6(s, {"resnet18": "random:0"}, (128,))
        tasks = [*grids.table_2(s)[:2], *grids.table_4(s), *ensembles, *grids.figure_3(s)]
        run_grid([task for task in tasks if task.method == "PatchCore"], s.store, log=len)
    return runs


def executed(path: Path, **given) -> dict:
    """The names after a notebook's code cells, run here as papermill would; what a cell shows is drawn as HTML."""
    first, *rest = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    given = {name: value for name, value in given.items() if re.search(rf"^{name}:", first, re.M)}
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items())
    names = {"In": [""], "display": lambda *_: None}
    for source in (first, injected, *rest):
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
def test_a_notebook_draws_what_the_store_has(path, there, request, small_demo, monkeypatch, capsys):
    if there != "nothing":
        if path.stem in BEYOND:
            pytest.skip("the store has none of its entries")
        monkeypatch.setenv("RCP_RUNS", str(request.getfixturevalue("patchcore_only")))
    matplotlib.use("Agg")
    roots = {"data_root": str(small_demo), "btad_root": str(small_demo)}
    names = executed(path, render_only=True, **roots, **PARAMETERS)
    said = capsys.readouterr().out
    assert " % seed " in said and "not run: " in said and ("0 of" in said or there != "nothing")
    assert list(names["settings"].out("").glob(f"{path.stem}*.verdict.json"))


@pytest.mark.parametrize(("stem", "given", "words"), [
    ("table_4", {"perturbed": "test"}, "perturbed test instead of both"),
    ("table_4", {"ranges": {"blur": 2.0}}, "ranges Perturbation(rotation=10.0"),
    ("table_6", {"level": "patch"}, "level patch instead of image"),
    ("table_6", {"image_sizes": [128]}, "image_sizes [128] instead of [320, 480]"),
    ("table_6", {"members": {"resnet18": "random:0"}}, "members {'resnet18': 'random:0'} instead of"),
    ("table_7", {"aspect": "squash"}, "aspect squash instead of keep"),
    ("table_s6", {"batch": 2}, "batch 2 instead of 1"),
])  # fmt: skip
def test_an_own_parameter_of_another_value_is_in_the_verdict(stem, given, words, small_demo, capsys):
    roots = {"data_root": str(small_demo), "btad_root": str(small_demo)}
    executed(NOTEBOOKS[0].with_name(f"{stem}.ipynb"), render_only=True, **roots, **PARAMETERS, **given)
    assert words in capsys.readouterr().out.split("in another setting (")[1]


def test_the_caption_of_the_open_choices_names_all_categories(demo_root, monkeypatch, tmp_path):
    monkeypatch.setenv("RCP_RUNS", str(tmp_path))
    (path,) = (p for p in NOTEBOOKS if p.stem == "open_choices")
    given = {
        "profile": "paper",
        "data_root": str(demo_root),
        "categories": ["fabric", "gear"],
        "seeds": [0, 1],
        "epochs": 20,
    }
    names = executed(path, render_only=True, backbone="resnet18", weights="random:0", **given)
    assert names["label"].startswith("fabric, gear; resnet18 (random:0), 20 epochs, 2 seeds")


def test_an_ensemble_of_one_is_one_row(patchcore_only, small_demo):
    ones = [e for e in grids.table_6(shared(small_demo), {"resnet18": "random:0"}, (128,)) if e.method == "PatchCore"]
    store = Store(patchcore_only)
    frame = views.with_members(run_grid(ones, store, render_only=True), store)
    assert len(frame) == 2 and not tables.compare(frame, by=["image_size", "backbone"]).empty


def test_a_sheet_shows_one_defect_of_every_category(patchcore_only, small_demo):
    grid = run_grid(grids.table_5(shared(small_demo)), Store(patchcore_only), render_only=True).where(seed={0})
    pixels, masks, maps, thresholds, titles = views.one_of_each(grid, ["PatchCore"], images=False)
    assert titles == ["gear: broken tooth"] and pixels is None and masks.any()
    _, _, of, found, _ = views.shown_maps(grid.where(method={"PatchCore"}))
    (shown,) = maps["PatchCore"]
    assert (shown == of["PatchCore"][0]).all() and thresholds == [found]
    assert any((shown == whole).all() for whole in grid.results[0].maps()), "the same map as among all"
    assert not len(views.one_of_each(grid, ["ReConPatch"])[1])


def test_where_btad_is_missing_figure_5_and_its_verdict_say_so(small_demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RCP_DATA", str(tmp_path / "absent"))
    of = {"profile": "paper", "data_root": str(small_demo)}
    names = executed(NOTEBOOKS[0].with_name("figure_5.ipynb"), render_only=True, **of, **PARAMETERS)
    why = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Figure S4 is not drawn: "))
    assert "absent" in why and why in names["settings"].out("figure_5.verdict.json").read_text()


def test_a_figure_of_images_says_whose_they_are(small_demo):
    of = notebook.Settings(profile="paper", render_only=True, data_root=str(small_demo))
    entry = Entry(of.config(), "/data", "bottle")
    assert "Images: MVTec AD (Bergmann et al., CC BY-NC-SA 4.0)." in of.label_of([entry], images=True)
    assert "Images" not in of.label_of([entry]) + of.label_of([], images=True), "no images, and an own folder's"
