"""Images per second: augmentation of whole batches against torchvision's transforms of single images in a
DataLoader.

Prints one Markdown table. Run it from the repository on an idle machine: python
docs/benchmarks/input_pipeline.py

Ours runs in the main process with all threads, torchvision's in `--workers` processes of one thread, both
on the CPU. torchvision gets its images twice, as PIL images, as its CIFAR-10 data set gives them, and as
tensors. All three end with shuffled batches of normalised floats. Every round times all three, in an
order that turns; a ratio is taken within a round.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from labcore.config import PROFILES, Augment
from labcore.files.provenance import cpu_name, versions
from labcore.images.transforms import MEAN, STD, augment

SIDE = 32
REFERENCE = PROFILES["reference"].fp32.augment


def torchvisions(before: list, after: list) -> v2.Compose:
    """Crop and flip, transforms of bytes, normalisation, transforms of floats."""
    return v2.Compose(
        [
            v2.RandomCrop(SIDE, padding=4),
            v2.RandomHorizontalFlip(),
            *before,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            *after,
        ]
    )


# The same transforms, once as ours and once as torchvision's, whose erasing never reaches over the border.
RECIPES = {
    "crop, flip": (Augment(), torchvisions([], [])),
    "crop, flip, cutout 16": (
        Augment(cutout=16),
        torchvisions([], [v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))]),
    ),
    "the reference's": (
        REFERENCE,
        torchvisions(
            [
                v2.ColorJitter(REFERENCE.brightness, REFERENCE.contrast, REFERENCE.saturation, REFERENCE.hue),
                v2.RandomRotation(REFERENCE.rotation_degrees),
                v2.RandomAffine(
                    0,
                    translate=(REFERENCE.translate, REFERENCE.translate),
                    scale=(REFERENCE.scale_min, REFERENCE.scale_max),
                ),
            ],
            [v2.RandomErasing(REFERENCE.erasing_prob, REFERENCE.erasing_scale, REFERENCE.erasing_ratio)],
        ),
    ),
    "crop, flip, TrivialAugment": (Augment(policy="trivial"), torchvisions([v2.TrivialAugmentWide()], [])),
}


class Images(Dataset):
    """Images one by one, each through the transform."""

    def __init__(self, images: list, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def ours(images: Tensor, config: Augment, batch_size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """One epoch of batches, as labcore.train makes them."""
    for index in torch.from_numpy(rng.permutation(len(images))).split(batch_size):
        yield augment(images[index], config, rng)


def per_second(batches: Iterator[Tensor]) -> float:
    """Images per second of one epoch."""
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch)
    return seen / (time.perf_counter() - start)


def measure(images: Tensor, name: str, rounds: int, batch_size: int, workers: int) -> np.ndarray:
    """Return (rounds, 3): images/s of ours, of torchvision on PIL images and on tensors."""
    config, transform = RECIPES[name]
    loaders = [
        DataLoader(
            Images(form, transform), batch_size, shuffle=True, num_workers=workers, persistent_workers=True
        )
        for form in ([v2.functional.to_pil_image(image) for image in images], list(images))
    ]
    rng = np.random.default_rng(0)
    makers = [lambda: ours(images, config, batch_size, rng), *(loader.__iter__ for loader in loaders)]
    found = np.zeros((rounds + 1, len(makers)))
    for turn in range(rounds + 1):
        for which in np.roll(range(len(makers)), turn):
            found[turn, which] = per_second(makers[which]())
    return found[1:]  # the first round starts the workers and fills caches


def spread(values: np.ndarray, form: str) -> str:
    """Return median and quartiles as text."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{form}} ({low:{form}} … {high:{form}})"


def at_least(low: int) -> Callable[[str], int]:
    """Return the reader of a whole number that is not below `low`."""

    def whole_number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, found {text}")
        return int(text)

    return whole_number


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python docs/benchmarks/input_pipeline.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=at_least(1), default=9, help="timed rounds of each recipe")
    parser.add_argument("--images", type=at_least(1), default=2048, help="images per epoch")
    parser.add_argument("--batch-size", type=at_least(1), default=128)
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes of each DataLoader")
    args = parser.parse_args()
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (args.images, 3, SIDE, SIDE), dtype=np.uint8)
    )
    print("| recipe | ours | torchvision, PIL | torchvision, tensors | ours / PIL | ours / tensors |")
    print("|:---|---:|---:|---:|---:|---:|")
    for name in RECIPES:
        found = measure(images, name, args.rounds, args.batch_size, args.workers)
        speeds = [spread(column, ",.0f") for column in found.T]
        ratios = [spread(found[:, 0] / found[:, other], ".2f") for other in (1, 2)]
        print(f"| {' | '.join([name, *speeds, *ratios])} |", flush=True)
    packages = versions()
    used = ", ".join(f"{name} {packages[name]}" for name in ("python", "torch", "torchvision", "numpy"))
    print(
        f"\nImages per second, median (quartiles) of {args.rounds} interleaved rounds of {args.images:,} "
        f"images of {SIDE} x {SIDE}, batches of {args.batch_size}. {cpu_name()}, {os.cpu_count()} cores; "
        f"ours: {torch.get_num_threads()} threads, torchvision: {args.workers} workers. {used}."
    )


if __name__ == "__main__":
    main()
