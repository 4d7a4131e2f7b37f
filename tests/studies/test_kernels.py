"""Saturating sums against Python's integers, and codes against the convolution that they compute."""

import itertools
import os

import numpy as np
import pytest
import torch
from small import network

from labcore.evaluate import predict
from labcore.images.transforms import normalize
from labcore.qconfig import Scheme
from labcore.quantize import layers, simulate
from labcore.studies.kernels import layer_codes, on_onednn, predict_ptq, run_exactly, saturated_16_bits


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
    sums = saturated_16_bits(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    assert np.array_equal(sums, expected)
    assert np.array_equal(sums, x @ w.T) == (high == 127)


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs an x86 processor")
def test_real_kernels_saturate_without_vnni_and_only_with_8_bits(tiny_data, batches, calibrated, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    model = network(width=16)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.fill_(0.02)  # sums of products of one sign
    images = tiny_data.train_images[:16]
    error, same = {}, {}
    for bits in (8, 7):
        schemes = Scheme(rule="none"), Scheme(bits=bits, rule="none", zero_point="unsigned")
        expected = predict(simulate(calibrated(*schemes, "simulated", model)), images)
        args = model, *schemes, batches, images
        logits = on_onednn(predict_ptq, *args, isa="AVX2")
        error[bits] = np.abs(logits - expected).max() / np.abs(expected).max()
        same[bits] = np.array_equal(logits, on_onednn(predict_ptq, *args))
    assert error[7] < 0.05 and error[8] > 0.2
    assert same == {7: True, 8: not torch.cpu._is_vnni_supported()}, "7 bits are exact on every processor"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


@pytest.mark.parametrize("vnni", [True, False])
def test_a_scheme_is_judged_on_kernels_only_where_they_add_exactly(vnni, calibrated, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    model = simulate(calibrated(Scheme(), Scheme(), "simulated"))
    assert hasattr(run_exactly(model).fc, "zero_point") is vnni
    assert run_exactly(model, 4) is model


@pytest.mark.parametrize(("name", "zero_point"), [("conv1", 128), ("layer2.0.0", 0)])
def test_an_integer_product_of_a_layers_codes_is_its_convolution(name, zero_point, tiny_data, calibrated):
    schemes = Scheme(rule="ceil"), Scheme(rule="ceil", zero_point="unsigned")
    model = simulate(calibrated(*schemes, "simulated"))
    layer, inputs = layers(model)[name], []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    codes, weights = layer_codes(model, name, normalize(torch.from_numpy(tiny_data.test_images[:4])), rows=50)
    outputs = torch.nn.functional.conv2d(inputs[0], layer.weight, padding=1).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.linspace(0, len(outputs) - 1, 50).round().long()
    assert len((chosen % 16).unique()) == 16, "windows of every column of the images"
    outputs, sums = outputs[chosen], (codes - zero_point) @ weights.T  # (N, M)
    size = outputs.abs().max() / sums.abs().max()
    assert torch.allclose(outputs, sums * size, atol=1e-4 * outputs.abs().max().item())
    assert codes.shape[1] == 9 * 4 and codes.min() >= 0 and codes.max() <= 255
    if name == "conv1":  # three colours and a zero: neighbours are of one place
        assert (weights.unflatten(1, (9, 4))[:, :, 3] == 0).all()
