"""``python -m reproduce``: the batch, and what a user needs around it (see ``--help``)."""

import argparse
import shlex
import sys
from pathlib import Path

from rcp.__main__ import path
from rcp.data import download
from reproduce import batch, bundle, doctor, grids, tables, verdict
from reproduce.demo import draw_demo
from reproduce.notebook import Settings
from reproduce.store import Store, runs_root

# Grids of entries alone, which a bundle can take.
BUNDLED = (
    "does_training_help", "open_choices", "bank", "table_1", "table_2", "table_3", "table_4", "table_5", "table_s1_s2_s3", "table_s4",
)  # fmt: skip
# A batch's parameters, as notebooks declare them.
PARAMETERS = {
    "profile": {"help": "demo (default): drawn images, minutes on two cores; paper: the paper's setting"},
    "data_root": {"help": "folder that holds the categories"},
    "btad_root": {"help": "folder that holds 01, 02, 03 of BTAD"},
    "categories": {"nargs": "+", "help": "some of them; all where left out"},
    "backbone": {"help": "a torchvision or timm CNN"},
    "weights": {"help": "a tag, a .safetensors or .pth file, or random:SEED"},
    "epochs": {"type": int, "help": "training epochs of f"},
    "seeds": {"type": int, "nargs": "+", "help": "every entry is computed once per seed"},
    "device": {"help": "auto, cpu, cuda"},
    "shard": {"help": "i/n: compute every n-th entry from the i-th"},
    "render_only": {"action": "store_true", "default": None, "help": "draw from what the store has"},
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status; what a user can mend is printed as one line, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError | MemoryError) else f"{type(error).__name__}: "
        print(f"{options.command}: {kind}{error}", file=sys.stderr)
        return 1


def _reproduce(o: argparse.Namespace) -> int:
    given = {name: getattr(o, name) for name in PARAMETERS if getattr(o, name) is not None}
    failed = [outcome for outcome in batch.reproduce(given, o.notebooks or (), force=o.force) if outcome.error]
    for outcome in failed:
        print(f"failed: {outcome.name}: {outcome.error}", file=sys.stderr)
    if failed:
        print("what is finished is kept; mend the cause and run the same command again", file=sys.stderr)
    return int(bool(failed))


def _execute(o: argparse.Namespace) -> None:
    for i, file in enumerate(o.notebooks, 1):
        stale = o.force or batch.stale(file)
        state = " ..." if stale else ": its own cells have not changed"
        print(f"[{i}/{len(o.notebooks)}] {file.stem}{state}", flush=True)
        if stale:
            batch.execute(file)


def _check(o: argparse.Namespace) -> int:
    beyond = verdict.check(o.folder)
    print("\n".join(beyond) or f"{o.folder}: nothing that was run in the paper's setting is beyond tolerance")
    return int(bool(beyond))


def _publish(o: argparse.Namespace) -> None:
    for name, failed in batch.publish(o.folder, o.into).items():
        print(f"{name}: left out, {failed}" if failed else o.into / f"{name}.ipynb")


def _pack(o: argparse.Namespace) -> None:
    print(f"{Store(runs_root(o.runs)).pack(o.file, o.light)} entries packed into {o.file}")


def _entries(o: argparse.Namespace) -> None:
    print(f"{tables.of_store(Store(runs_root(o.runs)), o.file)} rows in {o.file}")


def _bundle(o: argparse.Namespace) -> None:
    given = {name: value for name in PARAMETERS if (value := getattr(o, name, None)) is not None}
    bundle.require_new(o.folder)  # before what is missing is looked for
    settings = Settings(**given)
    tasks = [task for name in o.grids for task in getattr(grids, name)(settings)]
    entries, others = bundle.missing(tasks, settings.store)
    print(bundle.describe(entries, others))
    size, left = bundle.write(o.folder, entries)
    print(f"{size / 2**20:.1f} MiB in {o.folder}; there: python run.py --minutes 9 --out results.zip")
    if left:
        print(f"{len(left)} of {len(entries)} entries did not fit: unpack this one's results, then make another bundle")


