"""Tensors in files: written whole, read without executing a pickle."""

import hashlib
import io
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from labcore import LabError
from labcore.artifacts import atomic_path


def save_tensors(path: Path, value) -> None:
    """Write tensors, numbers and text atomically; the same value gives the same bytes."""
    buffer = (
        io.BytesIO()
    )  # given a path, torch would write its name into the file, and hide a full disk's error
    torch.save(value, buffer)
    with atomic_path(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_tensors(path: Path):
    """Read what save_tensors wrote, on the CPU, without executing anything.

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
            return torch.load(path, map_location="cpu", weights_only=True)
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
