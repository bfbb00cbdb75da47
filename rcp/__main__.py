"""``rcp``: from a folder of images of good parts to a decision on new ones (``rcp --help``)."""

import argparse
import ast
import json
import sys
import warnings
from contextlib import nullcontext, suppress
from itertools import chain, islice
from pathlib import Path

from rcp.checks import check_type, require
from rcp.config import WHOLE, Config
from rcp.data.sources import images_of
from rcp.detector import ReConPatch, load
from rcp.paths import require_writable
from rcp.prediction import AS_CSV, results_folder, tabulated
from rcp.watch import watch

PRESETS = {"inspection": {}, "patchcore": {"representation": "none"} | WHOLE, "paper": {}}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. -> 0; 1 with ``--fail`` where an image is defective; 2 where something is wrong, said in one line."""
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a file's name that is no text
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:  # how a watch ends
        return 130
    except Exception as error:  # 1 means a defect: nothing else may end with it
        known = isinstance(error, ValueError | OSError | MemoryError)
        _say(f"rcp {options.command}: {error}" if known else f"rcp {options.command}: {type(error).__name__}: {error}")
        return 2


def _fit(o: argparse.Namespace) -> None:
    given = {n: v for n, v in vars(o).items() if n in ("backbone", "weights", "device") and v is not None} | dict(o.set)
    build = Config.for_inspection if o.preset == "inspection" else Config.build
    config = build(**PRESETS[o.preset] | given)
    without = sorted(given.keys() - config.upto("scores").keys() - {"device", "seed"})
    require("set", not without, f"what {config} uses", without)
    detector = ReConPatch.from_config(config)
    require_writable(o.output, "write {} in", b"rcp-detector")
    detector.false_alarm_rate = o.false_alarm_rate
    detector.fit(o.images if o.images[1:] else o.images[0], _say, skip_unreadable=o.skip_unreadable).save(o.output)
    _say(f"saved {o.output}: {detector!r}")


def _predict(o: argparse.Namespace) -> int:
    detector, skipped, defective = _loaded(o), [] if o.skip_unreadable else None, []
    given = [images_of(image) for image in o.images]  # what is misspelt is said before any is scored
    out = detector.predict_iter(chain(*given), skipped=skipped)
    first = list(islice(out, 1))  # where none can be read, what an earlier run wrote stays
    with results_folder(o.out, chain(*given)) if o.out else nullcontext():

        def tell(found: dict) -> None:
            print(json.dumps(found) if o.json else _line(found), flush=True)
            if o.out:
                tabulated([found]).to_csv(o.out / "predictions.csv", **AS_CSV)  # a killed run leaves what it has

        try:
            for number, one in enumerate(chain(first, out), 1):
                (found,) = one.records()
                tell(found)
                defective.append(found["defective"])
                if o.out:
                    one.save_overlay(o.out, 0, number)
        finally:  # where it is interrupted, too
            for name, reason in skipped or ():
                tell({"path": str(name), "error": reason, "boxes": ()})
    decided = defective and None not in defective and not skipped
    return (1 if any(defective) else 0 if decided else 2) if o.fail else 0


def _watch(o: argparse.Namespace) -> None:
    for found in watch(_loaded(o), o.folder, o.log or o.folder / "rcp.jsonl", o.seconds, o.looks):
        print(json.dumps(found) if o.json else _line(found), flush=True)


def _info(o: argparse.Namespace) -> None:
    detector = load(o.detector, weights=o.weights, device="cpu" if o.device is None else o.device)
    entries, dim = detector.bank_.entries.shape
    _say(f"{detector!r}\nmemory bank: {entries} x {dim}\n{detector.promise()}")


def _export(o: argparse.Namespace) -> None:
    written = _loaded(o).export(o.output)
    _say(f"exported {written}, {written.stat().st_size / 2**20:.1f} MiB; resize and crop the images before it")


def _loaded(o: argparse.Namespace) -> ReConPatch:
    detector = load(o.detector, weights=o.weights, device=o.device)
    if o.false_alarm_rate is not None:
        detector.false_alarm_rate = o.false_alarm_rate
    if why := detector.decide()[1]:
        _say(f"no decision: {why}")
    return detector


def _line(found: dict) -> str:
    line = f"unreadable  {found['path']}: {found.get('error')}"
    if "error" not in found:
        decision = {None: "?", True: "DEFECTIVE", False: "normal"}[found["defective"]]
        line = f"{decision:9}  {found['score']:.4f}  {found['path']}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # a name may hold the end of a line, or worse


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def path(text: str) -> Path:
    return Path(check_type("path", str | Path, text))


def _setting(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, such as coreset_ratio=0.1, got {text!r}")
    for read in (json.loads, ast.literal_eval):  # (2, 3) too
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return name, read(value)
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rcp", description="a detector of defects from images of good parts")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, words: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--device", help="auto (default), cpu, cuda")
        added.add_argument("--weights", help="of the CNN: a tag, or a file")
        if name != "info":
            words = "share of normal images that may be called defective (default: 0.01, or the least that the images support)"
            added.add_argument("--false-alarm-rate", type=float, help=words)
        return added

    fit = command("fit", _fit, "learn from a folder of images of good parts")
    fit.add_argument("images", nargs="+", help="a folder of images, or of train/ and perhaps test/; or images")
    fit.add_argument("-o", "--output", type=path, required=True, help="the detector's file, such as part.rcp")
    words = "default: %(default)s; but for paper, nothing is cropped"
    fit.add_argument("--preset", choices=PRESETS, default="inspection", help=words)
    fit.add_argument("--backbone", help="a CNN: torchvision's ResNets and DenseNets, or timm's")
    fit.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="hyper-parameter")
    predict = command("predict", _predict, "score images and decide")
    watch = command("watch", _watch, "score each new image of a folder, once")
    exported = command("export", _export, "write a file that runs without rcp")
    for added in (predict, watch, exported, command("info", _info, "what a detector's file holds")):
        added.add_argument("detector", type=path, help="what fit wrote")
    for added in (predict, watch):
        added.add_argument("--json", action="store_true", help="a line of JSON for each image")
    for added in (fit, predict):
        added.add_argument("--skip-unreadable", action="store_true", help="leave out and list what cannot be read")
    exported.add_argument("output", type=path, help="such as part.onnx or part.pt2")
    predict.add_argument("images", nargs="+", help="files, folders, patterns")
    predict.add_argument("--out", type=path, help="folder for predictions.csv and pictures of where")
    predict.add_argument("--fail", action="store_true", help="exit status 1 where an image is defective")
    watch.add_argument("folder", type=path)
    watch.add_argument("--log", type=path, help="JSON lines of what is done (default: rcp.jsonl in the folder)")
    watch.add_argument("--seconds", type=float, default=1.0, help="between two looks (default: 1)")
    watch.add_argument("--looks", type=int, help="end after so many")
    return parser


def script() -> int:
    warnings.formatwarning = lambda words, *_, **__: f"rcp: {words}\n"  # without a line of code
    return main()


if __name__ == "__main__":
    sys.exit(script())
