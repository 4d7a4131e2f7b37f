"""The steps of training: one update, one epoch, and what they share, in one process or several."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import FakeQuantizeBase, FusedMovingAvgObsFakeQuantize, disable_observer
from torch.nn.parallel import DistributedDataParallel

from labcore import LabError
from labcore.config import Recipe
from labcore.files.provenance import cpu_name
from labcore.images.transforms import augment, mix
from labcore.training.distributed import PartOfBatch, World, current_world, sum_over_processes
from labcore.training.optim import Average, build_optimizers, learning_rate


class Diverged(LabError):
    """The loss or the weights are no longer finite; says where, and what is kept of the epochs before."""

    def __init__(self, what: str, saved: int):
        kept = f" The checkpoint of epoch {saved} is kept." if saved else ""
        super().__init__(f"{what}; lower lr or set clip_norm.{kept}")


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 faster than float32: a GPU, or a CPU with AMX, or with AVX512-BF16 if it is AMD's.

    Intel's cores have one unit for AVX512-BF16 and two for float32, which does as many products; with the conversions a
    training step then takes longer (benchmarks/README.md). The rule looks at the processor's name, since a rule by stopwatch
    would not give the same numbers every time.
    """
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    amx, avx = (
        getattr(torch.cpu, probe, bool)() for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return amx or avx and "Intel" not in cpu_name()


def autocast(model: nn.Module) -> contextlib.AbstractContextManager:
    """bfloat16 where the device multiplies it natively; float32 elsewhere.

    QAT trains so too: bfloat16 holds every integer up to 256, so the products of 8-bit codes lose nothing on their way in. It
    is scored in float32, since it then predicts what the int8 kernels compute. torch's fused fake quantization, which its
    default configurations have, takes float32 only.
    """
    if is_fake_quantized(model) and not model.training:
        return contextlib.nullcontext()
    return torch.autocast(device().type, torch.bfloat16, enabled=autocast_dtype(model) is torch.bfloat16)


def autocast_dtype(model: nn.Module) -> torch.dtype:
    """Return torch.bfloat16 or torch.float32: what the products of a training step on this device are made of."""
    fused = any(isinstance(module, FusedMovingAvgObsFakeQuantize) for module in model.modules())
    return torch.bfloat16 if multiplies_bfloat16() and not fused else torch.float32


def is_fake_quantized(model: nn.Module) -> bool:
    """Whether the network was prepared for QAT."""
    return any(isinstance(module, FakeQuantizeBase) for module in model.modules())


def freeze(model: nn.Module) -> None:
    """Late in QAT: ranges, learned or observed, and BatchNorm statistics stop moving; the weights settle on the final grid."""
    model.apply(disable_observer)
    model.apply(freeze_bn_stats)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            module.requires_grad_(False)


@dataclass
class Loop:
    """What the updates of one training share."""

    model: nn.Module  # the network itself, whose state is saved
    recipe: Recipe
    steps: int  # per epoch
    world: World
    micro: int  # images at a time; gradients add up to those of the whole batch
    optimizers: list[torch.optim.Optimizer]
    average: Average | None
    forward: Callable[[Tensor], Tensor]  # perhaps compiled, perhaps in DistributedDataParallel
    frozen: bool = False
    saved: int = 0  # epochs that the newest checkpoint holds; 0 without one
    side: int = 0  # images are resized to so many pixels; 0 leaves them as they are

    @property
    def scored(self) -> nn.Module:
        """The network that is scored and chosen: the average of the weights, where there is one."""
        return self.average.model if self.average else self.model

    def freeze(self) -> None:
        """See `freeze`; DistributedDataParallel must learn which parameters are left."""
        if not self.frozen:
            freeze(self.model)
            self.forward, self.frozen = _forward(self.model, self.world), True


def _forward(model: nn.Module, world: World) -> Callable[[Tensor], Tensor]:
    if world.size > 1:
        places = [torch.cuda.current_device()] if device().type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=places)
    if _compiles(model):
        torch._dynamo.config.suppress_errors = True  # without a C compiler it trains uncompiled, and says so
        return torch.compile(model)
    return model


def _compiles(model: nn.Module) -> bool:
    return device().type == "cuda" and not is_fake_quantized(
        model
    )  # fake quantization has no graph to compile


@lru_cache
def say_if_not_compiled() -> None:
    """After a first epoch, once: torch itself only warns where it cannot compile, and a notebook's warnings are not kept."""
    if not torch._dynamo.utils.counters["frames"]["ok"]:
        print(
            "note: torch could not compile the network (is there a C compiler?); it trains uncompiled, and slower."
        )


def shares_evenly(recipe: Recipe, processes: int) -> bool:
    """Whether so many processes can have equal parts of a batch, whole pairs where images are mixed in pairs."""
    unit = processes * (2 if recipe.mixes and processes > 1 else 1)
    return recipe.batch_size % unit == 0


def new_loop(model: nn.Module, recipe: Recipe, train_images: int) -> Loop:
    """What the updates of a training share. Raises LabError for a batch larger than the data, or that cannot be shared."""
    world = current_world()
    available = min(train_images, recipe.epoch_images or train_images)
    steps = available // recipe.batch_size
    if steps == 0:
        raise LabError(
            f"batch_size must be at most the {available} training images of an epoch, found {recipe.batch_size}; lower it."
        )
    part = world.share(recipe.batch_size)
    if not shares_evenly(recipe, world.size):
        raise LabError(
            f"batch_size must give each of {world.size} processes an even number of images, which are mixed in pairs, "
            f"found {recipe.batch_size}; change batch_size or the number of processes."
        )
    average = None
    if recipe.ema_decay:
        if is_fake_quantized(model):
            raise LabError("ema_decay must be 0 for QAT: an average of ranges is no range; change it.")
        average = Average(model, recipe.ema_decay)
    return Loop(
        model,
        recipe,
        steps,
        world,
        min(recipe.micro_batch or recipe.batch_size, part.stop - part.start),
        build_optimizers(model, recipe),
        average,
        _forward(model, world),
    )


