"""Gives inputs of tests/mutations.py to the commands that read them, in this process, and watches.

Each must end in success, or with status 1 and lines that begin with "error: ": one of the lab, one for every
fault of verify. Nothing may be half-written, written elsewhere, or executed. Two thousand processes would
take hours: here a command ends where notebooks would begin, after at most a training of a second; pandoc and
Typst are left out. `Box.real` gives an input to a process of its own.
"""

import contextlib
import io
import os
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple
from unittest.mock import patch

import jinja2
import mutations
from project import Project

from labcore.files.artifacts import ROOT, read_json, sha256_file
from labcore.lab import __main__ as command_line
from labcore.lab import estimate, pipeline
from labcore.lab.parallel import train_stage
from labcore.lab.stale import State
from labcore.report import build, verify
from labcore.run import Run

SECONDS = 120  # of one input
PROGRESS = re.compile(r".*\d+%\||.* \d+image|note: |warning: ")


class Reached(Exception):
    """A command came as far as the notebooks."""


class Hangs(BaseException):
    """A command takes too long."""


class Outcome(NamedTuple):
    """What became of an input: the exit status, what was said, what is wrong with that."""

    kind: str
    arguments: list[str]
    status: int | str
    said: str
    faults: list[str]


def _stand_in(state: State, stage, reason: str) -> None:
    """Begin as notebook 01 does, where that takes a second."""
    run = Run(state.profile, state.source, state.seed, state.root, state.weights)
    recipe, is_small = run.profile.fp32, run.profile.width <= 64 and run.profile.processes < 2
    is_short = recipe.epochs * (recipe.epoch_images or len(run.split.train)) <= 256
    if stage.name == "fp32" and is_small and (state.reuses_weights or is_short):
        with patch.dict(os.environ, LAB_PROGRESS=os.devnull):
            train_stage(run, "fp32", run.fresh_model())
    raise Reached


class NoTrial(contextlib.nullcontext):
    """A pool of processes in which the trial of a training fails, so that none is started."""

    def submit(self, *arguments):
        raise BrokenProcessPool


class KnownImages(State):
    """A state of the committed networks, of whose images only the hash is known."""

    images = (read_json(ROOT / "report/cpu/results/fp32/provenance.json")["data"]["sha256"], "", "")


def _write(markdown: str, path: Path, root: Path) -> None:
    path.write_text(markdown, encoding="utf-8")


