"""How weights move: learning-rate schedules, optimizers, and the moving average of weights."""

import copy
import math

import torch
from torch import nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from labcore.config import Recipe


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


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD for the network; Adam for logarithms of thresholds, whose gradients have no scale (TQT, section 5.2 and appendix B).

    Weight decay would pull learned scales to zero, so they get none. Each group keeps its highest rate as torch's schedulers
    do, in "initial_lr".
    """
    scales = {
        id(parameter): name
        for module in model.modules()
        if isinstance(module, FakeQuantizeBase)
        for name, parameter in module.named_parameters(recurse=False)
    }
    logs = [p for p in model.parameters() if scales.get(id(p), "").startswith("log2_")]
    linear = [p for p in model.parameters() if id(p) in scales and not scales[id(p)].startswith("log2_")]
    biases = [module.bias for module in model.modules() if isinstance(module, _BatchNorm)]
    apart = {*scales, *map(id, biases)}
    rate, decay = recipe.lr * recipe.bias_lr, recipe.weight_decay / recipe.bias_lr
    groups: list[dict] = [
        {"params": [p for p in model.parameters() if id(p) not in apart]},
        {"params": biases, "lr": rate, "weight_decay": decay},
    ]
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
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class Average:
    """The exponential moving average of a network's weights and BatchNorm statistics, as a network of its own.

    After step t (from 0): average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)), so that the first
    weights are soon forgotten (Polyak and Juditsky, 1992; the ramp is TensorFlow's ExponentialMovingAverage). The averaging
    itself is torch.optim.swa_utils'.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        # state_dict's tensors share their memory with the networks: found once, they stay right.
        self._moving = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; without waiting for the device."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(*map(list, zip(*self._moving, strict=True)), 0)
        for own, other in self._counts:
            own.copy_(other)
