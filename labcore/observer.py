"""Part 4 of the assignment: scales that are powers of two (Jacob et al., 2018, section 2; torch)."""

import math

import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver, UniformQuantizationObserverBase
from torch.ao.quantization.utils import is_per_channel

from labcore import LabError

# Exponents of normal float32 numbers: beyond them no exact power of two has a full-precision float32.
EXPONENT_MIN, EXPONENT_MAX = -126, 127
RANGES = ("minmax", "percentile", "histogram")
RULES = ("round", "ceil", "floor", "none")
_SQRT_HALF = math.sqrt(0.5)
_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
_MAX_SAMPLES = 2**20


def _check(name: str, value, is_fine: bool, expected: str) -> None:
    if not is_fine:
        raise LabError(f"{name} must be {expected}, found {value!r}; change it.")


def scale_approximate(
    scale: float | Tensor, max_shift_amount: int | None = 8, rule: str = "round"
) -> float | Tensor:
    """Return the power of two 2^clamp(round(log2(scale)), -max_shift_amount, max_shift_amount).

    Requantizing with such scales is a shift. The exponent is read from the number's bits: with scale = m 2^e
    and 0.5 <= m < 1 it is e where m >= sqrt(1/2), else e - 1. That is exact, and waits for no device.

    Args:
        scale: a number, or a float32 or float64 tensor of any shape; the result is of the same kind. Zero,
            negative values and NaN come back as they are; infinity gives the largest power allowed.
        max_shift_amount: 0 … 126, or None for no clamp but float32's own range; LabError otherwise.
        rule: "round" to the nearest exponent, "ceil" (nothing is clipped) or "floor"; LabError otherwise.
    """
    _check("max_shift_amount", max_shift_amount, 0 <= (max_shift_amount or 0) <= 126, "in 0 … 126 or None")
    thresholds = {"round": _SQRT_HALF, "ceil": math.nextafter(0.5, 1), "floor": 1.0}
    _check("rule", rule, rule in thresholds, f"one of {', '.join(thresholds)}")
    if not isinstance(scale, Tensor):
        return scale_approximate(torch.tensor(scale, dtype=torch.float64), max_shift_amount, rule).item()
    limit = EXPONENT_MAX if max_shift_amount is None else max_shift_amount
    mantissa, exponent = torch.frexp(scale.clamp(max=torch.finfo(torch.float32).max))
    is_below = mantissa.double() < thresholds[rule]
    exponent = (exponent - is_below.int()).clamp(max(-limit, EXPONENT_MIN), limit)
    return torch.where(scale > 0, exact_power(exponent).to(scale.dtype), scale)


