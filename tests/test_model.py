"""The networks against torchvision's, before and after fusion."""

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torchvision
from torch import nn

from labcore import LabError
from labcore.files.tensors import load_weights
from labcore.model import QuantizableBottleneck, build_model
from tests.small import snapshot, unchanged, used

ARCHITECTURES = ["resnet9", "resnet18", "resnet34", "resnet50"]
FUSED = (nni.ConvReLU2d, nni.ConvBn2d, nni.ConvBnReLU2d)


def network(arch: str, width: int = 4, classes: int = 5, stem: str = "cifar") -> nn.Module:
    torch.manual_seed(0)
    return used(build_model(arch, classes, width, stem))


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_weights_load_strictly_and_give_torchvisions_logits(arch):
    ours = build_model(arch, 10, 64, "imagenet").eval()
    torch.manual_seed(1)
    theirs = used(getattr(torchvision.models, arch)(num_classes=10))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = logits(theirs, images(size=64))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours, images(size=64)), expected, rtol=1e-5, atol=1e-5)


def test_resnet50_with_the_cifar_stem_has_its_known_number_of_parameters():
    assert sum(value.numel() for value in build_model("resnet50", 10).parameters()) == 23_520_842


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(("width", "classes"), [(1, 2), (5, 7)])
def test_any_width_and_number_of_classes_works(arch, stem, width, classes):
    assert logits(network(arch, width, classes, stem), images()).shape == (2, classes)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 16), ("imagenet", 4)])
def test_the_cifar_stem_keeps_the_resolution(stem, size):
    model, shapes = network("resnet18", stem=stem), []
    model.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    logits(model, images(size=16))
    assert shapes == [(size, size)]


def test_an_unknown_stem_is_refused():
    with pytest.raises(LabError, match="stem must be 'cifar' or 'imagenet', found 'cfar'"):
        build_model("resnet18", 10, 4, "cfar")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_load_with_and_without_the_prefix_of_dataparallel(prefix):
    trained, fresh = network("resnet18"), build_model("resnet18", 5, 4).eval()
    load_weights(fresh, {prefix + name: value for name, value in trained.state_dict().items()})
    assert torch.equal(logits(fresh, images()), logits(trained, images()))


def added_one() -> dict:
    return {name: value + 1 for name, value in network("resnet18").state_dict().items()}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda: network("resnet34").state_dict(), "None for layer1.2.conv1.weight"),
        (lambda: network("resnet50").state_dict(), "(4, 4, 3, 3) for layer1.0.conv1.weight"),
        (lambda: network("resnet18", width=8).state_dict(), "found (8, 3, 3, 3)"),
        (lambda: network("resnet18", classes=6).state_dict(), "(5, 32) for fc.weight"),
        (lambda: network("resnet18", stem="imagenet").state_dict(), "found (4, 3, 7, 7)"),
        (lambda: dict(list(added_one().items())[:-1]), "(5,) for fc.bias, found None"),
        (lambda: network("resnet18").state_dict() | {"extra": torch.zeros(1)}, "None for extra, found (1,)"),
        (dict, "(4, 3, 3, 3) for conv1.weight, found None"),
        (lambda: [torch.zeros(1)], "no state dict of tensors"),
        (lambda: {"epoch": 3}, "no state dict of tensors"),
        # The last tensor does not fit, all others would change the network.
        (lambda: added_one() | {"fc.bias": torch.zeros(9)}, "(5,) for fc.bias, found (9,)"),
    ],
)
def test_other_weights_are_refused_in_one_line_that_names_the_first_difference(state, named):
    model = network("resnet18")
    before = snapshot(model)
    with pytest.raises(LabError) as caught:
        load_weights(model, state(), "some.pt")
    text = str(caught.value)
    assert named in text and "some.pt" in text and "\n" not in text
    assert unchanged(model, before)


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusion_keeps_the_logits(arch, stem, is_qat):
    model = network(arch, stem=stem)
    expected = logits(model, images())
    model.fuse_model(is_qat)
    found, atol = logits(model.eval(), images()), 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.ReLU])
def test_fusion_leaves_nothing_to_run_on_its_own_and_batch_norms_for_training_only(kind, arch, is_qat):
    model = network(arch)
    before = count(model, kind)
    assert before > 0
    model.fuse_model(is_qat)
    if kind is nn.BatchNorm2d:
        assert count(model, kind) == (before if is_qat else 0)
    fused = [module for module in model.modules() if isinstance(module, FUSED)]
    assert count(model, kind) == sum(isinstance(part, kind) for module in fused for part in module)


@pytest.mark.parametrize("is_qat", [False, True])
def test_a_fused_bottleneck_still_applies_relu_after_its_second_convolution(is_qat):
    torch.manual_seed(0)
    block, inputs = used(QuantizableBottleneck(16, 4)), []
    block.fuse_model(is_qat)
    block.eval().conv3.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    logits(block, torch.randn(2, 16, 8, 8))
    assert inputs[0].min() == 0 and inputs[0].max() > 0
