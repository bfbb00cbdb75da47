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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat

from rcp import backbone, experiment, grids, notebook, paths
from rcp.config import nearest
from rcp.data import load_dataset
from rcp.verdict import RULE


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
    shared = set(notebook.Settings.__dataclass_fields__) & set(parameters)
    settings = notebook.Settings(**{n: notebook.plain(parameters[n]) for n in shared})
    jobs = [(file, {n: v for n, v in parameters.items() if n in declared[file]}, settings, force) for file in files]
    outcomes = []
    for i, outcome in enumerate(_outcomes(jobs, say), 1):
        took = "up to date" if outcome.seconds is None else f"{outcome.seconds:.0f} s"
        say(f"[{i}/{len(files)}] {outcome.name}: {outcome.error.splitlines()[-1] if outcome.error else took}")
        outcomes.append(outcome)
    index = settings.out("index.html")
    index.write_text(_index(outcomes, settings), encoding="utf-8")
    say(f"index: {index}")
    return outcomes


def _outcomes(jobs: Sequence[tuple], say: Callable[[str], None]) -> Iterator[Outcome]:
    """One after the other, for the cells of one use all cores; as many as there are cores where nothing is computed."""
    if not jobs[0][2].render_only:
        for i, job in enumerate(jobs, 1):
            say(f"[{i}/{len(jobs)}] {job[0].stem} ...")
            yield _run(*job)
        return
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield from pool.map(_run, *zip(*jobs, strict=True))


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


def _run(file: Path, parameters: dict, settings: notebook.Settings, force: bool) -> Outcome:
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    source = nbformat.read(file, as_version=4)
    title = next(
        (line.lstrip("# ") for c in source.cells for line in c.source.splitlines() if line.startswith("# ")), file.stem
    )
    out, stamp = settings.out(file.name), settings.out(f".{file.stem}.json")
    version = _version(source, parameters, settings)
    if not force and out.exists() and stamp.exists() and json.loads(stamp.read_text()) == version:
        return Outcome(file.stem, title, None)
    stamp.unlink(missing_ok=True)
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
                config=Config({"KernelManager": own} if settings.render_only else {}),
            )
        except (PapermillExecutionError, RuntimeError) as failed:  # RuntimeError: the kernel died
            error = f"{getattr(failed, 'ename', type(failed).__name__)}: {getattr(failed, 'evalue', failed)}"
    _to_html(out)
    if not error and not settings.render_only and settings.shard == "1/1":
        stamp.write_text(json.dumps(version))
    return Outcome(file.stem, title, time.perf_counter() - started, error)


def _version(source: nbformat.NotebookNode, parameters: dict, settings: notebook.Settings) -> dict:
    """What an executed notebook depends on: its cells, its parameters, the package, the content of data and weights."""
    digest = hashlib.blake2b(code_of(source).encode(), digest_size=12)
    if "btad_root" in parameters or "btad_root" in _names(source):
        with contextlib.suppress(OSError, ValueError):  # the notebook itself says what is missing
            settings = dataclasses.replace(settings, dataset="btad", categories=(), data_root="")
    for name in settings.categories:
        digest.update(load_dataset(settings.data_root, category=name).fingerprint().encode())
    weights = backbone.weights_identity(settings.backbone, settings.weights)
    return {"code": digest.hexdigest(), "parameters": parameters, "weights": weights}


def _names(source: nbformat.NotebookNode) -> str:
    return next((c.source for c in source.cells if "parameters" in c.metadata.get("tags", [])), "")


