"""One training loop for FP32 and QAT, in one process or several: history per epoch, best epoch by validation, resume.

All randomness of an epoch follows from (seed, epoch). A killed run therefore starts its unfinished epoch again and ends
with the same weights as a run that was never killed; on CPU with the same number of threads and processes, to the bit.
"""

import contextlib
import copy
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from labcore import LabError
from labcore.config import Recipe
from labcore.data import ImageData, Split
from labcore.files.artifacts import sha256_json, write_text
from labcore.files.code import modules_hash
from labcore.files.progress import progress
from labcore.files.provenance import versions
from labcore.files.tensors import state_hash
from labcore.images.transforms import normalize
from labcore.training.checkpoint import differences, load_checkpoint, save_checkpoint
from labcore.training.distributed import current_world, from_first, same_buffers, sum_over_processes
from labcore.training.optim import learning_rate
from labcore.training.steps import (
    Diverged,
    Loop,
    autocast,
    autocast_dtype,
    device,
    freeze,
    is_fake_quantized,
    new_loop,
    run_epoch,
)

# What every training runs.
MODULES = (
    "train",
    "training.steps",
    "training.optim",
    "training.distributed",
    "images.transforms",
    "images.policy",
    "images.pixels",
    "model",
)


@dataclass(frozen=True)
class Result:
    """What training leaves behind: the network in eval mode with the weights of the best epoch, and one row per epoch."""

    model: nn.Module
    history: pd.DataFrame
    best_epoch: int
    state: dict[str, Tensor]


