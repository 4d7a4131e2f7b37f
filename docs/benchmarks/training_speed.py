"""Training speed: our loop against a plain PyTorch loop, and both against what the device can multiply.

Prints one Markdown table. Run it from the repository on an idle machine: python
docs/benchmarks/training_speed.py

Ours is labcore.train: images on the device, augmented there in whole batches, bfloat16 where the device
multiplies it, channels_last, compiled on a GPU. Plain is float32 with images transformed one by one by
torchvision in a DataLoader. Each round times both, in an order that turns, and the device's matrix rates
beside them; ratios are taken within a round.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from input_pipeline import SIDE, Images, at_least, spread, torchvisions
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from labcore.config import PROFILES, Profile
from labcore.files.provenance import cpu_name, versions
from labcore.model import build_model
from labcore.train import Loop, run_epoch
from labcore.training.device import device, multiplies_bfloat16


def synchronized(call: Callable[[], object]) -> float:
    """Seconds that a call takes, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(dtype: torch.dtype, size: int) -> float:
    """Operations per second (two per multiply-add) of the product of two square matrices."""
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    a @ b
    return 3 * 2 * size**3 / synchronized(lambda: [a @ b for _ in range(3)])


def operations_per_image(model: nn.Module) -> int:
    """Operations (two per multiply-add) of one image, forwards and backwards, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, SIDE, SIDE, device=device())).sum().backward()
    return counter.get_total_flops() // 2


@torch.backends.cudnn.flags(True, allow_tf32=False)
def plain_loop(model: nn.Module, batches: Iterator, lr: float) -> None:
    """Train as a textbook writes it: float32 (no TF32), SGD, one batch after the other."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for x, y in batches:
        loss = F.cross_entropy(model(x.to(device())), y.to(device()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Labelled(Images):
    """Images through their transform, with a label."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index), index % 10


def measure(profile: Profile, images: Tensor, rounds: int, workers: int, size: int) -> dict[str, np.ndarray]:
    """One value per round: images per second of both loops, and matrix rates in bfloat16 and float32."""
    same = replace(profile.fp32.augment, crop_padding=4, padding_mode="constant")  # as torchvisions() crops
    recipe = replace(profile.fp32, small_share=0.0, augment=same)  # images of the same size in both loops
    policy = [v2.TrivialAugmentWide()] if recipe.augment.policy == "trivial" else []
    networks = [build_model(profile.arch, 10, profile.width, profile.stem).to(device()) for _ in range(2)]
    ours = networks[0].to(memory_format=torch.channels_last)
    loop = Loop(ours, recipe, len(images))
    labels = torch.arange(len(images)) % 10
    placed, order = (images.to(device()), labels.to(device())), torch.arange(len(images), device=device())
    loader = DataLoader(
        Labelled([v2.functional.to_pil_image(image) for image in images], torchvisions(policy, [])),
        recipe.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
    )
    loops = {
        "ours": lambda: run_epoch(loop, *placed, order, 0, 0, lambda: None),
        "plain": lambda: plain_loop(networks[1].train(), loader, recipe.lr),
    }
    seen, found = loop.steps * recipe.batch_size, []
    for turn in range(rounds + 1):  # the first round compiles, and starts the workers
        row = {}
        for name in np.roll(list(loops), turn):
            row[str(name)] = seen / synchronized(loops[name])
        row |= {str(dtype): matrix_rate(dtype, size) for dtype in (torch.bfloat16, torch.float32)}
        found.append(row)
    return {name: np.array([row[name] for row in found[1:]]) for name in found[0]}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python docs/benchmarks/training_speed.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="resnet50" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="timed rounds")
    parser.add_argument("--batches", type=at_least(1), default=8, help="batches per round")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes of the DataLoader")
    parser.add_argument("--matrix", type=at_least(64), default=8192 if torch.cuda.is_available() else 2048)
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    count = args.batches * profile.fp32.batch_size
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)
    )
    found = measure(profile, images, args.rounds, args.workers, args.matrix)
    work = operations_per_image(build_model(profile.arch, 10, profile.width, profile.stem).to(device()))
    print("| loop | numbers | images per second | share of the matrix rate of these numbers |")
    print("|:---|:---|---:|---:|")
    for name, dtype in (
        ("ours", torch.bfloat16 if multiplies_bfloat16() else torch.float32),
        ("plain", torch.float32),
    ):
        share = spread(found[name] * work / found[str(dtype)], ".1%")
        print(f"| {name} | {str(dtype)[6:]} | {spread(found[name], ',.0f')} | {share} |")
    packages = versions()
    used = ", ".join(f"{name} {packages[name]}" for name in ("python", "torch", "torchvision", "numpy"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    print(
        f"\nOurs to plain: {spread(found['ours'] / found['plain'], '.2f')}. Median (quartiles) of "
        f"{args.rounds} interleaved rounds of {args.batches} batches of {profile.fp32.batch_size}; "
        f"profile {profile.name}, {work / 1e9:.2f} GFLOP per image. "
        f"Matrices of {args.matrix}: bfloat16 {spread(found[str(torch.bfloat16)] / 1e9, ',.0f')}, float32 "
        f"{spread(found[str(torch.float32)] / 1e9, ',.0f')} GFLOP/s. {where}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {args.workers} workers. {used}."
    )


if __name__ == "__main__":
    main()
