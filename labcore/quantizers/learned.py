"""Fake quantization with trained exponents."""

import math

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from labcore.observer import EXPONENT_MAX, EXPONENT_MIN, PowerOfTwoObserver, exact_power


class LearnedFakeQuantize(FakeQuantizeBase):
    """Round to a grid whose exponent is trained: scale s = 2^ceil(log2_scale).

    While the observer is on (calibration), log2_scale follows it: half a step below the observer's exponent,
    in the middle of the interval that ceil sends there. With the observer off it is a parameter like others.
    The gradient passes ceil as if it were not there: s ln 2 dL/ds, with dL/ds as in torch's learnable fake
    quantization. The zero point stays where calibration put it.

    Args:
        observer: the class of a power-of-two observer; the other arguments go to it.
        quant_min, quant_max: the integer range.

    Attributes:
        log2_scale: (1,) per tensor, (C,) per channel. The threshold of the paper is scale * 2^(bits - 1).

    Reference: Jain et al. (2020), "Trained quantization thresholds (TQT)", equations 4 to 8.
    """

    log2_scale: nn.Parameter
    zero_point: Tensor

    def __init__(
        self, observer=PowerOfTwoObserver, quant_min: int = 0, quant_max: int = 255, **observer_args
    ):
        super().__init__()
        self.activation_post_process = observer(quant_min=quant_min, quant_max=quant_max, **observer_args)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.dtype, self.qscheme = self.activation_post_process.dtype, self.activation_post_process.qscheme
        self.ch_axis = self.activation_post_process.ch_axis
        self.log2_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("zero_point", torch.zeros(1))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point) as they are now: float32 powers of two, and int64."""
        exponent = self.log2_scale.detach().ceil().clamp(EXPONENT_MIN, EXPONENT_MAX)
        return exact_power(exponent), self.zero_point.to(torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` (any shape) to the grid of the scale, or give it back where fake quantization is off."""
        if self.observer_enabled[0] == 1:
            self.activation_post_process(x.detach())
            scale, zero_point = self.activation_post_process.calculate_qparams()
            exponent = torch.log2(scale) - 0.5
            if self.log2_scale.shape == exponent.shape:
                self.log2_scale.data.copy_(exponent)
            else:
                self.log2_scale = nn.Parameter(exponent)
            self.zero_point = zero_point.float()
        if self.fake_quant_enabled[0] == 0:
            return x
        scale = _ExactPower.apply(self.log2_scale)
        if self.ch_axis == -1:
            return torch._fake_quantize_learnable_per_tensor_affine(
                x, scale, self.zero_point, self.quant_min, self.quant_max, 1.0
            )
        return torch._fake_quantize_learnable_per_channel_affine(
            x, scale, self.zero_point, self.ch_axis, self.quant_min, self.quant_max, 1.0
        )

    def extra_repr(self) -> str:
        """Return the integer range, to be printed with the network."""
        return f"quant_min={self.quant_min}, quant_max={self.quant_max}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.get(prefix + "log2_scale")
        if stored is not None and stored.shape != self.log2_scale.shape:
            self.log2_scale = nn.Parameter(torch.zeros_like(stored))
            self.zero_point = torch.zeros_like(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _ExactPower(torch.autograd.Function):
    """2^ceil(x), exactly; its gradient is that of 2^x where it was rounded to (TQT, equation 6)."""

    @staticmethod
    def forward(ctx, log2_scale: Tensor) -> Tensor:
        scale = exact_power(log2_scale.ceil().clamp(EXPONENT_MIN, EXPONENT_MAX))
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return gradient * scale * math.log(2)
