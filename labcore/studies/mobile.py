"""Two small networks of torchvision's quantizable blocks with depthwise convolutions, for 32×32 images.

Each filter sees one channel: ranges differ more than a scale per tensor can hold (Krishnamoorthi, 2018, 3).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.models import quantization as tv
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.quantization.mobilenetv2 import QuantizableInvertedResidual as MobileBlock
from torchvision.models.quantization.mobilenetv3 import QuantizableInvertedResidual as SqueezedBlock
from torchvision.models.quantization.utils import _replace_relu

from labcore import LabError
from labcore.config import Recipe
from labcore.studies.study import Study


class _Mobile:  # what both networks change in torchvision's
    def forward(self, x: Tensor) -> Tensor:
        # In float32: a CPU's bfloat16 gradients of depthwise convolutions take up to 100 times as long.
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())

    def fuse_model(self, is_qat: bool = False) -> None:
        self.train(is_qat)
        super().fuse_model(is_qat)


class MobileNetV2(_Mobile, tv.QuantizableMobileNetV2):
    """MobileNetV2 (Sandler et al., 2018) with fewer strides; features are (B, 1280, H/8, W/8)."""

    # expansion, channels, blocks, stride of the first
    SETTING = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 1), (6, 64, 2, 2), (6, 96, 1, 1))

    def __init__(self, num_classes: int, width_mult: float):
        super().__init__(num_classes, width_mult, self.SETTING, block=MobileBlock, dropout=0.0)
        _replace_relu(self)  # ReLU fuses with its convolution, ReLU6 does not
        self.classifier = self.classifier[1]  # no dropout: it would be observed as a layer of its own


class EfficientNet(_Mobile, tv.QuantizableMobileNetV3):
    """EfficientNet-B0 (Tan and Le, 2019) with fewer blocks and strides; features are (B, C, H/8, W/8).

    Its blocks are MobileNetV3's. Hard swish and hard sigmoid have int8 kernels; swish and sigmoid have none.
    """

    # expansion, kernel size, channels, blocks, stride of the first
    SETTING = ((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 1, 1), (6, 3, 80, 2, 2), (6, 5, 112, 1, 1))

    def __init__(self, num_classes: int, width_mult: float):
        adjust = InvertedResidualConfig.adjust_channels
        channels, blocks = adjust(32, width_mult), []
        for expansion, kernel, planes, count, stride in self.SETTING:
            for step in (stride, *[1] * (count - 1)):
                inner, out = expansion * channels, adjust(planes, width_mult)
                blocks.append(InvertedResidualConfig(channels, kernel, inner, out, True, "HS", step, 1, 1.0))
                channels = out
        # MobileNetV3's own BatchNorm averages over 100 batches: too slow for short trainings.
        super().__init__(blocks, 1, num_classes, block=SqueezedBlock, norm_layer=nn.BatchNorm2d)
        self.classifier = nn.Linear(self.classifier[0].in_features, num_classes)


MOBILE = {"mobilenet_v2": MobileNetV2, "efficientnet": EfficientNet}


def build_mobile(arch: str, num_classes: int, width_mult: float = 0.5) -> nn.Module:
    """Return a network with fresh weights by its name; `width_mult`, in (0, 4], multiplies its channels."""
    if arch not in MOBILE:
        raise LabError(f"arch must be one of {', '.join(MOBILE)}, found {arch!r}; change it.")
    if not 0 < width_mult <= 4:
        raise LabError(f"width_mult must be above 0 and at most 4, found {width_mult!r}; change it.")
    return MOBILE[arch](num_classes, width_mult)


def mobile_recipe(fp32: Recipe) -> Recipe:
    """Return a profile's FP32 recipe with a third of its epochs, without what is ResNet-9's alone."""
    return replace(fp32, epochs=max(1, fp32.epochs // 3), init="he", bias_lr=1.0)


def train_mobile(study: Study, arch: str, recipe: Recipe) -> nn.Module:
    """Return the network trained on the run's images; loaded where it has been trained."""
    torch.manual_seed(study.run.seed)
    return study.train(build_mobile(arch, len(study.data.classes)), recipe, f"networks/{arch}", arch)
