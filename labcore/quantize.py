"""The four steps of eager-mode quantization: fuse, prepare, calibrate (or train), convert. Each works on a copy.

Reference: Krishnamoorthi (2018), "Quantizing deep convolutional networks for efficient inference"; torch.ao.quantization.
"""

import copy
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import FakeQuantizeBase, QConfig
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

from labcore import LabError, nearest
from labcore.files.progress import progress
from labcore.model import QuantizableResNet
from labcore.quantizers.learned import LearnedFakeQuantize


def _quiet(call, *args, **kwargs):
    """Torch announces on every call that this API will move to torchao; requirements.txt pins the version that has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.ao.quantization is deprecated.*")
        warnings.filterwarnings("ignore", message=".*quantized tensor.*")
        warnings.filterwarnings("ignore", message=".*reduce_range will be deprecated.*")
        warnings.filterwarnings("ignore", message=".*must run observer before calling calculate_qparams.*")
        return call(*args, **kwargs)


def fuse(model: QuantizableResNet, is_qat: bool = False) -> QuantizableResNet:
    """A fused copy: BatchNorm folded away (eval mode), or kept trainable inside the fused module for QAT (train mode)."""
    fused = copy.deepcopy(model).cpu()
    fused.fuse_model(is_qat)
    return fused.train(is_qat)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a network, in order, by the name of the module that is quantized as one.

    In a fused network that is the fused module ("layer1.0"), otherwise the layer itself.
    """
    found: dict[str, nn.Module] = {}
    fused: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(fused):
            continue
        if isinstance(module, nn.Conv2d | nn.Linear):
            found[name] = module  # those of QAT are convolutions that hold their BatchNorm
            fused += (name + ".",)
        elif isinstance(module, torch.ao.nn.intrinsic.modules.fused._FusedModule):
            found[name] = module[0]
            fused += (name + ".",)
    return found


class RoundedAverage(nn.Module):
    """Average pooling (B, C, H, W) -> (B, C, 1, 1) that rounds as its int8 kernel does: to the grid of its input.

    torch puts no fake quantization behind a pooling layer. For a maximum that is right, since it lies on the grid already. A mean
    does not, and with the coarse grid of a sum before it, training and simulation would count on digits that int8 has not.

    Args:
        pool: the pooling itself, which `convert` puts back.
        grid: the fake quantization of its input. It observes nothing here; a learned scale gets no gradient from here.
    """

    def __init__(self, pool: nn.AdaptiveAvgPool2d, grid: FakeQuantizeBase):
        super().__init__()
        self.pool = pool
        self._grid = (grid,)  # in a tuple: it belongs to another module, and is to be saved there alone

    def forward(self, x: Tensor) -> Tensor:
        """The mean of every channel, rounded where the grid's fake quantization is on."""
        x, (grid,) = self.pool(x), self._grid
        if grid.fake_quant_enabled[0] == 0:
            return x
        # tq.FakeQuantize keeps what it has just rounded with; its calculate_qparams would search for the scale once more.
        kept = isinstance(grid, tq.FakeQuantize)
        scale, zero_point = (grid.scale, grid.zero_point) if kept else grid.calculate_qparams()
        return torch.fake_quantize_per_tensor_affine(
            x, scale.detach(), zero_point.to(torch.int32), grid.quant_min, grid.quant_max
        )


def _round_average(prepared: nn.Module) -> nn.Module:
    """Let an average pool round in simulation, in place; `convert` takes this back."""
    if isinstance(prepared, QuantizableResNet) and isinstance(prepared.avgpool, nn.AdaptiveAvgPool2d):
        grid = prepared.layer4[-1].add_relu.activation_post_process
        if isinstance(grid, FakeQuantizeBase):
            prepared.avgpool = RoundedAverage(prepared.avgpool, grid)
    return prepared


def _set_qconfig(prepared: nn.Module, qconfig: QConfig, overrides: dict[str, QConfig] | None) -> None:
    prepared.qconfig = qconfig
    modules = dict(prepared.named_modules())
    for name, own in (overrides or {}).items():
        if name not in modules:
            raise LabError(f"unknown layer {name!r}: {nearest(name, layers(prepared))}")
        modules[name].qconfig = own


def prepare_ptq(
    model: nn.Module, qconfig: QConfig, overrides: dict[str, QConfig] | None = None, fused: bool = True
) -> nn.Module:
    """A fused copy in eval mode with an observer behind every quantized tensor.

    `overrides` gives layers (names as in `layers` of the fused network) a configuration of their own; `fused=False`
    leaves BatchNorm and ReLU as modules of their own, to see what fusing is worth.
    """
    prepared = fuse(model) if fused else copy.deepcopy(model).cpu().eval()
    _set_qconfig(prepared, qconfig, overrides)
    return _round_average(_quiet(tq.prepare, prepared, inplace=True))


