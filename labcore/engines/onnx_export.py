"""An int8 network as an ONNX file: QuantizeLinear and DequantizeLinear around every tensor (QDQ).

The scales are the network's own. Weights are int8 and biases int32, so an engine can replace dequantize,
compute, quantize by one integer kernel. Only the biases differ from the eager network: torch adds floats.
References: ONNX's operators of these names; Jacob et al. (2018), section 2.2, for the scale of a bias.
"""

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.ao.nn import intrinsic, quantized

from labcore import LabError
from labcore.files.artifacts import write_bytes
from labcore.model import GlobalMaxPool2d
from labcore.quantizers.bias import Tracer, weight_scales

OPSET, IR_VERSION = 17, 8  # both are read by every engine since 2022
INPUT, OUTPUT = "images", "logits"
_RELU = (intrinsic.quantized.ConvReLU2d, intrinsic.quantized.LinearReLU)


class _Value(NamedTuple):
    """A tensor of the graph: its ONNX name, in float, and the grid to which it was rounded, if it was."""

    name: str
    scale: float | None = None
    zero_point: int | None = None


class _Graph:
    """The nodes and constants of an ONNX graph in the making."""

    def __init__(self, integer_bias: bool):
        self.integer_bias = integer_bias
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def rounded(self, source: str, name: str, scale: float, zero_point: int) -> _Value:
        """Bring a float value to its grid and back."""
        step = self.constant(f"{name}.scale", np.float32(scale))
        zero = self.constant(f"{name}.zero_point", np.uint8(zero_point))
        codes = self.add("QuantizeLinear", [source, step, zero], f"{name}.codes")
        return _Value(self.add("DequantizeLinear", [codes, step, zero], f"{name}.value"), scale, zero_point)

    def integers(self, name: str, codes: np.ndarray, scale: np.ndarray) -> str:
        """Store integers of a weight or bias, to be read as floats; scale () per tensor, (C,) per channel."""
        inputs = [
            self.constant(f"{name}.codes", codes),
            self.constant(f"{name}.scale", scale.astype(np.float32)),
            self.constant(f"{name}.zero_point", np.zeros(scale.shape, codes.dtype)),
        ]
        return self.add("DequantizeLinear", inputs, f"{name}.value", **({"axis": 0} if scale.ndim else {}))

    def layer(self, kind: str, source: _Value, name: str, module: nn.Module, **attributes) -> _Value:
        """Add a convolution or linear layer, its ReLU, and the output's grid."""
        weights, bias, scale = module.weight(), module.bias(), weight_scales(module.weight()).numpy()
        weights = weights.int_repr().numpy()
        inputs = [source.name, self.integers(f"{name}.weight", weights, scale)]
        if bias is not None and self.integer_bias:
            step = np.asarray(source.scale * scale)  # of the accumulator
            codes = np.rint(bias.detach().double().numpy() / step)
            products = 255 * np.abs(weights.reshape(len(weights), -1).astype(np.int64)).sum(axis=1)
            if not (np.abs(codes) + products < 2**31).all():  # nor NaN
                raise LabError(f"{name}: its biases and sums leave 32 bits; convert the network again.")
            inputs.append(self.integers(f"{name}.bias", codes.astype(np.int32), step))
        elif bias is not None:
            inputs.append(self.constant(f"{name}.bias", bias.detach().numpy()))
        out = self.add(kind, inputs, name, **attributes)
        if isinstance(module, _RELU):
            if module.zero_point > 0:
                # Engines fuse a layer with what quantizes it. Zero is on the grid, so no number changes.
                out = self.rounded(out, f"{name}.before_relu", module.scale, module.zero_point).name
            out = self.add("Relu", [out], f"{name}.relu")
        return self.rounded(out, f"{name}.out", module.scale, module.zero_point)

    def module(self, name: str, module: nn.Module, source: _Value) -> _Value:
        """Add what a module of the network does to `source`; LabError where that is not known."""
        if isinstance(module, nn.Identity | quantized.DeQuantize):
            return source
        if isinstance(module, quantized.Quantize):
            return self.rounded(source.name, name, float(module.scale), int(module.zero_point))
        if isinstance(module, quantized.Conv2d):
            attributes = {"strides": module.stride, "dilations": module.dilation, "group": module.groups}
            return self.layer("Conv", source, name, module, pads=2 * module.padding, **attributes)
        if isinstance(module, quantized.Linear):
            return self.layer("Gemm", source, name, module, transB=1)
        if isinstance(module, nn.MaxPool2d):
            size, stride, pad = ([n, n] for n in (module.kernel_size, module.stride, module.padding))
            out = self.add("MaxPool", [source.name], name, kernel_shape=size, strides=stride, pads=2 * pad)
        elif isinstance(module, GlobalMaxPool2d):
            out = self.add("GlobalMaxPool", [source.name], name)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            out = self.add("GlobalAveragePool", [source.name], name)
        else:
            raise LabError(f"{name} is {module}, which this export does not know; use a residual network.")
        # An int8 pooling kernel keeps the grid of its input.
        return self.rounded(out, f"{name}.out", source.scale, source.zero_point)

    def function(self, node: fx.Node, sources: list[_Value]) -> _Value:
        """Add what a function called in `forward` does to `sources`; LabError where that is not known."""
        name, inputs = node.name, [source.name for source in sources]
        if node.target in (torch.ops.quantized.add, torch.ops.quantized.add_relu):
            out = self.add("Add", inputs, name)
            if node.target is torch.ops.quantized.add_relu:
                out = self.add("Relu", [out], f"{name}.relu")
            return self.rounded(out, f"{name}.out", **node.kwargs)
        if node.target is torch.flatten:
            return sources[0]._replace(name=self.add("Flatten", inputs, name))
        if node.target is operator.mul:
            (factor,) = (part for part in node.args if not isinstance(part, fx.Node))
            inputs.append(self.constant(f"{name}.factor", np.float32(factor)))
            return _Value(self.add("Mul", inputs, name))
        raise LabError(f"{name} is {node.target}, which this export does not know; use a residual network.")


