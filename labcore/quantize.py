"""Eager-mode quantization (Krishnamoorthi, 2018): fuse, prepare, calibrate (or train), convert."""

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import FakeQuantizeBase, QConfig
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.observer import FixedQParamsObserver

from labcore import LabError, nearest
from labcore.files.progress import progress
from labcore.model import QuantizableResNet
from labcore.quantizers.bias import fit_biases
from labcore.quantizers.learned import LearnedFakeQuantize


def quietly(call, *args, **kwargs):
    """Call without torch's notes, such as that this API moves to torchao; requirements.txt pins torch."""
    notes = "torch.ao.quantization is|quantized tensor|reduce_range will|must run observer before"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*({notes})")
        return call(*args, **kwargs)


def fuse(model: QuantizableResNet, is_qat: bool = False) -> QuantizableResNet:
    """Return a fused copy: BatchNorm folded away (eval mode), or kept trainable for QAT (train mode)."""
    fused = copy.deepcopy(model).cpu().train(is_qat)  # torch's functions for fusing ask for it
    fused.fuse_model(is_qat)
    return fused.train(is_qat)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return convolutions and linear layers in order, by the name of the module that is quantized as one.

    In a fused network that is the fused module ("layer1.0"), otherwise the layer itself.
    """
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name.startswith(tuple(f"{known}." for known in by_name)):
            continue  # inside a layer
        if isinstance(module, nn.Conv2d | nn.Linear):  # those of QAT hold their BatchNorm
            by_name[name] = module
        elif isinstance(module, torch.ao.nn.intrinsic.modules.fused._FusedModule):
            by_name[name] = module[0]
    return by_name


class RoundedAverage(nn.Module):
    """Average (B, C, H, W) -> (B, C, 1, 1) and round as the int8 kernel does: to the grid of the input.

    torch puts no fake quantization behind a pooling layer. A maximum is on the grid already. A mean is not:
    training and simulation would count on digits that int8 has not. `convert` puts `pool` back.
    """

    def __init__(self, pool: nn.AdaptiveAvgPool2d, grid: FakeQuantizeBase):
        super().__init__()
        self.pool = pool
        self._grid = (grid,)  # in a tuple, so that it is no submodule: its owner alone saves it

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of every channel, rounded where the grid's fake quantization is on."""
        x, (grid,) = self.pool(x), self._grid
        if grid.fake_quant_enabled[0] == 0:
            return x
        # tq.FakeQuantize keeps what it rounded with; calculate_qparams would search for the scale once more.
        is_kept = isinstance(grid, tq.FakeQuantize)
        scale, zero_point = (grid.scale, grid.zero_point) if is_kept else grid.calculate_qparams()
        return torch.fake_quantize_per_tensor_affine(
            x, scale.detach(), zero_point.to(torch.int32), grid.quant_min, grid.quant_max
        )


def _insert(prepare, model: nn.Module, qconfig: QConfig, overrides: dict[str, QConfig] | None) -> nn.Module:
    """Insert observers or fake quantization with torch's `prepare`, in place; average pools round then."""
    model.qconfig = qconfig
    modules = dict(model.named_modules())
    for name, layer_qconfig in (overrides or {}).items():
        if name not in modules:
            raise LabError(f"unknown layer {name!r}: {nearest(name, layers(model))}")
        modules[name].qconfig = layer_qconfig
    prepared = quietly(prepare, model, inplace=True)
    if isinstance(prepared, QuantizableResNet) and isinstance(prepared.avgpool, nn.AdaptiveAvgPool2d):
        grid = prepared.layer4[-1].add_relu.activation_post_process
        if isinstance(grid, FakeQuantizeBase):
            prepared.avgpool = RoundedAverage(prepared.avgpool, grid)
    return prepared


def prepare_ptq(
    model: nn.Module, qconfig: QConfig, overrides: dict[str, QConfig] | None = None, fused: bool = True
) -> nn.Module:
    """Return a fused copy in eval mode with an observer behind every quantized tensor.

    `overrides` gives layers (named as in the fused network's `layers`) a configuration of their own;
    `fused=False` leaves BatchNorm and ReLU alone, to see what fusing is worth.
    """
    copied = fuse(model) if fused else copy.deepcopy(model).cpu().eval()
    return _insert(tq.prepare, copied, qconfig, overrides)


def prepare_qat(
    model: nn.Module,
    qconfig: QConfig,
    overrides: dict[str, QConfig] | None = None,
    keep_batchnorm: bool = True,
) -> nn.Module:
    """Return a fused copy in train mode with fake quantization; BatchNorm is kept in it or folded before.

    torch divides by the weights of BatchNorm; those that are 0 become 2^-20, which shows in no output.
    """
    copied = fuse(model, is_qat=True) if keep_batchnorm else fuse(model).train()
    for module in copied.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[module.weight == 0] = 2.0**-20
    return _insert(tq.prepare_qat, copied, qconfig, overrides)


