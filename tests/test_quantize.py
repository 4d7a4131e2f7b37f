"""Fuse, prepare, calibrate, convert: against integer arithmetic in NumPy, and against files that lie."""

import copy
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.nn.quantized import Conv2d, QFunctional

from labcore import LabError, quantize
from labcore.checkpoint import load_tensors, save_tensors
from labcore.data import Split
from labcore.model import build_model
from labcore.observer import CustomQConfig, PowerOfTwoObserver, has_vnni, power_of_two_qconfig
from labcore.quantize import (
    calibrate,
    convert,
    fuse,
    load_float,
    load_int8,
    observed,
    prepare_ptq,
    prepare_qat,
    qparams,
    save_int8,
)
from labcore.transforms import normalize

POWER2, DEFAULT = CustomQConfig.POWER2, CustomQConfig.DEFAULT
exact_sums = pytest.mark.skipif(
    not has_vnni(), reason="this processor adds int8 products in 16 bits, which saturate"
)


def network(arch: str = "resnet9", width: int = 4, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(arch, classes, width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # multiples of 1/8, so that the integer kernels round no bias
            module.bias.data = torch.randint(-4, 5, module.bias.shape) / 8
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, data) -> torch.Tensor:
    return model(normalize(torch.from_numpy(data.test_images)))


def snapshot(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def int8(tiny_data, tiny_split, request):
    """A calibrated and converted network; POWER2 where the test names no other configuration."""
    config = getattr(request, "param", POWER2)
    return convert(calibrate(prepare_ptq(network(), config.value), tiny_data, tiny_split))


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
    prepared = calibrate(prepare_ptq(network(), POWER2.value), tiny_data, tiny_split)
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
    found = logits(convert(calibrate(prepare_ptq(model, config.value), tiny_data, tiny_split)), tiny_data)
    centred = [values - values.mean(0) for values in (expected, found)]
    assert torch.corrcoef(torch.stack([values.flatten() for values in centred]))[0, 1] > 0.9


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
    converted = convert(calibrate(prepared, tiny_data, tiny_split))
    names = [name for name, _ in model.named_modules() if name.endswith("add_relu")]
    assert names and all(isinstance(converted.get_submodule(name), QFunctional) for name in names)


def test_an_int8_network_holds_no_float_weights(int8):
    assert (
        not list(int8.parameters())
        and int8.conv1.weight().dtype == torch.qint8
        and int8.fc.weight().dtype == torch.qint8
    )


def test_every_scale_of_the_power_configuration_is_a_power_of_two_within_the_limits(int8):
    table = qparams(int8)
    assert (table["exponent"] == table["exponent"].round()).all() and table["exponent"].between(-8, 8).all()
    assert (table["scale"] == 2.0 ** table["exponent"]).all()


def test_the_table_of_scales_has_a_row_for_every_quantized_tensor(int8):
    table = qparams(int8)
    layers = [
        "conv1",
        "layer2.0.0",
        "layer2.2.conv1",
        "layer2.2.conv2",
        "layer3.0.0",
        "layer4.0.0",
        "layer4.2.conv1",
        "layer4.2.conv2",
        "fc",
    ]
    others = ["quant", "layer2.2.add_relu", "layer4.2.add_relu"]
    assert sorted(table[table["tensor"] == "weight"]["layer"]) == sorted(layers)
    assert sorted(table[table["tensor"] == "activation"]["layer"]) == sorted(layers + others)


def test_the_table_of_scales_tells_what_the_layers_hold(int8):
    table = qparams(int8).set_index(["layer", "tensor"])
    assert table.loc[("conv1", "activation"), ["scale", "zero_point"]].tolist() == [
        int8.conv1.scale,
        int8.conv1.zero_point,
    ]
    assert table.loc[("fc", "weight"), "scale"] == int8.fc.weight().q_scale()


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
        lambda: calibrate(prepare_ptq(network(), POWER2.value), tiny_data, nothing)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", CustomQConfig)
def test_weights_that_are_not_finite_make_calibration_name_a_layer(config, bad, tiny_data, tiny_split):
    model = network()
    model.get_submodule("layer4.2.conv2").weight.data[0] = bad
    assert "layer4.2" in refused(lambda: calibrate(prepare_ptq(model, config.value), tiny_data, tiny_split))


def test_calibration_looks_at_the_calibration_images_only(tiny_data, tiny_split):
    images = np.full_like(tiny_data.train_images, 255)
    images[tiny_split.calibration] = tiny_data.train_images[tiny_split.calibration] // 2
    prepared = calibrate(
        prepare_ptq(network(), POWER2.value),
        replace(tiny_data, train_images=images),
        tiny_split,
        batch_size=5,
    )
    expected = normalize(torch.from_numpy(images[tiny_split.calibration]))
    watcher = prepared.quant.activation_post_process
    assert (watcher.min_val, watcher.max_val) == (expected.min(), expected.max())
    assert watcher.max_val < normalize(torch.from_numpy(images)).max()


def test_the_batch_size_of_calibration_changes_no_range(tiny_data, tiny_split):
    ranges = [
        observed(calibrate(prepare_ptq(network(), POWER2.value), tiny_data, tiny_split, size))[["min", "max"]]
        for size in (3, 16)
    ]
    np.testing.assert_allclose(*ranges, rtol=1e-5)


def test_calibration_is_done_in_eval_mode(tiny_data, tiny_split):
    assert not calibrate(prepare_ptq(network(), POWER2.value).train(), tiny_data, tiny_split).training


@pytest.mark.parametrize(("wanted", "given"), [(-12, -8), (-10, -8), (-8, -8), (-3, -3), (8, 8), (9, 8)])
def test_a_tensor_counts_as_clamped_where_the_limits_change_its_scale(wanted, given, tiny_data, tiny_split):
    model = network()
    weight = model.fc.weight.data
    weight.mul_(127.5 * 2.0**wanted / weight.abs().max())
    row = (
        observed(calibrate(prepare_ptq(model, POWER2.value), tiny_data, tiny_split))
        .set_index(["layer", "tensor"])
        .loc[("fc", "weight")]
    )
    assert (row["clamped"], row["scale"], row["raw_scale"]) == (
        wanted != given,
        2.0**given,
        pytest.approx(2.0**wanted),
    )


def test_clamped_tensors_are_those_whose_raw_scale_lies_beyond_the_limits(tiny_data, tiny_split):
    table = observed(calibrate(prepare_ptq(network(), POWER2.value), tiny_data, tiny_split))
    beyond = ~np.log2(table["raw_scale"]).between(-8.5, 8.5)
    assert table["clamped"].tolist() == beyond.tolist() and 0 < beyond.sum() < len(table)


def test_without_a_limit_nothing_is_clamped(tiny_data, tiny_split):
    model = network()
    model.fc.weight.data.mul_(2.0**-12)
    assert not observed(calibrate(prepare_ptq(model, power_of_two_qconfig(None)), tiny_data, tiny_split))[
        "clamped"
    ].any()


def test_the_observed_scales_are_those_that_the_int8_network_gets(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), tiny_data, tiny_split)
    planned, got = observed(prepared), qparams(convert(prepared))
    assert len(planned) == len(got)
    for tensor in ("weight", "activation"):
        columns = [
            table[table["tensor"] == tensor][["scale", "zero_point"]].to_numpy().tolist()
            for table in (planned, got)
        ]
        assert columns[0] == columns[1]


def test_the_observed_range_of_a_weight_is_the_weights(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), tiny_data, tiny_split)
    row = observed(prepared).set_index(["layer", "tensor"]).loc[("fc", "weight")]
    assert (row["min"], row["max"]) == (prepared.fc.weight.min().item(), prepared.fc.weight.max().item())


