"""From the words of a scheme to torch's QConfig, and what this machine's int8 kernels ask for."""

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch.ao.quantization import FakeQuantize, QConfig, get_default_qat_qconfig, get_default_qconfig
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.observer import MinMaxObserver

from labcore import LabError
from labcore.observer import RANGES, RULES, PowerOfTwoObserver
from labcore.quantizers.learned import LearnedFakeQuantize
from labcore.quantizers.least_error import LeastErrorObserver

WORDS = {
    "bits": tuple(range(2, 9)),
    "range": (*RANGES, "moving_average"),
    "rule": (*RULES, "least_error"),
    "zero_point": ("symmetric", "unsigned", "affine"),
}
MODES = ("ptq", "simulated", "qat", "learned", "lsq")


@dataclass(frozen=True)
class Scheme:
    """How one kind of tensor is quantized; each combination is a cell of the ablation.

    Args:
        bits: 2 … 8.
        range: "minmax", "percentile" (99.99 %), "histogram" or "moving_average" (minmax, constant 0.01).
        rule: "round", "ceil", "floor" or "least_error" to a power of two; "none" keeps the float scale.
        per_channel: one scale per output channel; weights only.
        zero_point: "symmetric" (0 for weights, the middle for activations); for activations "unsigned" (0
            where nothing is negative, else the middle) or "affine".
        max_shift_amount: the exponent's clamp, or None.
    """

    bits: int = 8
    range: str = "minmax"
    rule: str = "round"
    per_channel: bool = False
    zero_point: str = "symmetric"
    max_shift_amount: int | None = None

    def __post_init__(self):
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                listed = ", ".join(map(str, words))
                raise LabError(f"{name} must be one of {listed}, found {getattr(self, name)!r}; change it.")

    def observer_args(self, kind: str, full_range: bool = False) -> dict:
        """Return the arguments of the observer of a "weight" or "activation"; see `observer_class`.

        `full_range`: 8-bit activations have all of quint8 also where kernels would saturate, for simulation.
        Raises LabError where the scheme does not fit.
        """
        args = {"rule": self.rule, "max_shift_amount": self.max_shift_amount, "range": self.range}
        if self.range == "moving_average":
            args |= {"range": "minmax", "averaging_constant": 0.01}
        if kind == "weight":
            if self.zero_point != "symmetric":
                raise LabError(f"weights are symmetric, found zero_point {self.zero_point!r}; change it.")
            args["qscheme"] = torch.per_channel_symmetric if self.per_channel else torch.per_tensor_symmetric
            half = 2 ** (self.bits - 1)
            return args | {"dtype": torch.qint8, "quant_min": -half, "quant_max": half - 1}
        if self.per_channel:
            raise LabError("activations have one scale per tensor, found per_channel=True; change it.")
        low, high = (0, 2**self.bits - 1) if self.bits < 8 or full_range else activation_range()
        if self.bits == 8 and high < 255 and self.rule != "none":
            # Kernels clamp to all of quint8: only a scale that is rounded up keeps values inside 7 bits.
            args["rule"] = "ceil"
        affine, unsigned = self.zero_point == "affine", self.zero_point == "unsigned"
        args["qscheme"] = torch.per_tensor_affine if affine else torch.per_tensor_symmetric
        return args | {"dtype": torch.quint8, "quant_min": low, "quant_max": high, "unsigned": unsigned}


def observer_class(rule: str) -> type[PowerOfTwoObserver]:
    """Return the class of observers whose scales follow this rule."""
    return LeastErrorObserver if rule == "least_error" else PowerOfTwoObserver


def has_vnni() -> bool:
    """Return whether int8 kernels add in 32 bits; x86 without AVX512-VNNI adds pairs in saturating 16."""
    is_x86 = torch.backends.quantized.engine in ("x86", "fbgemm", "onednn")
    return bool(torch.cpu._is_vnni_supported()) or not is_x86


def activation_range() -> tuple[int, int]:
    """Return (quant_min, quant_max) of activations: all of quint8 where kernels add exactly, else 7 bits."""
    return (0, 255) if has_vnni() else (0, 127)


def make_qconfig(weight: Scheme, activation: Scheme, mode: str = "ptq", full_range: bool = False) -> QConfig:
    """Return a QConfig of unsigned activations and signed weights; LabError where schemes or mode do not fit.

    Args:
        mode: "ptq" observes. "simulated" observes and can then round in float, for any bit width. "qat"
            rounds while training: moving averages for activations, weights as they are (torch's default).
            "learned" trains exponents, "lsq" float scales (Esser et al., 2020), from a calibration on.
        full_range: use all 8 bits of activations also where kernels saturate, as "simulated" does.
    """
    if mode not in MODES:
        raise LabError(f"mode must be one of {', '.join(MODES)}, found {mode!r}; change it.")
    if mode == "lsq" and weight.per_channel:
        raise LabError("mode 'lsq' learns one scale per tensor, found per_channel=True; change it.")
    of_activation = activation.observer_args("activation", full_range or mode == "simulated")
    of_weight = weight.observer_args("weight")
    if mode == "qat":
        of_activation["averaging_constant"] = 0.01
    if mode in ("qat", "learned"):
        of_weight["averaging_constant"] = 1.0
    return QConfig(activation=_module(mode, of_activation), weight=_module(mode, of_weight))


def _module(mode: str, args: dict):
    """Return the factory of an observer, or of fake quantization around one."""
    observer = observer_class(args["rule"])
    if mode == "ptq":
        return observer.with_args(**args)
    if mode == "lsq":
        # torch's class sets the zero point of symmetric activations to 0, so they are affine here.
        qscheme = torch.per_tensor_symmetric if args["dtype"] == torch.qint8 else torch.per_tensor_affine
        args = {"qscheme": qscheme} | {name: args[name] for name in ("dtype", "quant_min", "quant_max")}
        return _LearnableFakeQuantize.with_args(observer=MinMaxObserver, use_grad_scaling=True, **args)
    fake_quantize = LearnedFakeQuantize if mode == "learned" else FakeQuantize
    return fake_quantize.with_args(observer=observer, **args)


# Per tensor and symmetric, every scale a power of two between 2^-8 and 2^8.
REFERENCE = Scheme(max_shift_amount=8)
# The same ranges, with float scales.
FLOAT = replace(REFERENCE, rule="none", max_shift_amount=None)
# What study 1 recommends: of weights and of activations.
_LEAST = Scheme(rule="least_error")
RECOMMENDED = replace(_LEAST, per_channel=True), replace(_LEAST, zero_point="unsigned")


class CustomQConfig(Enum):
    """POWER2 is the reference's; DEFAULT is torch's: float scales, histograms, weights per channel."""

    POWER2 = make_qconfig(REFERENCE, REFERENCE)
    DEFAULT = get_default_qconfig(torch.backends.quantized.engine)

    @property
    def qat(self) -> QConfig:
        """Return the same scheme with fake quantization."""
        if self is CustomQConfig.DEFAULT:
            return get_default_qat_qconfig(torch.backends.quantized.engine)
        return make_qconfig(REFERENCE, REFERENCE, "qat")
