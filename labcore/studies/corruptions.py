"""Corrupted images: four groups and five severities, as in Hendrycks and Dietterich (2019).

"Benchmarking neural network robustness to common corruptions and perturbations" has CIFAR-10-C. Operations
here are torchvision's, kornia's, Pillow's and torch's: numbers do not compare digit for digit.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import kornia.augmentation as K
import numpy as np
import pandas as pd
import torch
from kornia.color import hsv_to_rgb, rgb_to_hsv
from kornia.contrib import diamond_square
from kornia.filters import motion_blur
from kornia.geometry.transform import scale
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from labcore import LabError, nearest
from labcore.files.progress import progress

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """One way to spoil an image; random draws come from torch's global generator, which `corrupt` seeds."""

    group: str
    apply: Callable[[Tensor, float | tuple], Tensor]  # of an image (1, 3, H, W) in 0 … 1; clipped afterwards
    parameters: tuple  # of the severities 1 … 5; those in pixels are meant for 32×32 images


def _salt_and_pepper(x: Tensor, amount: float) -> Tensor:
    return K.RandomSaltAndPepperNoise(amount=amount, salt_vs_pepper=0.5, p=1)(x)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    side = min(2 * round(4 * sigma) + 1, 2 * min(x.shape[2:]) - 1)  # four sigma to each side, or what fits
    return F.gaussian_blur(x, [side, side], [sigma, sigma])


def _motion_blur(x: Tensor, length: int) -> Tensor:
    angle, forward = torch.empty(1).uniform_(-45, 45), torch.ones(1)
    return motion_blur(x, length, angle, forward, border_type="replicate", mode="bilinear")


def _zoom_blur(x: Tensor, largest: float) -> Tensor:
    factors = torch.arange(1, largest + 0.005, 0.01)
    return scale(x.expand(len(factors), -1, -1, -1), factors).mean(0, keepdim=True)


def _rain(x: Tensor, drops: int) -> Tensor:
    return K.RandomRain((drops, drops), drop_height=(5, 7), drop_width=(-3, 3), p=1)(x)


def _fog(x: Tensor, parameter: tuple[float, float]) -> Tensor:
    thickness, decay = parameter
    plasma = diamond_square((1, 1, *x.shape[2:]), roughness=1 / decay, normalize_range=(0, 1))
    return (x + thickness * plasma) * x.max() / (x.max() + thickness)


def _brighten(x: Tensor, shift: float) -> Tensor:
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    return hsv_to_rgb(torch.stack([hue, saturation, (value + shift).clamp(max=1)], 1))


def _pixelate(x: Tensor, share: float) -> Tensor:
    picture, (height, width) = F.to_pil_image(x[0]), x.shape[2:]
    small = picture.resize((int(share * width), int(share * height)), Image.Resampling.BOX)
    return F.to_image(small.resize((width, height), Image.Resampling.BOX))[None] / 255


def _jpeg(x: Tensor, quality: int) -> Tensor:
    stream = io.BytesIO()  # torchvision's function gives the same, and is deprecated
    F.to_pil_image(x[0]).save(stream, "JPEG", quality=quality)
    return F.to_image(Image.open(stream))[None] / 255


