"""Every notebook through papermill, then one HTML index: what ``make reproduce`` runs. And the same grid as a plan, cell by cell."""

import contextlib
import dataclasses
import hashlib
import html
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat

from rcp import backbone, paths, preloaded
from reproduce import entries, grids, notebook
from rcp.config import nearest
from rcp.data import load_dataset
from reproduce.provenance import code_of as code_of_modules
from reproduce.store import Store, key_of
from reproduce.studies import InferenceTime
from reproduce.verdict import RULE


@dataclass(frozen=True)
class Outcome:
    """One notebook of a batch: seconds is None where nothing had to be run; error is "" where all went well."""

    name: str
    title: str
    seconds: float | None
    error: str = ""


def reproduce(
    parameters: dict, notebooks: Sequence[Path] = (), force: bool = False, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Runs the notebooks with these parameters and writes ``runs/reproduce/PROFILE/index.html``.

    A notebook whose code, parameters and ``rcp`` are those of its last finished run is not run again. One that fails
    does not stop the others.

    Args:
        parameters: by name; those that a notebook does not declare are not passed to it.
        notebooks: paths; all of ``notebooks/`` where empty.
        force: run them all the same; cells that the store has are still not computed again.

    Raises:
        ValueError, FileNotFoundError: an unknown parameter or a bad value, before any notebook is run.
    """
    files = [Path(n) for n in notebooks] or sorted((paths.PROJECT / "notebooks").glob("*.ipynb"))
    declared = {file: _declared(file) for file in files}
    known = sorted({name for names in declared.values() for name in names})
    for name in parameters:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}.{nearest(name, known)} Valid: {', '.join(known)}")
    parameters = _absolute(parameters)
    settings = _settings(parameters)
    jobs = [(file, {n: v for n, v in parameters.items() if n in declared[file]}, settings, force) for file in files]
    with preloaded.kernels():
        outcomes = _outcomes(jobs, say)
    say(f"index: {_write_index(outcomes, settings)}")
    return outcomes


def _outcomes(jobs: Sequence[tuple], say: Callable[[str], None]) -> list[Outcome]:
    """One after the other, for the cells of one use all cores; as many as there are cores where nothing is computed."""

    def told(i: int, outcome: Outcome) -> Outcome:
        kept = "up to date" if not jobs[0][2].render_only else "left as it is"
        took = kept if outcome.seconds is None else f"{outcome.seconds:.0f} s"
        say(f"[{i}/{len(jobs)}] {outcome.name}: {outcome.error.splitlines()[-1] if outcome.error else took}")
        return outcome

    if jobs[0][2].render_only:
        forked = multiprocessing.get_context("forkserver")  # its environment is that of its start
        with ProcessPoolExecutor(os.cpu_count(), forked, _with_environment, (dict(os.environ),)) as pool:
            return [told(i, outcome) for i, outcome in enumerate(pool.map(_run, *zip(*jobs, strict=True)), 1)]
    pages = []
    with ThreadPoolExecutor(1) as writer:  # a page is written while the next notebook starts
        for i, job in enumerate(jobs, 1):
            say(f"[{i}/{len(jobs)}] {job[0].stem} ...")
            outcome, publish = _execute(*job)
            pages.append(writer.submit(_published, told(i, outcome), publish))
    return [page.result() for page in pages]


def _absolute(parameters: dict) -> dict:
    """Relative paths are the caller's; notebooks run in the project's folder."""
    given = dict(parameters)
    for name in ("data_root", "btad_root", "weights"):
        if given.get(name) and Path(given[name]).exists():
            given[name] = str(Path(given[name]).absolute())
    return given


def _declared(file: Path) -> list[str]:
    import papermill

    return list(papermill.inspect_notebook(str(file)))


def _with_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _run(*job) -> Outcome:
    with preloaded.kernels():  # in a process of its own
        return _published(*_execute(*job))


def _published(outcome: Outcome, publish: Callable[[], None]) -> Outcome:
    try:
        publish()
    except Exception as failed:  # whatever is wrong with one page, the others are written
        page = f"its HTML page: {type(failed).__name__}: {failed}"
        return dataclasses.replace(outcome, error=f"{outcome.error}\n{page}".lstrip())
    return outcome


def _execute(
    file: Path, parameters: dict, settings: notebook.Settings, force: bool
) -> tuple[Outcome, Callable[[], None]]:
    """-> (what became of it, what is left to do: to write its page and to tick it off)."""
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    source = nbformat.read(file, as_version=4)
    title = _title(source, file)
    out, stamp = settings.out(file.name), settings.out(f".{file.stem}.json")
    if settings.render_only and "render_only" not in _names(source):
        return Outcome(file.stem, title, None), lambda: None  # it can only be computed
    version = _version(source, parameters, settings)
    if not force and out.exists() and stamp.exists() and json.loads(stamp.read_text()) == version:
        return Outcome(file.stem, title, None), lambda: None
    of_another_run = [f for kind in ("csv", "md", "png", "pdf", "html") for f in _written(settings, file.stem, kind)]
    for old in (stamp, settings.out(f"{file.stem}.verdict.json"), *of_another_run):
        old.unlink(missing_ok=True)  # what this run does not write must not stand under its label
    started = time.perf_counter()
    error = ""
    with tempfile.TemporaryDirectory(prefix="rcp-") as sockets:
        # kernels side by side may race for a TCP port, or for the one name that sockets have without a connection file
        own = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        try:
            papermill.execute_notebook(
                str(file),
                str(out),
                parameters,
                kernel_name="python3",
                cwd=str(paths.PROJECT),
                progress_bar=False,
                stdout_file=None if settings.render_only else sys.stdout,
                config=Config({"KernelManager": own}),
            )
        except (PapermillExecutionError, RuntimeError) as failed:  # RuntimeError: the kernel died
            error = f"{getattr(failed, 'ename', type(failed).__name__)}: {getattr(failed, 'evalue', failed)}"

    def publish() -> None:
        _to_html(out)
        if not error and not settings.render_only and settings.shard == "1/1":
            stamp.write_text(json.dumps(version))

    return Outcome(file.stem, title, time.perf_counter() - started, error), publish


def _title(source: nbformat.NotebookNode, file: Path) -> str:
    lines = (line for cell in source.cells for line in cell.source.splitlines())
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), file.stem)


def _version(source: nbformat.NotebookNode, parameters: dict, settings: notebook.Settings) -> dict:
    """What an executed notebook depends on: its cells, its parameters, the package, the content of data and weights."""
    declared = _names(source)
    digest = hashlib.blake2b(code_of(source).encode(), digest_size=12)
    for root in sorted(declared & {"data_root", "btad_root"}):
        with contextlib.suppress(OSError, ValueError):  # the notebook itself says what is missing
            on_btad = {"dataset": "btad", "categories": (), "data_root": ""} if root == "btad_root" else {}
            about = dataclasses.replace(settings, **on_btad)
            for name in about.categories:
                digest.update(load_dataset(about.data_root, category=name).fingerprint().encode())
    weights = [(settings.backbone, settings.weights)]
    if "members" in declared:
        weights += (parameters.get("members") or grids.MEMBERS[settings.profile]).items()
    with contextlib.suppress(OSError):  # likewise
        for named in weights:
            digest.update(backbone.weights_identity(*named).encode())
    return {"content": digest.hexdigest(), "parameters": parameters}


def _names(source: nbformat.NotebookNode) -> set[str]:
    """The parameters that a notebook declares, one a line."""
    cells = (c.source for c in source.cells if "parameters" in c.metadata.get("tags", []))
    return {line.partition(":")[0] for cell in cells for line in cell.splitlines()}


def code_of(source: nbformat.NotebookNode) -> str:
    """Hash of what a notebook's outputs come from: its code cells, and ``rcp`` without comments and docstrings."""
    digest = hashlib.blake2b(digest_size=12)
    for cell in source.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode())
    digest.update(code_of_modules("reproduce.notebook", "reproduce.views", "reproduce.figures.plots", "reproduce.studies").encode())
    for file in sorted(paths.PACKAGE.rglob("*.csv")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def plan(parameters: dict, items: Sequence[str] = ()) -> dict:
    """The grid cell by cell, for a scheduler. Computes nothing.

    -> {"parameters", "items": {item: {name of a cell: its version}}, "notebooks": {item: {"path", "version", "parameters"}},
    "errors": {item: why it cannot be computed}}. A version is another one when data, weights or code are.

    Raises:
        ValueError, FileNotFoundError: an unknown item or a bad parameter. An item whose own data are missing is in "errors".
    """
    found = {"parameters": _absolute(parameters), "items": {}, "notebooks": {}, "errors": {}}
    settings = _settings(found["parameters"])  # what is wrong for all is said at once
    notebooks = {file.stem: file for file in sorted((paths.PROJECT / "notebooks").glob("*.ipynb"))}
    versions: dict[str, str] = {}
    for item in items or notebooks:
        if item not in notebooks:
            raise ValueError(
                f"items: no notebook {item!r}.{nearest(item, notebooks)} There are: {', '.join(notebooks)}"
            )
        try:
            cells = _named_cells(found["parameters"], item)
        except (ValueError, OSError) as missing:
            cells, found["errors"][item] = {}, str(missing)
        versions |= {name: _cell_version(cell) for name, cell in cells.items() if name not in versions}
        found["items"][item] = {name: versions[name] for name in cells}
        file, declared = notebooks[item], _declared(notebooks[item])
        given = {n: v for n, v in found["parameters"].items() if n in declared}
        version = key_of(_version(nbformat.read(file, as_version=4), given, settings))
        path = file.relative_to(paths.PROJECT).as_posix()
        found["notebooks"][item] = {"path": path, "version": version, "parameters": declared}
    return found


def _cell_version(cell) -> str:
    try:
        return key_of(cell.identity())[:12]
    except (ValueError, OSError):  # its own job says so, and the others go on
        return "unreadable"


def planned_cell(plan_: dict, name: str) -> experiment.Cell:
    """The cell of a plan by its name.

    Raises:
        ValueError: the plan has no such cell.
    """
    for item, names in plan_["items"].items():
        if name in names:
            return _named_cells(plan_["parameters"], item)[name]
    raise ValueError(f"no cell {name!r} in this plan")


def _settings(parameters: dict, dataset: str = "mvtec") -> notebook.Settings:
    known = {n: notebook.plain(v) for n, v in parameters.items() if n in notebook.Settings.__dataclass_fields__}
    return notebook.Settings(**known | ({"dataset": "btad", "categories": ()} if dataset == "btad" else {}))


def _named_cells(parameters: dict, item: str) -> dict[str, experiment.Cell]:
    """-> {a name fit for files: cell}; the same cell has the same name in every item.

    A time is taken where it is shown, for it belongs to the machine: it is no cell that another machine could compute.
    """
    if item not in grids.ITEMS:
        return {}
    named = {}
    for cell in grids.cells(item, lambda dataset: _settings(parameters, dataset)):
        if isinstance(cell, InferenceTime):
            continue
        content = json.dumps(dataclasses.asdict(cell), sort_keys=True, default=str)
        key = hashlib.blake2b(f"{type(cell).__name__}{content}".encode(), digest_size=6).hexdigest()
        named[f"{cell.category}-{cell.method}-{key}"] = cell
    return named


def render(plan_: dict, item: str) -> Outcome:
    """One notebook of a plan through papermill, beside the executed copies of ``make reproduce``.

    From what the store has; an item without cells in the plan computes what it shows.

    Raises:
        ValueError: the store lacks some of the item's cells: how many, and which.
    """
    planned = plan_["items"][item]
    cells = _named_cells(plan_["parameters"], item) if planned else {}
    store = Store(paths.runs_root())
    missing = [name for name in planned if name not in cells or not experiment.load(cells[name], store)]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{item}: {len(missing)} of {len(planned)} cells are not in the store {store.root}: {few}")
    parameters = plan_["parameters"] | ({"render_only": True} if planned else {})
    what = plan_["notebooks"][item]
    given = {n: v for n, v in parameters.items() if n in what["parameters"]}
    return _run(paths.PROJECT / what["path"], given, _settings(parameters), True)


def index(plan_: dict, rendered: Path) -> Path:
    """The index page over a plan, as far as it got.

    rendered: folder of what ``python -m reproduce render`` wrote; an item that is not there, or from another plan, has failed.
    """
    outcomes = []
    for item, what in plan_["notebooks"].items():
        path, file = paths.PROJECT / what["path"], rendered / f"{item}.json"
        done = file.exists() and json.loads(file.read_text()).get("version") == what["version"]
        error = plan_["errors"].get(item) or ("" if done else "not rendered; its log and those of its cells say why")
        outcomes.append(Outcome(item, _title(nbformat.read(path, as_version=4), path), None, error))
    return _write_index(outcomes, _settings(plan_["parameters"]))


def execute(file: Path) -> None:
    """Executes a notebook in place, with its own parameters, and notes in it which code its outputs are from.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    from nbconvert.preprocessors import ExecutePreprocessor

    source = nbformat.read(file, as_version=4)
    preprocessor = ExecutePreprocessor(timeout=1800, kernel_name="python3", record_timing=False)
    with preloaded.kernels():
        executed, _ = preprocessor.preprocess(source, {"metadata": {"path": str(paths.PROJECT)}})
    executed.metadata["rcp"] = {"code": code_of(executed)}
    nbformat.write(executed, file)


def stale(file: Path) -> bool:
    """Whether a notebook's outputs are older than its code: its code cells or ``rcp`` have changed since :func:`execute`."""
    source = nbformat.read(file, as_version=4)
    return source.metadata.get("rcp", {}).get("code") != code_of(source)


def _to_html(executed: Path) -> None:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_filename(str(executed))
    executed.with_suffix(".html").write_text(body, encoding="utf-8")


def _write_index(outcomes: Sequence[Outcome], settings: notebook.Settings) -> Path:
    page = settings.out("index.html")
    page.write_text(_index(outcomes, settings), encoding="utf-8")
    return page


def _index(outcomes: Sequence[Outcome], settings: notebook.Settings) -> str:
    import pandas as pd

    parts = []
    for o in outcomes:
        state = f"failed: {o.error}" if o.error else "done"
        parts.append(
            f'<h2 id="{o.name}"><a href="{o.name}.html">{html.escape(o.title)}</a> <small>{html.escape(state)}</small></h2>'
        )
        for csv in _shown(settings, o, "csv"):
            frame = pd.read_csv(csv)
            parts.append(
                f"<h3>{html.escape(csv.stem)}</h3>{frame.to_html(index=False, na_rep='–', float_format='%.2f', border=0)}"
            )
        for png in _shown(settings, o, "png"):
            parts.append(f'<figure><img src="{png.name}" alt="{png.stem}"><figcaption>{png.stem}</figcaption></figure>')
    failed = sum(bool(o.error) for o in outcomes)
    head = f"{len(outcomes) - failed} of {len(outcomes)} notebooks done" + (f", {failed} failed" if failed else "")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>rcp: {settings.profile}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto }}
