"""The power-of-two schemes in PyTorch 2 Export quantization: another graph, the same scales.

Eager mode replaces modules by int8 modules. Export mode writes quantize and dequantize nodes into the float
network's graph; a backend chooses int8 kernels.
Reference: torchao.quantization.pt2e (`Quantizer`, `prepare_pt2e`, `convert_pt2e`).
"""

import copy
import math
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase, PartialWrapper
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationSpec,
    Quantizer,
    annotate_input_qspec_map,
    annotate_output_qspec,
)
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from labcore import LabError
from labcore.observer import PowerOfTwoObserver
from labcore.qconfig import Scheme, has_vnni, observer_class
from labcore.quantize import fuse

# torchao finds observers by isinstance, and ours derives from torch's base class.
ObserverBase.register(PowerOfTwoObserver)
_ATEN, _DECOMPOSED = torch.ops.aten, torch.ops.quantized_decomposed
_LAYERS = (_ATEN.conv2d.default, _ATEN.linear.default)
_ADD = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_RELU = (_ATEN.relu.default, _ATEN.relu_.default)
# int8 kernels of these keep the scale of what they take in; a shared observer would see two tensors.
_KEEPS_SCALE = (_ATEN.max_pool2d.default, _ATEN.adaptive_avg_pool2d.default, _ATEN.flatten.using_ints)
_DEQUANTIZE = (_DECOMPOSED.dequantize_per_tensor.default, _DECOMPOSED.dequantize_per_channel.default)
BATCH = ({0: torch.export.Dim.DYNAMIC},)  # the number of images stays free


class PowerOfTwoQuantizer(Quantizer):
    """Annotate a graph so that the tensors observed are those of eager mode.

    These are the input, weights, and outputs of layers and additions, behind the ReLU where one follows.
    Pooling and flattening keep their input's scale. Biases stay float. LabError where a scheme does not fit.
    """

    def __init__(self, weight: Scheme, activation: Scheme):
        self._weight = _spec(weight.observer_args("weight"))
        self._activation = _spec(activation.observer_args("activation"))

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the annotations into the nodes' meta, in place."""
        for node in model.graph.nodes:
            if node.op == "placeholder":
                annotate_output_qspec(node, self._activation)
            elif node.target in (*_LAYERS, *_ADD):
                if node.target in _LAYERS:
                    annotate_input_qspec_map(node, node.args[1], self._weight)
                annotate_output_qspec(_relu_behind(node) or node, self._activation)
            elif node.target in _KEEPS_SCALE:
                spec, source = self._activation, [node.args[0]]
                limits = spec.dtype, spec.quant_min, spec.quant_max, spec.qscheme
                derived = DerivedQuantizationSpec(source, lambda seen: seen[0].calculate_qparams(), *limits)
                annotate_output_qspec(node, derived)
        return model

    def validate(self, model: GraphModule) -> None:
        """Accept every graph; torchao asks for this method."""


def x86_quantizer() -> Quantizer:
    """Return torchao's quantizer for x86 with its default configuration, which chooses its own scales."""
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=not has_vnni())
    return x86.X86InductorQuantizer().set_global(config)


def _spec(args: dict) -> QuantizationSpec:
    """Bind an observer's arguments to it; torchao adds those that it knows itself."""
    fields = {name: args[name] for name in ("dtype", "qscheme", "quant_min", "quant_max")}
    observer = PartialWrapper(partial(observer_class(args["rule"]), **args))
    return QuantizationSpec(observer_or_fake_quant_ctr=observer, **fields)


