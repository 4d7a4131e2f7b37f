"""Small data and networks that tests get as fixtures."""

import fcntl
import os
import shutil

import numpy as np
import processes
import pytest
from project import Project
from small import network

from labcore.data import ImageData, Split, calibration_batches
from labcore.qconfig import CustomQConfig
from labcore.quantize import calibrate, convert, prepare_ptq


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    """Fail where a process that a test started is still there after the last test."""
    yield
    left = processes.left_behind(30)
    assert not left, f"tests left processes behind: {left}"


@pytest.fixture
def tiny_data() -> ImageData:
    """96 training and 32 test images, 16×16, in four classes that differ in brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(128) % 4
    images = (labels[:, None, None, None] * 60 + rng.integers(0, 40, (128, 3, 16, 16))).astype(np.uint8)
    return ImageData(
        "tiny", "0" * 64, ("a", "b", "c", "d"), images[:96], labels[:96], images[96:], labels[96:]
    )


@pytest.fixture
def tiny_split() -> Split:
    """64 training, 32 validation images; 16 of the training images calibrate."""
    return Split(np.arange(64), np.arange(64, 96), np.arange(16))


@pytest.fixture
def batches(tiny_data, tiny_split):
    """The 16 images that calibrate, normalised."""
    return calibration_batches(tiny_data, tiny_split)


@pytest.fixture
def int8(batches, request):
    """A calibrated and converted network; POWER2 where the test names no other configuration."""
    config = getattr(request, "param", CustomQConfig.POWER2)
    return convert(calibrate(prepare_ptq(network(), config.value), batches))


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Project:
    """A project whose report has been made; no test changes it. Processes that test together share it."""
    together = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if together else base) / "built"
    with open(f"{root}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "report").exists():
            partial = root.with_name("built.partial")
            shutil.rmtree(partial, ignore_errors=True)
            result = Project.sources(partial).run()
            assert result.returncode == 0, result.stdout + result.stderr
            partial.rename(root)
    return Project(root)
