"""Resident memory over many cycles of build, fit and predict, and over entries of a grid, each kind in a process of its own."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from alone import alone, held
from common import write

from rcp import Config, PatchCore, ReConPatch
from rcp.data import load_dataset
from reproduce.demo import draw_demo
from reproduce.entries import Entry
from reproduce.notebook import environment
from reproduce.run import run
from reproduce.store import Store

SMALL = {
    "resize": 64,
    "image_size": 64,
    "dim": 64,
    "coreset_ratio": 0.1,
    "epochs": 1,
    "batch_size": 64,
    "device": "cpu",
}
REFINE = {"channels": 8, "epochs": 1, "kind": "structure"}
KINDS = {
    "PatchCore, ResNet-18": ("resnet18", PatchCore, {}),
    "ReConPatch, ResNet-18": ("resnet18", ReConPatch, {}),
    "ReConPatch with refinement, ResNet-18": ("resnet18", ReConPatch, {"refine": REFINE}),
    "entries of a grid, ResNet-18": ("resnet18", None, {}),
    "PatchCore, WideResNet-50": ("wide_resnet50_2", PatchCore, {}),
    "entries of a grid, WideResNet-50": ("wide_resnet50_2", None, {}),
}


def cycles(kind: str, folder: str, number: int) -> list[float]:
    """MiB that are resident after each cycle; an entry of a grid is of a new seed each."""
    backbone, cls, how = KINDS[kind]
    data, store, seen = load_dataset(folder, category="gear"), Store(Path(folder).parent / kind), []
    for i in range(number):
        cnn = SMALL | {"backbone": backbone, "weights": f"random:{i}"}
        if cls is None:
            run(Entry(Config(**cnn, seed=i), folder, "gear"), store, len)
        else:
            cls(**cnn, **how).fit(data.train[:4], log=len).predict(data.test[:4])
        seen.append(held().resident / 2**20)
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        demo = str(draw_demo(Path(folder) / "demo", train=4, good=2, per_defect=1))
        for kind in options.kinds:
            seen, _ = alone(partial(cycles, kind, demo, options.cycles))
            a_cycle = (seen[-1] - seen[9]) / (options.cycles - 10)
            rows.append([kind, f"{seen[9]:,.0f}", f"{seen[-1]:,.0f}", f"{max(seen):,.0f}", f"{a_cycle:+.2f}"])
            print(*rows[-1], flush=True)
    header = ["what", "resident after 10, MiB", f"after {options.cycles}", "most", "MiB a cycle since the tenth"]
    write("cycles", f"{options.cycles} cycles of build, fit and predict", header, rows, f"{environment('cpu')}")
