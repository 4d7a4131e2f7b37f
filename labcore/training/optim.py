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
    """Return the learning rate of a step, counted from 0: lr_min + (lr - lr_min) (1 + cos(pi t)) / 2.

    "cosine": after lr (step + 1) / warm-up steps, t goes from 0 to 1 over all other steps.
    "warm_restarts": t goes from 0 to 1 within every cycle (SGDR, equation 5).
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
    """Return SGD, and Adam for logarithms of thresholds, whose gradients have no scale (TQT, section 5.2).

    Learned scales get no weight decay, which would pull them to zero. Each group keeps its highest rate as
    torch's schedulers do, in "initial_lr".
    """
    scales, log_scales = [], []
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            for name, parameter in module.named_parameters(recurse=False):
                (log_scales if name.startswith("log2_") else scales).append(parameter)
    biases = [module.bias for module in model.modules() if isinstance(module, _BatchNorm)]
    apart = {id(parameter) for parameter in [*scales, *log_scales, *biases]}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    lr, decay = recipe.lr, recipe.weight_decay
    faster = {"params": biases, "lr": lr * recipe.bias_lr, "weight_decay": decay / recipe.bias_lr}
    groups = [{"params": weights}, faster]
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0})
    optimizers = [torch.optim.SGD(groups, lr, recipe.momentum, 0, decay, nesterov=recipe.momentum > 0)]
    if log_scales:
        optimizers.append(torch.optim.Adam(log_scales, lr=recipe.scale_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class Average:
    """The exponential moving average of weights and BatchNorm statistics, as a network of its own.

    After step t (from 0): average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)), so that
    the first weights are soon forgotten (Polyak and Juditsky, 1992; the ramp is TensorFlow's).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        # state_dict's tensors share their memory with the networks: found once, they stay right.
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, without waiting for the device."""
        averages, weights = zip(*self._floats, strict=True)
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(averages), list(weights), 0)
        for kept, newest in self._counts:
            kept.copy_(newest)
