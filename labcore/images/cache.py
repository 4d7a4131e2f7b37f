"""Decoded images, kept under the hash of the files that they come from."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

from labcore import LabError
from labcore.files.artifacts import (
    UNREADABLE,
    read_json,
    read_npz,
    sha256_file,
    sha256_json,
    write_json,
    write_npz,
)
from labcore.files.code import modules_hash

Arrays = dict[str, np.ndarray]


def cached(path: Path, size: int, folder: Path, read: Callable[[], tuple[str, Arrays]]) -> tuple[str, Arrays]:
    """Return (content key, arrays) from the cache in `folder`, or from `read` where it has none that fit.

    Raises LabError where a file cannot be read.
    """
    before = _kept_in(folder, path, size)
    if before.exists():
        try:
            arrays = read_npz(before)
            return str(arrays.pop("key")), arrays
        except UNREADABLE as error:
            print(f"note: the image cache is damaged ({error}); decoding again.", file=sys.stderr)
    key, arrays = read()
    if before == _kept_in(folder, path, size):  # else files changed meanwhile: the next run reads again
        write_npz(before, **arrays, key=np.array(key))
    return key, arrays


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is of those that systems keep beside one's own."""
    return name.startswith(".") or name == "__MACOSX"


def files_in(folder: Path, around: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield what is in a folder and those below, in order, links followed; a hidden folder stands for itself.

    Raises LabError for a link that leads back to a folder around it.
    """
    around += (folder.resolve(),)
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name) or not path.is_dir():
            yield path
        elif path.resolve() in around:
            raise LabError(f"{path} is a link to a folder that it lies in: remove it.")
        else:
            yield from files_in(path, around)


def _kept_in(folder: Path, path: Path, size: int) -> Path:
    """Return the file for the arrays of `path`, another one when a content, a name or the decoder changes."""
    decoder = modules_hash("images.decode", "images.folders", "images.sources", "images.cifar")
    facts = [_hashes(path, folder), decoder, metadata.version("pillow")]
    return folder / f"{sha256_json(facts)[:24]}-{size}.npz"


def _hashes(path: Path, folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the files at `path`; in `folder` is kept what was hashed when.

    A file is hashed again when its inode, size, or time of change to the nanosecond is another. The time of
    change (ctime) is the system's own: it moves with every write and rename, and no program can set it.
    """
    memory, known = folder / f"{sha256_json(str(path))[:24]}.json", {}
    with contextlib.suppress(LabError):  # missing, or damaged
        known = read_json(memory)
    hashes, remembered, now = {}, {}, time.time_ns()
    try:
        for file in files_in(path) if path.is_dir() else [path]:
            name = file.relative_to(path).as_posix()
            hashes[name] = ""
            if is_hidden(file.name) or not file.is_file():
                continue
            stat = file.stat()
            facts = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
            before, _, digest = known.get(name, "").rpartition(" ")
            hashes[name] = digest if before == facts else sha256_file(file)
            # A clock may be too coarse to tell apart what changes within two seconds.
            if now - stat.st_ctime_ns > 2 * 10**9:
                remembered[name] = f"{facts} {hashes[name]}"
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error}): correct it.") from error
    if remembered != known:
        write_json(memory, remembered)
    return hashes
