"""Trained networks kept beside their report, where they can be committed: report/<profile>/weights.

From there `make report WEIGHTS=committed` takes FP32 weights, and `make lab` all that notebooks read.
"""

import shutil
from pathlib import Path

from labcore import LabError
from labcore.files.artifacts import RECORD, WEIGHTS_FILES, atomic_path, read_json
from labcore.lab.stale import STAGES, State

LARGEST_INT8 = 10_000_000  # bytes: larger files of int8 networks are not kept, since minutes make them again


def folder_of(state: State) -> Path:
    """Return where a profile's trained networks are kept."""
    return state.root / "report" / state.profile.name / "weights"


def keep(state: State) -> list[Path]:
    """Copy the trained networks of a run to where they are kept: FP32's three files, small int8 files.

    FP32 weights that are float16 numbers, all of them, are written as such. Returns what was written; raises
    LabError where a stage has not run, or the weights are not those that the record describes.
    """
    from labcore.files.tensors import halved, load_tensors, save_tensors

    folder, fp32 = folder_of(state), state.folder / "fp32"
    weights = halved(load_tensors(fp32 / "weights.pt"))
    save_tensors(folder / "weights.pt", weights)
    for name in WEIGHTS_FILES[1:]:
        _copy(fp32 / name, folder / name)
    for stage in ("ptq", "qat"):
        source = state.folder / stage / "int8.pt"
        if source.stat().st_size <= LARGEST_INT8:
            _copy(source, folder / f"{stage}.pt")
    return sorted(folder.iterdir())


def restore(state: State) -> str:
    """Give notebooks what they read, where nothing was run: kept networks, and the report's results.

    Returns what was done or why not, in a sentence; empty where the profile was run here, or keeps nothing.
    """
    folder, results = folder_of(state), state.report / "results"
    if any((state.folder / stage.name).exists() for stage in STAGES) or not folder.is_dir():
        return ""
    record = read_json(folder / RECORD)
    if record["identity"]["data"] != state.images.sha256[:16]:
        return f"The kept networks are of other images than {state.images.label}: run notebook 1 first."
    for stage in (stage.name for stage in STAGES if (results / stage.name).is_dir()):
        for path in (results / stage).iterdir():
            _copy(path, state.folder / stage / path.name)
    for name in WEIGHTS_FILES:
        _copy(folder / name, state.folder / "fp32" / name)
    for stage in ("ptq", "qat"):
        if (folder / f"{stage}.pt").exists():
            _copy(folder / f"{stage}.pt", state.folder / stage / "int8.pt")
    made = f"commit {record['provenance']['commit']}, {record['finished']}"
    return f"Nothing was run here yet: notebooks use the networks in {folder.name} of the report ({made})."


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise LabError(f"{source} is missing: run the stage that writes it (make report runs all).")
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)
