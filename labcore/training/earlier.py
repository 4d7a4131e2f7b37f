"""FP32 weights that an earlier run trained: to be used instead of a training, or to start one from.

They lie in a folder with the history of their training and a record of it: what decided the weights, where
and when they were trained, and the hashes of both files. The fp32 stage leaves such a folder.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from labcore import LabError
from labcore.files.artifacts import RECORD, WEIGHTS_FILES, read_json, sha256_file, write_json
from labcore.files.provenance import provenance
from labcore.files.tensors import load_tensors, state_hash
from labcore.training.checkpoint import differences

WEIGHTS, HISTORY, _ = WEIGHTS_FILES


@dataclass(frozen=True)
class Earlier:
    """The weights, float32 wherever they are floating point; one row of history per epoch; the record."""

    weights: dict[str, Tensor]
    history: pd.DataFrame
    record: dict


def read_earlier(folder: Path, identity: dict, same: tuple[str, ...]) -> Earlier:
    """Read what an earlier training left, after checking it.

    Args:
        identity: that of the training which it stands for, or which starts from it (`training_identity`).
        same: the entries of the identity in which both must agree.

    Raises LabError for a missing or damaged file, for one that the record does not describe, and for a
    training that differs.
    """
    record = read_json(folder / RECORD)
    try:
        expected, hashes = record["identity"], (record["weights_sha256"], record["history_sha256"])
        there = {name: expected[name] for name in same}
    except (KeyError, TypeError) as error:
        raise LabError(f"{folder / RECORD} is no record of a training ({error!r}); see WEIGHTS.") from None
    here = json.loads(json.dumps({name: identity[name] for name in same}))
    if unlike := differences(there, here):
        raise LabError(
            f"WEIGHTS: the training in {folder} is another one ({'; '.join(unlike[:3])}); "
            "give the same profile, images, SEED and SET, or leave WEIGHTS= out and train."
        )
    weights = load_tensors(folder / WEIGHTS)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise LabError(f"{folder / WEIGHTS} holds no state dict; use a folder that the fp32 stage wrote.")
    weights = {name: v.float() if v.is_floating_point() else v for name, v in weights.items()}
    for name, found, meant in zip(
        (WEIGHTS, HISTORY), (state_hash(weights), sha256_file(folder / HISTORY)), hashes, strict=True
    ):
        if found != meant:
            raise LabError(
                f"{folder / name} is not what {RECORD} describes: expected hash {meant[:12]}, found "
                f"{found[:12]}; restore the folder, or leave WEIGHTS= out and train."
            )
    return Earlier(weights, pd.read_csv(folder / HISTORY), record)


def write_record(
    folder: Path, identity: dict, weights: dict[str, Tensor], best_epoch: int, start: dict | None
) -> None:
    """Write the record of a training whose history is in `folder`; one that is there already stays.

    `start` is the record of the training whose weights this one began with.
    """
    facts = {
        "identity": identity,
        "best_epoch": best_epoch,
        "weights_sha256": state_hash(weights),
        "history_sha256": sha256_file(folder / HISTORY),
        "started_from": start,
    }
    facts = json.loads(json.dumps(facts))
    if (folder / RECORD).exists() and facts.items() <= read_json(folder / RECORD).items():
        return  # the training was loaded, not repeated
    finished = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    write_json(folder / RECORD, facts | {"provenance": provenance(), "finished": finished})
