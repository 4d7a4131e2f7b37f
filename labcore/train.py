"""Training, FP32 and QAT alike: one update, one epoch, one training that can be resumed.

All randomness of an epoch follows from (seed, epoch). A killed training starts its unfinished epoch again
and ends with the same weights as one never killed; on a CPU with as many threads and processes, to the bit.
"""

import copy
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import FakeQuantizeBase, disable_observer

from labcore import LabError
from labcore.config import Recipe
from labcore.data import ImageData, Split, evenly_spaced
from labcore.files.artifacts import sha256_json, write_text
from labcore.files.code import modules_hash
from labcore.files.progress import progress
from labcore.files.provenance import provenance, today, versions
from labcore.files.tensors import state_hash
from labcore.images.transforms import augment, mix, normalize
from labcore.training.checkpoint import Checkpoints, differences
from labcore.training.device import (
    autocast,
    autocast_dtype,
    device,
    forward_of,
    in_parts,
    is_fake_quantized,
    say_if_not_compiled,
)
from labcore.training.distributed import PartOfBatch, current_world, from_first, same_buffers, sum_of_all
from labcore.training.optim import Average, build_optimizers, learning_rate

# What every training runs, and what QAT runs besides.
MODULES = ("train", "training.device", "training.distributed", "training.optim")
MODULES += ("images.transforms", "images.policy", "images.pixels", "model")
QAT_MODULES = ("observer", "quantizers.learned", "quantizers.least_error", "qconfig", "quantize")


class Diverged(LabError):
    """The loss or the weights are no longer finite."""

    def __init__(self, what: str, saved_epoch: int):
        kept = f" The checkpoint of epoch {saved_epoch} is kept." if saved_epoch else ""
        super().__init__(f"{what}; lower lr or set clip_norm.{kept}")


