"""Forked kernels are kernels: their own environment and folder, figures, interrupts; and where they cannot be had, ordinary ones."""

import os
import time

import nbformat
import pytest
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from rcp import preloaded


def executed(*sources: str, **how) -> list:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", **how).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture(autouse=True)
def _none_chosen(monkeypatch):
    """As if the session had not chosen its kernels already (conftest.py)."""
    monkeypatch.setattr(KernelProvisionerFactory.instance(), "default_provisioner_name", "local-provisioner")


WHAT = "import sys, os\nprint('rcp.plots' in sys.modules, os.getpid(), os.getcwd(), os.environ.get('OWN'))"


def test_a_kernel_has_imported_rcp_and_has_its_own_folder_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OWN", "mine")
    figure = (
        "import matplotlib.pyplot as plt\nfigure, axis = plt.subplots()\naxis.plot([1, 2])\nplt.close(figure)\nfigure"
    )
    with preloaded.kernels():
        (said,), drawn = executed(WHAT, figure, resources={"metadata": {"path": str(tmp_path)}})
    there, pid, folder, own = said.text.split()
    assert (there, folder, own) == ("True", str(tmp_path), "mine") and int(pid) != os.getpid()
    assert "image/png" in drawn[0].data
    until = time.monotonic() + 20
    while time.monotonic() < until and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}"), "it ends with its notebook"


def test_a_failing_and_an_endless_cell_end_as_in_any_kernel():
    with preloaded.kernels():
        with pytest.raises(CellExecutionError, match="the reason"):
            executed("raise ValueError('the reason')")
        with pytest.raises(CellTimeoutError):
            executed("while True: pass", timeout=2)


@pytest.mark.parametrize("why", ["not registered", "another chosen"])
def test_kernels_are_ordinary_where_forked_ones_are_not_to_be_had(why, monkeypatch):
    factory = KernelProvisionerFactory.instance()
    if why == "not registered":
        monkeypatch.setattr(preloaded, "entry_points", lambda **_: [])
    else:
        monkeypatch.setitem(factory.provisioners, "another", factory.provisioners["local-provisioner"])
        monkeypatch.setattr(factory, "default_provisioner_name", "another")
    with preloaded.kernels():
        ((said,),) = executed(WHAT)
    assert said.text.startswith("False")
    assert factory.default_provisioner_name == ("another" if why == "another chosen" else "local-provisioner")
