"""Better PTQ without retraining: equalized channels, corrected biases, learned rounding; all on copies.

CLE is Nagel et al. (2019), "Data-free quantization through weight equalization and bias correction", AdaRound
is Nagel et al. (2020), "Up or down? Adaptive rounding for post-training quantization".
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic import ConvReLU2d

from labcore import LabError
from labcore.files.progress import progress
from labcore.model import QuantizableBasicBlock, QuantizableBottleneck, QuantizableResNet
from labcore.quantize import layers, simulate
from labcore.studies.errors import in_float
from labcore.studies.mixed import per_channel

BATCH_SIZE, LEARNING_RATE, WARM_START = 32, 0.05, 0.2  # AdaRound's; the last is a share of its steps


def pairs(model: nn.Module) -> list[list[str]]:
    """Return the pairs [first, second] of layers, as `layers` names them, that can share a scaling.

    The first one's output goes through ReLU and max pooling at most, and into the second one only. Of
    QuantizableResNets, and of torchvision's InvertedResidual with ReLU (ReLU6 does not scale), fused.
    """
    from torchvision.models.mobilenetv2 import InvertedResidual  # takes seconds, for this alone

    chains = []
    for block in model.modules():
        if isinstance(block, QuantizableResNet):
            stages = [*block.layer1, *block.layer2, *block.layer3, *block.layer4]
            chains.append([block.conv1, block.maxpool, *stages])
        elif isinstance(block, QuantizableBasicBlock | QuantizableBottleneck):
            chains.append(block.children())  # in their order
        elif isinstance(block, InvertedResidual):
            chains.append(block.conv)
    names = {module: name for name, module in model.named_modules()}
    return [[names[first], names[second]] for chain in chains for first, second in _consecutive(chain)]


def _consecutive(chain: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the pairs in a chain; any module but convolutions, identities and max pooling breaks it."""
    first = None
    for module in chain:
        if type(module) is not ConvReLU2d and isinstance(module, nn.Sequential) and len(layers(module)) == 1:
            module = module[0]  # what follows was fused into this convolution
        if isinstance(module, ConvReLU2d | nn.Conv2d):
            if first is not None:
                yield first, module
            first = module if isinstance(module, ConvReLU2d) else None
        elif not isinstance(module, nn.Identity | nn.MaxPool2d):
            first = None


@torch.no_grad()
def equalize(model: nn.Module) -> nn.Module:
    """Return a copy of a fused float network that computes the same, its paired layers with equal ranges.

    Channel i between layers 1 and 2 is scaled by s_i = sqrt(r1_i r2_i) / r2_i: W1_i, b1_i are divided by it,
    W2's inputs multiplied, r being the channel's largest absolute weight (CLE, equations 9 to 11); for all
    `pairs`, until every |s_i - 1| < 0.001. A channel without weights on one side is left alone (there torch's
    own _equalize never returns). Give the result to prepare_ptq with fused=False. Raises LabError where
    BatchNorm is not folded away, and where no layers form a pair.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise LabError("equalize needs a fused network, found BatchNorm; call labcore.quantize.fuse first.")
    equalized = copy.deepcopy(model)
    by_name = layers(equalized)
    paired = [(by_name[first], by_name[second]) for first, second in pairs(equalized)]
    if not paired:
        raise LabError("equalize expects layers with only ReLU between them, found none; skip this step.")
    for _ in range(100):
        if max([_equalize_pair(*pair) for pair in paired]) < 1e-3:
            break
    return equalized


def _equalize_pair(first: nn.Conv2d, second: nn.Conv2d) -> float:
    """Scale the channels between two layers in place; return the largest |s_i - 1|."""
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
def _values(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input, output before ReLU and quantization) of a layer, batch by batch."""
    if not sum(map(len, batches)):
        raise LabError("expected calibration images, found none; set calibration_images to at least 1.")
    values = []

    def stop(_, inputs, output):
        values.append((inputs[0], output))
        raise _Reached

    with layer.register_forward_hook(stop, prepend=True):  # before the output is quantized
        for batch in batches:
            with contextlib.suppress(_Reached):
                model(batch.to(layer.weight.device))
            yield values.pop()


