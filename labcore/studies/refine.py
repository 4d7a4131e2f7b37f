"""Better post-training quantization without retraining: equalized channels, corrected biases, learned rounding.

Scales stay what the configuration makes of them, so power-of-two scales stay powers of two. Each function works on a copy.
References: Nagel et al. (2019), "Data-free quantization through weight equalization and bias correction" (CLE, BC);
Nagel et al. (2020), "Up or down? Adaptive rounding for post-training quantization" (AdaRound).
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import ConvReLU2d

from labcore import LabError
from labcore.files.progress import progress
from labcore.model import QuantizableBasicBlock, QuantizableBottleneck, QuantizableResNet
from labcore.quantize import layers, simulate

_STRETCH = (-0.1, 1.1)  # gamma and zeta of the rectified sigmoid


def pairs(model: nn.Module) -> list[list[str]]:
    """The pairs [first, second] of layers (names as in `layers`) that can share a scaling of the channels between them.

    The first one's output goes through ReLU and max pooling at most, and into the second one only. Found inside the
    residual blocks of labcore.model and torchvision's InvertedResidual (fused; ReLU6 does not scale, and is left out), and
    between the stages of a QuantizableResNet.
    """
    from torchvision.models.mobilenetv2 import InvertedResidual  # takes seconds, for this alone

    found = []
    if isinstance(model, QuantizableResNet):
        stages = [child for stage in range(1, 5) for child in model.get_submodule(f"layer{stage}")]
        found += _consecutive(model, [model.conv1, model.maxpool, *stages])
    for block in model.modules():
        if isinstance(block, QuantizableBasicBlock):
            found += _consecutive(model, [block.conv1, block.conv2])
        elif isinstance(block, QuantizableBottleneck):
            found += _consecutive(model, [block.conv1, block.conv2, block.conv3])
        elif isinstance(block, InvertedResidual):
            found += _consecutive(model, list(block.conv))
    return found


def _consecutive(model: nn.Module, modules: list[nn.Module]) -> list[list[str]]:
    """The pairs in a chain of modules; any module but convolutions, identities and max pooling ends the chain."""
    names = {module: name for name, module in model.named_modules()}
    found, last = [], None
    for module in modules:
        if (
            isinstance(module, nn.Sequential)
            and not isinstance(module, ConvReLU2d)
            and len(layers(module)) == 1
        ):
            module = module[0]  # Conv2dNormActivation: what follows was fused into its convolution
        if isinstance(module, ConvReLU2d | nn.Conv2d):
            if last is not None:
                found.append([names[last], names[module]])
            last = module if isinstance(module, ConvReLU2d) else None
        elif not isinstance(module, nn.Identity | nn.MaxPool2d):
            last = None
    return found


@torch.no_grad()
def equalize(model: nn.Module, tolerance: float = 1e-3, max_rounds: int = 100) -> nn.Module:
    """A copy of a fused float network that computes the same, in which the ranges of paired layers match.

    Channel i between layers 1 and 2 is scaled by s_i = sqrt(r1_i r2_i) / r2_i: W1_i, b1_i are divided by it, W2's inputs
    multiplied, r being the largest absolute weight of the channel (CLE, section 4.1, equations 9 to 11). Repeated over all
    `pairs` until every |s_i - 1| < tolerance. A channel without weights on one side is left alone.

    The result is fused already: give it to prepare_ptq with fused=False.

    torch.ao.quantization._equalize does the same, but never returns where a channel has no weights, and knows no
    depthwise convolutions.

    Raises LabError where BatchNorm is not folded away, and where no layers form a pair.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise LabError(
            "equalize needs a fused network, found BatchNorm modules; call labcore.quantize.fuse first."
        )
    equalized = copy.deepcopy(model)
    by_name = layers(equalized)
    found = [(by_name[first], by_name[second]) for first, second in pairs(equalized)]
    if not found:
        raise LabError(
            "equalize expects consecutive layers with ReLU between them, found none; skip this step."
        )
    for _ in range(max_rounds):
        if max([_equalize_pair(*pair) for pair in found]) < tolerance:
            break
    return equalized


