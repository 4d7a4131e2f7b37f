"""FP32 weights that an earlier run trained: to be used instead of a training, or to start one from.

They lie in a folder with the history of their training and a record of it: what decided the weights, where
and when they were trained, and the hashes of both files. The fp32 stage leaves such a folder.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from labcore import LabError, first_line
from labcore.config import Recipe
from labcore.data import ImageData, Split
from labcore.files.artifacts import RECORD, WEIGHTS_FILES, read_json, sha256_file, write_json
from labcore.files.tensors import load_tensors, state_hash
from labcore.training.checkpoint import differences

WEIGHTS, HISTORY, _ = WEIGHTS_FILES
COLUMNS = {"epoch", "lr", "train_loss", "train_acc", "train_clean_loss", "train_clean_acc", "val_loss"}
COLUMNS |= {"val_acc", "train_seconds"}
# What a record must hold, and of which type; of `made` (labcore.train.Result) what is shown.
TYPES = {"identity": dict, "best_epoch": int, "weights_sha256": str, "history_sha256": str, "finished": str}
TYPES |= {"provenance": dict}
SHOWN = ("commit", "cpu", "device", "training_numbers")


@dataclass(frozen=True)
class Earlier:
    """The weights, float32 wherever they are floating point; one row of history per epoch; the record."""

    folder: Path
    weights: dict[str, Tensor]
    history: pd.DataFrame
    record: dict


def identity(recipe: Recipe, data: ImageData, split: Split, seed: int) -> dict:
    """Return what must be the same of a training and of one that it stands for, as JSON values.

    Images that only calibrate are no part of it.
    """
    hashes = {"data": data.sha256[:16], "split": split.training_sha256[:16]}
    return json.loads(json.dumps({"recipe": asdict(recipe), "seed": seed} | hashes))


def read_earlier(folder: Path, expected: dict) -> Earlier:
    """Read what an earlier training left, after checking it.

    Args:
        expected: what its `identity` must hold; a part of it where not all must be the same.

    Raises LabError for a missing or damaged file, for one that the record does not describe, and for a
    training that differs.
    """
    record = read_json(folder / RECORD)
    _check_record(folder / RECORD, record)
    there = {name: record["identity"].get(name, "missing") for name in expected}
    if isinstance(there.get("recipe"), dict):
        there["recipe"] = _with_defaults(there["recipe"])
    if unlike := differences(there, expected):
        raise LabError(
            f"WEIGHTS: the training in {folder}, of {record.get('images', 'other images')}, is another one "
            f"({'; '.join(unlike[:3])}); give the same profile, images, SEED and SET, or leave WEIGHTS= out."
        )
    weights = load_tensors(folder / WEIGHTS)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise LabError(f"{folder / WEIGHTS} holds no state dict; use a folder that the fp32 stage wrote.")
    weights = {name: v.float() if v.is_floating_point() else v for name, v in weights.items()}
    try:
        found = {WEIGHTS: state_hash(weights), HISTORY: sha256_file(folder / HISTORY)}
    except RuntimeError as error:  # quantized, sparse or without data
        raise LabError(
            f"{folder / WEIGHTS} holds no plain weights ({first_line(error)}); train again."
        ) from error
    for name, digest in zip(found, (record["weights_sha256"], record["history_sha256"]), strict=True):
        if found[name] != digest:
            raise LabError(
                f"{folder / name} is not what {RECORD} describes: expected hash {digest[:12]}, found "
                f"{found[name][:12]}; restore the folder, or leave WEIGHTS= out and train."
            )
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise LabError(f"{folder / WEIGHTS} holds NaN or infinity in {bad[0]}; train again.")
    try:
        history = pd.read_csv(folder / HISTORY)
    except (OSError, ValueError) as error:
        raise LabError(f"{folder / HISTORY} cannot be read ({error}): restore it, or train.") from error
    numbers = set(history.select_dtypes("number"))
    if not (numbers >= COLUMNS and 1 <= record["best_epoch"] <= len(history)):
        raise LabError(
            f"{folder / HISTORY} must have a row per epoch, up to the best, {record['best_epoch']}, with "
            f"numbers in {', '.join(sorted(COLUMNS))}; found {len(history)} rows of numbers in "
            f"{', '.join(sorted(numbers)) or 'no column'}."
        )
    return Earlier(folder, weights, history, record)


def _with_defaults(recipe: dict) -> dict:
    """Return a recipe, as JSON values, with the defaults of fields that were added after it was written."""
    defaults = json.loads(json.dumps(asdict(Recipe(epochs=1, batch_size=1, lr=1.0))))
    return defaults | recipe | {"augment": defaults["augment"] | recipe.get("augment", {})}


def _check_record(path: Path, record) -> None:
    """Raise LabError where a value of the record is missing, or of another type."""
    ok = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in TYPES.items())
    if not ok or not all(isinstance(record["provenance"].get(name), str) for name in SHOWN):
        names = ", ".join([*TYPES, *(f"provenance.{name}" for name in SHOWN)])
        raise LabError(f"{path} is no record of a training: it must hold {names}; restore it, or train.")


def write_record(
    folder: Path, decided: dict, images: str, weights: dict[str, Tensor], best_epoch: int, made: dict, start
) -> None:
    """Write the record of a training whose history is in `folder`.

    Args:
        decided: its `identity`, and what else decided the weights.
        images: what the images are called.
        made: finished (the day) and provenance, as `labcore.train.fit` gives them.
        start: the record of the training whose weights this one began with, or name and hash of a lone file;
            None without one.
    """
    hashes = {"weights_sha256": state_hash(weights), "history_sha256": sha256_file(folder / HISTORY)}
    facts = {"identity": decided, "images": images, "best_epoch": best_epoch, "started_from": start}
    write_json(folder / RECORD, facts | hashes | made)
