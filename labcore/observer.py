"""Power-of-two quantization: scale_approximate, the observer, and the quantization configurations built on it.

A scale of 2^k turns requantization into a shift. Formulas follow Jacob et al. (2018), section 2, and torch's own
MinMaxObserver; the rounding of the scale is part 4 of the assignment.
"""

import math
from enum import Enum

import torch
from torch import Tensor
from torch.ao.quantization import FakeQuantize, QConfig, get_default_qat_qconfig, get_default_qconfig
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from labcore import LabError

# Exponents of normal float32 numbers: outside of them no exact power of two has a full-precision float32.
EXPONENT_MIN, EXPONENT_MAX = -126, 127
_SQRT_HALF = math.sqrt(0.5)
_PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def scale_approximate(scale: float | Tensor, max_shift_amount: int | None = 8) -> float | Tensor:
    """The nearest power of two, its exponent clamped: 2^clamp(round(log2(scale)), -max_shift_amount, max_shift_amount).

    The exponent is read from the number's own bits (scale = m 2^e with 0.5 <= m < 1, so round(log2(scale)) is e where
    m >= sqrt(1/2) and e - 1 elsewhere): exact, the same on CPU and GPU, and without waiting for the device.

    Args:
        scale: a number, or a float32 or float64 tensor of any shape.
        max_shift_amount: 0 … 126, or None for no clamp but float32's own range.

    Returns:
        The same kind and shape as `scale`. Zero, negative values and NaN come back as they are; +inf gives the
        largest power allowed.

    Raises:
        LabError: max_shift_amount is out of range.
    """
    if max_shift_amount is not None and not 0 <= max_shift_amount <= -EXPONENT_MIN:
        raise LabError(
            f"max_shift_amount must be in 0 … {-EXPONENT_MIN} or None, found {max_shift_amount!r}; change it."
        )
    low = EXPONENT_MIN if max_shift_amount is None else -max_shift_amount
    high = EXPONENT_MAX if max_shift_amount is None else max_shift_amount
    if not isinstance(scale, Tensor):
        number = torch.tensor(scale, dtype=torch.float64)
        return scale_approximate(number, max_shift_amount).item() if scale > 0 else scale
    mantissa, exponent = torch.frexp(scale.clamp(max=torch.finfo(torch.float32).max))
    exponent = (exponent - (mantissa.double() < _SQRT_HALF).to(exponent.dtype)).clamp(low, high)
    # The exponent field of a float32, written as an integer: exactly 2^exponent.
    power = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(scale > 0, power.to(scale.dtype), scale)


