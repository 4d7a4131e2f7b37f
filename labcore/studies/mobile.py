"""Claim R18: torchvision's MobileNetV2 and EfficientNet-B0 on small images, several trainings of each.

Each filter of a depthwise convolution sees one channel, and channels differ in range more than one scale per
tensor can hold (Krishnamoorthi, 2018, 3). Trainings are what was drawn anew; test images judge, and no choice
is made on them.
"""

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules, fuse_modules_qat
from torchvision.models import efficientnet
from torchvision.models import quantization as tv
from torchvision.models.quantization.mobilenetv2 import QuantizableInvertedResidual
from torchvision.models.quantization.utils import _replace_relu
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from labcore import LabError
from labcore.config import Profile, Recipe
from labcore.evaluate import predict
from labcore.files.artifacts import UNREADABLE, read_npz, write_npz
from labcore.files.code import modules_hash
from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, Scheme
from labcore.quantize import RoundedAverage, simulate
from labcore.stats import mean_over_trainings, shared_hits
from labcore.studies.errors import errors_alone
from labcore.studies.study import Cell, Study
from labcore.train import fit, training_identity

# Of weights and of activations. The claim is judged by the first, the others are held beside it.
SCHEMES = {
    "reference": (REFERENCE, REFERENCE),
    "no clamp": (Scheme(), Scheme()),
    "float scales": (FLOAT, FLOAT),
    "best power of two": RECOMMENDED,
}
TORCH = "torch's default"


