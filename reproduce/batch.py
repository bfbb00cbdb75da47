"""Every notebook through papermill, then one HTML index: what ``make reproduce`` runs."""

import contextlib
import dataclasses
import datetime
import hashlib
import html
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import nbformat
from filelock import FileLock, Timeout
from jinja2 import Environment
from nbformat import NotebookNode

from rcp import backbone
from rcp.checks import check_names, check_type, require
from rcp.data import categories, load_dataset
from rcp.detector import resolve_device
from rcp.files import file_hash, scratch
from rcp.paths import PROJECT, data_root, require_writable
from rcp.refinement import Refinement
from reproduce import grids, tables
from reproduce.notebook import Settings, assigned, environment
from reproduce.provenance import ROOT, ChangedCode, code_of
from reproduce.verdict import RULE, read

CHECKED = "nbval-check-output"  # tag of a cell whose stored output nbval compares
# What notebooks import: its code, and all that it imports, is what their outputs come from.
_IMPORTED = ("notebook", "grids", "studies", "tables", "effects", "verdict", "views", "figures", "paper")
MODULES = tuple(f"reproduce.{name}" for name in _IMPORTED)
_FOLDERS = ("RCP_RUNS", "RCP_DATA", "RCP_WEIGHTS")


@dataclass(frozen=True)
class Outcome:
    """One notebook of a batch: seconds is None where nothing had to be run; error is "" where all went well."""

    name: str
    title: str
    seconds: float | None = None
    error: str = ""


