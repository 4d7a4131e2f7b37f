"""Files that stages hand to each other: written whole or not at all, and hashed."""

import contextlib
import errno
import hashlib
import json
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from labcore import LabError

ROOT = Path(__file__).resolve().parents[2]
RECORD = "training.json"  # what decided FP32 weights, where and when they were trained (training/earlier.py)
WEIGHTS_FILES = ("weights.pt", "history.csv", RECORD)
RESTORED = "restored.json"  # beside results copied from a report: of which run they are (lab/kept.py)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the largest file of a system or a shell

# What readers of damaged or foreign files raise; MemoryError comes of a forged size.
UNREADABLE = (OSError, KeyError, ValueError, TypeError, EOFError, MemoryError, OverflowError, RuntimeError)
UNREADABLE += (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)
FOREIGN = (*UNREADABLE, AttributeError, IndexError, ArithmeticError)  # and what values of other kinds lead to


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of keys, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def room_for(path: Path, partial: Path, size: int = 0) -> Iterator[None]:
    """Raise LabError where a disk, a quota or a limit leaves no room for `path`, which `partial` becomes.

    `size` is how many bytes it needs, where that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        written = partial.stat().st_size if partial.exists() else 0
        free = shutil.disk_usage(partial.parent).free + written
        needs = f"{max(size, written) / 1e6:,.3f} MB" + (" or more" if written >= size else "")
        raise LabError(
            f"no space left to write {path}: it needs {needs}, {free / 1e6:,.3f} MB are free "
            f"({error.strerror}); free some and run again; the old is kept."
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it otherwise.

    A reader sees the old file or the whole new one, never a part. Raises LabError as `room_for` does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with room_for(path, partial, size):
            yield partial
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with atomic_path(target, source.stat().st_size) as partial:
        shutil.copyfile(source, partial)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path, len(content)) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with Unix line ends on every system."""
    write_bytes(path, text.encode())


def json_text(value) -> str:
    """Return a JSON file's text, which reads well and differs little from run to run. NaN is a ValueError."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically, as `json_text` has it."""
    write_text(path, json_text(value))


def read_json(path: Path):
    """Read a JSON file; LabError names it and what to do where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"{path} is missing: run the stage that writes it (make report runs all).") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, a number too long, too deep
        raise LabError(f"{path} is damaged ({error}): delete it and run make report again.") from None


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays by name, atomically; the same arrays give the same bytes."""
    size = sum(np.asarray(array).nbytes for array in arrays.values())
    with atomic_path(path, size) as partial, open(partial, "wb") as stream:
        np.savez(stream, **arrays)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a file, without executing a pickle. Raises one of UNREADABLE where it is damaged."""
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
        if isinstance(stored, np.ndarray):
            raise ValueError("one array instead of several by name")
        return dict(stored)


def weights_folder(weights: str, profile: str, root: Path = ROOT, or_file: bool = False) -> Path:
    """Return the folder that WEIGHTS= names: "committed" is report/<profile>/weights, else a path.

    Raises LabError where the files of a training are not in it, and for a lone file unless `or_file`.
    """
    committed, path = root / "report" / profile / "weights", Path(os.path.expanduser(weights))
    folders = [committed] if weights == "committed" else [path, root / path]
    if path.name == WEIGHTS_FILES[0]:
        folders += [folder.parent for folder in folders]
    for folder in folders:
        if all((folder / name).is_file() for name in WEIGHTS_FILES):
            return folder.resolve()
    if file := next(filter(Path.is_file, (path, root / path)), None):
        if or_file:
            return file.resolve()
        raise LabError(
            f"WEIGHTS: {weights} is one file, without the history and record of its training, so it cannot "
            'stand for it: SET="fp32.init=weights" trains on from it.'
        )
    there = ", ".join(sorted(path.parts[-2] for path in root.glob("report/*/weights"))) or "no profile"
    names = f"{', '.join(WEIGHTS_FILES[:-1])} and {WEIGHTS_FILES[-1]}"
    told = f"report/{profile}/weights" if weights == "committed" else weights
    raise LabError(f"WEIGHTS: {told} must hold {names}; {there} has committed ones; correct it, or train.")


def save_logits(path: Path, logits: np.ndarray, labels: np.ndarray) -> None:
    """Write logits with the labels they belong to."""
    write_npz(path, logits=logits, labels=labels)


def load_logits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read (logits, labels); LabError where the file is missing or damaged."""
    try:
        stored = read_npz(path)
        return stored["logits"], stored["labels"]
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run the stage that writes it again.") from None