def _mean_output(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return the mean (C,) of a layer's output over images and positions, in float64."""
    sums = [y.transpose(0, 1).flatten(1).mean(1).double() * len(y) for _, y in _values(model, layer, batches)]
    return sum(sums) / sum(map(len, batches))


@torch.no_grad()
def correct_bias(simulated: nn.Module, float_model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Return a copy of a simulated network in which quantization shifts no layer's output, on average.

    b -= E[y~] - E[y] per channel, y the output before ReLU in the float network (fused, or the calibrated
    one), y~ in the simulated one before its own quantization, the layers before being quantized and corrected
    already (CLE, section 4.2, empirical). Raises LabError without images.
    """
    corrected, reference = copy.deepcopy(simulated).eval(), in_float(float_model)
    originals = layers(reference)
    for name, layer in layers(corrected).items():
        wanted = _mean_output(reference, originals[name], batches)
        shift = (_mean_output(corrected, layer, batches) - wanted).float()
        layer.bias = nn.Parameter(-shift if layer.bias is None else layer.bias - shift)
    return corrected


def adaround(calibrated: nn.Module, batches: list[Tensor], steps: int = 300, seed: int = 0) -> nn.Module:
    """Return `simulate(calibrated)`, but with each weight rounded up or down as serves its layer's output.

    Layer by layer, with the inputs x~ of the network quantized so far, minimizes over V (AdaRound, 21 to 25)

        |f(W x) - f(W~ x~)|^2 / e + lambda sum(1 - |2 h(V) - 1|^beta),
        W~ = s clip(floor(W / s) + h(V), qmin, qmax),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),

    f the fused ReLU or nothing, e the same error of nearest rounding per weight, so that lambda (1; 0.01 in
    the paper) means the same for every layer and bit width. Beta falls from 20 to 2 after a warm start
    without the second term; then h is rounded. A channel that nearest rounding serves better keeps it.

    `steps` are Adam's per layer, on images of `batches` (B, 3, H, W) drawn with `seed`; LabError without any.
    """
    rounded, reference = simulate(calibrated), in_float(calibrated)
    originals, generator = layers(reference), torch.Generator().manual_seed(seed)
    with progress(len(originals), "adaround", unit="layer") as bar:
        for name, layer in layers(rounded).items():
            relu = F.relu if isinstance(rounded.get_submodule(name), nn.Sequential) else nn.Identity()
            inputs = torch.cat([x for x, _ in _values(rounded, layer, batches)])
            targets = torch.cat([relu(y) for _, y in _values(reference, originals[name], batches)])
            weight = originals[name].weight.detach()
            _round_layer(layer, weight, relu, inputs, targets, generator, steps)
            bar.update()
    return rounded


def _round_layer(
    layer: nn.Module, weight: Tensor, relu: Callable, inputs: Tensor, targets: Tensor, generator, steps: int
) -> None:
    """Learn the rounding of one simulated layer in place; `weight` is the float one, before rounding."""
    observer, scale = layer.qconfig.weight(), per_channel(layer.weight_scale, weight)
    zero_point = per_channel(layer.weight_zero_point, weight)
    low, high = observer.quant_min - zero_point, observer.quant_max - zero_point
    floor, nearest = torch.floor(weight / scale), layer.weight.detach().clone()

    def output(values: Tensor, x: Tensor) -> Tensor:
        # Not the layer itself: its hook would quantize the output, which is not this layer's business.
        plain = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward
        return relu(plain(x, values, layer.bias))

    @torch.no_grad()
    def errors(values: Tensor) -> Tensor:  # squared, over all images, per output channel (C,)
        parts = zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)
        squares = ((output(values, x) - y).square() for x, y in parts)
        return sum(square.transpose(0, 1).flatten(1).double().sum(1) for square in squares)

    before = errors(nearest)
    factor = weight.numel() * len(inputs) / before.sum().clamp(min=1e-30).item()
    gamma, zeta = -0.1, 1.1  # the ends of the stretched sigmoid
    v = torch.logit((weight / scale - floor - gamma) / (zeta - gamma)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
    for step in range(steps):
        index = torch.randint(len(inputs), (min(BATCH_SIZE, len(inputs)),), generator=generator)
        up = torch.clamp((zeta - gamma) * torch.sigmoid(v) + gamma, 0, 1)
        moved = output(scale * torch.clamp(floor + up, low, high), inputs[index]) - targets[index]
        loss = factor * moved.square().sum() / len(index)
        if step >= WARM_START * steps:
            beta = 20 - 18 * (step / steps - WARM_START) / (1 - WARM_START)
            loss = loss + (1 - (2 * up - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = scale * torch.clamp(floor + (v >= 0).to(weight.dtype), low, high)
        better = per_channel(errors(learned) <= before, weight)
        layer.weight.copy_(torch.where(better, learned, nearest))
