"""An int8 network as an ONNX file that other engines run: QuantizeLinear and DequantizeLinear around every tensor (QDQ).

The scales are the network's own, powers of two kept; nothing is calibrated again. Weights are stored as int8 and biases as
int32, so an engine can replace every dequantize, compute, quantize by one integer kernel. torch's own kernels add float biases:
rounding them to the accumulator's integers is all in which the file differs from the eager network.

References: the ONNX operators QuantizeLinear and DequantizeLinear; Jacob et al. (2018), section 2.2, for the scale of a bias.
"""

import operator
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.ao.nn import intrinsic, quantized

from labcore import LabError
from labcore.files.artifacts import atomic_path
from labcore.model import GlobalMaxPool2d

OPSET, IR_VERSION = 17, 8  # both are read by every engine since 2022
INPUT, OUTPUT = "images", "logits"
_ADD = (torch.ops.quantized.add, torch.ops.quantized.add_relu)
_CONVOLUTION = (quantized.Conv2d, intrinsic.quantized.ConvReLU2d)
_LINEAR = (quantized.Linear, intrinsic.quantized.LinearReLU)
_RELU = (intrinsic.quantized.ConvReLU2d, intrinsic.quantized.LinearReLU)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, GlobalMaxPool2d) or super().is_leaf_module(module, name)


class _Graph:
    """The nodes and constants of an ONNX graph in the making, and what is known of every torch value."""

    def __init__(self, integer_bias: bool):
        self.integer_bias = integer_bias
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        # torch's name of a value -> its ONNX name, in float, and the scale and zero point of its grid (None: no grid)
        self.values: dict[str, tuple[str, tuple[float, int] | None]] = {}

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def rounded(self, source: str, name: str, scale: float, zero_point: int) -> str:
        """A float value brought to its grid and back."""
        grid = [
            self.constant(f"{name}.scale", np.float32(scale)),
            self.constant(f"{name}.zero_point", np.uint8(zero_point)),
        ]
        codes = self.add("QuantizeLinear", [source, *grid], f"{name}.codes")
        return self.add("DequantizeLinear", [codes, *grid], f"{name}.value")

    def integers(self, name: str, array: np.ndarray, scale: np.ndarray, axis: int) -> str:
        """Stored integers of a weight or bias, as floats; a scale per tensor () or per channel (C,)."""
        inputs = [
            self.constant(f"{name}.codes", array),
            self.constant(f"{name}.scale", scale.astype(np.float32)),
            self.constant(f"{name}.zero_point", np.zeros(scale.shape, array.dtype)),
        ]
        return self.add("DequantizeLinear", inputs, f"{name}.value", **({"axis": axis} if scale.ndim else {}))


def build_onnx(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    facts: dict[str, str] | None = None,
    integer_bias: bool = True,
) -> onnx.ModelProto:
    """The ONNX model of an eager int8 network (from `convert`): normalised images (B, 3, H, W) -> logits (B, classes).

    Args:
        image_shape: (3, H, W) of one image; the batch is free.
        facts: kept in the file as metadata, to tell of which run it is.
        integer_bias: store biases as int32 multiples of (input scale x weight scale), as integer hardware needs them; else as
            the float32 numbers that torch's kernels add.

    Raises:
        LabError: the network has an operation that is not known here, or onnx.checker refuses the result.
    """
    network = network.eval()
    modules, graph = dict(network.named_modules()), _Graph(integer_bias)
    traced = _Tracer().trace(network)
    for node in traced.nodes:
        if node.op == "placeholder":
            graph.values[node.name] = INPUT, None
        elif node.op == "output":
            name, grid = graph.values[node.args[0].name]
            graph.add("Identity", [name], OUTPUT)
        elif node.op == "call_module":
            _module(graph, node, modules[node.target])
        else:
            _function(graph, node)
    classes = [module.out_features for module in modules.values() if isinstance(module, _LINEAR)][-1]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "int8",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *image_shape])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])],
            graph.constants,
        ),
        producer_name="labcore",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, facts or {})
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise LabError(f"the ONNX model is refused by onnx.checker: {str(error).splitlines()[0]}") from error
    return model


def _module(graph: _Graph, node: fx.Node, module: nn.Module) -> None:
    name, (source, grid) = node.target, graph.values[node.args[0].name]
    if isinstance(module, nn.Identity | quantized.DeQuantize):
        graph.values[node.name] = source, grid
    elif isinstance(module, quantized.Quantize):
        _on_grid(graph, node, source, name, float(module.scale), int(module.zero_point))
    elif isinstance(module, _CONVOLUTION):
        attributes = {
            "strides": list(module.stride),
            "pads": [*module.padding, *module.padding],
            "dilations": list(module.dilation),
            "group": module.groups,
        }
        _layer(graph, node, module, "Conv", attributes)
    elif isinstance(module, _LINEAR):
        _layer(graph, node, module, "Gemm", {"transB": 1})
    elif isinstance(module, nn.MaxPool2d):
        size, stride, pad = (
            [value, value] if isinstance(value, int) else list(value)
            for value in (module.kernel_size, module.stride, module.padding)
        )
        pooled = graph.add("MaxPool", [source], name, kernel_shape=size, strides=stride, pads=[*pad, *pad])
        _on_grid(graph, node, pooled, f"{name}.out", *grid)
    elif isinstance(module, GlobalMaxPool2d | nn.AdaptiveAvgPool2d):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)):
            raise LabError(
                f"{name}: adaptive pooling must give 1 × 1, found {module.output_size}; change the network."
            )
        kind = "GlobalMaxPool" if isinstance(module, GlobalMaxPool2d) else "GlobalAveragePool"
        _on_grid(
            graph, node, graph.add(kind, [source], name), f"{name}.out", *grid
        )  # int8 pooling keeps the scale
    else:
        raise LabError(
            f"{name} is a {type(module).__name__}, which this export does not know; use a residual network."
        )


