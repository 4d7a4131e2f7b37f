"""Checkpoints, which survive a kill at any moment and are never taken for those of another training."""

import contextlib
import time
from pathlib import Path

from labcore import LabError, first_line
from labcore.files.artifacts import sha256_json
from labcore.files.tensors import load_tensors, save_tensors

STALE_SECONDS = 3600  # a partial file so old is of a write that was killed


class Checkpoints:
    """The newest state of a training and the one before, in a folder that other trainings may use too.

    `identity` says what decides the weights (labcore.train.training_identity); files are named by its hash.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = folder, identity
        self.newest = folder / f"checkpoint-{sha256_json(identity)[:8]}.pt"
        self.previous = self.newest.with_suffix(".previous.pt")
        self.newest_is_good = False  # since it was read or written here
        self.saved_at, self.save_seconds = 0.0, 0.0

    def load(self) -> dict | None:
        """Return the newest state, or None. Notes say which files are not used, and why."""
        for path in filter(Path.exists, (self.newest, self.previous)):
            try:
                state = _read(path)
                if unlike := differences(state["identity"], self.identity):
                    raise LabError(f"its content belongs to another training: {'; '.join(unlike[:3])}")
                self.newest_is_good = path == self.newest
                return state
            except LabError as error:
                cause = first_line(error.__cause__ or error)
                print(f"note: {path.name} cannot be used ({cause}); an older one is looked for.")
        for path in self._of_others()[:1]:
            with contextlib.suppress(LabError):
                unlike = differences(_read(path, mmap=True)["identity"], self.identity)
                print(
                    f"note: {path.name} is not continued: it is another training's ({'; '.join(unlike[:3])})."
                )
        return None

    def due(self) -> bool:
        """Return whether saving takes under 0.25 s, or under a tenth of the time since the last one."""
        return self.save_seconds < 0.25 or time.perf_counter() - self.saved_at >= 10 * self.save_seconds

    def save(self, state: dict) -> None:
        """Write a state; keep the one before, and the two files of other trainings that were saved last."""
        began = time.perf_counter()
        for part in self.folder.glob(".checkpoint-*.part"):
            if time.time() - _saved_at(part) > STALE_SECONDS:
                part.unlink(missing_ok=True)
        keep = self.newest_is_good and self.newest.exists()  # a damaged file must not replace a good one
        state = {"identity": self.identity} | state
        save_tensors(self.newest, state, keep_old_as=self.previous.name if keep else None)
        self.newest_is_good = True
        for path in self._of_others()[2:]:
            path.unlink(missing_ok=True)
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - began

    def _of_others(self) -> list[Path]:
        """Return the files of other trainings, those saved last first."""
        others = set(self.folder.glob("checkpoint-*.pt")) - {self.newest, self.previous}
        return sorted(others, key=_saved_at, reverse=True)


def _saved_at(path: Path) -> float:
    """Return when a file was written, in seconds; now where another process has just moved it."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return time.time()


def _read(path: Path, mmap: bool = False) -> dict:
    state = load_tensors(path, mmap)
    if not (isinstance(state, dict) and isinstance(state.get("identity"), dict)):
        raise LabError("it holds no checkpoint of a training")
    return state


def differences(there: dict, here: dict) -> list[str]:
    """Return in words what differs between two identities."""
    there, here = _flat(there), _flat(here)
    return [
        f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