def _hang(*_):
    raise Hangs


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Give, once it is over, what was written to stderr, by libraries in C too."""
    said: list[str] = []
    with tempfile.TemporaryFile() as kept, warnings.catch_warnings():
        warnings.resetwarnings()  # to Python's own: what a user would see
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        saved, stdout = os.dup(2), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        os.dup2(kept.fileno(), 2)
        try:
            with (
                os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as stderr,
                contextlib.redirect_stderr(stderr),
                contextlib.redirect_stdout(stdout),
            ):
                yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            kept.seek(0)
            said.append(kept.read().decode(errors="replace"))


class Box:
    """A folder with a project in it, in which inputs are given to commands."""

    def __init__(self, folder: Path):
        self.folder, self.lab, self.given, self.home = (folder / n for n in ("", "lab", "given", "home"))
        Project.sources(self.lab)
        kept = Project.sources(folder / "kept").root
        with patch.object(build, "write_pdf", _write), patch.object(build, "write_html", _write):
            mutations.results_to_spoil(kept)

    def empty(self) -> None:
        """Leave the sources and the results that an input may spoil."""
        for name in ("lab/runs", "lab/data", "lab/figures", "lab/report/cpu", "given", "home"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.given.mkdir()
        self.home.mkdir()
        for part in ("report/cpu", "figures"):
            shutil.copytree(self.folder / "kept" / part, self.lab / part)

    def give(self, kind: str, seed: str) -> Outcome:
        """Give the input of a kind that follows from a seed to its command, in this process."""
        self.empty()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two members of one name, and of NaN
            arguments = mutations.KIND[kind](Random(seed), self.lab if kind == "results" else self.given)
        before = self._unlisted()
        status, said = self._run(arguments)
        faults = self._faults(arguments, status, said)
        if broken := self._unlisted() - before:
            faults.append(f"half-written: {', '.join(sorted(broken))}")
        return Outcome(kind, arguments, status, said, faults)

    def _run(self, arguments: list[str]) -> tuple[int | str, str]:
        """Run a command; return its exit status, or how far it came, and what it said on stderr."""
        state = KnownImages if arguments[0] == "restore" else State
        replaced = (
            (command_line, "State", partial(state, root=self.lab)),
            (pipeline, "_execute", _stand_in),
            (estimate, "ProcessPoolExecutor", lambda *_: NoTrial()),
            (verify, "verify", partial(verify.verify, root=self.lab)),
            (verify, "write_again", partial(verify.write_again, root=self.lab)),
            (build, "write_pdf", _write),
            (build, "write_html", _write),
            (jinja2.Environment, "compile", cache(jinja2.Environment.compile)),
        )
        with contextlib.ExitStack() as stack:
            for target, name, value in replaced:
                stack.enter_context(patch.object(target, name, value))
            stack.enter_context(patch.dict(os.environ, HOME=str(self.home), TMPDIR=str(self.home)))
            stack.enter_context(contextlib.chdir(self.home))
            said = stack.enter_context(_captured())
            stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _hang))
            signal.alarm(SECONDS)
            try:
                if arguments[0] == "verify":
                    status = verify.main(arguments[1:])
                else:
                    status = command_line.main(arguments)
            except Reached:
                status = "reached"
            except (Exception, SystemExit, Hangs):
                status = "raised"
                traceback.print_exc()
            finally:
                signal.alarm(0)
        return status, said[0]

    def _unlisted(self) -> set[str]:
        """The results that run.json lists with another hash: one was written without the other."""
        results = self.lab / "report/cpu/results"
        with contextlib.suppress(Exception):
            listed = read_json(results / "run.json")["files"].items()
            return {name for name, digest in listed if sha256_file(results / name) != digest}
        return set()

    def _faults(self, arguments: list[str], status: int | str, said: str) -> list[str]:
        lines = [line for line in said.splitlines() if line.strip()]
        lines = [line for line in lines if line.startswith("error: ") or not PROGRESS.match(line)]
        faults = [] if status in (0, 1, "reached") else [f"{status}"]
        is_one = len(lines) == (status == 1) or status == 1 and lines and arguments[0] == "verify"
        if not is_one or any(line[:7] != "error: " for line in lines):
            faults.append("not one line of error")
        elif max(map(len, lines), default=0) > 20_000:
            faults.append("a line without an end")
        written = {path.name for path in self.folder.iterdir()} - {"lab", "given", "home", "kept"}
        written |= {path.name for path in self.home.rglob("*")}
        for pattern in ("pwned*", "*.part", ".verify-*"):
            written |= {path.name for path in self.folder.rglob(pattern)}
        written -= {"torchinductor_root"}
        return faults + ([f"written: {', '.join(sorted(written))}"] if written else [])

    def real(self, outcome: Outcome) -> list[str]:
        """What is wrong where a process of its own gets the input that was given last, and refused."""
        command, *arguments = outcome.arguments
        module = "labcore.report.verify" if command == "verify" else "labcore.lab"
        options = arguments if command == "verify" else outcome.arguments
        with patch.dict(os.environ, TMPDIR=str(self.home)):
            result = Project.finish(Project(self.lab).start(*options, module=module), SECONDS)
        return [
            f"as a process: {fault}"
            for fault in self._faults(outcome.arguments, result.returncode, result.stderr)
        ]


def fuzz(part: int, count: int, seed: int, folder: Path, parts: int = 1, processes: int = 0) -> list[Outcome]:
    """Give one of so many parts of `count` inputs, of all kinds in turn; some to a process of its own too."""
    box, done = Box(folder / f"box{part}"), []
    for number in range(part, count, parts):
        kind = list(mutations.KIND)[number // parts % len(mutations.KIND)]
        outcome = box.give(kind, f"{seed} {number}")
        if outcome.status == 1 and processes and outcome.arguments[0] != "restore":
            processes -= 1
            outcome.faults.extend(box.real(outcome))
        if outcome.faults:
            told = f"{kind} {seed} {number}: {'; '.join(outcome.faults)}"
            print(told, ascii(outcome.arguments)[:500], outcome.said[-1500:], sep="\n  ", flush=True)
        done.append(outcome)
    return done