@torch.no_grad()
def calibrate(prepared: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Let the observers see normalised images, batches of shape (B, 3, H, W) in float32. In place.

    Fake quantization is off meanwhile, and on afterwards. Learned scales start from what was seen.

    Raises LabError where an observer meets NaN or infinity, naming the layer.
    """
    prepared.eval()
    prepared.apply(tq.disable_fake_quant)
    for module in prepared.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_static_observation()
    with ExitStack() as stack, progress(sum(map(len, batches)), "calibrate", unit="image") as bar:
        for name, module in prepared.named_modules():
            if isinstance(module, tq.ObserverBase):
                hook = module.register_forward_pre_hook(partial(_refuse_not_finite, name))
                stack.callback(hook.remove)
        for batch in batches:
            prepared(batch)
            bar.update(len(batch))
    prepared.apply(tq.enable_fake_quant)
    for module in prepared.modules():
        if isinstance(module, LearnedFakeQuantize):
            module.disable_observer()
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return prepared


def recalibrate(calibrated: nn.Module, model: nn.Module, qconfig: QConfig) -> nn.Module:
    """Prepare `model` for PTQ by another configuration, with the ranges that `calibrated` has seen.

    Both must observe alike, in mode and range, and may differ in how scales and zero points follow. Then it
    equals a calibration with the same images, which takes as long as the network takes for them.
    """
    prepared = prepare_ptq(model, qconfig)
    prepared.load_state_dict(calibrated.state_dict())
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeBase):
            module.scale, module.zero_point = module.calculate_qparams()
    return prepared


def _refuse_not_finite(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not torch.isfinite(inputs[0]).all():
        raise LabError(f"{name} met NaN or infinity in calibration: the weights are damaged; train again.")


def observer_of(module: nn.Module | None) -> nn.Module | None:
    """Return the observer inside fake quantization; anything else, such as an observer, as it is."""
    return module.activation_post_process if isinstance(module, FakeQuantizeBase) else module


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return dequantize(quantize(weight)); scale (1,) per tensor, or (C,) for the channels of axis 0."""
    scale = scale.expand(len(weight)).contiguous()
    zero_point = zero_point.expand(len(weight)).to(torch.int32).contiguous()
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, quant_min, quant_max)


@torch.no_grad()
def simulate(calibrated: nn.Module, only: set[str] | None = None) -> nn.Module:
    """Return a copy that computes in float with weights and activations rounded to their grids, of any bits.

    Args:
        calibrated: from `prepare_ptq` with a configuration of mode "simulated", then `calibrate`.
        only: the layers to quantize, weights and outputs; None quantizes everything, the sums of blocks too.

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
        observer = observer_of(layer.qconfig.weight().to(layer.weight.device))
        observer(layer.weight)
        scale, zero_point = layer.weight_scale, layer.weight_zero_point = observer.calculate_qparams()
        layer.weight.copy_(on_grid(layer.weight, scale, zero_point, observer.quant_min, observer.quant_max))
    return model


def convert(prepared: nn.Module) -> nn.Module:
    """Return an int8 copy on the CPU, in eval mode; weights are rounded, activations get fixed scales.

    Where a bias asks for it, weight scales are doubled (see fit_biases, and what it raises).
    """
    model = copy.deepcopy(prepared).cpu().eval()
    if isinstance(getattr(model, "avgpool", None), RoundedAverage):
        model.avgpool = model.avgpool.pool
    return fit_biases(quietly(tq.convert, model, inplace=True))


def _fixed(scale: Tensor, zero_point: Tensor) -> FixedQParamsObserver:
    """Return an observer that always gives these, (1,) or (C,); torch's takes numbers only."""
    qscheme = torch.per_tensor_symmetric if len(scale) == 1 else torch.per_channel_symmetric
    observer = FixedQParamsObserver(1.0, 0, torch.qint8, qscheme, quant_min=-128, quant_max=127)
    observer.scale, observer.zero_point, observer.ch_axis = scale, zero_point, 0
    return observer


def convert_simulated(simulated: nn.Module) -> nn.Module:
    """Return the int8 network of a simulated one, whose activations have 8 bits, its weights 8 or fewer."""
    model = copy.deepcopy(simulated)
    for layer in layers(model).values():
        observer = partial(_fixed, layer.weight_scale, layer.weight_zero_point)
        layer.qconfig = layer.qconfig._replace(weight=observer)
    return convert(model)
