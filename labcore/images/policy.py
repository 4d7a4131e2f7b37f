"""TrivialAugmentWide (Müller and Hutter, 2021, section 3), with a draw of its own for every image.

Operations, their order, magnitudes and signs are those of torchvision.transforms.v2, with nearest pixels and
zero fill. Its functions take one magnitude for a whole batch; only those that take none are used here.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from labcore import LabError
from labcore.images.pixels import affine, change, grey, per_image

BINS = 31


def trivial_augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply one operation to every image, at one of its magnitudes; each is drawn uniformly.

    uint8 (B, 3, H, W) -> uint8 (B, 3, H, W), a copy. Raises LabError for images of another type.
    """
    if images.dtype != torch.uint8:
        raise LabError(f"a policy takes uint8 images, found {images.dtype}; apply it before normalize.")
    names = np.array(OPERATIONS)
    number = rng.integers(0, len(names), len(images))
    magnitude = magnitudes()[number, rng.integers(0, BINS, len(images))]
    negative = np.isin(names[number], SIGNED) & (rng.random(len(images)) < 0.5)
    return operate(images, names[number], np.where(negative, -magnitude, magnitude))


def magnitudes() -> np.ndarray:
    """Return the magnitude of every operation in every bin, (operations, bins); zero where it has none.

    Shears are tangents, translations pixels, rotations degrees, Brightness to Sharpness distances from the
    neutral factor 1, Posterize bits kept, Solarize a share of 255.
    """
    largest = (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99)  # Identity to Sharpness
    rows = [torch.linspace(0, top, BINS) for top in largest]
    bits = (8 - torch.arange(BINS) / ((BINS - 1) / 6)).round()
    rows += [bits, torch.linspace(1, 0, BINS), torch.zeros(BINS), torch.zeros(BINS)]
    return torch.stack(rows).double().numpy()  # rounded to float32 as in torchvision: that decides pixels


def operate(images: Tensor, names: np.ndarray, magnitude: np.ndarray) -> Tensor:
    """Apply the operation names[i] with magnitude[i] to image i: uint8 (B, 3, H, W) -> uint8, a copy."""
    x = images.clone(memory_format=torch.contiguous_format)
    change(x, np.isin(names, GEOMETRIC), _warp, names, magnitude)
    for name, operation in COLOUR.items():
        change(x, names == name, operation, magnitude)
    return x


def _warp(x: Tensor, names: np.ndarray, magnitude: np.ndarray) -> Tensor:
    """Return sheared, shifted and turned images, all by one warp; a shear keeps the top left corner."""
    shear_x, shear_y, right, down, angle = (np.where(names == name, magnitude, 0) for name in GEOMETRIC)
    right = np.trunc(right) - shear_x * x.shape[2] / 2
    down = np.trunc(down) - shear_y * x.shape[3] / 2
    return affine(x, angle, right, down, shear=(shear_x, shear_y))


def _blend(x: Tensor, other: Tensor, magnitude: np.ndarray) -> Tensor:
    """Return x + magnitude (x - other), cut off to 0 … 255."""
    factor = 1 + magnitude
    # addcmul rounds once, as torchvision does; two roundings would put some pixels one level lower.
    return torch.addcmul(x * per_image(x, factor), other, per_image(x, 1 - factor)).clamp(0, 255)


def _sharpness(x: Tensor, magnitude: np.ndarray) -> Tensor:
    """Blend with a blurred image, 1 around 5 in the middle; borders and images without an inside stay."""
    if min(x.shape[2:]) <= 2:
        return x
    kernel = torch.ones(3, 1, 3, 3, device=x.device)  # whole numbers: their sums are exact on every device
    kernel[:, :, 1, 1] = 5
    sharp = x.float()
    blurred = sharp.clone()
    blurred[:, :, 1:-1, 1:-1] = (F.conv2d(sharp, kernel, groups=3) / 13).round()
    return torch.addcmul(sharp, blurred - sharp, per_image(x, 1 - (1 + magnitude))).clamp(0, 255)


GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# What each of the others does to images x with a magnitude m for each.
COLOUR = {
    "Brightness": lambda x, m: (x * per_image(x, 1 + m)).clamp(0, 255),
    "Color": lambda x, m: _blend(x, grey(x).floor(), m),
    "Contrast": lambda x, m: _blend(x, grey(x).floor().mean((1, 2, 3), keepdim=True), m),
    "Sharpness": _sharpness,
    "Posterize": lambda x, m: x & per_image(x, 256 - 2 ** (8 - m), torch.uint8),  # keeps the highest bits
    "Solarize": lambda x, m: torch.where(x >= per_image(x, 255 * m), 255 - x, x),  # from a threshold on
    "AutoContrast": lambda x, _: TF.autocontrast(x),
    "Equalize": lambda x, _: TF.equalize(x),
}
OPERATIONS = ("Identity", *GEOMETRIC, *COLOUR)
SIGNED = OPERATIONS[1:10]  # those with a direction: ShearX to Sharpness
