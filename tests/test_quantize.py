"""Fuse, prepare, calibrate, convert: against integer arithmetic in NumPy."""

import numpy as np
import pytest
import torch
from small import logits, network, snapshot, unchanged
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn.quantized import Conv2d, QFunctional

from labcore import LabError
from labcore.images.transforms import normalize
from labcore.qconfig import REFERENCE, CustomQConfig, Scheme, has_vnni, make_qconfig
from labcore.quantize import (
    RoundedAverage,
    calibrate,
    convert,
    convert_simulated,
    fuse,
    layers,
    prepare_ptq,
    prepare_qat,
    recalibrate,
    simulate,
)
from labcore.studies.errors import inspect_qparams, qparams

POWER2 = CustomQConfig.POWER2
exact_sums = pytest.mark.skipif(not has_vnni(), reason="this processor's sums of 16 bits saturate")
every_arch = pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet50"])
per_channel_or_not = pytest.mark.parametrize("per_channel", [False, True])
STEPS = {
    "fuse": fuse,
    "fuse_qat": lambda model: fuse(model, is_qat=True),
    "prepare_ptq": lambda model: prepare_ptq(model, POWER2.value),
    "prepare_qat": lambda model: prepare_qat(model, POWER2.qat),
}


@pytest.fixture
def calibrated(batches):
    """Calibrate the small network for PTQ, in simulation where no other mode is given."""

    def build(mode="simulated", per_channel=False, model=None, **options):
        qconfig = make_qconfig(Scheme(per_channel=per_channel), Scheme(), mode)
        return calibrate(prepare_ptq(model or network(width=8), qconfig, **options), batches)

    return build


@pytest.mark.parametrize("mode", ["ptq", "simulated"])
@pytest.mark.parametrize("range_", ["minmax", "moving_average", "percentile"])
@pytest.mark.parametrize(
    "changes",
    [{"rule": "ceil"}, {"rule": "none", "zero_point": "affine"}, {"zero_point": "unsigned"}, {"bits": 4}],
)
def test_ranges_that_were_seen_once_serve_every_scheme_that_observes_alike(mode, range_, changes, batches):
    before = Scheme(range=range_, max_shift_amount=8)
    after = make_qconfig(Scheme(), Scheme(**{"range": range_} | changes), mode)
    seen = calibrate(prepare_ptq(network(), make_qconfig(REFERENCE, before, mode)), batches)
    kept = snapshot(seen)
    again, anew = recalibrate(seen, network(), after), calibrate(prepare_ptq(network(), after), batches)
    expected = anew.state_dict()
    assert expected.keys() == again.state_dict().keys() and unchanged(seen, kept)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    one, other = (simulate(each) if mode == "simulated" else convert(each) for each in (again, anew))
    with torch.no_grad():
        assert torch.equal(one(batches[0]), other(batches[0]))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_step_works_on_a_copy(step):
    model = network()
    before, names = snapshot(model), [name for name, _ in model.named_modules()]
    with torch.no_grad():
        for value in step(model).parameters():
            value.add_(1)
    assert unchanged(model, before) and not model.training
    assert [name for name, _ in model.named_modules()] == names


def test_convert_works_on_a_copy_and_leaves_no_float_weights_in_it(calibrated):
    prepared = calibrated("ptq")
    before, int8 = snapshot(prepared), convert(prepared)
    assert unchanged(prepared, before) and isinstance(prepared.fc, nn.Linear)
    assert not list(int8.parameters())
    assert int8.conv1.weight().dtype == int8.fc.weight().dtype == torch.qint8


def test_only_what_is_for_training_is_in_train_mode(batches):
    assert [step(network()).training for step in STEPS.values()] == [False, True, False, True]
    assert not calibrate(prepare_ptq(network(), POWER2.value).train(), batches).training


