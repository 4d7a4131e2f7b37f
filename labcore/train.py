"""One training loop for FP32 and QAT: history per epoch, best epoch by validation, checkpoint and resume.

All randomness of an epoch follows from (seed, epoch). A killed run therefore starts its unfinished epoch again and ends
with the same weights as a run that was never killed; on CPU with the same number of threads, to the bit.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import FakeQuantizeBase, FusedMovingAvgObsFakeQuantize, disable_observer

from labcore import LabError
from labcore.artifacts import modules_hash, sha256_json, versions, write_text
from labcore.checkpoint import load_tensors, save_tensors, state_hash
from labcore.config import Recipe
from labcore.data import ImageData, Split
from labcore.progress import progress
from labcore.transforms import augment, mix, normalize


@dataclass(frozen=True)
class Result:
    """What training leaves behind: the network in eval mode with the weights of the best epoch, and one row per epoch."""

    model: nn.Module
    history: pd.DataFrame
    best_epoch: int
    state: dict[str, Tensor]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(model: nn.Module) -> contextlib.AbstractContextManager:
    """bfloat16 where the processor multiplies it natively (a GPU, AVX512-BF16, AMX); float32 elsewhere.

    QAT trains so too: bfloat16 holds every integer up to 256, so the products of 8-bit codes lose nothing on their way in. It
    is scored in float32, since it then predicts what the int8 kernels compute. torch's fused fake quantization, which its
    default configurations have, takes float32 only.
    """
    kind = device().type
    if is_fake_quantized(model) and not model.training:
        return contextlib.nullcontext()
    if any(isinstance(module, FusedMovingAvgObsFakeQuantize) for module in model.modules()):
        return contextlib.nullcontext()
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.autocast(kind, torch.bfloat16, enabled=native)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0.

    cosine:        lr (step + 1) / warm-up steps, then lr_min + (lr - lr_min) (1 + cos(pi t)) / 2 with t from 0 to 1
    warm_restarts: the same half cosine in every cycle, t from 0 to 1 within it (SGDR, equation 5)
    """
    if recipe.schedule == "cosine":
        total = recipe.epochs * steps_per_epoch
        warmup = round(recipe.warmup * total)
        if step < warmup:
            return recipe.lr * (step + 1) / warmup
        position = (step - warmup) / max(1, total - warmup)
    else:
        epoch, length = step / steps_per_epoch, recipe.restart_epochs
        while epoch >= length:
            epoch, length = epoch - length, length * recipe.restart_mult
        position = epoch / length
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * position)) / 2


def is_fake_quantized(model: nn.Module) -> bool:
    """Whether the network was prepared for QAT."""
    return any(isinstance(module, FakeQuantizeBase) for module in model.modules())


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
    """(mean cross-entropy, accuracy as a fraction) in eval mode; sums over images, never means of batches."""
    training = model.training
    model.eval()
    loss = correct = 0.0
    with observers_paused(model), autocast(model):
        for start in range(0, len(images), batch_size):
            target = labels[start : start + batch_size]
            logits = model(normalize(images[start : start + batch_size])).float()  # (B, classes)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            correct += (logits.argmax(1) == target).sum().item()
    model.train(training)
    return loss / len(images), correct / len(images)


def recipe_key(
    recipe: Recipe, data: ImageData, split: Split, seed: int, model: nn.Module, quantized: bool
) -> str:
    """A hash of what decides the weights: recipe, images, split, seed, first weights, code, torch, kind of device."""
    modules = ("train", "transforms", "model") + (("observer", "qconfig", "quantize") if quantized else ())
    return sha256_json(
        {
            "recipe": asdict(recipe),
            "data": data.sha256,
            "split": split.sha256,
            "seed": seed,
            "first": state_hash(model.state_dict()),
            "network": str(model),
            "code": modules_hash(*modules),
            "torch": versions()["torch"],
            "device": device().type,
        }
    )


def freeze(model: nn.Module) -> None:
    """Late in QAT: ranges, learned or observed, and BatchNorm statistics stop moving; the weights settle on the final grid."""
    model.apply(disable_observer)
    model.apply(freeze_bn_stats)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            module.requires_grad_(False)


