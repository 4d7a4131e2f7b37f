"""The weights that training starts from: whitening filters, identities, or as they were drawn."""

import pytest
import torch
from small import fresh, snapshot, unchanged
from torch import nn

from labcore.images.transforms import normalize
from labcore.training.first_weights import initialize, whitening_filters


def correlated(count: int = 300, size: int = 12) -> torch.Tensor:
    """Bytes that are smooth and rather grey, like photographs."""
    noise = torch.randn(count, 3, size + 2, size + 2, generator=torch.Generator().manual_seed(3))
    x = torch.nn.functional.avg_pool2d(noise, 3, stride=1)
    return (60 * (x + 2 * x.mean(1, keepdim=True)) + 128).clamp(0, 255).to(torch.uint8)


def test_whitening_filters_give_uncorrelated_outputs_of_one_size():
    filters = whitening_filters(correlated(), 3, 27, eps=0.0)
    found = nn.functional.conv2d(normalize(correlated()), filters).transpose(0, 1).flatten(1)  # (27, places)
    torch.testing.assert_close(found @ found.T / found.shape[1], torch.eye(27), rtol=0, atol=1e-3)


def test_the_first_whitening_filters_are_those_of_most_energy_and_eps_keeps_the_others_small():
    few, all_of_them = (whitening_filters(correlated(), 3, limit) for limit in (4, 100))
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
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(whitening_filters(correlated(), 3, 16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(filters, found[0]) for filters in found)


@pytest.mark.parametrize("arch", ["resnet9", "resnet18", "resnet34", "resnet50"])
def test_identity_lets_every_convolution_but_the_stems_pass_its_input_on(arch):
    model = fresh(arch, 8, 5)
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
    model = fresh("resnet18", width, 5, stem)
    before = model.conv1.weight.clone()
    initialize(model, "whitened", correlated())
    half = min(width // 2, 3 * model.conv1.kernel_size[0] ** 2)
    expected = whitening_filters(correlated(), model.conv1.kernel_size[0], half)
    assert torch.equal(model.conv1.weight[: 2 * half], torch.cat([expected, -expected]))
    assert torch.equal(model.conv1.weight[2 * half :], before[2 * half :])


def test_first_weights_as_drawn_are_kept():
    model = fresh(width=8, classes=5)
    before = snapshot(model)
    initialize(model, "he", correlated())
    assert unchanged(model, before)
