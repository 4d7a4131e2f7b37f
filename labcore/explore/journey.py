"""One pixel's way through an int8 layer: integers, until a shift rounds their sum."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from labcore import LabError, nearest
from labcore.images.transforms import normalize


@torch.no_grad()
def journey(
    int8: nn.Module, layer: str, image: np.ndarray, channel: int = 0, row: int = 0, column: int = 0
) -> SimpleNamespace:
    """Follow one pixel of a layer's output in an int8 network, for an image: uint8 (3, H, W).

        products = weights (inputs - input_zero_point),  total = sum of products + bias
        shifted = total 2^shift,  code = clamp(round(shifted) + zero_point, low, high), ties to even

    `inputs` and `weights` are codes, (C, k, k) with k = 1 for a linear layer; outside the image a code is the
    zero point. `kernel` is the code of torch's int8 kernel, with the bias rounded to a whole number, as
    integer hardware has it. `place` is (row, column) as shares of the output, empty for a linear layer.

    Scales must be powers of two. Raises LabError for an unknown layer or place.
    """
    known = [name for name, module in int8.named_modules() if hasattr(module, "set_weight_bias")]
    if layer not in known:
        raise LabError(f"unknown layer {layer!r}: {nearest(layer, known)}")
    network, seen = copy.deepcopy(int8), []
    module = network.get_submodule(layer)
    weight = module.weight()
    is_whole = weight.qscheme() == torch.per_tensor_affine
    scales = torch.tensor([weight.q_scale()]) if is_whole else weight.q_per_channel_scales()

    def round_bias(_, args: tuple) -> None:
        unit = scales.double() * args[0].q_scale()
        seen.extend((args[0], torch.round(module.bias().double() / unit)))
        module.set_weight_bias(weight, (seen[1] * unit).float())

    module.register_forward_pre_hook(round_bias)
    module.register_forward_hook(lambda _, args, output: seen.append(output))
    network(normalize(torch.from_numpy(image)[None]))
    given, bias, output = seen
    at, sides = (channel, row, column)[: output.dim() - 1], output.shape[1:]
    if not all(0 <= index < side for index, side in zip(at, sides, strict=True)):
        raise LabError(f"{layer} gives {tuple(sides)}, found {at}; choose a place inside.")
    inputs, zero = given.int_repr().long()[0], given.q_zero_point()
    if isinstance(module, torch.ao.nn.quantized.Conv2d):
        (up, left), (height, width) = module.padding, module.kernel_size
        top, start = row * module.stride[0], column * module.stride[1]
        inputs = F.pad(inputs, (left, left, up, up), value=zero)
        inputs = inputs[:, top : top + height, start : start + width]
    else:
        inputs = inputs[:, None, None]
    way = SimpleNamespace(inputs=inputs, input_zero_point=zero, kernel=int(output.int_repr()[0][at]))
    way.weights = weight.int_repr().long()[channel].reshape(inputs.shape)
    way.products, way.bias = way.weights * (inputs - zero), int(bias[channel])
    way.total = int(way.products.sum()) + way.bias
    way.shift = round(np.log2(float(scales.expand(len(bias))[channel]) * given.q_scale() / output.q_scale()))
    way.shifted, way.zero_point = way.total * 2.0**way.shift, output.q_zero_point()
    way.low, way.high = way.zero_point if "ReLU" in type(module).__name__ else 0, 255
    way.code = min(max(round(way.shifted) + way.zero_point, way.low), way.high)
    way.place = [index / max(1, side - 1) for index, side in zip(at[1:], sides[1:], strict=True)]
    return way