def _equalize_pair(first: nn.Conv2d, second: nn.Conv2d) -> float:
    """Scale the channels between two layers in place; gives the largest |s_i - 1|."""
    depthwise = second.groups > 1  # weights (C, 1, kH, kW): input channel i is output channel i
    inputs = second.weight if depthwise else second.weight.transpose(0, 1)  # a view (C, ...)
    outgoing, incoming = first.weight.abs().flatten(1).amax(1), inputs.abs().flatten(1).amax(1)  # (C,)
    scale = torch.where((outgoing > 0) & (incoming > 0), torch.sqrt(outgoing / incoming), 1.0)
    first.weight /= scale[:, None, None, None]
    if first.bias is not None:
        first.bias /= scale
    inputs *= scale[:, None, None, None]
    return (scale - 1).abs().max().item()


class _Reached(Exception):
    """The layer of interest has run: the rest of the network need not."""


@torch.no_grad()
def _seen(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(input, output before ReLU and quantization) of one layer, batch by batch; what comes after it is not computed."""

    def stop(_, inputs, output):
        seen.append((inputs[0], output))
        raise _Reached

    device = layer.weight.device
    for batch in batches:
        seen: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(stop, prepend=True)  # before its output is quantized
        try:
            model(batch.to(device))
        except _Reached:
            pass
        finally:
            hook.remove()
        yield seen[0]


def _check(batches: list[Tensor]) -> None:
    if not sum(map(len, batches)):
        raise LabError(
            "expected batches of calibration images, found none; set calibration_images to at least 1."
        )


def _as_float(model: nn.Module) -> nn.Module:
    """A copy whose observers and fake quantization are off."""
    return copy.deepcopy(model).eval().apply(tq.disable_observer).apply(tq.disable_fake_quant)


def _mean(output: Tensor) -> Tensor:
    """The sum over images of the mean over places of a layer's output (B, C, ...): (C,), float64."""
    return output.transpose(0, 1).flatten(1).mean(1).double() * len(output)


def _means(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """For every layer the mean (C,) of its output, before ReLU and quantization, over images and places; one pass."""
    totals: dict[str, Tensor] = {}

    def add(name: str, output: Tensor) -> None:
        totals[name] = totals.get(name, 0) + _mean(output)

    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: add(name, output), prepend=True)
        for name, layer in layers(model).items()
    ]
    device = next(model.parameters()).device
    for batch in batches:
        model(batch.to(device))
    for hook in hooks:
        hook.remove()
    return {name: total / sum(map(len, batches)) for name, total in totals.items()}


