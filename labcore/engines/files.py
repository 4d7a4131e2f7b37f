"""The files that engines load: one trained network, FP32 and INT8, in every engine's own format.

"power2" is notebook 02's network, "float" has float scales in the same ranges, "own" those of torchao,
"recommended" the scheme of study 1. Eager mode reads .pt, TorchScript .ts, torch.compile .pt2, others .onnx.
"""

import copy
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from labcore import first_line
from labcore.data import calibration_batches
from labcore.engines import export
from labcore.engines.eager import load_float, load_int8, save_int8
from labcore.engines.onnx_export import INPUT, OUTPUT, build_onnx, save_onnx
from labcore.files.artifacts import atomic_path
from labcore.files.progress import progress
from labcore.images.transforms import normalize
from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, CustomQConfig, make_qconfig
from labcore.quantize import calibrate, convert, prepare_ptq
from labcore.run import Run


def multiply_adds(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Count the multiply-adds of one image in convolutions and linear layers."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape))
    return counter.get_total_flops() // 2  # torch counts a multiplication and an addition


def write_images(path: Path, images: np.ndarray, chunk: int = 1000) -> None:
    """Write normalised images as a .npy file, float32 (N, 3, H, W), which workers map into memory."""
    with atomic_path(path) as partial:
        stored = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=images.shape)
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            stored[part] = normalize(torch.from_numpy(images[part])).numpy()
        stored.flush()


def write_files(run: Run, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the files of ENGINES in bench.py into a folder, of a run whose stages fp32 and ptq are done.

    Returns paths by file name, and for those that this machine's packages cannot write, the reason.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = run.path("fp32", "weights.pt")
    model, batches = load_float(weights, run.model()), calibration_batches(run.data, run.split)
    float_scales, recommended = (
        convert(calibrate(prepare_ptq(model, make_qconfig(*schemes)), batches))
        for schemes in ((FLOAT, FLOAT), RECOMMENDED)
    )
    power2 = load_int8(run.path("ptq", "int8.pt"), run.model(), CustomQConfig.POWER2.value)
    example = torch.zeros(2, *run.data.test_images.shape[1:])
    tasks = [  # file, the function that writes it, what that takes behind the path
        ("fp32.pt", Path.write_bytes, weights.read_bytes()),
        ("fp32.onnx", save_float_onnx, model, example),
        ("recommended.onnx", _save_int8_onnx, recommended, example),
        ("own.pt2", _save_exported, model, export.x86_quantizer(), batches),
    ]
    for name, network, scheme in (("power2", power2, REFERENCE), ("float", float_scales, FLOAT)):
        tasks += [
            (f"{name}.pt", save_int8, network),
            (f"{name}.ts", _save_script, network, example),
            (f"{name}.onnx", _save_int8_onnx, network, example),
            (f"{name}.pt2", _save_exported, model, export.PowerOfTwoQuantizer(scheme, scheme), batches),
        ]
    files, failed = {}, {}
    with progress(len(tasks), "files", unit="file") as bar:
        for name, save, *arguments in tasks:
            try:
                with warnings.catch_warnings(action="ignore"):  # of torch's exporters, about themselves
                    save(folder / name, *arguments)
                files[name] = folder / name
            except Exception as error:  # whatever an exporter raises, the other engines go on
                failed[name] = f"its file cannot be written ({first_line(error)})"
            bar.update()
    return files, failed


def save_float_onnx(path: Path, model: nn.Module, example: Tensor) -> None:
    """Write the FP32 network through torch.onnx; `example` has the shape (B, 3, H, W) of a batch."""
    names = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": ({0: "batch"},)}
    program = torch.onnx.export(model, (example,), verbose=False, **names)
    save_onnx(path, program.model_proto)


def _save_int8_onnx(path: Path, network: nn.Module, example: Tensor) -> None:
    save_onnx(path, build_onnx(network, example.shape[1:]))


@torch.no_grad()
def _save_script(path: Path, network: nn.Module, example: Tensor) -> None:
    traced = torch.jit.trace(network.eval(), example)
    torch.jit.save(torch.jit.freeze(traced), path)


@torch.no_grad()
def _save_exported(path: Path, model: nn.Module, quantizer, batches: list[Tensor]) -> None:
    prepared = export.prepare_export(model, quantizer, batches[0])
    for batch in batches:
        prepared(batch)
    converted = export.weights_per_channel(export.convert_export(prepared))
    converted = fx.GraphModule(converted, converted.graph)  # leaves out the float weights, no longer used
    example = torch.zeros(2, *batches[0].shape[1:])
    torch.export.save(torch.export.export(converted, (example,), dynamic_shapes=export.BATCH), path)