class PowerOfTwoObserver(UniformQuantizationObserverBase):
    r"""Observes a tensor's range and gives a scale that is a power of two.

    With the observed range widened to hold zero, lo = min(x_min, 0), hi = max(x_max, 0), and Q = quant_max - quant_min:

        symmetric:  raw scale = max(-lo, hi) / (Q / 2),  zero_point = 0 (qint8) or 128 (quint8; the middle of the range)
        affine:     raw scale = (hi - lo) / Q,           zero_point = clamp(quant_min - round(lo / scale))
        both:       scale = scale_approximate(raw scale, max_shift_amount)

    Where unsigned codes are kept below 255 (see activation_range), the scale is rounded up instead: kernels clamp to the
    whole of quint8, so nothing else would keep values inside the narrower range.

    The raw scale equals that of torch's MinMaxObserver (MovingAverageMinMaxObserver with `averaging_constant`) bit for
    bit. Everything is computed on tensors; nothing waits for the device.

    Degenerate input: an empty tensor changes nothing; all zeros give the smallest scale allowed; a batch with NaN or
    infinity is left out for the channels it touches and counted in `num_skipped`; a channel never seen has scale 1 and
    zero point 0.

    Args:
        dtype: torch.quint8 or torch.qint8.
        qscheme: torch.per_tensor_ or per_channel_ symmetric or affine.
        max_shift_amount: the exponent's clamp, or None.
        averaging_constant: None for the range of everything seen; c for x_min += c (batch min - x_min), likewise x_max.
        ch_axis: the channel axis of per-channel schemes.
        quant_min, quant_max: the integer range, where it is not the full range of `dtype`.

    References: part 4 of the assignment (where it is called CusQuantObserver); torch.ao.quantization.observer.
    """

    min_val: Tensor
    max_val: Tensor
    num_skipped: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        max_shift_amount: int | None = 8,
        averaging_constant: float | None = None,
        ch_axis: int = 0,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **kwargs,
    ):
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, **kwargs)
        if averaging_constant is not None and not 0 < averaging_constant <= 1:
            raise LabError(
                f"averaging_constant must be in (0, 1] or None, found {averaging_constant!r}; change it."
            )
        scale_approximate(1.0, max_shift_amount)  # checks the range
        self.max_shift_amount = max_shift_amount
        self.averaging_constant = averaging_constant
        self.ch_axis = ch_axis if qscheme in _PER_CHANNEL else -1
        # A range that was never seen is inverted: min_val = inf > max_val = -inf.
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))
        self.register_buffer("num_skipped", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Take the range of `x` (any shape, any float type) into account; return `x` unchanged."""
        if x.numel() == 0:
            return x
        values = x.detach()
        if self.qscheme in _PER_CHANNEL:
            channels = (
                values.transpose(0, self.ch_axis).flatten(1) if values.dim() > 1 else values.unsqueeze(1)
            )  # (C, n)
            low, high = torch.aminmax(channels, dim=1)
        else:
            low, high = torch.aminmax(values)
        low, high = low.to(self.min_val.dtype), high.to(self.max_val.dtype)  # () or (C,)
        if self.min_val.shape != low.shape:
            self.reset_min_max_vals(low.shape)
        usable = torch.isfinite(low) & torch.isfinite(high)  # aminmax hands on NaN
        self.num_skipped += (~usable).any()
        if self.averaging_constant is None:
            new_low, new_high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        else:
            first = self.min_val > self.max_val
            new_low = torch.where(first, low, self.min_val + self.averaging_constant * (low - self.min_val))
            new_high = torch.where(
                first, high, self.max_val + self.averaging_constant * (high - self.max_val)
            )
        self.min_val.copy_(torch.where(usable, new_low, self.min_val))
        self.max_val.copy_(torch.where(usable, new_high, self.max_val))
        return x

    def raw_scale(self) -> Tensor:
        """The scale before it is rounded to a power of two; shape (1,) per tensor, (C,) per channel."""
        low, high = self.min_val.clamp(max=0), self.max_val.clamp(min=0)
        steps = float(self.quant_max - self.quant_min)
        raw = torch.maximum(-low, high) / (steps / 2) if self.qscheme in _SYMMETRIC else (high - low) / steps
        return torch.maximum(raw, self.eps)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point): float32 and int64, each of shape (1,) per tensor or (C,) per channel."""
        raw = self.raw_scale()
        scale = scale_approximate(raw, self.max_shift_amount)
        if self.dtype == torch.quint8 and self.quant_max < 255:
            scale = torch.where(scale < raw, 2 * scale, scale)
        if self.qscheme not in _SYMMETRIC:
            zero_point = self.quant_min - torch.round(self.min_val.clamp(max=0) / scale)
            zero_point = zero_point.clamp(self.quant_min, self.quant_max).to(torch.int64)
        else:
            middle = (self.quant_min + self.quant_max + 1) // 2 if self.dtype == torch.quint8 else 0
            zero_point = torch.full_like(scale, middle, dtype=torch.int64)
        never_seen = (self.min_val > self.max_val).expand_as(scale)
        return torch.where(never_seen, 1.0, scale), torch.where(never_seen, 0, zero_point)

    def reset_min_max_vals(self, shape: tuple[int, ...] = ()) -> None:
        """Forget what was seen."""
        self.min_val = torch.full(shape, float("inf"), device=self.min_val.device)
        self.max_val = torch.full(shape, float("-inf"), device=self.max_val.device)

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, qscheme={self.qscheme}, max_shift_amount={self.max_shift_amount}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.get(prefix + "min_val")
        if stored is not None and stored.shape != self.min_val.shape:
            self.reset_min_max_vals(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


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


def power_of_two_qconfig(
    max_shift_amount: int | None = 8,
    activation: torch.qscheme = torch.per_tensor_symmetric,
    weight: torch.qscheme = torch.per_tensor_symmetric,
    is_qat: bool = False,
) -> QConfig:
    """A QConfig of power-of-two observers: unsigned activations, signed weights.

    With `is_qat` they sit in fake quantization, and activation ranges are moving averages, as in torch's default.
    """
    low, high = activation_range()
    activations = {
        "dtype": torch.quint8,
        "qscheme": activation,
        "max_shift_amount": max_shift_amount,
        "quant_min": low,
        "quant_max": high,
    }
    weights = {
        "dtype": torch.qint8,
        "qscheme": weight,
        "max_shift_amount": max_shift_amount,
        "quant_min": -128,
        "quant_max": 127,
    }
    if not is_qat:
        return QConfig(PowerOfTwoObserver.with_args(**activations), PowerOfTwoObserver.with_args(**weights))
    return QConfig(
        FakeQuantize.with_args(observer=PowerOfTwoObserver, averaging_constant=0.01, **activations),
        FakeQuantize.with_args(observer=PowerOfTwoObserver, **weights),
    )


class CustomQConfig(Enum):
    """The configurations to choose from; `.value` observes (PTQ), `.qat` also simulates (QAT).

    POWER2 is the reference's scheme: per tensor, symmetric, every scale a power of two between 2^-8 and 2^8.
    DEFAULT is torch's own for this machine's engine: float scales, histogram ranges, per-channel weights.
    """

    POWER2 = power_of_two_qconfig()
    DEFAULT = get_default_qconfig(torch.backends.quantized.engine)

    @property
    def qat(self) -> QConfig:
        """The same scheme with fake quantization."""
        if self is CustomQConfig.DEFAULT:
            return get_default_qat_qconfig(torch.backends.quantized.engine)
        return power_of_two_qconfig(is_qat=True)


# The names of the assignment's starter code.
CusQuantObserver = PowerOfTwoObserver
