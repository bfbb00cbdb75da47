"""``python -m reproduce``: reproduce, plan, cell, render, index, execute, doctor, download, weights, demo."""

import argparse
import json
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status; what a user can mend is printed as one line, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1


def _reproduce(o: argparse.Namespace) -> int:
    from reproduce import batch

    given = {name: getattr(o, name) for name in PARAMETERS if getattr(o, name) is not None}
    outcomes = batch.reproduce(given, o.notebooks or (), force=o.force)
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"failed: {outcome.name}: {outcome.error}", file=sys.stderr)
    if failed:
        print("what is finished is kept; mend the cause and run the same command again", file=sys.stderr)
    return int(bool(failed))


def _plan(o: argparse.Namespace) -> int:
    from reproduce import batch

    given = {name: getattr(o, name) for name in PARAMETERS if getattr(o, name) is not None}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    _replace(o.out, json.dumps(batch.plan(given, o.items or ()), indent=1))
    return 0


def _cell(o: argparse.Namespace) -> int:
    from reproduce import batch, entries
    from rcp import paths
    from reproduce.store import Store

    store, cell = Store(paths.runs_root()), batch.planned_cell(json.loads(o.plan.read_text()), o.name)
    result = experiment.run(cell, store, log=print)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    entry = store.folder("cells", cell.identity()).relative_to(store.root).as_posix()
    found = {"name": o.name, "entry": entry, "computed": result.computed, "metrics": result.metrics}
    _replace(o.out, json.dumps(found | {"seconds": result.info["seconds"]}, indent=1))
    return 0


def _render(o: argparse.Namespace) -> int:
    from reproduce import batch

    plan = json.loads(o.plan.read_text())
    outcome = batch.render(plan, o.item)
    if outcome.error:
        print(f"{o.item}: {outcome.error}", file=sys.stderr)
        return 1
    found = {"item": o.item, "version": plan["notebooks"][o.item]["version"], "seconds": round(outcome.seconds, 1)}
    _replace(o.out, json.dumps(found, indent=1))
    return 0


def _index(o: argparse.Namespace) -> int:
    from reproduce import batch

    print(batch.index(json.loads(o.plan.read_text()), o.rendered))
    return 0


def _execute(o: argparse.Namespace) -> int:
    from reproduce import batch

    for i, file in enumerate(o.notebooks, 1):
        if o.force or batch.stale(file):
            print(f"[{i}/{len(o.notebooks)}] {file.stem} ...", flush=True)
            batch.execute(file)
        else:
            print(f"[{i}/{len(o.notebooks)}] {file.stem}: its outputs are those of its code")
    return 0


def _replace(file: Path, text: str) -> None:
    """Written under another name and renamed: a killed process leaves no half file."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(file)


def _doctor(_o: argparse.Namespace) -> int:
    from reproduce import doctor

    lines, missing = doctor.report()
    print("\n".join(lines))
    print("\nmissing for the paper profile:" if missing else "\nthe paper profile has all it needs")
    for line in missing:
        print(f"  - {line}")
    return 0


def _download(o: argparse.Namespace) -> int:
    from rcp.data import download

    print(download(o.name, o.root))
    return 0


def _weights(o: argparse.Namespace) -> int:
    from reproduce import doctor

    print(doctor.fetch_weights(o.name))
    return 0


def _demo(o: argparse.Namespace) -> int:
    from rcp.data import draw_demo

    print(draw_demo(o.root))
    return 0


PARAMETERS = {
    "profile": {"help": "demo (default): drawn images, minutes on two cores; paper: the paper's setting"},
    "data_root": {"help": "folder that holds the categories"},
    "btad_root": {"help": "folder that holds 01, 02, 03 of BTAD"},
    "categories": {"nargs": "+", "help": "some of them; all where left out"},
    "backbone": {"help": "a torchvision or timm CNN"},
    "weights": {"help": "a tag, a .safetensors or .pth file, or random:SEED"},
    "epochs": {"type": int, "help": "training epochs of f"},
    "seeds": {"type": int, "nargs": "+", "help": "every cell is computed once per seed"},
    "device": {"help": "auto, cpu, cuda"},
    "shard": {"help": "i/n: compute every n-th cell from the i-th"},
    "render_only": {"action": "store_true", "default": None, "help": "draw from what the store has"},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description="ReConPatch, reproducible from a notebook")
    commands = parser.add_subparsers(dest="command", required=True)
    reproduce = commands.add_parser(
        "reproduce", allow_abbrev=False, help="run every notebook through papermill and index the results"
    )
    for name, how in PARAMETERS.items():
        reproduce.add_argument(f"--{name.replace('_', '-')}", **how)
    reproduce.add_argument("--notebooks", type=Path, nargs="+", help="some of them; all where left out")
    reproduce.add_argument("--force", action="store_true", help="run notebooks that are up to date, too")
    reproduce.set_defaults(run=_reproduce)
    plan = commands.add_parser(
        "plan", allow_abbrev=False, help="write the grid cell by cell, for a scheduler; computes nothing"
    )
    plan.add_argument("out", type=Path, help="JSON file to write")
    plan.add_argument("--items", nargs="+", help="notebooks by name; all where left out")
    for name, how in PARAMETERS.items():
        plan.add_argument(f"--{name.replace('_', '-')}", **how)
    plan.set_defaults(run=_plan)
    cell = commands.add_parser("cell", help="compute one cell of a plan, or find it in the store")
    cell.add_argument("plan", type=Path, help="JSON file that plan wrote")
    cell.add_argument("name", help="of the cell")
    cell.add_argument("out", type=Path, help="JSON file to write")
    cell.set_defaults(run=_cell)
    render = commands.add_parser("render", help="one notebook of a plan through papermill, from what the store has")
    render.add_argument("plan", type=Path, help="JSON file that plan wrote")
    render.add_argument("item", help="notebook by name")
    render.add_argument("out", type=Path, help="JSON file to write")
    render.set_defaults(run=_render)
    index = commands.add_parser("index", help="one HTML page of all items of a plan, as far as they are rendered")
    index.add_argument("plan", type=Path, help="JSON file that plan wrote")
    index.add_argument("rendered", type=Path, help="folder of the JSON files that render wrote")
    index.set_defaults(run=_index)
    execute = commands.add_parser(
        "execute", help="execute notebooks in place where their code has changed (before committing them)"
    )
    execute.add_argument("notebooks", type=Path, nargs="+")
    execute.add_argument("--force", action="store_true", help="also where it has not")
    execute.set_defaults(run=_execute)
    commands.add_parser("doctor", help="device, versions, data, weights, disk, and what is missing").set_defaults(
        run=_doctor
    )
    download = commands.add_parser("download", help="fetch a data set: resumable, hash-checked")
    download.add_argument("name", help="mvtec, btad, dtd or visa")
    download.add_argument("--root", type=Path, help="folder of data sets (default: data/)")
    download.set_defaults(run=_download)
    weights = commands.add_parser("weights", help="fetch a backbone's ImageNet weights")
    weights.add_argument("name", help="for example wide_resnet50_2")
    weights.set_defaults(run=_weights)
    demo = commands.add_parser("demo", help="draw the demo set into a folder")
    demo.add_argument("root", type=Path)
    demo.set_defaults(run=_demo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
