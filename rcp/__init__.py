"""rcp: ReConPatch (WACV 2024), the method, thin and readable. The paper's tables and figures are in :mod:`reproduce`."""

__version__ = "0.1.0"

__all__ = ["Config", "PatchCore", "ReConPatch", "__version__", "train"]

import os

# Threads that wait for work give their core away; torch reads it when it is imported. On two cores that another process keeps busy,
# bottle's fit took 124 s without and 28 s with it; 17 s idle, either way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rcp.config import Config
from rcp.detector import PatchCore, ReConPatch
from rcp.model import train
