"""The process that runs one engine: `python -m labcore.engine_worker`, driven through its standard input by labcore.engines.

Every engine has a process of its own, so that its memory is its own, its threads are as many as it was told, and a crash takes
nothing else along. Requests and answers are lines of JSON. An engine takes normalised images, float32 (B, 3, H, W) in numpy's
order, and gives logits, float32 (B, classes); what it does to bring the images into its own layout is part of its time.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

BATCH = 64  # images at a time where accuracy is measured; the last batch is filled up
Network = Callable[[np.ndarray], np.ndarray]


def _torch(spec: dict):
    """Torch with the threads and the int8 kernels that were asked for, without gradients."""
    import torch

    import labcore.quantize  # noqa: F401  # what all kinds of torch need, or none: memory is compared

    torch.set_num_threads(spec["threads"])
    torch.set_grad_enabled(False)
    if engine := spec.get("kernels"):
        if engine not in torch.backends.quantized.supported_engines:
            raise RuntimeError(f"torch has no {engine} kernels for this processor")
        torch.backends.quantized.engine = engine
    return torch


def _through_torch(torch, model) -> Network:
    return lambda images: model(torch.from_numpy(images)).numpy()


def torch_eager(spec: dict) -> Iterator[Network | None]:
    """torch, operation by operation: the FP32 network channels_last, perhaps fused, or an int8 network as `convert` made it."""
    torch = _torch(spec)
    from labcore.engines.eager import load_float, load_int8
    from labcore.model import build_model
    from labcore.qconfig import CustomQConfig
    from labcore.quantize import fuse

    yield None
    path, model = Path(spec["path"]), build_model(*spec["network"])
    if spec.get("kernels"):
        yield _through_torch(torch, load_int8(path, model, CustomQConfig.POWER2.value))
    model = load_float(path, model)
    if spec.get("fused"):
        model = fuse(model).to(memory_format=torch.channels_last)
    yield lambda images: model(torch.from_numpy(images).to(memory_format=torch.channels_last)).numpy()


def torch_compiled(spec: dict) -> Iterator[Network | None]:
    """torch.compile: Inductor turns the FP32 network into C++ once for every batch size."""
    torch = _torch(spec)
    from labcore.engines.eager import load_float
    from labcore.model import build_model

    torch._inductor.config.freezing = True  # weights are constants
    yield None
    model = torch.compile(load_float(Path(spec["path"]), build_model(*spec["network"])), dynamic=False)
    yield lambda images: model(torch.from_numpy(images).to(memory_format=torch.channels_last)).numpy()


def torch_script(spec: dict) -> Iterator[Network | None]:
    """A traced and frozen network, run by TorchScript's interpreter."""
    torch = _torch(spec)
    yield None
    yield _through_torch(torch, torch.jit.load(spec["path"]))


def torch_export(spec: dict) -> Iterator[Network | None]:
    """A program of PyTorch 2 Export with quantize and dequantize nodes, compiled by Inductor with torchao's int8 patterns."""
    torch = _torch(spec)
    # Importing it registers the patterns; without them Inductor dequantizes and computes in float.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    from torch._inductor.utils import run_and_get_code

    torch._inductor.config.freezing = True
    torch._inductor.config.fx_graph_cache = False  # so that the code below can be read
    yield None
    program = torch.export.load(spec["path"])
    model = torch.compile(program.module(), dynamic=False)
    _, code = run_and_get_code(model, torch.zeros(1, *spec["image_shape"]))
    wanted = sum("conv2d" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    found = len(
        re.findall(r"= torch\.ops\.onednn\.qconv|^\s+torch\.ops\.onednn\.qconv", "".join(code), re.MULTILINE)
    )
    if found < wanted:
        raise RuntimeError(f"Inductor made {found} of {wanted} convolutions int8")
    yield _through_torch(torch, model)


def onnx_runtime(spec: dict) -> Iterator[Network | None]:
    """ONNX Runtime on the CPU, all graph optimisations on."""
    import onnxruntime

    def session(batch: int, free: str = "batch") -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name(free, batch)
        return onnxruntime.InferenceSession(spec["path"], options, providers=["CPUExecutionProvider"])

    yield None
    first = session(1, "").get_inputs()[0]
    made = lru_cache(lambda batch: session(batch, first.shape[0]))
    yield lambda images: made(len(images)).run(None, {first.name: images})[0]


def openvino(spec: dict) -> Iterator[Network | None]:
    """OpenVINO on the CPU, told to answer one request at a time and to keep to float32 where nothing is quantized."""
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": spec["threads"],
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the processor has it
    }
    yield None

    @lru_cache
    def made(batch: int) -> openvino.InferRequest:
        model = core.read_model(spec["path"])
        model.reshape([batch, *model.inputs[0].partial_shape[1:]])
        return core.compile_model(model, "CPU", options).create_infer_request()

    yield lambda images: made(len(images)).infer({0: images}, share_inputs=True)[0]


