"""What the benchmarks share: arguments, peak memory per stage, Markdown."""

import argparse
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from rcp.detector import Timings

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, help="folder that holds the categories")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", required=True, help="a tag, a file, or random:SEED")
    return parser


class WatchedTimings(Timings):
    """Timings that also keep the highest resident memory seen during each stage, in bytes, in ``peak``."""

    def __init__(self):
        super().__init__()
        self.peak: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str):
        process, over = psutil.Process(), threading.Event()

        def watch():
            while not over.is_set():
                self.peak[stage] = max(self.peak.get(stage, 0), process.memory_info().rss)
                time.sleep(0.005)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            with super().__call__(stage):
                yield
        finally:
            over.set()
            watcher.join()


def write(name: str, title: str, header: list[str], rows: list[list], notes: str) -> None:
    """Prints a Markdown table and keeps it in ``results/NAME.md``."""
    lines = [f"# {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]
    text = "\n".join([*lines, "", notes, ""])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
