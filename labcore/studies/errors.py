"""Looking inside a quantized network: scales, exponents, and where the error comes from."""

import copy
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, disable_fake_quant, disable_observer

from labcore.observer import PowerOfTwoObserver
from labcore.quantize import layers, observer_of


def qparams(model: nn.Module) -> pd.DataFrame:
    """One row per quantized tensor of an int8 network.

    Columns: layer, tensor ("weight" or "activation"), scale, zero_point, exponent (log2 of the scale). A per-channel
    weight is given by its smallest scale.
    """
    rows = []

    def add(layer: str, tensor: str, scale, zero_point) -> None:
        scale = float(np.min(np.asarray(scale)))
        rows.append(
            {
                "layer": layer,
                "tensor": tensor,
                "scale": scale,
                "zero_point": int(zero_point),
                "exponent": float(np.log2(scale)),
            }
        )

    for name, module in model.named_modules():
        if hasattr(module, "scale") and hasattr(module, "zero_point"):
            add(name, "activation", module.scale, module.zero_point)
        if hasattr(module, "weight") and callable(module.weight):
            weight = module.weight()
            per_tensor = weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
            add(
                name,
                "weight",
                weight.q_scale() if per_tensor else weight.q_per_channel_scales(),
                weight.q_zero_point() if per_tensor else 0,
            )
    return pd.DataFrame(rows)


class _Errors:
    """What quantizing does to the values of one tensor, summed over batches."""

    def __init__(self, observer: PowerOfTwoObserver, scale: Tensor, zero_point: Tensor):
        self.observer, self.scale, self.zero_point = observer, scale, zero_point
        self.raw_scale, self.clamped = observer.raw_scale(), observer.clamped()
        self.min, self.max = float("inf"), float("-inf")
        self.n = self.n_clipped = 0
        self.power = self.clipping = self.rounding = 0.0

    def add(self, values: Tensor) -> None:
        """Values of any shape; the channels of per-channel scales are axis 0."""
        rows = (
            values.detach().flatten(1).double()
            if len(self.scale) > 1
            else values.detach().reshape(1, -1).double()
        )
        scale, zero_point = self.scale.double()[:, None], self.zero_point[:, None]
        low = (self.observer.quant_min - zero_point) * scale
        high = (self.observer.quant_max - zero_point) * scale
        inside = torch.minimum(torch.maximum(rows, low), high)
        error = torch.round(inside / scale) * scale - inside
        clipped = rows - inside
        self.min, self.max = min(self.min, rows.min().item()), max(self.max, rows.max().item())
        self.n += rows.numel()
        # The grid's last code stands for values up to half a step beyond it.
        self.n_clipped += int((clipped.abs() > scale / 2).sum())
        self.power += rows.square().sum().item()
        self.clipping += clipped.square().sum().item()
        self.rounding += error.square().sum().item()

    def row(self, layer: str, tensor: str) -> dict:
        error = self.clipping + self.rounding
        exponent = torch.log2(self.scale)
        return {
            "layer": layer,
            "tensor": tensor,
            "bits": int(np.log2(self.observer.quant_max - self.observer.quant_min + 1)),
            "channels": len(self.scale),
            "min": self.min,
            "max": self.max,
            "raw_scale": self.raw_scale.min().item(),
            "scale": self.scale.min().item(),
            "exponent": exponent.min().item(),
            "exponent_max": exponent.max().item(),
            "clamped": int(self.clamped.sum()),
            "zero_point": int(self.zero_point.flatten()[0]),
            "share_clipped": self.n_clipped / max(1, self.n),
            "snr_db": 10 * np.log10(self.power / error) if error and self.power else float("inf"),
            "mse_clipping": self.clipping / max(1, self.n),
            "mse_rounding": self.rounding / max(1, self.n),
        }


@torch.no_grad()
def values_and_grid(
    calibrated: nn.Module, layer: str, tensor: str, batch: Tensor
) -> tuple[np.ndarray, float, int, tuple[int, int]]:
    """(values, scale, zero point, (quant_min, quant_max)) of one tensor of a calibrated network, as plots.values_on_grids takes them.

    Args:
        layer: a name as in `labcore.quantize.layers`.
        tensor: "weight" (with per-channel scales: the channel with the smallest range) or "activation", the layer's output for
            `batch` (B, 3, H, W).
    """
    network = copy.deepcopy(calibrated).apply(disable_fake_quant).apply(disable_observer)
    if tensor == "weight":
        weight, watcher = layers(network)[layer].weight, observer_of(layers(network)[layer].qconfig.weight())
        watcher(weight)
        rows = weight.flatten(1) if len(watcher.calculate_qparams()[0]) > 1 else weight.reshape(1, -1)
        chosen = int(rows.abs().amax(1).argmin())
        values = rows[chosen]
    else:
        module, seen, chosen = network.get_submodule(layer), [], 0
        watcher = observer_of(module.activation_post_process)
        module.activation_post_process.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        network(batch)
        values = seen[0]
    scale, zero_point = watcher.calculate_qparams()
    limits = int(watcher.quant_min), int(watcher.quant_max)
    return values.numpy().ravel(), float(scale[chosen]), int(zero_point[chosen]), limits