def build_onnx(
    network: nn.Module, image_shape: tuple[int, ...], facts: dict | None = None, integer_bias: bool = True
) -> onnx.ModelProto:
    """Return the ONNX model of an eager int8 network: normalised images (B, 3, H, W) -> logits (B, classes).

    `image_shape` is (3, H, W), the batch is free; `facts` are kept as metadata. Biases are int32 multiples of
    input scale x weight scale, or, without `integer_bias`, float32. Raises LabError for unknown operations,
    and, naming the layer, where a bias and the products added to it could leave 32 bits.
    """
    graph, values = _Graph(integer_bias), {}
    for node in Tracer().trace(network.eval()).nodes:
        sources = [values[part] for part in node.args if isinstance(part, fx.Node)]
        if node.op == "placeholder":
            values[node] = _Value(INPUT)
        elif node.op == "call_module":
            values[node] = graph.module(node.target, network.get_submodule(node.target), *sources)
        elif node.op == "output":
            graph.add("Identity", [sources[0].name], OUTPUT)
        else:
            values[node] = graph.function(node, sources)
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *image_shape])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", network.fc.out_features])
    body = helper.make_graph(graph.nodes, "int8", [images], [logits], graph.constants)
    versions = {"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": IR_VERSION}
    model = helper.make_model(body, producer_name="labcore", **versions)
    helper.set_model_props(model, facts or {})
    onnx.checker.check_model(model, full_check=True)
    return model


def save_onnx(path: Path, model: onnx.ModelProto) -> int:
    """Write the model, whole or not at all; return its size in bytes."""
    content = model.SerializeToString(deterministic=True)
    write_bytes(path, content)
    return len(content)


def predict_onnx(model: onnx.ModelProto, batches: Iterable[Tensor], optimize: bool = True) -> np.ndarray:
    """Return logits (N, classes) by ONNX Runtime on the CPU, for batches of normalised images (B, 3, H, W).

    Optimised, it replaces nodes by integer kernels and rounds float biases; else it computes node by node.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    file = model.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    logits = [session.run([OUTPUT], {INPUT: batch.contiguous().numpy()})[0] for batch in batches]
    return np.concatenate(logits)
