"""What transforms and policies share: numbers brought to the images' device, grey values, one warp for a whole batch."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def on(x: Tensor, values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers drawn on the host, as a tensor on the device of `x`; the host does not wait for it."""
    return torch.as_tensor(values, dtype=dtype).to(x.device, non_blocking=True)


def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> float (B, 1, H, W), ITU-R 601 weights; added up as in torchvision, so that rounding is the same."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    return red.mul(0.2989).add(green, alpha=0.587).add(blue, alpha=0.114).unsqueeze(1)


def warp(x: Tensor, theta: np.ndarray) -> Tensor:
    """Look every output pixel up in the input: nearest pixel, zero outside.

    Float images (B, C, H, W). `theta` has shape (B, 2, 3) and takes (right, down, 1) of an output pixel, counted from the
    centre, to the input pixel.
    """
    count, _, height, width = x.shape
    half = np.array([[width / 2], [height / 2]], dtype=np.float32)
    # Scaled to grid_sample's units before the product and in float32, so that points between two pixels round as in
    # torchvision.
    theta = on(x, theta.astype(np.float32) / half)
    u = torch.arange(width, device=x.device) - (width - 1) / 2
    v = torch.arange(height, device=x.device) - (height - 1) / 2
    base = torch.stack(
        [
            u.expand(height, width),
            v.view(-1, 1).expand(height, width),
            torch.ones(height, width, device=x.device),
        ],
        -1,
    )
    grid = base.view(1, -1, 3) @ theta.transpose(1, 2)  # (B, H W, 2)
    return F.grid_sample(
        x, grid.view(count, height, width, 2), mode="nearest", padding_mode="zeros", align_corners=False
    )
