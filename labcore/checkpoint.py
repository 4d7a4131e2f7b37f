"""Tensors in files: written whole, read without executing a pickle."""

import contextlib
import hashlib
import io
import os
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from labcore import LabError
from labcore.artifacts import atomic_path


def save_tensors(path: Path, value, keep_old_as: str | None = None) -> None:
    """Write tensors, numbers and text atomically; the same value gives the same bytes.

    `keep_old_as` is the name, beside `path`, under which the file that was there is kept.
    """
    buffer = (
        io.BytesIO()
    )  # given a path, torch would write its name into the file, and hide a full disk's error
    torch.save(value, buffer)
    path = Path(path)
    with atomic_path(path) as partial:
        partial.write_bytes(buffer.getbuffer())
        if keep_old_as and path.exists():
            os.replace(path, path.with_name(keep_old_as))


def load_tensors(path: Path, mmap: bool = False):
    """Read what save_tensors wrote, on the CPU, without executing anything; with `mmap`, tensors only when they are used.

    Raises LabError for a missing or truncated file, and for a pickle that holds more than tensors, numbers and text.
    """
    if not Path(path).exists():
        raise LabError(
            f"{path} is missing: run the stage that writes it first (make report does all in order)."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol"
            )  # a foreign pickle is refused just below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise LabError(
            f"{path} is refused: it holds more than weights, or it is damaged ({first_line(error)}); use another file."
        ) from error
    except Exception as error:  # torch's reader raises almost anything on foreign bytes
        raise LabError(
            f"{path} is truncated or not a checkpoint ({first_line(error)}); delete it and run the stage again."
        ) from error


def first_line(error: Exception) -> str:
    """An error in one line, for a message that names the file."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of a state dict of plain tensors."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# The checkpoints of a training: the newest, the one before, and the newest of another run that was in the way.
CHECKPOINTS = NEWEST, PREVIOUS, OTHER = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.other.pt"


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write a training's state; `state["about"]` tells what decides its weights. The last two are kept.

    A checkpoint of another run that is in the way is kept too, under a third name, until the next one of another run comes.
    """
    there = _about(folder / NEWEST)
    other = there is not None and differences(there, state["about"])
    if other:
        (folder / PREVIOUS).unlink(missing_ok=True)  # of that other run, and older
    keep_old_as = None if there is None else OTHER if other else PREVIOUS  # a damaged file is not kept
    save_tensors(folder / NEWEST, state, keep_old_as)


def load_checkpoint(folder: Path, about: dict) -> dict | None:
    """The newest state of a training that `about` describes, or None.

    What cannot be used is said in one line each: a damaged file, and a file of another run, with the values that differ.
    """
    for name in CHECKPOINTS:
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load_tensors(path)
            found = differences(state["about"], about)
        except (LabError, KeyError, TypeError, AttributeError) as error:
            print(f"note: {path} cannot be used ({first_line(error)}); an older one is looked for.")
            continue
        if not found:
            return state
        if name == NEWEST:
            print(f"note: {path} is not continued, since it is of another run ({'; '.join(found[:3])}).")
    return None


def _about(path: Path) -> dict | None:
    with contextlib.suppress(LabError, KeyError, TypeError):
        return load_tensors(path, mmap=True)["about"]
    return None


def differences(there: dict, here: dict) -> list[str]:
    """What differs between two descriptions of a training, in words."""
    old, new = _flat(there), _flat(here)
    return [
        f"{name} is {old.get(name, 'missing')} there and {new.get(name, 'missing')} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