def prepare_qat(
    model: nn.Module,
    qconfig: QConfig,
    overrides: dict[str, QConfig] | None = None,
    keep_batchnorm: bool = True,
) -> nn.Module:
    """A fused copy in train mode, BatchNorm kept, with fake quantization of weights and activations.

    `keep_batchnorm=False` folds BatchNorm away before, to see what keeping it is worth.
    """
    prepared = fuse(model, is_qat=True) if keep_batchnorm else fuse(model).train()
    _set_qconfig(prepared, qconfig, overrides)
    return _round_average(_quiet(tq.prepare_qat, prepared, inplace=True))


@torch.no_grad()
def calibrate(prepared: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Let the observers see normalised images, batches of shape (B, 3, H, W) in float32. In place.

    Fake quantization is off meanwhile, and on afterwards. Learned scales start from what was seen, and are free then.

    Raises LabError where an observer meets NaN or infinity, naming the layer.
    """
    prepared.eval()
    prepared.apply(tq.disable_fake_quant)
    for module in _learnable(prepared):
        module.enable_static_observation()
    hooks = [
        module.register_forward_pre_hook(partial(_refuse_not_finite, name))
        for name, module in prepared.named_modules()
        if isinstance(module, tq.ObserverBase)
    ]
    try:
        with progress(sum(map(len, batches)), "calibrate", unit="image") as bar:
            for batch in batches:
                prepared(batch)
                bar.update(len(batch))
    finally:
        for hook in hooks:
            hook.remove()
    prepared.apply(tq.enable_fake_quant)
    for module in prepared.modules():
        if isinstance(module, LearnedFakeQuantize):
            module.disable_observer()
    for module in _learnable(prepared):
        module.enable_param_learning()
    return prepared


def _learnable(model: nn.Module) -> list[_LearnableFakeQuantize]:
    return [module for module in model.modules() if isinstance(module, _LearnableFakeQuantize)]


def observer_of(watcher: nn.Module | None) -> nn.Module | None:
    """The observer itself, or the one inside fake quantization."""
    return watcher.activation_post_process if isinstance(watcher, FakeQuantizeBase) else watcher


@torch.no_grad()
def quantize_weight(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) that the layer's own configuration gives its weights; shape (1,) or (C,)."""
    watcher = observer_of(layer.qconfig.weight().to(layer.weight.device))
    watcher(layer.weight)
    return watcher.calculate_qparams()


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """dequantize(quantize(weight)); scale (1,) per tensor, or (C,) for the channels of axis 0."""
    scale, zero_point = scale.expand(len(weight)).contiguous(), zero_point.expand(len(weight)).to(torch.int32)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, zero_point.contiguous(), 0, quant_min, quant_max
    )


@torch.no_grad()
def simulate(calibrated: nn.Module, only: set[str] | None = None) -> nn.Module:
    """A copy that computes in float with weights and activations rounded to their grids: PTQ for any bit width.

    Args:
        calibrated: from `prepare_ptq` with a configuration of mode "simulated", then `calibrate`.
        only: the layers to quantize, weights and outputs; None quantizes everything, the sums of residual blocks too.

    The scale and zero point of a layer's weights are kept as `weight_scale` and `weight_zero_point`.
    """
    model = copy.deepcopy(calibrated).eval()
    model.apply(tq.disable_observer)
    model.apply(tq.enable_fake_quant)
    chosen = layers(model)
    if only is not None:
        model.apply(tq.disable_fake_quant)
        for name in only:
            model.get_submodule(name).apply(tq.enable_fake_quant)
        chosen = {name: layer for name, layer in chosen.items() if name in only}
    for layer in chosen.values():
        scale, zero_point = quantize_weight(layer)
        observer = layer.qconfig.weight()
        layer.weight_scale, layer.weight_zero_point = scale, zero_point
        layer.weight.copy_(on_grid(layer.weight, scale, zero_point, observer.quant_min, observer.quant_max))
    return model


def _refuse_not_finite(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not torch.isfinite(inputs[0]).all():
        raise LabError(
            f"{name} met NaN or infinite values while calibrating: the weights are damaged; train again."
        )


def convert(prepared: nn.Module) -> nn.Module:
    """An int8 copy on the CPU, in eval mode; weights are rounded, activations get fixed scales."""
    model = copy.deepcopy(prepared).cpu().eval()
    if isinstance(getattr(model, "avgpool", None), RoundedAverage):
        model.avgpool = model.avgpool.pool
    return _quiet(tq.convert, model, inplace=True)


class _Known(tq.ObserverBase):
    """Gives the scale and zero point that a simulated layer already has."""

    def __init__(self, scale: Tensor, zero_point: Tensor):
        super().__init__(dtype=torch.qint8)
        self.known = scale, zero_point
        self.quant_min, self.quant_max, self.ch_axis = -128, 127, 0
        self.qscheme = torch.per_tensor_symmetric if len(scale) == 1 else torch.per_channel_symmetric

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.known


def convert_simulated(simulated: nn.Module) -> nn.Module:
    """The int8 network of a simulated one: int8 kernels run weights of fewer bits too, since their codes fit.

    Activations must have 8 bits, because the kernels use all of quint8.
    """
    model = copy.deepcopy(simulated)
    for layer in layers(model).values():
        known = partial(_Known, layer.weight_scale, layer.weight_zero_point)
        layer.qconfig = layer.qconfig._replace(weight=known)
    return convert(model)
