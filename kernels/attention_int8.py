"""Attention on eight-bit tensor cores in Triton: q and k in int8, p and v in fp16 or fp8 (e4m3).

What it computes is said in `reference.py`. `attention_prepare.py` makes eight bits of q, k and v;
`attention.py` multiplies. By their data sheets, GeForce cards multiply int8 four times as fast as
bf16, fp16 twice as fast if they add up in fp16, fp8 twice as fast in fp32 and four times in fp16.
Such sums are of one block of keys; all blocks add up in fp32. Untested on hardware.
Source: SageAttention, arXiv 2410.02367, for int8 with fp16 sums; SageAttention2, arXiv 2411.10958,
for fp8; SageAttention2++, arXiv 2505.21136, for fp8 with fp16 sums and how large they may be.
"""

import math

import torch
from torch import Tensor

from wanrt.kernels import fp8_sums
from wanrt.kernels.attention import DTYPES, attend, empty_heads
from wanrt.kernels.attention_prepare import prepare
from wanrt.kernels.launch import Mma, arch_of
from wanrt.kernels.limits import heads_at_once
from wanrt.kernels.reference import FP8_BITS
from wanrt.kernels.target import Target, lacks_fp8

# Data-centre cards add up in fp32 as fast as in fp16.
FULL_RATE = (80, 90)


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention_int8`; the result is a view [B, H, L, hd] of [B, L, H, hd]."""
    values = Mma("f16", "f32" if arch_of(q) in FULL_RATE else "f16")
    return _attend(q, k, v, bias, scale, torch.float16, values)


def attention_int8_fp8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention_int8_fp8`; the result is a view [B, H, L, hd] of [B, L, H, hd]."""
    values = Mma("e4m3", "f16" if fp8_sums.used_on(arch_of(q)) else "f32")
    return _attend(q, k, v, bias, scale, torch.float8_e4m3fn, values)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | None,
    v_dtype: torch.dtype,
    values: Mma,
) -> Tensor:
    """Some heads after the others, so that what is made of q, k and v stays small beside them.

    Peak beside the result: `limits.ATTENTION_AT_ONCE` bytes, or those of one head.
    """
    b, num_heads, length, head_dim = q.shape
    assert head_dim in (32, 64, 128), f"{q.shape=}"
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = empty_heads(q, v.dtype)
    mma = (Mma("s8", "s32"), values)
    bits = fp8_sums.VALUE_BITS if values.accumulator == "f16" else FP8_BITS
    size = heads_at_once(b * length, b * k.shape[2], head_dim, v_dtype.itemsize)
    for first in range(0, num_heads, size):
        heads = slice(first, first + size)
        x = prepare(q[:, heads], k[:, heads], v[:, heads], v_dtype, bits)
        part = bias if bias is None or bias.ndim < 4 or bias.shape[1] == 1 else bias[:, heads]
        attend(x.q, x.k, x.v, part, scale / head_dim, x.scales, out[:, heads], mma)
        del x  # before the next heads' is made
    return out


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"takes bf16 and fp16, not {target.dtype}"
    return lacks_fp8(target) if op == "attention_int8_fp8" else None
