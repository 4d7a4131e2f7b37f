"""Fuse, prepare, calibrate, convert: against integer arithmetic in NumPy, and against files that lie."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import logits, network, snapshot, unchanged
from torch import nn
from torch.ao.nn.quantized import Conv2d, QFunctional

from labcore import LabError
from labcore.data import Split, calibration_batches
from labcore.engines.eager import load_float, load_int8, save_int8
from labcore.files.tensors import load_tensors, save_tensors
from labcore.images.transforms import normalize
from labcore.model import build_model
from labcore.qconfig import REFERENCE, CustomQConfig, Scheme, has_vnni, make_qconfig
from labcore.quantize import (
    RoundedAverage,
    calibrate,
    convert,
    fuse,
    layers,
    on_grid,
    prepare_ptq,
    prepare_qat,
    simulate,
)
from labcore.studies.errors import inspect_qparams, qparams

POWER2, DEFAULT = CustomQConfig.POWER2, CustomQConfig.DEFAULT
exact_sums = pytest.mark.skipif(
    not has_vnni(), reason="this processor adds int8 products in 16 bits, which saturate"
)


@pytest.mark.parametrize(
    "step",
    [
        fuse,
        lambda model: fuse(model, is_qat=True),
        lambda model: prepare_ptq(model, POWER2.value),
        lambda model: prepare_qat(model, POWER2.qat),
    ],
    ids=["fuse", "fuse_qat", "prepare_ptq", "prepare_qat"],
)
def test_every_step_works_on_a_copy(step):
    model = network()
    before, names = snapshot(model), [name for name, _ in model.named_modules()]
    with torch.no_grad():
        for value in step(model).parameters():
            value.add_(1)
    assert (
        unchanged(model, before)
        and [name for name, _ in model.named_modules()] == names
        and not model.training
    )


def test_convert_works_on_a_copy(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, tiny_split))
    before = snapshot(prepared)
    convert(prepared)
    assert unchanged(prepared, before) and isinstance(prepared.fc, nn.Linear)


@pytest.mark.parametrize("is_qat", [False, True])
def test_only_fusion_for_training_leaves_the_network_in_train_mode(is_qat):
    assert fuse(network(), is_qat).training is is_qat


@pytest.mark.parametrize("config", CustomQConfig)
@pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet50"])
def test_the_int8_network_is_close_to_the_float_one(arch, config, tiny_data, tiny_split):
    model = network(arch, width=8)
    expected = logits(model, tiny_data)
    found = logits(
        convert(calibrate(prepare_ptq(model, config.value), calibration_batches(tiny_data, tiny_split))),
        tiny_data,
    )
    centred = [values - values.mean(0) for values in (expected, found)]
    least = 0.9 if has_vnni() else 0.8  # activations of 7 bits
    assert torch.corrcoef(torch.stack([values.flatten() for values in centred]))[0, 1] > least


@exact_sums
def test_a_network_trained_with_fake_quantization_converts_to_what_it_simulated(tiny_data):
    prepared = prepare_qat(network(width=8), POWER2.qat)
    for _ in range(3):
        prepared(normalize(torch.from_numpy(tiny_data.train_images)))
    prepared.apply(torch.ao.quantization.disable_observer).eval()
    simulated = logits(prepared, tiny_data)
    converted = convert(prepared)
    step = converted.fc.scale * 0.125  # the network scales its logits
    differences = (logits(converted, tiny_data) - simulated).abs()
    assert differences.max() <= 2 * step and differences.mean() < step / 4


def by_hand(layer: Conv2d, given: torch.Tensor, relu: bool) -> np.ndarray:
    """An int8 convolution 3×3 in 64-bit integers, requantized with rounding to even."""
    inputs = given.int_repr().numpy().astype(np.int64) - given.q_zero_point()
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
    )
    scale = given.q_scale() * layer.weight().q_scale()
    bias = layer.bias().detach().numpy().astype(np.float64) / scale
    assert np.array_equal(bias, np.rint(bias)) and bias.any()
    sums = (
        np.einsum("bchwij,ocij->bohw", windows, layer.weight().int_repr().numpy().astype(np.int64))
        + bias.astype(np.int64)[:, None, None]
    )
    outputs = np.rint(sums * (scale / layer.scale)) + layer.zero_point
    return np.clip(outputs, layer.zero_point if relu else 0, 255)


@exact_sums
@pytest.mark.parametrize(
    ("name", "relu"), [("conv1", True), ("layer4.2.conv1", True), ("layer4.2.conv2", False)]
)
def test_a_converted_convolution_computes_what_integers_give_by_hand(name, relu, int8, tiny_data):
    seen, layer = [], int8.get_submodule(name)
    layer.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    logits(int8, tiny_data)
    ((given, output),) = seen
    values = output.int_repr().numpy()
    np.testing.assert_array_equal(values, by_hand(layer, given, relu))
    assert len(np.unique(values)) > 5


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet50"])
def test_every_addition_of_a_shortcut_becomes_a_quantized_module(arch, is_qat, tiny_data, tiny_split):
    model = network(arch)
    prepared = prepare_qat(model, POWER2.qat) if is_qat else prepare_ptq(model, POWER2.value)
    converted = convert(calibrate(prepared, calibration_batches(tiny_data, tiny_split)))
    names = [name for name, _ in model.named_modules() if name.endswith("add_relu")]
    assert names and all(isinstance(converted.get_submodule(name), QFunctional) for name in names)


def test_an_int8_network_holds_no_float_weights(int8):
    assert (
        not list(int8.parameters())
        and int8.conv1.weight().dtype == torch.qint8
        and int8.fc.weight().dtype == torch.qint8
    )


@pytest.mark.parametrize("int8", CustomQConfig, indirect=True)
def test_a_saved_int8_network_gives_the_same_logits(int8, tiny_data, tmp_path, request):
    config = request.node.callspec.params["int8"]
    save_int8(tmp_path / "net.pt", int8)
    torch.manual_seed(9)
    loaded = load_int8(tmp_path / "net.pt", build_model("resnet9", 4, 4), config.value)
    assert torch.equal(logits(loaded, tiny_data), logits(int8, tiny_data))
    assert qparams(loaded).equals(qparams(int8))


def refused(call) -> str:
    with pytest.raises(LabError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reads(path):
    """The three ways to read a file of weights."""
    return [
        lambda: load_tensors(path),
        lambda: load_float(path, network()),
        lambda: load_int8(path, network(), POWER2.value),
    ]


@pytest.mark.parametrize("reader", range(3), ids=["tensors", "float", "int8"])
class TestFilesThatLie:
    def test_a_missing_file_is_named_in_one_line(self, reader, tmp_path):
        assert "absent.pt is missing" in refused(reads(tmp_path / "absent.pt")[reader])

    @pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
    def test_a_truncated_file_is_refused_in_one_line(self, share, reader, int8, tmp_path):
        path = tmp_path / "net.pt"
        save_int8(path, int8)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        assert "net.pt" in refused(reads(path)[reader])

    @pytest.mark.parametrize(
        "content",
        [
            b"\0" * 500,
            b".",
            b"\x80\x02G1",
            b"\x80\xff1",
            b"<html>404 Not Found</html>",
            b"some text\n",
            np.random.default_rng(0).bytes(3000),
        ],
        ids=["zeros", "empty_stack", "cut_number", "protocol", "html", "text", "random"],
    )
    def test_garbage_is_refused_in_one_line(self, content, reader, tmp_path):
        (tmp_path / "net.pt").write_bytes(content)
        assert "net.pt" in refused(reads(tmp_path / "net.pt")[reader])

    def test_a_folder_is_refused_in_one_line(self, reader, tmp_path):
        refused(reads(tmp_path)[reader])

    @pytest.mark.parametrize(
        "write",
        [
            lambda path, value: torch.save(value, path),
            lambda path, value: torch.save(value, path, _use_new_zipfile_serialization=False),
            lambda path, value: path.write_bytes(pickle.dumps(value, protocol=2)),
            lambda path, value: path.write_bytes(pickle.dumps(value)),
        ],
        ids=["zip", "legacy", "pickle2", "pickle"],
    )
    def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(self, write, reader, tmp_path):
        write(tmp_path / "net.pt", {"conv1.weight": Touches(tmp_path / "touched")})
        assert "net.pt" in refused(reads(tmp_path / "net.pt")[reader])
        assert not (tmp_path / "touched").exists()


class Touches:
    """A pickle of this creates a file when it is read."""

    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_the_pickle_of_these_tests_does_run_a_command_where_pickles_are_executed(tmp_path):
    pickle.loads(pickle.dumps(Touches(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("other", [{"arch": "resnet18"}, {"width": 8}, {"classes": 7}], ids=str)
@pytest.mark.parametrize("int8", CustomQConfig, indirect=True)
def test_an_int8_file_of_another_network_is_refused_in_one_line(int8, other, tmp_path, request):
    save_int8(tmp_path / "net.pt", int8)
    config = request.node.callspec.params["int8"]
    assert "net.pt" in refused(lambda: load_int8(tmp_path / "net.pt", network(**other), config.value))


@pytest.mark.parametrize(
    "value", [[torch.zeros(1)], torch.zeros(3), 5, {}, {"conv1.weight": 1}, {0: torch.zeros(1)}], ids=repr
)
@pytest.mark.parametrize("reader", [1, 2], ids=["float", "int8"])
def test_a_file_without_a_state_dict_is_refused_in_one_line(value, reader, tmp_path):
    save_tensors(tmp_path / "net.pt", value)
    assert "net.pt" in refused(reads(tmp_path / "net.pt")[reader])


def test_an_int8_file_is_refused_as_float_weights(int8, tmp_path):
    save_int8(tmp_path / "net.pt", int8)
    refused(lambda: load_float(tmp_path / "net.pt", network()))


def test_float_weights_are_refused_as_an_int8_file(tmp_path):
    save_tensors(tmp_path / "net.pt", network().state_dict())
    refused(lambda: load_int8(tmp_path / "net.pt", network(), POWER2.value))


def test_float_weights_survive_the_file(tiny_data, tmp_path):
    model = network()
    save_tensors(tmp_path / "net.pt", model.state_dict())
    torch.manual_seed(9)
    assert torch.equal(
        logits(load_float(tmp_path / "net.pt", build_model("resnet9", 4, 4)), tiny_data),
        logits(model, tiny_data),
    )


def test_an_empty_calibration_set_is_refused(tiny_data):
    nothing = Split(np.arange(64), np.arange(64, 96), np.arange(0))
    assert "calibration set is empty" in refused(
        lambda: calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, nothing))
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", CustomQConfig)
def test_weights_that_are_not_finite_make_calibration_name_a_layer(config, bad, tiny_data, tiny_split):
    model = network()
    model.get_submodule("layer4.2.conv2").weight.data[0] = bad
    assert "layer4.2" in refused(
        lambda: calibrate(prepare_ptq(model, config.value), calibration_batches(tiny_data, tiny_split))
    )


def test_calibration_looks_at_the_calibration_images_only(tiny_data, tiny_split):
    images = np.full_like(tiny_data.train_images, 255)
    images[tiny_split.calibration] = tiny_data.train_images[tiny_split.calibration] // 2
    prepared = calibrate(
        prepare_ptq(network(), POWER2.value),
        calibration_batches(replace(tiny_data, train_images=images), tiny_split, batch_size=5),
    )
    expected = normalize(torch.from_numpy(images[tiny_split.calibration]))
    watcher = prepared.quant.activation_post_process
    assert (watcher.min_val, watcher.max_val) == (expected.min(), expected.max())
    assert watcher.max_val < normalize(torch.from_numpy(images)).max()


def test_the_batch_size_of_calibration_changes_no_range(tiny_data, tiny_split):
    ranges = [
        inspect_qparams(
            calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, tiny_split, size)),
            calibration_batches(tiny_data, tiny_split),
        )[["raw_scale"]]
        for size in (3, 16)
    ]
    np.testing.assert_allclose(*ranges, rtol=1e-5)


def test_calibration_is_done_in_eval_mode(tiny_data, tiny_split):
    assert not calibrate(
        prepare_ptq(network(), POWER2.value).train(), calibration_batches(tiny_data, tiny_split)
    ).training


def test_calibration_normalises_like_evaluation(monkeypatch, tiny_data, tiny_split):
    prepared, seen = prepare_ptq(network(), POWER2.value), []
    monkeypatch.setattr(
        "labcore.data.normalize", lambda images: seen.append(len(images)) or normalize(images)
    )
    calibrate(prepared, calibration_batches(tiny_data, tiny_split, batch_size=6))
    assert seen == [6, 6, 4]


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
def test_seven_bit_activations_stay_seven_bits_on_the_calibration_images(monkeypatch, tiny_data, tiny_split):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    model = convert(
        calibrate(
            prepare_ptq(network(), make_qconfig(REFERENCE, REFERENCE)),
            calibration_batches(tiny_data, tiny_split),
        )
    )
    largest = {}

    def keep(name):
        return lambda module, given, output: largest.__setitem__(name, output.int_repr().max().item())

    for name in qparams(model)["layer"].unique():
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        model(normalize(torch.from_numpy(tiny_data.train_images[tiny_split.calibration])))
    assert {name: value for name, value in largest.items() if value > 127} == {}


@pytest.mark.parametrize("known", ["validation", "test"])
def test_calibration_refuses_images_that_judge(known, tiny_data, tiny_split):
    data, split = tiny_data, tiny_split
    if known == "validation":
        split = replace(split, calibration=np.array([3, 64]))
    else:
        data = replace(data, test_images=data.train_images[split.calibration])
    message = refused(
        lambda: calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(data, split))
    )
    assert (f"calibration images are also {known}" if known == "validation" else "16 of 16") in message
    assert "training images only" in message


def test_calibration_batches_are_the_normalised_calibration_images_each_once(tiny_data, tiny_split):
    found = calibration_batches(tiny_data, tiny_split, 6)
    assert [len(batch) for batch in found] == [6, 6, 4]
    expected = normalize(torch.from_numpy(tiny_data.train_images[tiny_split.calibration]))
    found = torch.cat(found)
    places = [[torch.equal(one, other) for other in expected].index(True) for one in found]
    assert sorted(places) == list(range(16)) and places != sorted(places)


@pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet50"])
def test_layers_are_all_convolutions_and_linear_layers_by_the_name_quantization_knows(arch):
    model = network(arch)
    wanted = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert list(layers(model)) == wanted
    fused = fuse(model)
    assert len(layers(fused)) == len(wanted) and {type(part) for part in layers(fused).values()} == {
        nn.Conv2d,
        nn.Linear,
    }
    converted = convert(calibrate_nothing(fused))
    assert all(hasattr(converted.get_submodule(name), "weight") for name in layers(fused))
    trained = layers(prepare_qat(model, POWER2.qat))
    assert len(trained) == len(wanted) and all(
        hasattr(part, "weight_fake_quant") for part in trained.values()
    )


def calibrate_nothing(fused: nn.Module) -> nn.Module:
    fused.qconfig = POWER2.value
    return torch.ao.quantization.prepare(fused)


def test_the_layers_of_the_small_network_have_the_names_of_its_modules():
    blocks = ["layer2.2.conv1", "layer2.2.conv2"], ["layer4.2.conv1", "layer4.2.conv2"]
    fused = ["conv1", "layer2.0.0", *blocks[0], "layer3.0.0", "layer4.0.0", *blocks[1], "fc"]
    assert list(layers(fuse(network()))) == fused == list(layers(network()))


def simulated_qconfig(bits: int = 8, per_channel: bool = False):
    return make_qconfig(Scheme(bits, per_channel=per_channel), Scheme(bits), "simulated")


def calibrated(data, split, mode="simulated", per_channel=False, **kwargs) -> nn.Module:
    qconfig = make_qconfig(Scheme(per_channel=per_channel), Scheme(), mode)
    return calibrate(prepare_ptq(network(width=8), qconfig, **kwargs), calibration_batches(data, split))


@pytest.mark.parametrize("per_channel", [False, True])
def test_simulated_weights_are_those_of_the_int8_kernels(per_channel, tiny_data, tiny_split):
    simulated = simulate(calibrated(tiny_data, tiny_split, per_channel=per_channel))
    converted = convert(calibrated(tiny_data, tiny_split, "ptq", per_channel))
    for name, layer in layers(simulated).items():
        weight = converted.get_submodule(name).weight()
        assert torch.equal(layer.weight, weight.dequantize()), name
        scale = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
        assert torch.equal(layer.weight_scale.double(), scale.double()) and not layer.weight_zero_point.any()


@exact_sums
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_simulated_network_computes_what_the_int8_kernels_do(per_channel, tiny_data, tiny_split):
    simulated = logits(simulate(calibrated(tiny_data, tiny_split, per_channel=per_channel)), tiny_data)
    converted = convert(calibrated(tiny_data, tiny_split, "ptq", per_channel))
    found, step = logits(converted, tiny_data), converted.fc.scale * 0.125
    assert (found - simulated).abs().mean() < step / 4
    assert (found.argmax(1) == simulated.argmax(1)).float().mean() >= 0.9


def test_simulating_one_layer_changes_its_weight_only(tiny_data, tiny_split):
    prepared = calibrated(tiny_data, tiny_split)
    before = snapshot(prepared)
    one = simulate(prepared, only={"layer3.0.0"})
    changed = [
        name
        for name, layer in layers(one).items()
        if not torch.equal(layer.weight, layers(prepared)[name].weight)
    ]
    assert changed == ["layer3.0.0"] and unchanged(prepared, before)
    active = {
        name.removesuffix(".activation_post_process")
        for name, part in one.named_modules()
        if isinstance(part, torch.ao.quantization.FakeQuantizeBase) and part.fake_quant_enabled.item()
    }
    assert active == {"layer3.0.0"}


def test_simulating_no_layer_is_the_float_network(tiny_data, tiny_split):
    prepared = calibrated(tiny_data, tiny_split)
    nothing = simulate(prepared, only=set())
    torch.testing.assert_close(logits(nothing, tiny_data), logits(fuse(network(width=8)), tiny_data))


def test_a_network_simulates_with_and_without_fusing(tiny_data, tiny_split):
    expected = logits(network(width=8), tiny_data)
    for fused in (True, False):
        prepared = calibrated(tiny_data, tiny_split, fused=fused)
        assert fused == (not any(isinstance(part, nn.BatchNorm2d) for part in prepared.modules()))
        error = logits(simulate(prepared), tiny_data) - expected
        assert 0 < error.abs().mean() < 0.2 * expected.std()


def test_an_override_gives_one_layer_four_bits(tiny_data, tiny_split):
    four = simulated_qconfig(4)
    prepared = calibrated(tiny_data, tiny_split, overrides={"layer2.0.0": four})
    for name, layer in layers(simulate(prepared)).items():
        codes = torch.unique(layer.weight / layer.weight_scale)
        assert torch.equal(codes, codes.round())
        assert (codes.min() >= -8 and codes.max() <= 7) == (name == "layer2.0.0")
    bits = inspect_qparams(prepared, calibration_batches(tiny_data, tiny_split)).set_index("layer")["bits"]
    assert set(bits["layer2.0.0"]) == {4} and set(bits.drop("layer2.0.0")) == {8}


@pytest.mark.parametrize(
    ("name", "hint"), [("layer2.0.1x", "did you mean 'layer2.0.0'"), ("fcc", "did you mean 'fc'")]
)
@pytest.mark.parametrize("prepare", [prepare_ptq, prepare_qat])
def test_an_unknown_layer_is_refused_with_the_nearest_name(prepare, name, hint):
    message = refused(lambda: prepare(network(), POWER2.value, overrides={name: POWER2.value}))
    assert f"unknown layer {name!r}" in message and hint in message


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_simulated_linear_layer_computes_what_integers_give_by_hand(bits):
    torch.manual_seed(1)
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Linear(6, 3)).eval()
    model.qconfig = make_qconfig(Scheme(bits), Scheme(), "simulated")
    images = torch.randn(5, 6)
    model[1].bias.data = torch.tensor([1.0, -0.5, 0.25])
    weight = model[1].weight.detach().numpy().copy()
    prepared = torch.ao.quantization.prepare(model)
    prepared.apply(torch.ao.quantization.disable_fake_quant)
    prepared(images)
    simulated = simulate(prepared)
    half = 2 ** (bits - 1)
    weight_scale = 2.0 ** np.rint(np.log2(np.abs(weight).max() / ((2 * half - 1) / 2)))
    codes = np.clip(np.rint(weight / weight_scale), -half, half - 1).astype(np.int64)
    stub, out = (part.activation_post_process for part in prepared)
    s_in, s_out = float(stub.scale), float(out.scale)
    zero = int(stub.zero_point)
    levels = high = 255
    given = np.clip(np.rint(images.numpy() / s_in) + zero, 0, levels).astype(np.int64) - zero
    bias = (model[1].bias.detach().numpy() / (s_in * weight_scale)).astype(np.int64)
    sums = given @ codes.T + bias
    result = np.clip(np.rint(sums * (s_in * weight_scale / s_out)) + int(out.zero_point), 0, high)
    assert len(np.unique(codes)) > 2 and simulated[1].weight_scale.item() == weight_scale
    np.testing.assert_array_equal(simulated(images).detach().numpy(), (result - int(out.zero_point)) * s_out)


@pytest.mark.parametrize("mode", ["qat", "learned", "lsq"])
def test_every_training_mode_calibrates_and_then_trains(mode, tiny_data, tiny_split):
    prepared = prepare_qat(network(), make_qconfig(REFERENCE, REFERENCE, mode))
    calibrate(prepared, calibration_batches(tiny_data, tiny_split))
    fakes = [part for part in prepared.modules() if isinstance(part, torch.ao.quantization.FakeQuantizeBase)]
    assert all(part.fake_quant_enabled.item() for part in fakes)
    before = {name: value.detach().clone() for name, value in prepared.named_parameters()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    output = prepared.train()(normalize(torch.from_numpy(tiny_data.train_images[:16])))
    nn.functional.cross_entropy(output, torch.from_numpy(tiny_data.train_labels[:16])).backward()
    optimizer.step()
    moved = {name for name, value in prepared.named_parameters() if not torch.equal(value, before[name])}
    learned = {"qat": "conv1.weight", "learned": "log2_scale", "lsq": ".scale"}[mode]
    assert any(name.endswith(learned) for name in moved) and len(moved) > 10
    assert torch.isfinite(logits(convert(prepared), tiny_data)).all()


@pytest.mark.parametrize("mode", ["qat", "learned", "lsq", "simulated"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_an_average_is_rounded_in_simulation_as_its_int8_kernel_rounds_it(arch, mode, tiny_data, tiny_split):
    prepare = prepare_ptq if mode == "simulated" else prepare_qat
    prepared = calibrate(
        prepare(network(arch), make_qconfig(REFERENCE, REFERENCE, mode)),
        calibration_batches(tiny_data, tiny_split),
    )
    simulated = simulate(prepared) if mode == "simulated" else prepared.eval()
    saved = simulated.state_dict()
    assert not any("avgpool" in name for name in saved), "the grid is saved once, where it belongs"
    int8, passed = convert(prepared), []
    assert type(int8.avgpool) is nn.AdaptiveAvgPool2d
    assert isinstance(prepared.avgpool, RoundedAverage), "convert works on a copy"

    def keep(_, inputs, output):
        passed.append((inputs[0].dequantize(), output.dequantize()))

    int8.avgpool.register_forward_hook(keep)
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
    simulated.apply(torch.ao.quantization.disable_fake_quant)
    torch.testing.assert_close(simulated.avgpool(given), given.mean((2, 3), keepdim=True))


def test_a_rounded_average_follows_the_grid_of_its_own_copy(tiny_data, tiny_split):
    """A copy that rounded to the grid of its original would pass every test but this one."""
    qconfig = make_qconfig(REFERENCE, REFERENCE, "simulated")
    original = calibrate(
        prepare_ptq(network("resnet18"), qconfig), calibration_batches(tiny_data, tiny_split)
    )
    copied = simulate(original)
    x = torch.rand(3, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    before = original.avgpool(x)
    for scale in (0.5, 0.125):
        copied.layer4[-1].add_relu.activation_post_process.scale.fill_(scale)
        assert torch.equal(copied.avgpool(x), (x.mean((2, 3), keepdim=True) / scale).round() * scale)
    assert torch.equal(original.avgpool(x), before)


@pytest.mark.parametrize("per_channel", [False, True])
def test_on_grid_is_rounding_and_clipping(per_channel):
    weight = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.25, 0.5, 0.125] if per_channel else [0.25])
    found = on_grid(weight, scale, torch.zeros(len(scale), dtype=torch.int64), -8, 7)
    own = scale.view(-1, 1, 1, 1)
    assert torch.equal(found, (weight / own).round().clamp(-8, 7) * own)