def run_epoch(
    loop: Loop,
    images: Tensor,
    labels: Tensor,
    train: Tensor,
    seed: int,
    epoch: int,
    tick: Callable[[], object],
) -> tuple[float, float]:
    """One epoch in an order and with draws that follow from (seed, epoch). Returns mean loss and accuracy of the loop itself."""
    recipe, steps = loop.recipe, loop.steps
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))
    order = train[torch.from_numpy(rng.permutation(len(train))).to(train.device)]
    own = loop.world.share(recipe.batch_size)
    drawn = PartOfBatch(rng, recipe.batch_size, loop.world)
    losses, correct = torch.zeros(steps, device=train.device), torch.zeros((), device=train.device)
    freeze_step = round(recipe.freeze_at * recipe.epochs * steps)
    loop.model.train()
    small = epoch < recipe.small_share * recipe.epochs
    loop.side = max(1, round(recipe.small_size * images.shape[-1])) if small else 0
    for batch in range(steps):
        step = epoch * steps + batch
        if step >= freeze_step:
            loop.freeze()
        rate = learning_rate(recipe, step, steps)
        for optimizer in loop.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (group["initial_lr"] / recipe.lr)
        index = order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size][own]
        loss, hits = update(loop, images[index], labels[index], drawn)
        if loop.average:
            loop.average.update(step)
        losses[batch] = loss
        correct += hits
        tick()
    sum_over_processes(losses), sum_over_processes(correct)  # waits for the device
    if loop.world.is_first and _compiles(loop.model):
        say_if_not_compiled()
    bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if bad:
        step = epoch * steps + bad[0]
        raise Diverged(
            f"the training loss is no longer finite in epoch {epoch + 1} at step {bad[0] + 1} of {steps}, learning rate "
            f"{learning_rate(recipe, step, steps):.4g}",
            loop.saved,
        )
    seen = steps * recipe.batch_size
    return losses.sum().item() / seen, correct.item() / seen


def update(
    loop: Loop, images: Tensor, labels: Tensor, rng: np.random.Generator | PartOfBatch
) -> tuple[Tensor, Tensor]:
    """One update from this process's part of a batch. Returns its summed loss and its number of hits, on the device.

    With mixing, a hit is the larger share's label. Where a GPU has too little memory, the batch goes through it in smaller
    parts from then on; BatchNorm statistics, and the ranges of QAT, have then seen some images of this batch twice.
    """
    recipe = loop.recipe
    x = augment(images, recipe.augment, rng)  # (B, 3, H, W)
    partner = share = None
    if recipe.mixes:
        x, partner, share = mix(x, recipe, rng)
        partner = labels[partner]
    if loop.side:
        x = F.interpolate(x, size=loop.side, mode="bilinear", antialias=True)
    micro = loop.micro
    while True:
        for optimizer in loop.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with _without_memory():
            loss, hits = _gradients(loop, x, labels, partner, share)
            break
        _halve(loop)  # after the error and what it held are gone
    if loop.micro < micro:
        print(
            f"note: out of GPU memory; going on with {loop.micro} images at a time and the same batch of "
            f"{recipe.batch_size}. BatchNorm averages over the smaller parts."
        )
    if recipe.clip_norm:
        nn.utils.clip_grad_norm_(loop.model.parameters(), recipe.clip_norm)
    for optimizer in loop.optimizers:
        optimizer.step()
    return loss, hits


def _gradients(
    loop: Loop, x: Tensor, labels: Tensor, partner: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add up the gradients of a batch's mean loss, `micro` images at a time; summed loss and hits.

    `partner` (B,) holds the labels of the images mixed in, `share` (B,) the own share of each.
    """
    total, hits = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    for start in range(0, len(x), loop.micro):
        rows = slice(start, start + loop.micro)
        last = start + loop.micro >= len(x)
        # DistributedDataParallel averages the gradients once per batch.
        wait = contextlib.nullcontext() if last or loop.world.size == 1 else loop.forward.no_sync()
        with wait:
            with autocast(loop.model):
                logits = loop.forward(x[rows])
            logits = logits.float()  # (B, classes)
            entropy = partial(
                F.cross_entropy, logits, label_smoothing=loop.recipe.label_smoothing, reduction="none"
            )
            loss, target = entropy(labels[rows]), labels[rows]  # (B,)
            if share is not None:
                own = share[rows]
                loss = own * loss + (1 - own) * entropy(partner[rows])
                target = torch.where(own >= 0.5, target, partner[rows])
            (loss.sum() / len(x)).backward()
        total += loss.detach().sum()
        hits += (logits.argmax(1) == target).sum()
    return total, hits


# What libraries of the GPU say where they find no memory for themselves; cuDNN tries all its ways first.
_NO_MEMORY = ("unable to find an engine", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def _without_memory():
    """Go on behind the block where the GPU has no memory left for it."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            text in str(error) for text in _NO_MEMORY
        ):
            raise


def _halve(loop: Loop) -> None:
    if loop.micro == 1:
        raise LabError("out of GPU memory with one image at a time; use a narrower network or a larger GPU.")
    if loop.world.size > 1:  # the others would not know
        raise LabError(f"out of GPU memory with {loop.micro} images at a time; set micro_batch below that.")
    loop.micro = math.ceil(loop.micro / 2)
    torch.cuda.empty_cache()
