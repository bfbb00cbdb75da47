"""Where data, weights and runs (tables and figures too) live: an argument, else an environment variable, else a folder of the project."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = Path(__file__).resolve().parent


def _root(argument: str | Path | None, variable: str, default: Path) -> Path:
    return Path(argument or os.environ.get(variable) or default).expanduser().absolute()


def data_root(argument: str | Path | None = None) -> Path:
    """Folder of data sets, one sub-folder each (``RCP_DATA``, default ``data/``)."""
    return _root(argument, "RCP_DATA", PROJECT / "data")


def weights_root(argument: str | Path | None = None) -> Path:
    """Folder that weights given by tag are kept in (``RCP_WEIGHTS``, default torch.hub's own)."""
    import torch

    return _root(argument, "RCP_WEIGHTS", Path(torch.hub.get_dir()) / "checkpoints")


def runs_root(argument: str | Path | None = None) -> Path:
    """Folder of the store and of executed notebooks (``RCP_RUNS``, default ``runs/``)."""
    return _root(argument, "RCP_RUNS", PROJECT / "runs")
