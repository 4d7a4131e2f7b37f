"""ONNX files against torch's own int8 kernels: the same integers in, the same integers out."""

import numpy as np
import onnx
import pytest
import torch
from small import network, used

from labcore import LabError
from labcore.data import calibration_batches
from labcore.engines.onnx_export import build_onnx, predict_onnx, save_onnx
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


@pytest.fixture
def quantized(tiny_data, tiny_split):
    """A function that makes the int8 network of a name and of a scheme, or that of a given network."""

    def quantize(arch="resnet9", scheme="reference", model=None) -> torch.nn.Module:
        prepared = prepare_ptq(model or used(network(arch, 8)), QCONFIGS[scheme])
        return convert(calibrate(prepared, calibration_batches(tiny_data, tiny_split)))

    return quantize


@pytest.fixture
def batches(tiny_data) -> list[torch.Tensor]:
    return list(normalize(torch.from_numpy(tiny_data.train_images)).split(20))


@pytest.fixture
def fbgemm(monkeypatch):
    """Kernels of torch that round as ONNX says; oneDNN's, which "x86" takes with VNNI, can be a step off."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs an x86 processor")
    monkeypatch.setattr(torch.backends.quantized, "engine", "fbgemm")


def by_torch(model, batches) -> np.ndarray:
    return torch.cat([model(batch) for batch in batches]).numpy()


def round_bias(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """Round a layer's bias to its accumulator's integers, in torch's own module, before it runs."""
    weight, bias = module.weight(), module.bias().detach().double()
    per_channel = weight.qscheme() == torch.per_channel_affine
    step = inputs[0].q_scale() * (weight.q_per_channel_scales() if per_channel else weight.q_scale())
    module.set_weight_bias(weight, torch.nn.Parameter((torch.round(bias / step) * step).float()))


@pytest.mark.parametrize("scheme", QCONFIGS)
@pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet50"])
@pytest.mark.usefixtures("fbgemm")
def test_with_torchs_float_biases_the_nodes_compute_torchs_logits(arch, scheme, quantized, batches):
    model = quantized(arch, scheme)
    found = predict_onnx(build_onnx(model, SHAPE, integer_bias=False), batches, optimize=False)
    expected = by_torch(model, batches)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scheme", QCONFIGS)
@pytest.mark.usefixtures("fbgemm")
def test_with_integer_biases_on_both_sides_the_logits_are_the_same_to_the_bit(scheme, quantized, batches):
    model = quantized(scheme=scheme)
    for module in model.modules():
        if hasattr(module, "set_weight_bias"):  # those inside linear layers are never called
            module.register_forward_pre_hook(round_bias)
    found = predict_onnx(build_onnx(model, SHAPE), batches)
    np.testing.assert_array_equal(found, by_torch(model, batches))


def test_the_file_holds_the_networks_integers_and_powers_of_two(quantized):
    model = quantized(scheme="best")
    initializers = build_onnx(model, SHAPE).graph.initializer
    constants = {part.name: onnx.numpy_helper.to_array(part) for part in initializers}
    weights = {name: codes for name, codes in constants.items() if name.endswith(".weight.codes")}
    assert len(weights) == 9
    for name, codes in weights.items():
        layer = model.get_submodule(name.removesuffix(".weight.codes"))
        assert codes.dtype == np.int8 and np.array_equal(codes, layer.weight().int_repr().numpy())
        assert constants[name.replace(".weight.", ".bias.")].dtype == np.int32
    scales = np.concatenate([np.ravel(part) for name, part in constants.items() if name.endswith(".scale")])
    assert scales.size > 50 and (np.frexp(scales)[0] == 0.5).all()


def test_the_batch_is_free_and_padding_is_zero(quantized, batches):
    model = build_onnx(quantized(), SHAPE)
    one_by_one = predict_onnx(model, batches[0].split(1))
    np.testing.assert_array_equal(predict_onnx(model, batches)[:20], one_by_one)


def test_a_written_file_reads_back_as_it_was_and_has_the_same_bytes_again(tmp_path, quantized):
    path, facts = tmp_path / "int8.onnx", {"seed": "0", "images": "abc"}
    size = save_onnx(path, build_onnx(quantized(), SHAPE, facts))
    before = path.read_bytes()
    assert len(before) == size
    stored = onnx.load(path)
    assert {entry.key: entry.value for entry in stored.metadata_props} == facts
    for again in (stored, build_onnx(quantized(), SHAPE, facts)):
        save_onnx(path, again)
        assert path.read_bytes() == before


def test_a_network_with_other_operations_is_refused(quantized):
    torch.manual_seed(0)
    model = quantized(model=build_mobile("efficientnet_b0", 4, 0.25).eval())
    with pytest.raises(LabError, match="does not know; use a residual network"):
        build_onnx(model, SHAPE)
