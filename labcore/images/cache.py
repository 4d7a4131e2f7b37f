"""Decoded images, kept under the fingerprint of the files that they come from."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from labcore.files.artifacts import UNREADABLE, read_npz, sha256_json, write_npz
from labcore.files.code import modules_hash

Arrays = dict[str, np.ndarray]


def cached(path: Path, size: int, folder: Path, read: Callable[[], tuple[str, Arrays]]) -> tuple[str, Arrays]:
    """Return (content key, arrays) from the cache in `folder`, or from `read` where it has none that fit."""
    before = _kept_in(folder, path, size)
    if before and before.exists():
        try:
            arrays = read_npz(before)
            return str(arrays.pop("key")), arrays
        except UNREADABLE as error:
            print(f"note: the image cache is damaged ({error}); decoding again.", file=sys.stderr)
    key, arrays = read()
    after = _kept_in(folder, path, size)
    if after and before in (None, after):  # else files changed while they were read: the next run reads again
        write_npz(after, **arrays, key=np.array(key))
    return key, arrays


def _kept_in(folder: Path, path: Path, size: int) -> Path | None:
    """Return the file for the arrays of `path`, another one when anything there or the decoder changes."""
    files = path.rglob("*") if path.is_dir() else [path]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    facts = {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}
    decoder = (
        modules_hash("images.decode", "images.folders", "images.sources", "images.cifar"),
        metadata.version("pillow"),
    )
    return folder / f"{sha256_json([facts, decoder])[:24]}-{size}.npz" if stats else None
