"""The exponent with the least squared error, found while observing."""

import math

import torch
from torch import Tensor

from labcore.observer import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    PowerOfTwoObserver,
    exact_power,
    sample,
    scale_approximate,
)

# So many exponents are tried, downwards from two above the least one at which nothing clips. Higher ones are
# not needed: the grid of 2^k holds that of 2^(k+1), so where nothing clips a smaller step is never worse.
_N_EXPONENTS, _HEADROOM = 14, 2


def _candidates(top: Tensor) -> Tensor:
    """Return the exponents that are tried, (C, K), from the highest of each channel (C,) downwards."""
    return top[:, None] - torch.arange(_N_EXPONENTS, device=top.device)


class LeastErrorObserver(PowerOfTwoObserver):
    """Observe as PowerOfTwoObserver does, and give the power of two with the least squared error.

        scale = 2^k with the k that minimises the sum of (dequantize(quantize(x)) - x)^2 over what was seen

    Ranges, zero points, clamp, degenerate input and arguments but `rule` are those of PowerOfTwoObserver.
    `averaging_constant` averages the errors too; 1 counts the last batch alone. Where a batch widens the
    range, earlier errors above the old exponents are taken to grow fourfold.

    Errors are those under the zero point that holds in the end: unsigned ones are summed for both it can be.
    An affine zero point moves as the range widens; a batch then counts as under the zero point of its time.

    Attributes:
        top_exponent: (C,), the largest exponent tried; EXPONENT_MIN where only zeros were seen.
        squared_error: (Z, C, _N_EXPONENTS), float64, of top_exponent, top_exponent - 1, and so on. Z is 2 if
            unsigned: where nothing is negative, and otherwise; else 1.

    Reference: Nagel et al. (2021), "A white paper on neural network quantization", equation 10.
    """

    rules = ("least_error",)

    def __init__(self, *args, rule: str = "least_error", **kwargs):
        super().__init__(*args, rule=rule, **kwargs)

    def reset_min_max_vals(self, shape: tuple[int, ...] = ()) -> None:
        """Forget what was seen; `shape` is () for one range, (C,) for one per channel."""
        super().reset_min_max_vals(shape)
        device, channels = self.eps.device, math.prod(shape)
        errors = torch.zeros(1 + self.unsigned, channels, _N_EXPONENTS, dtype=torch.float64, device=device)
        self.register_buffer("top_exponent", torch.full((channels,), EXPONENT_MIN, device=device))
        self.register_buffer("squared_error", errors)

    def _observe(self, rows: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        """Update the range, then the squared errors, from a batch (C, n) with these extremes."""
        super()._observe(rows, low, high, finite)
        low, high, finite = low.reshape(-1), high.reshape(-1), finite.reshape(-1)  # (C,)
        constant = self.averaging_constant
        nothing_clips = torch.frexp(scale_approximate(self._raw(low, high), None, "ceil")).exponent - 1
        not_zero = finite & (torch.maximum(-low, high) > 0)
        is_first = not_zero & (self.top_exponent == EXPONENT_MIN)
        # A batch with a larger range than any before moves the candidates up.
        moves = not_zero if constant == 1 else is_first | (not_zero & (nothing_clips > self.top_exponent))
        top = torch.where(moves, (nothing_clips + _HEADROOM).clamp(max=EXPONENT_MAX), self.top_exponent)
        old = self._moved_errors(torch.where(is_first, 0, top - self.top_exponent))
        new = self._batch_errors(torch.where(finite[:, None], sample(rows), 0.0), top)
        if constant is None:
            new = old + new
        elif constant < 1:
            new = torch.where(is_first[:, None], new, old + constant * (new - old))
        self.squared_error = torch.where(finite[:, None], new, old)
        self.top_exponent = top

    def _moved_errors(self, steps: Tensor) -> Tensor:
        """Return the errors so far, (Z, C, K), for candidates that lie so many exponents (C,) higher.

        What was seen did not clip at the old top, so above it the squared error grows by the step's square.
        """
        index = -_candidates(steps)  # (C, K), negative above the old top
        errors = self.squared_error.gather(2, index.clamp(0, _N_EXPONENTS - 1).expand_as(self.squared_error))
        return errors * 4.0 ** (-index).clamp(min=0)

    def _batch_errors(self, rows: Tensor, top: Tensor) -> Tensor:
        """Return the squared errors (Z, C, K) of a batch (C, n), infinite for exponents never best."""
        exponents = _candidates(top).clamp(EXPONENT_MIN, EXPONENT_MAX)
        errors = torch.full_like(self.squared_error, math.inf)
        lowest = (torch.zeros_like(self.lowest), self.lowest - 1) if self.unsigned else (None,)
        exact = rows.double()
        for index in range(self._n_candidates(rows.shape[1])):
            scale = exact_power(exponents[:, index])
            steps = (rows / scale[:, None]).round_()
            for error, low in zip(errors, lowest, strict=True):
                zero_point = self._zero_point(scale, low).float()[:, None]
                # torch.fake_quantize_per_channel_affine does the same several times more slowly.
                codes = (steps + zero_point).clamp_(self.quant_min, self.quant_max)
                rounded = codes.sub_(zero_point).mul_(scale[:, None])
                error[:, index] = (rounded - exact).square_().sum(1)
        return errors

    def _n_candidates(self, n_values: int) -> int:
        """Return how many exponents can be best; all, unless one batch of so many values counts alone.

        Then the others' grids end so early that the largest value alone errs by more than all values do at
        the step that clips nothing. The test of this has the proof.
        """
        if self.averaging_constant != 1 or not self.symmetric or self.unsigned:
            return _N_EXPONENTS
        steps = self.quant_max - self.quant_min
        largest_error = 2 * math.sqrt(n_values) / steps  # both errors in units of the largest value
        for halvings in range(_N_EXPONENTS - _HEADROOM):
            if 1 - 2.0 ** (1 - halvings) * (1 + 1 / steps) > largest_error:
                return _HEADROOM + halvings
        return _N_EXPONENTS

    def _scale(self, max_shift_amount: int | None) -> Tensor:
        """Return the power with the least error of those that the clamp allows."""
        limit = -EXPONENT_MIN if max_shift_amount is None else max_shift_amount
        exponents = _candidates(self.top_exponent)
        # eps keeps the least scale away from numbers whose reciprocal overflows, as in the other rules.
        allowed = (exponents.abs() <= limit) & (exponents >= torch.frexp(self.eps).exponent - 1)
        is_negative = self.unsigned & (self.lowest < 0).reshape(-1, 1)
        errors = torch.where(is_negative, self.squared_error[-1], self.squared_error[0])
        errors = torch.where(allowed, errors, math.inf)
        best = exponents.gather(1, errors.argmin(1, keepdim=True))[:, 0].clamp(-limit, limit)
        for_zeros = scale_approximate(self.raw_scale(), max_shift_amount)
        return torch.where(self.top_exponent == EXPONENT_MIN, for_zeros, exact_power(best))
