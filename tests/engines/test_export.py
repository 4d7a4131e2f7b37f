"""PyTorch 2 Export quantization gives the scales of eager mode, and nearly its logits."""

import copy
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from labcore import LabError
from labcore.data import calibration_batches
from labcore.engines.export import convert_export, export_scales, prepare_export
from labcore.images.transforms import normalize
from labcore.model import QuantizableBottleneck, QuantizableResNet, build_model
from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, Scheme, make_qconfig
from labcore.quantize import calibrate, convert, prepare_ptq
from labcore.studies.errors import qparams

SCHEMES = {
    "reference": (REFERENCE, REFERENCE),
    "best": RECOMMENDED,
    "affine": (Scheme(rule="ceil"), Scheme(range="percentile", zero_point="affine")),
    "histogram": (Scheme(range="moving_average"), Scheme(range="histogram", rule="floor")),
    "float": (FLOAT, FLOAT),
}
KEY = ["layer", "tensor"]
AVERAGE = torch.ops.aten.adaptive_avg_pool2d.default


def network() -> nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet9", 4, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def both(model, schemes, data, split) -> tuple[nn.Module, nn.Module]:
    """(eager int8 network, exported network), calibrated on the same two batches."""
    eager = convert(
        calibrate(prepare_ptq(model, make_qconfig(*schemes)), calibration_batches(data, split, batch_size=8))
    )
    batches = calibration_batches(data, split, batch_size=8)
    prepared = prepare_export(model, *schemes, batches[0])
    for batch in batches:
        prepared(batch)
    return eager, convert_export(prepared)


PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {}


def pair(name: str, data, split) -> tuple[nn.Module, nn.Module]:
    """`both` of the small network with the schemes of that name, made once; tests only read them."""
    if name not in PAIRS:
        PAIRS[name] = both(network(), SCHEMES[name], data, split)
    return PAIRS[name]


def same_tables(eager: nn.Module, exported: nn.Module) -> None:
    found = export_scales(exported).set_index(KEY).sort_index()
    expected = qparams(eager).set_index(KEY).sort_index()
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_exact=True)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scale_and_zero_point_equals_that_of_eager_mode(name, tiny_data, tiny_split):
    same_tables(*pair(name, tiny_data, tiny_split))


def test_bottlenecks_and_shortcuts_are_annotated_too_and_pooling_passes_its_scale_on(tiny_data, tiny_split):
    torch.manual_seed(0)
    model = QuantizableResNet(QuantizableBottleneck, [1, 1, 1, 1], 4, width=4, stem="cifar").eval()
    # Float scales: those of a mean and of its input are never equal by rounding to the same power of two.
    eager, exported = both(model, SCHEMES["float"], tiny_data, tiny_split)
    same_tables(eager, exported)
    (pool,) = (node for node in exported.graph.nodes if node.target == AVERAGE)
    (after,) = pool.users
    assert after.target == torch.ops.quantized_decomposed.quantize_per_tensor.default
    assert after.args[1:] == pool.args[0].args[1:]  # 2x2 means, so an observer of their own would differ


def test_every_channel_of_a_weight_has_the_scale_of_eager_mode(tiny_data, tiny_split):
    eager, exported = pair("best", tiny_data, tiny_split)
    table = export_scales(exported).query("tensor == 'weight'").set_index("layer")
    assert len(set(table.loc["layer4.2.conv2", "scales"])) > 1
    for layer, scales in table["scales"].items():
        assert list(scales) == eager.get_submodule(layer).weight().q_per_channel_scales().tolist()


@pytest.mark.parametrize("name", ["reference", "best"])
def test_scales_are_powers_of_two_and_logits_nearly_those_of_the_int8_network(name, tiny_data, tiny_split):
    eager, exported = pair(name, tiny_data, tiny_split)
    scales = torch.tensor(export_scales(exported)["scales"].sum())
    assert (torch.frexp(scales)[0] == 0.5).all()
    # Inside the calibrated range: beyond it the graph stops at 127 where activations have 7 bits, the kernels at 255.
    images = normalize(torch.from_numpy(tiny_data.train_images))
    with torch.no_grad():
        found, expected = exported(images), eager(images)
    assert len(expected.unique()) > 10
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    assert (found - expected).abs().mean() < 0.125 * eager.fc.scale  # the network scales its logits


@pytest.mark.parametrize("bits", [4, 2])
def test_fewer_bits_reach_the_nodes_and_the_weights(bits, tiny_data, tiny_split):
    model, batch = network(), calibration_batches(tiny_data, tiny_split)[0]
    prepared = prepare_export(model, Scheme(bits=bits), Scheme(bits=6), batch)
    prepared(batch)
    exported = convert_export(prepared)
    table = export_scales(exported).set_index("tensor")
    half = 2 ** (bits - 1)
    assert (table.loc["weight", ["quant_min", "quant_max"]] == [-half, half - 1]).all(axis=None)
    assert (table.loc["activation", ["quant_min", "quant_max"]] == [0, 63]).all(axis=None)
    weights = [value for value in exported.state_dict().values() if value.dtype == torch.int8]
    assert len(weights) == 9 and all(-half <= w.min() and w.max() < half for w in weights)


def test_a_scheme_that_does_not_fit_is_refused_in_one_line(tiny_data, tiny_split):
    batch = calibration_batches(tiny_data, tiny_split)[0]
    for schemes in ((Scheme(zero_point="affine"), REFERENCE), (REFERENCE, Scheme(per_channel=True))):
        with pytest.raises(LabError, match="change it"):
            prepare_export(network(), *schemes, batch)


def test_an_example_that_is_no_batch_is_refused():
    with pytest.raises(LabError, match=re.escape("(3, 16, 16)")):
        prepare_export(network(), REFERENCE, REFERENCE, torch.zeros(3, 16, 16))


def test_conversion_without_calibration_or_after_nan_is_refused():
    images = torch.randn(2, 3, 16, 16)
    prepared = prepare_export(network(), REFERENCE, REFERENCE, images)
    with pytest.raises(LabError, match="calibration images"):
        convert_export(prepared)
    prepared(images * float("nan"))
    with pytest.raises(LabError, match="NaN"):
        convert_export(prepared)


def test_preparing_and_converting_work_on_copies():
    model, images = network(), torch.randn(1, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_export(model, REFERENCE, REFERENCE, images)
    prepared(images)
    tables = [export_scales(convert_export(prepared)) for _ in range(2)]
    pd.testing.assert_frame_equal(*tables)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_export_and_the_engines_import_torchao():
    sources = Path(sys.modules["labcore"].__file__).parent.rglob("*.py")
    assert {p.name for p in sources if re.search(r"(import|from) torchao", p.read_text())} == {
        "export.py",
        "worker.py",
    }
