"""One trained network on the engines that people deploy: what each answers, how fast, in how much memory.

Every engine runs in a process of its own (worker.py), on a file that files.py writes. In each round every
engine has its turn, in an order drawn anew: a slow moment of the machine hits all of them alike.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from labcore import LabError
from labcore.engines.worker import BATCH
from labcore.files.artifacts import ROOT
from labcore.files.progress import progress
from labcore.stats import summarize

# The numbers of a network: files.py says where they come from.
FP32, POWER2, FLOAT, OWN = "FP32", "INT8, power of two", "INT8, float scales", "INT8, its own scales"
BEST = "INT8, recommended"
DOT = " · "  # between an engine's name and its numbers
SECONDS = 1200  # that a worker may take for one answer; Inductor's first compilation is the longest


class Engine(NamedTuple):
    """A network on an engine."""

    name: str  # what readers see
    numbers: str  # FP32, POWER2, FLOAT, OWN or BEST
    kind: str  # the function of labcore.engines.worker that loads it
    file: str  # one of those that labcore.engines.files writes
    options: dict = {}  # for that function

    @property
    def title(self) -> str:
        """Name and numbers: what tells it from all others."""
        return f"{self.name}{DOT}{self.numbers}"


def parts(title: str) -> tuple[str, str]:
    """Return the name and the numbers of an engine, from its title."""
    name, _, numbers = title.partition(DOT)
    return name, numbers


ENGINES = (
    Engine("PyTorch eager", FP32, "torch_float", "fp32.pt"),
    Engine("PyTorch eager, fused", FP32, "torch_float", "fp32.pt", {"fused": True}),
    Engine("PyTorch compiled", FP32, "torch_float", "fp32.pt", {"compiled": True}),
    Engine("ONNX Runtime", FP32, "onnx_runtime", "fp32.onnx"),
    Engine("OpenVINO", FP32, "openvino", "fp32.onnx"),
    Engine("PyTorch eager, x86", POWER2, "torch_int8", "power2.pt", {"kernels": "x86"}),
    Engine("PyTorch frozen, x86", POWER2, "torch_int8", "power2.ts", {"kernels": "x86"}),
    Engine("PyTorch eager, x86", FLOAT, "torch_int8", "float.pt", {"kernels": "x86"}),
    Engine("PyTorch frozen, x86", FLOAT, "torch_int8", "float.ts", {"kernels": "x86"}),
    Engine("PyTorch eager, fbgemm", POWER2, "torch_int8", "power2.pt", {"kernels": "fbgemm"}),
    Engine("PyTorch frozen, fbgemm", POWER2, "torch_int8", "power2.ts", {"kernels": "fbgemm"}),
    Engine("PyTorch eager, onednn", POWER2, "torch_int8", "power2.pt", {"kernels": "onednn"}),
    Engine("PyTorch frozen, onednn", POWER2, "torch_int8", "power2.ts", {"kernels": "onednn"}),
    Engine("PyTorch compiled", POWER2, "torch_export", "power2.pt2"),
    Engine("PyTorch compiled", FLOAT, "torch_export", "float.pt2"),
    Engine("PyTorch compiled", OWN, "torch_export", "own.pt2"),
    Engine("ONNX Runtime", POWER2, "onnx_runtime", "power2.onnx"),
    Engine("ONNX Runtime", FLOAT, "onnx_runtime", "float.onnx"),
    Engine("ONNX Runtime", BEST, "onnx_runtime", "recommended.onnx"),
    Engine("OpenVINO", POWER2, "openvino", "power2.onnx"),
    Engine("OpenVINO", FLOAT, "openvino", "float.onnx"),
    Engine("OpenVINO", BEST, "openvino", "recommended.onnx"),
)
FIRST = ENGINES[0].title  # what all speeds are held against
ROOFS = ("FP32", "INT8")  # the rates at which torch multiplies matrices of such numbers
MATRIX = 2048  # their side


def specs(files: dict[str, Path], images: Path, network: list, threads: int) -> dict[str, dict]:
    """Return what the workers are told, by title: of the engines for which there is a file, and of the roofs.

    `files` and `images` come from labcore.engines.files, `network` are the arguments of build_model.
    """
    common = {"images": str(images), "network": network, "threads": threads}
    return {
        engine.title: {"kind": engine.kind, "path": str(files[engine.file]), "int8": engine.numbers != FP32}
        | common
        | engine.options
        for engine in ENGINES
        if engine.file in files
    } | {name: {"kind": "matrix", "numbers": name, "size": MATRIX, "threads": threads} for name in ROOFS}


class EngineError(LabError):
    """An engine cannot run here; the message says why."""


def _start(spec: dict) -> subprocess.Popen:
    threads = str(spec["threads"])
    # The memory allocator is the system's, not tuned for training as under make.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "labcore.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,  # where labcore is imported from
        env=environment | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        process_group=0,  # in which all that it starts ends with it
    )
    _send(process, spec)
    return process


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it has forked, and close its pipes."""
    with contextlib.suppress(OSError), process:  # it may have ended already, with a request unsent
        os.killpg(process.pid, signal.SIGKILL)


