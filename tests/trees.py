"""Small sets of images as files, in folders and in archives."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
Tree = dict[str, bytes]


def pixels(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encode(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    stream, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def raising(error: Exception) -> Callable:
    """A function that takes anything and raises the error."""

    def fail(*args, **kwargs):
        raise error

    return fail


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def flip(path: Path, position: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def small_tree(prefix: str = "", side: int = 32) -> Tree:
    """Two classes with three training images and one test image each."""
    names = [
        f"{split}/{name}/{number}.png"
        for name in ("cat", "dog")
        for split, count in (("train", 3), ("test", 1))
        for number in range(count)
    ]
    return {prefix + name: encode(pixels(seed, side)) for seed, name in enumerate(names)}


def write(path: Path, tree: Tree, *extra: tarfile.TarInfo) -> Path:
    """A folder, or an archive where the name ends like one; `extra` are members of a tar without content."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in tree.items():
                packed.writestr(name, content)
    elif path.name.lower().endswith(SUFFIXES):
        with tarfile.open(path, "w:" + {".tar": "", ".xz": "xz"}.get(path.suffix.lower(), "gz")) as tar:
            for name, content in tree.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for member in extra:
                tar.addfile(member)
    else:
        path.mkdir(exist_ok=True, parents=True)
        for name, content in tree.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path
