"""The two houses: the method does not know the paper's machinery."""

import ast
import subprocess
import sys
from pathlib import Path

RCP = Path(__file__).resolve().parents[1] / "rcp"


def test_rcp_imports_nothing_of_reproduce_and_fast_nothing_of_rcp():
    for file in RCP.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        names |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        assert not [name for name in names if name.partition(".")[0] == "reproduce"], file
        assert file.parent.name != "fast" or all(n.startswith("rcp.fast") for n in names if n.startswith("rcp")), file


def test_importing_rcp_needs_nothing_of_notebooks_and_tables():
    heavy = (
        "papermill", "seaborn", "pandas", "nbconvert", "nbformat", "jupyter_client", "IPython", "matplotlib", "reproduce",
    )  # fmt: skip
    code = f"import rcp, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
