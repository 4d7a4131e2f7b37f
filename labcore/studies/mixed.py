"""Mixed precision: bits per layer under a size budget, and files that are as small as their bits say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from labcore import LabError
from labcore.files.artifacts import UNREADABLE, read_npz, write_npz
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import layers

BITS = (2, 3, 4, 5, 6, 8)


def weight_bytes(model: nn.Module) -> pd.Series:
    """Return the bytes of each layer's weights at 8 bits, by the layer's name."""
    return pd.Series({name: layer.weight.numel() for name, layer in layers(model).items()}, name="bytes")


def allocate(cost: pd.DataFrame, sizes: pd.Series, budget_bytes: float) -> dict[str, int]:
    """Return the bits per layer that cost least in all and fit into the budget; LabError where none do.

    `cost`, the rise of the loss, has a row per layer and a column per bit width; `sizes` are bytes at 8 bits.
    With one binary x per layer and bit width: minimise sum cost x, with sum x = 1 per layer and sum size
    bits / 8 x <= budget (Hubara et al., 2021, "Accurate post training quantization with small calibration
    sets", section 4).
    """
    bits = cost.columns.to_numpy(dtype=int)
    bytes_of = np.outer(sizes.loc[cost.index].to_numpy(dtype=float), bits / 8)  # (L, B)
    least = bytes_of.min(axis=1).sum()
    if least > budget_bytes:
        raise LabError(f"the budget must be at least {least:.0f} bytes, found {budget_bytes:.0f}; raise it.")
    one_each = LinearConstraint(np.kron(np.eye(len(cost)), np.ones(len(bits))), 1, 1)  # (L, L B)
    fits = LinearConstraint(bytes_of.ravel()[None], -np.inf, budget_bytes)
    loss = cost.to_numpy(dtype=float).ravel()
    solution = milp(loss, integrality=1, bounds=Bounds(0, 1), constraints=[one_each, fits])
    if not solution.success:
        raise LabError(f"the solver found no allocation ({solution.message}); raise the budget.")
    chosen = solution.x.reshape(cost.shape).argmax(axis=1)
    return dict(zip(cost.index, bits[chosen].tolist(), strict=True))


def overrides(bits: dict[str, int], weight: Scheme, activation: Scheme, mode="simulated") -> dict:
    """Return what gives each layer's weights bits of their own, for `prepare_ptq` and `prepare_qat`."""
    return {name: make_qconfig(replace(weight, bits=n), activation, mode) for name, n in bits.items()}


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """Return scales (1,) or (C,) in a shape that multiplies weights (C, ...)."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def codes(layer: nn.Module) -> Tensor:
    """Return the integers of a simulated layer's weights: int8, in the weights' shape."""
    weight = layer.weight.detach()
    return torch.round(weight / per_channel(layer.weight_scale, weight)).to(torch.int8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Return signed integers (any shape) as bytes: `bits` bits each, two's complement, the highest first."""
    rows = np.unpackbits(values.reshape(-1, 1).astype(np.uint8), axis=1)
    return np.packbits(rows[:, 8 - bits :])


def unpack(packed: np.ndarray, bits: int, shape: Sequence[int]) -> np.ndarray:
    """Invert `pack`: return int8 of that shape."""
    count = int(np.prod(shape))
    rows = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    sign = np.repeat(rows[:, :1], 8 - bits, axis=1)
    return np.packbits(np.concatenate([sign, rows], axis=1), axis=1).astype(np.int8).reshape(shape)


def save_packed(path: Path, simulated: nn.Module) -> int:
    """Write a simulated network, return the file's size in bytes; LabError where a scale is no power of two.

    Weights are packed codes with exponents of scales, biases float32; activations have scale and zero point.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, layer in layers(simulated).items():
        exponent = torch.log2(layer.weight_scale)
        if not torch.equal(exponent, exponent.round()):
            raise LabError(f"{name} has a scale that is no power of two; packed files hold exponents only.")
        observer = layer.qconfig.weight()
        bits = int(np.log2(observer.quant_max - observer.quant_min + 1))
        arrays[f"{name}:codes"] = pack(codes(layer).numpy(), bits)
        arrays[f"{name}:shape"] = np.array([bits, *layer.weight.shape], dtype=np.int32)
        arrays[f"{name}:exponents"] = exponent.numpy().astype(np.int8)
        if layer.bias is not None:
            arrays[f"{name}:bias"] = layer.bias.detach().numpy()
    for name, module in simulated.named_modules():
        if isinstance(module, FakeQuantizeBase):
            scale, zero_point = module.calculate_qparams()
            arrays[f"{name}:scale"] = scale.numpy()
            arrays[f"{name}:zero_point"] = zero_point.numpy().astype(np.uint8)
    write_npz(path, **arrays)
    return path.stat().st_size


def load_packed(path: Path, simulated: nn.Module) -> nn.Module:
    """Put the weights and biases of a packed file into a simulated network; LabError where they don't fit."""
    try:
        stored = read_npz(path)
        for name, layer in layers(simulated).items():
            bits, *shape = stored[f"{name}:shape"].tolist()
            if shape != list(layer.weight.shape):
                raise ValueError(f"{name} has shape {shape}, expected {list(layer.weight.shape)}")
            values = torch.from_numpy(unpack(stored[f"{name}:codes"], bits, shape)).float()
            layer.weight_scale = torch.exp2(torch.from_numpy(stored[f"{name}:exponents"]).float())
            layer.weight.data.copy_(values * per_channel(layer.weight_scale, values))
            if layer.bias is not None:
                layer.bias.data.copy_(torch.from_numpy(stored[f"{name}:bias"]))
    except UNREADABLE as error:
        raise LabError(f"{path} has no packed weights of this network ({error}); write it again.") from error
    return simulated
