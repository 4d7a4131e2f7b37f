"""Each pixel's way in integers against torch's int8 kernel."""

import numpy as np
import pytest
import torch
from small import network, used

from labcore import LabError
from labcore.explore.journey import journey
from labcore.images.transforms import normalize
from labcore.qconfig import RECOMMENDED, CustomQConfig, has_vnni, make_qconfig
from labcore.quantize import calibrate, convert, prepare_ptq

exact_sums = pytest.mark.skipif(not has_vnni(), reason="int8 kernels saturate on this processor")


@exact_sums
@pytest.mark.parametrize(("arch", "n_layers", "step"), [("resnet9", 9, 1), ("resnet50", 54, 7)])
@pytest.mark.parametrize("qconfig", [make_qconfig(*RECOMMENDED), CustomQConfig.POWER2.value])
def test_by_hand_and_by_kernel_every_code_is_the_same(arch, n_layers, step, qconfig, batches, tiny_data):
    int8 = convert(calibrate(prepare_ptq(used(network(arch)), qconfig), batches))
    rng, codes, shapes = np.random.default_rng(0), set(), {}
    for name, module in int8.named_modules():
        if hasattr(module, "set_weight_bias") and hasattr(module, "scale"):
            module.register_forward_hook(lambda _, a, out, name=name: shapes.update({name: out.shape[1:]}))
    with torch.no_grad():
        int8(normalize(torch.from_numpy(tiny_data.test_images[:1])))
    for name, shape in list(shapes.items())[::step]:
        for image in tiny_data.test_images[:2]:
            way = journey(int8, name, image, *(int(rng.integers(side)) for side in shape))
            assert way.code == way.kernel, name
            assert way.total == (way.weights * (way.inputs - way.input_zero_point)).sum() + way.bias
            codes.add(way.code)
    assert len(shapes) == n_layers and len(codes) > 5


@exact_sums
def test_the_bias_is_torchs_but_for_its_fraction(int8, tiny_data):
    """The small network's biases are whole numbers, so that the network's own layer gives the same code."""
    outputs = []
    int8.conv1.register_forward_hook(lambda _, args, output: outputs.append(output.int_repr()))
    int8(normalize(torch.from_numpy(tiny_data.test_images[:1])))
    ways = [journey(int8, "conv1", tiny_data.test_images[0], 2, row, 15) for row in (0, 7, 15)]
    assert [way.code for way in ways] == outputs[0][0, 2, [0, 7, 15], 15].tolist()
    assert any(way.bias for way in ways)


@pytest.mark.parametrize(
    ("layer", "place", "message"),
    [
        ("conv9", (0,), "unknown layer 'conv9'"),
        ("conv1", (0, 16, 0), r"gives \(4, 16, 16\), found \(0, 16, 0\)"),
    ],
)
def test_a_place_that_is_not_there_is_named(layer, place, message, int8, tiny_data):
    with pytest.raises(LabError, match=message):
        journey(int8, layer, tiny_data.test_images[0], *place)