@pytest.mark.parametrize("config", CustomQConfig)
@every_arch
def test_the_int8_network_is_close_to_the_float_one(arch, config, tiny_data, batches):
    model = network(arch, width=8)
    found = logits(convert(calibrate(prepare_ptq(model, config.value), batches)), tiny_data)
    centred = [values - values.mean(0) for values in (logits(model, tiny_data), found)]
    least = 0.9 if has_vnni() else 0.8  # activations of 7 bits
    assert torch.corrcoef(torch.stack([values.flatten() for values in centred]))[0, 1] > least


@exact_sums
def test_a_network_trained_with_fake_quantization_converts_to_what_it_simulated(tiny_data):
    prepared = prepare_qat(network(width=8), POWER2.qat)
    for _ in range(3):
        prepared(normalize(torch.from_numpy(tiny_data.train_images)))
    prepared.apply(tq.disable_observer).eval()
    converted = convert(prepared)
    step = converted.fc.scale * 0.125  # the network scales its logits
    differences = (logits(converted, tiny_data) - logits(prepared, tiny_data)).abs()
    assert differences.max() <= 2 * step and differences.mean() < step / 4


def by_hand(layer: Conv2d, given: torch.Tensor, relu: bool) -> np.ndarray:
    """An int8 convolution 3×3 in 64-bit integers, requantized with rounding to even."""
    inputs = given.int_repr().numpy().astype(np.int64) - given.q_zero_point()
    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    scale = given.q_scale() * layer.weight().q_scale()
    bias = layer.bias().detach().numpy().astype(np.float64) / scale
    assert np.array_equal(bias, np.rint(bias)) and bias.any()
    weights = layer.weight().int_repr().numpy().astype(np.int64)
    sums = np.einsum("bchwij,ocij->bohw", windows, weights) + bias.astype(np.int64)[:, None, None]
    outputs = np.rint(sums * (scale / layer.scale)) + layer.zero_point
    return np.clip(outputs, layer.zero_point if relu else 0, 255)


@exact_sums
@pytest.mark.parametrize("name", ["conv1", "layer4.2.conv1", "layer4.2.conv2"])
def test_a_converted_convolution_computes_what_integers_give_by_hand(name, int8, tiny_data):
    passed, layer = [], int8.get_submodule(name)
    layer.register_forward_hook(lambda module, given, output: passed.append((given[0], output)))
    logits(int8, tiny_data)
    ((given, output),) = passed
    values = output.int_repr().numpy()
    np.testing.assert_array_equal(values, by_hand(layer, given, relu=name != "layer4.2.conv2"))
    assert len(np.unique(values)) > 5


@pytest.mark.parametrize("is_qat", [False, True])
@every_arch
def test_every_addition_of_a_shortcut_becomes_a_quantized_module(arch, is_qat, batches):
    model = network(arch)
    prepared = prepare_qat(model, POWER2.qat) if is_qat else prepare_ptq(model, POWER2.value)
    converted = convert(calibrate(prepared, batches))
    names = [name for name, _ in model.named_modules() if name.endswith("add_relu")]
    assert names and all(isinstance(converted.get_submodule(name), QFunctional) for name in names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", CustomQConfig)
def test_weights_that_are_not_finite_make_calibration_name_a_layer(config, bad, batches):
    model = network()
    model.get_submodule("layer4.2.conv2").weight.data[0] = bad
    prepared = prepare_ptq(model, config.value)
    with pytest.raises(LabError, match="layer4.2"):
        calibrate(prepared, batches)
    assert not any(part._forward_pre_hooks for part in prepared.modules()), "nothing is left behind"


@pytest.mark.parametrize("size", [3, 5, 16])
def test_observers_see_every_batch_whatever_its_size(size, batches):
    parts = torch.cat(batches).split(size)
    prepared = calibrate(prepare_ptq(network(), POWER2.value), parts)
    observer = prepared.quant.activation_post_process
    assert (observer.min_val, observer.max_val) == torch.cat(batches).aminmax()
    whole = calibrate(prepare_ptq(network(), POWER2.value), batches)
    ranges = [inspect_qparams(one, batches)["raw_scale"] for one in (prepared, whole)]
    np.testing.assert_allclose(*ranges, rtol=1e-5)


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
def test_seven_bit_activations_stay_seven_bits_on_the_calibration_images(monkeypatch, calibrated, batches):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    model, largest = convert(calibrated("ptq")), []
    for name in qparams(model)["layer"].unique():
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, given, output: largest.append(output.int_repr().max().item()))
    model(torch.cat(batches))
    assert largest and max(largest) <= 127


