"""Equalization, bias correction, learned rounding: against closed forms and against every rounding."""

import itertools

import pytest
import torch
from small import network, snapshot, unchanged, used
from torch import nn
from torchvision.models import mobilenet_v2

from labcore import LabError
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import calibrate, fuse, layers, prepare_ptq, simulate
from labcore.studies.mobile import MOBILE, build_mobile
from labcore.studies.refine import adaround, correct_bias, equalize, pairs

FOUR_BITS = make_qconfig(Scheme(bits=4), Scheme(bits=8), "simulated")


def net(arch: str = "resnet9") -> nn.Module:
    torch.manual_seed(0)
    return used(build_mobile(arch, 4) if arch in MOBILE else network(arch))


@pytest.fixture
def calibrated(batches):
    return calibrate(prepare_ptq(net(), FOUR_BITS), batches)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# How many pairs a network has, and one of a kind.
PAIRS = {
    "resnet9": (4, "conv1 layer2.0.0", "layer3.0.0 layer4.0.0", "layer4.2.conv1 layer4.2.conv2"),
    "resnet18": (8, "layer1.0.conv1 layer1.0.conv2"),
    "resnet50": (32, "layer1.0.conv1 layer1.0.conv2", "layer1.0.conv2 layer1.0.conv3"),
    "mobilenet_v2": (33, "features.2.conv.0.0 features.2.conv.1.0", "features.2.conv.1.0 features.2.conv.2"),
}


@pytest.mark.parametrize("arch", PAIRS)
def test_the_pairs_are_consecutive_layers_with_relu_between_them(arch):
    found = pairs(fuse(net(arch)))
    count, *some = PAIRS[arch]
    assert len(found) == count and all(pair.split() in found for pair in some)


@pytest.mark.parametrize("arch", PAIRS)
def test_equalized_networks_compute_the_same_with_equal_ranges(arch):
    model = fuse(net(arch))
    before, images = snapshot(model), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        equalized = equalize(model)
        assert relative(equalized(images), model(images)) < 1e-3
    assert unchanged(model, before)
    by_name = layers(equalized)
    for first, second in pairs(equalized):
        weight = by_name[second].weight.detach()
        inputs = weight if by_name[second].groups > 1 else weight.transpose(0, 1)
        outgoing = by_name[first].weight.detach().abs().flatten(1).amax(1)
        torch.testing.assert_close(outgoing, inputs.abs().flatten(1).amax(1), rtol=5e-3, atol=0)
        assert not torch.equal(weight, layers(model)[second].weight)