class _Small:  # what both networks change in torchvision's
    def _keep_resolution(self) -> None:
        """Take away the first and the last of five strides, and nothing else: 32×32 images end at 4×4."""
        strided = [module for module in self.modules() if getattr(module, "stride", 0) == (2, 2)]
        for convolution in (strided[0], strided[-1]):
            convolution.stride = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # In float32: a CPU's bfloat16 gradients of depthwise convolutions take up to 100 times as long.
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class MobileNetV2(_Small, tv.QuantizableMobileNetV2):
    """MobileNetV2 (Sandler et al., 2018) without dropout; features are (B, 1280, H/8, W/8).

    ReLU stands for ReLU6, as in torchvision's quantizable network: it fuses with its convolution.
    """

    def __init__(self, num_classes: int, width_mult: float = 1.0):
        super().__init__(num_classes, width_mult, block=QuantizableInvertedResidual, dropout=0.0)
        _replace_relu(self)
        self._keep_resolution()
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # a module, so that its mean can be rounded

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def means(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return what averages, with the module whose quantized output it takes in."""
        return [(self, self.features[-1][0])]


class EfficientNet(_Small, efficientnet.EfficientNet):
    """EfficientNet-B0 (Tan and Le, 2019) without dropout; features are (B, 1280, H/8, W/8).

    Made quantizable: FloatFunctional adds and multiplies; SiLU and sigmoid compute in float between
    quantized tensors.
    """

    def __init__(self, num_classes: int, width_mult: float = 1.0):
        scaled = {"width_mult": width_mult, "depth_mult": min(1.0, 2 * width_mult)}  # smoke is quick
        setting, _ = efficientnet._efficientnet_conf("efficientnet_b0", **scaled)
        for stage in setting:
            stage.block = _Block
        super().__init__(setting, dropout=0.0, stochastic_depth_prob=0.0, num_classes=num_classes)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if type(child) in (nn.SiLU, nn.Sigmoid):
                    setattr(module, name, nn.Sequential(DeQuantStub(), type(child)(), QuantStub()))
        self._keep_resolution()
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.dequant(super()._forward_impl(self.quant(x)))

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuse every convolution with its BatchNorm, in place."""
        fuse = fuse_modules_qat if is_qat else fuse_modules
        for module in self.modules():
            if type(module) is Conv2dNormActivation:
                fuse(module, ["0", "1"], inplace=True)

    def means(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return what averages, with the module whose quantized output it takes in."""
        blocks = [module.block for module in self.modules() if isinstance(module, _Block)]
        return [(block[-2], block[-3][-1][-1]) for block in blocks] + [(self, self.features[-1][-1][-1])]


class _Block(efficientnet.MBConv):
    def __init__(self, *args):
        super().__init__(*args, se_layer=_Squeeze)
        self.skip_add = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return self.skip_add.add(out, x) if self.use_res_connect else out


class _Squeeze(SqueezeExcitation):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skip_mul = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip_mul.mul(x, self._scale(x))


MOBILE = {"mobilenet_v2": MobileNetV2, "efficientnet_b0": EfficientNet}


def build_mobile(arch: str, num_classes: int, width_mult: float = 1.0) -> nn.Module:
    """Return a network with fresh weights by its name; `width_mult`, in (0, 4], multiplies its channels.

    Below a half, EfficientNet has fewer blocks as well. Raises LabError for another name or number.
    """
    if arch not in MOBILE:
        raise LabError(f"arch must be one of {', '.join(MOBILE)}, found {arch!r}; change it.")
    if not 0 < width_mult <= 4:
        raise LabError(f"width_mult must be above 0 and at most 4, found {width_mult!r}; change it.")
    return MOBILE[arch](num_classes, width_mult)


def mobile_recipe(profile: Profile, train_images: int) -> tuple[Recipe, float]:
    """Return how both networks are trained, and what multiplies their channels: 1, or less in small profiles.

    That is half the profile's epochs, at most seven, each of a third of the images: on CIFAR-10 at most about
    eight minutes of two cores. Weight decay is torchvision's for MobileNetV2.
    """
    fp32, size = profile.fp32, min(64, profile.fp32.batch_size)
    recipe = Recipe(
        epochs=min(7, max(1, fp32.epochs // 2)),
        epoch_images=max(size, train_images // 3),
        batch_size=size,
        lr=0.03,
        weight_decay=4e-5,
        **{name: getattr(fp32, name) for name in ("small_share", "small_size", "augment")},
    )
    return recipe, min(1.0, profile.width / 32)


class Mobile(Study):
    """A study's experiments on a network of MOBILE, trained from the run's seed + `number` if need be."""

    def __init__(self, study: Study, arch: str, number: int):
        self.__dict__ |= {
            name: value for name, value in vars(study).items() if name not in ("model", "reference")
        }
        self._calibrated, self._answers, self.name = {}, {}, f"{arch}, training {number + 1}"
        seed = study.run.seed + number
        recipe, width_mult = mobile_recipe(study.run.profile, len(study.split.train))
        torch.manual_seed(seed)
        model = build_mobile(arch, len(study.data.classes), width_mult)
        code = modules_hash("studies.mobile")  # what `forward` does is in no hash of a training's own
        folder = study.run.path(study.stage, f"networks/{arch}-{seed}-{code[:8]}")
        split = replace(study.split, validation=study.split.validation[::5])  # they choose the epoch
        args = recipe, study.data, split, seed
        identity = training_identity(*args, model)  # which decides the weights
        self.base = study.base | {"weights": identity, "mobile": code}
        self._fit = partial(fit, model, *args, folder, description=self.name)

    @cached_property
    def model(self) -> nn.Module:
        """The FP32 network, trained when a cell first asks for it."""
        return self._fit().model.cpu()

    def simulated(self, scheme: str) -> nn.Module:
        """Quantize by one of SCHEMES, in float with rounded numbers: int8 arithmetic with exact sums.

        Not on int8 kernels: fbgemm's for depthwise convolutions adds pairs of products in saturating 16 bits
        also where a processor has VNNI.
        """
        network = simulate(self.prepared(*SCHEMES[scheme]))
        for parent, source in network.means():
            parent.avgpool = RoundedAverage(parent.avgpool, source.activation_post_process)
        return network

    def hits(self) -> dict[str, np.ndarray]:
        """Return the `shared_hits` of FP32 and each quantized network on the test images: (N,) by scheme."""
        networks = {"fp32": lambda: self.model}
        networks |= {scheme: lambda scheme=scheme: self.simulated(scheme) for scheme in SCHEMES}
        networks[TORCH] = self.torch_default
        cells = {
            scheme: Cell({"mobile": scheme}, lambda build=build: {"right": self._right(build())})
            for scheme, build in networks.items()
        }
        table = self.cells(cells, f"{self.name}, quantized")
        return {scheme: np.array(table.loc[scheme, "right"]) for scheme in networks}

    def to_blame(self, rows: int = 3) -> pd.DataFrame:
        """Return the activations that move the logits most, by the reference's scheme (`errors_alone`)."""

        def compute() -> dict:
            worst = errors_alone(self.simulated("reference"), self.batches[0][:64]).head(rows)
            return {"worst": worst.to_dict("records")}

        return pd.DataFrame(
            self.cells({"worst": Cell({"to blame": rows}, compute)}, self.name)["worst"].item()
        )

    def _right(self, model: nn.Module) -> list[float]:
        logits = predict(model, self.data.test_images, description=f"{self.name}, test")
        return shared_hits(logits, self.data.test_labels).tolist()


def save_hits(path: Path, hits: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """Write `Mobile.hits` of trainings by network, float32: "network/scheme" (trainings, N)."""
    arrays = {
        f"{network}/{scheme}": np.stack([training[scheme] for training in trainings]).astype(np.float32)
        for network, trainings in hits.items()
        for scheme in trainings[0]
    }
    write_npz(path, **arrays)


def load_hits(path: Path) -> dict[str, np.ndarray]:
    """Return what `save_hits` wrote; LabError where it is missing or damaged."""
    try:
        return read_npz(path)
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run notebook 06 again.") from None


def compare_architectures(saved: dict[str, np.ndarray]) -> dict[str, list[dict]]:
    """Return architectures: a row per network and scheme, from what `save_hits` wrote.

    acc and fp32_acc are means over trainings. acc_drop_pp, _low and _high are the points lost against the
    same training's FP32, with the 95 % interval for other trainings and images (`mean_over_trainings`) and
    its `df`, degrees of freedom. `each` is the drop per training, `trainings` their number.
    """
    rows = []
    for name, hits in saved.items():
        network, _, scheme = name.partition("/")
        if scheme == "fp32":
            continue
        right, before = hits.astype(float), saved[f"{network}/fp32"].astype(float)  # (trainings, N)
        drop = mean_over_trainings(100 * (before - right))
        rows.append(
            {
                "network": network,
                "scheme": scheme,
                "fp32_acc": float(before.mean()),
                "acc": float(right.mean()),
                "acc_drop_pp": drop["mean"],
                "acc_drop_pp_low": drop["low"],
                "acc_drop_pp_high": drop["high"],
                "df": drop["df"],
                "each": drop["each"],
                "trainings": len(hits),
            }
        )
    return {"architectures": rows}