def test_looking_at_the_observers_leaves_them_as_they_are(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), tiny_data, tiny_split)
    before = snapshot(prepared)
    observed(prepared)
    assert unchanged(prepared, before)


def test_networks_without_power_of_two_observers_have_nothing_to_report(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), DEFAULT.value), tiny_data, tiny_split)
    assert len(observed(prepared)) == 0 and not any(
        isinstance(module, PowerOfTwoObserver) for module in prepared.modules()
    )


def test_calibration_normalises_like_evaluation(monkeypatch, tiny_data, tiny_split):
    prepared, seen = prepare_ptq(network(), POWER2.value), []
    monkeypatch.setattr(quantize, "normalize", lambda images: seen.append(len(images)) or normalize(images))
    calibrate(prepared, tiny_data, tiny_split, batch_size=6)
    assert seen == [6, 6, 4]


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
def test_seven_bit_activations_stay_seven_bits_on_the_calibration_images(monkeypatch, tiny_data, tiny_split):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    model = convert(calibrate(prepare_ptq(network(), power_of_two_qconfig()), tiny_data, tiny_split))
    largest = {}

    def keep(name):
        return lambda module, given, output: largest.__setitem__(name, output.int_repr().max().item())

    for name in qparams(model)["layer"].unique():
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        model(normalize(torch.from_numpy(tiny_data.train_images[tiny_split.calibration])))
    assert {name: value for name, value in largest.items() if value > 127} == {}
