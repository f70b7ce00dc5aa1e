"""Attention on int8 tensor cores in Triton: q and k in eight bits, probabilities and v in fp16.

What it computes is said in `reference.py`. One pass turns and quantises q, one k, which takes v
along; `attention.py` multiplies. By their data sheets, GeForce cards multiply int8 four times as
fast as bf16, and fp16 twice as fast if they add up in fp16: so a block of keys is added up in fp16,
all blocks in fp32. Untested on hardware.
Source: SageAttention, arXiv 2410.02367, for int8 with fp16 sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.arithmetic import cast, dot, round_to_int8
from wanrt.kernels.attention import DTYPES, Scales, attend, load_rows, rows_dense
from wanrt.kernels.launch import INTERPRETER, Mma, arch_of, launch
from wanrt.kernels.reference import TINY, Preparation, prepare_int8
from wanrt.kernels.target import Target

LEAST: tl.constexpr = tl.constexpr(TINY)
# Data-centre cards add up in fp32 as fast as in fp16.
FULL_RATE = (80, 90)


@triton.jit
def _turn(factor_ptr, HD: tl.constexpr):
    """diag(factor) H: minus where the numbers of row and column share an odd number of bits."""
    number = tl.arange(0, HD)
    bits = number[:, None] & number[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    factor = tl.load(factor_ptr + number)[:, None]
    return tl.where((bits & 1) == 0, factor, -factor)  # [HD, HD]


@triton.jit(do_not_specialize=["length"])
def _quantize_heads_kernel(
    x_ptr,
    v_ptr,
    factor_ptr,
    mean_ptr,
    v_scale_ptr,
    out_ptr,
    out_scale_ptr,
    v_out_ptr,
    x_strides,
    v_strides,
    length,
    num_heads,
    HD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of (x - mean) diag(factor) H in int8; with v, v / v_scale in fp16 as well."""
    head = tl.program_id(1).to(tl.int64)  # of all samples
    b, h = head // num_heads, head % num_heads
    first = tl.program_id(0).to(tl.int64) * BLOCK
    num_rows = (length - first).to(tl.int32)
    row, column = tl.arange(0, BLOCK), tl.arange(0, HD)
    exists = row < num_rows
    target = (head * length + first) * HD + row[:, None] * HD + column[None, :]
    x_ptr += b * x_strides[0] + h * x_strides[1] + first * x_strides[2]
    x = load_rows(x_ptr, x_strides[2], num_rows, HD, HD, BLOCK, True)  # [BLOCK, HD]
    turn = _turn(factor_ptr + head * HD, HD)
    y = dot(x, turn.to(x.dtype), None, tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + head * HD + column)
        y -= tl.sum(mean[:, None] * turn, 0)[None, :]
    peak = tl.maximum(tl.max(tl.abs(y), 1), LEAST)
    y = round_to_int8(y * tl.div_rn(127.0, peak)[:, None])
    tl.store(out_ptr + target, y, exists[:, None])
    tl.store(out_scale_ptr + head * length + first + row, tl.div_rn(peak, 127.0), exists)
    if v_ptr is not None:
        v_ptr += b * v_strides[0] + h * v_strides[1] + first * v_strides[2]
        v = load_rows(v_ptr, v_strides[2], num_rows, HD, HD, BLOCK, True).to(tl.float32)
        v = tl.div_rn(v, tl.load(v_scale_ptr + head))
        tl.store(v_out_ptr + target, cast(v, tl.float16), exists[:, None])


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention_int8`; the result is a view [B, H, L, hd] of [B, L, H, hd].

    Peak: q and k in half their size, v in its own, two numbers of each head and token.
    """
    head_dim = q.shape[-1]
    assert head_dim in (32, 64, 128), f"{q.shape=}"
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    ready = Preparation(*(x.contiguous() for x in prepare_int8(q, k, v)))  # PyTorch keeps layouts
    q8, q_scale, _ = _quantize(q, None, ready.q_factor, ready)
    k8, k_scale, v16 = _quantize(k, v, ready.k_factor, ready)
    assert v16 is not None
    total = "f32" if arch_of(q) in FULL_RATE else "f16"
    mma = (Mma("s8", "s32"), Mma("f16", total))
    scales = Scales(q_scale, k_scale, ready.v_scale)
    return attend(q8, k8, v16, bias, scale / head_dim, scales, v.dtype, mma)


def _quantize(
    x: Tensor, v: Tensor | None, factor: Tensor, ready: Preparation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in int8, its scales [B, H, n, 1]; v in fp16, with which x is k and loses its mean."""
    x, v = rows_dense(x), None if v is None else rows_dense(v)
    b, num_heads, length, head_dim = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    out_scale = torch.empty((b, num_heads, length, 1), dtype=torch.float32, device=x.device)
    v_out = None if v is None else torch.empty(v.shape, dtype=torch.float16, device=x.device)
    block = 128 if arch_of(x) == INTERPRETER else 64
    launch(
        _quantize_heads_kernel,
        (triton.cdiv(length, block), b * num_heads),
        x,
        v,
        factor,
        None if v is None else ready.mean,
        ready.v_scale,
        out,
        out_scale,
        v_out,
        x.stride()[:3],
        None if v is None else v.stride()[:3],
        length,
        num_heads,
        HD=head_dim,
        BLOCK=block,
        num_warps=8,
        mma=(Mma("bf16" if x.dtype == torch.bfloat16 else "f16", "f32"),),
    )
    return out, out_scale, v_out


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"takes bf16 and fp16, not {target.dtype}"
    return None
