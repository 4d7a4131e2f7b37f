"""Every operation of a policy equals torchvision's function of that name; draws are those of its policies."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from labcore import LabError
from labcore.images import policy as module
from labcore.images.policy import (
    BINS,
    GEOMETRIC,
    NUMBER,
    OPERATIONS,
    SIGNED,
    apply_policy,
    magnitudes,
    operate,
)

POLICIES = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
SHAPES = [(32, 32), (31, 31), (20, 33)]


def shear(x: Tensor, right: float, down: float) -> Tensor:
    angles = [math.degrees(math.atan(right)), math.degrees(math.atan(down))]
    return TF.affine(x, 0.0, [0, 0], 1.0, angles, fill=0, center=[0, 0])


def shift(x: Tensor, right: int, down: int) -> Tensor:
    return TF.affine(x, 0.0, [right, down], 1.0, [0.0, 0.0], fill=0)


# What torchvision's policies call, on one image.
ORACLES = {
    "Identity": lambda x, _: x,
    "ShearX": lambda x, m: shear(x, m, 0.0),
    "ShearY": lambda x, m: shear(x, 0.0, m),
    "TranslateX": lambda x, m: shift(x, int(m), 0),
    "TranslateY": lambda x, m: shift(x, 0, int(m)),
    "Rotate": lambda x, m: TF.rotate(x, m, fill=0),
    "Brightness": lambda x, m: TF.adjust_brightness(x, 1 + m),
    "Color": lambda x, m: TF.adjust_saturation(x, 1 + m),
    "Contrast": lambda x, m: TF.adjust_contrast(x, 1 + m),
    "Sharpness": lambda x, m: TF.adjust_sharpness(x, 1 + m),
    "Posterize": lambda x, m: TF.posterize(x, int(m)),
    "Solarize": lambda x, m: TF.solarize(x, 255.0 * m),
    "AutoContrast": lambda x, _: TF.autocontrast(x),
    "Equalize": lambda x, _: TF.equalize(x),
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(count: int, height: int = 32, width: int = 32, levels: int = 256) -> Tensor:
    return torch.from_numpy(rng(99).integers(0, levels, (count, 3, height, width), dtype=np.uint8))


def smooth(count: int, height: int = 32, width: int = 32) -> Tensor:
    """Slopes of another strength in every image and channel, with a little noise: few values, many of them equal."""
    draws = rng(98)
    slopes = draws.uniform(-3, 3, (2, count, 3, 1, 1))
    x = 128 + slopes[0] * np.arange(height)[:, None] + slopes[1] * np.arange(width)
    return torch.from_numpy((x + draws.integers(0, 3, x.shape)).clip(0, 255).astype(np.uint8))


def greyish(count: int, height: int = 32, width: int = 32) -> Tensor:
    return noise(count, height, width)[:, :1].repeat(1, 3, 1, 1)


def all_magnitudes(policy: str, name: str, height: int, width: int) -> np.ndarray:
    row = magnitudes(policy, height, width)[NUMBER[name]]
    return np.concatenate([row, -row]) if NUMBER[name] in SIGNED else row


def both(name: str, x: Tensor, strengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """(found, expected) of one operation with a magnitude for every image."""
    found = operate(x, np.full(len(x), NUMBER[name]), strengths)
    assert found.dtype == torch.uint8
    assert found.shape == x.shape
    return found, torch.stack([ORACLES[name](image, float(m)) for image, m in zip(x, strengths, strict=True)])


def assert_equal(name: str, found: Tensor, expected: Tensor):
    """Nearest-pixel lookups may differ where a point lies between two pixels; all else is equal to the bit."""
    if NUMBER[name] in GEOMETRIC:
        assert (found != expected).any(1).float().mean() <= 0.002
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 33)])
def test_operations_magnitudes_and_signs_are_torchvisions(policy, height, width):
    space = POLICIES[policy]._AUGMENTATION_SPACE
    assert tuple(space) == OPERATIONS
    for (values, signed), row, number in zip(
        space.values(), magnitudes(policy, height, width), range(len(OPERATIONS)), strict=True
    ):
        expected = values(BINS, height, width)
        expected = [0.0] * BINS if expected is None else [float(value) for value in expected]
        assert row.tolist() == expected
        assert (number in SIGNED) == signed


def test_the_defaults_are_torchvisions():
    theirs = v2.RandAugment()
    assert (theirs.num_ops, theirs.magnitude) == (module.RAND_OPS, module.RAND_BIN)
    assert theirs.num_magnitude_bins == v2.TrivialAugmentWide().num_magnitude_bins == BINS


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("images", [noise, smooth, greyish])
def test_an_operation_equals_torchvisions_at_every_magnitude(name, images):
    strengths = all_magnitudes("trivial", name, 32, 32)
    assert_equal(name, *both(name, images(len(strengths)), strengths))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), SHAPES[1:])
def test_an_operation_equals_torchvisions_on_other_shapes(name, height, width):
    strengths = all_magnitudes("rand", name, height, width)
    assert_equal(name, *both(name, noise(len(strengths), height, width), strengths))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (2, 2), (3, 3), (4, 2)])
def test_an_operation_equals_torchvisions_on_tiny_images(name, height, width):
    strengths = all_magnitudes("rand", name, height, width)
    found, expected = both(name, noise(len(strengths), height, width), strengths)
    if NUMBER[name] in GEOMETRIC:  # one pixel is a large share here
        assert (found != expected).any(1).flatten(1).sum(1).max() <= 1
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if NUMBER[name] not in GEOMETRIC])
@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_a_constant_image_is_treated_as_by_torchvision(name, value):
    strengths = all_magnitudes("trivial", name, 8, 8)
    found, expected = both(name, torch.full((len(strengths), 3, 8, 8), value, dtype=torch.uint8), strengths)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("levels", [2, 3, 10])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_few_values_are_spread_as_by_torchvision(name, levels):
    x = torch.cat([noise(5, levels=levels), noise(5, levels=levels) + 200])
    found, expected = both(name, x, np.zeros(len(x)))
    assert torch.equal(found, expected)


def test_images_of_a_batch_get_operations_of_their_own():
    operation = np.tile(np.arange(len(OPERATIONS)), 4)
    strengths = magnitudes("trivial", 32, 32)[operation, np.repeat([5, 12, 22, 30], len(OPERATIONS))]
    x = noise(len(operation)).contiguous(memory_format=torch.channels_last)
    found = operate(x, operation, strengths)
    for number, name in enumerate(OPERATIONS):
        chosen = operation == number
        expected = both(name, x[chosen], strengths[chosen])[1]
        assert_equal(name, found[chosen], expected)


def drawn(policy: str, count: int, monkeypatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The operations and magnitudes that a policy draws for every image, per round."""
    operations, strengths = [], []

    def record(images, operation, magnitude):
        operations.append(operation)
        strengths.append(magnitude)
        return images

    monkeypatch.setattr(module, "operate", record)
    apply_policy(torch.zeros(count, 3, 4, 6, dtype=torch.uint8), policy, rng(1))
    return operations, strengths


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_are_drawn_equally_often_and_independently(policy, monkeypatch):
    rounds, _ = drawn(policy, 14_000, monkeypatch)
    for operation in rounds:
        assert stats.chisquare(np.bincount(operation, minlength=len(OPERATIONS))).pvalue > 1e-3
    if policy == "rand":
        pairs = np.bincount(rounds[0] * len(OPERATIONS) + rounds[1], minlength=len(OPERATIONS) ** 2)
        assert stats.chisquare(pairs).pvalue > 1e-3
    assert len(rounds) == {"trivial": 1, "rand": 2}[policy]


