"""Jupyter kernels that are forked from a process which has imported ``rcp`` already: seconds less a notebook, seventeen times a batch."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

NAME = "rcp-preloaded"  # as pyproject.toml registers it
MODULES = ["ipykernel.kernelapp", "rcp.batch", "rcp.plots", "rcp.views"]


@contextmanager
def kernels() -> Iterator[None]:
    """Within it every kernel that this process starts, with nbclient, papermill or nbval, is a forked one.

    Kernels start as ever where the system cannot fork, where the installed ``rcp`` does not know the provisioner, or where
    another one was chosen.
    """
    factory = KernelProvisionerFactory.instance()
    before = factory.default_provisioner_name
    known = entry_points(group=KernelProvisionerFactory.GROUP_NAME, name=NAME)
    if known and before == "local-provisioner" and "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.get_context("forkserver").set_forkserver_preload(MODULES)  # before the server's first start
        factory.default_provisioner_name = NAME
    try:
        yield
    finally:
        factory.default_provisioner_name = before


class Preloaded(LocalProvisioner):
    """Starts a kernel as a fork of multiprocessing's fork server, which has imported ``MODULES``."""

    async def launch_kernel(self, cmd: list[str], **kwargs) -> dict:
        arguments = cmd[cmd.index("-f") :]
        context = multiprocessing.get_context("forkserver")
        child = context.Process(target=_kernel, args=(arguments, kwargs["env"], kwargs.get("cwd")))
        child.start()
        self.process, self.pid, self.pgid = _Started(child), child.pid, None
        return self.connection_info


class _Started:
    """What a provisioner wants of ``subprocess.Popen``, of a ``multiprocessing`` process."""

    stdin = stdout = stderr = None

    def __init__(self, child: BaseProcess):
        self.child, self.pid = child, child.pid

    def poll(self) -> int | None:
        return self.child.exitcode

    def wait(self) -> int | None:
        self.child.join()
        return self.child.exitcode

    def send_signal(self, number: int) -> None:
        if self.child.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.child.kill()

    def terminate(self) -> None:
        self.child.terminate()


def _kernel(arguments: list[str], environment: dict[str, str], cwd: str | None) -> None:
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # Ctrl-C is for the batch; it ends its kernels
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd or ".")
    matplotlib.rcParams["backend"] = (
        "module://matplotlib_inline.backend_inline"  # it was imported before there was a kernel
    )
    with_parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # it ends when the fork server does
    quiet = "--log-level=CRITICAL"  # nbclient interrupts a kernel before it shuts it down, which some took for an error
    IPKernelApp.launch_instance(argv=[*arguments, with_parent, quiet])
