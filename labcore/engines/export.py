"""The power-of-two schemes in PyTorch 2 Export quantization: the graph that newer backends take, with the same scales.

Eager mode replaces modules by int8 modules. Export mode writes quantize and dequantize nodes into the graph of the float
network, and leaves the choice of int8 kernels to a backend. Ranges and scales come from the same PowerOfTwoObserver.

Reference: torchao.quantization.pt2e (`Quantizer`, `prepare_pt2e`, `convert_pt2e`), pinned in requirements.txt. Only this
module and labcore.engine_files import torchao.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from labcore import LabError
from labcore.observer import PowerOfTwoObserver
from labcore.qconfig import Scheme
from labcore.quantize import fuse


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For imports of torchao: without what torch logs about torchao's enums on import, a note for torchao's authors."""
    log = logging.getLogger("torch.utils._pytree")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


with quiet():
    from torchao.quantization.pt2e.observer import ObserverBase, PartialWrapper
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )
# torchao finds observers by isinstance. Ours derives from torch's base class, which does the same; inheriting from both
# would call the wrong __init__, so it is registered as a virtual subclass.
ObserverBase.register(PowerOfTwoObserver)
_ATEN, _DECOMPOSED = torch.ops.aten, torch.ops.quantized_decomposed
_LAYERS = (_ATEN.conv2d.default, _ATEN.linear.default)
_ADD = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_RELU = (_ATEN.relu.default, _ATEN.relu_.default)
# int8 kernels of these give out the scale of what they take in.
_KEEPS_SCALE = (_ATEN.max_pool2d.default, _ATEN.adaptive_avg_pool2d.default, _ATEN.flatten.using_ints)


class PowerOfTwoQuantizer(Quantizer):
    """Annotates a graph so that the tensors observed are those of eager mode.

    Observed: the input, the weights of convolutions and linear layers, and the outputs of convolutions, linear layers and
    additions, behind the ReLU where one follows. Inputs of a layer are outputs of another, so they need no annotation.
    Pooling and flattening take the scale of their input over and observe nothing: a shared observer would see two
    tensors. Biases stay float.

    Raises LabError where a scheme does not fit the kind of tensor.
    """

    def __init__(self, weight: Scheme, activation: Scheme):
        self._weight = _spec(weight.observer_args("weight"))
        self._activation = _spec(activation.observer_args("activation"))

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the annotations into the nodes' meta, in place."""
        for node in model.graph.nodes:
            if node.op == "placeholder":
                _annotate(node, self._activation)
            elif node.target in (*_LAYERS, *_ADD):
                relu = _relu_behind(node)
                weights = {node.args[1]: self._weight} if node.target in _LAYERS else {}
                _annotate(node, None if relu else self._activation, weights)
                if relu:
                    _annotate(relu, self._activation)
            elif node.target in _KEEPS_SCALE:
                _annotate(node, _same_as(_source(node), self._activation))
        return model

    def validate(self, model: GraphModule) -> None:
        """Raises LabError where the graph holds no layer to quantize."""
        if not any(node.target in _LAYERS for node in model.graph.nodes):
            raise LabError(
                "the exported graph holds no convolution or linear layer; export a network of ours."
            )


def _spec(args: dict) -> QuantizationSpec:
    """Of arguments of PowerOfTwoObserver; all of them are bound to the observer, torchao adds those that it knows."""
    known = {name: args[name] for name in ("dtype", "qscheme", "quant_min", "quant_max")}
    observer = PartialWrapper(partial(PowerOfTwoObserver, **args))
    return QuantizationSpec(observer_or_fake_quant_ctr=observer, **known)


def _annotate(node: Node, output, inputs: dict | None = None) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs or {}, output, _annotated=True)


def _same_as(source: Node, spec: QuantizationSpec) -> DerivedQuantizationSpec:
    known = {name: getattr(spec, name) for name in ("dtype", "qscheme", "quant_min", "quant_max")}
    return DerivedQuantizationSpec([source], _first_qparams, **known)


