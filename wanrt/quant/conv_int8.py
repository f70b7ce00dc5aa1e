"""Static int8 formats for the VAE's normalised convolutions: from observed ranges to weights.

The norm bounds what a convolution sees, so ranges that were seen once hold; what lies beyond them
is clipped. A range runs from SiLU's least values to the largest seen, with a zero point.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt.kernels import torch_conv
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.kernels.torch_conv_int8 import quantize_conv_weight

LEAST = -0.2785  # of SiLU
_TINY = 1e-3  # the smallest range that a channel is given


@dataclass(frozen=True)
class StaticInt8:
    """How ranges become formats.

    `smoothing` 1 gives each channel the step of its own range, 0 all channels the widest one's;
    between, a weight's rounding and its input's are balanced (SmoothQuant, arXiv:2211.10438).
    `margin` widens each range, for inputs that were not seen. `symmetric` has no zero point.
    """

    smoothing: float = 0.5
    margin: float = 1.05
    symmetric: bool = False


@dataclass(frozen=True)
class Range:
    """The least and the largest value of each input channel, fp32 [C]."""

    low: Tensor
    high: Tensor

    def joined(self, other: "Range") -> "Range":
        """The range of both."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


def observe(x: Tensor, gamma: Tensor) -> Range:
    """What a convolution sees of x [B, C, T, H, W] after its norm and SiLU."""
    a = torch_conv.channel_norm_silu(x.float(), gamma)
    return Range(*a.transpose(0, 1).flatten(1).aminmax(dim=1))


def quantize_conv(weight: Tensor, seen: Range, form: StaticInt8) -> QuantizedConv:
    """The int8 form of a convolution [O, C, 3, 3, 3] whose inputs have the range seen."""
    low = (seen.low * form.margin).clamp(LEAST, 0)
    high = (seen.high * form.margin).clamp_min(_TINY)
    if form.symmetric:
        step, zero = _smooth(torch.maximum(high, -low) / 127, form.smoothing), torch.zeros_like(low)
    else:
        step = _smooth((high - low) / 253, form.smoothing)  # one for what rounding zero may cost
        zero = (-127 - low / step).ceil()
    return quantize_conv_weight(weight, step, zero.to(torch.int8))


def _smooth(step: Tensor, smoothing: float) -> Tensor:
    """Steps no smaller than those given, less unlike each other."""
    smooth = step**smoothing
    return smooth * (step / smooth).max()