def exact_power(exponent: Tensor) -> Tensor:
    """Return exactly 2^exponent: the exponent field of a float32, written as an integer."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def sample(rows: Tensor) -> Tensor:
    """Return (C, n) in float32; a single row is thinned to about _MAX_SAMPLES values, evenly spaced."""
    step = 1 if len(rows) > 1 else math.ceil(rows.numel() / _MAX_SAMPLES) | 1
    return rows[:, ::step].float()


class PowerOfTwoObserver(UniformQuantizationObserverBase):
    r"""Observe a tensor's range, and give a scale that is a power of two, and a zero point.

    With lo = min(min_val, 0), hi = max(max_val, 0) and Q = quant_max - quant_min:

        symmetric:  raw scale = max(-lo, hi) / (Q / 2),  zero point = 0 (qint8) or the middle code (quint8)
        affine:     raw scale = (hi - lo) / Q,           zero point = clamp(quant_min - round(lo / scale))
        unsigned:   raw scale = hi / Q,                  zero point = quant_min
        scale = scale_approximate(raw scale, max_shift_amount, rule); by the rule "none" the raw scale

    "minmax" has the raw scale of torch's MinMaxObserver or MovingAverageMinMaxObserver to the bit,
    "histogram" the range of its HistogramObserver, which alone waits for the device.

    An empty tensor changes nothing. NaN and infinity keep a batch out of its channel's range, and count in
    `num_skipped`. All zeros give the least scale allowed; what was never seen has scale 1 and zero point 0.

    Args:
        dtype, qscheme, ch_axis, kwargs: as in torch; quint8 or qint8, quant_min and quant_max for fewer bits.
        range: "minmax", "percentile" (averaged over batches) or "histogram" (least error, per tensor only).
        percentile: the upper one, in (50, 100]; the lower one lies opposite.
        averaging_constant: c for min_val += c (min(x) - min_val), likewise max_val; None keeps the extremes.
        rule, max_shift_amount: as in scale_approximate, or the rule "none".
        unsigned: as above where a tensor was never negative, else symmetric; for quint8.
    """

    rules = RULES

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        *,
        ch_axis: int = 0,
        range: str = "minmax",  # how the range is taken from batches
        percentile: float = 99.99,
        averaging_constant: float | None = None,
        rule: str = "round",  # how the scale is taken from the range
        max_shift_amount: int | None = 8,
        unsigned: bool = False,  # where the zero point may lie
        **kwargs,
    ):
        super().__init__(dtype=dtype, qscheme=qscheme, **kwargs)
        self.per_channel, self.symmetric = is_per_channel(qscheme), qscheme in _SYMMETRIC
        self.ch_axis = ch_axis if self.per_channel else -1
        self.range, self.percentile, self.averaging_constant = range, percentile, averaging_constant
        self.rule, self.max_shift_amount, self.unsigned = rule, max_shift_amount, unsigned
        _check("range", range, range in RANGES, f"one of {', '.join(RANGES)}")
        _check("percentile", percentile, 50 < percentile <= 100, "in (50, 100]")
        averages = averaging_constant is None or 0 < averaging_constant <= 1
        _check("averaging_constant", averaging_constant, averages, "in (0, 1] or None")
        _check("rule", rule, rule in self.rules, f"one of {', '.join(self.rules)} (see LeastErrorObserver)")
        scale_approximate(1.0, max_shift_amount)  # checks the clamp
        _check("qscheme", qscheme, range != "histogram" or not self.per_channel, "per tensor for a histogram")
        suits_unsigned = self.symmetric and dtype == torch.quint8
        _check("unsigned", unsigned, suits_unsigned or not unsigned, "False except for symmetric quint8")
        self.reset_min_max_vals()
        self.register_buffer("num_skipped", torch.tensor(0))

    def reset_min_max_vals(self, shape: tuple[int, ...] = ()) -> None:
        """Forget what was seen; `shape` is () for one range, (C,) for one per channel."""
        device = self.eps.device
        # A range that was never seen is inverted: min_val = inf > max_val = -inf.
        self.register_buffer("min_val", torch.full(shape, math.inf, device=device))
        self.register_buffer("max_val", torch.full(shape, -math.inf, device=device))
        self.register_buffer("lowest", torch.zeros(shape, device=device))  # 0 where nothing was negative
        if self.range == "percentile":
            self.register_buffer("num_seen", torch.zeros(shape, device=device))
        if self.range == "histogram":
            limits = {"quant_min": self.quant_min, "quant_max": self.quant_max}
            self.histogram = HistogramObserver(dtype=self.dtype, qscheme=self.qscheme, **limits).to(device)
            self.histogram.dst_nbins = self.quant_max - self.quant_min + 1

    def forward(self, x: Tensor) -> Tensor:
        """Take `x` (any shape, any float type) into account; return `x` unchanged."""
        if x.numel() == 0:
            return x
        rows = self._rows(x.detach())  # (C, n)
        dim = 1 if self.per_channel else None
        low, high = torch.stack(torch.aminmax(rows, dim=dim)).float()  # (C,), or () for one scale
        finite = torch.isfinite(low) & torch.isfinite(high)  # aminmax hands on NaN
        if self.min_val.shape != low.shape:
            self.reset_min_max_vals(low.shape)
        self.num_skipped += (~finite).any()
        self.lowest.copy_(torch.where(finite, torch.minimum(self.lowest, low), self.lowest))
        self._observe(rows, low, high, finite)
        return x

    def _rows(self, values: Tensor) -> Tensor:
        """Return the values as (C, n), one row per scale."""
        if self.per_channel:
            return values.transpose(0, self.ch_axis).reshape(values.shape[self.ch_axis], -1)
        if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # as in memory, so that the row is a view and no copy
        return values.reshape(1, -1)

    def _observe(self, rows: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        """Update the range from a batch (C, n) and its extremes, where these are finite."""
        constant = self.averaging_constant
        if self.range == "histogram" and bool(finite):
            self.histogram(rows.float())
        if self.range == "percentile":
            shares = torch.tensor([1 - self.percentile / 100, self.percentile / 100], device=rows.device)
            low, high = torch.quantile(sample(rows), shares, dim=1).reshape(2, *low.shape)
            if constant is None:  # the mean over batches
                self.num_seen += finite
                constant = 1 / self.num_seen.clamp(min=1)
        if constant is None:
            new_low, new_high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        else:
            is_first = self.min_val > self.max_val
            new_low = torch.where(is_first, low, self.min_val + constant * (low - self.min_val))
            new_high = torch.where(is_first, high, self.max_val + constant * (high - self.max_val))
        self.min_val.copy_(torch.where(finite, new_low, self.min_val))
        self.max_val.copy_(torch.where(finite, new_high, self.max_val))

    def raw_scale(self) -> Tensor:
        """Return the scale before it is rounded to a power of two; (1,) per tensor, (C,) per channel."""
        if self.range == "histogram" and bool(self.min_val < self.max_val):
            return self._raw(*self.histogram._non_linear_param_search())
        return self._raw(self.min_val, self.max_val)

    def _raw(self, low: Tensor, high: Tensor) -> Tensor:
        low, high = low.clamp(max=0), high.clamp(min=0)
        steps = float(self.quant_max - self.quant_min)
        raw = torch.maximum(-low, high) / (steps / 2) if self.symmetric else (high - low) / steps
        if self.unsigned:
            raw = torch.where(self.lowest == 0, high / steps, raw)
        return torch.maximum(raw, self.eps)

    def _scale(self, max_shift_amount: int | None) -> Tensor:
        raw = self.raw_scale()
        return raw if self.rule == "none" else scale_approximate(raw, max_shift_amount, self.rule)

    def _zero_point(self, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
        """Return the zero points of scales (C,), as if the lowest value seen, () or (C,), were this one."""
        lowest = self.lowest if lowest is None else lowest
        if not self.symmetric:
            zero_point = self.quant_min - torch.round(self.min_val.clamp(max=0) / scale)
            return zero_point.clamp(self.quant_min, self.quant_max).long()
        middle = (self.quant_min + self.quant_max + 1) // 2 if self.dtype == torch.quint8 else 0
        return torch.where(self.unsigned & (lowest == 0), self.quant_min, middle).expand_as(scale)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point): float32 and int64, each (1,) per tensor or (C,) per channel."""
        scale, never_seen = self._scale(self.max_shift_amount), self.min_val > self.max_val
        return torch.where(never_seen, 1.0, scale), torch.where(never_seen, 0, self._zero_point(scale))

    def clamped(self) -> Tensor:
        """Return whether max_shift_amount changed the scale: bool, (1,) per tensor, (C,) per channel."""
        return self._scale(self.max_shift_amount) != self._scale(None)

    def extra_repr(self) -> str:
        """Return the arguments, to be printed with the network."""
        names = ("dtype", "qscheme", "quant_min", "quant_max", "range", "rule", "unsigned")
        names += ("max_shift_amount", "averaging_constant", "percentile")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.get(prefix + "min_val")
        if stored is not None and stored.shape != self.min_val.shape:
            self.reset_min_max_vals(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


CusQuantObserver = PowerOfTwoObserver  # its name in the assignment's starter code
