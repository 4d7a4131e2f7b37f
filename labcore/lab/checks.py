"""What would stop a training late, or a stage after it, found before anything is trained."""

import shutil
from collections.abc import Collection

import numpy as np
import torch

from labcore import LabError
from labcore.config import Recipe
from labcore.images.transforms import augment
from labcore.run import Run
from labcore.train import Loop
from labcore.training.distributed import World

OTHER_BYTES = 20_000_000  # executed notebooks, figures, report


def check_recipes(run: Run, stages: Collection[str]) -> None:
    """Raise LabError where the images or the network do not fit the recipe of a stage; it names the option.

    That is where a batch is larger than an epoch, where processes cannot share it, where one image would be
    all that BatchNorm sees, where the split or a transform needs more images or larger ones.
    """
    count, processes = len(run.split.train), max(1, run.profile.processes)
    for stage in stages:
        recipe: Recipe = getattr(run.profile, stage)
        if not World(size=processes).can_share(recipe):
            raise LabError(
                f"{stage}.batch_size must give each of {processes} processes as many images, an even number "
                f"if they are mixed in pairs, found {recipe.batch_size}; change it, or processes."
            )
        if stage == "qat" and recipe.ema_decay:  # the observers are not imported here: FP32 has none
            raise LabError("qat.ema_decay must be 0 for QAT: an average of ranges is no range; change it.")
        try:
            Loop(run.model(), recipe, count)
            few = torch.from_numpy(run.data.train_images[run.split.train[:2]])
            augment(few, recipe.augment, np.random.default_rng(0))
        except LabError as error:
            raise LabError(f"{stage}.{error}") from None
        _check_batchnorm(run, stage, recipe, recipe.batch_size // processes)


def _check_batchnorm(run: Run, stage: str, recipe: Recipe, batch: int) -> None:
    """Raise LabError where a part of a batch leaves BatchNorm one value per channel, which it refuses."""
    part = min(recipe.micro_batch or batch, batch)
    if 1 not in (part, batch % part):
        return
    network, size = run.model().to("meta").train(), run.profile.image_size  # shapes without numbers
    for epoch in (0, recipe.epochs - 1):
        is_small = epoch < recipe.small_share * recipe.epochs
        side = max(1, round(recipe.small_size * size)) if is_small else size
        try:
            network(torch.zeros(1, 3, side, side, device="meta"))
        except ValueError:
            option = "micro_batch" if recipe.micro_batch else "batch_size"
            raise LabError(
                f"{stage}.{option}={getattr(recipe, option)} leaves one image alone, of whose {side}x{side} "
                f"pixels {run.profile.arch} makes one: BatchNorm needs more; change it, or image_size."
            ) from None


def needed_bytes(run: Run, stages: Collection[str]) -> int:
    """Return about how many bytes the training of these stages and the report write.

    A checkpoint holds the weights, the best ones, momentum and an average of the weights, where there is one.
    The newest, the one before and the one being written are there at a time. Six int8 files follow.
    """
    weights = 4 * sum(value.numel() for value in run.model().state_dict().values())
    recipes = [getattr(run.profile, stage) for stage in stages]
    checkpoints = sum(min(recipe.epochs, 3) * (3 + bool(recipe.ema_decay)) for recipe in recipes)
    logits = 4 * len(run.data.test_labels) * (4 * len(run.data.classes) + 8)
    return round((checkpoints + 1 + 6 / 4) * weights) + logits + OTHER_BYTES


def space(run: Run, stages: Collection[str]) -> str:
    """Return in words what will be written and what is free; LabError where that is plainly too little."""
    run.folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in run.folder.glob("*/*.*"))  # of a run that goes on
    needed, free = needed_bytes(run, stages), shutil.disk_usage(run.folder).free
    if needed - there > free:
        raise LabError(
            f"the run will write about {_size(needed)} to {run.folder}, where {_size(free)} are free: "
            "free some, or let runs be a link to a larger disk."
        )
    return f"the run will write about {_size(needed)} ({_size(free)} are free)"


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
