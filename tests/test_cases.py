"""The scripts of the faults that people met, where they are at hand: each prints what it expected and observed, and FAIL."""

import subprocess
import sys

import pytest
from conftest import SHARED

from rcp.paths import PROJECT

CASES = sorted((SHARED / "cases").glob("*/case.py"))
MOVED = {
    "17": "rcp.plots, now reproduce.figures (tests/reproduce/test_figures.py)",
    "19": "rcp.batch, now reproduce.batch",
}


@pytest.mark.parametrize("case", CASES or [pytest.param(None, marks=pytest.mark.skip("cases/ is not at hand"))])
def test_a_fault_that_people_met_is_mended(case):
    if (number := case.parent.name[:2]) in MOVED:
        pytest.skip(f"{case.parent.name} imports {MOVED[number]}")
    ran = subprocess.run([sys.executable, str(case)], cwd=PROJECT, capture_output=True, text=True, check=False)
    print(f"\ncase {case.parent.name}: {ran.stdout.count('ok  ')} ok, {ran.stdout.count('FAIL')} FAIL")
    assert ran.returncode == 0 and "FAIL" not in ran.stdout, ran.stdout + ran.stderr
