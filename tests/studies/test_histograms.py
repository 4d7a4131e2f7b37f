"""Histograms of tensors, and errors computed from them alone, against the values themselves."""

import numpy as np
import pytest
import torch
from small import snapshot, unchanged

from labcore.qconfig import Scheme
from labcore.quantize import layers
from labcore.studies.errors import histogram_errors, histograms, inspect_qparams

N_BINS = 512


def of_values(values: np.ndarray) -> dict:
    low, high = min(values.min(), 0), max(values.max(), 0)
    counts = np.histogram(values[values != 0], N_BINS, (low, high))[0]
    zeros = int((values == 0).sum())
    return {"min": values.min(), "max": values.max(), "zeros": zeros, "counts": counts.tolist()}


def test_a_histogram_counts_every_value_once(calibrated, batches):
    prepared = calibrated()
    before, table = snapshot(prepared), inspect_qparams(prepared, batches)
    found = {(row["layer"], row["tensor"]): row for row in histograms(prepared, batches, table)}
    assert len(found) == len(table) and unchanged(prepared, before)
    weight = layers(prepared)["layer2.0.0"].weight.detach().numpy()
    images = torch.cat(batches).numpy()
    for key, values in ((("layer2.0.0", "weight"), weight), (("quant", "activation"), images)):
        assert found[key] == of_values(values) | {"layer": key[0], "tensor": key[1]}
    seen = []
    prepared.conv1.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().numpy()))
    for batch in batches:
        prepared(batch)
    values = np.concatenate(seen)
    twice = of_values(np.stack([values, values]))  # torch's fused layers show them to the observer twice
    assert twice["min"] == 0 < twice["zeros"]
    assert found["conv1", "activation"] == twice | {"layer": "conv1", "tensor": "activation"}


@pytest.mark.parametrize("zero_point", ["symmetric", "unsigned", "affine"])
@pytest.mark.parametrize(("bits", "rule"), [(8, "round"), (4, "floor"), (3, "ceil"), (6, "none")])
def test_the_errors_of_a_histogram_are_close_to_those_of_the_values(
    bits, rule, zero_point, calibrated, batches
):
    activation = Scheme(bits, rule=rule, zero_point=zero_point)
    prepared = calibrated(Scheme(bits, rule=rule), activation, mode="simulated")
    table = inspect_qparams(prepared, batches)
    for row, histogram in zip(table.to_dict("records"), histograms(prepared, batches, table), strict=True):
        n_values, half = histogram["zeros"] + sum(histogram["counts"]), 2 ** (bits - 1)
        if n_values < 1000:  # the error of few values depends on each
            continue
        codes = (-half, half - 1) if row["tensor"] == "weight" else (0, 2 * half - 1)
        found = histogram_errors(histogram, row["scale"], row["zero_point"], *codes)
        assert found["snr_db"] == pytest.approx(row["snr_db"], abs=0.3), row
        assert found["share_clipped"] == pytest.approx(row["share_clipped"], abs=0.01), row


@pytest.mark.parametrize("values", [[-3.0, 5.0], [0.0, 2.0], [-4.0, -1.0]], ids=str)
def test_values_spread_evenly_have_the_errors_of_the_integrals(values):
    # 2 bits and scale 1 with zero point 2: the grid is -2, -1, 0, 1; a value clips below -2.5 and above 1.5.
    low, high = min(values[0], 0), max(values[1], 0)
    even = np.linspace(low, high, 200_001)[:-1] + (high - low) / 400_000
    histogram = {"min": values[0], "max": values[1], "zeros": 0, "counts": [7] * N_BINS}
    found = histogram_errors(histogram, 1.0, 2, 0, 3)
    inside = even.clip(-2, 1)
    rounding, clipping = ((np.rint(inside) - inside) ** 2).mean(), ((even - inside) ** 2).mean()
    assert found["mse_rounding"] == pytest.approx(rounding, rel=1e-4)
    assert found["mse_clipping"] == pytest.approx(clipping, rel=1e-4)
    assert found["share_clipped"] == pytest.approx(((even < -2.5) | (even > 1.5)).mean(), abs=1e-4)
    assert found["snr_db"] == pytest.approx(10 * np.log10((even**2).mean() / (rounding + clipping)), abs=1e-3)


def test_zeros_cost_nothing_and_nothing_but_zeros_is_exact():
    histogram = {"min": 0.0, "max": 1.0, "zeros": 0, "counts": [1] * N_BINS}
    dense = histogram_errors(histogram, 0.25, 0, 0, 1)
    sparse = histogram_errors(histogram | {"zeros": 3 * N_BINS}, 0.25, 0, 0, 1)
    for key in ("share_clipped", "mse_rounding", "mse_clipping"):
        assert sparse[key] == pytest.approx(dense[key] / 4) and dense[key] > 0
    assert sparse["snr_db"] == pytest.approx(dense["snr_db"])
    only_zeros = {"min": 0.0, "max": 0.0, "zeros": 9, "counts": [0] * N_BINS}
    found = histogram_errors(only_zeros, 0.25, 0, 0, 1)
    assert found == {"share_clipped": 0, "mse_rounding": 0, "mse_clipping": 0, "snr_db": float("inf")}


@pytest.mark.parametrize("bits", [3, 4])
def test_the_least_error_of_a_histogram_lies_at_the_exponent_that_the_observer_finds(
    bits, calibrated, batches
):
    scheme = Scheme(bits, rule="least_error")
    prepared = calibrated(scheme, scheme, "simulated")
    table = inspect_qparams(prepared, batches)
    half = 2 ** (bits - 1)
    for row, histogram in zip(table.to_dict("records"), histograms(prepared, batches, table), strict=True):
        if histogram["zeros"] + sum(histogram["counts"]) < 1000:  # the error of few values depends on each
            continue
        zero_point = row["zero_point"]
        codes = (-half, half - 1) if row["tensor"] == "weight" else (0, 2 * half - 1)
        ratios = {k: histogram_errors(histogram, 2.0**k, zero_point, *codes)["snr_db"] for k in range(-12, 5)}
        assert max(ratios, key=ratios.get) == row["exponent"], row
