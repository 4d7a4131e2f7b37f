"""A copy of the project, in which tests run the whole lab on profile smoke."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat

from labcore.report import verify

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ["01_fp32_train", "02_ptq", "03_qat", "04_compare", "08_claims"]
STUDIES = ["05_observers", "06_mixed_precision", "07_training_study", "09_engines", "10_robustness"]
STAGES = ["fp32", "ptq", "qat", "compare", "claims"]


def _verify(root: Path, arguments: list[str], sender) -> None:
    os.chdir(root)
    modules = [module for name, module in sys.modules.items() if name.startswith("labcore.")]
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, Path) and value.is_relative_to(ROOT):
                setattr(module, name, root / value.relative_to(ROOT))
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = verify.main(arguments)
    sender.send((status, errors.getvalue()))


class Project:
    """A copy of the sources, with the command line run in it."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("labcore", "notebooks"):
            shutil.copytree(
                ROOT / folder,
                root / folder,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
        (root / "report").mkdir()
        for template in (ROOT / "report").glob("template*"):
            shutil.copy(template, root / "report")
        shutil.copy(ROOT / "README.md", root)

    @classmethod
    def copy(cls, other: "Project", root: Path) -> "Project":
        """Another project as it stands, with all that was run there, for one test to change."""
        shutil.copytree(other.root, root)
        return cls.at(root)

    @classmethod
    def at(cls, root: Path) -> "Project":
        """The project that lies there."""
        project = cls.__new__(cls)
        project.root = root
        return project

    def start(self, *arguments: str, module: str = "lab.pipeline") -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        command = [sys.executable, "-m", f"labcore.{module}", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen, timeout: int) -> subprocess.CompletedProcess:
        """Wait for what `start` gave; where it hangs, end it and all that it started."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, command: str = "report", *arguments: str) -> subprocess.CompletedProcess:
        return self.finish(
            self.start(command, "--profile", "smoke", *arguments), 1800
        )  # all studies take the longest

    def verify(self, *arguments: str) -> tuple[int, str]:
        """Status and stderr of labcore.verify in this project, in a fork of this process: what it imports is there already."""
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_verify, args=(self.root, ["--profile", "smoke", *arguments], sender)
        )
        with warnings.catch_warnings(
            action="ignore", category=DeprecationWarning
        ):  # this process has threads; they stay idle
            process.start()
        sender.close()
        with receiver:
            if not receiver.poll(300):
                process.kill()
                raise TimeoutError("labcore.verify took more than 300 s")
            answer = receiver.recv()
        process.join()
        return answer

    def verify_with_another_digit(self, name: str, pattern: str) -> tuple[int, str]:
        """Status and stderr of labcore.verify while the first digit that `pattern` finds in a file of the report is another."""
        path = self.root / "report/smoke" / name
        text = path.read_text(encoding="utf-8")
        digit = re.search(pattern, text)
        other = str((int(digit.group()) + 1) % 10)
        path.write_text(text[: digit.start()] + other + text[digit.end() :], encoding="utf-8")
        found = self.verify()
        path.write_text(text, encoding="utf-8")
        return found

    def metrics(self, stage: str) -> dict:
        return json.loads((self.root / f"runs/smoke/{stage}/metrics.json").read_text(encoding="utf-8"))

    def status(self, *arguments: str) -> dict[str, str]:
        result = self.run("status", *arguments)
        assert result.returncode == 0, result.stderr
        return dict(re.split(r"\s+", line, maxsplit=1) for line in result.stdout.splitlines())

    def report_status(self) -> dict[str, str]:
        """Of the report and the stages it needs; the studies never ran in most tests."""
        return {name: reason for name, reason in self.status().items() if name in [*STAGES, "report"]}

    def hashes(self, *folders: str) -> dict[str, str]:
        files = [
            path
            for folder in folders
            for path in sorted((self.root / folder).rglob("*"))
            if path.is_file() and ".stamp" not in path.name
        ]
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    def edit(self, name: str, change) -> None:
        path = self.root / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    def edit_notebook(self, name: str, kind: str, change) -> None:
        path = self.root / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        cell = next(
            cell
            for cell in notebook.cells
            if cell.cell_type == kind and "parameters" not in cell.metadata.get("tags", [])
        )
        cell.source = change(cell.source)
        nbformat.write(notebook, path)
