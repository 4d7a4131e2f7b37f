"""CIFAR-10 and CIFAR-100 from their official files, each checked against the MD5 sum published for it.

Source: Krizhevsky (2009), "Learning multiple layers of features from tiny images".
"""

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from labcore import LabError
from labcore.files.artifacts import UNREADABLE
from labcore.images.cache import Arrays
from labcore.images.decode import to_array

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Version(NamedTuple):
    """A published version of a data set: an archive, the folder in it, and the files that are read.

    `files` are name -> MD5, the test images last; where no sums are published, the archive alone is read.
    `names` is the file with the names of the classes, "" where they are CLASSES.
    """

    archive: str
    archive_md5: str
    folder: str
    files: dict[str, str]
    names: str = ""


_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
_PYTHON_MD5 = (
    "c99cafc152244af753f735de768cd75f",
    "d4bba439e000b95fd0a9bffe97cbabec",
    "54ebc095f3ab1f0389bbae665268c751",
    "634d18415352ddfa80567beed471001a",
    "482c414d41f54cd18b22e5b47cb7c3cb",
    "40351d587109b95175f43aff81a1287e",
)
_BINARY_MD5 = (
    "5dd7e06a14cb22eb9f671a540d1b7c25",
    "5ea93a67294ea407fff1d09f752e9692",
    "942cd6a4bcdd0dd3c604fbe906cb4421",
    "ae636b3ba5c66a11e91e8cb52e771fcb",
    "53f37980c15c3d472c316c40844f3f0d",
    "803d5f7f4d78ea53de84dbe85f74fb6d",
)
# Of each data set, the Python version, which torchvision downloads, and the binary version.
VERSIONS = {
    "CIFAR-10": (
        Version(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            dict(zip(_BATCHES, _PYTHON_MD5, strict=True)),
        ),
        Version(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            dict(zip((f"{name}.bin" for name in _BATCHES), _BINARY_MD5, strict=True)),
        ),
    ),
    "CIFAR-100": (
        Version(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            "meta",
        ),
        Version(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            {"train.bin": "", "test.bin": ""},
            "fine_label_names.txt",
        ),
    ),
}
_META_MD5 = "7973b15100ade9c7d40fb424638fde48"  # of CIFAR-100's names in the Python version


def official_copies(label: str, data: Path) -> list[tuple[Version, Path]]:
    """Return the official copies of a data set in a folder: the version, and its folder or archive."""
    folders = [(version, data / version.folder) for version in VERSIONS[label] if all(version.files.values())]
    archives = [(version, data / version.archive) for version in VERSIONS[label]]
    return [(version, path) for version, path in folders + archives if path.exists()]


def read_official(version: Version, path: Path, size: int) -> tuple[str, Arrays]:
    """Return (SHA-256 of the images, arrays) of an official copy; both versions give the same.

    Raises LabError for a file that is missing, or whose MD5 is not the published one.
    """
    names = [*version.files, *filter(None, [version.names])]
    try:
        contents = dict(zip(names, _contents(version, path, names), strict=True))
        parts = [_parse(name, contents[name]) for name in version.files]
        images, labels = (np.concatenate(kind) for kind in zip(*parts, strict=True))
        classes = _class_names(version, contents)
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): remove it, or put the whole copy there.") from error
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32))
    is_test = np.arange(len(labels)) >= len(labels) - len(parts[-1][1])
    key = hashlib.sha256(images).hexdigest()
    if size != 32:
        images = np.stack([to_array(Image.fromarray(image), size) for image in images.transpose(0, 2, 3, 1)])
    return key, {"images": images, "labels": labels, "is_test": is_test, "classes": np.array(classes)}


def _contents(version: Version, path: Path, names: list[str]) -> list[bytes]:
    """Return the checked bytes of the files of such names."""
    if path.is_dir():
        sums = version.files | {version.names: _META_MD5}
        contents = [(path / name).read_bytes() for name in names]
        for name, content in zip(names, contents, strict=True):
            check_md5(path / name, content, sums[name])
        return contents
    check_md5(path, path.read_bytes(), version.archive_md5)
    with tarfile.open(path) as archive:
        return [archive.extractfile(f"{version.folder}/{name}").read() for name in names]


def check_md5(path: Path, content: bytes, expected: str) -> None:
    """Raise LabError where a file's content has another MD5 sum than the published one."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise LabError(
            f"{path} is damaged or another file: expected MD5 {expected}, found {found}; "
            "remove it, or put the official one there."
        )


def _parse(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (N, 3072), red, green and blue planes, and labels (N,)."""
    if not name.endswith(".bin"):
        batch = pickle.loads(content, encoding="latin1")  # its MD5 is the published one
        return batch["data"], np.array(batch.get("labels", batch.get("fine_labels")))
    n_labels = 2 if name in ("train.bin", "test.bin") else 1  # CIFAR-100: coarse and fine
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, n_labels + 3072)
    return records[:, n_labels:], records[:, n_labels - 1].astype(np.int64)


def _class_names(version: Version, contents: dict[str, bytes]) -> list[str]:
    if not version.names:
        return list(CLASSES)
    content = contents[version.names]
    if version.names.endswith(".txt"):
        return content.decode().split()
    return pickle.loads(content, encoding="latin1")["fine_label_names"]
