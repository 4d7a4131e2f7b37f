"""Evaluation and training transforms on whole batches, with a random draw of its own for every image.

Numbers are drawn on the host by NumPy, pixels are moved on the tensor's own device: CPU and GPU see the same
draws. Each operation equals torchvision's function of that name, which takes the same parameters for all.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labcore import LabError
from labcore.config import Augment, Recipe
from labcore.images.pixels import affine, change, grey, per_image, to_device

# The reference's constants. Its std is the mean of per-image values; per pixel it would be about 0.247.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def normalize(images: Tensor) -> Tensor:
    """Return (x / 255 - mean) / std of images in 0 … 255, (B, 3, H, W), as float32 in channels_last."""
    mean, std = _constants(images.device)
    return images.to(torch.float32).sub(mean).div_(std).contiguous(memory_format=torch.channels_last)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std of bytes, (1, 3, 1, 1); made once per device, since making them waits for it."""
    return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))


def augment(images: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """Return training images: uint8 (B, 3, H, W) -> normalised float32 (B, 3, H, W), channels_last."""
    count, _, height, width = images.shape
    x = crop_flip(images, config, rng)
    if config.policy == "trivial":
        from labcore.images.policy import trivial_augment  # it imports torchvision, which takes seconds

        x = trivial_augment(x, rng)
    if config.brightness or config.contrast or config.saturation or config.hue:
        x = color_jitter(x.float() / 255, config, rng) * 255
    if config.rotation_degrees:
        x = affine(x, rng.uniform(-config.rotation_degrees, config.rotation_degrees, count))
    if config.translate or config.scale_min != 1 or config.scale_max != 1:
        largest = width * config.translate, height * config.translate
        right, down = (np.round(rng.uniform(-pixels, pixels, count)) for pixels in largest)
        scale = rng.uniform(config.scale_min, config.scale_max, count)
        x = affine(x, right=right, down=down, scale=scale)
    x = normalize(x)
    if config.cutout:
        # Around a pixel anywhere, so that part of it may fall outside; 0 is the mean colour.
        top, left = (rng.integers(0, side, count) - config.cutout // 2 for side in (height, width))
        x.masked_fill_(_inside(x, top, top + config.cutout, left, left + config.cutout), 0)
    if config.erasing_prob:
        x.masked_fill_(_inside(x, *_erasing_box(x, config, rng)), 0)
    return x


def crop_flip(images: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """Crop at random, padded with zeros or by reflection, and flip at random. Dtype and shape stay.

    Raises LabError where reflection would need more pixels than the images have.
    """
    count, channels, height, width = images.shape
    pad = config.crop_padding
    if config.padding_mode == "reflect" and pad >= min(height, width):
        raise LabError(
            f"augment.crop_padding must be below {min(height, width)} pixels to reflect these images, "
            f"found {pad}; lower it."
        )
    # Only the draws travel to the device: copies of more than 64 kB would wait for it.
    top, left = (to_device(images, rng.integers(0, 2 * pad + 1, (count, 1)), torch.int64) for _ in range(2))
    flipped = to_device(images, rng.random((count, 1)) < config.flip_prob, torch.bool)
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    columns = left + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(flipped, columns.flip(1), columns)
    paddable = images if config.padding_mode == "constant" else images.float()  # bytes cannot be reflected
    padded = F.pad(paddable, [pad] * 4, mode=config.padding_mode).to(images.dtype)
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)  # (B, H W)
    return padded.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view(images.shape)


def _blend(x: Tensor, other: Tensor | float, factors: np.ndarray) -> Tensor:
    factor = per_image(x, factors)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_hue(x: Tensor, shifts: np.ndarray) -> Tensor:
    """Turn the hue of RGB images in [0, 1], (B, 3, H, W), by `shifts`, (B,), in turns."""
    red, green, blue = x.unbind(1)  # (B, H, W) each
    high, low = x.amax(1), x.amin(1)
    spread = high - low
    safe = torch.where(spread == 0, 1.0, spread)
    blue_or_green = torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = torch.where(high == red, (green - blue) / safe, blue_or_green)
    hue = (sector / 6 + to_device(x, shifts).view(-1, 1, 1)) % 1.0
    # A channel is high - spread * max(0, min(k, 4 - k, 1)) with k = (n + 6 hue) mod 6 and n = 5, 3, 1.
    ks = ((n + 6 * hue) % 6 for n in (5, 3, 1))
    return torch.stack([high - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in ks], 1)


def color_jitter(x: Tensor, config: Augment, rng: np.random.Generator) -> Tensor:
    """Adjust RGB in [0, 1], (B, 3, H, W), as ColorJitter: strengths and order are drawn for every image."""
    adjustments = (
        lambda part, factors: _blend(part, 0.0, factors),  # brightness
        lambda part, factors: _blend(part, grey(part).mean((1, 2, 3), keepdim=True), factors),  # contrast
        lambda part, factors: _blend(part, grey(part), factors),  # saturation
        adjust_hue,
    )
    x, count = x.clone(memory_format=torch.contiguous_format), len(x)
    order = rng.random((count, 4)).argsort(axis=1)  # (B, 4)
    amounts = (config.brightness, config.contrast, config.saturation)
    strengths = [rng.uniform(1 - amount, 1 + amount, count) for amount in amounts]
    strengths.append(rng.uniform(-config.hue, config.hue, count))
    for turn in range(4):
        for number, adjust in enumerate(adjustments):
            change(x, order[:, turn] == number, adjust, strengths[number])
    return x


def _inside(x: Tensor, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> Tensor:
    """Return whether a pixel lies in its image's box, (B, 1, H, W); the bounds have shape (B,)."""
    rows, columns = np.arange(x.shape[2]), np.arange(x.shape[3])
    in_rows = to_device(x, (rows >= top[:, None]) & (rows < bottom[:, None]), torch.bool)
    in_columns = to_device(x, (columns >= left[:, None]) & (columns < right[:, None]), torch.bool)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def _erasing_box(x: Tensor, config: Augment, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw RandomErasing's box, by area and log-uniform aspect ratio; the first of ten that fits."""
    count, _, height, width = x.shape
    area = height * width * rng.uniform(*config.erasing_scale, (count, 10))
    ratio = np.exp(rng.uniform(*map(math.log, config.erasing_ratio), (count, 10)))
    heights, widths = np.round(np.sqrt(area * ratio)).astype(int), np.round(np.sqrt(area / ratio)).astype(int)
    fits = (heights < height) & (widths < width)
    first = np.arange(count), fits.argmax(1)
    box_height, box_width = heights[first], widths[first]
    erased = fits.any(1) & (rng.random(count) < config.erasing_prob)
    top = np.floor(rng.random(count) * (height - box_height + 1)).astype(int)
    left = np.floor(rng.random(count) * (width - box_width + 1)).astype(int)
    return top, top + box_height * erased, left, left + box_width


def mix(x: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mix every image with its neighbour, by mixup, by CutMix or not at all, as drawn for it.

    mixup (Zhang et al., 2018, equation 2): x_i <- share_i x_i + (1 - share_i) x_partner(i).
    CutMix (Yun et al., 2019, algorithm A1): a box of the partner's pixels, of about (1 - share) of the area.
    The share is then that of the image's own pixels. Shares are drawn from Beta(alpha, alpha).

    Neighbours stay together in any even part of the batch; the last image of an odd batch is its own partner.
    Returns the mixed images, the partners' positions (B,) and the shares (B,), 1 where not mixed.
    """
    count, _, height, width = x.shape
    chance = rng.random(count)
    blended = chance < recipe.mixup_prob
    pasted = ~blended & (chance < recipe.mixup_prob + recipe.cutmix_prob)
    alphas = recipe.mixup_alpha, recipe.cutmix_alpha
    shares = [rng.beta(alpha, alpha, count) if alpha else np.ones(count) for alpha in alphas]
    blend_share, paste_share = np.where([blended, pasted], shares, 1.0)
    top, bottom, left, right = box = _cutmix_box(x, paste_share, rng)
    share = blend_share * (1 - (bottom - top) * (right - left) / (height * width))  # one of the two is 1
    partner = to_device(x, np.minimum(np.arange(count) ^ 1, count - 1), torch.int64)
    other, blend = x[partner], per_image(x, blend_share)
    mixed = torch.where(_inside(x, *box), other, blend * x + (1 - blend) * other)
    return mixed.contiguous(memory_format=torch.channels_last), partner, to_device(x, share)


def _cutmix_box(x: Tensor, share: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw a box with the image's aspect ratio and (1 - share) of its area, cut off at the border."""
    bounds = []
    for side in x.shape[2:]:
        middle, half = rng.integers(0, side, len(x)), (side * np.sqrt(1 - share) / 2).astype(int)
        bounds += [np.maximum(middle - half, 0), np.minimum(middle + half, side)]
    return tuple(bounds)