@every_arch
def test_layers_are_all_convolutions_and_linear_layers_by_the_name_quantization_knows(arch):
    model = network(arch)
    wanted = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert list(layers(model)) == wanted
    fused = fuse(model)
    assert list(layers(fused)) == wanted
    assert {type(part) for part in layers(fused).values()} == {nn.Conv2d, nn.Linear}
    converted = convert(prepare_ptq(model, POWER2.value))
    assert all(hasattr(converted.get_submodule(name), "weight") for name in layers(fused))
    trained = layers(prepare_qat(model, POWER2.qat))
    assert list(trained) == wanted and all(hasattr(part, "weight_fake_quant") for part in trained.values())


@per_channel_or_not
def test_simulated_weights_are_those_of_the_int8_kernels(per_channel, calibrated):
    simulated = simulate(calibrated(per_channel=per_channel))
    for int8 in (convert(calibrated("ptq", per_channel)), convert_simulated(simulated)):
        for name, layer in layers(simulated).items():
            weight = int8.get_submodule(name).weight()
            assert torch.equal(layer.weight, weight.dequantize()), name
            scale = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
            assert torch.equal(layer.weight_scale.double(), scale.double())
            assert not layer.weight_zero_point.any()


@exact_sums
@per_channel_or_not
def test_the_simulated_network_computes_what_the_int8_kernels_do(per_channel, calibrated, tiny_data):
    simulated = logits(simulate(calibrated(per_channel=per_channel)), tiny_data)
    converted = convert(calibrated("ptq", per_channel))
    found, step = logits(converted, tiny_data), converted.fc.scale * 0.125
    assert (found - simulated).abs().mean() < step / 4
    assert (found.argmax(1) == simulated.argmax(1)).float().mean() >= 0.9


def test_simulating_one_layer_changes_its_weight_only(calibrated):
    prepared = calibrated()
    before, originals = snapshot(prepared), layers(prepared)
    one = simulate(prepared, only={"layer3.0.0"})
    changed = [name for name, layer in layers(one).items() if (layer.weight != originals[name].weight).any()]
    assert changed == ["layer3.0.0"] and unchanged(prepared, before)
    active = {
        name.removesuffix(".activation_post_process")
        for name, part in one.named_modules()
        if isinstance(part, tq.FakeQuantizeBase) and part.fake_quant_enabled.item()
    }
    assert active == {"layer3.0.0"}


def test_simulating_no_layer_is_the_float_network(calibrated, tiny_data):
    nothing = simulate(calibrated(), only=set())
    torch.testing.assert_close(logits(nothing, tiny_data), logits(fuse(network(width=8)), tiny_data))


@pytest.mark.parametrize("fused", [True, False])
def test_a_network_simulates_with_and_without_fusing(fused, calibrated, tiny_data):
    prepared, expected = calibrated(fused=fused), logits(network(width=8), tiny_data)
    assert fused == (not any(isinstance(part, nn.BatchNorm2d) for part in prepared.modules()))
    error = logits(simulate(prepared), tiny_data) - expected
    assert 0 < error.abs().mean() < 0.2 * expected.std()


