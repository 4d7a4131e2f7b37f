"""What int8 kernels compute: with exact sums, without VNNI, and which integers they multiply."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labcore.evaluate import predict
from labcore.files.processes import end_with_parent
from labcore.qconfig import Scheme, has_vnni, make_qconfig
from labcore.quantize import calibrate, convert_simulated, layers, prepare_ptq, simulate
from labcore.studies.mixed import codes


def run_exactly(simulated: nn.Module, activation_bits: int = 8) -> nn.Module:
    """Return a simulated network on int8 kernels where these add exactly, else as it is; to be judged."""
    return convert_simulated(simulated) if activation_bits == 8 and has_vnni() else simulated


def predict_ptq(model: nn.Module, weight: Scheme, activation: Scheme, batches, images) -> np.ndarray:
    """Return logits (N, classes) for uint8 images (N, 3, H, W) after PTQ, on int8 kernels."""
    prepared = prepare_ptq(model, make_qconfig(weight, activation, "simulated"))
    return predict(convert_simulated(simulate(calibrate(prepared, batches))), images)


def on_onednn(call: Callable[..., np.ndarray], *args, isa: str = "DEFAULT") -> np.ndarray:
    """Return what call(*args), of a function of a module, gives on oneDNN's int8 kernels.

    In a process of its own, since oneDNN reads once what it may use at most: `isa`. "AVX2" has no VNNI.
    """
    multiprocessing.set_forkserver_preload([__name__])  # its imports take seconds, and are made once
    context, initargs = multiprocessing.get_context("forkserver"), (isa, torch.get_num_threads())
    with ProcessPoolExecutor(1, context, initializer=_use_onednn, initargs=initargs) as pool:
        return pool.submit(call, *args).result()


def _use_onednn(isa: str, threads: int) -> None:
    end_with_parent()
    os.environ["ONEDNN_MAX_CPU_ISA"] = isa
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = "onednn"


def saturated_16_bits(activations: Tensor, weights: Tensor) -> Tensor:
    """Return dot products as x86 computes them without VNNI: pairs of products saturate at 16 bits.

    Unsigned activations (N, K), K even, and signed weights (M, K) give int64 (N, M); see vpmaddubsw in
    Intel's manual. With VNNI every sum is exact: activations @ weights.T.
    """
    products = activations[:, None].long() * weights[None].long()  # (N, M, K)
    pairs = products.unflatten(2, (-1, 2)).sum(3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(2)


def layer_codes(simulated: nn.Module, name: str, batch: Tensor, rows: int = 256) -> tuple[Tensor, Tensor]:
    """Return what an int8 kernel multiplies: codes (N, K) of a convolution's windows, weight codes (M, K).

    Activation codes are unsigned, with zero point 0 where no value is negative and 128 elsewhere. K counts
    channels fastest, as the kernels do that add neighbours in pairs; their number is made even with zeros.
    The layer's input comes from `batch` (B, 3, H, W); `rows` is the number of windows, evenly spaced.
    """
    layer, inputs = layers(simulated)[name], []
    with layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        simulated(batch)
    values = inputs[0]
    windows = F.unfold(values, layer.kernel_size, padding=layer.padding)  # (B, C k, L)
    windows = windows.transpose(1, 2).flatten(0, 1)
    # No step of whole rows, which would look at one column of the images only.
    windows = windows[torch.linspace(0, len(windows) - 1, min(rows, len(windows))).round().long()]
    step = values[values > 0].min()  # the grid is hit densely
    activations = torch.round(windows / step).long() + (128 if (values < 0).any() else 0)
    channels = layer.in_channels // layer.groups
    return _in_pairs(activations, channels), _in_pairs(codes(layer).flatten(1).long(), channels)


def _in_pairs(values: Tensor, channels: int) -> Tensor:
    """(N, C k) with channels slowest -> (N, k C') with channels fastest, C' even."""
    by_channel = values.unflatten(1, (channels, -1)).transpose(1, 2)  # (N, k, C)
    return F.pad(by_channel, (0, channels % 2)).flatten(1)