def test_trivial_draws_every_bin_and_both_signs_equally_often(monkeypatch):
    (operation,), (strength,) = drawn("trivial", 40_000, monkeypatch)
    for number, row in enumerate(magnitudes("trivial", 4, 6)):
        found = strength[operation == number]
        signed = number in SIGNED
        values = sorted({value * sign for value in row for sign in ((1, -1) if signed else (1,))})
        assert set(found) <= set(values)
        if signed:
            counts = [(np.abs(found) == value).sum() for value in row]
            assert stats.chisquare(counts).pvalue > 1e-4
            assert stats.binomtest(int((found < 0).sum()), int((found != 0).sum())).pvalue > 1e-4
        elif OPERATIONS[number] == "Solarize":
            assert stats.chisquare([(found == value).sum() for value in row]).pvalue > 1e-4
        elif OPERATIONS[number] == "Posterize":
            expected = np.array([(row == value).sum() for value in values]) * len(found) / BINS
            assert stats.chisquare([(found == value).sum() for value in values], expected).pvalue > 1e-4
        else:
            assert (found == 0).all()


def test_rand_always_takes_bin_nine(monkeypatch):
    table = magnitudes("rand", 4, 6)[:, 9]
    for operation, strength in zip(*drawn("rand", 2000, monkeypatch), strict=True):
        assert np.array_equal(np.abs(strength), table[operation])
        signed = np.isin(operation, SIGNED)
        assert stats.binomtest(int((strength[signed] < 0).sum()), int(signed.sum())).pvalue > 1e-3
        assert (strength[~signed] >= 0).all()


