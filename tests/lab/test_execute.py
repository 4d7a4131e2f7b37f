"""A notebook runs in this interpreter's kernel, wherever it is started; a failure is one line."""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from project import Project

from labcore import LabError
from labcore.lab import execute


@pytest.mark.parametrize(("name", "is_own"), [("short", True), ("long" * 30, False)])
def test_a_kernel_is_reached_by_sockets_in_a_folder_that_goes_with_it(name, is_own, monkeypatch):
    """A path of 107 bytes is the longest that Linux binds."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = Path(parent) / name
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with execute._connection() as reached, socket.socket(socket.AF_UNIX) as bound:
            assert (reached["transport"], folder in Path(reached["ip"]).parents) == ("ipc", is_own)
            bound.bind(f"{reached['ip']}-5")
        assert not Path(reached["ip"]).parent.exists() and not list(folder.iterdir())


def test_where_no_folder_holds_sockets_the_loopback_address_serves(monkeypatch):
    class Unbound(socket.socket):
        def bind(self, address):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", Unbound)
    with execute._connection() as reached:
        assert reached["transport"] == "tcp" and "ip" not in reached
    assert not Path(reached["connection_file"]).parent.exists()


@pytest.mark.parametrize(
    ("written", "shown"),
    [("\r 50%|██  |", "\r 50%|██  |\n"), ("\r 100%|████|\n", "\r 100%|████|\n"), ("", "")],
)
def test_what_follows_a_bar_begins_on_a_line_of_its_own(tmp_path, written, shown, capfd):
    with execute._live_progress(tmp_path / "log"), open(tmp_path / "log", "a", encoding="utf-8") as stream:
        stream.write(written)
    assert capfd.readouterr().err == shown


@pytest.fixture
def run(tmp_path):
    """A function that executes one cell of code and returns what it printed."""

    def run(code: str) -> str:
        cell, kernel = nbformat.v4.new_code_cell(code), {"name": "python3", "display_name": "Python 3"}
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
        source = tmp_path / "a.ipynb"
        nbformat.write(notebook, source)
        ran = execute.execute(source, tmp_path / "b.ipynb", {}, tmp_path / "log", tmp_path)
        return "".join(output["text"] for output in ran.cells[0].outputs)

    return run


@pytest.mark.slow
def test_another_kernel_of_that_name_and_a_long_tmpdir_do_not_matter(run, tmp_path, monkeypatch):
    foreign, long = tmp_path / "kernels/python3", tmp_path / ("long" * 30)
    for folder in (foreign, long):
        folder.mkdir(parents=True)
    spec = '{"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}'
    (foreign / "kernel.json").write_text(spec)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", "another")  # as a cluster's gateway has it
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert run("import sys\nprint(sys.prefix)").strip() == sys.prefix


@pytest.mark.slow
def test_a_kernel_that_does_not_start_is_one_line_with_the_cause(run, tmp_path, monkeypatch):
    (tmp_path / "ipykernel_launcher.py").write_text("import a_package_that_is_not_there")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        LabError, match=r"kernel of a\.ipynb did not start .*: No module named 'a_package_tha"
    ):
        run("1")


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Project:
    """A project in which one cell is left to run, and never ends."""
    project = Project.sources(tmp_path_factory.mktemp("endless") / "lab")
    project.stamp()
    project.edit_notebook("02_ptq", "code", lambda _: "open('started', 'w').close()\nwhile True: pass")
    return project


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_kernel_and_no_folder(endless, number, monkeypatch):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("nohup ignores this signal, and so do all processes that it starts")
    parent, started = Path(tempfile.mkdtemp(dir="/tmp")), endless.root / "started"
    started.unlink(missing_ok=True)
    monkeypatch.setenv("TMPDIR", str(parent))
    process = endless.start("report", "--profile", "smoke")
    while not started.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    result = endless.finish(process, 60)
    assert (result.returncode, result.stderr.splitlines()[-1][:18]) == (130, "stopped; run again"), result
    lines = (
        [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")] if os.path.isdir("/proc") else []
    )
    assert not list(parent.iterdir()) and not [line for line in lines if str(parent).encode() in line]
    shutil.rmtree(parent)
