"""Seconds per stage: of a whole job, and of one inference (Table S6)."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch

from rcp.patches import pictures_at_a_time
from rcp.scoring import image_scores, score_maps


class Timings(dict):
    """Stage -> seconds. ``with timings("coreset"): ...`` adds to a stage; waits for the GPU where there is one."""

    @contextmanager
    def __call__(self, stage: str):
        _wait()
        started = time.perf_counter()
        try:
            yield
        finally:
            _wait()
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - started


def _wait():
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def inference(detector, pictures: np.ndarray, warm_ups: int = 10, iterations: int = 30) -> dict[str, np.ndarray]:
    """Stage -> (iterations,) seconds of one pass over a batch: backbone, features, f, search, map (Table S6), and all of them.

    As ``predict`` does it: a few pictures at a time where that is faster. Measured by CUDA events on a GPU. Decoding is
    left out; the pictures' way to the GPU is in "backbone", the maps' way back in "map".

    Args:
        detector: fitted.
        pictures: (n, S, S, 3) uint8, one batch.
    """
    c, extractor = detector.config, detector.extractor
    stages = {
        "backbone": extractor.maps,
        "features": extractor.patches,
        "f": detector.represent_patches,
        "search": detector.score_patches,
        "map": lambda s: (image_scores(s.flatten(1)).cpu(), score_maps(s, c.image_size, c.blur)),
    }
    size = pictures_at_a_time(detector.device)
    mark, between = _clock(detector.device)
    seconds = np.zeros((warm_ups + iterations, 1 + len(stages)))
    for row in seconds:
        marks = []
        for start in range(0, len(pictures), size):
            value = pictures[start : start + size]
            part = [mark()]
            for stage in stages.values():
                value = stage(value)
                part.append(mark())
            marks.append(part)
        row[0] = between(marks[0][0], marks[-1][-1])
        for part in marks:
            row[1:] += [between(a, b) for a, b in pairwise(part)]
    return dict(zip(["all", *stages], seconds[warm_ups:].T, strict=True))


def _clock(device: torch.device) -> tuple[Callable, Callable]:
    """-> (marks a moment, seconds between two of them)."""
    if device.type != "cuda":
        return time.perf_counter, lambda a, b: b - a

    def mark():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(a, b):
        b.synchronize()
        return a.elapsed_time(b) / 1e3

    return mark, between
