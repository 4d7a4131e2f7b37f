"""Equalization, bias correction and learned rounding: against closed forms and against trying every rounding."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops import Conv2dNormActivation

from labcore import LabError
from labcore.data import calibration_batches
from labcore.model import build_model
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import calibrate, fuse, layers, prepare_ptq, simulate
from labcore.studies.refine import adaround, correct_bias, equalize, pairs

FOUR_BITS = make_qconfig(Scheme(bits=4), Scheme(bits=8), "simulated")


def randomize(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and weights that folding has to take into account."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 3)
    return model.eval()


def network(arch: str = "resnet9", width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return randomize(build_model(arch, 4, width))


@pytest.fixture
def batches(tiny_data, tiny_split):
    return calibration_batches(tiny_data, tiny_split, 6)  # 6, 6 and 4 images


@pytest.fixture
def calibrated(tiny_data, tiny_split):
    return calibrate(prepare_ptq(network(), FOUR_BITS), calibration_batches(tiny_data, tiny_split))


def snapshot(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def mobilenet() -> nn.Module:
    """torchvision's MobileNetV2 with ReLU in place of ReLU6, fused."""
    torch.manual_seed(0)
    model = mobilenet_v2(
        width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [4, 24, 2, 2]], num_classes=4
    )
    return fuse_mobilenet(model, nn.ReLU)


def fuse_mobilenet(model: nn.Module, activation) -> nn.Module:
    randomize(model)
    for module in list(model.modules()):
        if isinstance(module, Conv2dNormActivation):
            module[2] = activation().eval()
            names = ["0", "1", "2"] if activation is nn.ReLU else ["0", "1"]
            torch.ao.quantization.fuse_modules(module, names, inplace=True)
        elif hasattr(module, "use_res_connect"):
            last = len(module.conv) - 2
            torch.ao.quantization.fuse_modules(module.conv, [str(last), str(last + 1)], inplace=True)
    return model


def test_the_pairs_of_resnet9():
    assert sorted(pairs(fuse(network()))) == [
        ["conv1", "layer2.0.0"],
        ["layer2.2.conv1", "layer2.2.conv2"],
        ["layer3.0.0", "layer4.0.0"],
        ["layer4.2.conv1", "layer4.2.conv2"],
    ]


def test_resnets_have_pairs_inside_blocks_only():
    assert pairs(fuse(network("resnet18")))[0] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert pairs(fuse(network("resnet50")))[:2] == [
        ["layer1.0.conv1", "layer1.0.conv2"],
        ["layer1.0.conv2", "layer1.0.conv3"],
    ]
    assert len(pairs(fuse(network("resnet18")))) == 8 and len(pairs(fuse(network("resnet50")))) == 32


@pytest.mark.parametrize(
    "make",
    [
        lambda: fuse(network("resnet9")),
        lambda: fuse(network("resnet18")),
        lambda: fuse(network("resnet50")),
        mobilenet,
    ],
    ids=["resnet9", "resnet18", "resnet50", "mobilenet"],
)
def test_equalized_networks_compute_the_same_with_equal_ranges(make):
    model = make()
    before = snapshot(model)
    with torch.no_grad():
        images = torch.randn(4, 3, 32, 32)
        equalized = equalize(model)
        assert relative(equalized(images), model(images)) < 1e-3
    assert same(model.state_dict(), before)
    changed, by_name = 0, layers(equalized)
    for first, second in pairs(equalized):
        weight = by_name[second].weight.detach()
        inputs = weight if by_name[second].groups > 1 else weight.transpose(0, 1)
        outgoing = by_name[first].weight.detach().abs().flatten(1).amax(1)
        torch.testing.assert_close(outgoing, inputs.abs().flatten(1).amax(1), rtol=5e-3, atol=0)
        changed += not torch.equal(by_name[second].weight, layers(model)[second].weight)
    assert changed == len(pairs(model))


