"""Two small networks of depthwise convolutions for 32×32 images, to hold against the residual networks of `model`.

The claim to test is that residual networks tolerate int8 well, and that MobileNet and EfficientNet may not: a depthwise
filter sees one channel, so that the ranges of its channels differ more than one scale per tensor can hold.

References: Sandler et al. (2018), "MobileNetV2"; Tan and Le (2019), "EfficientNet"; Krishnamoorthi (2018), section 3.
Blocks and initialisation are those of torchvision's `models/quantization`.
"""

import torch
from torch import Tensor, nn
from torchvision.models import quantization as tv
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.quantization.mobilenetv2 import QuantizableInvertedResidual as MobileBlock
from torchvision.models.quantization.mobilenetv3 import QuantizableInvertedResidual as SqueezedBlock
from torchvision.models.quantization.utils import _replace_relu

from labcore import LabError


class _Mobile:
    """What both networks change in torchvision's."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, num_classes).

        On a CPU always in float32: the bfloat16 gradients of depthwise convolutions with a stride or 5×5 filters have no
        fast kernel, and take 3 to 100 times as long.
        """
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuse in place every Conv-BN(-ReLU); BatchNorm is folded away, or kept inside the fused module for QAT.

        Hard swish stays a module with a scale of its own.
        """
        self.train(is_qat)
        super().fuse_model(is_qat)


class MobileNetV2(_Mobile, tv.QuantizableMobileNetV2):
    """MobileNetV2 with two strided stages after its strided stem, and ReLU for ReLU6, as in torchvision's int8 networks.

    Its features are (B, 1280, H/8, W/8).
    """

    # expansion, channels, blocks, stride of the first
    SETTING = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 1), (6, 64, 2, 2), (6, 96, 1, 1))

    def __init__(self, num_classes: int, width_mult: float):
        super().__init__(num_classes, width_mult, self.SETTING, block=MobileBlock, dropout=0.0)
        _replace_relu(self)  # ReLU fuses with its convolution, ReLU6 does not
        self.classifier = self.classifier[1]  # no dropout: it would be observed as a layer of its own


class EfficientNet(_Mobile, tv.QuantizableMobileNetV3):
    """EfficientNet-B0 with two strided stages after its strided stem, and fewer blocks.

    Its blocks are MobileNetV3's with squeeze-and-excitation in every one. Hard swish and hard sigmoid stand for swish and
    sigmoid (ReLU inside squeeze-and-excitation, as in MobileNetV3): eager mode has int8 kernels for them.

    Its features are (B, C, H/8, W/8), with C six times the channels of the last block.
    """

    # expansion, kernel size, channels, blocks, stride of the first
    SETTING = ((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 1, 1), (6, 3, 80, 2, 2), (6, 5, 112, 1, 1))

    def __init__(self, num_classes: int, width_mult: float):
        channels = InvertedResidualConfig.adjust_channels(32, width_mult)
        blocks = []
        for expansion, kernel, planes, count, stride in self.SETTING:
            for index in range(count):
                out = InvertedResidualConfig.adjust_channels(planes, width_mult)
                step = stride if index == 0 else 1
                blocks.append(
                    InvertedResidualConfig(
                        channels,
                        kernel,
                        expansion * channels,
                        out,
                        True,
                        "HS",
                        step,
                        dilation=1,
                        width_mult=1.0,
                    )
                )
                channels = out
        # MobileNetV3's own BatchNorm averages over 100 batches: too slow for short trainings.
        super().__init__(blocks, 1, num_classes, block=SqueezedBlock, norm_layer=nn.BatchNorm2d)
        self.classifier = nn.Linear(
            self.classifier[0].in_features, num_classes
        )  # EfficientNet's head is one layer


_NETWORKS = {"mobilenet_v2": MobileNetV2, "efficientnet": EfficientNet}
MOBILE = tuple(_NETWORKS)


def build_mobile(arch: str, num_classes: int, width_mult: float = 0.5) -> nn.Module:
    """The network of that name with fresh weights, from torch's global random generator.

    `width_mult` multiplies the channels, which are rounded to multiples of 8.

    Raises LabError for an unknown name, and for a width_mult outside (0, 4].
    """
    if arch not in MOBILE:
        raise LabError(f"arch must be one of {', '.join(MOBILE)}, found {arch!r}; change it.")
    if not 0 < width_mult <= 4:
        raise LabError(f"width_mult must be above 0 and at most 4, found {width_mult!r}; change it.")
    return _NETWORKS[arch](num_classes, width_mult)
