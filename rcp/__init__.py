"""rcp: ReConPatch (WACV 2024), the method, thin and readable. The paper's tables and figures are in :mod:`reproduce`."""

__version__ = "0.1.0"

__all__ = ["Config", "PatchCore", "ReConPatch", "__version__", "train"]

from rcp.config import Config
from rcp.detector import PatchCore, ReConPatch
from rcp.model import train
