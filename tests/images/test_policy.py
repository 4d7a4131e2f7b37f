"""Every operation of the policy equals torchvision's function of that name; draws are those of its policy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from labcore import LabError
from labcore.images import policy
from labcore.images.policy import BINS, OPERATIONS, SIGNED, magnitudes, operate, trivial_augment

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def shear(x: Tensor, right: float, down: float) -> Tensor:
    angles = [math.degrees(math.atan(right)), math.degrees(math.atan(down))]
    return TF.affine(x, 0.0, [0, 0], 1.0, angles, fill=0, center=[0, 0])


# What torchvision's policies call, on one image.
ORACLES = {
    "Identity": lambda x, _: x,
    "ShearX": lambda x, m: shear(x, m, 0.0),
    "ShearY": lambda x, m: shear(x, 0.0, m),
    "TranslateX": lambda x, m: TF.affine(x, 0.0, [int(m), 0], 1.0, [0.0, 0.0], fill=0),
    "TranslateY": lambda x, m: TF.affine(x, 0.0, [0, int(m)], 1.0, [0.0, 0.0], fill=0),
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


def smooth(count: int) -> Tensor:
    """Slopes of another strength in every image and channel, with a little noise: few values, many equal."""
    draws = rng(98)
    slopes = draws.uniform(-3, 3, (2, count, 3, 1, 1))
    x = 128 + slopes[0] * np.arange(32)[:, None] + slopes[1] * np.arange(32)
    return torch.from_numpy((x + draws.integers(0, 3, x.shape)).clip(0, 255).astype(np.uint8))


IMAGES = {
    "noise": noise,
    "smooth": smooth,
    "grey": lambda count: noise(count)[:, :1].repeat(1, 3, 1, 1),
}
for levels, lowest in [(1, 0), (1, 1), (1, 128), (1, 255), (2, 200), (3, 0), (10, 200)]:
    IMAGES[f"{levels} from {lowest}"] = lambda count, n=levels, low=lowest: noise(count, levels=n) + low
for height, width in [(31, 31), (20, 33), (1, 1), (1, 5), (2, 2), (3, 3), (4, 2)]:
    IMAGES[f"{height}x{width}"] = lambda count, height=height, width=width: noise(count, height, width)


def assert_as_torchvision(name: str, x: Tensor, strengths: np.ndarray, found: Tensor):
    """Nearest pixels may differ where a point lies between two of them; all else is equal to the bit."""
    expected = torch.stack([ORACLES[name](image, float(m)) for image, m in zip(x, strengths, strict=True)])
    assert (found.dtype, found.shape) == (torch.uint8, x.shape)
    unequal = (found != expected).any(1)
    if name not in GEOMETRIC:
        assert not unequal.any()
    elif unequal[0].numel() > 20:
        assert unequal.float().mean() <= 0.002
    else:  # one pixel is a large share here
        assert unequal.flatten(1).sum(1).max() <= 1


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_torchvisions_at_every_magnitude(name, images):
    strengths = magnitudes()[list(OPERATIONS).index(name)]
    strengths = np.concatenate([strengths, -strengths]) if name in SIGNED else strengths
    x = IMAGES[images](len(strengths))
    assert_as_torchvision(name, x, strengths, operate(x, np.full(len(x), name), strengths))


def test_images_of_a_batch_get_operations_of_their_own():
    names = np.tile(list(OPERATIONS), 4)
    strengths = magnitudes()[:, [5, 12, 22, 30]].T.ravel()
    x = noise(len(names)).contiguous(memory_format=torch.channels_last)
    found = operate(x, names, strengths)
    for name in OPERATIONS:
        chosen = names == name
        assert_as_torchvision(name, x[chosen], strengths[chosen], found[chosen])


def test_operations_magnitudes_and_signs_are_torchvisions():
    assert v2.TrivialAugmentWide().num_magnitude_bins == BINS
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert tuple(space) == tuple(OPERATIONS)
    assert {name for name, (_, signed) in space.items() if signed} == set(SIGNED)
    for (values, _), row in zip(space.values(), magnitudes(), strict=True):
        expected = values(BINS, 32, 32)
        assert row.tolist() == ([0.0] * BINS if expected is None else [float(value) for value in expected])


def test_operations_bins_and_signs_are_drawn_equally_often(monkeypatch):
    drawn = {}
    monkeypatch.setattr(policy, "operate", lambda images, names, m: drawn.update(names=names, strengths=m))
    trivial_augment(torch.zeros(40_000, 3, 1, 1, dtype=torch.uint8), rng(1))
    counts = [(drawn["names"] == name).sum() for name in OPERATIONS]
    assert stats.chisquare(counts).pvalue > 1e-3
    for name, row in zip(OPERATIONS, magnitudes(), strict=True):
        found = drawn["strengths"][drawn["names"] == name]
        values, bins = np.unique(row, return_counts=True)
        assert (np.isin(found, values) | (np.isin(-found, values) & (name in SIGNED))).all()
        counts = [(np.abs(found) == value).sum() for value in values]
        if len(values) > 1:
            assert stats.chisquare(counts, bins * len(found) / BINS).pvalue > 1e-4
        if name in SIGNED:
            assert stats.binomtest(int((found < 0).sum()), int((found != 0).sum())).pvalue > 1e-4


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 8, 8), (50, 3, 1, 1), (50, 3, 2, 3), (60, 3, 20, 33)])
def test_any_batch_gives_bytes_of_its_shape_and_stays_as_it_was(shape):
    x = noise(shape[0], *shape[2:])
    found = trivial_augment(x, rng())
    assert (found.shape, found.dtype) == (shape, torch.uint8)
    assert torch.equal(x, noise(shape[0], *shape[2:]))


def test_normalised_images_are_refused():
    with pytest.raises(LabError, match="uint8 images, found torch.float32; apply it before"):
        trivial_augment(noise(2).float(), rng())
