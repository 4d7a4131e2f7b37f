"""The weights that training starts from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labcore.images.transforms import normalize


@torch.no_grad()
def initialize(model: nn.Module, init: str, images: Tensor) -> None:
    """Replace the first weights that torch drew, in place, with torch's global random generator.

    "he" keeps them, and so does "weights", which labcore.lab.parallel loads. "identity" makes the first
    filters of every convolution but the stem's the identity, as many as it has inputs (Jordan, 2024, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU", section 3.3). "whitened" also gives the stem
    `whitening_filters` of `images`, uint8 (N, 3, H, W) (section 3.2 there).
    """
    if init in ("he", "weights"):
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
    """Return up to `count` filters, (K, 3, side, side), whose outputs on normalised patches are uncorrelated.

    They are eigenvectors of the patches' second moments, those of the largest eigenvalues first, each divided
    by the square root of its eigenvalue plus `eps`; those without energy, as in grey images, are left out.
    Sums are of bytes and therefore exact, whatever the number of threads.
    """
    total, products, n_patches = 0, 0, 0
    for part in images.split(16):  # all patches at once would fill the memory
        patches = F.unfold(part.double(), side).transpose(1, 2).flatten(0, 1)  # (patches, 3 side side)
        total, products = total + patches.sum(0), products + patches.T @ patches
        n_patches += len(patches)
    bounds = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 3, side, side)
    black, white = normalize(bounds).double().flatten(1)
    gain = (white - black) / 255  # a normalised pixel is gain * byte + black
    cross = torch.outer(gain * total, black)
    moments = (torch.outer(gain, gain) * products + cross + cross.T) / n_patches + torch.outer(black, black)
    values, vectors = torch.linalg.eigh(moments)  # ascending
    has_energy = values > 1e-9 * values[-1]
    filters = vectors[:, has_energy] / torch.sqrt(values[has_energy] + eps)
    return filters.flip(1)[:, :count].T.reshape(-1, images.shape[1], side, side).float()