def test_depthwise_layers_are_paired_where_the_activation_scales():
    assert ["features.2.conv.0.0", "features.2.conv.1.0"] in pairs(mobilenet())
    assert ["features.2.conv.1.0", "features.2.conv.2"] in pairs(mobilenet())
    with pytest.raises(LabError, match="found none"):  # ReLU6(s x) is not s ReLU6(x)
        equalize(fuse_mobilenet(mobilenet_v2(width_mult=0.25, num_classes=4), nn.ReLU6))


def test_the_first_scaling_is_that_of_the_paper():
    model = fuse(network("resnet9"))
    block = model.layer2[2]
    first, second = block.conv1[0], block.conv2
    r1, r2 = first.weight.detach().abs().amax((1, 2, 3)), second.weight.detach().abs().amax((0, 2, 3))
    found = equalize(model).layer2[2]
    torch.testing.assert_close(found.conv1[0].bias, first.bias / torch.sqrt(r1 / r2), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        found.conv2.weight, second.weight * torch.sqrt(r1 / r2)[:, None, None], rtol=1e-3, atol=1e-6
    )


def test_a_channel_without_weights_is_left_alone():
    model = fuse(network())
    with torch.no_grad():
        model.layer2[2].conv1[0].weight[1] = 0
        model.layer2[2].conv2.weight[:, 2] = 0
        images = torch.randn(2, 3, 16, 16)
        assert relative(equalize(model)(images), model(images)) < 1e-3


def test_an_unfused_network_cannot_be_equalized():
    with pytest.raises(LabError, match="fuse"):
        equalize(network())


def test_an_equalized_network_is_prepared_with_fused_false(tiny_data, tiny_split):
    equalized = equalize(fuse(network()))
    prepared = prepare_ptq(equalized, FOUR_BITS, fused=False)
    usual = prepare_ptq(network(), FOUR_BITS)
    assert [name for name, _ in prepared.named_modules()] == [name for name, _ in usual.named_modules()]
    simulated = simulate(calibrate(prepared, calibration_batches(tiny_data, tiny_split)))
    assert set(layers(simulated)) == set(layers(usual))
    ratio = layers(simulated)["layer2.2.conv1"].weight / layers(simulated)["layer2.2.conv1"].weight_scale
    assert torch.equal(ratio, ratio.round())


def channel_means(model: nn.Module, batches) -> dict:
    """An independent way: all outputs side by side, one mean over everything."""
    outputs: dict = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, i, y, name=name: outputs.setdefault(name, []).append(y.clone()), prepend=True
        )
        for name, layer in layers(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(ys).transpose(0, 1).flatten(1).mean(1) for name, ys in outputs.items()}


def test_bias_correction_brings_every_mean_back(calibrated, batches):
    simulated, model = simulate(calibrated), fuse(network())
    before = snapshot(simulated), snapshot(model)
    corrected = correct_bias(simulated, model, batches)
    assert same(simulated.state_dict(), before[0]) and same(model.state_dict(), before[1])
    wanted = channel_means(model, batches)
    found, uncorrected = channel_means(corrected, batches), channel_means(simulated, batches)
    for name, mean in wanted.items():
        assert (found[name] - mean).abs().max() < 1e-4 * max(1, mean.abs().max())
        assert (uncorrected[name] - mean).abs().max() > 1e-3
        assert layers(corrected)[name].bias.dtype == torch.float32
        assert torch.equal(layers(corrected)[name].weight, layers(simulated)[name].weight)


def test_bias_correction_takes_the_calibrated_network_as_the_float_one(calibrated, batches):
    before, simulated = snapshot(calibrated), simulate(calibrated)
    found = correct_bias(simulated, calibrated, batches)
    assert same(calibrated.state_dict(), before)
    assert same(found.state_dict(), correct_bias(simulated, fuse(network()), batches).state_dict())


