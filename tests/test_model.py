"""The networks against torchvision's, before and after fusion."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from labcore import LabError
from labcore.images.transforms import normalize
from labcore.model import QuantizableBottleneck, build_model, load_weights
from labcore.training.first_weights import initialize, whitening_filters
from tests.small import used

ARCHITECTURES = ["resnet9", "resnet18", "resnet34", "resnet50"]


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return used(model)


def network(arch: str, width: int = 4, classes: int = 5, stem: str = "cifar") -> nn.Module:
    torch.manual_seed(0)
    return lived_in(build_model(arch, classes, width, stem))


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


@pytest.fixture(scope="module", params=["resnet18", "resnet34", "resnet50"])
def pair(request):
    """(ours, torchvision's), each with weights of its own."""
    return build_model(request.param, 10, 64, "imagenet").eval(), lived_in(
        getattr(torchvision.models, request.param)(num_classes=10), seed=1
    )


def test_names_and_shapes_are_torchvisions(pair):
    ours, theirs = ({name: value.shape for name, value in model.state_dict().items()} for model in pair)
    assert ours == theirs


def test_torchvisions_weights_give_torchvisions_logits(pair):
    ours, theirs = copy.deepcopy(pair[0]), pair[1]
    load_weights(ours, theirs.state_dict())
    expected = logits(theirs, images(size=64))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours, images(size=64)), expected, rtol=1e-5, atol=1e-5)


def test_our_weights_load_strictly_into_torchvisions_network(pair):
    ours, theirs = lived_in(copy.deepcopy(pair[0]), seed=2), copy.deepcopy(pair[1])
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        logits(ours, images(size=64)), logits(theirs, images(size=64)), rtol=1e-5, atol=1e-5
    )


def test_resnet50_with_the_cifar_stem_has_its_known_number_of_parameters():
    assert sum(value.numel() for value in build_model("resnet50", 10).parameters()) == 23_520_842


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(("width", "classes"), [(1, 2), (5, 7)])
def test_any_width_and_number_of_classes_works(arch, stem, width, classes):
    assert logits(network(arch, width, classes, stem), images(size=32)).shape == (2, classes)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 16), ("imagenet", 4)])
def test_the_cifar_stem_keeps_the_resolution(stem, size):
    model, shapes = network("resnet18", stem=stem), []
    model.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    logits(model, images())
    assert shapes == [(size, size)]


def test_the_same_seed_gives_the_same_weights():
    first, second = (network("resnet9").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unknown_stem_is_refused():
    with pytest.raises(LabError, match="stem must be 'cifar' or 'imagenet', found 'cfar'"):
        build_model("resnet18", 10, 4, "cfar")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_load_with_and_without_the_prefix_of_dataparallel(prefix):
    trained, fresh = network("resnet18"), build_model("resnet18", 5, 4).eval()
    load_weights(fresh, {prefix + name: value for name, value in trained.state_dict().items()})
    assert torch.equal(logits(fresh, images()), logits(trained, images()))


def without(name: str) -> dict:
    return {key: value for key, value in network("resnet18").state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda: network("resnet34").state_dict(), "layer1.2.bn1.bias"),
        (lambda: network("resnet50").state_dict(), "layer1.0.bn3.bias"),
        (lambda: network("resnet18", width=8).state_dict(), "conv1.weight"),
        (lambda: network("resnet18", classes=6).state_dict(), "fc.weight"),
        (lambda: network("resnet18", stem="imagenet").state_dict(), "conv1.weight"),
        (lambda: without("layer3.1.conv2.weight"), "layer3.1.conv2.weight"),
        (lambda: without("") | {"extra": torch.zeros(1)}, "extra"),
        (dict, "bn1.bias"),
    ],
    ids=["deeper", "bottleneck", "wider", "classes", "stem", "missing", "unknown", "empty"],
)
def test_weights_of_another_network_are_refused_in_one_line_that_names_the_parameter(state, named):
    with pytest.raises(LabError) as caught:
        load_weights(network("resnet18"), state(), "some.pt")
    text = str(caught.value)
    assert named in text and "some.pt" in text and "\n" not in text


