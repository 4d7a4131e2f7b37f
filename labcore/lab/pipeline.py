"""Brings the stages of a profile up to date in their order, then the report.

Only what is stale runs. New prose in a notebook is copied into the executed one without running it.
"""

import contextlib
import errno
import fcntl
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from labcore import LabError
from labcore.config import NOTEBOOKS, STUDIES
from labcore.files.artifacts import RECORD, read_json, sha256_file, write_json
from labcore.files.processes import is_running
from labcore.lab.kept import folder_of
from labcore.lab.stale import STAGES, Stage, State


def run(state: State, studies: Collection[str] = ()) -> None:
    """Bring every stage and the report up to date; of the studies those that are asked for."""
    with _lock(state):
        _say_how_long(state)
        for stage in STAGES:
            if stage.name in STUDIES and stage.name not in (*studies, *state.profile.studies):
                continue
            if reason := state.stale(stage.name, state.inputs(stage)):
                _execute(state, stage, reason)
            elif state.stamp(stage.name)["prose"] != state.prose(stage):
                _refresh_prose(state, stage)
            else:
                print(f"{stage.notebook}: up to date")
        _build_report(state)
        _remove_unfinished(state)


def _say_how_long(state: State) -> None:
    """Begin with how long training will take, where a stage that trains is stale."""
    stale = [s.name for s in STAGES if s.name in ("fp32", "qat") and state.stale(s.name, state.inputs(s))]
    if "fp32" in stale:  # what waits for it will be trained again
        stale = ["qat"] if state.reuses_weights else ["fp32", "qat"]
    if not stale:
        return
    from labcore.lab.estimate import estimate

    if said := estimate(state, stale):
        less = ["SET=fp32.epochs=…"] if "fp32" in stale else []
        if less and (folder_of(state) / RECORD).exists():
            less.insert(0, "WEIGHTS=committed")
        if less and state.profile.name != "smoke":
            less.insert(0, "PROFILE=smoke")
        print(said + (f"; {' or '.join(less)} takes less" if less else "") + ".", flush=True)