def test_rand_applies_its_operations_one_after_the_other(monkeypatch):
    x = noise(40)
    with monkeypatch.context() as patch:
        operations, strengths = drawn("rand", 40, patch)
    # drawn() sees other sides, on which translations depend
    table = magnitudes("rand", 32, 32)[:, 9]
    expected = x
    for operation, strength in zip(operations, strengths, strict=True):
        expected = operate(expected, operation, np.where(strength < 0, -1, 1) * table[operation])
    assert torch.equal(apply_policy(x, "rand", rng(1)), expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 8, 8), (50, 3, 1, 1), (50, 3, 2, 3), (3, 3, 20, 33)])
def test_any_batch_gives_bytes_of_its_shape(policy, shape):
    found = apply_policy(noise(shape[0], *shape[2:]), policy, rng())
    assert (found.shape, found.dtype) == (shape, torch.uint8)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_images_stay_as_they_were(policy):
    x = noise(60)
    apply_policy(x, policy, rng())
    assert torch.equal(x, noise(60))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_gives_one_batch_and_another_state_another(policy):
    assert torch.equal(apply_policy(noise(60), policy, rng(4)), apply_policy(noise(60), policy, rng(4)))
    assert not torch.equal(apply_policy(noise(60), policy, rng(4)), apply_policy(noise(60), policy, rng(5)))


class Slice:
    """Draws for a batch of `total` and gives back the images from `start`: one of several processes."""

    def __init__(self, total: int, start: int):
        self.rng, self.total, self.start = rng(7), total, start

    def integers(self, low, high, count):
        return self.rng.integers(low, high, self.total)[self.start : self.start + count]

    def random(self, count):
        return self.rng.random(self.total)[self.start : self.start + count]


@pytest.mark.parametrize("policy", POLICIES)
def test_parts_of_a_batch_get_what_the_whole_batch_gets(policy):
    x = noise(20)
    parts = [apply_policy(x[start : start + 10], policy, Slice(20, start)) for start in (0, 10)]
    assert torch.equal(torch.cat(parts), apply_policy(x, policy, rng(7)))


@pytest.mark.parametrize(
    ("images", "policy", "text"),
    [
        (noise(2), "auto", "policy must be trivial or rand, found 'auto'"),
        (noise(2), "none", "policy must be"),
        (noise(2).float(), "trivial", "uint8 images"),
        (noise(2)[0], "trivial", "uint8 images"),
        (noise(2)[:, :1], "rand", "uint8 images"),
    ],
)
def test_what_is_no_policy_or_no_bytes_is_refused_in_one_line(images, policy, text):
    with pytest.raises(LabError, match=text) as caught:
        apply_policy(images, policy, rng())
    assert "\n" not in str(caught.value)
