"""ONNX files against torch's own int8 kernels: the same integers in, the same integers out."""

import numpy as np
import onnx
import pytest
import torch
from small import network, used

from labcore import LabError, quantize
from labcore.data import calibration_batches
from labcore.engines.onnx_export import build_onnx, predict_onnx, save_onnx
from labcore.images.transforms import normalize
from labcore.qconfig import FLOAT, RECOMMENDED, CustomQConfig, Scheme, make_qconfig
from labcore.quantize import calibrate, convert, prepare_ptq, prepare_qat
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


# BatchNorm's gamma and beta of the first filter of two layers; of all filters where `whole`.
FILTERS = {
    "zero": (0.0, 16.0, False),
    "tiny": (1e-6, 16.0, False),
    "tiny_and_never_seen": (3e-7, -16.0, False),
    "tiny_beside_a_huge_bias": (-1e-6, 3e6, False),
    "layer_of_zeros": (0.0, 40.0, True),
}
LARGE_BIAS = {
    "recommended": (prepare_ptq, make_qconfig(*RECOMMENDED)),
    "float": (prepare_ptq, make_qconfig(FLOAT, FLOAT)),
    "torch": (prepare_ptq, CustomQConfig.DEFAULT.value),
    "qat": (prepare_qat, make_qconfig(*RECOMMENDED, "qat")),
    "lsq": (prepare_qat, make_qconfig(FLOAT, FLOAT, "lsq")),
}


def with_filters(kind: str) -> torch.nn.Module:
    gamma, beta, whole = FILTERS[kind]
    model = used(network("resnet9", 8))
    for name in ("bn1", "layer3.0.1"):
        norm = model.get_submodule(name)
        norm.weight.data[: None if whole else 1], norm.bias.data[: None if whole else 1] = gamma, beta
    return model


ALL_FILTERS = [(kind, scheme) for scheme in ("recommended", "torch") for kind in FILTERS]
TWO_FILTERS = [(kind, scheme) for scheme in ("qat", "lsq") for kind in ("zero", "layer_of_zeros")]


@pytest.mark.parametrize(
    ("kind", "scheme"), [*ALL_FILTERS, *TWO_FILTERS, ("tiny_beside_a_huge_bias", "float")]
)
@pytest.mark.usefixtures("fbgemm")
def test_a_bias_beside_tiny_weights_is_in_the_file_and_in_every_kernel(kind, scheme, batches):
    prepare, qconfig = LARGE_BIAS[scheme]
    prepared = calibrate(prepare(with_filters(kind), qconfig), batches[:1])
    model = convert(prepared)
    onnx_model, found = build_onnx(model, SHAPE), by_torch(model, batches[:1])
    parts = {part.name: onnx.numpy_helper.to_array(part) for part in onnx_model.graph.initializer}
    for name in [name.removesuffix(".codes") for name in parts if name.endswith(".bias.codes")]:
        step = parts[f"{name}.scale"].astype(float)
        bias = by_name(model, name).detach().numpy()
        error = np.abs(parts[f"{name}.codes"] * step - bias)
        assert (error <= 0.51 * step + 2**-24 * np.abs(bias)).all(), name  # the step is a float32
    # In steps of the last layer: rounded biases move values to their neighbours, also in ordinary networks.
    tolerance = 4 * model.fc.scale * 0.125
    assert np.abs(predict_onnx(onnx_model, batches[:1]) - found).max() <= tolerance
    torch.backends.quantized.engine = "qnnpack"  # its kernels hold biases in 32 bits themselves
    if scheme != "torch":
        assert np.abs(by_torch(convert(prepared), batches[:1]) - found).max() <= tolerance


def by_name(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The bias of a layer of an int8 network."""
    return model.get_submodule(name.removesuffix(".bias")).bias()


@pytest.mark.parametrize("kind", ["tiny", "zero"])
def test_an_export_that_would_clip_a_bias_stops_with_the_layers_name(kind, batches, monkeypatch):
    monkeypatch.setattr(quantize, "fit_biases", lambda int8: int8)
    prepared = calibrate(prepare_ptq(with_filters(kind), QCONFIGS["best"]), batches)
    with pytest.raises(LabError, match="conv1: its biases"):
        build_onnx(convert(prepared), SHAPE)


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
