"""Tensors in files: written whole, read without executing a pickle."""

import contextlib
import time
from pathlib import Path

from labcore import LabError
from labcore.files.artifacts import sha256_json
from labcore.files.tensors import first_line, load_tensors, save_tensors

STALE_SECONDS = 3600  # a partial file so old is of a write that was killed


def checkpoint_paths(folder: Path, about: dict) -> tuple[Path, Path]:
    """Where the training that `about` describes keeps its newest checkpoint and the one before. Each training has its own
    names, so that none is in another's way.
    """
    return _pair(folder / f"checkpoint-{sha256_json(about)[:8]}.pt")


def _pair(newest: Path) -> tuple[Path, Path]:
    return newest, newest.with_name(f"{newest.stem}.previous.pt")


_written: dict[Path, tuple[int, ...]] = {}  # the checkpoints of this process as it left them


def _stamp(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write a training's state; `state["about"]` tells what decides its weights.

    The last two are kept, and those of the one other training that was saved last; a killed write loses nothing.
    """
    newest, previous = own = checkpoint_paths(folder, state["about"])
    for part in folder.glob(".checkpoint-*.part"):
        if (
            time.time() - _saved_at(part) > STALE_SECONDS
        ):  # what a killed write left, not what another process writes now
            part.unlink(missing_ok=True)
    # A damaged or foreign file must not take the place of a good one. One that this process wrote, and nobody after it, is good.
    whole = newest.exists() and (
        _written.get(newest) == _stamp(newest) or _about(newest, mmap=False) == state["about"]
    )
    save_tensors(newest, state, keep_old_as=previous.name if whole else None)
    _written[newest] = _stamp(newest)
    for pair in _of_others(folder, own)[1:]:
        for old in pair:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, about: dict) -> dict | None:
    """The newest state of a training that `about` describes, or None.

    What is not used is said in one line each: a damaged file, and a checkpoint of another training where there is none of
    this one, with the values that differ.
    """
    own = checkpoint_paths(folder, about)
    for path in own:
        if path.exists():
            try:
                state = _read(path)
                found = differences(state["about"], about)
                if not found:
                    return state
                raise LabError(f"its content belongs to another training: {'; '.join(found[:3])}")
            except LabError as error:
                cause = first_line(error.__cause__ or error)
                print(f"note: {path.name} cannot be used ({cause}); an older one is looked for.")
    for path in next(iter(_of_others(folder, own)), ()):
        if other := _about(path):
            found = differences(other, about)
            print(
                f"note: {path.name} is not continued, since it is of another training ({'; '.join(found[:3])})."
            )
            break
    return None


def _of_others(folder: Path, own: tuple[Path, Path]) -> list[tuple[Path, Path]]:
    """(newest, previous) of every other training, the last saved first; either file may be missing."""
    saved = {}
    for path in folder.glob("checkpoint-*.pt"):
        pair = _pair(path.with_name(path.name.replace(".previous", "")))
        if pair != own:
            saved[pair] = max(saved.get(pair, 0), _saved_at(path))
    return sorted(saved, key=saved.get, reverse=True)


def _saved_at(path: Path) -> float:
    """When a file was written, in seconds of the clock; now where another process has just moved it."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return time.time()


def _read(path: Path, mmap: bool = False) -> dict:
    """What save_checkpoint wrote; LabError where the file is missing, damaged or holds something else."""
    state = load_tensors(path, mmap)
    if not (isinstance(state, dict) and isinstance(state.get("about"), dict)):
        raise LabError("it holds no checkpoint of a training")
    return state


def _about(path: Path, mmap: bool = True) -> dict | None:
    """What a checkpoint is about; None where it is missing, damaged (all of it is looked at without `mmap`) or foreign."""
    with contextlib.suppress(LabError):
        return _read(path, mmap)["about"]
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