def test_refused_weights_leave_the_network_as_it_was():
    model = network("resnet18")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LabError):
        load_weights(model, {name: value + 1 for name, value in before.items()} | {"fc.bias": torch.zeros(9)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusion_keeps_the_logits(arch, stem, is_qat):
    model = network(arch, stem=stem)
    expected = logits(model, images(size=32))
    model.fuse_model(is_qat)
    torch.testing.assert_close(
        logits(model.eval(), images(size=32)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusion_after_training_leaves_no_batch_norm(arch):
    model = network(arch)
    model.fuse_model()
    assert batch_norms(model) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusion_for_training_keeps_every_batch_norm(arch):
    model = network(arch)
    before = batch_norms(model)
    model.fuse_model(is_qat=True)
    assert batch_norms(model) == before > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusion_for_training_puts_every_batch_norm_behind_its_convolution(arch):
    model = network(arch)
    model.fuse_model(is_qat=True)
    fused = [
        module
        for module in model.modules()
        if isinstance(module, torch.ao.nn.intrinsic.ConvBn2d | torch.ao.nn.intrinsic.ConvBnReLU2d)
    ]
    assert len(fused) == batch_norms(model)


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fusion_leaves_no_relu_to_run_on_its_own(arch, is_qat):
    model = network(arch)
    model.fuse_model(is_qat)
    fused = (torch.ao.nn.intrinsic.ConvReLU2d, torch.ao.nn.intrinsic.ConvBnReLU2d)
    inside = {part for module in model.modules() if isinstance(module, fused) for part in module}
    assert inside and not [
        module for module in model.modules() if isinstance(module, nn.ReLU) and module not in inside
    ]


@pytest.mark.parametrize("is_qat", [False, True])
def test_a_fused_bottleneck_still_applies_relu_after_its_second_convolution(is_qat):
    torch.manual_seed(0)
    block, inputs = lived_in(QuantizableBottleneck(16, 4)), []
    block.fuse_model(is_qat)
    block.eval().conv3.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    logits(block, torch.randn(2, 16, 8, 8))
    assert inputs[0].min() == 0 and inputs[0].max() > 0


def correlated(count: int = 300, size: int = 12) -> torch.Tensor:
    """Bytes that are smooth and rather grey, like photographs."""
    x = torch.nn.functional.avg_pool2d(images(count, size + 2), 3, stride=1)
    return (60 * (x + 2 * x.mean(1, keepdim=True)) + 128).clamp(0, 255).to(torch.uint8)


def test_whitening_filters_give_uncorrelated_outputs_of_one_size():
    filters = whitening_filters(correlated(), 3, 27, eps=0.0)
    found = nn.functional.conv2d(normalize(correlated()), filters).transpose(0, 1).flatten(1)  # (27, places)
    torch.testing.assert_close(found @ found.T / found.shape[1], torch.eye(27), rtol=0, atol=1e-3)


def test_the_first_whitening_filters_are_those_of_most_energy_and_eps_keeps_the_others_small():
    few, all_of_them = (whitening_filters(correlated(), 3, count) for count in (4, 100))
    assert few.shape == (4, 3, 3, 3) and all_of_them.shape == (27, 3, 3, 3)
    assert torch.equal(few, all_of_them[:4])
    sharp, soft = (whitening_filters(correlated(), 3, 27, eps).flatten(1).norm(dim=1) for eps in (0.0, 0.01))
    torch.testing.assert_close(soft**-2, sharp**-2 + 0.01, rtol=1e-3, atol=1e-6)
    assert (soft.diff() > -1e-3).all()


def test_directions_without_energy_give_no_filter():
    grey = correlated()[:, :1].expand(-1, 3, -1, -1)
    filters = whitening_filters(grey, 3, 27)
    assert filters.shape == (10, 3, 3, 3)  # nine pixels, and the channels' own means
    found = nn.functional.conv2d(normalize(grey), filters).transpose(0, 1).flatten(1)
    assert (found.square().mean(1) > 0.1).all()
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert whitening_filters(black_and_white, 3, 27).isfinite().all()


def test_whitening_filters_do_not_depend_on_the_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(whitening_filters(correlated(), 3, 16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_identity_lets_every_convolution_but_the_stems_pass_its_input_on(arch):
    torch.manual_seed(0)
    model = build_model(arch, 5, 8, "cifar")
    stem = model.conv1.weight.clone()
    initialize(model, "identity", correlated())
    assert torch.equal(model.conv1.weight, stem)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not model.conv1:
            x = torch.randn(2, module.in_channels, 6, 6)
            passed = min(module.in_channels, module.out_channels)
            expected = x[:, :passed, :: module.stride[0], :: module.stride[1]]
            torch.testing.assert_close(module(x)[:, :passed], expected)
            others, bound = module.weight[passed:].abs(), module.weight[0].numel() ** -0.5  # torch's default
            assert others.numel() == 0 or 0.5 * bound < others.max() <= bound


@pytest.mark.parametrize(("width", "stem"), [(8, "cifar"), (5, "cifar"), (64, "cifar"), (8, "imagenet")])
def test_a_whitened_stem_holds_every_filter_with_both_signs(width, stem):
    torch.manual_seed(0)
    model = build_model("resnet18", 5, width, stem)
    before = model.conv1.weight.clone()
    initialize(model, "whitened", correlated())
    half = min(width // 2, 3 * model.conv1.kernel_size[0] ** 2)
    expected = whitening_filters(correlated(), model.conv1.kernel_size[0], half)
    assert torch.equal(model.conv1.weight[: 2 * half], torch.cat([expected, -expected]))
    assert torch.equal(model.conv1.weight[2 * half :], before[2 * half :])


def test_first_weights_as_drawn_are_kept():
    torch.manual_seed(0)
    model = build_model("resnet9", 5, 8, "cifar")
    before = copy.deepcopy(model.state_dict())
    initialize(model, "he", correlated())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