def code_of(source: nbformat.NotebookNode) -> str:
    """Hash of what a notebook's outputs come from: its code cells, and ``rcp`` without comments and docstrings."""
    digest = hashlib.blake2b(digest_size=12)
    for cell in source.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode())
    modules = sorted(str(f.relative_to(paths.PACKAGE).with_suffix("")) for f in paths.PACKAGE.rglob("*.py"))
    digest.update(experiment.code_version([m for m in modules if m not in ("batch", "doctor", "__main__")]).encode())
    for file in sorted(paths.PACKAGE.rglob("*.csv")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def plan(parameters: dict, items: Sequence[str] = ()) -> dict:
    """The grid cell by cell, for a scheduler: {"parameters", "items": {item: names of cells}, "notebooks", "errors"}. Computes nothing.

    Raises:
        ValueError, FileNotFoundError: an unknown item or a bad parameter. An item whose own data are missing is in "errors".
    """
    found = {"parameters": _absolute(parameters), "items": {}, "notebooks": {}, "errors": {}}
    notebook.Settings(
        **{n: notebook.plain(v) for n, v in found["parameters"].items()}
    )  # what is wrong for all is said at once
    notebooks = {file.stem: file for file in sorted((paths.PROJECT / "notebooks").glob("*.ipynb"))}
    for item in items or notebooks:
        if item not in notebooks:
            raise ValueError(
                f"items: no notebook {item!r}.{nearest(item, notebooks)} There are: {', '.join(notebooks)}"
            )
        try:
            found["items"][item] = [name for name, _ in _named_cells(found["parameters"], item)]
        except OSError as missing:
            found["items"][item], found["errors"][item] = [], str(missing)
        version = code_of(nbformat.read(notebooks[item], as_version=4))
        file = notebooks[item].relative_to(paths.PROJECT).as_posix()
        found["notebooks"][item] = {"path": file, "version": version, "parameters": _declared(notebooks[item])}
    return found


def planned_cell(plan_: dict, name: str) -> experiment.Cell:
    """The cell of a plan by its name.

    Raises:
        ValueError: the plan has no such cell.
    """
    for item, names in plan_["items"].items():
        if name in names:
            return dict(_named_cells(plan_["parameters"], item))[name]
    raise ValueError(f"no cell {name!r} in this plan")


def _named_cells(parameters: dict, item: str) -> list[tuple[str, experiment.Cell]]:
    """-> [(a name fit for files, cell)]; the same cell has the same name in every item."""
    if item not in grids.ITEMS:
        return []
    known = {n: notebook.plain(v) for n, v in parameters.items() if n in notebook.Settings.__dataclass_fields__}
    on_btad = {"dataset": "btad", "categories": ()} if item == "table_7" else {}
    settings = notebook.Settings(**(known | on_btad))
    named = {}
    for cell in grids.cells(item, settings):
        content = json.dumps(dataclasses.asdict(cell), sort_keys=True, default=str)
        key = hashlib.blake2b(f"{type(cell).__name__}{content}".encode(), digest_size=6).hexdigest()
        named[f"{cell.category}-{cell.method}-{key}"] = cell
    return list(named.items())


def render(plan_: dict, item: str) -> Outcome:
    """One notebook of a plan through papermill, from what the store has; beside the executed copies of ``make reproduce``."""
    parameters = {"render_only": True} | plan_["parameters"]
    settings = notebook.Settings(**{n: notebook.plain(v) for n, v in parameters.items()})
    declared = plan_["notebooks"][item]["parameters"]
    return _run(
        paths.PROJECT / plan_["notebooks"][item]["path"],
        {n: v for n, v in parameters.items() if n in declared},
        settings,
        True,
    )


def execute(file: Path) -> None:
    """Executes a notebook in place, with its own parameters, and notes in it which code its outputs are from.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    from nbconvert.preprocessors import ExecutePreprocessor

    source = nbformat.read(file, as_version=4)
    preprocessor = ExecutePreprocessor(timeout=1800, kernel_name="python3", record_timing=False)
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


def _index(outcomes: Sequence[Outcome], settings: notebook.Settings) -> str:
    import pandas as pd

    parts = []
    for o in outcomes:
        state = f"failed: {o.error}" if o.error else "done"
        parts.append(
            f'<h2 id="{o.name}"><a href="{o.name}.html">{html.escape(o.title)}</a> <small>{html.escape(state)}</small></h2>'
        )
        for csv in _written(settings, o.name, "csv"):
            frame = pd.read_csv(csv)
            parts.append(
                f"<h3>{html.escape(csv.stem)}</h3>{frame.to_html(index=False, na_rep='–', float_format='%.2f', border=0)}"
            )
        for png in _written(settings, o.name, "png"):
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
                  for kind in ("csv", "png", "pdf") for f in _written(settings, o.name, kind)]  # fmt: skip
        css = "failed" if o.error else found["state"].partition(" ")[0] if found["state"] != "not run" else ""
        rows.append(
            f'<tr><td><a href="#{o.name}">{html.escape(o.title)}</a></td><td><b class="{css}">{html.escape(found["state"])}</b></td>'
            f"<td>{html.escape(found['words'])}</td><td>{' '.join(links)}</td></tr>"
        )
    head = "<tr><th>item</th><th>verdict</th><th>numbers, in percent where nothing else is said</th><th>files</th></tr>"
    return (
        f'<table id="verdicts">{head}{"".join(rows)}</table><p><small>{html.escape(" ".join(RULE.split()))}</small></p>'
    )


def _written(settings: notebook.Settings, name: str, kind: str) -> list[Path]:
    """Files that a notebook wrote: NAME.kind, NAME_*.kind."""
    return [
        f for f in sorted(settings.out("").glob(f"{name}*.{kind}")) if f.stem == name or f.stem.startswith(f"{name}_")
    ]
