"""The process that runs one engine: `python -m labcore.engines.worker`, driven by labcore.engines.bench.

So its memory and threads are its own, and a crash takes nothing else along. Requests and answers are lines of
JSON. An engine takes normalised images, float32 (B, 3, H, W) in numpy's order, and gives logits, float32
(B, classes). To bring images into its own layout is part of its time.

peak_mb is the memory at its peak while the network was loaded and ran the largest batch size, compiled for no
other yet: what one session or program takes, on every engine.
"""

import json
import os
import queue
import signal
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

BATCH = 64  # images at a time where accuracy is measured; the last batch is filled up
Network = Callable[[np.ndarray], np.ndarray]
MEMORY: dict[str, float | None] = {}  # of this process, in MB of 10^6 bytes


class Engine(NamedTuple):
    """A network that is loaded."""

    run: Network
    # For a batch that ran: how many of its convolutions compute in integers, and how many there are.
    integers: Callable[[np.ndarray], tuple[int, int]] | None = None


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


def torch_float(spec: dict) -> Engine:
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
    return Engine(
        lambda images: model(torch.from_numpy(images).to(memory_format=torch.channels_last)).numpy()
    )


def torch_int8(spec: dict) -> Engine:
    """Load an int8 network: as `convert` made it (.pt), or traced and frozen for TorchScript (.ts)."""
    torch = _torch(spec)
    from torch.ao.nn import quantized

    from labcore.engines.eager import load_int8
    from labcore.model import build_model
    from labcore.qconfig import CustomQConfig

    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    path = Path(spec["path"])
    if path.suffix == ".ts":
        model = torch.jit.load(path)
        kinds = [node.kind() for node in model.inlined_graph.nodes()]
        kinds = [kind for kind in kinds if "conv" in kind and "prepack" not in kind]
        convolutions = [kind.startswith("quantized::") for kind in kinds]
    else:
        model = load_int8(path, build_model(*spec["network"]), CustomQConfig.POWER2.value)
        both = torch.nn.Conv2d, quantized.Conv2d
        convolutions = [isinstance(m, quantized.Conv2d) for m in model.modules() if isinstance(m, both)]
    counted = sum(convolutions), len(convolutions)
    return Engine(lambda images: model(torch.from_numpy(images)).numpy(), lambda _: counted)


def torch_export(spec: dict) -> Engine:
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
    expected = sum("conv2d" in str(node.target) for node in program.graph.nodes)

    def integers(_: np.ndarray) -> tuple[int, int]:
        # Of the program compiled last: there is one for each batch size.
        return counters["inductor"].pop("qconv_weight_prepack_matcher_count", 0), expected

    return Engine(lambda images: model(torch.from_numpy(images)).numpy(), integers)


def onnx_runtime(spec: dict) -> Engine:
    """Load for ONNX Runtime on the CPU, all graph optimisations on."""
    import onnxruntime

    def start(batch: int, **profiling) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", batch)
        for name, value in profiling.items():
            setattr(options, name, value)
        return onnxruntime.InferenceSession(spec["path"], options, providers=["CPUExecutionProvider"])

    def integers(images: np.ndarray) -> tuple[int, int]:
        profiled = start(len(images), enable_profiling=True, profile_file_prefix=spec["path"])
        profiled.run(None, {"images": images})
        profile = Path(profiled.end_profiling())
        events = json.loads(profile.read_text(encoding="utf-8"))
        profile.unlink()
        kernels = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
        convolutions = [kernel for kernel in kernels if "Conv" in kernel]
        return sum(kernel in ("QLinearConv", "ConvInteger") for kernel in convolutions), len(convolutions)

    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    session = lru_cache(start)
    return Engine(lambda images: session(len(images)).run(None, {"images": images})[0], integers)


def openvino(spec: dict) -> Engine:
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

    def integers(images: np.ndarray) -> tuple[int, int]:
        running = request(len(images)).get_compiled_model().get_runtime_model()
        layers = [
            {name: f"{value.value}" for name, value in op.get_rt_info().items()} for op in running.get_ops()
        ]
        convolutions = [layer for layer in layers if "Convolution" in layer.get("layerType", "")]
        return sum(layer["runtimePrecision"] in ("u8", "i8") for layer in convolutions), len(convolutions)

    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    return Engine(lambda images: request(len(images)).infer({0: images}, share_inputs=True)[0], integers)


def matrix(spec: dict) -> Engine:
    """Make a roof: torch multiplies two matrices of `size`, FP32, or INT8 with the fastest of its kernels.

    Which is the fastest is found when it is first run.
    """
    torch = _torch(spec)
    MEMORY["libraries_mb"] = memory_mb("VmRSS")
    torch.manual_seed(0)
    a, b = torch.randn(2, spec["size"], spec["size"]).unbind()
    if spec["numbers"] == "FP32":
        return Engine(lambda _: torch.mm(a, b))
    a_uint8 = torch.quantize_per_tensor(a.abs(), 1 / 64, 0, torch.quint8)
    b_int8 = torch.quantize_per_tensor(b, 1 / 32, 0, torch.qint8)

    def product(kernels: str) -> Network:
        torch.backends.quantized.engine = kernels
        packed = torch.ops.quantized.linear_prepack(b_int8, None)
        return lambda _: torch.ops.quantized.linear(a_uint8, packed, 4.0, 64)

    @lru_cache
    def fastest() -> Network:
        products = [product(kernels) for kernels in torch.backends.quantized.supported_engines]
        return min(products, key=lambda each: min(time_ms(each, None, runs=3)))

    return Engine(lambda _: fastest()(None))


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


def load(spec: dict) -> tuple[Network, np.ndarray]:
    """Return what runs an engine, after it ran every batch size, and the images.

    Raises RuntimeError where an int8 engine computes a convolution in float at one of the sizes. A roof has
    no images, and first runs when it is timed: only then nothing else is at work.
    """
    engine = globals()[spec["kind"]](spec)  # the function above of that name
    if "images" not in spec:
        return engine.run, np.zeros((1, 1))
    images = np.load(spec["images"], mmap_mode="r")
    for size in sorted(spec["batches"], reverse=True):
        part = batch(images, size)
        time_ms(engine.run, part, runs=2)
        MEMORY.setdefault("peak_mb", memory_mb("VmHWM"))
        if spec.get("int8"):
            made, total = engine.integers(part)
            if made < total or not total:
                raise RuntimeError(f"{made} of {total} convolutions are int8, at {size} images a time")
    return engine.run, images


def requests() -> Iterator[dict]:
    """Yield what the parent asks; when it is gone, however it ended, end this process and all it started."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()  # the other may compile for minutes
    while True:
        yield json.loads(lines.get())


def main() -> None:
    """Answer requests; the first says which engine. A failure is answered too."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    network = None
    for request in requests():
        try:
            if network is None:
                network, images = load(request)
                answer = MEMORY
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
