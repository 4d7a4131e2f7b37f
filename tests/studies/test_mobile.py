"""The networks of depthwise convolutions: shapes, fusion, and int8 conversion."""

import pytest
import torch
from small import used
from torch import nn

from labcore import LabError
from labcore.qconfig import CustomQConfig
from labcore.quantize import convert, fuse, layers, prepare_ptq, prepare_qat
from labcore.studies.mobile import MOBILE, build_mobile

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=MOBILE)
def arch(request) -> str:
    return request.param


@pytest.fixture
def model(arch) -> nn.Module:
    """A network whose BatchNorm is as after training, and whose logits are not all small."""
    torch.manual_seed(0)
    model = used(build_mobile(arch, 10))
    nn.init.kaiming_uniform_(model.classifier.weight)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IMAGES[:4])


def count(model: nn.Module, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("width_mult", [0.1, 0.5, 1.5])
def test_outputs_and_final_map(arch, width_mult):
    model = build_mobile(arch, 7, width_mult).eval()
    assert logits(model).shape == (4, 7) and model.features(IMAGES[:1]).shape[2:] == (4, 4)
    parameters = sum(value.numel() for value in build_mobile(arch, 10).parameters())
    assert 100_000 < parameters < 500_000, "small at the usual width"


def test_efficientnet_squeezes_in_every_block_and_has_both_kernels(arch, model):
    depthwise = [layer for layer in layers(model).values() if getattr(layer, "groups", 1) > 1]
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in depthwise)
    assert {layer.kernel_size[0] for layer in depthwise} == ({3, 5} if arch == "efficientnet" else {3})
    assert count(model, nn.Hardsigmoid) == (len(depthwise) if arch == "efficientnet" else 0)


@pytest.mark.parametrize("is_qat", [False, True])
def test_fusion_keeps_the_logits_and_folds_every_batchnorm_away_or_none(is_qat, model):
    expected, norms = logits(model), count(model, nn.BatchNorm2d)
    assert expected.std() > 0.1 and norms > 0
    fused = fuse(model.train(not is_qat), is_qat)  # fuse does not ask for a mode
    assert fused.training == is_qat and count(fused, nn.BatchNorm2d) == (norms if is_qat else 0)
    torch.testing.assert_close(logits(fused.eval()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["ptq", "ptq_default", "qat"])
def test_converts_to_int8_and_runs(mode, model):
    expected = logits(model)
    if mode == "qat":
        prepared = prepare_qat(model, CustomQConfig.POWER2.qat)
        nn.functional.cross_entropy(prepared(IMAGES), torch.arange(16) % 10).backward()
        assert all(value.grad is not None for value in prepared.parameters())
    else:
        qconfig = CustomQConfig.DEFAULT if mode == "ptq_default" else CustomQConfig.POWER2
        prepared = prepare_ptq(model, qconfig.value)
    logits(prepared.eval())
    int8 = convert(prepared)
    # Quantized convolutions are no nn.Conv2d, quantized hard swish is a class of torch.ao.
    assert count(int8, nn.Conv2d | nn.Linear | nn.BatchNorm2d) == 0
    assert not any(type(module) is nn.Hardswish for module in int8.modules())
    quantized = [module for module in int8.modules() if type(module).__module__.startswith("torch.ao.nn")]
    assert sum(hasattr(module, "weight") for module in quantized) == len(layers(model))
    found = logits(int8)
    assert found.shape == expected.shape and found.isfinite().all() and found.std() > 0
    if mode == "ptq_default":
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9


def test_gradient_reaches_every_parameter_also_under_autocast(arch):
    torch.manual_seed(0)
    model = build_mobile(arch, 10).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IMAGES)
    assert out.dtype == torch.float32
    nn.functional.cross_entropy(out, torch.arange(16) % 10).backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())


@pytest.mark.parametrize("width_mult", [0, -1, 4.1, float("nan")])
def test_errors_name_what_is_known(width_mult):
    with pytest.raises(LabError, match="mobilenet_v2, efficientnet, found 'vgg'"):
        build_mobile("vgg", 10)
    with pytest.raises(LabError, match="width_mult must be above 0 and at most 4"):
        build_mobile("mobilenet_v2", 10, width_mult)