@torch.no_grad()
def inspect_qparams(calibrated: nn.Module, batches: list[Tensor]) -> pd.DataFrame:
    """One row per tensor that a calibrated network (mode "ptq" or "simulated") will quantize with a PowerOfTwoObserver.

    The network computes in float meanwhile, so each row tells what quantizing this tensor alone does to it.

    Args:
        batches: normalised images (B, 3, H, W), such as those that calibrated.

    Returns:
        Columns: layer, tensor ("weight" or "activation"), bits, channels (scales), min, max, raw_scale (before rounding),
        scale, exponent and exponent_max (of the channels), clamped (how many scales the clamp changed), zero_point,
        share_clipped, snr_db (signal power over error power), and the mean squared error split into mse_clipping and
        mse_rounding. Per-channel weights give their smallest scales.
    """
    network = copy.deepcopy(calibrated)
    found: dict[tuple[str, str], _Errors] = {}
    for name, tensor, watcher, module in _watched(network):
        errors = found[name, tensor] = _Errors(watcher, *watcher.calculate_qparams())
        if tensor == "weight":
            errors.add(module.weight)
        else:  # before the module, since an observer would widen its range first
            module.activation_post_process.register_forward_pre_hook(
                lambda _, inputs, errors=errors: errors.add(inputs[0])
            )
    network.apply(disable_fake_quant)
    network.apply(disable_observer)
    for batch in batches:
        network(batch)
    return pd.DataFrame([errors.row(*key) for key, errors in found.items()])


@torch.no_grad()
def count_clamped(calibrated: nn.Module) -> dict[str, int]:
    """{"clamped", "scales"}: how many scales the clamp changed, of how many; the sums of two columns of `inspect_qparams`."""
    changed = [watcher.clamped() for _, _, watcher, _ in _watched(calibrated)]
    return {"clamped": sum(int(some.sum()) for some in changed), "scales": sum(len(some) for some in changed)}


def _watched(calibrated: nn.Module) -> Iterator[tuple[str, str, PowerOfTwoObserver, nn.Module]]:
    """(layer, "weight" or "activation", its observer, the module) of what PowerOfTwoObservers watch; weights are shown to theirs."""
    for name, layer in layers(calibrated).items():
        watcher = observer_of(layer.qconfig.weight()) if getattr(layer, "qconfig", None) else None
        if isinstance(watcher, PowerOfTwoObserver):
            watcher(layer.weight)
            yield name, "weight", watcher, layer
    for name, module in calibrated.named_modules():
        watcher = observer_of(getattr(module, "activation_post_process", None))
        if isinstance(watcher, PowerOfTwoObserver) and not isinstance(module, FakeQuantizeBase):
            yield name, "activation", watcher, module


@torch.no_grad()
def errors_alone(simulated: nn.Module, images: Tensor) -> pd.DataFrame:
    """How far the logits move where one activation tensor alone is rounded; the weights are rounded throughout.

    Args:
        simulated: a network with fake quantization, as `labcore.quantize.simulate` gives it.
        images: normalised, (B, 3, H, W).

    Returns:
        One row per tensor, the worst first. Columns: layer, logit_mse (mean squared change of the logits), scale, and width, the
        tensor's range in its standard deviations: a wide one leaves few steps to most values.
    """
    network = copy.deepcopy(simulated).apply(disable_fake_quant).apply(disable_observer)
    watchers = {
        name: module.activation_post_process
        for name, module in network.named_modules()
        if isinstance(getattr(module, "activation_post_process", None), FakeQuantizeBase)
    }
    widths: dict[
        str, float
    ] = {}  # of those that are used: a block without a sum has a watcher for it all the same

    def measure(name: str, values: Tensor) -> None:
        widths[name] = ((values.max() - values.min()) / values.std()).item()

    hooks = [
        watcher.register_forward_pre_hook(lambda _, inputs, name=name: measure(name, inputs[0]))
        for name, watcher in watchers.items()
    ]
    exact = network(images)
    for hook in hooks:
        hook.remove()
    rows = []
    for name, width in widths.items():
        watchers[name].enable_fake_quant()
        moved = (network(images) - exact).square().mean().item()
        watchers[name].disable_fake_quant()
        scale = float(watchers[name].scale.flatten()[0])
        rows.append({"layer": name, "logit_mse": moved, "scale": scale, "width": width})
    return pd.DataFrame(rows).sort_values("logit_mse", ascending=False, kind="stable", ignore_index=True)