def clean(state: State) -> list[Path]:
    """Remove what this profile's runs wrote; the images' cache and kept weights stay. Return the folders."""
    folders, kept = (state.folder, state.figures, state.report), folder_of(state)
    written = [folder for folder in folders if any(path != kept for path in folder.glob("*"))]
    with _lock(state):
        for path in [state.folder, state.figures, *state.report.glob("*")]:
            if path.is_file():
                path.unlink()
            elif path != kept:
                shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(state.folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        state.report.rmdir()  # where nothing is kept
    return written


def _remove_unfinished(state: State) -> None:
    """Remove what processes that were killed did not finish writing."""
    for folder in (state.folder, state.figures, state.report):
        for part in folder.rglob(".*.*.part"):  # labcore.files.artifacts.atomic_path
            if not is_running(part.suffixes[-2][1:]):
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(state: State):
    """Two runs must not write into the same folder; the lock goes with the process.

    Some file systems have no locks: there a note takes their place.
    """
    state.folder.mkdir(parents=True, exist_ok=True)
    with open(state.folder / ".lock", "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):  # the system's words for busy
                raise LabError(
                    f"another run of profile {state.profile.name} is at work: wait for it or stop it."
                ) from None
            told = f"note: the file system of {state.folder} has no locks ({error.strerror})"
            print(f"{told}; start no second run of profile {state.profile.name} beside this one.")
        yield


def _execute(state: State, stage: Stage, reason: str) -> None:
    from labcore.lab.execute import execute, write_executed

    print(f"{stage.notebook}: {reason}", flush=True)
    inputs, before, began = state.inputs(stage), state.stamp(stage.name), time.time()
    state.stamp_path(stage.name).unlink(missing_ok=True)
    name, overrides = state.profile.name, state.overrides
    parameters = {"PROFILE": name, "DATA": state.source, "SEED": state.seed, "SET": overrides}
    if stage.name == "fp32":
        parameters["WEIGHTS"] = state.weights
    partial, log = state.folder / f"{stage.notebook}.partial.ipynb", state.folder / "progress.log"
    notebook = execute(state.notebook(stage), partial, parameters, log, state.root)
    write_executed(state.executed(stage), notebook)
    partial.unlink(missing_ok=True)
    for figure in state.figures.glob(f"{stage.notebook[:2]}_*.png"):
        if figure.stat().st_mtime < began:  # of an older notebook, which drew more
            figure.unlink()
    outputs, seconds = _outputs(state, stage), [time.time() - began, train_seconds(state, stage)]
    history = f"runs/{name}/{stage.name}/history.csv"  # holds the seconds of every epoch
    if train_seconds(state, stage) and before.get("outputs", {}).get(history) == outputs[history]:
        # Training was loaded: the time it took is that of the earlier run.
        seconds.append(before["wall_seconds"])
    stamp = {"inputs": inputs, "outputs": outputs, "prose": state.prose(stage)}
    write_json(state.stamp_path(stage.name), stamp | {"wall_seconds": round(max(seconds), 1)})
    print(f"{stage.notebook}: done in {time.time() - began:.0f} s", flush=True)


def train_seconds(state: State, stage: Stage) -> float:
    """Return what all epochs of a stage's training took, in whichever process; 0 where nothing trains."""
    if stage.name == "fp32" and state.reuses_weights:
        return 0.0
    return read_json(state.folder / stage.name / "metrics.json").get("train_seconds", 0.0)


def _outputs(state: State, stage: Stage) -> dict[str, str]:
    """Return path -> hash of what a stage wrote; checkpoints are not handed on."""
    paths = [
        state.executed(stage),
        *sorted((state.folder / stage.name).glob("*")),
        *sorted(state.figures.glob(f"{stage.notebook[:2]}_*.png")),
    ]
    if stage.name == "fp32":
        paths.append(state.folder / "split.npz")
    return _hashes(state, [p for p in paths if p.is_file() and not p.name.startswith((".", "checkpoint"))])


def _hashes(state: State, paths: list[Path]) -> dict[str, str]:
    return {path.relative_to(state.root).as_posix(): sha256_file(path) for path in paths}


def _refresh_prose(state: State, stage: Stage) -> None:
    from labcore.lab.execute import with_new_prose, write_executed

    executed, stamp = state.executed(stage), state.stamp(stage.name)
    write_executed(executed, with_new_prose(state.notebook(stage), executed))
    stamp["outputs"] |= _hashes(state, [executed])
    write_json(state.stamp_path(stage.name), stamp | {"prose": state.prose(stage)})
    print(f"{stage.notebook}: new prose, nothing run")


def _build_report(state: State) -> None:
    inputs = state.report_inputs()
    reason = state.stale("report", inputs)
    if not reason:
        print("report: up to date")
        return
    print(f"report: {reason}", flush=True)
    from labcore.report.build import build, collect

    state.stamp_path("report").unlink(missing_ok=True)
    name = state.profile.name
    seconds = {stage.name: state.stamp(stage.name)["wall_seconds"] for stage in state.reported()}
    _say_what_goes(state, seconds)
    written = collect(name, state.overrides, seconds, root=state.root) + build(name, root=state.root)
    outputs = _hashes(state, written)
    write_json(state.stamp_path("report"), {"inputs": inputs, "outputs": outputs})
    print(f"report: {', '.join(path for path in outputs if '/results/' not in path)}")


def _say_what_goes(state: State, told: Collection[str]) -> None:
    """Name the studies of which the report that is there tells, and the new one will not."""
    with contextlib.suppress(LabError, KeyError, TypeError):  # there is none, or it is damaged
        before = read_json(state.report / "results" / "run.json")["wall_seconds"]
        if gone := [NOTEBOOKS[name] for name in before if name not in told]:
            print(
                f"note: {', '.join(gone)} did not run with this network, so the new report leaves out what "
                "the old one tells of them; git restore report figures brings a committed one back."
            )
