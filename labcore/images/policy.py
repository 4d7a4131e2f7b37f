"""Augmentation policies on whole batches, TrivialAugmentWide and RandAugment, with draws of its own for every image.

Operations, their order, magnitudes and signs are those of torchvision.transforms.v2, with nearest pixels and zero fill.

References: Müller and Hutter (2021), "TrivialAugment: tuning-free yet state-of-the-art data augmentation", section 3;
Cubuk et al. (2020), "RandAugment: practical automated data augmentation with a reduced search space", section 3.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labcore import LabError
from labcore.images.pixels import grey, on, warp

BINS = 31
RAND_OPS, RAND_BIN = 2, 9
OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
GEOMETRIC = range(NUMBER["ShearX"], NUMBER["Rotate"] + 1)
SIGNED = range(NUMBER["ShearX"], NUMBER["Sharpness"] + 1)  # these go both ways


def apply_policy(images: Tensor, policy: str, rng: np.random.Generator) -> Tensor:
    """Draw and apply a policy: uint8 (B, 3, H, W) -> uint8 (B, 3, H, W); the images given stay as they were.

    "trivial": one operation per image, its magnitude from a bin drawn uniformly.
    "rand": two operations one after the other, both with the magnitude of bin 9 of 0 … 30.

    Raises LabError for another policy or other images.
    """
    if policy not in ("trivial", "rand"):
        raise LabError(f"policy must be trivial or rand, found {policy!r}; change it and run again.")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise LabError(
            f"a policy takes uint8 images (B, 3, H, W), found {images.dtype} {tuple(images.shape)}; "
            "apply it before they are normalised."
        )
    count, _, height, width = images.shape
    table = magnitudes(policy, height, width)
    for _ in range(RAND_OPS if policy == "rand" else 1):
        operation = rng.integers(0, len(OPERATIONS), count)
        level = rng.integers(0, BINS, count) if policy == "trivial" else RAND_BIN
        negative = np.isin(operation, SIGNED) & (rng.random(count) < 0.5)
        images = operate(images, operation, np.where(negative, -1, 1) * table[operation, level])
    return images


def magnitudes(policy: str, height: int, width: int) -> np.ndarray:
    """The magnitude of every operation in every bin, (operations, bins); zero where an operation has none.

    Units: shear as a tangent, translation in pixels, rotation in degrees, Brightness to Sharpness as a distance from the
    neutral factor 1, Posterize in bits kept, Solarize as a share of 255.
    """
    shear, right, down, degrees, factor, bits_lost = {
        "trivial": (0.99, 32.0, 32.0, 135.0, 0.99, 6),
        "rand": (0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4),
    }[policy]
    tops = (0, shear, shear, right, down, degrees, factor, factor, factor, factor)
    rows = [torch.linspace(0, top, BINS) for top in tops]
    rows.append((8 - torch.arange(BINS) / ((BINS - 1) / bits_lost)).round())
    rows.append(torch.linspace(1, 0, BINS))
    rows += [torch.zeros(BINS)] * 2
    return (
        torch.stack(rows).double().numpy()
    )  # steps rounded to float32 as in torchvision: they decide borderline pixels


def operate(images: Tensor, operation: np.ndarray, magnitude: np.ndarray) -> Tensor:
    """Apply operation[i], a position in OPERATIONS, with magnitude[i] to image i: uint8 (B, 3, H, W) -> uint8, a copy."""
    x = images.clone(memory_format=torch.contiguous_format)
    moved = np.flatnonzero(np.isin(operation, GEOMETRIC))
    if len(moved):
        index = on(x, moved, torch.int64)
        theta = _matrices(operation[moved], magnitude[moved], *x.shape[2:])
        x.index_copy_(0, index, warp(x[index].float(), theta).to(torch.uint8))
    for name, change in COLOUR.items():
        chosen = np.flatnonzero(operation == NUMBER[name])
        if len(chosen):
            index = on(x, chosen, torch.int64)
            x.index_copy_(0, index, change(x[index], magnitude[chosen]))
    return x


def _matrices(operation: np.ndarray, magnitude: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, 2, 3): from output to input pixels about the centre. Shears keep the top left corner, as in torchvision."""

    def amount(name: str) -> np.ndarray:
        return np.where(operation == NUMBER[name], magnitude, 0.0)

    turn, shear_x, shear_y = np.radians(amount("Rotate")), amount("ShearX"), amount("ShearY")
    right, down = np.trunc(amount("TranslateX")), np.trunc(amount("TranslateY"))
    # An image has one of the five, so the terms of the others are neutral.
    return np.stack(
        [
            np.stack([np.cos(turn), shear_x - np.sin(turn), shear_x * height / 2 - right], 1),
            np.stack([shear_y + np.sin(turn), np.cos(turn), shear_y * width / 2 - down], 1),
        ],
        1,
    )


