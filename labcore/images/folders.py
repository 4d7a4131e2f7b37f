"""A user's own images: class folders, or an archive of them, to uint8 arrays.

Nothing from an archive is written to disk, so no member can land outside its folder.
"""

import hashlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from labcore import LabError
from labcore.files.artifacts import UNREADABLE
from labcore.files.progress import progress
from labcore.images.decode import SUFFIXES, decode


def read_images(source: Path, size: int) -> tuple[str, dict[str, np.ndarray]]:
    """Return (content key, arrays) of class folders, or of an archive of them; every image is read once.

    The key is SHA-256 over split, class, name and bytes of all images, the same for a folder and its archive.
    Arrays: images uint8 (N, 3, size, size), labels (N,), is_test (N,), classes. Raises LabError for what is
    damaged, unsafe, or not two splits with the same two or more classes.
    """

    def read(file: tuple[str, str, str, bytes]) -> tuple[str, str, str, np.ndarray]:
        split, label, name, content = file
        identity = f"{split}/{label}/{PurePosixPath(name).name} {hashlib.sha256(content).hexdigest()}"
        return split, label, identity, decode(content, size, f"{source}: the image {name!r}")

    files, rows = _image_files(source), []
    with ThreadPoolExecutor(2) as pool, progress(None, f"Reading {source.name}", unit="image") as bar:
        while batch := list(islice(files, 1024)):  # so many files are in memory at a time
            rows += pool.map(read, batch)
            bar.update(len(batch))
    rows.sort(key=lambda row: row[:3])
    splits, labels, identities, images = zip(*rows, strict=True) if rows else ((), (), (), ())
    classes = _classes(source, set(zip(splits, labels, strict=True)))
    key = hashlib.sha256("\n".join(sorted(identities)).encode("utf-8", "surrogateescape")).hexdigest()
    return key, {
        "images": np.stack(images),
        "labels": np.array([classes.index(label) for label in labels]),
        "is_test": np.array(splits) == "test",
        "classes": np.array(classes),
    }


def _classes(source: Path, found: set[tuple[str, str]]) -> list[str]:
    """Return the classes from all pairs (split, class); LabError where they are not those of a data set."""
    train, test = ({label for split, label in found if split == wanted} for wanted in ("train", "test"))
    missing = " or ".join(name for name, labels in (("train/", train), ("test/", test)) if not labels)
    only_train, only_test = (", ".join(sorted(only)) or "none" for only in (train - test, test - train))
    unprintable = sorted(label for label in train if not label.isprintable())  # bytes that are no UTF-8 too
    if missing:
        problem = f"expected train/<class>/<image> and test/…, found no image in {missing}; add it"
    elif train != test:
        problem = f"only in train: {only_train}; only in test: {only_test}; give both the same classes"
    elif len(train) < 2:
        problem = f"expected two classes or more, found only {next(iter(train))!r}; add class folders"
    elif unprintable:
        problem = f"the class {unprintable[0]!r} has a name that cannot be printed; rename its folder"
    else:
        return sorted(train)
    raise LabError(f"DATA={source}: {problem}.")


def _image_files(source: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yield (split, class, name, content) of every image; LabError where something cannot be read."""
    try:
        for name, read in _members(source):
            if belonging := _split_and_class(name):
                yield *belonging, name, read()
    except UNREADABLE as error:
        kind = "" if source.is_dir() else "truncated, locked or no .zip, .tar, .tar.gz, .tar.xz: "
        raise LabError(f"{source} cannot be read ({kind}{error}); fetch or pack it again.") from error


def _split_and_class(name: str) -> tuple[str, str] | None:
    """Return both for "…/train/<class>/…/file"; None for hidden files and for those that are no images."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    if hidden or not name.lower().endswith(SUFFIXES):
        return None
    return next((pair for pair in pairwise(parts[:-1]) if pair[0] in ("train", "test")), None)


def _members(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the name of every file, and what reads it."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path.relative_to(source).as_posix(), path.read_bytes
    elif source.name.lower().endswith(".zip"):
        with zipfile.ZipFile(source) as packed:
            for info in packed.infolist():
                name = _safe(source, info.filename)
                if not info.is_dir():
                    yield name, lambda info=info: packed.read(info)
    else:
        with tarfile.open(source, "r:*") as tar:
            for member in tar:
                name = _safe(source, member.name)
                if member.issym() or member.islnk():
                    raise LabError(f"{source}: {name!r} is a link; pack the images themselves.")
                if member.isfile():
                    yield name, lambda member=member: tar.extractfile(member).read()
            # tarfile is silent about a damaged header or a missing end; reading on checks a packed sum.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of archive after the last member")
            while tar.fileobj.read(1 << 20):
                pass


def _safe(archive: Path, name: str) -> str:
    """Return the member's name; LabError where it would be written outside its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise LabError(f"{archive}: {name!r} would be written outside its folder; pack the archive again.")
    return str(path)