def fit(
    model: nn.Module,
    recipe: Recipe,
    data: ImageData,
    split: Split,
    seed: int,
    folder: Path,
    batch_size: int = 500,
    description: str = "train",
) -> Result:
    """Train a copy of `model`, or go on where a killed run of the same key stopped.

    Writes `checkpoint.pt` and `history.csv` into `folder` after every epoch. A finished run is loaded, not repeated.

    Args:
        model: an FP32 network, or one prepared for QAT (then ranges and BatchNorm freeze at recipe.freeze_at).
        batch_size: images at a time while scoring.

    Raises:
        LabError: the loss is no longer finite (the last good checkpoint stays), or too few images for one batch.
    """
    place = device()
    model = copy.deepcopy(model).to(place, memory_format=torch.channels_last)
    key = recipe_key(recipe, data, split, seed, model, is_fake_quantized(model))
    images, labels = (
        torch.from_numpy(data.train_images).to(place),
        torch.from_numpy(data.train_labels).to(place),
    )
    train, validation = torch.from_numpy(split.train).to(place), torch.from_numpy(split.validation).to(place)
    # Training images scored like validation images: the gap between the two curves is overfitting, not augmentation.
    clean = train[torch.linspace(0, len(train) - 1, min(len(train), len(validation))).long()]
    steps = min(len(train), recipe.epoch_images or len(train)) // recipe.batch_size
    if steps == 0:
        raise LabError(
            f"batch_size must be at most the {len(train)} training images, found {recipe.batch_size}; lower it."
        )
    optimizers = _optimizers(model, recipe)
    start, rows, best = _resume(folder / "checkpoint.pt", key, model, optimizers)
    with progress(recipe.epochs * steps, description, unit="batch") as bar:
        bar.update(start * steps)
        for epoch in range(start, recipe.epochs):
            began = time.perf_counter()
            mean_loss, acc = _epoch(
                model, optimizers, recipe, images, labels, train, seed, epoch, steps, bar.update
            )
            train_seconds = time.perf_counter() - began
            val_loss, val_acc = score(model, images[validation], labels[validation], batch_size)
            clean_loss, clean_acc = score(model, images[clean], labels[clean], batch_size)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "lr": learning_rate(recipe, (epoch + 1) * steps - 1, steps),
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
                best = {
                    "epoch": epoch + 1,
                    "model": {
                        name: value.detach().cpu().clone() for name, value in model.state_dict().items()
                    },
                }
            bar.set_postfix_str(f"epoch {epoch + 1}/{recipe.epochs} val {val_acc:.2%}")
            _save(folder, key, model, optimizers, rows, best)
    model.load_state_dict(best["model"])
    if is_fake_quantized(model):
        freeze(model)  # what follows only scores it
    model.eval()
    return Result(model, pd.DataFrame(rows), best["epoch"], best["model"])


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD for the network; Adam for logarithms of thresholds, whose gradients have no scale (TQT, section 5.2 and appendix B).

    Weight decay would pull learned scales to zero, so they get none.
    """
    scales = {
        id(parameter): name
        for module in model.modules()
        if isinstance(module, FakeQuantizeBase)
        for name, parameter in module.named_parameters(recurse=False)
    }
    logs = [p for p in model.parameters() if scales.get(id(p), "").startswith("log2_")]
    linear = [p for p in model.parameters() if id(p) in scales and not scales[id(p)].startswith("log2_")]
    groups = [{"params": [p for p in model.parameters() if id(p) not in scales]}]
    if linear:
        groups.append({"params": linear, "weight_decay": 0.0})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(
            groups,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
    ]
    if logs:
        optimizers.append(torch.optim.Adam(logs, lr=recipe.scale_lr))
    return optimizers


def _epoch(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    train: Tensor,
    seed: int,
    epoch: int,
    steps: int,
    tick: Callable[[], object],
) -> tuple[float, float]:
    """One epoch in an order and with draws that follow from (seed, epoch). Returns mean loss and accuracy of the loop itself."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))
    order = train[torch.from_numpy(rng.permutation(len(train))).to(train.device)]
    total_loss, correct = torch.zeros((), device=train.device), torch.zeros((), device=train.device)
    freeze_step = round(recipe.freeze_at * recipe.epochs * steps)
    model.train()
    if epoch * steps > freeze_step:
        freeze(model)
    for batch in range(steps):
        step = epoch * steps + batch
        if step == freeze_step:
            freeze(model)
        rate = learning_rate(recipe, step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (optimizer.defaults["lr"] / recipe.lr)
        index = order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
        loss, hits = _step(model, optimizers, recipe, images[index], labels[index], rng)
        total_loss += loss
        correct += hits
        tick()
    seen = steps * recipe.batch_size
    mean_loss = total_loss.item() / seen  # waits for the device
    if not math.isfinite(mean_loss):
        raise LabError(
            f"the training loss is no longer finite in epoch {epoch + 1} at learning rate {rate:.4g}; "
            "lower lr or set clip_norm. The checkpoint of the epoch before is kept."
        )
    return mean_loss, correct.item() / seen


def _step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """One update. Returns the summed loss and the number of hits, on the device. With mixing, a hit is the larger share's label."""
    x = augment(images, recipe.augment, rng)  # (B, 3, H, W)
    share = partner = None
    if recipe.mixup_prob or recipe.cutmix_prob:
        x, partner, share = mix(x, recipe, rng)
    with autocast(model):
        logits = model(x)
    logits = logits.float()  # (B, classes)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="none")  # (B,)
    target = labels
    if share is not None:
        other = F.cross_entropy(
            logits, labels[partner], label_smoothing=recipe.label_smoothing, reduction="none"
        )
        loss = share * loss + (1 - share) * other
        target = torch.where(share >= 0.5, labels, labels[partner])
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.mean().backward()
    if recipe.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach().sum(), (logits.argmax(1) == target).sum()


def _save(
    folder: Path,
    key: str,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rows: list[dict],
    best: dict,
) -> None:
    write_text(
        folder / "history.csv",
        pd.DataFrame(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n"),
    )
    state = {
        "key": key,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rows": rows,
        "best": best,
    }
    save_tensors(folder / "checkpoint.pt", state)


def _resume(
    path: Path, key: str, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, list[dict], dict | None]:
    """(epochs done, their rows, the best one) from a checkpoint of the same key; (0, [], None) without one.

    A checkpoint of another recipe, seed or data set belongs to a run that is now being replaced.
    """
    if not path.exists():
        return 0, [], None
    try:
        state = load_tensors(path)
        if state["key"] != key:
            return 0, [], None
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return len(state["rows"]), state["rows"], state["best"]
    except (LabError, KeyError, TypeError, ValueError) as error:
        print(f"note: {path.name} cannot be used ({error}); training starts again.")
        return 0, [], None
