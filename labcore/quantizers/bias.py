"""Weight scales that leave a bias room in 32 bits."""

import torch
from torch import Tensor, fx, nn
from torch.ao.nn import quantized

from labcore import LabError
from labcore.model import GlobalMaxPool2d

_LARGEST = 2**30  # half of an int32; the sum of up to 2^15 products, each below 2^15, has the other half


class Tracer(fx.Tracer):
    """Follow an int8 network down to its modules."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Return whether a module is one node of the graph."""
        return isinstance(module, GlobalMaxPool2d) or super().is_leaf_module(module, name)


def _input_scales(int8: nn.Module) -> dict[str, float]:
    """Return the scale of what each module takes in, by its name; pooling keeps a scale."""
    scales, found = {}, {}
    for node in Tracer().trace(int8).nodes:
        source = next((scales[part] for part in node.all_input_nodes), None)
        module = int8.get_submodule(node.target) if node.op == "call_module" else None
        found[node.target] = source
        scales[node] = node.kwargs.get("scale", getattr(module, "scale", source))
    return found


def weight_scales(weight: Tensor) -> Tensor:
    """Return the scales of an int8 weight in float64: () per tensor, (C,) per channel."""
    if weight.qscheme() == torch.per_tensor_affine:
        return torch.tensor(weight.q_scale(), dtype=torch.float64)
    return weight.q_per_channel_scales().double()


def _doublings(layer: nn.Module, input_scale: float) -> Tensor:
    """Return how often the weight scales, () or (C,), must double; what is not finite is left alone."""
    scales, bias = weight_scales(layer.weight()), layer.bias().detach().double().abs()
    steps = (bias if scales.dim() else bias.max()) / (float(input_scale) * scales)
    return (steps / _LARGEST).nan_to_num(0, 0).clamp(min=1).log2().ceil()


@torch.no_grad()
def fit_biases(int8: nn.Module) -> nn.Module:
    """Double scales of weights, in place, until every bias fits; where all do, no number changes.

    Integer kernels and files hold a bias as a multiple of input scale x weight scale. Where the weights of a
    filter are tiny or zero, 32 bits can be too few. With larger steps such weights lose nothing that shows
    beside their bias: for 4,608 products less than 2^-11 of it.

    Raises LabError, naming the layer, where biases do not fit and the network's graph cannot be followed.
    """
    kinds = quantized.Conv2d, quantized.Linear
    layers = {name: part for name, part in int8.named_modules() if isinstance(part, kinds)}
    layers = {name: layer for name, layer in layers.items() if layer.bias() is not None}
    least = min((float(part.scale) for part in int8.modules() if hasattr(part, "zero_point")), default=1.0)
    suspects = [name for name, layer in layers.items() if _doublings(layer, least).any()]
    if not suspects:
        return int8
    try:
        inputs = _input_scales(int8)
    except (fx.proxy.TraceError, TypeError) as error:
        why = f"a bias of {suspects[0]} may not fit into 32 bits, and the network's graph cannot be followed"
        raise LabError(f"{why} ({error}); clamp the scales of weights with max_shift_amount.") from error
    for name in suspects:
        layer, doublings = layers[name], _doublings(layers[name], inputs[name])
        if doublings.any():
            weight, scales = layer.weight(), weight_scales(layer.weight()) * 2**doublings
            values, zeros = weight.dequantize(), torch.zeros(scales.shape, dtype=torch.int64)
            if scales.dim():
                weight = torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
            else:
                weight = torch.quantize_per_tensor(values, scales.item(), 0, torch.qint8)
            layer.set_weight_bias(weight, layer.bias())
    return int8
