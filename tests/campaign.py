"""What happens to people, many times over: runs that are killed, and inputs that nobody means to give.

    python tests/campaign.py kills --count 60 --seed 0
    python tests/campaign.py fuzz --count 2000 --seed 0

Run them from the project's folder, after make test. Each prints a summary, and ends with status 1 where
something is not as it should be; --write puts the summary where reports find it. tests/lab/test_campaign.py
runs a short version of both.
"""

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import NamedTuple
from unittest.mock import patch

import fuzz
import mutations
import numpy as np
from PIL import Image
from project import NOTEBOOKS, REPORT, ROOT, Project

from labcore.files.artifacts import read_json, write_json
from labcore.files.provenance import cpu_name, git_commit, today

WRITTEN = ROOT / "report" / "template_campaign.json"
BYTES = 12 * 2**30  # of memory, for a process that gets inputs

# In the copies 1.25 seconds pass whenever a duration is measured, so that files with times are the same too.
CLOCK = {
    "labcore/train.py": "time.perf_counter() - began",
    "labcore/evaluate.py": "time.perf_counter() - began",
    "labcore/lab/pipeline.py": "time.time() - began",
    "notebooks/02_ptq.ipynb": "time.perf_counter() - began",
    "notebooks/08_claims.ipynb": "perf_counter() - began",
}
# What else differs from run to run: what was shown while it ran.
DIFFERS = ("progress.log", "kernel.log")
TIMELESS = ("weights.pt", "int8.pt", "*.npz", "*.onnx", "qparams*.csv", "0[123]_*.png")  # without that clock
STAGES = ["images", *REPORT, "report"]  # in the order in which they are made


class Kill(NamedTuple):
    """How one run was killed: from which stage on it had to run, what was killed, and when."""

    stage: str
    whom: str
    seconds: float
    reached: str = ""
    faults: tuple[str, ...] = ()

    def line(self, number: int) -> str:
        said = "; ".join(self.faults) or "equal"
        when = f"{self.seconds:5.1f} s, at {self.reached!r}"
        return f"{number:3} {self.stage:8} {self.whom:6} after {when}: {said}"


def own_images(folder: Path) -> Path:
    """Four classes of 130 JPEG images, which take a second to decode."""
    rng = np.random.default_rng(0)
    for number in range(520):
        grey = rng.integers(0, 60, (160, 160), dtype=np.uint8)
        grey[:, 40 * (number % 4) :][:, :40] += 150
        path = folder / f"{'test' if number % 13 < 3 else 'train'}/class {number % 4}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(path)
    return folder


class Copy:
    """A project in a folder with all that its run writes, temporary files included."""

    def __init__(self, folder: Path, images: Path | str = "", names: tuple[str, ...] = ("*",)):
        self.project, self.temporary = Project(folder / "lab"), folder / "tmp"
        self.images, self.names = images, names  # what is compared

    def start(self) -> subprocess.Popen:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        with patch.dict(os.environ, TMPDIR=str(self.temporary)):
            return self.project.start("report", "--profile=smoke", f"--data={self.images}")

    def processes(self) -> dict[int, str]:
        """Command lines of all that runs here, by id."""
        mark, found = f"PYTHONPATH={self.project.root}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        return found

    def forget(self, stage: str) -> None:
        """Take away what a stage wrote; "all" is everything."""
        root, names = self.project.root, STAGES if stage == "all" else [stage]
        for name in names:
            (root / f"runs/smoke/{name}.stamp.json").unlink(missing_ok=True)
            shutil.rmtree(root / f"runs/smoke/{name}", ignore_errors=True)
        if "images" in names:
            shutil.rmtree(root / "data/cache")
        if stage == "all":
            for folder in ("runs", "figures", "report"):
                shutil.rmtree(root / folder / "smoke")

    def content(self) -> dict[str, str]:
        hashes = self.project.hashes("runs", "figures", "report", "data")
        compared = {name for name in hashes if any(map(Path(name).match, self.names))}
        return {name: hashes[name] for name in compared if not name.endswith(DIFFERS)}

    def left(self) -> list[str]:
        """What a run that has ended must not leave."""
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        root, patterns = self.project.root, ("*.part", "*.partial.ipynb", "*.verify-*")
        files = [path.name for pattern in patterns for path in root.rglob(pattern)]
        # torch makes a cache of its own there.
        files += [path.name for path in self.temporary.glob("*") if not path.name.startswith("torchinductor")]
        running = [f"left running: {line}" for line in self.processes().values()]
        return running + [f"left: {name}" for name in files]


def undisturbed(folder: Path) -> tuple[Copy, dict[str, float]]:
    """A project that was run to its end, and how long each stage takes, the start of the program included."""
    copy = Copy(folder, own_images(folder / "images"))
    project = Project.sources(copy.project.root)
    for name, duration in CLOCK.items():
        project.edit(name, lambda text, duration=duration: text.replace(duration, "1.25"))
    began, process, seconds = time.monotonic(), copy.start(), {}
    titles = dict(zip([*NOTEBOOKS, "report"], [*REPORT, "report"], strict=True))
    first = last = None
    for line in process.stdout:
        now = time.monotonic() - began
        first = first or now  # what is said before the first training
        if name := titles.get(line.split(":")[0]):
            last = last or now
            seconds[name] = seconds.get(name, 0) + now - last
            last = now
    ended = project.finish(process, 60)
    assert ended.returncode == 0, ended.stderr
    return copy, {"images": first, "all": now} | {name: first + each for name, each in seconds.items()}