def _layer(graph: _Graph, node: fx.Node, module: nn.Module, kind: str, attributes: dict) -> None:
    """A convolution or linear layer: int8 weights, a bias in the accumulator's own integers, the output's grid."""
    name, (source, (scale_in, _)) = node.target, graph.values[node.args[0].name]
    weight, bias = module.weight(), module.bias()
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = (
        (weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale())).double().numpy()
    )
    inputs = [source, graph.integers(f"{name}.weight", weight.int_repr().numpy(), scale, axis=0)]
    if bias is not None and graph.integer_bias:
        step = np.asarray(scale_in * scale)  # of the accumulator
        inputs.append(graph.integers(f"{name}.bias", _bias_codes(bias, step), step, axis=0))
    elif bias is not None:
        inputs.append(graph.constant(f"{name}.bias", bias.detach().numpy()))
    out = graph.add(kind, inputs, name, **attributes)
    target = float(module.scale), int(module.zero_point)
    if isinstance(module, _RELU) and target[1] > 0:
        # On the grid first: engines fuse a layer with what quantizes it. Zero is on the grid, so nothing is rounded twice.
        out = graph.add("Relu", [graph.rounded(out, f"{name}.before_relu", *target)], f"{name}.relu")
    elif isinstance(module, _RELU):
        out = graph.add("Relu", [out], f"{name}.relu")
    _on_grid(graph, node, out, f"{name}.out", *target)


def _bias_codes(bias: Tensor, step: np.ndarray) -> np.ndarray:
    limits = np.iinfo(np.int32)
    return np.clip(np.rint(bias.detach().double().numpy() / step), limits.min, limits.max).astype(np.int32)


def _function(graph: _Graph, node: fx.Node) -> None:
    sources = [graph.values[part.name] for part in node.args if isinstance(part, fx.Node)]
    if node.target in _ADD:
        out = graph.add("Add", [name for name, _ in sources], node.name)
        if node.target is torch.ops.quantized.add_relu:
            out = graph.add("Relu", [out], f"{node.name}.relu")
        _on_grid(graph, node, out, f"{node.name}.out", node.kwargs["scale"], node.kwargs["zero_point"])
    elif node.target is torch.flatten:
        graph.values[node.name] = graph.add("Flatten", [sources[0][0]], node.name), sources[0][1]
    elif node.target is operator.mul:
        factor = next(part for part in node.args if not isinstance(part, fx.Node))
        constant = graph.constant(f"{node.name}.factor", np.float32(factor))
        graph.values[node.name] = graph.add("Mul", [sources[0][0], constant], node.name), None
    else:
        raise LabError(
            f"{node.target} is an operation that this export does not know; use a residual network."
        )


def _on_grid(graph: _Graph, node: fx.Node, source: str, name: str, scale: float, zero_point: int) -> None:
    graph.values[node.name] = (
        graph.rounded(source, name, float(scale), int(zero_point)),
        (float(scale), int(zero_point)),
    )


def save_onnx(path: Path, model: onnx.ModelProto) -> int:
    """Write the model, whole or not at all; returns its size in bytes."""
    with atomic_path(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
    return path.stat().st_size


def load_onnx(path: Path, facts: dict[str, str] | None = None) -> onnx.ModelProto:
    """Read a file that `save_onnx` wrote.

    Raises LabError where it is missing, damaged, no such network, or of another run (a fact that differs is named).
    """
    try:
        model = onnx.load_model_from_string(Path(path).read_bytes())
        onnx.checker.check_model(model, full_check=True)
    except FileNotFoundError:
        raise LabError(f"{path} is missing: run make report, which writes it.") from None
    except Exception as error:  # protobuf and the checker raise their own kinds
        raise LabError(
            f"{path} is damaged or no ONNX file ({type(error).__name__}); run make report again."
        ) from error
    found = {entry.key: entry.value for entry in model.metadata_props}
    for name, expected in (facts or {}).items():
        if found.get(name) != expected:
            raise LabError(
                f"{path} is of another run: {name} is {found.get(name, 'missing')}, expected {expected}; run make report again."
            )
    return model


def predict_onnx(model: onnx.ModelProto, batches: Iterable[Tensor], optimize: bool = True) -> np.ndarray:
    """Logits (N, classes) by ONNX Runtime on the CPU, for batches of normalised images (B, 3, H, W).

    Optimised, it replaces the nodes by integer kernels and rounds float biases itself; else it computes node by node.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.concatenate(
        [session.run([OUTPUT], {INPUT: batch.contiguous().numpy()})[0] for batch in batches]
    )
