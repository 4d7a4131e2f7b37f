"""What studies are built from: saturating sums against numpy's own int16, grids, codes."""

import itertools
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import network

from labcore.config import Recipe
from labcore.data import Split, calibration_batches
from labcore.evaluate import predict
from labcore.files.artifacts import write_json
from labcore.images.transforms import normalize
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import calibrate, layers, prepare_ptq, simulate
from labcore.studies.errors import inspect_qparams
from labcore.studies.mixed import overrides
from labcore.studies.study import (
    Study,
    _stored,
    grid,
    layer_codes,
    on_onednn,
    predict_ptq,
    run_exactly,
    saturated_16_bits,
)


def test_a_grid_has_every_combination_once():
    schemes = grid(Scheme(), bits=(8, 4), rule=("round", "ceil", "floor"))
    assert [(one.bits, one.rule) for one in schemes] == list(
        itertools.product((8, 4), ("round", "ceil", "floor"))
    )


@pytest.mark.parametrize("high", [127, 255])
def test_pairs_of_products_saturate_as_int16(high):
    rng = np.random.default_rng(high)
    x, w = rng.integers(0, high + 1, (6, 10)), rng.integers(-128, 128, (4, 10))
    x[0], w[0], w[1] = high, 127, -128
    expected = np.zeros((6, 4), dtype=np.int64)
    for row, column in itertools.product(range(6), range(4)):
        for k in range(0, 10, 2):
            pair = int(x[row, k]) * int(w[column, k]) + int(x[row, k + 1]) * int(w[column, k + 1])
            expected[row, column] += max(-32768, min(32767, pair))
    found = saturated_16_bits(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    assert np.array_equal(found, expected)
    assert np.array_equal(found, x @ w.T) == (high == 127)


def test_a_damaged_cell_is_computed_again(tmp_path):
    path = tmp_path / "cell.json"
    for damage in (b"", b"{", b'{"cell": 1}', b"[]", b"\xff"):
        path.write_bytes(damage)
        assert _stored(path) is None
    write_json(path, {"result": {"acc": 1}})
    assert _stored(path) == {"acc": 1} and _stored(tmp_path / "none.json") is None


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs an x86 processor")
def test_real_kernels_saturate_without_vnni_and_only_with_eight_bits(tiny_data, tiny_split, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    model = network(width=16)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.fill_(0.02)  # sums of products of one sign
    images = tiny_data.train_images[tiny_split.calibration]
    error, same = {}, {}
    for bits in (8, 7):
        schemes = Scheme(rule="none"), Scheme(bits=bits, rule="none", zero_point="unsigned")
        prepared = prepare_ptq(model, make_qconfig(*schemes, "simulated"))
        simulated = predict(simulate(calibrate(prepared, calibration_batches(tiny_data, tiny_split))), images)
        args = model, *schemes, tiny_data, tiny_split, images
        found = on_onednn(predict_ptq, *args, isa="AVX2")
        error[bits] = np.abs(found - simulated).max() / np.abs(simulated).max()
        same[bits] = np.array_equal(found, on_onednn(predict_ptq, *args))
    assert error[7] < 0.05 and error[8] > 0.2
    assert same == {7: True, 8: not torch.cpu._is_vnni_supported()}, "7 bits are exact on every processor"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


@pytest.mark.parametrize("vnni", [True, False])
def test_a_scheme_is_judged_on_kernels_only_where_they_add_exactly(vnni, tiny_data, tiny_split, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    qconfig = make_qconfig(Scheme(), Scheme(), "simulated")
    simulated = simulate(
        calibrate(prepare_ptq(network(), qconfig), calibration_batches(tiny_data, tiny_split))
    )
    assert hasattr(run_exactly(simulated).fc, "zero_point") is vnni
    assert run_exactly(simulated, 4) is simulated


@pytest.fixture
def study(tiny_data, tiny_split):
    study = Study.__new__(Study)
    study.data, study.split, study.model, study._calibrated = tiny_data, tiny_split, network(), {}
    return study


def test_images_sorted_by_class_leave_no_class_out(study, tiny_data):
    order = np.argsort(tiny_data.train_labels, kind="stable")
    study.data = replace(
        tiny_data, train_images=tiny_data.train_images[order], train_labels=tiny_data.train_labels[order]
    )
    study.split = Split(np.arange(0, 96, 2), np.arange(1, 96, 2), np.arange(0, 96, 2))
    chosen = study.quick_split.validation
    assert len(chosen) == 10 and set(chosen) <= set(study.split.validation)
    assert set(study.data.train_labels[chosen]) == {0, 1, 2, 3}
    first = calibration_batches(study.data, study.split, batch_size=12)[0]
    assert len(first.mean((1, 2, 3)).round(decimals=0).unique()) > 1, "one class only"
    again = calibration_batches(study.data, study.split, batch_size=12)[0]
    assert torch.equal(first, again)


def test_one_calibration_serves_all_allocations_of_bits(study, tiny_data):
    weight, activation = Scheme(rule="least_error", per_channel=True), Scheme(zero_point="unsigned")
    batch = normalize(torch.from_numpy(tiny_data.test_images))
    for bits in ({"conv1": 3}, {}, {"conv1": 4, "fc": 2}):
        found = simulate(study.allocated(bits, weight, activation))(batch)
        own = overrides(bits, weight, activation)
        expected = simulate(study.prepared(weight, activation, overrides=own))(batch)
        assert torch.equal(found, expected)
    assert len(study._calibrated) == 1


@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error", "none"])
def test_one_calibration_serves_all_weights_and_clamps(rule, study, tiny_data, tiny_split):
    activation = Scheme(rule=rule, zero_point="unsigned")
    batch = normalize(torch.from_numpy(tiny_data.test_images))
    outputs = []
    for weight in (Scheme(rule=rule, per_channel=True), Scheme(bits=3)):
        for limit in (None, 2, 6):
            clamped = replace(activation, max_shift_amount=limit)
            found = study.prepared(weight, clamped)
            fresh = prepare_ptq(study.model, make_qconfig(weight, clamped, "simulated"))
            fresh = calibrate(fresh, calibration_batches(tiny_data, tiny_split))
            table = inspect_qparams(found, [])
            assert table.equals(inspect_qparams(fresh, []))
            outputs.append(simulate(found)(batch))
            assert torch.equal(outputs[-1], simulate(fresh)(batch))
    assert len(study._calibrated) == 1
    assert not torch.equal(outputs[0], outputs[3]), "other weights"
    assert rule == "none" or not torch.equal(outputs[0], outputs[1]), "the clamp bites"


@pytest.mark.parametrize(("name", "zero_point"), [("conv1", 128), ("layer2.0.0", 0)])
def test_an_integer_product_of_a_layers_codes_is_its_convolution(name, zero_point, study, tiny_data):
    network = simulate(study.prepared(Scheme(rule="ceil"), Scheme(rule="ceil", zero_point="unsigned")))
    layer, seen = layers(network)[name], []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    codes, weights = layer_codes(
        network, name, normalize(torch.from_numpy(tiny_data.test_images[:4])), rows=50
    )
    outputs = torch.nn.functional.conv2d(seen[0], layer.weight, padding=1).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.linspace(0, len(outputs) - 1, 50).round().long()
    assert len((chosen % 16).unique()) == 16, "windows of every column of the images"
    outputs = outputs[chosen]  # (N, M)
    sums = (codes - zero_point) @ weights.T
    size = outputs.abs().max() / sums.abs().max()
    assert torch.allclose(outputs, sums * size, atol=1e-4 * outputs.abs().max().item())
    assert codes.shape[1] == 9 * 4 and codes.min() >= 0 and codes.max() <= 255
    if name == "conv1":  # three colours and a zero: neighbours are of one place
        assert (weights.unflatten(1, (9, 4))[:, :, 3] == 0).all()


def test_with_its_scale_rounded_up_nothing_of_the_images_is_clipped_and_all_else_stays(study, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)  # the simulation itself
    monkeypatch.setattr("labcore.studies.study.simulate", lambda network: network)
    up, plain = study.with_input_up(Scheme(), Scheme()), study.prepared(Scheme(), Scheme())
    high = max(batch.abs().max().item() for batch in calibration_batches(study.data, study.split))
    assert up.quant.activation_post_process.scale.item() == 2 ** math.ceil(math.log2(high / 127.5))
    before, after = (inspect_qparams(network, []) for network in (plain, up))
    assert before[before["layer"] != "quant"].equals(after[after["layer"] != "quant"])


def test_a_cell_that_a_notebook_builds_depends_on_the_notebooks_code_and_not_on_its_prose(
    study, tmp_path, monkeypatch
):
    monkeypatch.setattr("labcore.studies.study.ROOT", tmp_path)
    study.stage = "observers"
    (tmp_path / "notebooks").mkdir()

    def key(code: str, prose: str) -> dict:
        cells = [{"cell_type": "code", "source": [code]}, {"cell_type": "markdown", "source": [prose]}]
        (tmp_path / "notebooks/05_observers.ipynb").write_text(json.dumps({"cells": cells}))
        return study.other("repair", network).key

    assert key("steps = 120", "a") == key("steps = 120", "b") != key("steps = 60", "a")


def test_a_cell_of_qat_depends_on_the_code_that_trains(study, monkeypatch):
    arguments = Scheme(), Scheme(), "plain", Recipe(epochs=1, batch_size=8, lr=0.1)
    before = study.qat(*arguments).key
    assert before == study.qat(*arguments).key
    monkeypatch.setattr("labcore.studies.study.modules_hash", lambda *names: f"other {names}")
    after = study.qat(*arguments).key
    assert before["training"] != after["training"] and "optim" in after["training"]
