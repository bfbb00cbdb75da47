"""Quick twins of plain functions of :mod:`rcp`, behind one door: :func:`usable`.

Each twin gives what its plain form gives (``tests/rcp/test_twins.py``) and states what it gains. Nothing here imports the rest of rcp.
``RCP_FAST=0`` in the environment gives the plain method everywhere.
"""

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger("rcp")


def usable() -> bool:
    """Whether the quick twins are to be used: unless ``RCP_FAST=0``."""
    return os.environ.get("RCP_FAST", "1") != "0"


def captured(step: Callable, state: Sequence[Tensor], inputs: Sequence[Tensor] = (), *, what: str) -> Callable:
    """``step(*inputs)`` as one CUDA graph with the same results; or ``step`` itself, with a notice, where it cannot be captured.

    Args:
        step: runs on the device without waiting for it.
        state: all tensors that it changes in place; they are reset, so that the trial run and the capture leave no trace.
        inputs: examples; each call's are copied into them.
        what: is captured, for the notice.

    Returns:
        What is called like ``step``; its outputs are overwritten by the next call.
    """
    before = [t.detach().clone() for t in state]
    graph, outputs, replay = torch.cuda.CUDAGraph(), None, step
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(*inputs)  # one warm-up only: a table of per-step values may have room for no more steps
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = step(*inputs)

        def replay(*arguments: Tensor):
            for held, given in zip(inputs, arguments, strict=True):
                held.copy_(given)
            graph.replay()
            return outputs

    except RuntimeError as error:
        logger.warning("%s: no CUDA graph (%s); every step is launched by itself", what, error)
    with torch.no_grad():
        for t, value in zip(state, before, strict=True):
            t.copy_(value)
    return replay