@contextlib.contextmanager
def observers_paused(model: nn.Module):
    """Scoring must not widen the ranges that QAT learned from training images."""
    flags = [
        flag
        for module in model.modules()
        if isinstance(module, FakeQuantizeBase)
        # torch's learnable fake quantization calls its flag by another name
        for flag in [getattr(module, "static_enabled", module.observer_enabled)]
    ]
    before = [flag.clone() for flag in flags]
    for flag in flags:
        flag.zero_()
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.copy_(value)


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a fraction) in eval mode; sums over images, never means of batches.

    Several processes share the images.
    """
    world = current_world()
    count, images, labels = len(images), images[world.rank :: world.size], labels[world.rank :: world.size]
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    # Where it is float32, it is no TF32.
    exact = torch.backends.cudnn.flags(True, allow_tf32=False)
    with observers_paused(model), autocast(model), exact:
        for start in range(0, len(images), batch_size):
            target = labels[start : start + batch_size]
            logits = model(normalize(images[start : start + batch_size])).float()  # (B, classes)
            sums[0] += F.cross_entropy(logits, target, reduction="sum").item()
            sums[1] += (logits.argmax(1) == target).sum().item()
    model.train(training)
    loss, correct = sum_over_processes(sums.to(images.device)).tolist()
    return loss / count, correct / count


def training_identity(
    recipe: Recipe, data: ImageData, split: Split, seed: int, model: nn.Module
) -> dict[str, object]:
    """What decides the weights: recipe, images, split, seed, first weights, code, torch, kind of device and of the numbers it
    multiplies; as JSON values.
    """
    modules = MODULES
    if is_fake_quantized(model):
        modules += ("observer", "quantizers.learned", "qconfig", "quantize")
    return {
        "recipe": asdict(recipe),
        "data": data.sha256[:16],
        "split": split.sha256[:16],
        "seed": seed,
        "first weights": state_hash(model.state_dict())[:16],
        "network": sha256_json(str(model))[:16],
        "code": modules_hash(*modules)[:16],
        "torch": versions()["torch"],
        "device": device().type,
        "autocast dtype": str(autocast_dtype(model)),
    }


def finished(
    model: nn.Module, recipe: Recipe, data: ImageData, split: Split, seed: int, folder: Path
) -> bool:
    """Whether `fit` would only load the result."""
    state = load_checkpoint(folder, training_identity(recipe, data, split, seed, model))
    return state is not None and len(state["rows"]) == recipe.epochs


def fit(
    model: nn.Module,
    recipe: Recipe,
    data: ImageData,
    split: Split,
    seed: int,
    folder: Path,
    batch_size: int = 64,
    description: str = "train",
) -> Result:
    """Train a copy of `model`, or go on where a killed run of the same kind stopped.

    Writes `history.csv` into `folder` after every epoch, and a checkpoint where that takes less than a quarter of a second. A
    slower one waits until training took ten times as long since the last one: a large network on a GPU has short epochs, and
    would spend much of them on writing. A finished run is loaded, not repeated. In a process group, every process calls this
    with the same arguments; the first one reads and writes the files.

    Args:
        model: an FP32 network, or one prepared for QAT (then ranges and BatchNorm freeze at recipe.freeze_at).
        batch_size: images at a time while scoring.

    Raises:
        Diverged: the loss is no longer finite; the last good checkpoint stays.
        LabError: too few images for one batch, a batch that the processes cannot share, or too little memory for one image.
    """
    place = device()
    description_of_run = training_identity(recipe, data, split, seed, model)
    _check_the_same(description_of_run)
    model = copy.deepcopy(model).to(place, memory_format=torch.channels_last)
    images, labels = (
        torch.from_numpy(data.train_images).to(place),
        torch.from_numpy(data.train_labels).to(place),
    )
    train, validation = torch.from_numpy(split.train).to(place), torch.from_numpy(split.validation).to(place)
    # Training images scored like validation images: the gap between the two curves is overfitting, not augmentation.
    clean = torch.from_numpy(split.train_sample).to(place)
    loop = new_loop(model, recipe, len(train))
    start, rows, best = _resume(loop, from_first(partial(load_checkpoint, folder, description_of_run)))
    saved_at, saving = time.perf_counter(), 0.0
    shown = progress(recipe.epochs * loop.steps, description, unit="batch", disable=not loop.world.is_first)
    with shown as bar:
        bar.update(start * loop.steps)
        for epoch in range(start, recipe.epochs):
            began = time.perf_counter()
            mean_loss, acc = run_epoch(loop, images, labels, train, seed, epoch, bar.update)
            train_seconds = time.perf_counter() - began
            same_buffers(loop.model)
            if loop.average:
                same_buffers(loop.average.model)
            val_loss, val_acc = score(loop.scored, images[validation], labels[validation], batch_size)
            clean_loss, clean_acc = score(loop.scored, images[clean], labels[clean], batch_size)
            _check_finite(loop, val_loss, epoch)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "lr": learning_rate(recipe, (epoch + 1) * loop.steps - 1, loop.steps),
                    "train_loss": mean_loss,
                    "train_acc": acc,
                    "train_clean_loss": clean_loss,
                    "train_clean_acc": clean_acc,
                    "val_loss": val_loss,
                    "val_acc": val_acc,
                    "train_seconds": train_seconds,
                }
            )
            if best is None or val_acc > rows[best["epoch"] - 1]["val_acc"]:
                best = {"epoch": epoch + 1, "model": _on_host(loop.scored)}
            bar.set_postfix_str(f"epoch {epoch + 1}/{recipe.epochs} val {val_acc:.2%}")
            # from_first: where the first process cannot write, all say so instead of waiting for it
            from_first(partial(_write_history, folder, rows))
            last, began = epoch + 1 == recipe.epochs, time.perf_counter()
            if from_first(lambda: last or saving < 0.25 or began - saved_at >= 10 * saving):
                from_first(partial(_save, folder, description_of_run, loop, rows, best))
                loop.saved, saved_at = epoch + 1, time.perf_counter()
                saving = saved_at - began
    from_first(
        partial(_write_history, folder, rows)
    )  # where training was loaded, another run's may lie there
    model.load_state_dict(best["model"])
    if is_fake_quantized(model):
        freeze(model)  # what follows only scores it
    model.eval()
    return Result(model, pd.DataFrame(rows), best["epoch"], best["model"])


def _on_host(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _check_the_same(description: dict) -> None:
    """LabError where this process trains something else than the first one: other images, another commit."""
    found = differences(from_first(lambda: description), description)
    if found:
        raise LabError(
            f"process {current_world().rank} differs from process 0: {'; '.join(found[:3])}; "
            "use the same code, data, versions and kind of processor."
        )


def _check_finite(loop: Loop, loss: float, epoch: int) -> None:
    """Diverged where the last update of an epoch spoilt the weights, so that they are never saved."""
    if not (math.isfinite(loss) and all(torch.isfinite(value).all() for value in loop.model.parameters())):
        rate = learning_rate(loop.recipe, (epoch + 1) * loop.steps - 1, loop.steps)
        raise Diverged(
            f"the weights are no longer finite after epoch {epoch + 1}, learning rate {rate:.4g}", loop.saved
        )


def _write_history(folder: Path, rows: list[dict]) -> None:
    write_text(
        folder / "history.csv",
        pd.DataFrame(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n"),
    )


def _save(folder: Path, description: dict, loop: Loop, rows: list[dict], best: dict) -> None:
    state = {
        "about": description,
        "model": loop.model.state_dict(),
        "average": loop.average.model.state_dict() if loop.average else None,
        "optimizers": [optimizer.state_dict() for optimizer in loop.optimizers],
        "micro": loop.micro,
        "rows": rows,
        "best": best,
    }
    save_checkpoint(folder, state)


def _resume(loop: Loop, state: dict | None) -> tuple[int, list[dict], dict | None]:
    """(epochs done, their rows, the best one) from a checkpoint, whose state goes into the loop; (0, [], None) without one."""
    if state is None:
        return 0, [], None
    loop.model.load_state_dict(state["model"])
    if loop.average:
        loop.average.model.load_state_dict(state["average"])
    for optimizer, saved in zip(loop.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if loop.world.size == 1:  # what memory forced once need not be tried again
        loop.micro = min(loop.micro, state["micro"])
    loop.saved = len(state["rows"])
    return len(state["rows"]), state["rows"], state["best"]
