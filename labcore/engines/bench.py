"""One trained network on the engines that people deploy: what each answers, how fast, in how much memory.

Engines run in processes of their own (labcore.engines.worker). Their files come from labcore.engine_files. Times are taken in
interleaved rounds: in each, every engine has its turn, in an order drawn anew, so that a slow moment of the machine hits all of
them alike and ratios are taken within a round.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from labcore import LabError
from labcore.engines.worker import BATCH
from labcore.files.artifacts import ROOT, UNREADABLE, read_npz, write_npz
from labcore.files.progress import progress
from labcore.stats import summarize

FP32, POWER2, FLOAT, OWN = "FP32", "INT8, power of two", "INT8, float scales", "INT8, its own scales"
BEST = "INT8, recommended"
_DOT = " · "  # between the two parts of a title
SECONDS = 600  # that a worker may take for one answer; Inductor's first compilation is the longest


@dataclass(frozen=True)
class Engine:
    """A network on an engine.

    Args:
        name: what readers see.
        numbers: FP32, POWER2 (the reference's scales), FLOAT (the same without rounding to a power of two), OWN
            or BEST (the powers of two that study 1 recommends).
        kind: the function of labcore.engines.worker that runs it.
        file: which of the files of `engine_files.write_files` it runs.
        options: for that function.
    """

    name: str
    numbers: str
    kind: str
    file: str
    options: dict = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """Name and numbers: what tells it from all others."""
        return f"{self.name}{_DOT}{self.numbers}"


def parts(title: str) -> tuple[str, str]:
    """The name and the numbers of an engine, from its title."""
    name, _, numbers = title.partition(_DOT)
    return name, numbers


EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"
ENGINES = (
    Engine(EAGER, FP32, "torch_eager", "fp32.pt"),
    Engine(f"{EAGER}, fused", FP32, "torch_eager", "fp32.pt", {"fused": True}),
    Engine(COMPILED, FP32, "torch_compiled", "fp32.pt"),
    Engine("ONNX Runtime", FP32, "onnx_runtime", "fp32.onnx"),
    Engine("OpenVINO", FP32, "openvino", "fp32.onnx"),
    *(
        Engine(f"{name}, {kernels}", numbers, kind, f"{file}.{end}", {"kernels": kernels})
        for kernels, files in (
            ("x86", {POWER2: "power2", FLOAT: "float"}),
            ("fbgemm", {POWER2: "power2"}),
            ("onednn", {POWER2: "power2"}),
        )
        for numbers, file in files.items()
        for name, kind, end in ((EAGER, "torch_eager", "pt"), ("PyTorch frozen", "torch_script", "ts"))
    ),
    Engine(COMPILED, POWER2, "torch_export", "power2.pt2"),
    Engine(COMPILED, FLOAT, "torch_export", "float.pt2"),
    Engine(COMPILED, OWN, "torch_export", "own.pt2"),
    Engine("ONNX Runtime", POWER2, "onnx_runtime", "power2.onnx"),
    Engine("ONNX Runtime", FLOAT, "onnx_runtime", "float.onnx"),
    Engine("ONNX Runtime", BEST, "onnx_runtime", "recommended.onnx"),
    Engine("OpenVINO", POWER2, "openvino", "power2.onnx"),
    Engine("OpenVINO", FLOAT, "openvino", "float.onnx"),
    Engine("OpenVINO", BEST, "openvino", "recommended.onnx"),
)
FIRST = ENGINES[0].title  # what all speeds are held against
ROOFS = {"FP32": "matrix_fp32", "INT8": "matrix_int8"}
MATRIX = 2048  # side of the matrices whose product is the roof
_MODULES = ("openvino", "onnxruntime")


def specs(
    files: dict[str, Path], images: Path, network: list, image_shape: tuple[int, int, int], threads: int
) -> dict[str, dict]:
    """What the workers of all engines and roofs are told (see Worker), by title.

    Args:
        files: from `engine_files.write_files`; engines whose file is not there are left out.
        images: a file of `engine_files.write_images`.
        network: arguments of labcore.model.build_model.
    """
    common = {
        "images": str(images),
        "network": network,
        "image_shape": list(image_shape),
        "threads": threads,
    }
    found = {
        engine.title: {"kind": engine.kind, "path": str(files[engine.file])} | common | engine.options
        for engine in ENGINES
        if engine.file in files
    }
    return found | {name: {"kind": kind, "size": MATRIX, "threads": threads} for name, kind in ROOFS.items()}


class EngineError(LabError):
    """An engine cannot run here; the message says why."""


class Worker:
    """The process of one engine. It loads as soon as it is made; `loaded` waits for that.

    Args:
        spec: what labcore.engines.worker's functions take: kind, path, threads, images, network, image_shape, kernels.
    """

    def __init__(self, spec: dict):
        threads = str(spec["threads"])
        # The memory allocator is the system's, not tuned for training as under make.
        quiet = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "labcore.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | quiet,
        )
        self._send(spec)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not yet sent cannot be sent any more
                pipe.close()

    def _send(self, request: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing, and says so
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self) -> dict:
        if not select.select([self._process.stdout], [], [], SECONDS)[0]:
            raise EngineError(f"no answer within {SECONDS} seconds")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"its process ended with status {self._process.wait()} (out of memory?)")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(_reason(answer["error"]))
        return answer

    def loaded(self) -> None:
        """Wait for the network. Raises EngineError where it is not installed, or cannot run on this processor."""
        self._receive()

    def start_warming(self, batches: list[int]) -> None:
        """Run every batch size three times; `memory` waits for that."""
        self._send({"do": "warm", "batches": batches})

    def memory(self) -> dict[str, float | None]:
        """{"libraries_mb", "peak_mb"}: memory with the libraries loaded, and at its peak after the runs that warmed up."""
        return self._receive()

    def time(self, batch: int, runs: int) -> list[float]:
        """Milliseconds of each of `runs` runs on `batch` images."""
        self._send({"do": "time", "batch": batch, "runs": runs})
        return self._receive()["ms"]

    def predict(self, count: int, tick: Callable[[int], object] = lambda _: None) -> np.ndarray:
        """Logits (count, classes) for the first images of the worker's file."""
        batches = []
        for start in range(0, count, BATCH):
            self._send({"do": "predict", "start": start})
            batches.append(self._receive()["logits"])
            tick(len(batches[-1]))
        return np.concatenate(batches).astype(np.float32)[:count]


def _reason(error: str) -> str:
    """Why an engine cannot run, for a reader who has not seen its traceback."""
    for module in _MODULES:
        if f"No module named '{module}'" in error:
            return f"{module} is not installed (it stands in requirements.txt)"
    return error


class Bench(contextlib.AbstractContextManager):
    """Engines that are loaded side by side, each in its process, to be asked one after the other.

    Args:
        specs: title -> spec (see Worker). A spec without images is a roof: it is timed, and answers nothing.
        batches: sizes to run; the largest is what memory is read after.

    Attributes:
        skipped: title -> why an engine cannot run here; it is left out of everything else.
        memory: title -> see Worker.memory.
    """

    def __init__(self, specs: dict[str, dict], batches: list[int]):
        self.batches, self.skipped, self.memory = batches, {}, {}
        self._specs = specs
        self._workers: dict[str, Worker] = {}
        try:
            for title, spec in specs.items():
                self._workers[title] = Worker(spec)
            with progress(2 * len(specs), "loading engines", unit="step") as bar:
                self._each(lambda _, worker: worker.loaded(), bar)
                for title, worker in self._workers.items():
                    worker.start_warming(self._sizes(title))
                self._each(lambda title, worker: self.memory.update({title: worker.memory()}), bar)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.close()

    def _each(self, act: Callable[[str, Worker], object], bar) -> None:
        """Do it with every worker; those that fail are skipped from then on."""
        for title, worker in list(self._workers.items()):
            with self._or_skipped(title):
                act(title, worker)
            bar.update()

    def _sizes(self, title: str) -> list[int]:
        return self.batches if self._specs[title].get("images") else self.batches[:1]

    def answers(self, labels: np.ndarray) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
        """What every engine answers, one after the other.

        Args:
            labels: int64 (N,), of the first images of the specs' file.

        Returns:
            A table by title with `summarize`'s columns, libraries_mb and peak_mb; the logits (N, classes) by title.
        """
        rows, logits = {}, {}
        asked = [title for title in self._workers if self._specs[title].get("images")]
        with progress(len(asked) * len(labels), "answers", unit="image") as bar:
            for title in asked:
                with self._or_skipped(title):
                    logits[title] = self._workers[title].predict(len(labels), bar.update)
                    rows[title] = summarize(logits[title], labels) | self.memory[title]
        return pd.DataFrame(rows).T.infer_objects(), logits

    def times(self, rounds: int, runs: int, pause: float = 0.25) -> pd.DataFrame:
        """Times of all engines in interleaved rounds.

        Batches of several images are run a quarter as often as single ones, and at least three times. Before each turn all rest
        for `pause` seconds: the threads of the one before may turn in circles for a while, waiting for work.

        Returns:
            One row per round, engine and batch: round, engine, batch, latency_ms (the median of its runs). An engine that stops
            is skipped, and has no row.
        """
        rng, rows = np.random.default_rng(0), []
        with progress(rounds, "times", unit="round") as bar:
            for number in range(rounds):
                for title in map(str, rng.permutation(list(self._workers))):
                    time.sleep(pause)
                    with self._or_skipped(title):
                        for batch in self._sizes(title):
                            found = self._workers[title].time(
                                batch, runs if batch == 1 else max(3, runs // 4)
                            )
                            row = {"round": number, "engine": title, "batch": batch}
                            rows.append(row | {"latency_ms": float(np.median(found))})
                bar.update()
        measured = pd.DataFrame(rows, columns=["round", "engine", "batch", "latency_ms"])
        return measured[~measured["engine"].isin(self.skipped)].reset_index(drop=True)

    @contextlib.contextmanager
    def _or_skipped(self, title: str) -> Iterator[None]:
        """An engine that fails is skipped from then on, and its process ends."""
        try:
            yield
        except EngineError as error:
            self.skipped[title] = str(error)
            self._workers.pop(title).close()


def roofs(measured: pd.DataFrame) -> dict[str, dict[str, float] | None]:
    """Multiply-adds per second in 10^9, from the times of the matrix products: {"FP32": {"rate", "rate_low", "rate_high"}, "INT8": …}.

    None where a product could not be measured.
    """
    rates = {}
    for name in ROOFS:
        times = measured.loc[measured["engine"] == name, "latency_ms"]
        rates[name] = _quartiles("rate", MATRIX**3 / times / 1e6) if len(times) else None
    return rates


def speeds(measured: pd.DataFrame, macs: int) -> list[dict]:
    """Latency and speed-up of every engine, for one number of threads.

    Args:
        measured: from `Bench.times`, the roofs among the engines.
        macs: multiply-adds of the network for one image.

    Returns:
        One row per batch and engine, the slowest first: engine, batch, latency_ms with its quartiles (_low, _high), images_per_s,
        speedup over PyTorch eager FP32 and fp32_speedup over the fastest FP32 engine at that batch (fastest_fp32), both medians and
        quartiles of the ratios within a round; roof_share of the rate at which torch multiplies matrices of the same numbers.
        None stands for what could not be measured.
    """
    rate, rows = roofs(measured), []
    networks = measured[~measured["engine"].isin(ROOFS)]
    for batch, part in networks.groupby("batch"):
        wide = part.pivot(index="round", columns="engine", values="latency_ms")
        order = wide.median().sort_values(ascending=False)
        floats = order[[_is_fp32(title) for title in order.index]]
        fastest = floats.index[-1] if len(floats) else None
        for title in order.index:
            row = {"engine": title, "batch": int(batch), "fastest_fp32": fastest}
            row |= _quartiles("latency_ms", wide[title])
            for name, other in (("speedup", FIRST), ("fp32_speedup", fastest)):
                known = other in wide.columns
                row |= _quartiles(name, wide[other] / wide[title]) if known else _unknown(name)
            row["images_per_s"] = 1000 * int(batch) / row["latency_ms"]
            roof = rate["FP32" if _is_fp32(title) else "INT8"]
            row["roof_share"] = row["images_per_s"] * macs / 1e9 / roof["rate"] if roof else None
            rows.append(row)
    return rows


def best(rows: list[dict]) -> dict[str, dict]:
    """The row of the fastest INT8 engine for every batch size, from `speeds`."""
    found = {f"{row['batch']}": row for row in rows if not _is_fp32(row["engine"])}
    return dict(sorted(found.items(), key=lambda item: int(item[0])))  # the last of each batch is its fastest


def _is_fp32(title: str) -> bool:
    return parts(title)[1] == FP32


def _quartiles(name: str, values: pd.Series) -> dict[str, float]:
    return {
        name: float(values.median()),
        f"{name}_low": float(values.quantile(0.25)),
        f"{name}_high": float(values.quantile(0.75)),
    }


def _unknown(name: str) -> dict[str, None]:
    return {name: None, f"{name}_low": None, f"{name}_high": None}


def records(table: pd.DataFrame) -> list[dict]:
    """The rows as JSON values, the index as "engine"; None where there is none."""
    rows = table.rename_axis("engine").reset_index().astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def pairs(measured: pd.DataFrame) -> pd.DataFrame:
    """Does a power of two make an engine faster (claim R5)? The same engine with float scales, within a round.

    Returns:
        One row per engine and batch: engine, batch, speedup (time with float scales over time with powers of two) and its
        quartiles; 1 means no difference.
    """
    rows = []
    titles = dict.fromkeys(measured["engine"])
    for name in [parts(title)[0] for title in titles if parts(title)[1] == FLOAT]:
        floats, powers = f"{name}{_DOT}{FLOAT}", f"{name}{_DOT}{POWER2}"
        for batch, part in measured[measured["engine"].isin([floats, powers])].groupby("batch"):
            wide = part.pivot(index="round", columns="engine", values="latency_ms")
            if {floats, powers} <= set(wide.columns):
                ratio = wide[floats] / wide[powers]
                rows.append({"engine": name, "batch": int(batch)} | _quartiles("speedup", ratio))
    return pd.DataFrame(rows)


def agreement(found: np.ndarray, eager: np.ndarray) -> dict[str, float]:
    """How an engine's logits (N, classes) compare with those of the eager INT8 network.

    Returns:
        agree: share of images with the same answer; identical: share of images whose logits are all equal to the bit;
        largest_difference: of any logit.
    """
    return {
        "agree": float((found.argmax(1) == eager.argmax(1)).mean()),
        "identical": float((found == eager).all(axis=1).mean()),
        "largest_difference": float(np.abs(found - eager).max()),
    }


def save_answers(path: Path, logits: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Write the logits of all engines by their titles, and the labels."""
    titles = list(logits)
    write_npz(
        path, labels=labels, engines=np.array(titles), logits=np.stack([logits[name] for name in titles])
    )


def load_answers(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(logits by title, labels) as `save_answers` took them; LabError where the file is missing or damaged."""
    try:
        stored = read_npz(path)
        return dict(zip(stored["engines"].tolist(), stored["logits"], strict=True)), stored["labels"]
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run notebook 09 again.") from None
