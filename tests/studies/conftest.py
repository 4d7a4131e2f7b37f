import pytest

from labcore.data import calibration_batches


@pytest.fixture
def batches(tiny_data, tiny_split):
    """The 16 images that calibrate: 6, 6 and 4."""
    return calibration_batches(tiny_data, tiny_split, 6)