def reproduce(
    parameters: dict, notebooks: Sequence[str | Path] = (), force: bool = False, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Runs the notebooks with these parameters and writes ``runs/reproduce/PROFILE/index.html``.

    A notebook whose cells, parameters, code, data and weights are those of its last finished run is not run again. One that
    fails does not stop the others. In the paper profile they run one after the other, for an entry uses all of the machine;
    the demo's small ones run three at a time, so that two cores have no pauses, and as many as there are cores where nothing is computed.

    Args:
        parameters: by name; those that a notebook does not declare are not passed to it.
        notebooks: paths, or names of notebooks of the project; all of ``notebooks/`` where empty.
        force: run them all the same; entries that the store has are still not computed again.

    Raises:
        ValueError, FileNotFoundError: an unknown parameter or notebook or a bad value, before any notebook is run.
    """
    files = list(dict.fromkeys(map(_found, notebooks))) or _of_project()
    stems = [file.stem for file in files]
    require("notebooks", len({*stems}) == len(stems), "one of each name: what they write goes by it", stems)
    require("notebooks", "index" not in stems, "another name than index, which is the page of them all", stems)
    sources = [_read(file) for file in files]
    declared = [_declared(source) for source in sources]
    check_names("unknown parameter", parameters, sorted(set().union(*declared)))
    for name, kind in (pair for kinds in declared for pair in kinds.items() if pair[0] in parameters):
        check_type(name, kind, parameters[name])
    parameters = _absolute(parameters)
    require("epochs", parameters.get("epochs") != 0, "a number above 0", 0)  # of a notebook, 0 is the profile's
    for named in parameters.get("members", {}).items():
        backbone.check(*(check_type("members", str, name) for name in named))
    settings = Settings(**{n: v for n, v in parameters.items() if n in Settings.__dataclass_fields__})
    if parameters.get("weights") and not settings.render_only and Path(settings.weights).is_file():
        # weights that are none would fail once per notebook
        backbone.Backbone(settings.backbone, settings.weights, settings.config().layers)
    workers = os.cpu_count() or 1 if settings.render_only else 3 if settings.profile == "demo" else 1

    def job(i: int) -> Outcome:
        where = f"[{i + 1}/{len(files)}] {files[i].stem}"
        given = {n: v for n, v in parameters.items() if n in declared[i]}
        log = sys.stdout if workers == 1 else None  # lines of several notebooks would mix
        outcome = _run(files[i], sources[i], declared[i], given, settings, force, log, lambda words: say(where + words))
        if outcome.seconds is not None:
            say(f"{where}: {outcome.error.splitlines()[-1] if outcome.error else f'{outcome.seconds:.0f} s'}")
        return outcome

    code_of(*MODULES)  # found once, here: Python 3.11 cannot parse in two threads at a time
    pool = ThreadPoolExecutor(workers)  # each kernel is a process of its own
    with _alone(settings), _kernels_of(workers), contextlib.chdir(PROJECT):
        try:
            outcomes = list(pool.map(job, range(len(files))))
        finally:  # interrupted: no further one is begun
            pool.shutdown(wait=False, cancel_futures=True)
    page = settings.out("index.html")
    page.write_text(_index(outcomes, settings), encoding="utf-8")
    say(f"index: {page}")
    return outcomes


def _read(file: Path) -> NotebookNode:
    try:
        return nbformat.read(file, as_version=4)
    except (ValueError, AttributeError, TypeError, RecursionError, nbformat.ValidationError) as error:
        raise ValueError(f"{file} is no notebook: {error!s:.200}") from None


def _of_project() -> list[Path]:
    return sorted((PROJECT / "notebooks").glob("*.ipynb"))


def _found(given: str | Path) -> Path:
    if Path(given).is_file():
        return Path(given).absolute()
    there = {file.stem: file for file in _of_project()}
    check_names("unknown notebook", [Path(given).stem], there)
    return there[Path(given).stem]


def _absolute(parameters: dict) -> dict:
    """Relative paths are the caller's; notebooks run in the project's folder."""
    given = dict(parameters)
    for name in ("data_root", "btad_root", "weights"):
        if given.get(name) and Path(given[name]).exists():
            given[name] = str(Path(given[name]).absolute())
    if given.get("categories") and Path(given.get("data_root") or data_root() / "mvtec").is_dir():
        given["categories"] = _joined(given["categories"], categories(given.get("data_root") or data_root() / "mvtec"))
    return given


def _joined(words: Sequence[str], there: Sequence[str]) -> list[str]:
    """Words of a list that was split at its spaces, as categories that are there: "metal", "nut" may be one, if they are none."""
    words = check_type("categories", tuple[str, ...], tuple(words))
    if set(words) <= set(there):
        return list(words)
    found, left = [], list(words)
    while left:
        taken = next((n for n in range(len(left), 1, -1) if " ".join(left[:n]) in there), 1)
        found.append(" ".join(left[:taken]))
        del left[:taken]
    return found


def _declared(source: NotebookNode) -> dict:
    """The parameters of a notebook, and what each may be."""
    cells = (c.source for c in source.cells if "parameters" in c.metadata.get("tags", []))
    return {name: kind for cell in cells for name, kind in assigned(cell).items()}


def _alone(settings: Settings) -> contextlib.AbstractContextManager:
    """One batch at a time in a folder of results. Raises OSError where another one runs."""
    try:
        return FileLock(settings.out(".batch.lock"), timeout=0).acquire()
    except Timeout:
        raise OSError(f"another batch writes into {settings.out('')}: wait for it, or set RCP_RUNS or SHARD") from None


def _kernels_of(workers: int) -> contextlib.AbstractContextManager:
    """Kernels side by side share the cores, have no progress bars and end with this process; what the caller has set stays.

    Folders that variables name become absolute: kernels run in the project's folder.
    """
    cores = str(max(1, (os.cpu_count() or 1) // workers))
    threads = {"OMP_NUM_THREADS": cores, "NUMBA_NUM_THREADS": cores} if workers > 1 else {}
    own = threads | {"TQDM_DISABLE": "1", "RCP_BATCH": str(os.getpid())} | os.environ
    folders = {name: os.path.abspath(os.path.expanduser(own[name])) for name in _FOLDERS if own.get(name)}
    return mock.patch.dict(os.environ, own | folders)


def _run(
    file: Path, source: NotebookNode, declared: dict, parameters: dict, settings, force: bool, log, say
) -> Outcome:
    import papermill

    done = Outcome(file.stem, _title(source, file))
    computes_alone = settings.render_only and "render_only" not in declared
    of_first = "shard" not in declared  # the first shard runs what cannot be shared out
    if computes_alone or (of_first and not settings.shard.startswith("1/")):
        say(": left as it is")
        return done
    settings = dataclasses.replace(settings, shard="1/1") if of_first else settings
    out, stamp = settings.out(file.name), settings.out(f".{file.stem}.json")
    try:
        version = {} if settings.render_only else _version(source, declared, parameters, settings)
    except ChangedCode as error:  # the others may not need it
        return dataclasses.replace(done, seconds=0.0, error=str(error))
    if version and not force and stamp.is_file() and stamp.read_bytes() == _stamp(version, settings, file.stem):
        say(": up to date")
        return done
    for old in (stamp, *_written(settings, file.stem)):
        old.unlink(missing_ok=True)  # what this run does not write must not stand under its label
    say(" ...")
    quiet = ["--IPKernelApp.log_level=CRITICAL"]  # what fails in a cell stands in the notebook
    how = {"kernel_name": "python3", "progress_bar": False, "stdout_file": log, "extra_arguments": quiet}
    started = time.perf_counter()
    # papermill fills in what stands in braces
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (file, out)]
    error = _failure(lambda: papermill.execute_notebook(*paths, parameters, **how))
    seconds = time.perf_counter() - started
    if out.exists() and (page := _failure(lambda: _to_html(out))):
        error = f"{error}\nits HTML page: {page}".lstrip()
    if not error:
        stamp.write_bytes(_stamp(version, settings, file.stem))
    return dataclasses.replace(done, seconds=seconds, error=error)


def _stamp(version: dict, settings: Settings, name: str) -> bytes:
    """With hashes of all files that a notebook wrote: what was deleted, cut or changed since is made again."""
    outputs = {f.name: file_hash(f).hexdigest() for f in _written(settings, name)}
    return json.dumps({"version": version, "outputs": outputs}, sort_keys=True).encode()


def _failure(work: Callable[[], object]) -> str:
    """What went wrong, or "": whatever it is, the other notebooks go on."""
    try:
        work()
    except Exception as failed:
        return f"{getattr(failed, 'ename', type(failed).__name__)}: {getattr(failed, 'evalue', failed)}"
    return ""


def _to_html(executed: Path) -> None:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_filename(str(executed))
    executed.with_suffix(".html").write_text(body, encoding="utf-8")


def _title(source: NotebookNode, file: Path) -> str:
    lines = (line for cell in source.cells for line in cell.source.splitlines())
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), file.stem)


def _version(source: NotebookNode, declared: dict, parameters: dict, settings: Settings) -> dict:
    """What an executed notebook depends on: its cells, its parameters, code, and the content of data and weights."""
    digest = hashlib.blake2b((cells_hash(source) + code_of(*MODULES)).encode(), digest_size=12)
    for file in sorted(f for kind in ("csv", "mplstyle") for f in (ROOT / "reproduce").glob(f"*/*.{kind}")):
        digest.update(file.read_bytes())
    for root in sorted(declared.keys() & {"data_root", "btad_root"}):
        with contextlib.suppress(OSError, ValueError):  # the notebook itself says what is missing
            on_btad = {"dataset": "btad", "categories": (), "data_root": ""} if root == "btad_root" else {}
            about = dataclasses.replace(settings, **on_btad)
            for name in about.categories:
                digest.update(load_dataset(about.data_root, category=name).fingerprint().encode())
    if "refine" in declared:
        given = parameters.get("refine", {}).get("textures", "")
        with contextlib.suppress(OSError, ValueError):  # likewise
            of = Refinement.build(textures=given, kind="texture").identity()["textures"]
            digest.update(str(of).encode())
    weights = [(settings.backbone, settings.weights)]
    if "members" in declared:
        weights += (parameters.get("members") or grids.members_of(settings)).items()
    weights += parameters.get("backbones", {}).items()
    with contextlib.suppress(OSError):  # likewise
        for named in weights:
            digest.update(backbone.weights_identity(*named).encode())
        for file in (f for f in parameters.values() if isinstance(f, str) and Path(f).is_file()):
            digest.update(file_hash(file).digest())
    return {"content": digest.hexdigest(), "parameters": parameters}


# ---- executed in place: what is committed ----


def cells_hash(source: NotebookNode) -> str:
    """Hash of a notebook's code cells, and of which of them are checked."""
    code = [(cell.source, _checked(cell)) for cell in source.cells if cell.cell_type == "code"]
    return hashlib.blake2b(json.dumps(code).encode(), digest_size=12).hexdigest()


def _checked(cell: NotebookNode) -> bool:
    return CHECKED in cell.metadata.get("tags", [])


def stale(file: Path) -> bool:
    """Whether a notebook's own code cells have changed since :func:`execute`. What they import does not count: nbval guards it."""
    source = _read(file)
    return source.metadata.get("rcp", {}).get("cells") != cells_hash(source)


def execute(file: Path) -> None:
    """Executes a notebook in place, with its own parameters, and keeps the outputs of its checked cells alone.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    from nbconvert.preprocessors import ExecutePreprocessor

    source = _read(file)
    preprocessor = ExecutePreprocessor(timeout=1800, kernel_name="python3", record_timing=False)
    executed, _ = preprocessor.preprocess(source, {"metadata": {"path": str(PROJECT)}})
    for cell in executed.cells:
        if cell.cell_type == "code" and not _checked(cell):  # nbval wants the number of one that has outputs
            cell.execution_count, cell.outputs = None, []
    executed.metadata.pop("widgets", None)  # the state of widgets that are not kept
    executed.metadata["rcp"] = {"cells": cells_hash(executed)}
    with scratch(file) as folder:
        nbformat.write(executed, folder / file.name)
        os.replace(folder / file.name, file)


def publish(run: Path, folder: Path) -> dict[str, str]:
    """Copies the executed notebooks of a run's folder, without what names a machine: the folders of absolute paths, and times.

    Returns: name -> "" where it was copied, or why it was not: a cell failed, or the run ended before the last one.
    """
    found, files = {}, sorted(run.glob("*.ipynb"))
    require("folder", len(files) > 0, "one of a finished run, with notebooks", str(run))
    require("into", folder.resolve() != PROJECT / "notebooks", "another folder than the notebooks' own", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        executed = _read(file)
        given = executed.metadata.pop("papermill", {}).get("parameters", {})
        code = (c for c in executed.cells if c.cell_type == "code")
        marks = {c.metadata.get("papermill", {}).get("status", "completed") for c in code}
        outputs = (output for cell in executed.cells for output in cell.get("outputs", []))
        failed = next((o.evalue for o in outputs if o.output_type == "error"), "")
        found[file.stem] = failed or "it was not run to its end" * (marks != {"completed"})
        for cell in executed.cells:
            cell.metadata = NotebookNode(tags=cell.metadata.get("tags", []))
        executed.metadata.setdefault("rcp", {})
        hidden = _absolute_paths([given, str(run.resolve()), str(PROJECT)])
        text = nbformat.writes(nbformat.from_dict(_without_folders(executed, hidden)))
        if not found[file.stem]:
            require_writable(folder / file.name, "publish {} in", b'"rcp": {')
            (folder / file.name).write_text(text, encoding="utf-8")
    return found


def _absolute_paths(given) -> list[str]:
    """Those in nested lists and dicts, the longest first, also as HTML has them."""
    if isinstance(given, str):
        path = given.rstrip("/")
        return [path, html.escape(path)] if path.startswith("/") else []
    within = given.values() if isinstance(given, dict) else given if isinstance(given, list) else ()
    return sorted({path for value in within for path in _absolute_paths(value)}, key=len, reverse=True)


def _without_folders(node, paths: Sequence[str], kind: str = ""):
    """A notebook whose texts name these paths by their last part alone. kind: the key of a node; an image is no text."""
    if isinstance(node, dict):
        return {name: _without_folders(value, paths, name) for name, value in node.items()}
    if isinstance(node, list):
        return [_without_folders(value, paths) for value in node]
    for path in paths if isinstance(node, str) and not kind.startswith("image/") else ():
        found = rf"(data:[^,\s]+;base64,[\w+/=]+)|(?<![\w.]){re.escape(path)}"  # an image within HTML stays, too
        node = re.sub(found, lambda m, path=path: m[1] or Path(path).name, node)
    return node


# ---- the index ----


def _index(outcomes: Sequence[Outcome], settings: Settings) -> str:
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = page.from_string((Path(__file__).parent / "index.html.jinja").read_text(encoding="utf-8"))
    about = {"now": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "rule": " ".join(RULE.split())}
    about |= {"settings": settings, "session": environment(resolve_device(settings.device))}
    return page.render(about, items=[_item(outcome, settings) for outcome in outcomes])


def _item(o: Outcome, settings: Settings) -> dict:
    """What the index shows of a notebook; where a file that it wrote cannot be read, that it failed."""
    try:
        return _described(o, settings)
    except (ValueError, OSError) as error:
        return _described(dataclasses.replace(o, error=str(error)), settings)


def _described(o: Outcome, settings: Settings) -> dict:
    """Of a notebook's files none where it failed, for they may be of an earlier run."""
    csv, png, pdf = ([] if o.error else _written(settings, o.name, kind) for kind in ("csv", "png", "pdf"))
    csv = tables.as_written(csv)
    page = f"{o.name}.html" if settings.out(f"{o.name}.html").exists() else ""
    file = settings.out(f"{o.name}.verdict.json")
    there = file.exists() and not o.error
    _, verdict, words = read(file) if there else ("", "not run" if o.error else "–", o.error)
    # what is no comparison, or of no entries, is linked alone
    frames = [tables.read(file) for file in csv if file.read_text().strip()]
    if verdict == "not run" and frames and "in another setting (" in words:
        verdict = "demo" if settings.profile == "demo" else "another setting"
    rows = [frame for frame in frames if {"table", *tables.COLUMNS} <= set(frame)]
    parts = [part for frame in rows for part in frame.groupby("table", sort=False)]
    return dataclasses.asdict(o) | {
        "verdict": verdict, "words": words, "page": page, "images": png,
        "css": "failed" if o.error else "" if verdict == "not run" else verdict.partition(" ")[0],
        "state": f"failed: {o.error}" if o.error else "done" if page else "not run",
        "files": [(page, "notebook")] * bool(page)
        + [(f.name, f.name.removeprefix(o.name).lstrip("_.")) for f in (*csv, *png, *pdf)],
        "tables": [(name, tables.readable(part).to_html(border=0)) for name, part in parts],
    }  # fmt: skip


def _written(settings: Settings, name: str, kinds: str = "csv|html|ipynb|md|pdf|png|verdict.json") -> list[Path]:
    """Files that a notebook wrote: NAME.kind, NAME_*.kind, less those of a notebook of a longer name."""
    there = sorted(settings.out("").iterdir())
    longer = [f.stem for f in there if f.suffix == ".ipynb" and f.stem.startswith(f"{name}_")]

    def of(which: str, file: Path) -> bool:
        return re.fullmatch(rf"{re.escape(which)}(_.*)?\.({kinds})", file.name) is not None

    return [f for f in there if of(name, f) and not any(of(other, f) for other in longer)]