def _unpack(o: argparse.Namespace) -> None:
    store = Store(runs_root(o.runs))
    new, there = store.unpack(o.file)
    print(f"{new} of {there} entries are new in {store.root}")


def _doctor(_o: argparse.Namespace) -> None:
    lines, missing = doctor.report()
    print("\n".join(lines))
    print("\nmissing for the paper profile:" if missing else "\nthe paper profile has all it needs")
    print("\n".join(f"  - {line}" for line in missing))


def quoted(text: str) -> list[str]:
    return shlex.split(text)


def whole_numbers(text: str) -> list[int]:
    return [int(word) for word in quoted(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description="ReConPatch, reproducible from a notebook")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, words: str, *arguments: tuple) -> None:
        added = commands.add_parser(name, allow_abbrev=False, help=words)
        for flag, how in arguments:
            added.add_argument(flag, **how)
        added.set_defaults(run=run)

    notebooks = ("notebooks", {"type": path, "nargs": "+"})
    folder = ("folder", {"type": path})
    force = ("--force", {"action": "store_true", "help": "also what is up to date"})
    runs = ("--runs", {"type": path, "help": "folder of the store (default: RCP_RUNS, or runs/)"})
    some = ("--notebooks", {"nargs": "+", "help": "paths, or names such as table_5; all where left out"})
    batch = [(f"--{name.replace('_', '-')}", how) for name, how in PARAMETERS.items()]
    words = {"type": quoted, "dest": "categories", "help": argparse.SUPPRESS}  # make's lists: quotes keep a space
    lists = ("--categories-words", words), ("--seeds-words", words | {"type": whole_numbers, "dest": "seeds"})
    whole = "run every notebook through papermill and index the results"
    command("reproduce", _reproduce, whole, *batch, *lists, some, force)
    command("execute", _execute, "execute notebooks in place where their own cells have changed", notebooks, force)
    command("check", _check, "fail where a run in the paper's setting is beyond tolerance", folder)
    csv = ("--csv", {"type": path, "default": Path("results/published.csv")})
    words = "all rows of a run's folder into one CSV"
    command("gather", lambda o: print(tables.gather(o.folder, o.csv)), words, folder, csv)
    command("views", lambda o: print(*tables.views(o.csv, o.csv.parent), sep="\n"), "Markdown views of that CSV", csv)
    into = ("--into", {"type": path, "default": Path("results/notebooks")})
    words = "copies of a run's executed notebooks, without a machine's paths"
    command("publish", _publish, words, folder, into)
    light = ("--light", {"action": "store_true", "help": "without patch scores: for tables, not for maps"})
    command("pack", _pack, "all finished entries into one file", ("file", {"type": path}), light, runs)
    command("entries", _entries, "every entry of the store as a row of a CSV", ("file", {"type": path}), runs)
    of = {"nargs": "+", "choices": BUNDLED, "default": ["does_training_help"], "help": "whose entries"}
    words = "what the store lacks, for a machine with a GPU and nothing else"
    command("bundle", _bundle, words, folder, ("--grids", of), *batch[:9])
    command("unpack", _unpack, "merge a packed file into the store", ("file", {"type": path}), runs)
    command("doctor", _doctor, "device, versions, data, weights, disk, and what is missing")
    root = ("--root", {"type": path, "help": "folder of data sets (default: data/)"})
    name = ("name", {"help": "mvtec, btad, dtd or visa"})
    command("download", lambda o: print(download(o.name, o.root)), "fetch a data set, hash-checked", name, root)
    weights = ("name", {"help": "such as wide_resnet50_2"})
    command("weights", lambda o: print(doctor.fetch_weights(o.name)), "fetch a backbone's ImageNet weights", weights)
    command("demo", lambda o: print(draw_demo(o.root)), "draw the demo set into a folder", ("root", {"type": path}))
    return parser


if __name__ == "__main__":
    sys.exit(main())
