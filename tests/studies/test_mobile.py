"""The networks of depthwise convolutions: shapes, fusion, and int8 conversion."""

import pytest
import torch
from torch import nn

from labcore import LabError
from labcore.qconfig import CustomQConfig
from labcore.quantize import convert, fuse, layers, prepare_ptq, prepare_qat
from labcore.studies.mobile import MOBILE, build_mobile
from tests.small import used

pytestmark = pytest.mark.parametrize("arch", MOBILE)


def lived_in(arch: str) -> nn.Module:
    """A network whose BatchNorm has no statistic and no parameter at its first value, and whose logits are not all small."""
    torch.manual_seed(0)
    model = used(build_mobile(arch, 10))
    nn.init.kaiming_uniform_(model.classifier.weight)
    return model


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(images())


def count(model: nn.Module, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("width_mult", [0.1, 0.5, 1.5])
def test_outputs_and_final_map(arch, width_mult):
    model = build_mobile(arch, 7, width_mult).eval()
    assert logits(model).shape == (4, 7)
    assert model.features(images(1)).shape[2:] == (4, 4)


def test_stays_small(arch):
    parameters = sum(value.numel() for value in build_mobile(arch, 10).parameters())
    assert 100_000 < parameters < 500_000


def test_efficientnet_squeezes_in_every_block_and_has_both_kernels(arch):
    model = build_mobile(arch, 10)
    depthwise = [layer for layer in layers(model).values() if getattr(layer, "groups", 1) > 1]
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in depthwise)
    assert {layer.kernel_size[0] for layer in depthwise} == ({3, 5} if arch == "efficientnet" else {3})
    assert count(model, nn.Hardsigmoid) == (len(depthwise) if arch == "efficientnet" else 0)


def test_ptq_fusion_keeps_the_logits_and_folds_every_batchnorm(arch):
    model = lived_in(arch)
    expected = logits(model)
    assert expected.std() > 0.1
    fused = fuse(model.train())  # fuse does not ask for a mode: fuse_model sets it
    assert not fused.training and count(fused, nn.BatchNorm2d) == 0
    torch.testing.assert_close(logits(fused), expected, rtol=0, atol=1e-4)


def test_qat_fusion_keeps_every_batchnorm_and_the_logits(arch):
    model = lived_in(arch)
    expected, norms = logits(model), count(model, nn.BatchNorm2d)
    fused = fuse(model, is_qat=True)
    assert fused.training and norms > 0 and count(fused, nn.BatchNorm2d) == norms
    torch.testing.assert_close(logits(fused.eval()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["ptq", "ptq_default", "qat"])
def test_converts_to_int8_and_runs(arch, mode):
    model = lived_in(arch)
    expected = logits(model)
    if mode == "qat":
        prepared = prepare_qat(model, CustomQConfig.POWER2.qat)
        nn.functional.cross_entropy(prepared(images()), torch.arange(4)).backward()
        assert all(value.grad is not None for value in prepared.parameters())
    else:
        qconfig = CustomQConfig.DEFAULT if mode == "ptq_default" else CustomQConfig.POWER2
        prepared = prepare_ptq(model, qconfig.value)
    prepared.eval()
    logits(prepared)
    int8 = convert(prepared)
    # Quantized convolutions are no nn.Conv2d, quantized hard swish is a class of torch.ao.
    assert count(int8, nn.Conv2d | nn.Linear | nn.BatchNorm2d) == 0
    assert not any(type(module) is nn.Hardswish for module in int8.modules())
    kernels = [
        m for m in int8.modules() if type(m).__module__.startswith("torch.ao.nn") and hasattr(m, "weight")
    ]
    assert len(kernels) == len(layers(model))
    found = logits(int8)
    assert found.shape == expected.shape and found.isfinite().all() and found.std() > 0
    if mode == "ptq_default":
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9


def test_gradient_reaches_every_parameter_also_under_autocast(arch):
    torch.manual_seed(0)
    model = build_mobile(arch, 10).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images(16))
    assert out.dtype == torch.float32
    nn.functional.cross_entropy(out, torch.arange(16) % 10).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without


def test_the_seed_decides_the_weights(arch):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_mobile(arch, 10).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.0.weight"], other["features.0.0.weight"])


def test_errors_name_what_is_known(arch):
    with pytest.raises(LabError, match="mobilenet_v2, efficientnet, found 'vgg'"):
        build_mobile("vgg", 10)
    for width_mult in (0, -1, 4.1, float("nan")):
        with pytest.raises(LabError, match="width_mult must be above 0 and at most 4"):
            build_mobile(arch, 10, width_mult)
