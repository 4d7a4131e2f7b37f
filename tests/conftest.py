"""Small data and networks shared by the tests."""

import numpy as np
import pytest

from labcore.data import ImageData, Split


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
