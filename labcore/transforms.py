"""Evaluation and training transforms on whole batches, with a random draw of its own for every image.

Numbers are drawn on the host by NumPy, pixels are moved on the tensor's own device: CPU and GPU see the same draws.
Each operation equals torchvision's function of that name for the same parameters.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labcore.config import Augment, Recipe

# The reference's constants. Its std is the mean of per-image values; per pixel it would be about 0.247.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def normalize(images: Tensor) -> Tensor:
    """Evaluation transform: uint8 or float in 0 … 255 (B, 3, H, W) -> float32, channels_last, (x / 255 - mean) / std."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return images.to(torch.float32).sub(mean).div_(std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """Training transforms: uint8 (B, 3, H, W) -> normalised float32 (B, 3, H, W), channels_last.

    Order: crop and flip, colour jitter, rotation, translation and scale, normalisation, cutout, random erasing.
    """
    x = crop_flip(images, config, rng)
    if config.brightness or config.contrast or config.saturation or config.hue:
        x = color_jitter(x.float() / 255, config, rng) * 255
    if config.rotation_degrees:
        x = affine(x.float(), angle=_draw(rng, len(x), -config.rotation_degrees, config.rotation_degrees))
    if config.translate or config.scale_min != 1 or config.scale_max != 1:
        shift = [
            np.round(_draw(rng, len(x), -side * config.translate, side * config.translate))
            for side in x.shape[:1:-1]
        ]
        x = affine(
            x.float(), shift=np.stack(shift, 1), scale=_draw(rng, len(x), config.scale_min, config.scale_max)
        )
    x = normalize(x)
    if config.cutout:
        x = _erase(x, *_cutout_boxes(x, config.cutout, rng))
    if config.erasing_prob:
        x = _erase(x, *_erasing_boxes(x, config, rng))
    return x


def _draw(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    return rng.uniform(low, high, count)


def _on(x: Tensor, values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).to(x.device, non_blocking=True)


def crop_flip(images: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """RandomCrop with zero padding and RandomHorizontalFlip, as one gather. Keeps dtype and shape."""
    count, _, height, width = images.shape
    pad = config.crop_padding
    rows = _on(images, rng.integers(0, 2 * pad + 1, (count, 1)) + np.arange(height), torch.int64)  # (B, H)
    columns = rng.integers(0, 2 * pad + 1, (count, 1)) + np.arange(width)
    flipped = rng.random((count, 1)) < config.flip_prob
    columns = _on(images, np.where(flipped, columns[:, ::-1], columns), torch.int64)  # (B, W)
    padded = F.pad(images, (pad, pad, pad, pad))
    batch = torch.arange(count, device=images.device).view(count, 1, 1)
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )  # (B, H, W, 3) seen as (B, 3, H, W)


def _grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), ITU-R 601 weights as in torchvision."""
    weights = torch.tensor((0.2989, 0.587, 0.114), device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images in [0, 1], (B, 3, H, W), by `shift` in turns, (B, 1, 1, 1)."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    high, low = x.amax(1), x.amin(1)
    spread = high - low
    safe = torch.where(spread == 0, 1.0, spread)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (sector / 6 + shift.view(-1, 1, 1)) % 1.0

    # Each channel of an HSV colour is value - spread * max(0, min(k, 4 - k, 1)), k = (n + 6 hue) mod 6, n = 5, 3, 1.
    def channel(n: int) -> Tensor:
        k = (n + 6 * hue) % 6
        return high - spread * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def color_jitter(x: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """ColorJitter on RGB in [0, 1], (B, 3, H, W): four adjustments, their strength and order drawn for every image."""
    adjustments = {
        "brightness": lambda part, factor: _blend(part, 0.0, factor),
        "contrast": lambda part, factor: _blend(part, _grey(part).mean((1, 2, 3), keepdim=True), factor),
        "saturation": lambda part, factor: _blend(part, _grey(part), factor),
        "hue": adjust_hue,
    }
    count = len(x)
    order = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)  # (B, 4)
    strengths = [
        _draw(rng, count, 1 - amount, 1 + amount)
        for amount in (config.brightness, config.contrast, config.saturation)
    ]
    strengths.append(_draw(rng, count, -config.hue, config.hue))
    for turn in range(4):
        for number, adjust in enumerate(adjustments.values()):
            chosen = np.flatnonzero(order[:, turn] == number)
            index = _on(x, chosen, torch.int64)
            factor = _on(x, strengths[number][chosen]).view(-1, 1, 1, 1)
            x = x.index_copy(0, index, adjust(x[index], factor))
    return x


def affine(
    x: Tensor,
    angle: np.ndarray | float = 0.0,
    shift: np.ndarray | float = 0.0,
    scale: np.ndarray | float = 1.0,
) -> Tensor:
    """Rotate (degrees, counter-clockwise), scale and shift (pixels right, down) about the centre; nearest pixel, zero fill.

    Float images (B, C, H, W); `angle` and `scale` have shape (B,), `shift` (B, 2).
    """
    count, _, height, width = x.shape
    turn = np.radians(np.broadcast_to(angle, count))
    inverse = np.broadcast_to(1 / np.asarray(scale), count)
    sine, cosine = np.sin(turn) * inverse, np.cos(turn) * inverse
    right, down = np.broadcast_to(shift, (count, 2)).T
    # Output pixel (u, v) about the centre, v downwards -> input pixel; the rotation is undone.
    theta = np.stack(
        [
            np.stack([cosine, -sine, -cosine * right + sine * down], 1),
            np.stack([sine, cosine, -sine * right - cosine * down], 1),
        ],
        1,
    )  # (B, 2, 3)
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
    pixels = base.view(1, -1, 3) @ _on(x, theta).transpose(1, 2)  # (B, H W, 2), pixels from the centre
    grid = (pixels * torch.tensor((2 / width, 2 / height), device=x.device)).view(count, height, width, 2)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _erase(x: Tensor, top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray) -> Tensor:
    """Set one box per image to zero, the mean colour; arrays have shape (B,), a height of 0 erases nothing."""
    rows, columns = np.arange(x.shape[2]), np.arange(x.shape[3])
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    box = _on(x, in_rows, torch.bool)[:, None, :, None] & _on(x, in_columns, torch.bool)[:, None, None, :]
    return x.masked_fill_(box, 0)


def _cutout_boxes(x: Tensor, side: int, rng: np.random.Generator):
    """A square around a pixel drawn anywhere, so that part of it may fall outside the image."""
    count, _, height, width = x.shape
    sides = np.full(count, side)
    return rng.integers(0, height, count) - side // 2, rng.integers(0, width, count) - side // 2, sides, sides


def _erasing_boxes(x: Tensor, config: Augment, rng: np.random.Generator, tries: int = 10):
    """RandomErasing's box: a share of the area and a log-uniform aspect ratio; the first of ten draws that fits."""
    count, _, height, width = x.shape
    area = height * width * rng.uniform(*config.erasing_scale, (count, tries))
    ratio = np.exp(rng.uniform(*(math.log(value) for value in config.erasing_ratio), (count, tries)))
    heights, widths = np.round(np.sqrt(area * ratio)).astype(int), np.round(np.sqrt(area / ratio)).astype(int)
    fits = (heights < height) & (widths < width)
    first = fits.argmax(1)
    box_height, box_width = heights[np.arange(count), first], widths[np.arange(count), first]
    chosen = fits.any(1) & (rng.random(count) < config.erasing_prob)
    top = np.floor(rng.random(count) * (height - box_height + 1)).astype(int)
    left = np.floor(rng.random(count) * (width - box_width + 1)).astype(int)
    return top, left, np.where(chosen, box_height, 0), np.where(chosen, box_width, 0)


def mixup(x: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mix images in pairs: x_i <- share_i x_i + (1 - share_i) x_partner(i) (Zhang et al., 2018, equation 2).

    The share is drawn for every image from Beta(alpha, alpha), and is 1 with probability 1 - mixup_prob.

    Returns:
        The mixed images (B, 3, H, W), the partners' positions (B,) and the shares (B,).
    """
    count = len(x)
    mixed = rng.random(count) < recipe.mixup_prob
    share = (
        np.where(mixed, rng.beta(recipe.mixup_alpha, recipe.mixup_alpha, count), 1.0)
        if recipe.mixup_alpha
        else np.ones(count)
    )
    partner, share = _on(x, rng.permutation(count), torch.int64), _on(x, share)
    weight = share.view(-1, 1, 1, 1)
    mixed = weight * x + (1 - weight) * x[partner]
    return mixed.contiguous(memory_format=torch.channels_last), partner, share
