"""Networks of torch's eager mode as files: float and int8."""

from pathlib import Path

import torch
from torch import nn
from torch.ao.quantization import QConfig
from torch.utils._pytree import tree_map

from labcore import LabError, first_line
from labcore.files.tensors import load_tensors, load_weights, save_tensors
from labcore.model import QuantizableResNet
from labcore.quantize import convert, prepare_ptq, quietly


def save_int8(path: Path, model: nn.Module) -> None:
    """Write the int8 state dict: weights as bytes with scales, one scale and zero point per activation."""
    quietly(save_tensors, path, model.state_dict())


def load_int8(path: Path, float_model: QuantizableResNet, qconfig: QConfig) -> nn.Module:
    """Read an int8 network of the same architecture and configuration; no pickle is executed.

    Raises LabError where the file is truncated, foreign, or belongs to another architecture.
    """
    state = quietly(load_tensors, path)
    skeleton = convert(prepare_ptq(float_model, qconfig))
    try:
        if _shapes(state) != _shapes(skeleton.state_dict()):  # int8 layers would take weights of any shape
            raise ValueError("names or shapes differ")
        skeleton.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        why = f"does not fit this architecture and configuration ({first_line(error)})"
        raise LabError(f"{path} {why}; use the profile that wrote it.") from error
    return skeleton


def _shapes(state: dict) -> dict:
    """Return name -> shape, a pair for the weight and bias that a linear layer packs."""
    return tree_map(lambda value: getattr(value, "shape", type(value)), state)


def load_float(path: Path, model: QuantizableResNet) -> QuantizableResNet:
    """Read FP32 weights into `model`, in channels_last; LabError as in load_tensors and load_weights."""
    load_weights(model, load_tensors(path), str(path))
    return model.to(memory_format=torch.channels_last).eval()
