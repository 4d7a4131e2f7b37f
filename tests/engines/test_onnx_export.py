"""ONNX files against torch's own int8 kernels: the same integers in, the same integers out."""

import numpy as np
import onnx
import pytest
import torch
from small import network, used

from labcore import LabError
from labcore.data import calibration_batches
from labcore.engines.onnx_export import build_onnx, load_onnx, predict_onnx, save_onnx
from labcore.images.transforms import normalize
from labcore.qconfig import RECOMMENDED, CustomQConfig, Scheme, make_qconfig
from labcore.quantize import calibrate, convert, prepare_ptq
from labcore.studies.mobile import build_mobile

QCONFIGS = {
    "reference": CustomQConfig.POWER2.value,
    "best": make_qconfig(*RECOMMENDED),
    "affine": make_qconfig(Scheme(), Scheme(zero_point="affine")),
}
SHAPE = (3, 16, 16)


def quantized(data, split, arch: str = "resnet9", scheme: str = "reference") -> torch.nn.Module:
    return convert(
        calibrate(prepare_ptq(used(network(arch, 8)), QCONFIGS[scheme]), calibration_batches(data, split))
    )


@pytest.fixture
def fbgemm():
    """torch's kernels that round as ONNX says; oneDNN's, which "x86" takes where there is VNNI, may be one step away."""
    before = torch.backends.quantized.engine
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs an x86 processor")
    torch.backends.quantized.engine = "fbgemm"
    yield
    torch.backends.quantized.engine = before


def batches(data) -> list[torch.Tensor]:
    return list(normalize(torch.from_numpy(data.train_images)).split(20))


@torch.no_grad()
def by_torch(model, data) -> np.ndarray:
    return torch.cat([model(batch) for batch in batches(data)]).numpy()


def with_integer_biases(model: torch.nn.Module, scale_in: dict[str, float]) -> None:
    """Biases rounded to the accumulator's integers, in torch's own modules."""
    for name, scale in scale_in.items():
        module = model.get_submodule(name)
        weight, bias = module.weight(), module.bias().detach().double()
        per_channel = weight.qscheme() == torch.per_channel_affine
        step = scale * (weight.q_per_channel_scales() if per_channel else weight.q_scale())
        module.set_weight_bias(weight, torch.nn.Parameter((torch.round(bias / step) * step).float()))


def input_scales(model: torch.nn.Module, data) -> dict[str, float]:
    """The scale of what every layer with weights takes in, seen while it runs."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: found.__setitem__(name, inputs[0].q_scale())
        )
        for name, module in model.named_modules()
        if hasattr(module, "set_weight_bias")
    ]
    by_torch(model, data)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("scheme", QCONFIGS)
@pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet50"])
@pytest.mark.usefixtures("fbgemm")
def test_with_torchs_float_biases_the_nodes_compute_torchs_logits(arch, scheme, tiny_data, tiny_split):
    model = quantized(tiny_data, tiny_split, arch, scheme)
    found = predict_onnx(build_onnx(model, SHAPE, integer_bias=False), batches(tiny_data), optimize=False)
    expected = by_torch(model, tiny_data)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scheme", QCONFIGS)
@pytest.mark.usefixtures("fbgemm")
def test_with_integer_biases_on_both_sides_the_logits_are_the_same_to_the_bit(scheme, tiny_data, tiny_split):
    model = quantized(tiny_data, tiny_split, scheme=scheme)
    with_integer_biases(model, input_scales(model, tiny_data))
    found = predict_onnx(build_onnx(model, SHAPE), batches(tiny_data))
    np.testing.assert_array_equal(found, by_torch(model, tiny_data))


def test_the_file_holds_the_networks_integers_and_powers_of_two(tiny_data, tiny_split):
    model = quantized(tiny_data, tiny_split, scheme="best")
    constants = {
        part.name: onnx.numpy_helper.to_array(part) for part in build_onnx(model, SHAPE).graph.initializer
    }
    layers = {
        name: part
        for name, part in model.named_modules()
        if hasattr(part, "weight") and callable(part.weight)
    }
    assert len(layers) == 9
    for name, layer in layers.items():
        codes = constants[f"{name}.weight.codes"]
        assert codes.dtype == np.int8 and np.array_equal(codes, layer.weight().int_repr().numpy())
        assert constants[f"{name}.bias.codes"].dtype == np.int32
    scales = np.concatenate([np.ravel(part) for name, part in constants.items() if name.endswith(".scale")])
    assert scales.size > 50 and (np.frexp(scales)[0] == 0.5).all()


def test_the_batch_is_free_and_padding_is_zero(tiny_data, tiny_split):
    model = build_onnx(quantized(tiny_data, tiny_split), SHAPE)
    whole = torch.cat(batches(tiny_data))
    one_by_one = predict_onnx(model, whole[:5].split(1))
    np.testing.assert_array_equal(predict_onnx(model, [whole])[:5], one_by_one)


def test_a_written_file_reads_back_as_it_was_and_has_the_same_bytes_again(tmp_path, tiny_data, tiny_split):
    model = build_onnx(quantized(tiny_data, tiny_split), SHAPE, {"seed": "0", "images": "abc"})
    size = save_onnx(tmp_path / "int8.onnx", model)
    before = (tmp_path / "int8.onnx").read_bytes()
    assert len(before) == size
    again = load_onnx(tmp_path / "int8.onnx", {"images": "abc"})
    save_onnx(tmp_path / "int8.onnx", again)
    assert (tmp_path / "int8.onnx").read_bytes() == before
    save_onnx(
        tmp_path / "int8.onnx",
        build_onnx(quantized(tiny_data, tiny_split), SHAPE, {"seed": "0", "images": "abc"}),
    )
    assert (tmp_path / "int8.onnx").read_bytes() == before


def test_a_file_of_another_run_is_refused_with_both_values(tmp_path, tiny_data, tiny_split):
    save_onnx(tmp_path / "a.onnx", build_onnx(quantized(tiny_data, tiny_split), SHAPE, {"seed": "0"}))
    with pytest.raises(LabError, match="another run: seed is 0, expected 1"):
        load_onnx(tmp_path / "a.onnx", {"seed": "1"})
    with pytest.raises(LabError, match="images is missing, expected abc"):
        load_onnx(tmp_path / "a.onnx", {"images": "abc"})


@pytest.mark.parametrize("content", [b"", b"no onnx", b"\x08\x08", None])
def test_a_damaged_or_missing_file_is_named(tmp_path, content, tiny_data, tiny_split):
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=r"a\.onnx is (missing|damaged or no ONNX file)"):
        load_onnx(path)


def test_a_truncated_file_is_named(tmp_path, tiny_data, tiny_split):
    path = tmp_path / "a.onnx"
    save_onnx(path, build_onnx(quantized(tiny_data, tiny_split), SHAPE))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(LabError, match="damaged or no ONNX file"):
        load_onnx(path)


def test_a_network_with_other_operations_is_refused(tiny_data, tiny_split):
    torch.manual_seed(0)
    prepared = prepare_ptq(build_mobile("efficientnet", 4, 0.25).eval(), QCONFIGS["reference"])
    model = convert(calibrate(prepared, calibration_batches(tiny_data, tiny_split)))
    with pytest.raises(LabError, match="does not know; use a residual network"):
        build_onnx(model, SHAPE)
