"""Allocation against brute force; packed files against Python integers."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small import network

from labcore import LabError
from labcore.qconfig import Scheme
from labcore.quantize import convert_simulated, fuse, layers, simulate
from labcore.studies import mixed

WEIGHT = Scheme(rule="least_error", per_channel=True)
ACTIVATION = Scheme(rule="least_error", zero_point="unsigned")
BITS = {"conv1": 3, "layer2.0.0": 5}  # of two layers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_the_allocation_is_the_best_of_all(seed, share):
    rng, names, widths = np.random.default_rng(seed), list("abcd"), (2, 4, 8)
    cost = pd.DataFrame(rng.random((4, 3)), index=names, columns=widths)
    sizes = pd.Series(rng.integers(10, 1000, 4), index=names)
    stored = pd.DataFrame(np.outer(sizes, widths) / 8, index=names, columns=widths)

    def total(table: pd.DataFrame, bits) -> float:
        return sum(table.loc[name, width] for name, width in zip(names, bits, strict=True))

    budget = share * sizes.sum()
    fits = [bits for bits in itertools.product(widths, repeat=4) if total(stored, bits) <= budget]
    found = mixed.allocate(cost, sizes, budget)
    assert list(found) == names and total(stored, found.values()) <= budget + 1e-6
    assert total(cost, found.values()) == pytest.approx(min(total(cost, bits) for bits in fits))


def test_a_budget_that_nothing_fits_is_refused():
    cost = pd.DataFrame([[1.0, 0.0]], index=["a"], columns=[4, 8])
    with pytest.raises(LabError, match="at least 50 bytes, found 49"):
        mixed.allocate(cost, pd.Series({"a": 100}), 49)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_bits_are_those_of_pythons_integers(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = np.random.default_rng(bits).integers(low, high, (5, 3, 7)).astype(np.int8)
    values.flat[:2] = low, high - 1
    packed = mixed.pack(values, bits)
    text = "".join(format(int(value) % 2**bits, f"0{bits}b") for value in values.flat)
    assert "".join(format(byte, "08b") for byte in packed) == text.ljust(8 * len(packed), "0")
    assert len(packed) == -(-values.size * bits // 8)
    assert np.array_equal(mixed.unpack(packed, bits, values.shape), values)


@pytest.fixture
def simulated(calibrated):
    def build(weight=WEIGHT, bits=BITS):
        overrides = mixed.overrides(bits, weight, ACTIVATION)
        return simulate(calibrated(weight, ACTIVATION, "simulated", overrides=overrides))

    return build


def test_a_packed_file_gives_the_same_network(simulated, tmp_path):
    model, other = simulated(), simulated()
    mixed.save_packed(tmp_path / "mixed.npz", model)
    for layer in layers(other).values():
        layer.weight.data.zero_()
    again, images = mixed.load_packed(tmp_path / "mixed.npz", other), torch.randn(9, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
        assert torch.equal(convert_simulated(model)(images), convert_simulated(again)(images))


def test_each_layer_has_its_own_bits_and_fewer_make_a_smaller_file(simulated, tmp_path):
    model, full = simulated(), simulated(bits={})
    codes = {name: mixed.codes(layer) for name, layer in layers(model).items()}
    assert codes["conv1"].min() >= -4 and codes["conv1"].max() <= 3
    assert codes["layer2.0.0"].abs().max() <= 16 < codes["fc"].abs().max()
    small = mixed.save_packed(tmp_path / "m.npz", model)
    assert small == (tmp_path / "m.npz").stat().st_size
    sizes = mixed.weight_bytes(fuse(network()))
    expected = sizes["conv1"] * 5 / 8 + sizes["layer2.0.0"] * 3 / 8
    assert mixed.save_packed(tmp_path / "8.npz", full) - small == pytest.approx(expected, abs=16)


def test_float_scales_are_not_packed(simulated, tmp_path):
    with pytest.raises(LabError, match="no power of two"):
        mixed.save_packed(tmp_path / "float.npz", simulated(Scheme(rule="none")))


@pytest.mark.parametrize("damage", [b"", b"not a file", None, "another network"])
def test_a_damaged_or_missing_file_is_one_line(damage, simulated, tmp_path):
    path, model = tmp_path / "mixed.npz", simulated()
    if damage == "another network":
        mixed.save_packed(path, model)
        model.fc = torch.nn.Linear(8, 8)
    elif damage is not None:
        path.write_bytes(damage)
    with pytest.raises(LabError, match="has no packed weights of this network") as error:
        mixed.load_packed(path, model)
    assert "\n" not in str(error.value)