def _first_qparams(observers: list[nn.Module]) -> tuple[Tensor, Tensor]:
    return observers[0].calculate_qparams()


def _relu_behind(node: Node) -> Node | None:
    """The ReLU that alone takes what the node gives out."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _RELU else None


def _source(node: Node) -> Node:
    """The observed node whose scale a chain of pooling and flattening keeps."""
    while node.target in _KEEPS_SCALE:
        node = node.args[0]
    return node


def prepare_export(model: nn.Module, weight: Scheme, activation: Scheme, example: Tensor) -> GraphModule:
    """The fused network as a graph with observers; call it on the calibration batches next.

    Args:
        model: a float network, as for `prepare_ptq`; it stays as it is.
        example: normalised images (B, 3, H, W) of the size to come; the number of images stays free.

    Raises LabError where a scheme does not fit, or the example is no batch of images.
    """
    quantizer = PowerOfTwoQuantizer(weight, activation)
    if example.dim() != 4 or len(example) == 0:
        raise LabError(f"example must be images (B, 3, H, W), found shape {tuple(example.shape)}; change it.")
    pair = example[:1].cpu().repeat(2, 1, 1, 1)  # a batch of one would be taken for a fixed size
    with torch.no_grad():
        program = torch.export.export(fuse(model), (pair,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        return prepare_pt2e(program.module(), quantizer)


def convert_export(prepared: GraphModule) -> GraphModule:
    """A copy with quantize and dequantize nodes: int8 weights, arithmetic in float between the nodes.

    Raises LabError where an observer has seen nothing, or NaN or infinity.
    """
    for name, module in prepared.named_modules():
        if isinstance(module, PowerOfTwoObserver):
            if module.num_skipped > 0:
                raise LabError(f"{name} met NaN or infinite values: the weights are damaged; train again.")
            if (module.min_val > module.max_val).any():
                raise LabError(
                    f"{name} has seen no values: call the prepared network on the calibration images."
                )
    return convert_pt2e(copy.deepcopy(prepared))


def export_scales(converted: GraphModule) -> pd.DataFrame:
    """One row per quantized tensor, named as in labcore.qparams.qparams; pooling repeats a scale and has no row.

    Columns: layer, tensor ("weight" or "activation"), scale, zero_point, exponent (log2 of the scale), all of the smallest
    scale; scales (a tuple with one per channel), quant_min, quant_max.
    """
    rows: dict[tuple[str, str], dict] = {}
    for node in converted.graph.nodes:
        if node.target not in (
            _DECOMPOSED.dequantize_per_tensor.default,
            _DECOMPOSED.dequantize_per_channel.default,
        ):
            continue
        quantized, scale, zero_point, *_, low, high, _ = node.args
        is_weight = quantized.op == "get_attr"
        owner = next(iter(node.users)) if is_weight else quantized.args[0]
        if owner.target in _KEEPS_SCALE:
            continue
        scales, zeros = (_values(converted, value) for value in (scale, zero_point))
        key = (_layer(owner), "weight" if is_weight else "activation")
        rows[key] = {
            "layer": key[0],
            "tensor": key[1],
            "scale": min(scales),
            "zero_point": int(zeros[0]),
            "exponent": math.log2(min(scales)),
            "scales": tuple(scales),
            "quant_min": low,
            "quant_max": high,
        }
    return pd.DataFrame(rows.values())


def _values(model: GraphModule, value) -> list:
    """A number, or the buffer that a node reads, as a list of numbers."""
    return model.get_buffer(value.target).tolist() if isinstance(value, Node) else [value]


def _layer(node: Node) -> str:
    """The name that eager mode gives the module computing this node; a fused one is named by its Sequential."""
    if node.op == "placeholder":
        return "quant"
    fused = node.target in _RELU
    node = node.args[0] if fused else node
    *_, (name, _) = node.meta["nn_module_stack"].values()
    if node.target in _ADD:
        return name + ".add_relu"
    return name.removesuffix(".0") if fused or _relu_behind(node) else name
