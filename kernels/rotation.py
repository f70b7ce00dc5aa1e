"""The rotation of each 128 columns before they are quantised: a Hadamard matrix, on tensor cores.

What it computes is said in `reference.rotate`. The matrix of +-1 is made in registers. fp32 becomes
fp16 relative to the largest of its 128 columns: 11 bits, where the results will have eight.
Source: QuaRot, arXiv:2404.00456.
"""

import torch
import triton
import triton.language as tl

from wanrt.kernels.arithmetic import cast, dot
from wanrt.kernels.launch import Mma
from wanrt.kernels.reference import GROUP, TINY

TURNED: tl.constexpr = tl.constexpr(GROUP)
LEAST: tl.constexpr = tl.constexpr(TINY)
ROOT: tl.constexpr = tl.constexpr(GROUP**-0.5)
MIN_TURNED = 16  # groups of 128 that a tensor-core product takes at least
MMA = {
    torch.bfloat16: Mma("bf16", "f32"),
    torch.float16: Mma("f16", "f32"),
    torch.float32: Mma("f16", "f32"),
}


@triton.jit
def odd_bits(SIZE: tl.constexpr):
    """[SIZE, SIZE], SIZE <= 256: 1 where the numbers of row and column share an odd number of bits.

    The Hadamard matrix is minus one there.
    """
    number = tl.arange(0, SIZE)
    bits = number[:, None] & number[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return bits & 1


@triton.jit
def rotate(x):
    """x H / sqrt(128), x [R, 128] of any float dtype, in fp32."""
    signs = (1 - 2 * odd_bits(TURNED)).to(tl.float32)
    acc = tl.zeros((x.shape[0], TURNED), tl.float32)
    if x.dtype == tl.float32:
        peak = tl.maximum(tl.max(tl.abs(x), 1), LEAST)
        x16 = cast(x * tl.div_rn(1.0, peak)[:, None], tl.float16)
        return dot(x16, cast(signs, tl.float16), acc, tl.float32) * (peak * ROOT)[:, None]
    return dot(x, cast(signs, x.dtype), acc, tl.float32) * ROOT
