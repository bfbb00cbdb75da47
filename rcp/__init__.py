"""rcp: ReConPatch (WACV 2024), reproducible from a notebook."""

__version__ = "0.1.0"

__all__ = ["Config", "PatchCore", "ReConPatch", "__version__"]

from rcp.config import Config
from rcp.detector import PatchCore, ReConPatch
