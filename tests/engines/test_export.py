"""PyTorch 2 Export quantization gives the scales of eager mode, and nearly its logits."""

import copy

import pandas as pd
import pytest
import torch
from small import network, snapshot, unchanged, used
from torch import nn

from labcore import LabError
from labcore.data import calibration_batches
from labcore.engines import export
from labcore.engines.export import PowerOfTwoQuantizer, convert_export, export_scales, prepare_export
from labcore.images.transforms import normalize
from labcore.model import QuantizableBottleneck, QuantizableResNet
from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, Scheme, make_qconfig
from labcore.quantize import calibrate, convert, layers, prepare_ptq
from labcore.studies.errors import qparams

SCHEMES = {
    "reference": (REFERENCE, REFERENCE),
    "best": RECOMMENDED,
    "affine": (Scheme(rule="ceil"), Scheme(range="percentile", zero_point="affine")),
    "histogram": (Scheme(range="moving_average"), Scheme(range="histogram", rule="floor")),
    "float": (FLOAT, FLOAT),
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def exported(model, schemes, batches) -> nn.Module:
    prepared = prepare_export(model, PowerOfTwoQuantizer(*schemes), batches[0])
    for batch in batches:
        prepared(batch)
    return convert_export(prepared)


def both(model, schemes, data, split) -> tuple[nn.Module, nn.Module]:  # eager int8 network, exported one
    batches = calibration_batches(data, split, batch_size=8)
    eager = convert(calibrate(prepare_ptq(model, make_qconfig(*schemes)), batches))
    return eager, exported(model, schemes, batches)


PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {}


@pytest.fixture
def pair(request, tiny_data, tiny_split) -> tuple[nn.Module, nn.Module]:
    """Give `both` of the small network with the schemes of that name, made once; tests only read them."""
    if request.param not in PAIRS:
        PAIRS[request.param] = both(used(network()), SCHEMES[request.param], tiny_data, tiny_split)
    return PAIRS[request.param]


def same_tables(eager: nn.Module, exported: nn.Module) -> None:
    tables = export_scales(exported), qparams(eager)
    found, expected = (table.set_index(["layer", "tensor"]).sort_index() for table in tables)
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_exact=True)
    for layer, scales in found.xs("weight", level="tensor")["scales"].items():
        weight = eager.get_submodule(layer).weight()
        per_channel = weight.qscheme() == torch.per_channel_affine
        assert list(scales) == (weight.q_per_channel_scales().tolist() if per_channel else [weight.q_scale()])


@pytest.mark.parametrize("pair", SCHEMES, indirect=True)
def test_every_scale_and_zero_point_equals_that_of_eager_mode(pair):
    same_tables(*pair)


def test_bottlenecks_and_shortcuts_are_annotated_too_and_pooling_passes_its_scale_on(tiny_data, tiny_split):
    torch.manual_seed(0)
    model = QuantizableResNet(QuantizableBottleneck, [1, 1, 1, 1], 4, width=4, stem="cifar").eval()
    # Float scales: those of a mean and of its input are never equal by rounding to the same power of two.
    eager, exported = both(model, SCHEMES["float"], tiny_data, tiny_split)
    same_tables(eager, exported)
    (pool,) = (node for node in exported.graph.nodes if "adaptive_avg_pool2d" in str(node.target))
    (after,) = pool.users
    assert after.target == torch.ops.quantized_decomposed.quantize_per_tensor.default
    assert after.args[1:] == pool.args[0].args[1:]  # 2x2 means, so an observer of their own would differ


@pytest.mark.parametrize("pair", ["reference", "best"], indirect=True)
def test_scales_are_powers_of_two_and_logits_nearly_those_of_the_int8_network(pair, tiny_data):
    eager, exported = pair
    scales = torch.tensor(export_scales(exported)["scales"].sum())
    assert (torch.frexp(scales)[0] == 0.5).all()
    # In the calibrated range: beyond it the graph stops at 127 where activations have 7 bits, kernels at 255.
    images = normalize(torch.from_numpy(tiny_data.train_images))
    with torch.no_grad():
        found, expected = exported(images), eager(images)
    assert len(expected.unique()) > 10
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    assert (found - expected).abs().mean() < 0.125 * eager.fc.scale  # the network scales its logits


@torch.no_grad()
@pytest.mark.parametrize("pair", ["reference"], indirect=True)
def test_one_scale_written_once_per_channel_changes_no_bit(pair, tiny_data):
    def count(program) -> int:
        return sum("dequantize_per_channel" in str(node.target) for node in program.graph.nodes)

    images, found = normalize(torch.from_numpy(tiny_data.test_images)), copy.deepcopy(pair[1])
    assert count(found) == 0
    assert count(export.weights_per_channel(found)) == len(layers(network()))
    assert torch.equal(found(images), pair[1](images))


@pytest.mark.parametrize("bits", [4, 2])
def test_fewer_bits_reach_the_nodes_and_the_weights(bits):
    converted = exported(network(), (Scheme(bits=bits), Scheme(bits=6)), [IMAGES])
    table = export_scales(converted).set_index("tensor")
    half = 2 ** (bits - 1)
    assert (table.loc["weight", ["quant_min", "quant_max"]] == [-half, half - 1]).all(axis=None)
    assert (table.loc["activation", ["quant_min", "quant_max"]] == [0, 63]).all(axis=None)
    weights = [value for value in converted.state_dict().values() if value.dtype == torch.int8]
    assert len(weights) == 9 and all(-half <= w.min() and w.max() < half for w in weights)


@pytest.mark.parametrize(
    ("activation", "example", "message"),
    [(Scheme(per_channel=True), IMAGES, "per_channel=True"), (REFERENCE, IMAGES[0], r"\(3, 16, 16\)")],
)
def test_a_scheme_that_does_not_fit_or_an_example_that_is_no_batch_is_refused(activation, example, message):
    with pytest.raises(LabError, match=message):
        prepare_export(network(), PowerOfTwoQuantizer(REFERENCE, activation), example)


def test_conversion_without_calibration_or_after_nan_is_refused():
    prepared = prepare_export(network(), PowerOfTwoQuantizer(REFERENCE, REFERENCE), IMAGES)
    with pytest.raises(LabError, match="calibration images"):
        convert_export(prepared)
    prepared(IMAGES * float("nan"))
    with pytest.raises(LabError, match="NaN"):
        convert_export(prepared)


def test_preparing_and_converting_work_on_copies():
    model = network()
    before = snapshot(model)
    prepared = prepare_export(model, PowerOfTwoQuantizer(REFERENCE, REFERENCE), IMAGES[:1])
    prepared(IMAGES)
    tables = [export_scales(convert_export(prepared)) for _ in range(2)]
    pd.testing.assert_frame_equal(*tables)
    assert unchanged(model, before)
