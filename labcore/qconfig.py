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

ZERO_POINTS = ("symmetric", "unsigned", "affine")
# PTQ: observers alone, to be converted. SIMULATED: PTQ in float, for bit widths without a kernel. QAT: moving averages.
# LEARNED: QAT with trained exponents. LSQ: QAT with trained float scales.
MODES = ("ptq", "simulated", "qat", "learned", "lsq")


@dataclass(frozen=True)
class Scheme:
    """How one kind of tensor, weights or activations, is quantized. Every combination is a cell of the ablation.

    Args:
        bits: 2 … 8.
        range: "minmax", "percentile" (99.99 %) or "histogram"; "moving_average" is min-max with constant 0.01.
        rule: "round", "ceil", "floor" or "least_error" to a power of two; "none" keeps the float scale.
        per_channel: one scale per output channel; weights only.
        zero_point: "symmetric" (0 for signed weights, the middle for unsigned activations), "unsigned" (0 for activations
            that are never negative, the middle for others) or "affine"; the last two for activations only.
        max_shift_amount: the exponent's clamp, or None.
    """

    bits: int = 8
    range: str = "minmax"
    rule: str = "round"
    per_channel: bool = False
    zero_point: str = "symmetric"
    max_shift_amount: int | None = None

    def __post_init__(self):
        known = {
            "bits": tuple(range(2, 9)),
            "range": (*RANGES, "moving_average"),
            "rule": RULES,
            "zero_point": ZERO_POINTS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                listed = ", ".join(map(str, values))
                raise LabError(f"{name} must be one of {listed}, found {getattr(self, name)!r}; change it.")

    def observer_args(self, kind: str, full_range: bool = False) -> dict:
        """Arguments of PowerOfTwoObserver for "weight" or "activation".

        `full_range` gives 8-bit activations all of quint8, also where this machine's kernels would saturate (see
        `activation_range`): for simulation, which never does.

        Raises LabError where the scheme does not fit the kind of tensor.
        """
        symmetric, affine = torch.per_tensor_symmetric, torch.per_tensor_affine
        args = {
            "range": "minmax" if self.range == "moving_average" else self.range,
            "averaging_constant": 0.01 if self.range == "moving_average" else None,
            "rule": self.rule,
            "max_shift_amount": self.max_shift_amount,
        }
        if kind == "weight":
            if self.zero_point != "symmetric":
                raise LabError(f"weights are symmetric, found zero_point {self.zero_point!r}; change it.")
            half = 2 ** (self.bits - 1)
            return args | {
                "dtype": torch.qint8,
                "qscheme": torch.per_channel_symmetric if self.per_channel else symmetric,
                "quant_min": -half,
                "quant_max": half - 1,
            }
        if self.per_channel:
            raise LabError("activations have one scale per tensor, found per_channel=True; change it.")
        low, high = (0, 2**self.bits - 1) if self.bits < 8 or full_range else activation_range()
        if self.bits == 8 and high < 255 and self.rule != "none":
            # Kernels clamp to the whole of quint8: only a scale that is rounded up keeps values inside 7 bits.
            args["rule"] = "ceil"
        return args | {
            "dtype": torch.quint8,
            "qscheme": affine if self.zero_point == "affine" else symmetric,
            "unsigned": self.zero_point == "unsigned",
            "quant_min": low,
            "quant_max": high,
        }


def has_vnni() -> bool:
    """Whether int8 kernels add up products in 32 bits: x86 with AVX512-VNNI, or not x86.

    Without it, x86 kernels add two products of uint8 and int8 in 16 bits, which saturate.
    """
    return bool(torch.cpu._is_vnni_supported()) or torch.backends.quantized.engine not in (
        "x86",
        "fbgemm",
        "onednn",
    )


def activation_range() -> tuple[int, int]:
    """(quant_min, quant_max) for activations: all of quint8 where the processor adds exactly, else 7 bits."""
    return (0, 255) if has_vnni() else (0, 127)


def make_qconfig(weight: Scheme, activation: Scheme, mode: str = "ptq", full_range: bool = False) -> QConfig:
    """A QConfig: unsigned activations, signed weights, each with its scheme.

    Activations of 8 bits keep to what this machine's kernels add exactly, unless `full_range` is set; "simulated" always
    has all 8 bits.

    Modes: "ptq" observes. "simulated" observes and can then round in float. "qat" rounds while training; ranges of
    activations are moving averages, those of weights are of the weights as they are (as in torch's default). "learned"
    trains exponents (LearnedFakeQuantize), "lsq" float scales with torch's _LearnableFakeQuantize (Esser et al., 2020),
    per tensor; both need calibration first, and take rule and clamp as the start.

    Raises LabError for an unknown mode, and for a scheme that does not fit.
    """
    if mode not in MODES:
        raise LabError(f"mode must be one of {', '.join(MODES)}, found {mode!r}; change it.")
    args = {
        "activation": activation.observer_args("activation", full_range or mode == "simulated"),
        "weight": weight.observer_args("weight"),
    }
    if mode == "ptq":
        return QConfig(**{kind: PowerOfTwoObserver.with_args(**part) for kind, part in args.items()})
    if mode == "lsq":
        if weight.per_channel:
            raise LabError("mode 'lsq' learns one scale per tensor, found per_channel=True; change it.")
        # torch's class sets the zero point of symmetric activations to 0, so they are affine here.
        schemes = {"activation": torch.per_tensor_affine, "weight": torch.per_tensor_symmetric}
        return QConfig(
            **{
                kind: _LearnableFakeQuantize.with_args(
                    observer=MinMaxObserver,
                    use_grad_scaling=True,
                    qscheme=schemes[kind],
                    **{name: part[name] for name in ("dtype", "quant_min", "quant_max")},
                )
                for kind, part in args.items()
            }
        )
    if mode == "qat":
        args["activation"]["averaging_constant"] = 0.01
    if mode in ("qat", "learned"):
        args["weight"]["averaging_constant"] = 1.0
    fake_quantize = LearnedFakeQuantize if mode == "learned" else FakeQuantize
    return QConfig(
        **{kind: fake_quantize.with_args(observer=PowerOfTwoObserver, **part) for kind, part in args.items()}
    )


# The reference's scheme, per tensor and symmetric, every scale a power of two between 2^-8 and 2^8.
REFERENCE = Scheme(max_shift_amount=8)
# What study 1 recommends: of weights and of activations.
RECOMMENDED = (
    Scheme(rule="least_error", per_channel=True),
    Scheme(rule="least_error", zero_point="unsigned"),
)
# The same ranges as the reference's, with float scales.
FLOAT = replace(REFERENCE, rule="none", max_shift_amount=None)


class CustomQConfig(Enum):
    """The configurations to choose from; `.value` observes (PTQ), `.qat` also simulates (QAT).

    POWER2 is the reference's scheme. DEFAULT is torch's own for this machine's engine: float scales, histogram ranges,
    per-channel weights.
    """

    POWER2 = make_qconfig(REFERENCE, REFERENCE)
    DEFAULT = get_default_qconfig(torch.backends.quantized.engine)

    @property
    def qat(self) -> QConfig:
        """The same scheme with fake quantization."""
        if self is CustomQConfig.DEFAULT:
            return get_default_qat_qconfig(torch.backends.quantized.engine)
        return make_qconfig(REFERENCE, REFERENCE, "qat")
