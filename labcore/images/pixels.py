"""What transforms and the policy share: draws on the images' device, grey values, one warp per batch."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Draws = np.ndarray | float  # one number for every image, (B,), or the same for all


def to_device(x: Tensor, values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers drawn on the host as a tensor on the device of `x`; the host does not wait for it."""
    return torch.as_tensor(values, dtype=dtype).to(x.device, non_blocking=True)


def per_image(x: Tensor, values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one number for every image of `x` on its device, (B, 1, 1, 1)."""
    return to_device(x, values, dtype).view(-1, 1, 1, 1)


def change(x: Tensor, chosen: np.ndarray, operation: Callable, *draws: np.ndarray) -> None:
    """Replace, in place, the chosen images by what the operation makes of them and of their draws."""
    if chosen.any():
        index = to_device(x, np.flatnonzero(chosen), torch.int64)
        x.index_copy_(0, index, operation(x[index], *(values[chosen] for values in draws)).to(x.dtype))


def grey(x: Tensor) -> Tensor:
    """Return the grey values of (B, 3, H, W), float (B, 1, H, W), by ITU-R 601; rounded as in torchvision."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    return red.mul(0.2989).add(green, alpha=0.587).add(blue, alpha=0.114).unsqueeze(1)


def affine(
    x: Tensor, angle: Draws = 0, right: Draws = 0, down: Draws = 0, scale: Draws = 1, shear: tuple = (0, 0)
) -> Tensor:
    """Turn (degrees, counter-clockwise), shift (pixels) and scale images about their centre, or shear them.

    (B, C, H, W) -> float (B, C, H, W), nearest pixel, zero fill. `shear` holds two tangents: right per pixel
    down, and down per pixel right.
    """
    count, _, height, width = x.shape
    draws = np.radians(angle), right, down, 1 / scale
    turn, right, down, inverse = (np.broadcast_to(values, count) for values in draws)
    sine, cosine = np.sin(turn) * inverse, np.cos(turn) * inverse
    # From (right, down, 1) of an output pixel, counted from the centre, to its input pixel.
    to_right = np.stack([cosine, shear[0] - sine, -cosine * right + sine * down], 1)
    to_down = np.stack([shear[1] + sine, cosine, -sine * right - cosine * down], 1)
    # In grid_sample's units and float32 before the product: points between pixels round as in torchvision.
    halves = np.array([[width / 2], [height / 2]], dtype=np.float32)
    theta = to_device(x, np.stack([to_right, to_down], 1).astype(np.float32) / halves)  # (B, 2, 3)
    rows = torch.arange(height, device=x.device) - (height - 1) / 2
    columns = torch.arange(width, device=x.device) - (width - 1) / 2
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([u, v, torch.ones_like(u)], -1).view(1, -1, 3)
    grid = (points @ theta.transpose(1, 2)).view(count, height, width, 2)
    return F.grid_sample(x.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
