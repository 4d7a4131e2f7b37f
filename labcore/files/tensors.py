"""Tensors in files: written whole, read without executing a pickle."""

import hashlib
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from labcore import LabError
from labcore.files.artifacts import atomic_path


def save_tensors(path: Path, value, keep_old_as: str | None = None) -> None:
    """Write tensors, numbers and text atomically; the same value gives the same bytes.

    `keep_old_as` is the name, beside `path`, under which the file that was there is kept.
    """
    # Given a path, torch would write its name into the file, and hide a full disk's error.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path = Path(path)
    with atomic_path(path, buffer.getbuffer().nbytes) as partial:
        partial.write_bytes(buffer.getbuffer())
        if keep_old_as:
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())  # a full disk shows before anything is moved
            os.replace(path, path.with_name(keep_old_as))


def load_tensors(path: Path, mmap: bool = False):
    """Read what save_tensors wrote, on the CPU, without executing anything; with `mmap`, tensors when used.

    Raises LabError for a missing, truncated or changed file, and for a pickle that holds more than tensors,
    numbers and text. A changed byte is found by torch's checksums, which `mmap` does not look at.
    """
    if not Path(path).exists():
        raise LabError(f"{path} is missing: run the stage that writes it (make report runs all).")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused just below
            if not mmap and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as parts:
                    if changed := parts.testzip():
                        raise zipfile.BadZipFile(f"the checksum of {changed} does not fit")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's reader raises almost anything on foreign bytes
        problem = "is damaged or not a checkpoint"
        if isinstance(error, pickle.UnpicklingError):
            problem = "is refused: it is damaged, or holds more than weights"
        raise LabError(f"{path} {problem} ({first_line(error)}); delete it, run the stage again.") from error


def first_line(error: Exception) -> str:
    """Return an error in one line, for a message that names the file."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def state_hash(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and bytes of a state dict of plain tensors."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which every tensor whose numbers are all float16's is float16."""
    return {
        name: value.half()
        if value.is_floating_point() and torch.equal(value.half().float(), value)
        else value
        for name, value in state.items()
    }


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str = "checkpoint") -> None:
    """Load a state dict strictly; the prefix "module." of DataParallel is accepted.

    Raises LabError where it is no state dict, and where it is of another network, about the first difference.
    """
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise LabError(f"{source} holds no state dict of tensors; use a file written by the fp32 stage.")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise LabError(
                f"{source} is of another network: expected shape {expected.get(name)} for {name}, found "
                f"{found.get(name)}; check arch, width, stem and the number of classes."
            )
    model.load_state_dict(state)
