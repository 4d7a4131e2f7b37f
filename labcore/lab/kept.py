"""Trained networks kept beside their report, where they can be committed: report/<profile>/weights.

From there `make report WEIGHTS=committed` takes FP32 weights, and `make lab` all that notebooks read. What
make lab copied has no stamps, so it is stale to make, which runs every stage itself.
"""

import contextlib
import re
import shutil
import zipfile
from pathlib import Path

from labcore import LabError
from labcore.files.artifacts import (
    FOREIGN,
    RECORD,
    RESTORED,
    UNREADABLE,
    WEIGHTS_FILES,
    atomic_path,
    copy_file,
    read_json,
    sha256_file,
    write_bytes,
    write_json,
)
from labcore.lab.stale import STAGES, State

LARGEST_INT8 = 10_000_000  # bytes: larger files of int8 networks are not kept, since minutes make them again
CELLS = "cells.zip"
NETWORKS = [stage for stage in STAGES if stage.name in ("fp32", "ptq", "qat")]


def folder_of(state: State) -> Path:
    """Return where a profile's trained networks are kept."""
    return state.root / "report" / state.profile.name / "weights"


def keep(state: State) -> list[Path]:
    """Copy the trained networks of a run to where they are kept: FP32's three files, small int8 files.

    With them go the cells of its studies, each of which says what it is the result of. FP32 weights that are
    float16 numbers, all of a tensor, are written as such. Returns what was written;
    raises LabError where a stage is stale, and as `read_earlier` does, with what was kept before untouched.
    """
    from labcore.files.tensors import halved, save_tensors
    from labcore.training.earlier import read_earlier

    for stage in NETWORKS:
        if reason := state.stale(stage.name, state.inputs(stage)):
            raise LabError(f"{stage.notebook} is stale ({reason}): run make report, with the same options.")
    folder, fp32 = folder_of(state), state.folder / "fp32"
    sources = {folder / name: fp32 / name for name in WEIGHTS_FILES[1:]}
    sources |= {folder / f"{stage}.pt": state.folder / stage / "int8.pt" for stage in ("ptq", "qat")}
    large = [target for target, path in sources.items() if path.stat().st_size > LARGEST_INT8]
    weights = read_earlier(fp32, {}).weights
    save_tensors(folder / "weights.pt", halved(weights))
    for target, source in sources.items():
        if target in large:
            target.unlink(missing_ok=True)  # of another run
        else:
            copy_file(source, target)
    return [folder / "weights.pt", *(target for target in sources if target not in large), _pack_cells(state)]


def _pack_cells(state: State) -> Path:
    """Write the results of all experiments of studies into one file; the same give the same bytes."""
    path = folder_of(state) / CELLS
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
        for cell in sorted(state.folder.glob("*/cells/*.json")):
            info = zipfile.ZipInfo(cell.relative_to(state.folder).as_posix())
            info.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(info, cell.read_bytes())
    return path


def _unpack_cells(state: State, part: Path, stages: list[str]) -> None:
    """Write the kept results of experiments where studies look for them; those of a damaged file are lost."""
    with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(folder_of(state) / CELLS) as packed:
        for name in packed.namelist():
            stage, _, file = name.partition("/cells/")
            if stage in stages and re.fullmatch(r"[0-9a-f]+\.json", file):
                write_bytes(part / name, packed.read(name))


def restore(state: State) -> str:
    """Give notebooks what they read, where nothing was run: kept networks, and the report's results.

    A note beside them says of which run they are (`Run.is_restored`). Returns what was done or why not, in a
    sentence; empty where the profile was run here, or keeps nothing. Raises LabError for what is kept and
    damaged.
    """
    try:
        return _restore(state)
    except OSError:
        raise
    except FOREIGN as error:
        cause = f"{type(error).__name__}: {error}"
        raise LabError(
            f"{state.report} is damaged ({cause}): restore it from git, or run make report."
        ) from error


def _restore(state: State) -> str:
    from labcore.qconfig import has_vnni
    from labcore.run import Run
    from labcore.training.earlier import read_earlier

    folder, results = folder_of(state), state.report / "results"
    if any((state.folder / stage.name).exists() for stage in STAGES) or not (folder / RECORD).exists():
        return ""
    record, label = read_earlier(folder, {}).record, state.images[1]
    metrics = {stage.name: read_json(results / stage.name / "metrics.json") for stage in NETWORKS}
    if record["identity"].get("data") != state.images[0][:16]:
        theirs = record.get("images", "others")
        return f"The images here are {label}, those of the kept networks {theirs}: run notebook 1 first."
    seed = read_json(results / "fp32" / "provenance.json")["seed"]
    overrides = read_json(results / "run.json")["overrides"]
    if (seed, overrides) != (state.seed, state.overrides):
        return f'The networks kept in {folder} are of SEED={seed} SET="{overrides}": run notebook 1 first.'
    if record["weights_sha256"] != metrics["fp32"]["weights_sha256"]:
        return f"The networks kept in {folder} are not those of the report beside them: run notebook 1 first."
    stages = [stage.name for stage in STAGES if (results / stage.name).is_dir()]
    if metrics["ptq"]["has_vnni"] != has_vnni():  # int8 activations have 8 bits with it, 7 without
        stages = ["fp32"]
    part = state.folder.with_name(f".{state.profile.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for stage in stages:
            shutil.copytree(results / stage, part / stage)
            kept = folder / f"{stage}.pt"
            if kept.exists() and sha256_file(kept) == metrics[stage]["int8_sha256"]:
                copy_file(kept, part / stage / "int8.pt")
        for name in WEIGHTS_FILES:
            copy_file(folder / name, part / "fp32" / name)
        _unpack_cells(state, part, stages)
        state.folder.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            (part / stage).rename(state.folder / stage)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    run = Run(state.profile, state.source, state.seed, state.root)
    without = [name for name in ("ptq", "qat") if not run.path(name, "int8.pt").exists()]
    for stage in (stage for stage in stages if stage not in without):
        write_json(run.path(stage, RESTORED), run.restored_from())
    networks = ", ".join(name for name in stages if list((state.folder / name).glob("*.pt"))).upper()
    return (
        f"Nothing was run here yet, so notebooks of profile {state.profile.name} read the networks kept in "
        f"{folder.relative_to(state.root)} ({networks}; commit {record['provenance']['commit']}). "
        "Notebook 1 trains, unless WEIGHTS=committed is given."
    )


def forget(state: State) -> None:
    """Remove the notes of `restore`: from here on, a stage counts only where it was run here."""
    for note in state.folder.glob(f"*/{RESTORED}"):
        note.unlink()