def _send(process: subprocess.Popen, request: dict) -> None:
    with contextlib.suppress(BrokenPipeError):  # the answer will be missing, and says so
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()


def _answer(process: subprocess.Popen) -> dict:
    line, ended, until = b"", False, time.monotonic() + SECONDS
    while not line.endswith(b"\n"):
        if select.select([process.stdout], [], [], 0.5)[0]:
            part = os.read(process.stdout.fileno(), 2**16)
            line, ended = line + part, not part
        elif time.monotonic() > until:
            raise EngineError(f"no answer within {SECONDS} seconds")
        else:  # what it started may hold its pipe open
            ended = process.poll() is not None
        if ended:
            raise EngineError(f"its process ended with status {process.wait()} (out of memory?)")
    answer = json.loads(line)
    if "error" in answer:
        raise EngineError(answer["error"])
    return answer


class Bench(contextlib.AbstractContextManager):
    """Engines that are loaded side by side, each in its process, to be asked one after the other.

    A roof, which has no images in its spec, is timed with the first of `batches` only and answers nothing. An
    engine whose spec says int8 is skipped where a convolution computes in float, at any of `batches`.
    `skipped` says by title why an engine cannot run here.
    """

    def __init__(self, specs: dict[str, dict], batches: list[int]):
        self.skipped: dict[str, str] = {}
        self._specs, self._memory = specs, {}
        self._batches = {title: batches if "images" in spec else batches[:1] for title, spec in specs.items()}
        self._processes: dict[str, subprocess.Popen] = {}
        try:
            for title, spec in specs.items():
                self._processes[title] = _start(spec | {"batches": self._batches[title]})
            with progress(len(specs), "loading engines", unit="engine") as bar:
                for title in specs:
                    with self._or_skipped(title):
                        self._memory[title] = _answer(self._processes[title])
                    bar.update()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            _end(process)

    @contextlib.contextmanager
    def _or_skipped(self, title: str) -> Iterator[None]:
        """Skip an engine from then on where it fails, and end its process."""
        try:
            yield
        except EngineError as error:
            self.skipped[title] = str(error)
            self._memory.pop(title, None)
            _end(self._processes[title])

    def _ask(self, title: str, **request) -> dict:
        _send(self._processes[title], request)
        return _answer(self._processes[title])

    def answers(self, labels: np.ndarray) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
        """Return a table and the logits (N, classes), both by title, for the images whose `labels` are (N,).

        Columns are `summarize`'s, libraries_mb (memory when imported) and peak_mb (see worker.py).
        """
        rows, logits = {}, {}
        titles = [title for title in self._memory if "images" in self._specs[title]]
        with progress(len(titles) * len(labels), "answers", unit="image") as bar:
            for title in titles:
                with self._or_skipped(title):
                    batches = []
                    for start in range(0, len(labels), BATCH):
                        batches += self._ask(title, do="predict", start=start)["logits"]
                        bar.update(min(BATCH, len(labels) - start))
                    logits[title] = np.array(batches[: len(labels)], np.float32)
                    rows[title] = summarize(logits[title], labels) | self._memory[title]
        return pd.DataFrame(rows).T.infer_objects(), logits

    def times(self, rounds: int, runs: int, pause: float = 0.25) -> pd.DataFrame:
        """Return latency_ms, the median of `runs`, by round, engine and batch; without engines that stop.

        Batches of several images run a quarter as often as single ones. Before each turn all rest for `pause`
        seconds: threads of the one before may wait for work.
        """
        rng, rows = np.random.default_rng(0), []
        with progress(rounds, "times", unit="round") as bar:
            for number in range(rounds):
                for title in map(str, rng.permutation(list(self._memory))):
                    time.sleep(pause)
                    with self._or_skipped(title):
                        for batch in self._batches[title]:
                            repeats = runs if batch == 1 else max(3, runs // 4)
                            times_ms = self._ask(title, do="time", batch=batch, runs=repeats)["ms"]
                            rows.append((number, title, batch, float(np.median(times_ms))))
                bar.update()
        measured = pd.DataFrame(rows, columns=["round", "engine", "batch", "latency_ms"])
        return measured[~measured["engine"].isin(self.skipped)].reset_index(drop=True)
