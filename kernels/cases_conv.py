"""Cases of the VAE's ops; `tests/test_ops_conv.py` has what one table row cannot say."""

from typing import Any

import torch
from torch import Tensor

from wanrt.kernels.cases import BF16, FP16, FP32, ROUNDING, Case, Limit, Tensors, normal

_SUMS = "sums in another order"
_CONV = "the normalised input and the result are rounded, each once"
_DOWN = "the result is rounded once"
_FOLDED = "the result is rounded, and so are the folded taps"
_WEIGHED = "scores and probabilities may be rounded before they are used, and the result is"
LIMITS = {
    "channel_norm_silu": ROUNDING,
    "causal_conv3d": {
        FP32: Limit(0, 3e-6, _SUMS),
        BF16: Limit(0, 2**-7, _CONV),
        FP16: Limit(0, 2**-10, _CONV),
    },
    "upsample_conv2d": {
        FP32: Limit(0, 3e-6, _SUMS),
        BF16: Limit(0, 2**-6, _FOLDED),
        FP16: Limit(0, 2**-9, _FOLDED),
    },
    "downsample_conv2d": {
        FP32: Limit(0, 3e-6, _SUMS),
        BF16: Limit(0, 2**-7, _DOWN),
        FP16: Limit(0, 2**-10, _DOWN),
    },
    "frame_attention": {
        FP32: Limit(0, 2e-6, _SUMS),
        BF16: Limit(0, 2**-6, _WEIGHED),
        FP16: Limit(0, 2**-9, _WEIGHED),
    },
}
_ALL = 6  # every tensor has the VAE's dtype