def test_an_override_gives_one_layer_four_bits(calibrated, batches):
    four = make_qconfig(Scheme(4), Scheme(4), "simulated")
    prepared = calibrated(overrides={"layer2.0.0": four})
    for name, layer in layers(simulate(prepared)).items():
        codes = torch.unique(layer.weight / layer.weight_scale)
        assert torch.equal(codes, codes.round())
        assert (codes.min() >= -8 and codes.max() <= 7) == (name == "layer2.0.0")
    bits = inspect_qparams(prepared, batches).set_index("layer")["bits"]
    assert set(bits["layer2.0.0"]) == {4} and set(bits.drop("layer2.0.0")) == {8}


@pytest.mark.parametrize(("name", "near"), [("layer2.0.1x", "layer2.0.0"), ("fcc", "fc")])
@pytest.mark.parametrize("prepare", [prepare_ptq, prepare_qat])
def test_an_unknown_layer_is_refused_with_the_nearest_name(prepare, name, near):
    with pytest.raises(LabError, match=f"unknown layer '{name}': did you mean '{near}'"):
        prepare(network(), POWER2.value, overrides={name: POWER2.value})


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_simulated_linear_layer_computes_what_integers_give_by_hand(bits):
    torch.manual_seed(1)
    model = nn.Sequential(tq.QuantStub(), nn.Linear(6, 3)).eval()
    model.qconfig = make_qconfig(Scheme(bits), Scheme(), "simulated")
    images = torch.randn(5, 6)
    model[1].bias.data = torch.tensor([1.0, -0.5, 0.25])
    weight = model[1].weight.detach().numpy().copy()
    prepared = tq.prepare(model).apply(tq.disable_fake_quant)
    prepared(images)
    simulated = simulate(prepared)
    half = 2 ** (bits - 1)
    weight_scale = 2.0 ** np.rint(np.log2(np.abs(weight).max() / ((2 * half - 1) / 2)))
    codes = np.clip(np.rint(weight / weight_scale), -half, half - 1).astype(np.int64)
    (s_in, z_in), (s_out, z_out) = (
        (float(part.activation_post_process.scale), int(part.activation_post_process.zero_point))
        for part in prepared
    )
    given = np.clip(np.rint(images.numpy() / s_in) + z_in, 0, 255).astype(np.int64) - z_in
    sums = given @ codes.T + (model[1].bias.detach().numpy() / (s_in * weight_scale)).astype(np.int64)
    result = np.clip(np.rint(sums * (s_in * weight_scale / s_out)) + z_out, 0, 255)
    assert len(np.unique(codes)) > 2 and simulated[1].weight_scale.item() == weight_scale
    np.testing.assert_array_equal(simulated(images).detach().numpy(), (result - z_out) * s_out)


class Branching(nn.Sequential):
    """A network whose graph torch.fx cannot follow."""

    def forward(self, x):
        return super().forward(x if x.isnan().any() else x)


