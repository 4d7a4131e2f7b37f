"""A user's own images: class folders, or an archive of them, to uint8 arrays.

Nothing from an archive is written to disk, so no member can land outside its folder.
"""

import hashlib
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from labcore import LabError
from labcore.files.artifacts import UNREADABLE
from labcore.files.progress import progress

ARCHIVE_SUFFIXES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Pillow's names of them. Its other formats stay closed: some hand the file to another program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SPLITS = ("train", "test")
Member = tuple[str, Callable[[], bytes]]


def fingerprint(path: Path) -> str:
    """Changes when a folder's file or an archive is added, removed, resized or touched; cheap enough for every run."""
    digest = hashlib.sha256(_bytes(str(path)))
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            stat = file.stat()
            digest.update(_bytes(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n"))
    return digest.hexdigest()


def _bytes(name: str) -> bytes:
    """A file's name may hold bytes that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def read_images(path: Path, size: int) -> tuple[str, dict[str, np.ndarray]]:
    """Read and decode every image once.

    Returns:
        The content key (SHA-256 over split, class, name and bytes of every image, the same for a folder and its archive),
        and arrays: images uint8 (N, 3, size, size), labels (N,), is_test (N,), classes.

    Raises:
        LabError: no archive or folder, truncated, damaged, unsafe, or not two splits with the same two or more classes.
    """
    name = path.name.lower()
    if path.is_dir():
        members = _folder_members(path)
    elif name.endswith(ARCHIVE_SUFFIXES):
        members = _zip_members(path) if name.endswith(".zip") else _tar_members(path)
    else:
        raise LabError(
            f"DATA={path} is not a folder and does not end in {', '.join(ARCHIVE_SUFFIXES)}; pack it or name its folder."
        )
    return _decode_all(path, members, size)


def _folder_members(root: Path) -> Iterator[Member]:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path.read_bytes


def _safe(archive: Path, name: str) -> str:
    """The member's name, unless it would be written outside its folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or (parts.parts and ":" in parts.parts[0]):
        raise LabError(
            f"{archive}: the member {name!r} would be written outside its folder; the archive is refused. Pack it again."
        )
    return str(parts)


def _tar_members(archive: Path) -> Iterator[Member]:
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = _safe(archive, member.name)
                if member.issym() or member.islnk():
                    raise LabError(
                        f"{archive}: {name!r} is a link; only plain files are read. Pack the images themselves."
                    )
                if member.isfile():
                    yield name, lambda member=member: tar.extractfile(member).read()
            # tarfile stops in silence at a damaged header or a missing end; reading on checks the sum of a packed file.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of archive after the last member")
            while tar.fileobj.read(1 << 20):
                pass
    except UNREADABLE as error:
        raise LabError(f"{archive} is truncated or no archive ({error}): fetch or pack it again.") from error


def _zip_members(archive: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                name = _safe(archive, info.filename)
                if not info.is_dir():
                    yield name, lambda info=info: packed.read(info)
    except UNREADABLE as error:
        raise LabError(
            f"{archive} is truncated, locked or no archive ({error}): fetch or pack it again."
        ) from error


def _place(name: str) -> tuple[str, str] | None:
    """(split, class) for "…/train/<class>/…/file"; None for hidden files and for those that are no images."""
    path = PurePosixPath(name)
    if (
        any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        or path.suffix.lower() not in IMAGE_SUFFIXES
    ):
        return None
    for position, part in enumerate(path.parts[:-2]):
        if part in SPLITS:
            return part, path.parts[position + 1]
    return None


def to_array(image: Image.Image, size: int) -> np.ndarray:
    """An image of any size and mode -> uint8 (3, size, size): its centred square, resized."""
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)
    image = image.convert("RGB")
    if image.size != (size, size):
        side = min(image.size)
        left, top = ((whole - side) / 2 for whole in image.size)
        square = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=square)
    return np.asarray(image).transpose(2, 0, 1)


def _decode(item: tuple[str, bytes], source: Path, size: int) -> np.ndarray:
    name, content = item
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return to_array(image, size)
    except UnidentifiedImageError as error:
        raise LabError(
            f"{source}: the image {name!r} is damaged (no known format): repair or remove it."
        ) from error
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:
        raise LabError(f"{source}: the image {name!r} is damaged ({error}): repair or remove it.") from error


def _decode_all(source: Path, members: Iterator[Member], size: int) -> tuple[str, dict]:
    """Read every image once: hash it, decode it, check the classes. Returns (content key, arrays)."""
    places, arrays, digests, batch, left_out = [], [], [], [], 0
    with ThreadPoolExecutor(2) as pool, progress(None, f"Reading {source.name}", unit="image") as bar:

        def flush():
            arrays.extend(pool.map(lambda item: _decode(item, source, size), batch))
            bar.update(len(batch))
            batch.clear()

        for name, read in members:
            place = _place(name)
            if place is None:
                left_out += 1
                continue
            try:
                content = read()
            except UNREADABLE as error:
                raise LabError(
                    f"{source}: {name!r} cannot be read ({error}): fetch or pack it again."
                ) from error
            places.append((*place, name))
            digests.append(
                f"{place[0]}/{place[1]}/{PurePosixPath(name).name} {hashlib.sha256(content).hexdigest()}"
            )
            batch.append((name, content))
            if len(batch) == 1024:
                flush()
        flush()
    classes = _check_classes(source, places, left_out)
    order = sorted(range(len(places)), key=lambda position: (*places[position][:2], digests[position]))
    key = hashlib.sha256(_bytes("\n".join(sorted(digests)))).hexdigest()
    return key, {
        "images": np.stack([arrays[position] for position in order]),
        "labels": np.array([classes.index(places[position][1]) for position in order]),
        "is_test": np.array([places[position][0] == "test" for position in order]),
        "classes": np.array(classes),
    }


def _check_classes(source: Path, places: list[tuple[str, str, str]], left_out: int) -> list[str]:
    counts = {split: Counter(name for place, name, _ in places if place == split) for split in SPLITS}
    expected = "expected train/<class>/<image> and test/<class>/<image>"
    if not places:
        raise LabError(
            f"DATA={source}: {expected}, found no image ({left_out} other files); check the folder names."
        )
    for split in SPLITS:
        if not counts[split]:
            raise LabError(f"DATA={source}: {expected}, found nothing in {split}/; add it.")
    only = {split: sorted(set(counts[split]) - set(counts[other])) for split, other in (SPLITS, SPLITS[::-1])}
    if any(only.values()):
        raise LabError(
            f"DATA={source}: the classes of train and test differ (only in train: {', '.join(only['train']) or 'none'}; "
            f"only in test: {', '.join(only['test']) or 'none'}); make them the same."
        )
    if len(counts["train"]) < 2:
        raise LabError(
            f"DATA={source}: expected two classes or more, found only {next(iter(counts['train']))!r}; add class folders."
        )
    for name in sorted(counts["train"]):
        if not name.isprintable():  # bytes that are no UTF-8 too
            raise LabError(
                f"DATA={source}: the class {name!r} has a name that cannot be printed; rename its folder."
            )
    return sorted(counts["train"])