def frames(*shape: int) -> Tensor:
    """Normal values [B, C, T, H, W], channels last."""
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def taps(out_dim: int, in_dim: int, *kernel: int) -> Tensor:
    """A weight [O, C, *kernel], channels last, whose results are about as large as its inputs."""
    weight = torch.randn(out_dim, in_dim, *kernel)
    weight *= (weight.numel() // out_dim) ** -0.5
    layout = torch.channels_last_3d if len(kernel) == 3 else torch.channels_last
    return weight.contiguous(memory_format=layout)


def causal(
    label: str,
    x: tuple[int, int, int, int, int],
    out_dim: int,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: int = 1,
    history: bool = True,
    norm: bool = True,
    residual: bool = False,
    accumulator: torch.dtype = FP32,
    **options: Any,
) -> Case:
    """One causal convolution of x [B, C, T, H, W]."""
    b, c, t, h, w = x

    def tensors() -> Tensors:
        past = frames(b, c, kernel[0] - stride, h, w) if history and kernel[0] > 1 else None
        gamma = torch.rand(c, 1, 1, 1) + 0.5 if norm else None
        shortcut = frames(b, out_dim, t // stride, h, w) if residual else None
        weight, bias = taps(out_dim, c, *kernel), torch.randn(out_dim)
        return frames(*x), weight, bias, past, gamma, shortcut

    def flop(x: Tensor, weight: Tensor, *_: Tensor | None) -> int:
        return 2 * x.numel() // (c * stride) * weight.numel()

    kwargs = {"stride": stride, "accumulator": accumulator}
    return Case("causal_conv3d", label, tensors, kwargs, _ALL, flop=flop, **options)


def resample(
    op: str, label: str, x: tuple[int, int, int, int, int], out_dim: int, **options: Any
) -> Case:
    """A convolution that doubles or halves the sides of x [B, C, T, H, W]."""
    pixels = 4 if op == "upsample_conv2d" else 1 / 4  # of the result for each of x

    def flop(x: Tensor, weight: Tensor, *_: Tensor) -> int:
        return int(2 * pixels * x.numel() // x.shape[1]) * weight.numel()

    def tensors() -> Tensors:
        return frames(*x), taps(out_dim, x[1], 3, 3), torch.randn(out_dim)

    return Case(op, label, tensors, {}, _ALL, flop=flop, **options)


def _pixels(b: int, t: int, length: int, width: int) -> Tensors:
    """q, k and v of frames of `length` pixels, as views of one projection to all three."""
    return torch.randn(b, t, length, 3 * width).chunk(3, -1)


def _attention_flop(q: Tensor, k: Tensor, v: Tensor) -> int:
    return 4 * q.numel() * k.shape[2]


def _wan() -> list[Case]:
    """A chunk of Wan 2.1's VAE at 480x832, and the widths of Wan 2.2's."""
    bf16: dict[str, Any] = dict(dtypes=(BF16,), size="wan")
    fp16: dict[str, Any] = dict(dtypes=(FP16,), size="wan", accumulator=FP16)
    return [
        causal("latents", (1, 16, 1, 60, 104), 384, norm=False, **bf16),
        causal("384", (1, 384, 1, 60, 104), 384, residual=True, **bf16),
        causal("384-start", (1, 384, 1, 60, 104), 384, history=False, residual=True, **bf16),
        causal("384-fp16acc", (1, 384, 1, 60, 104), 384, residual=True, **fp16),
        causal("192-384", (1, 192, 2, 120, 208), 384, **bf16),
        causal("192-384-shortcut", (1, 192, 2, 120, 208), 384, (1, 1, 1), norm=False, **bf16),
        causal("192", (1, 192, 4, 240, 416), 192, residual=True, **bf16),
        causal("192-fp16acc", (1, 192, 4, 240, 416), 192, residual=True, **fp16),
        causal("96", (1, 96, 4, 480, 832), 96, residual=True, **bf16),
        causal("96-one-frame", (1, 96, 1, 480, 832), 96, residual=True, **bf16),
        causal("96-fp16acc", (1, 96, 4, 480, 832), 96, residual=True, **fp16),
        causal("head", (1, 96, 4, 480, 832), 3, **bf16),
        causal("pixels", (1, 3, 4, 480, 832), 96, norm=False, **bf16),
        causal("doubling", (1, 384, 1, 60, 104), 768, (3, 1, 1), norm=False, **bf16),
        causal("halving", (1, 192, 4, 120, 208), 192, (3, 1, 1), stride=2, norm=False, **bf16),
        causal("qkv", (1, 384, 1, 60, 104), 1152, (1, 1, 1), norm=False, **bf16),
        causal("wan22-160", (1, 160, 4, 352, 640), 160, residual=True, **bf16),
        causal("wan22-160-fp16acc", (1, 160, 4, 352, 640), 160, residual=True, **fp16),
        causal("wan22-1024", (1, 1024, 1, 44, 80), 1024, residual=True, **bf16),
        causal("wan22-head", (1, 256, 4, 352, 640), 12, **bf16),
        resample("upsample_conv2d", "384-192", (1, 384, 1, 60, 104), 192, **bf16),
        resample("upsample_conv2d", "192-96", (1, 192, 4, 240, 416), 96, **bf16),
        resample("downsample_conv2d", "96", (1, 96, 4, 480, 832), 96, **bf16),
        resample("downsample_conv2d", "384", (1, 384, 1, 120, 208), 384, **bf16),
        Case(
            "rms_norm_channels",
            "384",
            lambda: (frames(1, 384, 1, 60, 104), normal(384, 1, 1)),
            **bf16,
        ),
        Case(
            "channel_norm_silu",
            "96",
            lambda: (frames(1, 96, 4, 480, 832), normal(96, 1, 1, 1)),
            **bf16,
        ),
        Case(
            "frame_attention",
            "384",
            lambda: _pixels(1, 1, 60 * 104, 384),
            activations=3,
            flop=_attention_flop,
            **bf16,
        ),
    ]


CASES = [
    Case("rms_norm_channels", "3d", lambda: (normal(2, 5, 3, 7, 6), normal(5, 1, 1, 1))),
    Case("rms_norm_channels", "2d", lambda: (normal(3, 33, 7, 5), normal(33, 1, 1))),
    Case("rms_norm_channels", "last", lambda: (frames(2, 33, 3, 7, 5)[:, :, 1:], normal(33))),
    Case("channel_norm_silu", "3d", lambda: (normal(2, 5, 3, 7, 6), normal(5, 1, 1, 1))),
    Case("channel_norm_silu", "wide", lambda: (frames(1, 1024, 1, 3, 5) * 4, normal(1024))),
    causal("odd", (2, 24, 2, 5, 7), 48, residual=True),
    causal("one-frame", (1, 24, 1, 5, 7), 20),
    causal("start", (1, 24, 3, 5, 7), 20, history=False),
    causal("one-frame-start", (1, 24, 1, 5, 7), 20, history=False, norm=False),
    causal("fp16acc", (1, 24, 2, 5, 7), 20, accumulator=FP16),
    causal("chunks", (1, 72, 2, 5, 7), 160, (3, 1, 1), residual=True),
    causal("halving-odd", (2, 24, 4, 5, 7), 24, (3, 1, 1), stride=2, norm=False),
    causal("halving-start", (2, 24, 4, 5, 7), 24, (3, 1, 1), stride=2, norm=False, history=False),
    causal("pointwise", (2, 24, 3, 5, 7), 9, (1, 1, 1), norm=False, residual=True),
    causal("two-tiles", (1, 24, 1, 33, 40), 9, (1, 1, 1), norm=False),
    causal("pixels-in", (1, 3, 2, 9, 7), 24, norm=False),
    causal("pixels-out", (1, 24, 2, 9, 7), 3),
    *(
        resample(op, label, (b, c, t, 6, 4), o)
        for op in ("upsample_conv2d", "downsample_conv2d")
        for label, b, c, t, o in (("odd", 1, 24, 2, 20), ("two-samples", 2, 72, 1, 130))
    ),
    Case("frame_attention", "odd", lambda: _pixels(2, 3, 35, 24), activations=3),
    Case("frame_attention", "wide", lambda: _pixels(1, 1, 63, 384), activations=3),
    Case("frame_attention", "one-key", lambda: _pixels(1, 2, 1, 24), activations=3),
    *_wan(),
]
