"""Where a training computes: the device, the numbers that it multiplies, and how much of a batch it holds."""

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.parallel import DistributedDataParallel

from labcore import LabError
from labcore.files.provenance import cpu_name
from labcore.training.distributed import current_world

# What torch and libraries of the GPU say; cuDNN tries all its ways first.
NO_MEMORY = ("out of memory", "unable to find an engine", "CUDNN_STATUS_ALLOC", "CUBLAS_STATUS_ALLOC")


def device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def multiplies_bfloat16() -> bool:
    """Return whether bfloat16 is faster than float32: on GPUs, CPUs with AMX, and AMD's with AVX512-BF16.

    Intel's have one unit for AVX512-BF16 and two for float32 (docs/benchmarks).
    """
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    has_avx = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return has_amx or has_avx and "Intel" not in cpu_name()


def is_fake_quantized(model: nn.Module) -> bool:
    """Return whether the network was prepared for QAT."""
    return any(isinstance(module, FakeQuantizeBase) for module in model.modules())


def autocast_dtype(model: nn.Module) -> torch.dtype:
    """Return what a training step multiplies: float32 unless all scales of QAT are powers of two.

    A code times another scale is rounded in bfloat16, and leaves the grid by up to most of a step.
    """
    has_float_scales = any(
        getattr(fake.activation_post_process, "rule", "none") == "none"  # torch's observers have no rule
        for fake in model.modules()
        if isinstance(fake, FakeQuantizeBase) and not hasattr(fake, "log2_scale")  # a learned exponent
    )
    return torch.bfloat16 if multiplies_bfloat16() and not has_float_scales else torch.float32


def autocast(model: nn.Module) -> contextlib.AbstractContextManager:
    """Return the context in which a network computes: bfloat16 where `autocast_dtype` says so.

    QAT trains so too: bfloat16 holds every integer up to 256, so 8-bit codes lose nothing. It is scored in
    float32, since it then predicts what the int8 kernels compute.
    """
    if is_fake_quantized(model) and not model.training:
        return contextlib.nullcontext()
    return torch.autocast(device().type, torch.bfloat16, enabled=autocast_dtype(model) is torch.bfloat16)


def forward_of(model: nn.Module) -> nn.Module:
    """Return what batches go through: the network, shared by several processes, compiled on a GPU."""
    network = model
    if current_world().size > 1:
        gpus = [torch.cuda.current_device()] if device().type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=gpus)
    if device().type == "cuda" and not is_fake_quantized(model):  # fake quantization has no graph to compile
        torch._dynamo.config.suppress_errors = True  # without a C compiler it trains uncompiled
        network = torch.compile(network)
    return network


def say_if_not_compiled(network: nn.Module) -> None:
    """Print a note where torch only warned that it cannot compile: a notebook's warnings are not kept."""
    if current_world().rank > 0 or not hasattr(network, "_orig_mod"):  # that of torch.compile
        return
    if not torch._dynamo.utils.counters["frames"]["ok"]:
        _print_once("note: torch could not compile the network (is there a C compiler?); it trains slower.")


@lru_cache
def _print_once(text: str) -> None:
    print(text)


def in_parts(
    backward: Callable[[slice], tuple[Tensor, Tensor]], network: nn.Module, n_images: int, part: int
) -> tuple[Tensor, Tensor, int]:
    """Call backward(rows) for a batch, `part` images at a time; half as many where memory runs out.

    The batch then begins again: BatchNorm statistics, and ranges of QAT, have seen some images twice. Return
    the sums of what `backward` returned, and the part that memory held. Raise LabError where one image is too
    much, and among several processes, since the others would not know.
    """
    loss, hits, is_alone = 0, 0, current_world().size == 1
    network.zero_grad(set_to_none=True)
    try:
        for start in range(0, n_images, part):
            # DistributedDataParallel averages the gradients once, after the last part.
            is_last = start + part >= n_images
            with contextlib.nullcontext() if is_last or is_alone else network.no_sync():
                part_loss, part_hits = backward(slice(start, start + part))
            loss, hits = loss + part_loss, hits + part_hits
        return loss, hits, part
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_MEMORY):
            raise
    # Here the error is gone, and the tensors that it held.
    if part == 1:
        raise LabError("out of GPU memory with one image at a time; use a narrower network or a larger GPU.")
    if not is_alone:
        raise LabError(f"out of GPU memory with {part} images at a time; set micro_batch below that.")
    torch.cuda.empty_cache()
    part = math.ceil(part / 2)
    print(f"note: out of GPU memory; going on with {part} images at a time, which BatchNorm averages over.")
    return in_parts(backward, network, n_images, part)
