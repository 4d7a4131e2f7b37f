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
from labcore.images.pixels import affine, grey, per_image, to_device

BINS = 31


def trivial_augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply one operation to every image, at one of its magnitudes; each is drawn uniformly.

    uint8 (B, 3, H, W) -> uint8 (B, 3, H, W), a copy. Raises LabError for images of another type.
    """
    if images.dtype != torch.uint8:
        raise LabError(f"a policy takes uint8 images, found {images.dtype}; apply it before normalize.")
    names = np.array(list(OPERATIONS))
    number = rng.integers(0, len(names), len(images))
    magnitude = magnitudes()[number, rng.integers(0, BINS, len(images))]
    negative = np.isin(names[number], SIGNED) & (rng.random(len(images)) < 0.5)
    return operate(images, names[number], np.where(negative, -magnitude, magnitude))


def magnitudes() -> np.ndarray:
    """Return the magnitude of every operation in every bin, (operations, bins); zero where it has none.

    Units: shear as a tangent, translation in pixels, rotation in degrees, Brightness to Sharpness as a
    distance from the neutral factor 1, Posterize in bits kept, Solarize as a share of 255.
    """
    largest = (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99)  # Identity to Sharpness
    rows = [torch.linspace(0, top, BINS) for top in largest]
    rows.append((8 - torch.arange(BINS) / ((BINS - 1) / 6)).round())
    rows.append(torch.linspace(1, 0, BINS))
    rows += [torch.zeros(BINS)] * 2
    return torch.stack(rows).double().numpy()  # rounded to float32 as in torchvision: that decides pixels


def operate(images: Tensor, names: np.ndarray, magnitude: np.ndarray) -> Tensor:
    """Apply the operation names[i] with magnitude[i] to image i: uint8 (B, 3, H, W) -> uint8, a copy."""
    x = images.clone(memory_format=torch.contiguous_format)
    for name in np.unique(names):
        chosen = np.flatnonzero(names == name)
        index = to_device(x, chosen, torch.int64)
        changed = OPERATIONS[name](x[index], magnitude[chosen])
        x.index_copy_(0, index, changed.clamp(0, 255).to(torch.uint8))
    return x


def _blend(x: Tensor, other: Tensor, magnitude: np.ndarray) -> Tensor:
    """Return x + magnitude (x - other)."""
    factor = 1 + magnitude
    # addcmul rounds once, as torchvision does; two roundings would put some pixels one level lower.
    return torch.addcmul(x * per_image(x, factor), other, per_image(x, 1 - factor))


def _sharpness(x: Tensor, magnitude: np.ndarray) -> Tensor:
    """Blend with a blurred image, 1 around 5 in the middle; borders and images without an inside stay."""
    if min(x.shape[2:]) <= 2:
        return x
    kernel = torch.ones(3, 1, 3, 3, device=x.device)  # whole numbers: their sums are exact on every device
    kernel[:, :, 1, 1] = 5
    sharp = x.float()
    blurred = sharp.clone()
    blurred[:, :, 1:-1, 1:-1] = (F.conv2d(sharp, kernel, groups=3) / 13).round()
    return torch.addcmul(sharp, blurred - sharp, per_image(x, 1 - (1 + magnitude)))


# What each does to images x with a magnitude m for each. Shears keep the top left corner, as in torchvision.
OPERATIONS = {
    "Identity": lambda x, m: x,
    "ShearX": lambda x, m: affine(x, shear=(m, 0), right=-m * x.shape[2] / 2),
    "ShearY": lambda x, m: affine(x, shear=(0, m), down=-m * x.shape[3] / 2),
    "TranslateX": lambda x, m: affine(x, right=np.trunc(m)),
    "TranslateY": lambda x, m: affine(x, down=np.trunc(m)),
    "Rotate": lambda x, m: affine(x, angle=m),
    "Brightness": lambda x, m: x * per_image(x, 1 + m),
    "Color": lambda x, m: _blend(x, grey(x).floor(), m),
    "Contrast": lambda x, m: _blend(x, grey(x).floor().mean((1, 2, 3), keepdim=True), m),
    "Sharpness": _sharpness,
    "Posterize": lambda x, m: x & per_image(x, 256 - 2 ** (8 - m), torch.uint8),  # keeps the highest bits
    "Solarize": lambda x, m: torch.where(x >= per_image(x, 255 * m), 255 - x, x),  # from a threshold on
    "AutoContrast": lambda x, _: TF.autocontrast(x),
    "Equalize": lambda x, _: TF.equalize(x),
}
SIGNED = tuple(OPERATIONS)[1:10]  # those with a direction: ShearX to Sharpness
