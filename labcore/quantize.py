"""The four steps of eager-mode quantization: fuse, prepare, calibrate (or train), convert. Each works on a copy.

Reference: Krishnamoorthi (2018), "Quantizing deep convolutional networks for efficient inference"; torch.ao.quantization.
"""

import copy
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import QConfig

from labcore import LabError
from labcore.checkpoint import first_line, load_tensors, save_tensors
from labcore.data import ImageData, Split
from labcore.model import QuantizableResNet, load_weights
from labcore.observer import PowerOfTwoObserver, scale_approximate
from labcore.progress import progress
from labcore.transforms import normalize


def _quiet(call, *args, **kwargs):
    """torch announces on every call that this API will move to torchao; requirements.txt pins the version that has it."""
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


def prepare_ptq(model: QuantizableResNet, qconfig: QConfig) -> QuantizableResNet:
    """A fused copy in eval mode with an observer behind every quantized tensor."""
    prepared = fuse(model)
    prepared.qconfig = qconfig
    return _quiet(tq.prepare, prepared, inplace=True)


def prepare_qat(model: QuantizableResNet, qconfig: QConfig) -> QuantizableResNet:
    """A fused copy in train mode, BatchNorm kept, with fake quantization of weights and activations."""
    prepared = fuse(model, is_qat=True)
    prepared.qconfig = qconfig
    return _quiet(tq.prepare_qat, prepared, inplace=True)


@torch.no_grad()
def calibrate(prepared: nn.Module, data: ImageData, split: Split, batch_size: int = 128) -> nn.Module:
    """Let the observers see the calibration images: training images, evaluation transforms, float32. In place.

    Raises LabError for an empty calibration set and where an observer meets NaN or infinity, naming the layer.
    """
    images = data.train_images[split.calibration]
    if len(images) == 0:
        raise LabError("the calibration set is empty: set calibration_images to at least 1.")
    prepared.eval()
    hooks = [
        module.register_forward_pre_hook(partial(_refuse_not_finite, name))
        for name, module in prepared.named_modules()
        if isinstance(module, tq.ObserverBase)
    ]
    try:
        with progress(len(images), "calibrate", unit="image") as bar:
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(images[start : start + batch_size])
                prepared(normalize(batch))
                bar.update(len(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return prepared


def _refuse_not_finite(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not torch.isfinite(inputs[0]).all():
        raise LabError(
            f"{name} met NaN or infinite values while calibrating: the weights are damaged; train again."
        )


def convert(prepared: nn.Module) -> nn.Module:
    """An int8 copy on the CPU, in eval mode; weights are rounded, activations get fixed scales."""
    return _quiet(tq.convert, copy.deepcopy(prepared).cpu().eval(), inplace=True)


def save_int8(path: Path, model: nn.Module) -> None:
    """Write the int8 state dict: weights as bytes with their scales, one scale and zero point per activation."""
    _quiet(save_tensors, path, model.state_dict())


def load_int8(path: Path, float_model: QuantizableResNet, qconfig: QConfig) -> nn.Module:
    """Read an int8 network of the same architecture and configuration; no pickle is executed.

    Raises LabError where the file is truncated, foreign, or belongs to another architecture.
    """
    state = _quiet(load_tensors, path)
    skeleton = convert(prepare_ptq(float_model, qconfig))
    try:
        expected = _shapes(skeleton.state_dict())
        if _shapes(state) != expected:  # int8 layers would take weights of any shape
            raise ValueError("names or shapes differ")
        skeleton.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise LabError(
            f"{path} does not fit this architecture and configuration ({first_line(error)}); use the profile that wrote it."
        ) from error
    return skeleton


def _shapes(state: dict) -> dict:
    """Name -> shape, also inside the pair (weight, bias) that a linear layer packs."""
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in state.items()}
    return {
        name: [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in part]
        for name, part in parts.items()
    }


def load_float(path: Path, model: QuantizableResNet) -> QuantizableResNet:
    """Read FP32 weights into `model`; LabError as in load_tensors and load_weights."""
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise LabError(f"{path} holds no state dict of tensors; use a file written by the fp32 stage.")
    load_weights(model, state, str(path))
    return model.eval()


def qparams(model: nn.Module) -> pd.DataFrame:
    """One row per quantized tensor of an int8 network.

    Columns: layer, tensor ("weight" or "activation"), scale, zero_point, exponent (log2 of the scale). A per-channel
    weight is given by its smallest scale.
    """
    rows = []

    def add(layer: str, tensor: str, scale, zero_point) -> None:
        scale = float(np.min(np.asarray(scale)))
        rows.append(
            {
                "layer": layer,
                "tensor": tensor,
                "scale": scale,
                "zero_point": int(zero_point),
                "exponent": float(np.log2(scale)),
            }
        )

    for name, module in model.named_modules():
        if hasattr(module, "scale") and hasattr(module, "zero_point"):
            add(name, "activation", module.scale, module.zero_point)
        if hasattr(module, "weight") and callable(module.weight):
            weight = module.weight()
            per_tensor = weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
            add(
                name,
                "weight",
                weight.q_scale() if per_tensor else weight.q_per_channel_scales(),
                weight.q_zero_point() if per_tensor else 0,
            )
    return pd.DataFrame(rows)


def observed(prepared: nn.Module) -> pd.DataFrame:
    """One row per tensor that a calibrated network will quantize with a PowerOfTwoObserver.

    Columns: layer, tensor ("weight" or "activation"), min, max, raw_scale (before rounding), scale, zero_point,
    clamped (whether the exponent's limits changed the scale). Per-channel weights give their channels' extremes and the
    smallest scale.
    """
    rows = []
    for name, module in prepared.named_modules():
        watchers = {"activation": getattr(module, "activation_post_process", None)}
        if isinstance(getattr(module, "weight", None), Tensor) and getattr(module, "qconfig", None):
            watchers["weight"] = module.qconfig.weight().to(module.weight.device)
            watchers["weight"](module.weight.detach())
        for tensor, watcher in watchers.items():
            if isinstance(watcher, PowerOfTwoObserver):
                scale, zero_point = watcher.calculate_qparams()
                raw = watcher.raw_scale()
                clamped = scale_approximate(raw, watcher.max_shift_amount) != scale_approximate(raw, None)
                rows.append(
                    {
                        "layer": name,
                        "tensor": tensor,
                        "min": watcher.min_val.min().item(),
                        "max": watcher.max_val.max().item(),
                        "raw_scale": raw.min().item(),
                        "scale": scale.min().item(),
                        "zero_point": zero_point.flatten()[0].item(),
                        "clamped": bool(clamped.any()),
                    }
                )
    return pd.DataFrame(rows)