class Loop:
    """What the updates of one training share. Raises LabError for a recipe that does not fit."""

    def __init__(self, model: nn.Module, recipe: Recipe, train_images: int):
        self.model, self.recipe, self.world = model, recipe, current_world()
        images, batch = min(train_images, recipe.epoch_images or train_images), recipe.batch_size
        if batch > images:
            raise LabError(f"batch_size can be at most the epoch's {images} images, found {batch}; lower it.")
        if not self.world.can_share(recipe):
            raise LabError(
                f"batch_size must give each of {self.world.size} processes as many images, an even number if "
                f"they are mixed in pairs, found {batch}; change batch_size or the number of processes."
            )
        if recipe.ema_decay and is_fake_quantized(model):
            raise LabError("ema_decay must be 0 for QAT: an average of ranges is no range; change it.")
        self.steps = images // batch  # per epoch
        self.optimizers = build_optimizers(model, recipe)
        self.average = Average(model, recipe.ema_decay) if recipe.ema_decay else None
        self.forward = forward_of(model)
        self.images_at_a_time = min(recipe.micro_batch or batch, batch // self.world.size)
        self.is_frozen = False
        self.saved_epoch = 0  # of the newest checkpoint; 0 without one

    @property
    def scored(self) -> nn.Module:
        """Return the network that is scored and kept: the average of the weights, where there is one."""
        return self.average.model if self.average else self.model

    def freeze(self) -> None:
        """Freeze the network; processes then exchange the gradients that are left."""
        if not self.is_frozen:
            freeze(self.model)
            self.forward, self.is_frozen = forward_of(self.model), True

    def state(self) -> dict:
        """Return all that later updates depend on."""
        return {
            "model": self.model.state_dict(),
            "average": self.average and self.average.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "images_at_a_time": self.images_at_a_time,
        }

    def load(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.world.size == 1:  # what memory forced once need not be tried again
            self.images_at_a_time = min(self.images_at_a_time, state["images_at_a_time"])


def freeze(model: nn.Module) -> None:
    """Stop ranges, observed or learned, and BatchNorm statistics: the weights settle on the final grid."""
    model.apply(disable_observer)
    model.apply(freeze_bn_stats)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            module.requires_grad_(False)


def update(
    loop: Loop, images: Tensor, labels: Tensor, rng: np.random.Generator | PartOfBatch, side: int = 0
) -> tuple[Tensor, Tensor]:
    """Update the weights once. Return the summed loss and the number of hits on these images.

    `images` are this process's part of a batch, uint8 (B, 3, H, W); the network sees them with `side` pixels
    to a side where that is not 0. Of a mixed image, a hit is the label of the larger share.
    """
    recipe = loop.recipe
    x = augment(images, recipe.augment, rng)  # (B, 3, H, W), normalised
    if recipe.mixes:
        x, partner, share = mix(x, recipe, rng)
        partner_labels = labels[partner]  # (B,)
    if side:
        x = F.interpolate(x, size=side, mode="bilinear", antialias=True)

    def backward(rows: slice) -> tuple[Tensor, Tensor]:
        with autocast(loop.model):
            logits = loop.forward(x[rows]).float()  # (rows, classes)
        entropy = partial(F.cross_entropy, logits, label_smoothing=recipe.label_smoothing, reduction="none")
        losses, targets = entropy(labels[rows]), labels[rows]  # (rows,)
        if recipe.mixes:
            losses = share[rows] * losses + (1 - share[rows]) * entropy(partner_labels[rows])
            targets = torch.where(share[rows] >= 0.5, targets, partner_labels[rows])
        (losses.sum() / len(x)).backward()
        return losses.detach().sum(), (logits.argmax(1) == targets).sum()

    loss, hits, loop.images_at_a_time = in_parts(backward, loop.forward, len(x), loop.images_at_a_time)
    if recipe.clip_norm:
        nn.utils.clip_grad_norm_(loop.model.parameters(), recipe.clip_norm)
    for optimizer in loop.optimizers:
        optimizer.step()
    return loss, hits


def run_epoch(
    loop: Loop, images: Tensor, labels: Tensor, train: Tensor, seed: int, epoch: int, tick: Callable
) -> tuple[float, float]:
    """Train one epoch on the images of index `train`; order and draws follow from (seed, epoch).

    Return mean loss and accuracy, of augmented images and a network that was changing. Raise Diverged where
    the loss is no longer finite.
    """
    recipe, steps = loop.recipe, loop.steps
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))
    order = train[torch.from_numpy(rng.permutation(len(train))).to(train.device)]
    part = PartOfBatch(rng, recipe.batch_size, loop.world)
    is_small = epoch < recipe.small_share * recipe.epochs
    side = max(1, round(recipe.small_size * images.shape[-1])) if is_small else 0
    losses, hits = torch.zeros(steps, device=train.device), torch.zeros(steps, device=train.device)
    loop.model.train()
    for batch in range(steps):
        step = epoch * steps + batch
        if step >= round(recipe.freeze_at * recipe.epochs * steps):
            loop.freeze()
        rate = learning_rate(recipe, step, steps)
        for optimizer in loop.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (group["initial_lr"] / recipe.lr)
        index = order[batch * recipe.batch_size :][part.rows]
        losses[batch], hits[batch] = update(loop, images[index], labels[index], part, side)
        if loop.average:
            loop.average.update(step)
        tick()
    say_if_not_compiled(loop.forward)
    if bad := torch.nonzero(~sum_of_all(losses).isfinite()).flatten().tolist():
        rate = learning_rate(recipe, epoch * steps + bad[0], steps)
        where = f"in epoch {epoch + 1} at step {bad[0] + 1} of {steps}, learning rate {rate:.4g}"
        raise Diverged(f"the training loss is no longer finite {where}", loop.saved_epoch)
    seen = steps * recipe.batch_size
    return losses.sum().item() / seen, sum_of_all(hits).sum().item() / seen


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy (a fraction) in eval mode; several processes share the images.

    Both come from sums over images, never from means of batches.
    """
    # A copy: scoring must not widen the ranges that QAT learns from training images.
    model, world = copy.deepcopy(model).eval().apply(disable_observer), current_world()
    count, images, labels = len(images), images[world.rank :: world.size], labels[world.rank :: world.size]
    sums = torch.zeros(2, dtype=torch.float64)
    with autocast(model), torch.backends.cudnn.flags(True, allow_tf32=False):
        for x, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(normalize(x)).float()  # (B, classes)
            sums[0] += F.cross_entropy(logits, target, reduction="sum").item()
            sums[1] += (logits.argmax(1) == target).sum().item()
    loss, hits = sum_of_all(sums.to(images.device)).tolist()
    return loss / count, hits / count


def training_identity(recipe: Recipe, data: ImageData, split: Split, seed: int, model: nn.Module) -> dict:
    """Return what decides the weights, as JSON values."""
    modules = (*MODULES, *QAT_MODULES) if is_fake_quantized(model) else MODULES
    return {
        "recipe": asdict(recipe),
        "data": data.sha256[:16],
        "split": split.training_sha256[:16],
        "seed": seed,
        "first weights": state_hash(model.state_dict())[:16],
        "network": sha256_json(str(model))[:16],
        "code": modules_hash(*modules)[:16],
        "torch": versions()["torch"],
        "device": device().type,
        "autocast dtype": str(autocast_dtype(model)),
    }


def n_judges(recipe: Recipe, split: Split) -> int:
    """Return how many validation images judge an epoch: at most as many as it trains on."""
    return min(len(split.validation), recipe.epoch_images or len(split.train))


def finished(
    model: nn.Module, recipe: Recipe, data: ImageData, split: Split, seed: int, folder: Path
) -> bool:
    """Return whether `fit` would only load the result."""
    state = Checkpoints(folder, training_identity(recipe, data, split, seed, model)).load()
    return state is not None and len(state["rows"]) == recipe.epochs


@dataclass(frozen=True)
class Result:
    """The network in eval mode with the weights of the best epoch, and one row of history per epoch.

    The best is that of the best validation accuracy, in QAT among the epochs that ended frozen. Each epoch
    was judged on `n_judges` validation images, and on as many training images. `made` says on which day the
    training finished, and has its provenance; it is that of the run that trained, not of one that loads.
    """

    model: nn.Module
    history: pd.DataFrame
    best_epoch: int
    state: dict[str, Tensor]
    n_judges: int
    made: dict


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
    """Train a copy of `model`, or go on where a killed training of the same identity stopped.

    Every epoch writes history.csv into `folder`, and a checkpoint unless that is slow (`Checkpoints.due`). A
    finished training is loaded, not repeated. Several processes all call this; the first reads and writes.
    `model` is an FP32 network, or one prepared for QAT; `batch_size` counts only while scoring.

    Raises:
        Diverged: loss or weights are no longer finite; the last good checkpoint stays.
        LabError: the recipe does not fit, or one image is too much for the memory.
    """
    identity = training_identity(recipe, data, split, seed, model)
    if unlike := differences(from_first(lambda: identity), identity):
        raise LabError(
            f"process {current_world().rank} differs from process 0: {'; '.join(unlike[:3])}; "
            "use the same code, data, versions and kind of processor."
        )
    model = copy.deepcopy(model).to(device(), memory_format=torch.channels_last)
    judging = [evenly_spaced(p, n_judges(recipe, split)) for p in (split.validation, split.train_sample)]
    arrays = data.train_images, data.train_labels, split.train, *judging
    images, labels, train, validation, clean = (torch.from_numpy(array).to(device()) for array in arrays)
    loop, checkpoints = Loop(model, recipe, len(train)), Checkpoints(folder, identity)
    rows, best, made = [], None, None
    if state := from_first(checkpoints.load):
        loop.load(state)
        rows, best, made = state["rows"], state["best"], state["made"]
        loop.saved_epoch = len(rows)
    with progress(recipe.epochs * loop.steps, description, "batch", disable=loop.world.rank > 0) as bar:
        bar.update(len(rows) * loop.steps)
        for epoch in range(len(rows), recipe.epochs):
            began = time.perf_counter()
            train_loss, train_acc = run_epoch(loop, images, labels, train, seed, epoch, bar.update)
            train_seconds = time.perf_counter() - began
            same_buffers(loop.model)
            same_buffers(loop.scored)
            val_loss, val_acc = score(loop.scored, images[validation], labels[validation], batch_size)
            # Training images scored like validation images: the gap is overfitting, not augmentation.
            clean_loss, clean_acc = score(loop.scored, images[clean], labels[clean], batch_size)
            rate = learning_rate(recipe, (epoch + 1) * loop.steps - 1, loop.steps)
            finite = all(value.isfinite().all() for value in loop.model.parameters())
            if not (finite and np.isfinite(val_loss)):
                when = f"after epoch {epoch + 1}, learning rate {rate:.4g}"
                raise Diverged(f"the weights are no longer finite {when}", loop.saved_epoch)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "lr": rate,
                    "train_loss": train_loss,
                    "train_acc": train_acc,
                    "train_clean_loss": clean_loss,
                    "train_clean_acc": clean_acc,
                    "val_loss": val_loss,
                    "val_acc": val_acc,
                    "train_seconds": train_seconds,
                }
            )
            # A frozen epoch goes before any other: only it was trained on the grid that is deployed.
            if best is None or (loop.is_frozen, val_acc) > (best["is_frozen"], best["val_acc"]):
                weights = {name: value.cpu().clone() for name, value in loop.scored.state_dict().items()}
                best = {"epoch": epoch + 1, "model": weights, "is_frozen": loop.is_frozen, "val_acc": val_acc}
            bar.set_postfix_str(f"epoch {epoch + 1}/{recipe.epochs} val {val_acc:.2%}")
            # from_first: where the first process cannot write, all say so instead of waiting for it.
            from_first(partial(write_text, folder / "history.csv", _history(rows)))
            if epoch + 1 == recipe.epochs:
                numbers = str(autocast_dtype(loop.model)).removeprefix("torch.")
                made = {"finished": today(), "provenance": provenance() | {"training_numbers": numbers}}
            if made or from_first(checkpoints.due):
                state = loop.state() | {"rows": rows, "best": best, "made": made}
                from_first(partial(checkpoints.save, state))
                loop.saved_epoch = epoch + 1
    from_first(partial(write_text, folder / "history.csv", _history(rows)))  # another's may lie there
    model.load_state_dict(best["model"])
    if is_fake_quantized(model):
        freeze(model)  # what follows only scores it
    history = pd.read_csv(io.StringIO(_history(rows)))  # as anyone will read it
    return Result(model.eval(), history, best["epoch"], best["model"], len(validation), made)


def _history(rows: list[dict]) -> str:
    return pd.DataFrame(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n")