def _relu_behind(node: Node) -> Node | None:
    """Return the ReLU that alone takes what the node gives out."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _RELU else None


@torch.no_grad()
def prepare_export(model: nn.Module, quantizer: Quantizer, example: Tensor) -> GraphModule:
    """Return the fused network as a graph with observers, to be called on the calibration batches next.

    `example` holds images (B, 3, H, W), else LabError; their number stays free, their size does not.
    """
    if example.dim() != 4 or len(example) == 0:
        raise LabError(f"example must be images (B, 3, H, W), found shape {tuple(example.shape)}; change it.")
    pair = torch.zeros(2, *example.shape[1:])  # a batch of one would be taken for a fixed size
    program = torch.export.export(fuse(model), (pair,), dynamic_shapes=BATCH)
    return prepare_pt2e(program.module(), quantizer)


def convert_export(prepared: GraphModule) -> GraphModule:
    """Return a copy with int8 weights and nodes that round; LabError where an observer saw nothing or NaN."""
    observers = [part for part in prepared.named_modules() if isinstance(part[1], PowerOfTwoObserver)]
    for name, observer in observers:
        if observer.num_skipped > 0:
            raise LabError(f"{name} met NaN or infinite values: the weights are damaged; train again.")
        if (observer.min_val > observer.max_val).any():
            raise LabError(f"{name} has seen no values: call the network on the calibration images.")
    return convert_pt2e(copy.deepcopy(prepared))


def weights_per_channel(converted: GraphModule) -> GraphModule:
    """Write the scale of each weight tensor once per channel, in place, for Inductor's int8 patterns."""
    graph = converted.graph
    for node in graph.find_nodes(op="call_function", target=_DECOMPOSED.dequantize_per_tensor.default):
        codes, scale, zero_point, *limits = node.args
        if codes.op != "get_attr":
            continue
        n_channels = len(converted.get_buffer(codes.target))
        converted.register_buffer(f"{codes.target}_scales", torch.full((n_channels,), scale))
        converted.register_buffer(f"{codes.target}_zero_points", torch.full((n_channels,), zero_point))
        with graph.inserting_before(node):
            scales = graph.get_attr(f"{codes.target}_scales")
            zero_points = graph.get_attr(f"{codes.target}_zero_points")
        node.target = _DECOMPOSED.dequantize_per_channel.default
        node.args = (codes, scales, zero_points, 0, *limits)
    converted.recompile()
    return converted


def export_scales(converted: GraphModule) -> pd.DataFrame:
    """Return one row per quantized tensor, named as in eager mode; pooling repeats a scale and has no row.

    Columns: layer, tensor ("weight" or "activation"), scale, zero_point, exponent (log2 of the scale), all of
    the smallest scale; scales (a tuple with one per channel), quant_min, quant_max.
    """
    rows = []
    for node in converted.graph.nodes:
        if node.target not in _DEQUANTIZE:
            continue
        quantized, scale, zero_point, *_, low, high, _ = node.args
        is_weight = quantized.op == "get_attr"
        owner = next(iter(node.users)) if is_weight else quantized.args[0]
        if owner.target in _KEEPS_SCALE:
            continue
        scales, zero_points = _values(converted, scale), _values(converted, zero_point)
        least = min(scales), int(zero_points[0]), math.log2(min(scales))
        tensor = "weight" if is_weight else "activation"
        rows.append((_layer(owner), tensor, *least, tuple(scales), low, high))
    columns = ["layer", "tensor", "scale", "zero_point", "exponent", "scales", "quant_min", "quant_max"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(["layer", "tensor"], ignore_index=True)


def _values(model: GraphModule, value: float | int | Node) -> list:
    """Return a number, or the buffer that a node reads, as a list of numbers."""
    return model.get_buffer(value.target).tolist() if isinstance(value, Node) else [value]


def _layer(node: Node) -> str:
    """Return eager mode's name of the module computing this node; a fused one is named by its Sequential."""
    if node.op == "placeholder":
        return "quant"
    fused = node.target in _RELU
    node = node.args[0] if fused else node
    *_, (name, _) = node.meta["nn_module_stack"].values()
    if node.target in _ADD:
        return name + ".add_relu"
    return name.removesuffix(".0") if fused or _relu_behind(node) else name
