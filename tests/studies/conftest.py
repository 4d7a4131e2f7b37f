import pytest
from small import network

from labcore.data import calibration_batches
from labcore.qconfig import REFERENCE, make_qconfig
from labcore.quantize import calibrate, prepare_ptq


@pytest.fixture
def batches(tiny_data, tiny_split):
    """The 16 images that calibrate: 6, 6 and 4."""
    return calibration_batches(tiny_data, tiny_split, 6)


@pytest.fixture
def calibrated(batches):
    """Calibrate the small network, or another, by a pair of schemes."""

    def build(weight=REFERENCE, activation=REFERENCE, mode="ptq", model=None, overrides=None):
        qconfig = make_qconfig(weight, activation, mode)
        return calibrate(prepare_ptq(model or network(), qconfig, overrides), batches)

    return build
