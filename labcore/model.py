"""Residual networks that eager-mode quantization can convert.

References: He et al. (2016), "Deep residual learning for image recognition"; torchvision's `resnet.py`. Its
parameter names are kept, so that its checkpoints load strictly and give the same logits. (It is not imported:
every process would take twice as long to start.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules, fuse_modules_qat

from labcore import LabError


def _fuse(module: nn.Module, groups: list[list[str]], is_qat: bool) -> None:
    """Fuse in place: for QAT BatchNorm stays (train mode), for PTQ it is folded away (eval mode)."""
    module.train(is_qat)
    (fuse_modules_qat if is_qat else fuse_modules)(module, groups, inplace=True)


def _conv(inplanes: int, planes: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, kernel_size=side, stride=stride, padding=side // 2, bias=False)


class ConvBNReLU(nn.Sequential):
    """A 3×3 convolution, BatchNorm and ReLU: (B, inplanes, H, W) -> (B, planes, H, W)."""

    def __init__(self, inplanes: int, planes: int):
        super().__init__(_conv(inplanes, planes, 3), nn.BatchNorm2d(planes), nn.ReLU(inplace=True))

    def fuse_model(self, is_qat: bool = False) -> None:
        """Make one module of the three."""
        _fuse(self, [["0", "1", "2"]], is_qat)


class QuantizableBasicBlock(nn.Module):
    """Two 3×3 convolutions, the first with the stride, and a shortcut that `downsample` brings to its shape.

    The sum of two int8 tensors needs a scale of its own. FloatFunctional gives it one: it carries an observer
    while calibrating, and becomes one int8 add_relu kernel at conversion.
    """

    expansion = 1  # channels of the output per plane

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = _conv(inplanes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.add_relu = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inplanes, H, W) to (B, planes, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.add_relu.add_relu(out, identity)

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuse each convolution with its BatchNorm, the first with its ReLU as well."""
        _fuse(self, [["conv1", "bn1", "relu"], ["conv2", "bn2"]], is_qat)
        if self.downsample is not None:
            _fuse(self.downsample, [["0", "1"]], is_qat)


class QuantizableBottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolution and a shortcut. Arguments as in QuantizableBasicBlock.

    The ReLUs before the addition are two modules: one alone, fused into conv1, would leave conv2 without it.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = _conv(inplanes, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        outplanes = self.expansion * planes
        self.conv3, self.bn3 = _conv(planes, outplanes, 1), nn.BatchNorm2d(outplanes)
        self.downsample = downsample
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.add_relu = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inplanes, H, W) to (B, 4 planes, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.add_relu.add_relu(out, identity)

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuse each convolution with its BatchNorm, the first two with their ReLU as well."""
        _fuse(self, [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"], ["conv3", "bn3"]], is_qat)
        if self.downsample is not None:
            _fuse(self.downsample, [["0", "1"]], is_qat)


class QuantizableResNet(nn.Module):
    """A ResNet between a QuantStub and a DeQuantStub.

    `layers` counts the blocks of each of the four stages, which have 1, 2, 4 and 8 times `width` channels.
    The stem is "cifar" (3×3, stride 1, no pooling) or "imagenet" (7×7, stride 2, max pooling).
    """

    def __init__(self, block, layers: list[int], num_classes: int, width: int, stem: str):
        super().__init__()
        self.quant = QuantStub()
        self.inplanes = width
        if stem == "cifar":
            self.conv1 = _conv(3, width, 3)
            self.maxpool = nn.Identity()
        elif stem == "imagenet":
            self.conv1 = _conv(3, width, 7, stride=2)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            raise LabError(f"stem must be 'cifar' or 'imagenet', found {stem!r}; change it.")
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, width, layers[0], stride=1)
        self.layer2 = self._make_layer(block, 2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)
        self.dequant = DeQuantStub()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block, planes: int, blocks: int, stride: int) -> nn.Sequential:
        downsample, outplanes = None, planes * block.expansion
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(_conv(self.inplanes, outplanes, 1, stride), nn.BatchNorm2d(outplanes))
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = outplanes
        return nn.Sequential(first, *(block(outplanes, planes) for _ in range(1, blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logits (B, num_classes)."""
        x = self.quant(x)  # int8 from here on, once converted
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, width, H, W), CIFAR stem
        x = self.layer2(self.layer1(x))  # (B, 2 width e, H/2, W/2); e = block.expansion
        x = self.layer4(self.layer3(x))  # (B, 8 width e, H/8, W/8)
        x = torch.flatten(self.avgpool(x), 1)  # (B, 8 width e)
        return self.dequant(self.fc(x))  # (B, num_classes), float32

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuse in place every Conv-BN(-ReLU) of the network.

        One int8 kernel then does the work of three modules, and nothing is rounded between them. For QAT,
        BatchNorm trains on in the fused module (Jacob et al., 2018, section 3.2); else it is folded away.
        """
        _fuse(self, [["conv1", "bn1", "relu"]], is_qat)
        for module in self.modules():
            if isinstance(module, QuantizableBasicBlock | QuantizableBottleneck | ConvBNReLU):
                module.fuse_model(is_qat)


class GlobalMaxPool2d(nn.Module):
    """Max pooling over the whole image; AdaptiveMaxPool2d has no int8 kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 1, 1)."""
        return F.max_pool2d(x, (x.shape[2], x.shape[3]))


class QuantizableResNet9(QuantizableResNet):
    """A small network for a CPU, with the arguments of QuantizableResNet.

    A stage is a convolution, max pooling and blocks with a plain shortcut; the head takes the maximum.
    Few wide layers learn more per second than many narrow ones (Page, 2018, "How to train your ResNet").
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.avgpool = GlobalMaxPool2d()

    def _make_layer(self, block, planes: int, blocks: int, stride: int) -> nn.Sequential:
        if stride == 1:
            return nn.Sequential()
        first = ConvBNReLU(self.inplanes, planes)
        self.inplanes = planes
        return nn.Sequential(first, nn.MaxPool2d(stride), *(block(planes, planes) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to logits (B, num_classes), scaled down: a maximum is larger than a mean."""
        return 0.125 * super().forward(x)


_LAYERS = {
    "resnet9": (QuantizableResNet9, QuantizableBasicBlock, [0, 1, 0, 1]),
    "resnet18": (QuantizableResNet, QuantizableBasicBlock, [2, 2, 2, 2]),
    "resnet34": (QuantizableResNet, QuantizableBasicBlock, [3, 4, 6, 3]),
    "resnet50": (QuantizableResNet, QuantizableBottleneck, [3, 4, 6, 3]),
}


def build_model(arch: str, num_classes: int, width: int = 64, stem: str = "cifar") -> QuantizableResNet:
    """Return the network of that name with He's first weights, from torch's global random generator."""
    network, *structure = _LAYERS[arch]
    return network(*structure, num_classes, width, stem)