def matrix_fp32(spec: dict) -> Iterator[Network | None]:
    """The roof of the FP32 engines: torch multiplies two matrices of `size`."""
    torch = _torch(spec)
    yield None
    torch.manual_seed(0)
    a, b = torch.randn(2, spec["size"], spec["size"]).unbind()
    yield lambda images: torch.mm(a, b)


def matrix_int8(spec: dict) -> Iterator[Network | None]:
    """The roof of the INT8 engines: torch's quantized linear layer multiplies two matrices of `size`, uint8 by int8, with the
    fastest of its kernels.
    """
    torch = _torch(spec)
    yield None
    torch.manual_seed(0)
    size, seconds = spec["size"], {}
    a = torch.quantize_per_tensor(torch.rand(size, size), 1 / 127, 0, torch.quint8)
    weight = torch.quantize_per_tensor(torch.randn(size, size), 1 / 32, 0, torch.qint8)
    for engine in torch.backends.quantized.supported_engines:
        if engine == "none":
            continue
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(weight, None)
        for _ in range(3):
            began = time.perf_counter()
            torch.ops.quantized.linear(a, packed, 4.0, 64)
            seconds[engine] = min(time.perf_counter() - began, seconds.get(engine, math.inf))
    torch.backends.quantized.engine = min(seconds, key=seconds.get)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    yield lambda images: torch.ops.quantized.linear(a, packed, 4.0, 64)


ENGINES = {
    function.__name__: function
    for function in (
        torch_eager,
        torch_compiled,
        torch_script,
        torch_export,
        onnx_runtime,
        openvino,
        matrix_fp32,
        matrix_int8,
    )
}


def memory_mb(field: str) -> float | None:
    """This process's resident memory in MB of 10^6 bytes, now ("VmRSS") or at its peak ("VmHWM"); None where the system does not say.

    The peak is Linux's own per process, since getrusage would start from that of the parent.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kb = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if kb is None else int(kb) * 1024 / 1e6


class Engine:
    """The engine of this process, and what it can be asked."""

    def __init__(self, spec: dict):
        steps = ENGINES[spec["kind"]](spec)
        next(steps)
        self.libraries_mb = memory_mb("VmRSS")
        self.network: Network = next(steps)
        self.images = np.load(spec["images"], mmap_mode="r") if spec.get("images") else np.zeros((1, 1))

    def batch(self, size: int) -> np.ndarray:
        """The first images, in memory; from the first again where there are fewer."""
        return np.ascontiguousarray(np.resize(self.images[:size], (size, *self.images.shape[1:])))

    def warm(self, batches: list[int]) -> dict:
        """Run every batch size three times, and say how much memory that took at its peak."""
        for size in batches:
            images = self.batch(size)
            for _ in range(3):
                self.network(images)
        return {"libraries_mb": self.libraries_mb, "peak_mb": memory_mb("VmHWM")}

    def time(self, batch: int, runs: int) -> dict:
        """Milliseconds of so many runs, after one that does not count: another engine had the caches before."""
        images = self.batch(batch)
        self.network(images)
        found = []
        for _ in range(runs):
            began = time.perf_counter()
            self.network(images)
            found.append(1000 * (time.perf_counter() - began))
        return {"ms": found}

    def predict(self, start: int) -> dict:
        """Logits of a batch of images from `start` on, as lists."""
        images = np.ascontiguousarray(self.images[start : start + BATCH])
        count = len(images)
        if count < BATCH:
            images = np.concatenate([images, np.repeat(images[-1:], BATCH - count, axis=0)])
        return {"logits": self.network(images)[:count].astype(np.float32).tolist()}


def main() -> None:
    """Answer requests until the input ends. The first line says which engine; what fails is answered as {"error": …}."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                engine, answer = Engine(request), {}
            else:
                answer = getattr(engine, request.pop("do"))(**request)
        except Exception as error:  # whatever a library raises, the row says why it is empty
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
