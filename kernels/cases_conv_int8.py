"""Cases of the VAE's int8 convolutions; `tests/test_ops_conv_int8.py` has what no row can say."""

from typing import Any

import torch
from torch import Tensor

from wanrt.kernels.cases import BF16, FP16, FP32, Case, Limit, Tensors, normal
from wanrt.kernels.cases_conv import frames, taps
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.kernels.torch_conv_int8 import quantize_conv_weight

_STEP = "one quantisation step where a normalised value lies between two"
_SUMS = "sums are exact; where an input is one step off, the result is by step times weight"
LIMITS = {
    "quantize_conv_weight": {FP32: Limit(0, 0, "the same formula")},
    "channel_norm_silu_quantize": dict.fromkeys((FP32, BF16, FP16), Limit(0, 1 / 127, _STEP)),
    "causal_conv3d_int8": {
        FP32: Limit(0, 1 / 127, _SUMS),
        BF16: Limit(2**-7, 1 / 127, _SUMS),
        FP16: Limit(2**-10, 1 / 127, _SUMS),
    },
}
_ALL = 6  # every tensor has the VAE's dtype, but for the format's


def step_and_zero(channels: int) -> tuple[Tensor, Tensor]:
    """A format for the SiLU of normal values: from its least value, -0.28, to about 4."""
    step = (torch.rand(channels) + 4) / 254
    return step, (-127 + 0.28 / step).round().to(torch.int8)


def quantized(out_dim: int, in_dim: int) -> QuantizedConv:
    return quantize_conv_weight(taps(out_dim, in_dim, 3, 3, 3), *step_and_zero(in_dim))


def whole(*shape: int) -> Tensor:
    """Any int8 values but -128 [B, C, T, H, W], channels last."""
    x = torch.randint(-127, 128, shape, dtype=torch.int8)
    return x.contiguous(memory_format=torch.channels_last_3d)


def causal(
    label: str,
    x: tuple[int, int, int, int, int],
    out_dim: int,
    history: bool = True,
    residual: bool = False,
    **options: Any,
) -> Case:
    """One int8 causal convolution of x [B, C, T, H, W]."""
    b, c, t, h, w = x

    def tensors() -> Tensors:
        past = whole(b, c, 2, h, w) if history else None
        shortcut = frames(b, out_dim, t, h, w) if residual else None
        gamma, bias = torch.rand(c, 1, 1, 1) + 0.5, torch.randn(out_dim)
        return frames(*x), quantized(out_dim, c), bias, past, gamma, shortcut

    def flop(x: Tensor, weight: QuantizedConv, *_: Tensor | None) -> int:
        return 2 * x.numel() // c * weight.values.numel()

    return Case("causal_conv3d_int8", label, tensors, {}, _ALL, flop=flop, **options)


def _quantise(label: str, *shape: int, **options: Any) -> Case:
    c = shape[1]
    return Case(
        "channel_norm_silu_quantize",
        label,
        lambda: (frames(*shape), torch.rand(c, 1, 1, 1) + 0.5, *step_and_zero(c)),
        **options,
    )


_WAN: dict[str, Any] = dict(dtypes=(BF16,), size="wan")

CASES = [
    Case("quantize_conv_weight", "odd", lambda: (normal(5, 24, 3, 3, 3), *step_and_zero(24)),
         dtypes=(FP32,)),
    _quantise("odd", 2, 5, 3, 7, 6),
    _quantise("wide", 1, 1024, 1, 3, 5),
    _quantise("96", 1, 96, 4, 480, 832, **_WAN),
    causal("odd", (2, 24, 2, 5, 7), 48, residual=True),
    causal("one-frame", (1, 24, 1, 5, 7), 20),
    causal("start", (1, 24, 4, 5, 7), 20, history=False),
    causal("one-frame-start", (1, 24, 1, 5, 7), 20, history=False),
    causal("one-row", (1, 24, 2, 1, 7), 20, history=False),
    causal("one-column", (1, 24, 2, 5, 1), 20),
    causal("chunks", (1, 72, 1, 5, 7), 160, residual=True),
    causal("two-tiles", (1, 24, 1, 33, 40), 9),
    causal("384", (1, 384, 1, 60, 104), 384, residual=True, **_WAN),
    causal("192-384", (1, 192, 2, 120, 208), 384, **_WAN),
    causal("192", (1, 192, 4, 240, 416), 192, residual=True, **_WAN),
    causal("192-start", (1, 192, 1, 240, 416), 192, history=False, **_WAN),
    causal("96", (1, 96, 4, 480, 832), 96, residual=True, **_WAN),
    causal("96-one-frame", (1, 96, 1, 480, 832), 96, residual=True, **_WAN),
    causal("wan22-160", (1, 160, 4, 352, 640), 160, residual=True, **_WAN),
    causal("wan22-1024", (1, 1024, 1, 44, 80), 1024, residual=True, **_WAN),
]  # fmt: skip