def kill(whole: Copy, folder: Path, stage: str, whom: str, seconds: float) -> Kill:
    """Kill a run at a moment and run again to the end; say what differs from the undisturbed one."""
    copy = Copy(folder, whole.images, whole.names)
    whole.project.copy(copy.project.root)
    while True:
        copy.forget(stage)
        process = copy.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            break
        Project.finish(process, 60)
        seconds /= 2  # it was faster than the undisturbed one
    there = copy.processes()
    kernels = [pid for pid, line in there.items() if "ipykernel_launcher" in line]
    if not kernels and whom == "kernel":  # before the first, between two, or after the last
        whom = "parent"
    targets = {"kernel": kernels, "parent": [process.pid], "all": [process.pid, *there]}[whom]
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ended = Project.finish(process, 600)
    faults = []
    if "Traceback" in ended.stderr or (whom == "kernel" and ended.returncode not in (0, 1)):
        faults.append(f"killed, it said {ended.stderr[-300:]!r}")
    again = Project.finish(copy.start(), 600)  # at once: an orphaned kernel may still be there
    if again.returncode:
        faults.append(f"run again, it said {again.stderr[-300:]!r}")
    before, after = whole.content(), copy.content()
    faults += [
        f"differs: {name}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    faults += copy.left()
    if not faults:
        shutil.rmtree(folder)
    return Kill(stage, whom, seconds, (ended.stdout.splitlines() or ["the start"])[-1][:40], tuple(faults))


def kills(count: int, seed: int, folder: Path, jobs: int = 1) -> list[Kill]:
    """Kill so many runs, each at a random moment of a random stage, or of a run from the beginning."""
    rng, (whole, seconds) = Random(seed), undisturbed(folder / "whole")
    print("undisturbed:", ", ".join(f"{name} {each:.1f} s" for name, each in seconds.items()), flush=True)
    done = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for number in range(count):
            stage = "all" if number % 15 == 14 else rng.choice(STAGES)
            drawn = (
                stage,
                rng.choice(("kernel", "parent", "all")),
                rng.uniform(seconds["images"] / 2, seconds[stage]),
            )
            waiting.append(pool.submit(kill, whole, folder / str(number), *drawn))
        for number, result in enumerate(waiting):
            done.append(result.result())
            print(done[-1].line(number), flush=True)
    return done


def inputs(count: int, seed: int, folder: Path, jobs: int) -> list[fuzz.Outcome]:
    """Give so many inputs in some processes, and count by kind what became of them."""
    share = {"count": count, "seed": seed, "folder": folder, "parts": jobs, "processes": 20 // jobs}
    with ProcessPoolExecutor(jobs, get_context("spawn"), _limit_memory) as pool:
        done = [one for some in pool.map(partial(fuzz.fuzz, **share), range(jobs)) for one in some]
    for row in by_kind(done):
        print(", ".join(f"{name}: {value}" for name, value in row.items()))
    return done


def by_kind(done: list[fuzz.Outcome]) -> list[dict]:
    """What became of the inputs of each kind, in numbers."""
    names = {"refused": [1], "accepted": [0, "reached"]}  # "reached": accepted up to the notebooks
    rows = []
    for kind in mutations.KIND:
        of_kind = [one for one in done if one.kind == kind]
        good = Counter(one.status for one in of_kind if not one.faults)
        counts = {name: sum(good[status] for status in statuses) for name, statuses in names.items()}
        rows.append({"inputs": kind, "count": len(of_kind)} | counts)
    return rows


def by_target(done: list[Kill]) -> list[dict]:
    """How many kills of each kind there were, and after how many the next run ended with equal files."""
    rows = []
    for whom in ("kernel", "parent", "all"):
        of_kind = [one for one in done if one.whom == whom]
        equal = sum(not one.faults for one in of_kind)
        rows.append({"killed": whom, "count": len(of_kind), "equal": equal})
    return rows


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kills", "fuzz"))
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--write", action="store_true", help=f"the summary into {WRITTEN.name}")
    options = parser.parse_args()
    run, summary = {"kills": (kills, by_target), "fuzz": (inputs, by_kind)}[options.what]
    os.environ["OMP_NUM_THREADS"] = "1"  # more give other sums
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        done = run(options.count, options.seed, Path(folder), options.jobs)
    bad = sum(bool(one.faults) for one in done)
    print(f"{options.what}: {len(done) - bad} of {len(done)} as they should be")
    if options.write:
        facts = {"seed": options.seed, "commit": git_commit(), "day": today(), "cpu": cpu_name()}
        before = read_json(WRITTEN) if WRITTEN.exists() else {}
        write_json(WRITTEN, before | {options.what: facts | {"rows": summary(done)}})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
