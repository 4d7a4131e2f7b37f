"""What a run will take of disk and time: the time on this processor from a trial of a few seconds."""

import contextlib
import io
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch

from labcore.config import Recipe
from labcore.files.processes import end_with_parent
from labcore.lab.checks import check_recipes, space
from labcore.lab.parallel import first_model
from labcore.lab.stale import State
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.train import Loop, n_judges, score, training_identity, update
from labcore.training.checkpoint import Checkpoints


def estimate(state: State, stages: Collection[str]) -> str:
    """Return in words what the run will write, and how long training these stages will take.

    No time is told on GPUs, with several processes, where the trial fails, and where training is only loaded.
    Raises LabError for what would stop a training later, as `check_recipes`, `space` and `first_model` do.
    """
    run = Run(state.profile, state.source, state.seed, state.root, state.weights)
    check_recipes(run, stages)
    if run.weights and "fp32" in stages:
        first_model(run)
    words = space(run, stages)
    if torch.cuda.is_available() or state.profile.processes > 1:
        return words
    without_images = replace(run)
    # In a process of its own, whose memory goes back to the system.
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
    with pool, contextlib.suppress(BrokenProcessPool, RuntimeError, ValueError):
        seconds = {stage: pool.submit(seconds_of, without_images, stage).result() for stage in stages}
        seconds = {stage: value for stage, value in seconds.items() if value}
        if seconds:
            parts = ", ".join(f"{stage.upper()} {_duration(value)}" for stage, value in seconds.items())
            words += f"; training will take about {_duration(sum(seconds.values()))} here ({parts})"
    return words


def seconds_of(run: Run, stage: str) -> float:
    """Return how long a training will take, scoring included: of FP32 the epochs that are left."""
    recipe: Recipe = getattr(run.profile, stage)
    model, epochs = run.model(), recipe.epochs
    if stage == "qat":
        model = prepare_qat(model, CustomQConfig.POWER2.qat)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            identity = training_identity(recipe, run.data, run.split, run.seed, first_model(run))
            saved = Checkpoints(run.path(stage), identity).load()
        epochs -= len(saved["rows"]) if saved else 0
    if not epochs:
        return 0.0
    model = model.to(memory_format=torch.channels_last).train()
    loop, rng = Loop(model, recipe, len(run.split.train)), np.random.default_rng(0)
    batch = run.split.train[: recipe.batch_size]
    images, labels = (torch.from_numpy(a[batch]) for a in (run.data.train_images, run.data.train_labels))
    small = max(1, round(recipe.small_size * images.shape[-1]))
    n_small = min(epochs, max(0, int(np.ceil(recipe.small_share * recipe.epochs)) - (recipe.epochs - epochs)))
    steps = {0: epochs - n_small, small: n_small}
    seconds = {
        side: _seconds(lambda side=side: update(loop, images, labels, rng, side))
        for side, count in steps.items()
        if count
    }
    scoring = _seconds(lambda: score(model, images, labels, run.profile.eval_batch_size))
    training = sum(loop.steps * steps[side] * each for side, each in seconds.items())
    return training + epochs * scoring * 2 * n_judges(recipe, run.split) / len(batch)


def _seconds(call) -> float:
    """Return how long a call takes after one that does not count."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
