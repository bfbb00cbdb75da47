"""Seconds per stage."""

import time
from contextlib import contextmanager

import torch


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
