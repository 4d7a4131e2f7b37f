"""Looking inside a quantized network: scales, exponents, and where the error comes from."""

import copy
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, disable_fake_quant, disable_observer
from torch.nn.modules.module import register_module_forward_pre_hook

from labcore.observer import PowerOfTwoObserver
from labcore.quantize import layers, observer_of

_N_BINS = 512  # of a histogram


def qparams(model: nn.Module) -> pd.DataFrame:
    """Return one row per quantized tensor of an int8 network.

    Columns: layer, tensor ("weight" or "activation"), scale (of channels the smallest), zero_point, exponent.
    """
    rows = []
    for name, module in model.named_modules():
        if hasattr(module, "scale") and hasattr(module, "zero_point"):
            rows.append((name, "activation", float(module.scale), int(module.zero_point)))
        if callable(getattr(module, "weight", None)):
            weight = module.weight()
            if weight.qscheme() == torch.per_tensor_affine:
                rows.append((name, "weight", weight.q_scale(), weight.q_zero_point()))
            else:
                rows.append((name, "weight", weight.q_per_channel_scales().min().item(), 0))
    table = pd.DataFrame(rows, columns=["layer", "tensor", "scale", "zero_point"])
    return table.assign(exponent=np.log2(table["scale"]))


def in_float(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose observers and fake quantization are off."""
    return copy.deepcopy(model).eval().apply(disable_observer).apply(disable_fake_quant)


def _observed(calibrated: nn.Module) -> Iterator[tuple[str, str, PowerOfTwoObserver, nn.Module]]:
    """Yield (layer, "weight" or "activation", its observer, the module); weights are shown to theirs."""
    for name, layer in layers(calibrated).items():
        observer = observer_of(layer.qconfig.weight()) if getattr(layer, "qconfig", None) else None
        if isinstance(observer, PowerOfTwoObserver):
            observer(layer.weight)
            yield name, "weight", observer, layer
    for name, module in calibrated.named_modules():
        observer = observer_of(getattr(module, "activation_post_process", None))
        if isinstance(observer, PowerOfTwoObserver) and not isinstance(module, FakeQuantizeBase):
            yield name, "activation", observer, module


@torch.no_grad()
def count_clamped(calibrated: nn.Module) -> dict[str, int]:
    """Return how many scales the clamp changed, {"clamped"}, of how many, {"scales"}."""
    clamped = [observer.clamped() for _, _, observer, _ in _observed(calibrated)]
    return {"clamped": sum(int(flags.sum()) for flags in clamped), "scales": sum(map(len, clamped))}


class Errors:
    """What quantizing does to the values of one tensor, summed over batches."""

    def __init__(self, observer: PowerOfTwoObserver):
        self.quant_min, self.quant_max = observer.quant_min, observer.quant_max
        self.scale, self.zero_point = observer.calculate_qparams()
        # Now, because an observer without fake quantization goes on observing.
        self.raw_scale, self.clamped = observer.raw_scale(), observer.clamped()
        self.min, self.max = float("inf"), float("-inf")
        self.n = self.n_clipped = 0
        self.power = self.clipping = self.rounding = 0.0  # sums of squares

    def add(self, values: Tensor) -> None:
        """Values of any shape; the channels of per-channel scales are axis 0."""
        rows = values.detach().double().reshape(len(self.scale), -1)
        scale, zero_point = self.scale.double()[:, None], self.zero_point[:, None]
        inside = rows.clamp((self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale)
        clipped = rows - inside
        self.min, self.max = min(self.min, rows.min().item()), max(self.max, rows.max().item())
        self.n += rows.numel()
        # The grid's last code stands for values up to half a step beyond it.
        self.n_clipped += int((clipped.abs() > scale / 2).sum())
        self.power += rows.square().sum().item()
        self.clipping += clipped.square().sum().item()
        self.rounding += (torch.round(inside / scale) * scale - inside).square().sum().item()

    def row(self) -> dict:
        """Return what `inspect_qparams` says of the tensor."""
        n, error, exponent = max(1, self.n), self.clipping + self.rounding, torch.log2(self.scale)
        bits = int(np.log2(self.quant_max - self.quant_min + 1))
        snr_db = 10 * np.log10(self.power / error) if error and self.power else float("inf")
        row = {"bits": bits, "channels": len(self.scale), "min": self.min, "max": self.max}
        row |= {"raw_scale": self.raw_scale.min().item(), "scale": self.scale.min().item()}
        row |= {"exponent": exponent.min().item(), "exponent_max": exponent.max().item()}
        row |= {"clamped": int(self.clamped.sum()), "zero_point": int(self.zero_point[0])}
        row |= {"share_clipped": self.n_clipped / n, "snr_db": snr_db}
        return row | {"mse_clipping": self.clipping / n, "mse_rounding": self.rounding / n}


@torch.no_grad()
def inspect_qparams(calibrated: nn.Module, batches: list[Tensor]) -> pd.DataFrame:
    """Return one row per tensor that a calibrated network will quantize with a PowerOfTwoObserver.

    The network (of mode "ptq" or "simulated") computes in float meanwhile, so each row tells what quantizing
    this tensor alone does to it. `batches` are normalised images (B, 3, H, W), such as those that calibrated.

    Columns: layer, tensor ("weight" or "activation"), bits, channels (scales), min, max, raw_scale (before
    rounding), scale (of channels the smallest), exponent, exponent_max, clamped (how many the clamp changed),
    zero_point, share_clipped, snr_db (signal over error power), mse_clipping and mse_rounding (its parts).
    """
    network = in_float(calibrated)
    table: dict[tuple[str, str], Errors] = {}
    for name, tensor, observer, module in _observed(network):
        errors = table[name, tensor] = Errors(observer)
        if tensor == "weight":
            errors.add(module.weight)
        else:
            observing = module.activation_post_process
            observing.register_forward_pre_hook(lambda _, inputs, errors=errors: errors.add(inputs[0]))
    for batch in batches:
        network(batch)
    rows = [{"layer": name, "tensor": tensor} | errors.row() for (name, tensor), errors in table.items()]
    return pd.DataFrame(rows)


@torch.no_grad()
def values_and_grid(calibrated: nn.Module, layer: str, tensor: str, batch: Tensor) -> tuple:
    """Return (values, scale, zero point, (quant_min, quant_max)) of one tensor of a calibrated network.

    `tensor` is "weight" (of per-channel scales: the channel with the smallest range) or "activation", the
    layer's output for `batch` (B, 3, H, W).
    """
    network = in_float(calibrated)
    observer, module = {row[:2]: row[2:] for row in _observed(network)}[layer, tensor]
    values = [module.weight] if tensor == "weight" else []
    if tensor == "activation":
        module.activation_post_process.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0]))
        network(batch)
    scale, zero_point = observer.calculate_qparams()
    rows = values[0].reshape(len(scale), -1)
    smallest = int(rows.abs().amax(1).argmin())
    limits = int(observer.quant_min), int(observer.quant_max)
    return rows[smallest].numpy(), float(scale[smallest]), int(zero_point[smallest]), limits


@torch.no_grad()
def histograms(calibrated: nn.Module, batches: list[Tensor], tensors: pd.DataFrame) -> list[dict]:
    """Return the histograms of some tensors of a calibrated network, computed in float.

    Args:
        tensors: rows of `inspect_qparams`, of these batches or more: layer, tensor, min and max are used.

    A row has layer, tensor, min, max, zeros (how many values are 0), and counts of the others in 512 bins of
    equal width from min(min, 0) to max(max, 0). Values beyond count in the outer bins.
    """
    network = in_float(calibrated)
    modules = {(name, tensor): module for name, tensor, _, module in _observed(network)}
    rows = []
    for name, tensor, low, high in tensors[["layer", "tensor", "min", "max"]].itertuples(index=False):
        counts = np.zeros(_N_BINS, np.int64)
        row = {"layer": name, "tensor": tensor, "min": low, "max": high, "zeros": 0, "counts": counts}

        def add(values: Tensor, row: dict = row, limits: tuple = (min(low, 0.0), max(high, 0.0))) -> None:
            others = values[values != 0].clamp(*limits).numpy()
            row["zeros"] += values.numel() - others.size
            row["counts"] += np.histogram(others, _N_BINS, limits)[0]

        if tensor == "weight":
            add(modules[name, tensor].weight)
        else:
            observer = modules[name, tensor].activation_post_process
            observer.register_forward_pre_hook(lambda _, inputs, add=add: add(inputs[0]))
        rows.append(row)
    for batch in batches:
        network(batch)
    return [row | {"counts": row["counts"].tolist()} for row in rows]


def histogram_errors(
    histogram: dict, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> dict[str, float]:
    """Return what quantizing does to a tensor of which only its histogram (a row of `histograms`) is known.

    Keys, defined as in `inspect_qparams`: share_clipped, mse_rounding, mse_clipping and snr_db. Values lie
    evenly within their bin, so each sum over values is a difference of antiderivatives at the bin's edges.
    """
    low, high = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    start, end = min(histogram["min"], 0.0), max(histogram["max"], 0.0)
    counts, width = np.array(histogram["counts"]), (end - start) / _N_BINS or 1.0
    edges = start + width * np.arange(_N_BINS + 1)
    inside = edges.clip(low, high)
    steps = inside / scale
    nearest = np.round(steps)
    antiderivatives = {
        "share_clipped": edges - edges.clip(low - scale / 2, high + scale / 2),
        "mse_rounding": scale**3 * (nearest / 12 + (steps - nearest) ** 3 / 3),
        "mse_clipping": (edges - inside) ** 3 / 3,
        "power": edges**3 / 3,
    }
    n = max(1, counts.sum() + histogram["zeros"])
    means = {key: counts @ np.diff(values) / width / n for key, values in antiderivatives.items()}
    power, error = means.pop("power"), means["mse_rounding"] + means["mse_clipping"]
    return means | {"snr_db": 10 * np.log10(power / error) if error and power else float("inf")}


@torch.no_grad()
def errors_alone(simulated: nn.Module, images: Tensor) -> pd.DataFrame:
    """Tell how far the logits of a simulated network move where one activation tensor alone is rounded.

    The weights are rounded throughout; images are normalised, (B, 3, H, W). One row per tensor, the worst
    first. Columns: layer, logit_mse (mean squared change of the logits), scale, and width, the range in
    standard deviations: a wide tensor leaves few steps to most values.
    """
    network = in_float(simulated)
    names = {
        module.activation_post_process: name
        for name, module in network.named_modules()
        if isinstance(getattr(module, "activation_post_process", None), FakeQuantizeBase)
    }
    widths: dict[nn.Module, float] = {}  # of those that are used: a block without a sum has one all the same

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module in names:
            widths[module] = ((inputs[0].max() - inputs[0].min()) / inputs[0].std()).item()

    with register_module_forward_pre_hook(measure):
        exact = network(images)
    rows = []
    for fake_quant, width in widths.items():
        fake_quant.enable_fake_quant()
        moved = (network(images) - exact).square().mean().item()
        fake_quant.disable_fake_quant()
        rows.append((names[fake_quant], moved, float(fake_quant.scale.flatten()[0]), width))
    table = pd.DataFrame(rows, columns=["layer", "logit_mse", "scale", "width"])
    return table.sort_values("logit_mse", ascending=False, kind="stable", ignore_index=True)
