"""What it costs that all that is stored is checked: seconds in each hash, as a share of PatchCore's fit, which is the shortest."""

import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from common import arguments, write

from rcp import Config, ReConPatch, files
from rcp.data import layouts
from rcp.detector import load
from reproduce import store
from reproduce.entries import Entry
from reproduce.notebook import environment
from reproduce.run import run

OF = {
    "stored features": (store, "_crc_of"),
    "results": (store, "_checksum"),
    "the detector's file": (files, "_digest"),
    "images and masks (which data it was, not damage)": (layouts, "content_hash"),
}
DAMAGE = [*OF][:3]


def timed(function, seconds: dict, name: str):
    def inner(*args):
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds[name] += time.perf_counter() - started

    return inner


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    c = Config(backbone=options.backbone, weights=options.weights, device="cpu", representation="none")
    again = c.replace(coreset_start="random")  # its features are in the store

    def fit_save_load(folder: Path) -> None:
        fitted = ReConPatch.from_config(c).fit(Path(options.data) / options.category, len)
        fitted.save(folder / "part.rcp")
        load(folder / "part.rcp")

    jobs = {
        "an entry of a grid": lambda folder: run(Entry(c, options.data, options.category), store.Store(folder), len),
        "another with its features": lambda folder: run(
            Entry(again, options.data, options.category), store.Store(folder), len
        ),
        "fit, save, load": fit_save_load,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job, work in jobs.items():
            seconds = dict.fromkeys(OF, 0.0)
            hashes = [
                patch.object(module, function, timed(getattr(module, function), seconds, name))
                for name, (module, function) in OF.items()
            ]
            for each in hashes:
                each.start()
            started = time.perf_counter()
            work(Path(folder))
            took = time.perf_counter() - started
            patch.stopall()
            damage = sum(seconds[name] for name in DAMAGE)
            rows.append([job, f"{took:.1f}", *(f"{s:.3f}" for s in seconds.values()), f"{damage / took:.2%}"])
    header = ["", "s, in all", *(f"s, hash of {name}" for name in OF), "the first three, of all"]
    title = f"What the hashes cost, {options.category}, {options.backbone}"
    write(f"hashes_{options.category}_{options.backbone}", title, header, rows, environment("cpu"))