def _each(x: Tensor, values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    return on(x, values, dtype).view(-1, 1, 1, 1)


def _blend(x: Tensor, other: Tensor, magnitude: np.ndarray) -> Tensor:
    """X + magnitude (x - other), cut off to 0 … 255 and to whole numbers."""
    factor = 1 + magnitude
    # addcmul rounds once, like torchvision's sum with a factor; two roundings would put some pixels one level lower
    return _whole(torch.addcmul(x * _each(x, factor), other, _each(x, 1 - factor)))


def _whole(x: Tensor) -> Tensor:
    return x.clamp(0, 255).to(torch.uint8)


def _brightness(x: Tensor, magnitude: np.ndarray) -> Tensor:
    return _whole(x * _each(x, 1 + magnitude))


def _color(x: Tensor, magnitude: np.ndarray) -> Tensor:
    return _blend(x, grey(x).floor(), magnitude)


def _contrast(x: Tensor, magnitude: np.ndarray) -> Tensor:
    return _blend(x, grey(x).floor().mean((1, 2, 3), keepdim=True), magnitude)


def _sharpness(x: Tensor, magnitude: np.ndarray) -> Tensor:
    """The other image is blurred, 1 around 5 in the middle; the border stays, as do images without an inside."""
    if min(x.shape[2:]) <= 2:
        return x
    kernel = torch.ones(3, 1, 3, 3, device=x.device)  # whole numbers: their sums are exact on every device
    kernel[:, :, 1, 1] = 5
    blurred = (F.conv2d(x.float(), kernel, groups=3) / 13).round()  # (B, 3, H - 2, W - 2)
    inside = x[:, :, 1:-1, 1:-1].float()
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = _whole(torch.addcmul(inside, blurred - inside, _each(x, 1 - (1 + magnitude))))
    return out


def _posterize(x: Tensor, bits: np.ndarray) -> Tensor:
    """Keep the highest bits."""
    lost = 8 - bits.astype(int)
    return x & _each(x, 255 >> lost << lost, torch.uint8)


def _solarize(x: Tensor, threshold: np.ndarray) -> Tensor:
    """Invert what is at least as bright as the threshold."""
    return torch.where(x >= _each(x, 255 * threshold), 255 - x, x)


def _autocontrast(x: Tensor, _) -> Tensor:
    """Stretch every channel to 0 … 255; a channel of one value stays."""
    low, high = x.amin((2, 3), keepdim=True).float(), x.amax((2, 3), keepdim=True).float()  # (B, 3, 1, 1)
    flat = high == low
    step = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return _whole((x - torch.where(flat, 0.0, low)) / step)


def _equalize(x: Tensor, _) -> Tensor:
    """Spread the values of every channel evenly, by Pillow's rule; a channel with too few other values stays."""
    pixels = x.flatten(2).long()  # (B, 3, H W)
    histogram = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    most = histogram.gather(2, pixels.amax(2, keepdim=True))  # pixels of the brightest value
    step = (pixels.shape[2] - most) // 255  # (B, 3, 1)
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)  # (B, 3, 256)
    return torch.where(step == 0, pixels, table.gather(2, pixels)).view_as(x).to(torch.uint8)


COLOUR = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
