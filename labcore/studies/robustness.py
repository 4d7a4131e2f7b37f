"""Corrupted test images, and what quantization costs on them.

The four groups and the five severities are those of Hendrycks and Dietterich (2019), "Benchmarking neural network
robustness to common corruptions and perturbations". Operations are torchvision's, kornia's, Pillow's and torch's own; they
are not the authors' code, so numbers do not compare digit for digit with the published CIFAR-10-C.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import pandas as pd
import torch
from kornia.color import hsv_to_rgb, rgb_to_hsv
from kornia.contrib import diamond_square
from kornia.filters import motion_blur
from kornia.geometry.transform import scale
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from labcore import LabError, nearest
from labcore.evaluate import predict
from labcore.files.artifacts import UNREADABLE, read_npz, sha256_file, write_npz
from labcore.files.code import modules_hash
from labcore.files.progress import progress
from labcore.stats import compare_paired, mean_over_images
from labcore.studies.study import Cell, Study

SEVERITIES = (1, 2, 3, 4, 5)
IMAGES = 1_000  # test images that are corrupted, evenly spaced


@dataclass(frozen=True)
class Corruption:
    """One way to spoil an image.

    Args:
        group: "noise", "blur", "weather" or "digital".
        apply: (image, parameter) -> image, float (1, 3, H, W) in 0 … 1; what leaves that range is clipped afterwards. Random
            draws come from torch's global generator, which `corrupt` seeds for every image.
        parameters: of the severities 1 … 5.
        meaning: what the parameter says.
        source: where the parameters come from. Those in pixels are meant for 32×32 images.
    """

    group: str
    apply: Callable[[Tensor, float | tuple], Tensor]
    parameters: tuple
    meaning: str
    source: str


def _impulse_noise(x: Tensor, amount: float) -> Tensor:
    return K.RandomSaltAndPepperNoise(amount=amount, salt_vs_pepper=0.5, p=1)(x)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    side = min(
        2 * round(4 * sigma) + 1, 2 * min(x.shape[2:]) - 1
    )  # four sigma on each side, and no more than there is
    return F.gaussian_blur(x, [side, side], [sigma, sigma])


def _motion_blur(x: Tensor, length: int) -> Tensor:
    angle, forward = torch.empty(1).uniform_(-45, 45), torch.ones(1)
    return motion_blur(x, length, angle, forward, border_type="replicate", mode="bilinear")


def _zoom_blur(x: Tensor, largest: float) -> Tensor:
    factors = torch.arange(1, largest + 0.005, 0.01)
    return scale(x.expand(len(factors), -1, -1, -1), factors).mean(0, keepdim=True)


def _fog(x: Tensor, parameter: tuple[float, float]) -> Tensor:
    amount, decay = parameter
    plasma = diamond_square((1, 1, *x.shape[2:]), roughness=1 / decay, normalize_range=(0, 1))
    return (x + amount * plasma) * x.max() / (x.max() + amount)


def _rain(x: Tensor, drops: int) -> Tensor:
    return K.RandomRain((drops, drops), drop_height=(5, 7), drop_width=(-3, 3), p=1)(x)


def _brightness(x: Tensor, shift: float) -> Tensor:
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    return hsv_to_rgb(torch.stack([hue, saturation, (value + shift).clamp(max=1)], 1))


def _pixelate(x: Tensor, share: float) -> Tensor:
    picture, (height, width) = F.to_pil_image(x[0]), x.shape[2:]
    small = picture.resize((int(share * width), int(share * height)), Resampling.BOX)
    return F.to_image(small.resize((width, height), Resampling.BOX))[None] / 255


def _jpeg(x: Tensor, quality: int) -> Tensor:
    stream = io.BytesIO()
    F.to_pil_image(x[0]).save(stream, "JPEG", quality=quality)
    return F.to_image(Image.open(stream))[None] / 255


_AUTHORS = "Hendrycks and Dietterich's for CIFAR-10"
CORRUPTIONS = {
    "gaussian noise": Corruption(
        "noise",
        lambda x, sigma: F.gaussian_noise(x, sigma=sigma),
        (0.04, 0.06, 0.08, 0.09, 0.10),
        "standard deviation, white is 1",
        _AUTHORS,
    ),
    "shot noise": Corruption(
        "noise",
        lambda x, photons: torch.poisson(x * photons) / photons,
        (500, 250, 100, 75, 50),
        "photons that make white",
        _AUTHORS,
    ),
    "impulse noise": Corruption(
        "noise",
        _impulse_noise,
        (0.01, 0.02, 0.03, 0.05, 0.07),
        "share of pixels made black or white",
        f"{_AUTHORS}; theirs strikes each channel by itself",
    ),
    "gaussian blur": Corruption(
        "blur", _gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), "standard deviation in pixels", _AUTHORS
    ),
    "motion blur": Corruption(
        "blur",
        _motion_blur,
        (3, 5, 7, 9, 11),
        "length in pixels, fading out; the angle is drawn from -45° … 45°",
        "ours",
    ),
    "zoom blur": Corruption(
        "blur",
        _zoom_blur,
        (1.05, 1.10, 1.15, 1.20, 1.25),
        "largest of the zooms that are averaged, in steps of 0.01",
        _AUTHORS,
    ),
    "rain": Corruption("weather", _rain, (2, 4, 7, 11, 16), "drops, 5 to 7 pixels high", "ours"),
    "fog": Corruption(
        "weather",
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "thickness, and how fast its fractal gets smooth",
        f"{_AUTHORS}; the fractal is kornia's",
    ),
    "brightness": Corruption(
        "weather", _brightness, (0.05, 0.1, 0.15, 0.2, 0.3), "added to the value of HSV", _AUTHORS
    ),
    "contrast": Corruption(
        "digital",
        lambda x, factor: F.adjust_contrast(x, factor),
        (0.75, 0.5, 0.4, 0.3, 0.15),
        "share of the contrast that is left",
        f"{_AUTHORS}; torchvision's mean is that of grey values",
    ),
    "pixelate": Corruption(
        "digital", _pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), "share of the side that is kept", _AUTHORS
    ),
    "jpeg": Corruption(
        "digital",
        _jpeg,
        (80, 65, 58, 50, 40),
        "quality",
        _AUTHORS,
    ),
}
GROUPS = tuple(dict.fromkeys(corruption.group for corruption in CORRUPTIONS.values()))


def parameters_table() -> pd.DataFrame:
    """The corruptions as a table: index corruption; columns group, parameter, severities "1" … "5", source."""
    rows = {
        name: {"group": one.group, "parameter": one.meaning}
        | {str(severity): value for severity, value in zip(SEVERITIES, one.parameters, strict=True)}
        | {"source": one.source}
        for name, one in CORRUPTIONS.items()
    }
    return pd.DataFrame(rows).T


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread, since single images are too small for more, and torch's generator given back as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def corrupt(images: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Images spoilt by one corruption at one severity.

    What is drawn for an image follows from the seed, the corruption and the image's own bytes: neither its neighbours nor its
    place matter, and the severities of one image share their draws.

    Args:
        images: uint8 (N, 3, H, W).
        name: of CORRUPTIONS.
        severity: 1 … 5.

    Returns:
        uint8 (N, 3, H, W), rounded to nearest.

    Raises:
        LabError: an unknown corruption (with the nearest name), another severity, other images.
    """
    if name not in CORRUPTIONS:
        raise LabError(f"unknown corruption {name!r}: {nearest(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise LabError(f"severity must be a whole number in 1 … 5, found {severity!r}; change it.")
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:2] != (3,)
        or images.ndim != 4
    ):
        found = f"{getattr(images, 'dtype', type(images).__name__)} {getattr(images, 'shape', '')}".strip()
        raise LabError(f"images must be a uint8 array (N, 3, H, W), found {found}; convert them.")
    corruption = CORRUPTIONS[name]
    parameter = corruption.parameters[SEVERITIES.index(severity)]
    spoilt = np.empty_like(images)
    with progress(len(images), f"{name} {severity}", unit="image") as bar, _alone():
        for position, image in enumerate(images):
            digest = hashlib.sha256(f"{seed} {name} ".encode() + image.tobytes()).digest()
            # torch.manual_seed also notes down, to seed it later, every kind of device that is not there: a hundred times as long
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
            x = corruption.apply(torch.from_numpy(image)[None] / 255, parameter)  # (1, 3, H, W)
            spoilt[position] = (x[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            bar.update()
    return spoilt


def evenly_spaced(count: int, wanted: int = IMAGES) -> np.ndarray:
    """Positions of `wanted` of `count` images, evenly spaced, the first and the last among them; all where there are fewer."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def answers(study: Study, networks: dict[str, nn.Module], images: np.ndarray) -> pd.DataFrame:
    """What networks answer on clean and on corrupted images; cells that are known are read.

    Args:
        study: of the stage "robustness"; its run's seed decides the corruptions' draws.
        networks: by stage, as loaded from the run.
        images: uint8 (N, 3, H, W).

    Returns:
        Columns corruption ("clean" or of CORRUPTIONS), severity (0 where clean, else 1 … 5), one per network: predicted
        classes, int64 (N,).
    """
    seed, run = study.run.seed, study.run
    files = {"fp32": "weights.pt"}  # all others are int8.pt
    weights = {name: sha256_file(run.path(name, files.get(name, "int8.pt"))) for name in networks}
    fixed = {
        "corruption seed": seed,
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "corruptions": modules_hash("studies.robustness"),
        "versions": [metadata.version(name) for name in ("torchvision", "kornia", "pillow")],
    }

    @lru_cache(maxsize=1)  # three networks see the same images
    def spoilt(name: str, severity: int) -> np.ndarray:
        return corrupt(images, name, severity, seed) if severity else images

    def cell(name: str, severity: int, network: str) -> Cell:
        def compute() -> dict:
            title = f"{network}, {name} {severity}".removesuffix(" 0")
            found = predict(networks[network], spoilt(name, severity), run.profile.eval_batch_size, title)
            return {"answers": found.argmax(1).tolist()}

        return Cell(fixed | {"robustness": [name, severity, network, weights[network]]}, compute)

    kinds = [("clean", 0), *((name, severity) for name in CORRUPTIONS for severity in SEVERITIES)]
    todo = {(*kind, network): cell(*kind, network) for kind in kinds for network in networks}
    found = study.cells(todo, "corruptions")["answers"]
    rows = [
        {"corruption": name, "severity": severity}
        | {network: np.array(found[name, severity, network]) for network in networks}
        for name, severity in kinds
    ]
    return pd.DataFrame(rows)


def save_answers(path: Path, found: pd.DataFrame, labels: np.ndarray) -> None:
    """Write what `answers` found, with the labels: from there every number of the study follows."""
    networks = found.columns.drop(["corruption", "severity"])
    write_npz(
        path,
        labels=labels,
        corruption=found["corruption"].to_numpy().astype(str),
        severity=found["severity"].to_numpy(),
        **{name: np.stack(list(found[name])).astype(np.int16) for name in networks},
    )


def load_answers(path: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """(answers, labels) as `save_answers` took them; LabError where the file is missing or damaged."""
    try:
        stored = read_npz(path)
        labels = stored.pop("labels")
        columns = {name: list(values) if values.ndim > 1 else values for name, values in stored.items()}
        return pd.DataFrame(columns), labels
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run notebook 10 again.") from None


def cell_table(found: pd.DataFrame, labels: np.ndarray, classes: int) -> pd.DataFrame:
    """One row per corruption and severity: the accuracies, and what each quantized network loses against FP32.

    Args:
        found: from `answers`, with columns fp32, ptq and qat; labels: int64 (N,).

    Returns:
        Columns group ("clean" for the first row), corruption, severity, acc_fp32, acc_ptq, acc_qat (fractions), and for
        ptq and qat drop_pp_<network>, drop_pp_low_<network>, drop_pp_high_<network>, p_value_<network>
        (see `compare_paired`; positive is worse).
    """
    sure, rows = np.eye(classes), []  # an answer as logits
    for row in found.to_dict("records"):
        name = row["corruption"]
        values = {"group": CORRUPTIONS[name].group if name in CORRUPTIONS else "clean"}
        values |= {"corruption": name, "severity": row["severity"]}
        values |= {
            f"acc_{network}": float((row[network] == labels).mean()) for network in ("fp32", "ptq", "qat")
        }
        for network in ("ptq", "qat"):
            paired = compare_paired(sure[row["fp32"]], sure[row[network]], labels)
            values |= {
                f"drop_pp{end}_{network}": paired[f"acc_drop_pp{end}"] for end in ("", "_low", "_high")
            }
            values[f"p_value_{network}"] = paired["p_value"]
        rows.append(values)
    return pd.DataFrame(rows)


def corruption_cost(found: pd.DataFrame, labels: np.ndarray, network: str) -> dict:
    """What a quantized network loses on clean images and on corrupted ones, and the difference of the two.

    The same images are in every cell, so images are what is sampled, not cells. With d_i the mean over the corrupted cells of
    100 (FP32 right - network right) on image i, and c_i the same on the clean image, the three are the means of c_i, d_i
    and d_i - c_i, each with its t interval over i.

    Args:
        found: from `answers`, its clean row among them; labels: int64 (N,); network: "ptq" or "qat".

    Returns:
        fp32_acc, acc (fractions; means over the corrupted cells); clean_drop_pp, corrupted_drop_pp, extra_drop_pp, each
        {"mean", "low", "high"}; positive is worse.
    """
    clean = (found["corruption"] == "clean").to_numpy()
    before, after = (np.stack(list(found[name])) == labels for name in ("fp32", network))  # (cells, N)
    lost_pp = 100.0 * (before.astype(float) - after)
    on_clean, on_corrupted = lost_pp[clean].mean(0), lost_pp[~clean].mean(0)  # (N,)
    return {
        "fp32_acc": float(before[~clean].mean()),
        "acc": float(after[~clean].mean()),
        "clean_drop_pp": mean_over_images(on_clean),
        "corrupted_drop_pp": mean_over_images(on_corrupted),
        "extra_drop_pp": mean_over_images(on_corrupted - on_clean),
    }


def severity_table(found: pd.DataFrame, labels: np.ndarray) -> pd.DataFrame:
    """Per group and severity, clean images being severity 0 of every group: accuracies and drops with t intervals.

    Args:
        found: from `answers`; labels: int64 (N,).

    Returns:
        Columns group, severity, network ("fp32", "ptq", "qat"), acc (fraction), and drop_pp, drop_pp_low, drop_pp_high over
        images, which are 0 for FP32 itself.
    """
    rows = []
    groups = found["corruption"].map(lambda name: CORRUPTIONS[name].group if name in CORRUPTIONS else "clean")
    for group in GROUPS:
        for severity in (0, *SEVERITIES):
            cells = found[groups.isin([group, "clean"]) & (found["severity"] == severity)]
            right = {name: np.stack(list(cells[name])) == labels for name in ("fp32", "ptq", "qat")}
            for network, hits in right.items():
                drop = mean_over_images(100.0 * (right["fp32"].astype(float) - hits).mean(0))
                rows.append(
                    {"group": group, "severity": severity, "network": network, "acc": float(hits.mean())}
                    | {"drop_pp": drop["mean"], "drop_pp_low": drop["low"], "drop_pp_high": drop["high"]}
                )
    return pd.DataFrame(rows)


def verdict(cost: dict) -> str:
    """The answer in words, from `corruption_cost`."""
    extra = cost["extra_drop_pp"]
    if extra["low"] > 0:
        return "costs more on corrupted images than on clean ones"
    if extra["high"] < 0:
        return "costs less on corrupted images than on clean ones"
    return "shows no difference in cost between corrupted and clean images"


def lost_images(before: np.ndarray, after: np.ndarray, labels: np.ndarray, count: int = 24) -> pd.DataFrame:
    """Images that the first network gets right and the second wrong, those of which the first was surest coming first.

    Args:
        before, after: logits (N, classes); labels: int64 (N,); count: at most so many.

    Returns:
        Columns image (position), true, before, after (classes), margin_before, margin_after: the largest logit minus
        the second largest. Sorted by margin_before, downwards; ties by position.
    """
    found = pd.DataFrame({"image": np.arange(len(labels)), "true": labels})
    for name, logits in (("before", before), ("after", after)):
        second, first = np.partition(logits, -2, axis=1)[:, -2:].T
        found[name], found[f"margin_{name}"] = logits.argmax(1), (first - second).astype(float)
    found = found[(found["before"] == found["true"]) & (found["after"] != found["true"])]
    found = found.sort_values("margin_before", ascending=False, kind="stable").head(count)
    columns = ["image", "true", "before", "after", "margin_before", "margin_after"]
    return found[columns].reset_index(drop=True)
