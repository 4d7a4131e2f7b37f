"""Images in: a data set by name, or a user's own folder or archive, and how it is split."""

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from labcore import LabError
from labcore.files.artifacts import ROOT
from labcore.images.sources import Unreachable, read_source


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
    """Indices into the training images: `calibration` is a part of `train`, `validation` apart from both."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray

    @property
    def train_sample(self) -> np.ndarray:
        """Return evenly spaced training images, as many as validation has, to be scored like them."""
        return evenly_spaced(self.train, len(self.validation))

    @property
    def sha256(self) -> str:
        """Return a hash of the three parts, in hex."""
        return _hash(self.train, self.validation, self.calibration)

    @property
    def training_sha256(self) -> str:
        """Return a hash of the parts that decide a training: without the calibration images."""
        return _hash(self.train, self.validation)


def _hash(*parts: np.ndarray) -> str:
    """Return the SHA-256 of index arrays and their lengths, in hex."""
    return hashlib.sha256(b"".join(np.array([len(p), *p], dtype=np.int64) for p in parts)).hexdigest()


def evenly_spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of the indices, or all where there are fewer."""
    count = min(count, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def load_data(source: str | None, image_size: int = 32, root: Path = ROOT) -> ImageData:
    """Return images by name ("cifar10", "cifar100", "digits"), or from class folders or an archive of them.

    None means CIFAR-10, or without a network the embedded digits, and `notice` says so. Raises LabError for
    what is no data set of two or more classes, and for test images that are training images; Unreachable for
    CIFAR that cannot be downloaded.
    """
    if source is None:
        try:
            return load_data("cifar10", image_size, root)
        except Unreachable as error:
            notice = f"CIFAR-10 could not be had ({error}) Everything below uses the embedded digits instead."
            print(f"warning: {notice}", file=sys.stderr)
            digits = load_data("digits", image_size, root)
            return replace(digits, label=f"{digits.label} (CIFAR-10 could not be had)", notice=notice)
    label, arrays = read_source(source, image_size, root)
    images, labels, test = arrays["images"], arrays["labels"].astype(np.int64), arrays["is_test"]
    classes = tuple(map(str, arrays["classes"]))
    digest = hashlib.sha256(repr((classes, images.shape)).encode())
    for part in (images, labels, test):
        digest.update(np.ascontiguousarray(part))
    return ImageData(
        label, digest.hexdigest(), classes, images[~test], labels[~test], images[test], labels[test]
    )


def make_split(labels: np.ndarray, validation_fraction: float, calibration_images: int, seed: int) -> Split:
    """Return a seeded split, stratified by class: validation, training, and calibration images out of these.

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
            f"cannot split {len(labels)} training images (smallest class: {smallest}) into training, "
            f"validation ({validation_fraction:.0%}) and {calibration_images} for calibration: {error} "
            "Add images or change the profile."
        ) from None
    return Split(*(np.sort(part) for part in (train, validation, calibration)))


def calibration_batches(data: ImageData, split: Split, batch_size: int = 128) -> list["torch.Tensor"]:  # noqa: F821
    """Return the calibration images (B, 3, H, W), normalised float32, in a fixed order that mixes classes.

    Sorted by class, what moves with the batches (a moving average, a learned scale) would end on the last
    one. Raises LabError for an empty set, and for validation images in it: they judge.
    """
    if len(split.calibration) == 0:
        raise LabError("the calibration set is empty: set calibration_images to at least 1.")
    if np.isin(split.calibration, split.validation).any():
        raise LabError("calibration images are also validation images: calibrate on training images only.")
    import torch  # which takes seconds, and reading the images needs none of it

    from labcore.images.transforms import normalize

    images = data.train_images[np.random.default_rng(0).permutation(split.calibration)]
    return [normalize(batch) for batch in torch.from_numpy(images).split(batch_size)]