CORRUPTIONS = {
    "gaussian noise": Corruption(
        "noise", lambda x, sigma: F.gaussian_noise(x, sigma=sigma), (0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "shot noise": Corruption(
        "noise", lambda x, photons: torch.poisson(x * photons) / photons, (500, 250, 100, 75, 50)
    ),
    "impulse noise": Corruption("noise", _salt_and_pepper, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian blur": Corruption("blur", _gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "motion blur": Corruption("blur", _motion_blur, (3, 5, 7, 9, 11)),
    "zoom blur": Corruption("blur", _zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    "rain": Corruption("weather", _rain, (2, 4, 7, 11, 16)),
    "fog": Corruption("weather", _fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption("weather", _brighten, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption("digital", F.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": Corruption("digital", _pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": Corruption("digital", _jpeg, (80, 65, 58, 50, 40)),
}
MEANINGS = {  # of the parameters
    "gaussian noise": "standard deviation, white is 1",
    "shot noise": "photons that make white",
    "impulse noise": "share of pixels made black or white",
    "gaussian blur": "standard deviation in pixels",
    "motion blur": "length in pixels, fading out; the angle is drawn from -45° … 45°",
    "zoom blur": "largest of the zooms that are averaged, in steps of 0.01",
    "rain": "drops, 5 to 7 pixels high",
    "fog": "thickness, and how fast its fractal gets smooth",
    "brightness": "added to the value of HSV",
    "contrast": "share of the contrast that is left",
    "pixelate": "share of the side that is kept",
    "jpeg": "quality",
}
AUTHORS = "Hendrycks and Dietterich's for CIFAR-10"
SOURCES = dict.fromkeys(CORRUPTIONS, AUTHORS) | {
    "impulse noise": f"{AUTHORS}; theirs strikes each channel by itself",
    "motion blur": "ours",
    "rain": "ours",
    "fog": f"{AUTHORS}; the fractal is kornia's",
    "contrast": f"{AUTHORS}; torchvision's mean is that of grey values",
}
GROUPS = tuple(dict.fromkeys(corruption.group for corruption in CORRUPTIONS.values()))


def group_of(name: str) -> str:
    """Return a corruption's group, or "clean" for anything else."""
    return CORRUPTIONS[name].group if name in CORRUPTIONS else "clean"


def parameters_table() -> pd.DataFrame:
    """Return the corruptions: index name; columns group, parameter, severities "1" … "5", source."""
    parameters = {name: one.parameters for name, one in CORRUPTIONS.items()}
    table = pd.DataFrame.from_dict(parameters, orient="index", columns=[str(level) for level in SEVERITIES])
    table.insert(0, "group", table.index.map(group_of))
    table.insert(1, "parameter", MEANINGS)
    return table.assign(source=SOURCES)


@torch.no_grad()
def corrupt(images: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Return images spoilt by one corruption: uint8 (N, 3, H, W) -> uint8 (N, 3, H, W), rounded to nearest.

    What is drawn for an image follows from the seed, the corruption and the image's own bytes: neither its
    neighbours nor its position matter, and the severities of one image share their draws. Raises LabError
    for an unknown corruption (with the nearest name), another severity, other images.
    """
    if name not in CORRUPTIONS:
        raise LabError(f"unknown corruption {name!r}: {nearest(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise LabError(f"severity must be a whole number in 1 … 5, found {severity!r}; change it.")
    dtype, shape = getattr(images, "dtype", type(images).__name__), tuple(getattr(images, "shape", ()))
    if not isinstance(images, np.ndarray) or dtype != np.uint8 or len(shape) != 4 or shape[1] != 3:
        raise LabError(f"images must be a uint8 array (N, 3, H, W), found {dtype} {shape}; convert them.")
    corruption = CORRUPTIONS[name]
    parameter = corruption.parameters[SEVERITIES.index(severity)]
    spoilt, threads = np.empty_like(images), torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower with single images
    try:
        bar = progress(len(images), f"{name} {severity}", unit="image")
        with bar, torch.random.fork_rng(devices=[]):
            for position, image in enumerate(images):
                digest = hashlib.sha256(f"{seed} {name} ".encode() + image.tobytes()).digest()
                # torch.manual_seed also prepares kinds of device that are not there: a hundred times as long
                torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
                # Draws go through memory in its order, so it must be that of the pixels.
                pixels = torch.from_numpy(np.ascontiguousarray(image))[None] / 255  # (1, 3, H, W)
                x = corruption.apply(pixels, parameter)
                spoilt[position] = (x[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
                bar.update()
    finally:
        torch.set_num_threads(threads)
    return spoilt
