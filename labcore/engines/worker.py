"""The process that runs one engine: `python -m labcore.engines.worker`, driven by labcore.engines.bench.

So its memory and threads are its own, and a crash takes nothing else along. Requests and answers are lines of
JSON. An engine takes normalised images, float32 (B, 3, H, W) in numpy's order, and gives logits, float32
(B, classes). To bring images into its own layout is part of its time.
"""

import json
import os
import sys
import timeit
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

BATCH = 64  # images at a time where accuracy is measured; the last batch is filled up
Network = Callable[[np.ndarray], np.ndarray]
MEMORY: dict[str, float | None] = {}  # of this process, in MB of 10^6 bytes


def memory_mb(field: str, status: Path = Path("/proc/self/status")) -> float | None:
    """Return this process's memory, now ("VmRSS") or at its peak ("VmHWM"); None where that is unknown."""
    lines = status.read_text().splitlines() if status.exists() else []
    kb = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return kb[0] * 1024 / 1e6 if kb else None  # getrusage would count the parent's peak


def _torch(spec: dict):
    """Import torch, set to the threads and the int8 kernels that were asked for, without gradients."""
    import torch

    import labcore.quantize  # noqa: F401 (some engines need it; all import it, since their memory is compared)

    torch.set_num_threads(spec["threads"])
    torch.set_grad_enabled(False)
    if "kernels" in spec:
        torch.backends.quantized.engine = spec["kernels"]  # RuntimeError where this processor has none
    return torch


def torch_float(spec: dict) -> Network:
    """Load an FP32 network, channels_last, perhaps fused, perhaps compiled for every batch size."""
    torch = _torch(spec)
    from labcore.engines.eager import load_float
    from labcore.model import build_model
    from labcore.quantize import fuse

    if spec.get("compiled"):
        torch._inductor.config.freezing = True  # weights are constants
    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    model = load_float(Path(spec["path"]), build_model(*spec["network"]))
    if spec.get("fused"):
        model = fuse(model).to(memory_format=torch.channels_last)
    if spec.get("compiled"):
        model = torch.compile(model, dynamic=False)
    return lambda images: model(torch.from_numpy(images).to(memory_format=torch.channels_last)).numpy()


def torch_int8(spec: dict) -> Network:
    """Load an int8 network: as `convert` made it (.pt), or traced and frozen for TorchScript (.ts)."""
    torch = _torch(spec)
    from labcore.engines.eager import load_int8
    from labcore.model import build_model
    from labcore.qconfig import CustomQConfig

    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    path = Path(spec["path"])
    if path.suffix == ".ts":
        model = torch.jit.load(path)
    else:
        model = load_int8(path, build_model(*spec["network"]), CustomQConfig.POWER2.value)
    return lambda images: model(torch.from_numpy(images)).numpy()


def torch_export(spec: dict) -> Network:
    """Load a program of PyTorch 2 Export, compiled by Inductor with torchao's int8 patterns."""
    torch = _torch(spec)
    # Importing it registers the patterns; without them Inductor dequantizes and computes in float.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    from torch._dynamo.utils import counters

    torch._inductor.config.freezing = True
    torch._inductor.config.fx_graph_cache = False  # what comes from the cache is not counted below
    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    program = torch.export.load(spec["path"])
    model = torch.compile(program.module(), dynamic=False)
    model(torch.zeros(1, *np.load(spec["images"], mmap_mode="r").shape[1:]))
    expected = sum("conv2d" in str(node.target) for node in program.graph.nodes)
    made = counters["inductor"]["qconv_weight_prepack_matcher_count"]
    if made < expected:
        raise RuntimeError(f"Inductor made {made} of {expected} convolutions int8")
    return lambda images: model(torch.from_numpy(images)).numpy()


def onnx_runtime(spec: dict) -> Network:
    """Load for ONNX Runtime on the CPU, all graph optimisations on."""
    import onnxruntime

    @lru_cache
    def session(batch: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", batch)
        return onnxruntime.InferenceSession(spec["path"], options, providers=["CPUExecutionProvider"])

    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    return lambda images: session(len(images)).run(None, {"images": images})[0]


def openvino(spec: dict) -> Network:
    """Load for OpenVINO on the CPU, one request at a time, in float32 where nothing is quantized."""
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": spec["threads"],
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the processor has it
    }

    @lru_cache
    def request(batch: int) -> openvino.InferRequest:
        model = core.read_model(spec["path"])
        model.reshape([batch, *model.inputs[0].partial_shape[1:]])
        return core.compile_model(model, "CPU", options).create_infer_request()

    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    return lambda images: request(len(images)).infer({0: images}, share_inputs=True)[0]


def matrix(spec: dict) -> Network:
    """Make a roof: torch multiplies two matrices of `size`, FP32, or INT8 with the fastest of its kernels."""
    torch = _torch(spec)
    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    torch.manual_seed(0)
    a, b = torch.randn(2, spec["size"], spec["size"]).unbind()
    if spec["numbers"] == "FP32":
        return lambda _: torch.mm(a, b)
    a_uint8 = torch.quantize_per_tensor(a.abs(), 1 / 64, 0, torch.quint8)
    b_int8 = torch.quantize_per_tensor(b, 1 / 32, 0, torch.qint8)

    def product(kernels: str) -> Network:
        torch.backends.quantized.engine = kernels
        packed = torch.ops.quantized.linear_prepack(b_int8, None)
        return lambda _: torch.ops.quantized.linear(a_uint8, packed, 4.0, 64)

    supported = torch.backends.quantized.supported_engines
    return product(min(supported, key=lambda kernels: min(time_ms(product(kernels), None, runs=3))))


def batch(images: np.ndarray, size: int, start: int = 0) -> np.ndarray:
    """Return images from `start` on, in memory; from the first of them again where there are fewer."""
    part = images[start : start + size]
    return np.ascontiguousarray(np.resize(part, (size, *part.shape[1:])))


def time_ms(network: Network, images: np.ndarray | None, runs: int) -> list[float]:
    """Return the milliseconds of each run; one before does not count, since another engine had the caches."""
    network(images)
    return [1000 * seconds for seconds in timeit.repeat(lambda: network(images), number=1, repeat=runs)]


def reason(error: Exception) -> str:
    """Say in one line why an engine cannot run."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed (it stands in requirements.txt)"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    """Answer requests until the input ends; the first says which engine. A failure is answered too."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    network, images = None, np.zeros((1, 1))  # a roof has no images
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if network is None:
                network = globals()[request["kind"]](request)  # the function above of that name
                if "images" in request:
                    images = np.load(request["images"], mmap_mode="r")
                for size in request["batches"]:
                    time_ms(network, batch(images, size), runs=2)
                answer = MEMORY | {"peak_mb": memory_mb("VmHWM")}
            elif request["do"] == "time":
                answer = {"ms": time_ms(network, batch(images, request["batch"]), request["runs"])}
            else:
                logits = network(batch(images, BATCH, request["start"]))
                answer = {"logits": logits.astype(np.float32).tolist()}
        except Exception as error:  # whatever a library raises, the row says why it is empty
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
