"""The weights that training starts from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labcore.images.transforms import normalize
from labcore.model import QuantizableResNet


@torch.no_grad()
def initialize(model: QuantizableResNet, init: str, images: Tensor) -> None:
    """Replace the first weights that torch drew, in place, with torch's global random generator.

    "he" keeps them. "identity" gives the first filters of every convolution but the stem's the identity, as many as it has
    inputs, and the others torch's default (Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.3).
    "whitened" does the same and gives the stem `whitening_filters` (section 3.2 there); here they go on learning.

    Args:
        images: uint8 (N, 3, H, W); "whitened" alone looks at them.
    """
    if init == "he":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not model.conv1:
            module.reset_parameters()
            nn.init.dirac_(module.weight[: min(module.weight.shape[:2])])
    if init == "whitened":
        weight = model.conv1.weight
        filters = whitening_filters(images, weight.shape[2], len(weight) // 2)
        both = torch.cat([filters, -filters])  # ReLU keeps one half of each
        weight[: len(both)] = both


def whitening_filters(images: Tensor, side: int, count: int, eps: float = 5e-4) -> Tensor:
    """Filters whose outputs on patches of these images, normalised, are uncorrelated, and of one size where there is energy:
    (K, 3, side, side), K <= count.

    Eigenvectors of the patches' second moments, those of the largest eigenvalues first, each divided by the square root of
    its eigenvalue plus `eps` (Jordan, 2024, section 3.2). Directions without energy, as grey images have them, give none.
    Sums are of bytes and therefore exact, whatever the number of threads.
    """
    total, products, n_patches = 0, 0, 0
    for part in images.split(16):  # all patches at once would fill the memory
        patches = F.unfold(part.double(), side).transpose(1, 2).flatten(0, 1)  # (patches, 3 side side)
        total, products = total + patches.sum(0), products + patches.T @ patches
        n_patches += len(patches)
    black, white = (
        normalize(torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 3, side, side)).double().flatten(1)
    )
    gain = (white - black) / 255  # a normalised pixel is gain * byte + black
    cross = torch.outer(gain * total, black)
    moments = torch.outer(gain, gain) * products + cross + cross.T
    moments = moments / n_patches + torch.outer(black, black)
    values, vectors = torch.linalg.eigh(moments)  # ascending
    some = values > 1e-9 * values[-1]
    filters = vectors[:, some] / torch.sqrt(values[some] + eps)
    return filters.flip(1)[:, :count].T.reshape(-1, images.shape[1], side, side).float()
