"""Evaluation and training transforms on whole batches, with a random draw of its own for every image.

Numbers are drawn on the host by NumPy, pixels are moved on the tensor's own device: CPU and GPU see the same draws.
Each operation equals torchvision's function of that name for the same parameters.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labcore import LabError
from labcore.config import Augment, Recipe
from labcore.images.pixels import grey, on, warp
from labcore.images.policy import apply_policy

# The reference's constants. Its std is the mean of per-image values; per pixel it would be about 0.247.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def normalize(images: Tensor) -> Tensor:
    """Evaluation transform: uint8 or float in 0 … 255 (B, 3, H, W) -> float32, channels_last, (x / 255 - mean) / std."""
    mean, std = _constants(images.device)
    return images.to(torch.float32).sub(mean).div_(std).contiguous(memory_format=torch.channels_last)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of bytes, (1, 3, 1, 1); made once per device, since making them waits for it."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    return mean, std


def augment(images: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """Training transforms: uint8 (B, 3, H, W) -> normalised float32 (B, 3, H, W), channels_last.

    Order: crop and flip, a policy, colour jitter, rotation, translation and scale, normalisation, cutout, random erasing.
    """
    x = crop_flip(images, config, rng)
    if config.policy != "none":
        x = apply_policy(x, config.policy, rng)
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


def crop_flip(images: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """RandomCrop, padded with zeros or by reflection, and RandomHorizontalFlip, as one gather. Keeps dtype and shape.

    Raises LabError where reflection would need more pixels than the images have.
    """
    count, _, height, width = images.shape
    pad = config.crop_padding
    # Only the draws travel to the device: copies of more than 64 kB would wait for it.
    top, left = (on(images, rng.integers(0, 2 * pad + 1, (count, 1)), torch.int64) for _ in range(2))
    flipped = on(images, rng.random((count, 1)) < config.flip_prob, torch.bool)
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    columns = left + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(flipped, columns.flip(1), columns)
    if config.padding_mode == "reflect" and pad >= min(height, width):
        raise LabError(
            f"augment.crop_padding must be below {min(height, width)} pixels to reflect these images, found {pad}; lower it."
        )
    known = images if config.padding_mode == "constant" else images.float()  # bytes cannot be reflected
    padded = F.pad(known, [pad] * 4, mode=config.padding_mode).to(images.dtype)
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)  # (B, H W)
    return padded.flatten(2).gather(2, pixels[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


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
        "contrast": lambda part, factor: _blend(part, grey(part).mean((1, 2, 3), keepdim=True), factor),
        "saturation": lambda part, factor: _blend(part, grey(part), factor),
        "hue": adjust_hue,
    }
    x = x.clone(memory_format=torch.contiguous_format)
    count = len(x)
    order = rng.random((count, 4)).argsort(axis=1)  # (B, 4)
    strengths = [
        _draw(rng, count, 1 - amount, 1 + amount)
        for amount in (config.brightness, config.contrast, config.saturation)
    ]
    strengths.append(_draw(rng, count, -config.hue, config.hue))
    for turn in range(4):
        for number, adjust in enumerate(adjustments.values()):
            chosen = np.flatnonzero(order[:, turn] == number)
            index = on(x, chosen, torch.int64)
            factor = on(x, strengths[number][chosen]).view(-1, 1, 1, 1)
            x.index_copy_(0, index, adjust(x[index], factor))
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
    count = len(x)
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
    return warp(x, theta)


def _inside(x: Tensor, top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray) -> Tensor:
    """Whether a pixel lies in its image's box, (B, 1, H, W); arrays have shape (B,), a height of 0 holds nothing."""
    rows, columns = np.arange(x.shape[2]), np.arange(x.shape[3])
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return on(x, in_rows, torch.bool)[:, None, :, None] & on(x, in_columns, torch.bool)[:, None, None, :]


def _erase(x: Tensor, *box: np.ndarray) -> Tensor:
    """Set one box per image to zero, the mean colour."""
    return x.masked_fill_(_inside(x, *box), 0)


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


def mix(x: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mix every image with its neighbour, by mixup, by CutMix or not at all, as drawn for it.

    mixup (Zhang et al., 2018, equation 2): x_i <- share_i x_i + (1 - share_i) x_partner(i).
    CutMix (Yun et al., 2019, section 3.1 and algorithm A1): a box of the partner's pixels, of about (1 - share) of the area
    around a pixel drawn anywhere. The share is then that of the own pixels, after the box is cut off at the border.

    Shares are drawn from Beta(alpha, alpha); an alpha of 0 switches that kind off. The batch is in random order, so
    neighbours are random pairs, and stay together in any even part of the batch. The last of an odd batch is its own partner.

    Returns:
        The mixed images (B, 3, H, W), the partners' positions (B,) and the shares of own pixels (B,), 1 where not mixed.
    """
    count, _, height, width = x.shape
    chance = rng.random(count)
    blended = chance < recipe.mixup_prob
    pasted = ~blended & (chance < recipe.mixup_prob + recipe.cutmix_prob)
    weight = np.where(blended, _shares(recipe.mixup_alpha, count, rng), 1.0)
    box = _cutmix_boxes(x, np.where(pasted, _shares(recipe.cutmix_alpha, count, rng), 1.0), rng)
    share = weight * (1 - box[2] * box[3] / (height * width))  # one of the two factors is 1
    partner = on(x, np.minimum(np.arange(count) ^ 1, count - 1), torch.int64)
    other, weight = x[partner], on(x, weight).view(-1, 1, 1, 1)
    mixed = torch.where(_inside(x, *box), other, weight * x + (1 - weight) * other)
    return mixed.contiguous(memory_format=torch.channels_last), partner, on(x, share)


def _shares(alpha: float, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.beta(alpha, alpha, count) if alpha else np.ones(count)


def _cutmix_boxes(x: Tensor, share: np.ndarray, rng: np.random.Generator):
    """Boxes with the image's aspect ratio and (1 - share) of its area, cut off at the border."""
    count, _, height, width = x.shape
    bounds = []
    for side in (height, width):
        middle, half = rng.integers(0, side, count), (side * np.sqrt(1 - share) / 2).astype(int)
        bounds.append((np.maximum(middle - half, 0), np.minimum(middle + half, side)))
    (top, bottom), (left, right) = bounds
    return top, left, bottom - top, right - left