@torch.no_grad()
def correct_bias(simulated: nn.Module, float_model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """A copy of a simulated network in which no layer's output is shifted by quantization, on average.

    b -= E[y~] - E[y] per channel, y the output in the float network before ReLU, y~ in the simulated one before ReLU and
    its own quantization; the layers before are quantized and corrected already (CLE, section 4.2, empirical). Biases stay
    float32.

    Args:
        simulated: from `simulate` or `adaround`.
        float_model: the same network in float, with the same names: fused, or the calibrated one.
        batches: normalised images, each (B, 3, H, W).

    Raises LabError where there are no images.
    """
    _check(batches)
    corrected, wanted = copy.deepcopy(simulated).eval(), _means(_as_float(float_model), batches)
    for name, layer in layers(corrected).items():
        found = sum(_mean(output) for _, output in _seen(corrected, layer, batches)) / sum(map(len, batches))
        shift = (found - wanted[name]).float()
        if layer.bias is None:
            layer.bias = nn.Parameter(-shift)
        else:
            layer.bias -= shift
    return corrected


def adaround(
    calibrated: nn.Module,
    batches: list[Tensor],
    steps: int = 300,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    regularization: float = 1.0,
    warm_start: float = 0.2,
) -> nn.Module:
    """As `simulate(calibrated)`, but each weight is rounded up or down as serves its layer's output.

    Layer by layer, with the inputs x~ of the network quantized so far, minimizes over V (AdaRound, equations 21 to 25)

        |f(W x) - f(W~ x~)|^2 / e + lambda sum(1 - |2 h(V) - 1|^beta),   W~ = s clip(floor(W / s) + h(V), qmin, qmax),

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), f the fused ReLU or nothing, e the same error of nearest rounding per weight
    (so that lambda, 0.01 in the paper, means the same for every layer and bit width). Beta falls from 20 to 2 after a warm
    start without the second term; then h is rounded. An output channel that nearest rounding serves better on these images keeps it.

    Args:
        calibrated: from `prepare_ptq` with a configuration of mode "simulated", then `calibrate`.
        batches: normalised images, each (B, 3, H, W); one layer's inputs and outputs are held at a time.
        steps: Adam steps per layer, each on `batch_size` images drawn with `seed`.

    The scale and zero point of the weights are those of `simulate`, kept as `weight_scale` and `weight_zero_point`.

    Raises LabError where there are no images.
    """
    _check(batches)
    rounded, reference = simulate(calibrated), _as_float(calibrated)
    originals, chosen = layers(reference), layers(rounded)
    generator = torch.Generator().manual_seed(seed)
    options = steps, generator, batch_size, learning_rate, regularization, warm_start
    with progress(len(chosen), "adaround", unit="layer") as bar:
        for name, layer in chosen.items():
            activation = F.relu if isinstance(rounded.get_submodule(name), nn.Sequential) else nn.Identity()
            inputs = torch.cat([x for x, _ in _seen(rounded, layer, batches)])
            targets = torch.cat([activation(y) for _, y in _seen(reference, originals[name], batches)])
            _round_layer(layer, originals[name].weight.detach(), activation, inputs, targets, *options)
            bar.update()
    return rounded


def _round_layer(
    layer: nn.Module,
    weight: Tensor,
    activation,
    inputs: Tensor,
    targets: Tensor,
    steps: int,
    generator: torch.Generator,
    batch_size: int,
    learning_rate: float,
    regularization: float,
    warm_start: float,
) -> None:
    """Learn the rounding of one simulated layer in place; `weight` is the float one, before rounding."""
    observer = layer.qconfig.weight()
    shape = (-1,) + (1,) * (weight.dim() - 1)
    scale, zero_point = layer.weight_scale.reshape(shape), layer.weight_zero_point.reshape(shape)
    low, high = observer.quant_min - zero_point, observer.quant_max - zero_point

    def output(values: Tensor, x: Tensor) -> Tensor:
        # Not the layer itself: its hook would quantize the output, which is not this layer's business.
        plain = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward
        return activation(plain(x, values, layer.bias))

    def on_grid(up: Tensor) -> Tensor:
        return scale * torch.clamp(floor + up, low, high)

    def errors(values: Tensor) -> Tensor:
        """Squared error (C,) per output channel, over all images."""
        parts = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        with torch.no_grad():
            return sum(
                (output(values, x) - y).square().transpose(0, 1).flatten(1).double().sum(1) for x, y in parts
            )

    floor = torch.floor(weight / scale)
    nearest = layer.weight.detach().clone()
    before = errors(nearest)
    gamma, zeta = _STRETCH
    start = (weight / scale - floor - gamma) / (zeta - gamma)
    v = torch.logit(start).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=learning_rate)
    factor = weight.numel() * len(inputs) / before.sum().clamp(min=1e-30).item()
    for step in range(steps):
        index = torch.randint(len(inputs), (min(batch_size, len(inputs)),), generator=generator)
        up = torch.clamp((zeta - gamma) * torch.sigmoid(v) + gamma, 0, 1)
        loss = factor * (output(on_grid(up), inputs[index]) - targets[index]).square().sum() / len(index)
        if step >= warm_start * steps:
            beta = 20 - 18 * (step / steps - warm_start) / (1 - warm_start)
            loss = loss + regularization * (1 - (2 * up - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = on_grid((v >= 0).to(weight.dtype))
        better = (errors(learned) <= before).reshape(shape)
        layer.weight.copy_(torch.where(better, learned, nearest))
