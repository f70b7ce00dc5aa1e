"""What both convolutions do for a tap: whether it sees a pixel of the frame, and its product."""

import triton
import triton.language as tl

from wanrt.kernels.arithmetic import dot


@triton.jit
def taps_inside(exists, top, left, height, width, TAPS: tl.constexpr):
    """Bit `dh * TAPS + dw` of each pixel: whether that tap of it lies within its frame.

    `top` and `left` [M] are where a pixel's first tap lies. Asked once before the loop over taps,
    where the four comparisons would cost as much as the loads that they are for.
    """
    bits = tl.zeros(top.shape, tl.int32)
    for dh in tl.static_range(TAPS):
        for dw in tl.static_range(TAPS):
            inside = exists & (top + dh >= 0) & (top + dh < height)
            inside &= (left + dw >= 0) & (left + dw < width)
            bits |= inside.to(tl.int32) << (dh * TAPS + dw)
    return bits


@triton.jit
def multiply(pixels, weight_ptr, held, acc, OUT: tl.constexpr):
    """acc + pixels @ weight, `[M, K] @ [K, N]`, added up in OUT; held None: all of it is there."""
    if held is None:
        weight = tl.load(weight_ptr)
    else:
        weight = tl.load(weight_ptr, held, 0.0)
    return dot(pixels, weight, acc, OUT)
