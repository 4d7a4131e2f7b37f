"""A copy of the project, in which tests run the lab on profile smoke."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
from processes import end_with_tests

from labcore.files.artifacts import write_json
from labcore.lab.stale import STAGES, State

ROOT = Path(__file__).resolve().parent.parent
REPORT = ["fp32", "ptq", "qat", "compare", "explore", "claims"]  # the stages of make report
NOTEBOOKS = [stage.notebook for stage in STAGES if stage.name in REPORT]
STUDIES = [stage.notebook for stage in STAGES if stage.name not in REPORT]


def lab_options() -> list[str]:
    """What make lab gives to JupyterLab."""
    commands = subprocess.run(["make", "--dry-run", "lab"], cwd=ROOT, capture_output=True, text=True).stdout
    (line,) = (line for line in commands.splitlines() if "jupyter lab" in line)
    return line.split("jupyter lab")[1].split()


class Project:
    """A copy of the sources, with the command line run in it."""

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def sources(cls, root: Path) -> "Project":
        """A project in which nothing was run."""
        for folder in ("labcore", "notebooks"):
            skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / folder, root / folder, ignore=skip)
        (root / "report").mkdir()
        for template in (ROOT / "report").glob("template*"):
            shutil.copy(template, root / "report")
        return cls(root)

    def copy(self, root: Path) -> "Project":
        """Another project as this one stands, with all that was run, for one test to change."""
        shutil.copytree(self.root, root)
        return Project(root)

    def start(self, *arguments: str, module: str = "labcore.lab") -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_tests,
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
        # All studies take the longest.
        return self.finish(self.start(command, "--profile", "smoke", *arguments), 1800)

    def state(self, *arguments, **options) -> State:
        return State("smoke", *arguments, root=self.root, **options)

    def stamp(self) -> None:
        """Make every stage and the report look as if they had just run, and had written nothing."""
        state = self.state()
        facts = {"outputs": {}, "wall_seconds": 0}
        for stage in STAGES:
            made = {"inputs": state.inputs(stage), "prose": state.prose(stage)}
            write_json(state.stamp_path(stage.name), facts | made)
        write_json(state.stamp_path("report"), facts | {"inputs": state.report_inputs()})

    def stale(self, *arguments, **options) -> dict[str, str]:
        """What of make report is stale, and why."""
        reasons = self.state(*arguments, **options).status()
        return {name: why for name, why in reasons.items() if why and name in [*REPORT, "report"]}

    def verify(self) -> list[str]:
        from labcore.report.verify import verify  # takes a second

        return verify("smoke", root=self.root)

    def verify_with_another_digit(self, name: str, pattern: str) -> list[str]:
        """What verify finds while the first digit that `pattern` finds in a file of the report is another."""
        path = self.root / "report/smoke" / name
        text = path.read_text(encoding="utf-8")
        digit = re.search(pattern, text)
        other = str((int(digit.group()) + 1) % 10)
        path.write_text(text[: digit.start()] + other + text[digit.end() :], encoding="utf-8")
        faults = self.verify()
        path.write_text(text, encoding="utf-8")
        return faults

    def metrics(self, stage: str) -> dict:
        return json.loads((self.root / f"runs/smoke/{stage}/metrics.json").read_text(encoding="utf-8"))

    def page(self) -> str:
        return (self.root / "report/smoke/report.md").read_text(encoding="utf-8")

    def executed(self, notebook: str) -> nbformat.NotebookNode:
        return nbformat.read(self.root / f"report/smoke/notebooks/{notebook}.ipynb", as_version=4)

    def hashes(self, *folders: str) -> dict[str, str]:
        files = [path for folder in folders for path in sorted((self.root / folder).rglob("*"))]
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file() and ".stamp" not in path.name and "__pycache__" not in path.parts
        }

    def edit(self, name: str, change) -> None:
        path = self.root / name
        before = path.read_text(encoding="utf-8")
        after = change(before)
        assert after != before
        path.write_text(after, encoding="utf-8")

    def edit_notebook(self, name: str, kind: str, change) -> None:
        """Change the first cell of a kind that holds no parameters."""
        path = self.root / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell = next(cell for cell in notebook.cells if cell.cell_type == kind and cell not in tagged)
        cell.source = change(cell.source)
        nbformat.write(notebook, path)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def was_run(notebook: nbformat.NotebookNode) -> bool:
    """Whether every cell was run, in order and without error."""
    code = code_cells(notebook)
    errors = [output for cell in code for output in cell.outputs if output.output_type == "error"]
    return not errors and [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