th, td {{ padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd }} td:first-child, th:first-child {{ text-align: left }}
#verdicts td, #verdicts th {{ text-align: left; vertical-align: top }} #verdicts td:first-child {{ min-width: 13rem }}
#verdicts b {{ white-space: nowrap }} .reproduced {{ color: #0072b2 }} .partly {{ color: #9a6700 }} .not, .failed {{ color: #b3261e }}
img {{ max-width: 100% }} figure {{ margin: 1rem 0 }} small {{ font-weight: normal; color: #555 }}
.label {{ background: #fff3cd; padding: 0.5rem 1rem }}
</style><h1>ReConPatch, reproduced</h1><p class="label">{html.escape(settings.label)}</p><p>{head}.</p>
{_verdicts(outcomes, settings)}{"".join(parts)}</html>"""


def _verdicts(outcomes: Sequence[Outcome], settings: notebook.Settings) -> str:
    """The table that the index opens with: per item whether it is reproduced, its numbers, and where to look."""
    rows = []
    for o in outcomes:
        file = settings.out(f"{o.name}.verdict.json")
        found = json.loads(file.read_text()) if file.exists() else {"state": "–", "words": ""}
        if o.error:
            found = {"state": "not run", "words": o.error}
        links = [f'<a href="{o.name}.html">notebook</a>']
        links += [f'<a href="{f.name}">{html.escape(f.stem.removeprefix(o.name).strip("_") or kind)}.{kind}</a>'
                  for kind in ("csv", "png", "pdf") for f in _shown(settings, o, kind)]  # fmt: skip
        css = "failed" if o.error else found["state"].partition(" ")[0] if found["state"] != "not run" else ""
        rows.append(
            f'<tr><td><a href="#{o.name}">{html.escape(o.title)}</a></td><td><b class="{css}">{html.escape(found["state"])}</b></td>'
            f"<td>{html.escape(found['words'])}</td><td>{' '.join(links)}</td></tr>"
        )
    head = "<tr><th>item</th><th>verdict</th><th>numbers, in percent where nothing else is said</th><th>files</th></tr>"
    return (
        f'<table id="verdicts">{head}{"".join(rows)}</table><p><small>{html.escape(" ".join(RULE.split()))}</small></p>'
    )


def _shown(settings: notebook.Settings, o: Outcome, kind: str) -> list[Path]:
    """What the index shows of an item: nothing where it failed, for that may be of an earlier run."""
    return [] if o.error else _written(settings, o.name, kind)


def _written(settings: notebook.Settings, name: str, kind: str) -> list[Path]:
    """Files that a notebook wrote: NAME.kind, NAME_*.kind."""
    return [
        f for f in sorted(settings.out("").glob(f"{name}*.{kind}")) if f.stem == name or f.stem.startswith(f"{name}_")
    ]
