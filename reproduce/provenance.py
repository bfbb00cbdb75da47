"""Where a result comes from: the code of the modules that made it, found by reading what they import; versions, commit, device."""

import ast
import hashlib
import importlib.metadata
import io
import platform
import subprocess
import tokenize
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from rcp.config import STAGES
from rcp.files import stamp
from rcp.paths import PROJECT

ROOT = Path(__file__).resolve().parents[1]  # of both packages

# The modules whose functions make a stage's result; what they import is found, not listed.
MODULES = {
    "features": ("rcp.data.layouts", "rcp.patches"), "training": ("rcp.model",), "bank": ("rcp.coreset",),
    "scores": ("rcp.detector", "rcp.metrics"),
}  # fmt: skip
# Declarations and messages: the values of hyper-parameters are in an identity by themselves.
NO_CODE = ("rcp.checks", "rcp.config", "rcp.paths", "rcp.progress")


class ChangedCode(ValueError):
    """Code on the disk is no longer what this Python has loaded."""


# The text as this Python may have loaded it, and the file's stamp: another text on the disk is not what computes here.
_FILES = (f for name in ("rcp", "reproduce") for f in (ROOT / name).rglob("[!.]*.py"))
LOADED = {f: (f.read_text(encoding="utf-8"), stamp(f)) for f in _FILES if "/." not in str(f.relative_to(ROOT))}


def code_upto(stage: str, root: Path = ROOT) -> str:
    """Hash of all code that a stage's result comes from, that of the stages before it included. root: holds ``rcp/``."""
    return code_of(*(m for s in STAGES[: STAGES.index(stage) + 1] for m in MODULES[s]), root=root)


def code_of(*modules: str, root: Path = ROOT, alone: bool = False) -> str:
    """Hash of these modules' code and of all that they import of rcp and reproduce, without comments, docstrings and blank lines.

    alone: without what they import.

    Raises:
        ChangedCode: restart the kernel.
    """
    for file in _files_of(*modules, root=root, alone=alone):
        if file in LOADED and stamp(file) != LOADED[file][1]:
            with suppress(SyntaxError, tokenize.TokenError, ValueError):  # saved by half
                if _code(file.read_text(encoding="utf-8")) == _code(LOADED[file][0]):
                    LOADED[file] = LOADED[file][0], stamp(file)
            if stamp(file) != LOADED[file][1]:
                raise ChangedCode(f"{file} is no longer the code that this Python has loaded: restart the kernel")
    return _code_of(*modules, root=root, alone=alone)


@cache
def _code_of(*modules: str, root: Path, alone: bool) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for module in sorted(modules if alone else closure(modules, root)):
        digest.update(f"{module}\n{_code(_file(module, root).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


@cache
def _files_of(*modules: str, root: Path, alone: bool) -> list[Path]:
    return [_file(module, root) for module in (modules if alone else closure(modules, root))]


def closure(modules, root: Path = ROOT) -> set[str]:
    """Names of the modules, and of those of rcp and reproduce that they import anywhere in their text, and so on."""
    found, left = set(), list(modules)
    while left:
        if (module := left.pop()) not in found and module not in NO_CODE:
            found.add(module)
            left += _imports(_file(module, root), root)
    return found


def _imports(file: Path, root: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if _file(name, root) else node.module for name in names]
    return [name for name in found if name.startswith(("rcp.", "reproduce.")) and _file(name, root)]


def _file(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def _code(text: str) -> str:
    """The text without docstrings, comments and blank lines; another version of Python gives the same."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]].rstrip()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            said = node.body[0]
            lines[said.lineno - 1 : said.end_lineno] = [""] * (said.end_lineno - said.lineno + 1)
    return "\n".join(line for line in lines if line.strip())


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@cache
def versions() -> dict[str, str]:
    """Versions of Python, rcp and the packages that results depend on."""
    packages = ("rcp", "torch", "torchvision", "timm", "faiss-gpu", "adamp", "scikit-learn", "numpy")
    return {"python": platform.python_version()} | {package: version_of(package) for package in packages}


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@cache
def commit() -> str:
    """The project's commit, with "+" where the working tree differs from it, or a bundle's; "unknown" outside a checkout."""
    if (ROOT / "COMMIT").is_file():
        return (ROOT / "COMMIT").read_text(encoding="utf-8")
    try:
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
