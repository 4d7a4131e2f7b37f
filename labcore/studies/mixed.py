"""Mixed precision: bits per layer under a size budget, and files that are as small as their bits say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from labcore import LabError
from labcore.files.artifacts import UNREADABLE, read_npz, write_npz
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import layers

BITS = (2, 3, 4, 5, 6, 8)


def weight_bytes(model: nn.Module) -> pd.Series:
    """Bytes of each layer's weights at 8 bits, by the layer's name."""
    return pd.Series({name: layer.weight.numel() for name, layer in layers(model).items()}, name="bytes")


def allocate(cost: pd.DataFrame, sizes: pd.Series, budget_bytes: float) -> dict[str, int]:
    """Bits per layer that cost least in all and fit into the budget.

    An integer linear program with one binary x per layer and bit width: minimise sum cost x, with sum x = 1 per layer and
    sum size bits / 8 x <= budget. Solved exactly by scipy's milp (HiGHS).

    Args:
        cost: one row per layer, one column per bit width: how much loss this layer causes with so many bits.
        sizes: bytes of each layer at 8 bits.
        budget_bytes: of all weights together.

    Raises:
        LabError: even the fewest bits do not fit.

    Reference: Hubara et al. (2021), "Accurate post training quantization with small calibration sets", section 4.
    """
    names, bits = list(cost.index), np.array([int(column) for column in cost.columns])
    bytes_of = np.outer(sizes.loc[names].to_numpy(dtype=float), bits / 8)  # (L, B)
    least = bytes_of.min(axis=1).sum()
    if least > budget_bytes:
        raise LabError(f"the budget must be at least {least:.0f} bytes, found {budget_bytes:.0f}; raise it.")
    one_each = np.kron(np.eye(len(names)), np.ones(len(bits)))  # (L, L B)
    solution = milp(
        cost.to_numpy(dtype=float).ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bytes_of.ravel()[None], -np.inf, budget_bytes),
        ],
    )
    if not solution.success:
        raise LabError(f"the solver found no allocation ({solution.message}); raise the budget.")
    chosen = solution.x.reshape(cost.shape).argmax(axis=1)
    return dict(zip(names, bits[chosen].tolist(), strict=True))


def overrides(bits: dict[str, int], weight: Scheme, activation: Scheme, mode: str = "simulated") -> dict:
    """For `prepare_ptq` and `prepare_qat`: each layer's weights with its own bits."""
    return {name: make_qconfig(replace(weight, bits=own), activation, mode) for name, own in bits.items()}


def codes(layer: nn.Module) -> Tensor:
    """The integers of a simulated layer's weights, int8, in the weights' shape."""
    scale = layer.weight_scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    return torch.round(layer.weight.detach() / scale).to(torch.int8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers (any shape) as bytes, `bits` bits each, two's complement, the highest bit first."""
    low = values.reshape(-1, 1).astype(np.uint8)  # two's complement
    return np.packbits(np.unpackbits(low, axis=1)[:, 8 - bits :])


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: int8 of that shape."""
    count = int(np.prod(shape))
    rows = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    sign = np.repeat(rows[:, :1], 8 - bits, axis=1)
    return np.packbits(np.concatenate([sign, rows], axis=1), axis=1).astype(np.int8).reshape(shape)


def save_packed(path: Path, simulated: nn.Module) -> int:
    """Write a simulated network: packed weight codes, exponents of scales as bytes, float32 biases, and the scale and
    zero point of every activation. Returns the file's size in bytes.

    Raises LabError where a weight scale is no power of two.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, layer in layers(simulated).items():
        exponent = torch.log2(layer.weight_scale)
        if not torch.equal(exponent, exponent.round()):
            raise LabError(f"{name} has a scale that is no power of two; packed files hold exponents only.")
        watcher = layer.qconfig.weight()
        bits = int(np.log2(watcher.quant_max - watcher.quant_min + 1))
        arrays |= {
            f"{name}:codes": pack(codes(layer).numpy(), bits),
            f"{name}:shape": np.array([bits, *layer.weight.shape], dtype=np.int32),
            f"{name}:exponents": exponent.numpy().astype(np.int8),
        }
        if layer.bias is not None:
            arrays[f"{name}:bias"] = layer.bias.detach().numpy()
    for name, module in simulated.named_modules():
        if isinstance(module, torch.ao.quantization.FakeQuantizeBase):
            scale, zero_point = module.calculate_qparams()
            arrays[f"{name}:scale"] = scale.numpy()
            arrays[f"{name}:zero_point"] = zero_point.numpy().astype(np.uint8)
    write_npz(path, **arrays)
    return path.stat().st_size


def load_packed(path: Path, simulated: nn.Module) -> nn.Module:
    """Put the weights and biases of a packed file into a simulated network of the same architecture. In place.

    Raises LabError where the file is missing, damaged or of another architecture.
    """
    try:
        stored = read_npz(path)
        for name, layer in layers(simulated).items():
            bits, *shape = stored[f"{name}:shape"].tolist()
            if tuple(shape) != tuple(layer.weight.shape):
                raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(layer.weight.shape)}")
            values = torch.from_numpy(unpack(stored[f"{name}:codes"], bits, tuple(shape))).float()
            scale = torch.exp2(torch.from_numpy(stored[f"{name}:exponents"]).float())
            layer.weight.data.copy_(values * scale.reshape(-1, *[1] * (values.dim() - 1)))
            layer.weight_scale = scale
            if layer.bias is not None:
                layer.bias.data.copy_(torch.from_numpy(stored[f"{name}:bias"]))
    except UNREADABLE as error:
        raise LabError(
            f"{path} cannot be read as packed weights of this network ({error}); write it again with make studies."
        ) from error
    return simulated
