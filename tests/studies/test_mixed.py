"""Allocation against brute force; packed files against Python integers."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from labcore import LabError
from labcore.data import calibration_batches
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import calibrate, convert_simulated, fuse, layers, prepare_ptq, simulate
from labcore.studies.mixed import (
    allocate,
    codes,
    load_packed,
    overrides,
    pack,
    save_packed,
    unpack,
    weight_bytes,
)
from tests.small import network

WEIGHT = Scheme(rule="least_error", per_channel=True)
ACTIVATION = Scheme(rule="least_error", zero_point="unsigned")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_the_allocation_is_the_best_of_all(seed, share):
    rng = np.random.default_rng(seed)
    bits, names = (2, 4, 8), list("abcd")
    cost = pd.DataFrame(rng.random((4, 3)), index=names, columns=bits)
    sizes = pd.Series(rng.integers(10, 1000, 4), index=names)
    budget = share * sizes.sum()
    fits = [
        chosen
        for chosen in itertools.product(bits, repeat=4)
        if sum(sizes[n] * b / 8 for n, b in zip(names, chosen, strict=True)) <= budget
    ]
    least = min(sum(cost.loc[n, b] for n, b in zip(names, chosen, strict=True)) for chosen in fits)
    found = allocate(cost, sizes, budget)
    assert sum(cost.loc[name, own] for name, own in found.items()) == pytest.approx(least)
    assert sum(sizes[name] * own / 8 for name, own in found.items()) <= budget + 1e-6


def test_a_budget_that_nothing_fits_is_refused():
    cost = pd.DataFrame([[1.0, 0.0]], index=["a"], columns=[4, 8])
    with pytest.raises(LabError, match="at least 50 bytes, found 49"):
        allocate(cost, pd.Series({"a": 100}), 49)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_keeps_every_code(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = np.random.default_rng(bits).integers(low, high, (5, 3, 7)).astype(np.int8)
    values.flat[:2] = low, high - 1
    packed = pack(values, bits)
    assert len(packed) == -(-values.size * bits // 8)
    assert np.array_equal(unpack(packed, bits, values.shape), values)


def test_packed_bits_are_those_of_pythons_integers():
    values = np.array([1, -1, -4, 3], dtype=np.int8)
    text = "".join(format(int(value) % 8, "03b") for value in values)
    assert "".join(format(byte, "08b") for byte in pack(values, 3))[: len(text)] == text


@pytest.fixture
def mixed(tiny_data, tiny_split):
    bits = {"conv1": 3, "layer2.0.0": 5}
    qconfig = make_qconfig(WEIGHT, ACTIVATION, "simulated")
    own = overrides(bits, WEIGHT, ACTIVATION)
    return simulate(
        calibrate(prepare_ptq(network(), qconfig, own), calibration_batches(tiny_data, tiny_split))
    )


def test_each_layer_has_its_own_bits(mixed):
    ranges = {name: codes(layer) for name, layer in layers(mixed).items()}
    assert ranges["conv1"].min() >= -4 and ranges["conv1"].max() <= 3
    assert ranges["layer2.0.0"].abs().max() <= 16 and ranges["fc"].abs().max() > 16


def test_a_packed_file_gives_the_same_network(mixed, tmp_path):
    size = save_packed(tmp_path / "mixed.npz", mixed)
    assert size == (tmp_path / "mixed.npz").stat().st_size
    other = simulate(mixed)
    for layer in layers(other).values():
        layer.weight.data.zero_()
    again, images = load_packed(tmp_path / "mixed.npz", other), torch.randn(9, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(mixed(images), again(images))
        assert torch.equal(convert_simulated(mixed)(images), convert_simulated(again)(images))


def test_fewer_bits_make_a_smaller_file(tiny_data, tiny_split, tmp_path, mixed):
    qconfig = make_qconfig(WEIGHT, ACTIVATION, "simulated")
    full = simulate(calibrate(prepare_ptq(network(), qconfig), calibration_batches(tiny_data, tiny_split)))
    saved = save_packed(tmp_path / "8.npz", full) - save_packed(tmp_path / "m.npz", mixed)
    sizes = weight_bytes(fuse(network()))
    expected = sizes["conv1"] * 5 / 8 + sizes["layer2.0.0"] * 3 / 8
    assert saved == pytest.approx(expected, abs=16)


def test_float_scales_are_not_packed(tiny_data, tiny_split, tmp_path):
    qconfig = make_qconfig(Scheme(rule="none"), ACTIVATION, "simulated")
    model = simulate(calibrate(prepare_ptq(network(), qconfig), calibration_batches(tiny_data, tiny_split)))
    with pytest.raises(LabError, match="no power of two"):
        save_packed(tmp_path / "float.npz", model)


@pytest.mark.parametrize("damage", [b"", b"not a file", None])
def test_a_damaged_or_missing_file_is_one_line(mixed, tmp_path, damage):
    path = tmp_path / "mixed.npz"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(LabError, match="cannot be read as packed weights") as error:
        load_packed(path, mixed)
    assert "\n" not in str(error.value)
