"""The files that engines load: one trained network, FP32 and INT8, in every engine's own format. Nothing is trained here.

All files called "power2" hold the integers and scales of notebook 02; "float" has the same ranges of the same calibration images
and does not round its scales to powers of two. "own" lets torchao's X86InductorQuantizer choose its scales. "recommended" has the
powers of two that study 1 recommends.
"""

import copy
import operator
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from labcore.data import calibration_batches
from labcore.engines.eager import load_float, load_int8, save_int8
from labcore.engines.export import convert_export, prepare_export, quiet
from labcore.engines.onnx_export import INPUT, OUTPUT, build_onnx, save_onnx
from labcore.files.artifacts import atomic_path
from labcore.files.progress import progress
from labcore.files.tensors import first_line
from labcore.images.transforms import normalize
from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, CustomQConfig, has_vnni, make_qconfig
from labcore.quantize import calibrate, convert, fuse, prepare_ptq
from labcore.run import Run

with quiet():
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )
_DECOMPOSED = torch.ops.quantized_decomposed
_BATCH = ({0: torch.export.Dim.DYNAMIC},)  # the number of images stays free


def multiply_adds(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image through the convolutions and linear layers; torch counts two operations for each."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape))
    return counter.get_total_flops() // 2


def write_images(path: Path, images: np.ndarray, chunk: int = 1000) -> None:
    """Normalised images as a .npy file, float32 (N, 3, H, W), which workers map into memory."""
    with atomic_path(path) as partial, open(partial, "wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": images.shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(images), chunk):
            part = normalize(torch.from_numpy(images[start : start + chunk]))
            stream.write(np.ascontiguousarray(part.numpy()).tobytes())


def write_files(run: Run, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write what labcore.engines.ENGINES names.

    Args:
        run: whose stages fp32 and ptq are done.
        folder: for the files; what was there goes.

    Returns:
        Paths by file name, and for those that this machine's packages cannot write, the reason.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = load_float(run.path("fp32", "weights.pt"), run.model())
    power2 = load_int8(run.path("ptq", "int8.pt"), run.model(), CustomQConfig.POWER2.value)
    float_scales, recommended = (
        convert(
            calibrate(prepare_ptq(model, make_qconfig(*schemes)), calibration_batches(run.data, run.split))
        )
        for schemes in ((FLOAT, FLOAT), RECOMMENDED)
    )
    batches = calibration_batches(run.data, run.split)
    shape = run.data.test_images.shape[1:]
    networks = {"power2": power2, "float": float_scales}
    writers: dict[str, Callable[[Path], object]] = {
        "fp32.pt": lambda path: shutil.copyfile(run.path("fp32", "weights.pt"), path),
        "fp32.onnx": lambda path: _float_onnx(path, model, shape),
        "recommended.onnx": partial(_save_onnx, network=recommended, shape=shape),
        "own.pt2": lambda path: _save_program(path, _own(model, batches), batches[0]),
    }
    for name, network in networks.items():
        scheme = {"power2": REFERENCE, "float": FLOAT}[name]
        writers |= {
            f"{name}.pt": partial(save_int8, model=network),
            f"{name}.ts": partial(_save_script, network=network, example=batches[0]),
            f"{name}.onnx": partial(_save_onnx, network=network, shape=shape),
            f"{name}.pt2": partial(_save_exported, model=model, scheme=scheme, batches=batches),
        }
    files, failed = {}, {}
    with progress(len(writers), "files", unit="file") as bar:
        for name, write in writers.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch's exporters, about themselves
                    write(folder / name)
                files[name] = folder / name
            except Exception as error:  # whatever an exporter raises, the other engines go on
                failed[name] = f"its file cannot be written ({first_line(error)})"
            bar.update()
    return files, failed


def _save_onnx(path: Path, network: nn.Module, shape: tuple[int, int, int]) -> None:
    save_onnx(path, build_onnx(network, shape))


def _float_onnx(path: Path, model: nn.Module, shape: tuple[int, int, int]) -> None:
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *shape),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=_BATCH,
        dynamo=True,
        verbose=False,
    )
    save_onnx(path, program.model_proto)


@torch.no_grad()
def _save_script(path: Path, network: nn.Module, example: Tensor) -> None:
    traced = torch.jit.trace(network.eval(), example[:2].clone())
    torch.jit.save(torch.jit.freeze(traced), path)


@torch.no_grad()
def _save_exported(path: Path, model: nn.Module, scheme, batches: list[Tensor]) -> None:
    prepared = prepare_export(model, scheme, scheme, batches[0])
    for batch in batches:
        prepared(batch)
    _save_program(path, weights_per_channel(convert_export(prepared)), batches[0])


@torch.no_grad()
def _own(model: nn.Module, batches: list[Tensor]) -> fx.GraphModule:
    """PTQ as torchao's documentation has it for x86: its own quantizer with its default configuration."""
    quantizer = X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(reduce_range=not has_vnni())
    )
    program = torch.export.export(fuse(model), (batches[0][:2].clone(),), dynamic_shapes=_BATCH)
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


def weights_per_channel(converted: fx.GraphModule) -> fx.GraphModule:
    """The same program, the scale of each weight tensor written once per channel. In place.

    Inductor's patterns for int8 kernels know weights with a scale per channel only; those with one scale would be multiplied in
    float.
    """
    graph = converted.graph
    for node in list(graph.nodes):
        if node.target is not _DECOMPOSED.dequantize_per_tensor.default or node.args[0].op != "get_attr":
            continue
        stored, scale, zero_point, *rest = node.args
        weight = operator.attrgetter(stored.target)(converted)
        inputs = []
        for kind, value, dtype in (
            ("scales", scale, torch.float32),
            ("zero_points", zero_point, torch.int64),
        ):
            if isinstance(value, fx.Node):
                value = operator.attrgetter(value.target)(converted)
            name = f"{stored.target.replace('.', '_')}_{kind}"
            channels = torch.as_tensor(value, dtype=dtype).flatten().repeat(len(weight))
            converted.register_buffer(name, channels)
            with graph.inserting_before(node):
                inputs.append(graph.get_attr(name))
        with graph.inserting_before(node):
            new = graph.call_function(_DECOMPOSED.dequantize_per_channel.default, (stored, *inputs, 0, *rest))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.lint()
    converted.recompile()
    return converted


def _save_program(path: Path, converted: fx.GraphModule, example: Tensor) -> None:
    """Write a converted program without the float weights, which it no longer uses."""
    used = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*converted.named_parameters(), *converted.named_buffers())]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(converted.get_submodule(owner), leaf)
    program = torch.export.export(converted, (example[:2].clone(),), dynamic_shapes=_BATCH)
    torch.export.save(program, path)
