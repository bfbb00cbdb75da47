"""Code lines of the project's folders: no blank lines, comments or docstrings. Prints each file's with ``-v``."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"rcp": 3522, "reproduce": 3672, "tests": 6776}


def code_lines(file: Path) -> int:
    text = file.read_text()
    said = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                said |= set(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(s.strip()) and not s.strip().startswith("#") and i not in said for i, s in lines)


def of_folder(name: str) -> dict[str, int]:
    return {str(f.relative_to(ROOT)): code_lines(f) for f in sorted((ROOT / name).rglob("*.py"))}


if __name__ == "__main__":
    for name, limit in LIMITS.items():
        files = of_folder(name)
        if "-v" in sys.argv:
            print("\n".join(f"{n:6,} {file}" for file, n in files.items()))
        print(f"{name}: {sum(files.values()):,} code lines in {len(files)} files (at most {limit:,})")