def test_the_first_scaling_is_that_of_the_paper():
    model = fuse(net())
    block, equalized = model.layer2[2], equalize(model).layer2[2]
    first, second = block.conv1[0], block.conv2
    r1, r2 = first.weight.detach().abs().amax((1, 2, 3)), second.weight.detach().abs().amax((0, 2, 3))
    scale, close = torch.sqrt(r1 / r2), {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(equalized.conv1[0].bias, first.bias / scale, **close)
    torch.testing.assert_close(equalized.conv2.weight, second.weight * scale[:, None, None], **close)


def test_a_channel_without_weights_is_left_alone():
    model = fuse(net())
    with torch.no_grad():
        model.layer2[2].conv1[0].weight[1] = 0
        model.layer2[2].conv2.weight[:, 2] = 0
        images = torch.randn(2, 3, 16, 16)
        assert relative(equalize(model)(images), model(images)) < 1e-3


def test_what_cannot_be_equalized_is_refused():
    with pytest.raises(LabError, match="call labcore.quantize.fuse"):
        equalize(net())
    with pytest.raises(LabError, match="found none"):  # ReLU6(s x) is not s ReLU6(x)
        equalize(mobilenet_v2(width_mult=0.25, norm_layer=nn.Identity))


def test_an_equalized_network_is_prepared_with_fused_false(batches):
    prepared = prepare_ptq(equalize(fuse(net())), FOUR_BITS, fused=False)
    usual = prepare_ptq(net(), FOUR_BITS)
    assert [name for name, _ in prepared.named_modules()] == [name for name, _ in usual.named_modules()]
    layer = layers(simulate(calibrate(prepared, batches)))["layer2.2.conv1"]
    ratio = layer.weight / layer.weight_scale
    assert torch.equal(ratio, ratio.round())


def channel_means(model: nn.Module, batches) -> dict:
    """An independent way: all outputs side by side, one mean over everything."""
    outputs = {name: [] for name in layers(model)}
    for name, layer in layers(model).items():
        kept = outputs[name]
        layer.register_forward_hook(lambda _, i, y, kept=kept: kept.append(y.clone()), prepend=True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(ys).transpose(0, 1).flatten(1).mean(1) for name, ys in outputs.items()}


def test_bias_correction_brings_every_mean_back(calibrated, batches):
    simulated, model = simulate(calibrated), fuse(net())
    before = snapshot(simulated), snapshot(model), snapshot(calibrated)
    corrected, same = (correct_bias(simulated, exact, batches) for exact in (model, calibrated))
    assert all(map(unchanged, (simulated, model, calibrated), before))
    assert unchanged(same, corrected.state_dict()), "the calibrated network will do as the float one"
    weights = [[layer.weight for layer in layers(one).values()] for one in (corrected, simulated)]
    assert all(map(torch.equal, *weights)) and corrected.fc.bias.dtype == torch.float32
    after, uncorrected = channel_means(corrected, batches), channel_means(simulated, batches)
    for name, mean in channel_means(model, batches).items():
        assert (after[name] - mean).abs().max() < 1e-4 * max(1, mean.abs().max())
        assert (uncorrected[name] - mean).abs().max() > 1e-3


@pytest.mark.parametrize("per_channel", [False, True])
def test_learned_rounding_stays_on_the_grid_beside_the_weight(per_channel, batches):
    qconfig = make_qconfig(Scheme(bits=3, per_channel=per_channel), Scheme(), "simulated")
    calibrated = calibrate(prepare_ptq(net(), qconfig), batches)
    before = snapshot(calibrated)
    rounded, nearest = adaround(calibrated, batches, steps=40), layers(simulate(calibrated))
    assert unchanged(calibrated, before)
    moved = 0
    for name, layer in layers(rounded).items():
        weight, scale = layers(calibrated)[name].weight.detach(), layer.weight_scale
        assert torch.equal(scale, nearest[name].weight_scale)
        assert torch.equal(layer.weight_zero_point, nearest[name].weight_zero_point)
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        codes, floor = layer.weight / scale, (weight / scale).floor()
        assert ((codes == floor.clamp(-4, 3)) | (codes == (floor + 1).clamp(-4, 3))).all()
        moved += int((layer.weight != nearest[name].weight).sum())
    assert moved > 0


def test_learned_rounding_repeats_bit_by_bit(calibrated, batches):
    first, again, other = (adaround(calibrated, batches, steps=10, seed=seed) for seed in (1, 1, 2))
    assert unchanged(again, first.state_dict()) and not unchanged(other, first.state_dict())


@pytest.mark.parametrize("seed", [2, 3, 4, 5])  # nearest is the 120th, 49th, 21st and 128th best
def test_learned_rounding_against_every_rounding(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Linear(8, 1))
    images = torch.randn(64, 8) @ torch.randn(8, 8)  # correlated inputs: errors can cancel
    prepared = prepare_ptq(model, make_qconfig(Scheme(bits=3), Scheme(), "simulated"), fused=False)
    prepared.apply(torch.ao.quantization.disable_fake_quant)(images)
    nearest = simulate(prepared)
    learned = adaround(prepared, [images[:40], images[40:]], steps=300)
    with torch.no_grad():
        expected, x, scale = model(images), nearest[0](images), nearest[1].weight_scale

        def error(weight):
            return (nn.functional.linear(x, weight, model[1].bias) - expected).square().sum().item()

        low = (model[1].weight / scale).floor()
        ups = itertools.product((0.0, 1.0), repeat=8)
        errors = sorted(error(scale * (low + torch.tensor(up)).clamp(-4, 3)) for up in ups)
        assert error(learned[1].weight) < error(nearest[1].weight)
        assert error(learned[1].weight) <= errors[5]  # among the best of 256


def test_every_channel_of_the_first_layer_is_at_least_as_close_as_with_nearest(calibrated, batches):
    learned, nearest, model = adaround(calibrated, batches, steps=60), simulate(calibrated), fuse(net())
    with torch.no_grad():
        expected, x = model.conv1(torch.cat(batches)), nearest.quant(torch.cat(batches))
        found = (torch.relu(one.conv1[0](x)) for one in (learned, nearest))
        after, before = ((outputs - expected).square().sum((0, 2, 3)) for outputs in found)
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("none", [[], [torch.zeros(0, 3, 16, 16)]])
def test_without_images_nothing_can_be_refined(none, calibrated):
    with pytest.raises(LabError, match="found none"):
        correct_bias(simulate(calibrated), calibrated, none)
    with pytest.raises(LabError, match="found none"):
        adaround(calibrated, none)
