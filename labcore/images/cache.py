"""Decoded images, kept under the hash of their content."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from labcore import LabError
from labcore.files.artifacts import UNREADABLE, read_json, read_npz, sha256_json, write_json, write_npz
from labcore.files.code import modules_hash

Arrays = dict[str, np.ndarray]


def cached(path: Path, size: int, folder: Path, read: Callable[[], tuple[str, Arrays]]) -> tuple[str, Arrays]:
    """Return (content key, arrays) from the cache in `folder`, or from `read` where it holds none that fit.

    An index leads from the fingerprint of the files at `path` to the key of their content. Raises LabError
    where the index is damaged; damaged arrays are read again.
    """
    index_path = folder / "index.json"
    index = read_json(index_path) if index_path.exists() else {}
    if not isinstance(index, dict):
        raise LabError(f"{index_path} is damaged: delete it and run again.")
    code = modules_hash("images.decode", "images.folders", "images.sources")
    decoder = sha256_json([code, metadata.version("pillow")])

    def arrays_path(key: str) -> Path:
        return folder / f"{key[:16]}-{size}-{decoder[:8]}.npz"

    before = fingerprint(path)
    key = index.get(before)
    if key and arrays_path(key).exists():
        try:
            return key, read_npz(arrays_path(key))
        except UNREADABLE as error:
            print(f"note: the image cache is damaged ({error}); decoding again.", file=sys.stderr)
    key, arrays = read()
    after = fingerprint(path)
    if after:
        write_npz(arrays_path(key), **arrays)
        if before in (None, after):  # else files changed while they were read: the next run reads them again
            write_json(index_path, index | {after: key})
    return key, arrays


def fingerprint(path: Path) -> str | None:
    """Return what changes when a file is added, removed, resized or touched; None where there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return sha256_json({name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}) if stats else None