@pytest.mark.parametrize("per_channel", [False, True])
def test_learned_rounding_stays_on_the_grid_beside_the_weight(per_channel, tiny_data, tiny_split, batches):
    config = make_qconfig(Scheme(bits=3, per_channel=per_channel), Scheme(), "simulated")
    calibrated = calibrate(prepare_ptq(network(), config), calibration_batches(tiny_data, tiny_split))
    before = snapshot(calibrated)
    rounded, nearest = adaround(calibrated, batches, steps=40), simulate(calibrated)
    assert same(calibrated.state_dict(), before)
    moved = 0
    for name, layer in layers(rounded).items():
        weight, scale = layers(calibrated)[name].weight.detach(), layer.weight_scale
        assert torch.equal(scale, layers(nearest)[name].weight_scale) and torch.equal(
            scale, 2 ** scale.log2().round()
        )
        assert torch.equal(layer.weight_zero_point, layers(nearest)[name].weight_zero_point)
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        codes, exact = layer.weight / scale, weight / scale
        down, up = exact.floor().clamp(-4, 3), (exact.floor() + 1).clamp(-4, 3)
        assert ((codes == down) | (codes == up)).all()
        moved += int((layer.weight != layers(nearest)[name].weight).sum())
    assert moved > 0


def test_learned_rounding_repeats_bit_by_bit(calibrated, batches):
    states = [adaround(calibrated, batches, steps=10, seed=seed).state_dict() for seed in (1, 1, 2)]
    assert same(states[0], states[1]) and not same(states[0], states[2])


class OneLayer(nn.Module):
    """A linear layer between the stubs that quantization needs."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.quant, self.fc = torch.ao.quantization.QuantStub(), nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.fc(self.quant(x.flatten(1)))


@pytest.mark.parametrize("seed", [2, 3, 4, 5])  # nearest is the 120th, 49th, 21st and 128th best
def test_learned_rounding_against_every_rounding(seed):
    torch.manual_seed(seed)
    model = OneLayer(8, 1)
    images = torch.randn(64, 8) @ torch.randn(8, 8)  # correlated inputs: errors can cancel
    prepared = prepare_ptq(model, make_qconfig(Scheme(bits=3), Scheme(), "simulated"), fused=False)
    prepared.apply(torch.ao.quantization.disable_fake_quant)(images)
    nearest = simulate(prepared)
    learned = adaround(prepared, [images[:40], images[40:]], steps=300)
    with torch.no_grad():
        expected, x, scale = model(images), nearest.quant(images), nearest.fc.weight_scale

        def error(weight):
            return (nn.functional.linear(x, weight, model.fc.bias) - expected).square().sum().item()

        low = (model.fc.weight / scale).floor()
        all_errors = sorted(
            error(scale * (low + torch.tensor(ups)).clamp(-4, 3))
            for ups in itertools.product((0.0, 1.0), repeat=8)
        )
        found = error(learned.fc.weight)
    assert found < error(nearest.fc.weight)
    assert found <= all_errors[5]  # among the best of 256


def test_every_channel_of_the_first_layer_is_at_least_as_close_as_with_nearest(calibrated, batches):
    images = torch.cat(batches)
    learned, nearest, model = adaround(calibrated, batches, steps=60), simulate(calibrated), fuse(network())
    with torch.no_grad():
        expected, x = model.conv1(images), nearest.quant(images)
        errors = [
            (torch.relu(part.conv1[0](x)) - expected).square().sum((0, 2, 3)) for part in (learned, nearest)
        ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all() and errors[0].sum() < 0.95 * errors[1].sum()


@pytest.mark.parametrize("none", [[], [torch.zeros(0, 3, 16, 16)]])
def test_without_images_nothing_can_be_refined(none, calibrated):
    with pytest.raises(LabError, match="found none"):
        correct_bias(simulate(calibrated), calibrated, none)
    with pytest.raises(LabError, match="found none"):
        adaround(calibrated, none)
