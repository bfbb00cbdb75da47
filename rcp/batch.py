"""Every notebook through papermill, then one HTML index: what ``make reproduce`` runs."""

import hashlib
import html
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat

from rcp import backbone, notebook, paths
from rcp.config import nearest
from rcp.data import load_dataset


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
    outcomes = []
    for i, file in enumerate(files, 1):
        say(f"[{i}/{len(files)}] {file.stem} ...")
        outcome = _run(file, {n: v for n, v in parameters.items() if n in declared[file]}, settings, force)
        took = "up to date" if outcome.seconds is None else f"{outcome.seconds:.0f} s"
        say(f"[{i}/{len(files)}] {file.stem}: {outcome.error.splitlines()[-1] if outcome.error else took}")
        outcomes.append(outcome)
    index = settings.out("index.html")
    index.write_text(_index(outcomes, settings), encoding="utf-8")
    say(f"index: {index}")
    return outcomes


def _absolute(parameters: dict) -> dict:
    """Relative paths are the caller's; notebooks run in the project's folder."""
    given = dict(parameters)
    for name in ("data_root", "weights"):
        if given.get(name) and Path(given[name]).exists():
            given[name] = str(Path(given[name]).absolute())
    return given


def _declared(file: Path) -> list[str]:
    import papermill

    return list(papermill.inspect_notebook(str(file)))


def _run(file: Path, parameters: dict, settings: notebook.Settings, force: bool) -> Outcome:
    import papermill
    from papermill.exceptions import PapermillExecutionError

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
    try:
        papermill.execute_notebook(
            str(file),
            str(out),
            parameters,
            kernel_name="python3",
            cwd=str(paths.PROJECT),
            progress_bar=False,
            stdout_file=sys.stdout,
        )
    except (PapermillExecutionError, RuntimeError) as failed:  # RuntimeError: the kernel died
        error = f"{getattr(failed, 'ename', type(failed).__name__)}: {getattr(failed, 'evalue', failed)}"
    _to_html(out)
    if not error and not settings.render_only and settings.shard == "1/1":
        stamp.write_text(json.dumps(version))
    return Outcome(file.stem, title, time.perf_counter() - started, error)


def _version(source: nbformat.NotebookNode, parameters: dict, settings: notebook.Settings) -> dict:
    """What an executed notebook depends on: its cells, its parameters, the package, the content of data and weights."""
    digest = hashlib.blake2b(digest_size=12)
    for cell in source.cells:
        digest.update(cell.source.encode())
    for file in sorted(f for f in (paths.PROJECT / "rcp").rglob("*") if f.suffix in {".py", ".csv"}):
        digest.update(file.read_bytes())
    for name in settings.categories:
        digest.update(load_dataset(settings.data_root, category=name).fingerprint().encode())
    weights = backbone.weights_identity(settings.backbone, settings.weights)
    return {"code": digest.hexdigest(), "parameters": parameters, "weights": weights}


def _to_html(executed: Path) -> None:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_filename(str(executed))
    executed.with_suffix(".html").write_text(body, encoding="utf-8")


def _index(outcomes: Sequence[Outcome], settings: notebook.Settings) -> str:
    import pandas as pd

    parts = []
    for o in outcomes:
        state = f"failed: {o.error}" if o.error else "done"
        parts.append(f'<h2><a href="{o.name}.html">{html.escape(o.title)}</a> <small>{html.escape(state)}</small></h2>')
        for csv in sorted(settings.out("").glob(f"{o.name}*.csv")):
            frame = pd.read_csv(csv)
            parts.append(
                f"<h3>{html.escape(csv.stem)}</h3>{frame.to_html(index=False, na_rep='–', float_format='%.2f', border=0)}"
            )
        for png in sorted(settings.out("").glob(f"{o.name}*.png")):
            parts.append(f'<figure><img src="{png.name}" alt="{png.stem}"><figcaption>{png.stem}</figcaption></figure>')
    failed = sum(bool(o.error) for o in outcomes)
    head = f"{len(outcomes) - failed} of {len(outcomes)} notebooks done" + (f", {failed} failed" if failed else "")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>rcp: {settings.profile}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto }}
th, td {{ padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd }} td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }} figure {{ margin: 1rem 0 }} small {{ font-weight: normal; color: #555 }}
.label {{ background: #fff3cd; padding: 0.5rem 1rem }}
</style><h1>ReConPatch, reproduced</h1><p class="label">{html.escape(settings.label)}</p><p>{head}.</p>{"".join(parts)}</html>"""
