"""A notebook becomes an executed one, in a file that differs only where results do."""

import contextlib
import copy
import os
import tempfile
import threading
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from labcore import LabError, nearest
from labcore.files.artifacts import ROOT, atomic_path


def execute(
    source: Path, partial: Path, parameters: dict, log: Path, root: Path = ROOT
) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel and return it executed.

    `partial` is what remains when it fails, `log` gets the progress bars, the kernel works in `root`.

    Raises LabError: that of the notebook as it is, or a line with the cell, the error, the file.
    """
    accepted = papermill.inspect_notebook(source)
    for name in parameters:
        if name not in accepted:  # papermill itself would only warn
            raise LabError(f"{source.name} takes no parameter {name!r}: {nearest(name, accepted)}")
    see = f"see {partial.relative_to(root) if partial.is_relative_to(root) else partial}."
    try:
        with _live_progress(log), tempfile.TemporaryDirectory(prefix="lab-") as sockets:
            papermill.execute_notebook(
                source,
                partial,
                parameters=parameters,
                kernel_name="python3",
                cwd=root,
                progress_bar=False,
                coalesce_streams=True,
                start_timeout=120,
                # No open ports.
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
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
    with atomic_path(path) as partial:
        nbformat.write(tidy, partial)


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
        with open(log, "rb") as stream:
            while True:
                finished = done.is_set()
                content = stream.read()
                if content:
                    os.write(terminal, content)
                elif finished:
                    return
                else:
                    done.wait(0.2)

    os.environ["LAB_PROGRESS"] = str(log)
    if os.isatty(terminal):
        os.environ["LAB_TERMINAL"] = "1"
    thread = threading.Thread(target=copy_progress, daemon=True)
    thread.start()
    with open(log.with_name("kernel.log"), "w", encoding="utf-8") as kernel_log:
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