@pytest.mark.parametrize(("zero", "bias"), [(1, 3e4), (1, -3e4), (1, 100.0), (3, 3e4)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", [nn.Sequential, Branching])
def test_a_weight_scale_doubles_only_as_often_as_its_bias_asks_for(kind, per_channel, zero, bias):
    torch.manual_seed(0)
    model = kind(tq.QuantStub(), nn.Linear(6, 3)).eval()
    model[1].weight.data[:zero], model[1].bias.data[0] = 0, bias
    model.qconfig = make_qconfig(Scheme(per_channel=per_channel), Scheme(), "simulated")
    prepared = tq.prepare(model)
    prepared(torch.randn(50, 6))
    simulated = simulate(prepared)
    before, step = (
        simulated[1].weight_scale.expand(3).double(),
        2.0**30 * prepared[0].activation_post_process.scale,
    )
    needed = torch.tensor([abs(bias), 0, 0]).double() / step
    needed = needed if per_channel else needed.max().expand(3)
    if kind is Branching and (needed > before).any():
        with pytest.raises(LabError, match="a bias of 1 may not fit into 32 bits"):
            convert(prepared)
        return
    expected = torch.maximum(before, 2 ** needed.log2().ceil())
    int8 = convert(prepared)[1].weight()
    scale = int8.q_per_channel_scales() if per_channel else torch.tensor(int8.q_scale()).double().expand(3)
    assert torch.equal(scale, expected) and (scale > before).any() == ((needed > before).any())
    if zero < 3:
        assert int8.int_repr()[1:].any()


@pytest.mark.parametrize("mode", ["qat", "learned", "lsq"])
def test_every_training_mode_calibrates_and_then_trains(mode, tiny_data, batches):
    prepared = calibrate(prepare_qat(network(), make_qconfig(REFERENCE, REFERENCE, mode)), batches)
    fakes = [part for part in prepared.modules() if isinstance(part, tq.FakeQuantizeBase)]
    assert all(part.fake_quant_enabled.item() for part in fakes)
    before = {name: value.detach().clone() for name, value in prepared.named_parameters()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    output = prepared.train()(normalize(torch.from_numpy(tiny_data.train_images[:16])))
    after = prepared.named_parameters()
    assert all(torch.equal(value, before[name]) for name, value in after), "no observer sets a learned scale"
    nn.functional.cross_entropy(output, torch.from_numpy(tiny_data.train_labels[:16])).backward()
    optimizer.step()
    moved = {name for name, value in prepared.named_parameters() if not torch.equal(value, before[name])}
    learned = {"qat": "conv1.weight", "learned": "log2_scale", "lsq": ".scale"}[mode]
    assert any(name.endswith(learned) for name in moved) and len(moved) > 10
    assert torch.isfinite(logits(convert(prepared), tiny_data)).all()


@pytest.mark.parametrize("mode", ["qat", "learned", "lsq", "simulated"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_an_average_is_rounded_in_simulation_as_its_int8_kernel_rounds_it(arch, mode, tiny_data, batches):
    prepare = prepare_ptq if mode == "simulated" else prepare_qat
    prepared = calibrate(prepare(network(arch), make_qconfig(REFERENCE, REFERENCE, mode)), batches)
    simulated = simulate(prepared) if mode == "simulated" else prepared.eval()
    assert not any("avgpool" in name for name in simulated.state_dict()), "the grid is saved where it belongs"
    int8, passed = convert(prepared), []
    assert type(int8.avgpool) is nn.AdaptiveAvgPool2d
    assert isinstance(prepared.avgpool, RoundedAverage), "convert works on a copy"
    int8.avgpool.register_forward_hook(lambda _, x, y: passed.append((x[0].dequantize(), y.dequantize())))
    logits(int8, tiny_data)
    given, expected = (torch.cat(part) for part in zip(*passed, strict=True))
    found, scale = simulated.avgpool(given), int8.layer4[-1].add_relu.scale
    if mode == "lsq":  # no power of two: floats hit no tie exactly, and leave the last digit open
        mean = (given / scale).round().mean((2, 3), keepdim=True)
        tie = mean % 1 == 0.5
        torch.testing.assert_close(found[~tie], expected[~tie], rtol=1e-6, atol=0)
        assert 0 < tie.float().mean() < 0.3 and (found - expected).abs().max() < 1.01 * scale
    else:
        assert torch.equal(found, expected)
    assert not torch.equal(given.mean((2, 3), keepdim=True), expected), "here rounding changes something"
    simulated.apply(tq.disable_fake_quant)
    torch.testing.assert_close(simulated.avgpool(given), given.mean((2, 3), keepdim=True))


def test_a_rounded_average_follows_the_grid_of_its_own_copy(calibrated):
    """A copy that rounded to the grid of its original would pass every test but this one."""
    original = calibrated(model=network("resnet18"))
    copied = simulate(original)
    x = torch.rand(3, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    before = original.avgpool(x)
    for scale in (0.5, 0.125):
        copied.layer4[-1].add_relu.activation_post_process.scale.fill_(scale)
        assert torch.equal(copied.avgpool(x), (x.mean((2, 3), keepdim=True) / scale).round() * scale)
    assert torch.equal(original.avgpool(x), before)
