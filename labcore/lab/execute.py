"""A notebook becomes an executed one, in a file that differs only where results do."""

import contextlib
import copy
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config
from zmq import ZMQError

from labcore import LabError, nearest
from labcore.files.artifacts import ROOT, room_for, write_text
from labcore.files.processes import is_running


class OwnKernel(AsyncKernelManager):
    """Starts the kernel of this interpreter, whatever is installed elsewhere under its name."""

    newest: "OwnKernel | None" = None

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return how this interpreter starts a kernel, on this machine."""
        here = {"kernel_provisioner": {"provisioner_name": "local-provisioner"}}
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, language="python", metadata=here)

    async def start_kernel(self, **options) -> None:
        """Start it, to be found again by `kill` where it is stopped before it answers."""
        OwnKernel.newest = self
        await super().start_kernel(**options)

    @classmethod
    def kill(cls) -> None:
        """End the newest kernel where it still runs."""
        process = getattr(getattr(cls.newest, "provisioner", None), "process", None)
        if process:
            process.kill()
            process.wait()


def execute(
    source: Path, partial: Path, parameters: dict, log: Path, root: Path = ROOT
) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel and return it executed.

    `partial` is what remains when it fails, `log` gets the progress bars, the kernel works in `root`.

    Raises LabError: that of the notebook as it is, or a line with the cell or kernel, the error, the file.
    """
    accepted = papermill.inspect_notebook(source)
    for name in parameters:
        if name not in accepted:  # papermill itself would only warn
            raise LabError(f"{source.name} takes no parameter {name!r}: {nearest(name, accepted)}")
    see = f"see {partial.relative_to(root) if partial.is_relative_to(root) else partial}."
    try:
        with _live_progress(log), _connection() as connection, room_for(partial, partial):
            papermill.execute_notebook(
                source,
                partial,
                parameters=parameters,
                kernel_name="python3",
                cwd=root,
                progress_bar=False,
                coalesce_streams=True,
                start_timeout=120,
                kernel_manager_class=OwnKernel,
                config=Config({"OwnKernel": connection}),
            )
    except PapermillExecutionError as error:
        if error.ename == "LabError":
            raise LabError(error.evalue) from error
        raise LabError(
            f"{source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; {see}"
        ) from error
    except DeadKernelError as error:
        raise LabError(
            f"the kernel of {source.name} was killed (out of memory?); "
            f"run again to go on from the last epoch; {see}"
        ) from error
    except (RuntimeError, ZMQError) as error:
        lines = _kernel_log(log).read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip() and str(error) not in line] or ["it said nothing"]
        raise LabError(
            f"the kernel of {source.name} did not start with {sys.executable}: {said[-1]} ({error}); "
            f"mend that, or install requirements.txt there again; see {_kernel_log(log)}."
        ) from error
    notebook = nbformat.read(partial, as_version=4)
    if any(cell.source.strip() and cell.execution_count is None for cell in _code_cells(notebook)):
        raise LabError(f"some cells of {source.name} were not run (was its kernel killed?); run again; {see}")
    return notebook


def write_executed(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Write an executed notebook without what differs for no reason: times, durations, warnings' paths."""
    tidy = copy.deepcopy(notebook)
    tidy.metadata = {"kernelspec": tidy.metadata["kernelspec"], "language_info": {"name": "python"}}
    for number, cell in enumerate(tidy.cells):
        cell["id"] = f"cell-{number:02d}"
        tags = _tags(cell)
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    write_text(path, nbformat.writes(tidy) + "\n")


def with_new_prose(source: Path, executed: Path) -> nbformat.NotebookNode:
    """Return the new prose around the outputs of the last run; the code cells must be the same."""
    old, fresh = nbformat.read(executed, as_version=4), nbformat.read(source, as_version=4)
    injected = [cell for cell in old.cells if "injected-parameters" in _tags(cell)]
    run = iter([cell for cell in _code_cells(old) if cell not in injected])
    old.cells = []
    for cell in fresh.cells:
        old.cells.append(next(run) if cell.cell_type == "code" else cell)
        if "parameters" in _tags(cell):
            old.cells += injected
    return old


@contextlib.contextmanager
def _connection() -> Iterator[dict]:
    """Yield how to reach a kernel: by sockets in a folder, so that no port is open, else by the loopback.

    A socket's path has room for about 100 bytes, which TMPDIR may exceed; some file systems hold no sockets.
    """
    reached = {"transport": "tcp"}
    with contextlib.ExitStack() as stack:
        for parent in (tempfile.gettempdir(), "/tmp"):
            with contextlib.suppress(OSError):
                for left in Path(parent).glob("lab-*-*"):  # by a run that was killed
                    if not is_running(left.name.split("-")[1]):
                        shutil.rmtree(left, ignore_errors=True)
                prefix = f"lab-{os.getpid()}-"
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=parent))
                reached["connection_file"] = f"{folder}/kernel.json"
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.bind(f"{folder}/kernel-probe")
                reached |= {"transport": "ipc", "ip": f"{folder}/kernel"}
                break
        stack.callback(OwnKernel.kill)
        yield reached


def _kernel_log(log: Path) -> Path:
    """Return the file beside `log` for what the kernel says."""
    return log.with_name("kernel.log")


def _code_cells(notebook: nbformat.NotebookNode) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


@contextlib.contextmanager
def _live_progress(log: Path):
    """Copy to the terminal what progress bars write to `log`; what the kernel says goes to kernel.log."""
    log.write_text("", encoding="utf-8")
    done, terminal = threading.Event(), os.dup(2)

    def copy_progress():
        last = b"\n"
        with open(log, "rb") as stream:
            while True:
                finished = done.is_set()
                content = stream.read()
                if content:
                    os.write(terminal, content)
                    last = content
                elif finished:
                    break
                else:
                    done.wait(0.2)
        if not last.endswith(b"\n"):  # a bar of a kernel that was killed
            os.write(terminal, b"\n")

    os.environ["LAB_PROGRESS"] = str(log)
    if os.isatty(terminal):
        os.environ["LAB_TERMINAL"] = "1"
    thread = threading.Thread(target=copy_progress, daemon=True)
    thread.start()
    with open(_kernel_log(log), "w", encoding="utf-8") as kernel_log:
        os.dup2(kernel_log.fileno(), 2)  # the kernel inherits this
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        done.set()
        thread.join()
        os.close(terminal)
        os.environ.pop("LAB_PROGRESS", None)
        os.environ.pop("LAB_TERMINAL", None)
