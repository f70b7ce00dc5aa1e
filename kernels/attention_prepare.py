"""What int8 attention reads its inputs for before it multiplies: twice each, in Triton.

What comes out is said in `reference.prepare_int8` and `attention_int8`. The first pass takes the
ranges and means of each channel, in parts of the tokens that one small kernel joins, always in the
same order. The second turns and quantises q, and k, which takes v along.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.arithmetic import cast, dot, round_to_int8
from wanrt.kernels.attention import Scales, interleave, keys_of, load_rows, rows_dense
from wanrt.kernels.launch import INTERPRETER, Mma, arch_of, launch
from wanrt.kernels.reference import TINY, Preparation
from wanrt.kernels.rotation import odd_bits

LEAST: tl.constexpr = tl.constexpr(TINY)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
# A part's tokens, and of those, or of the parts, how many one step takes.
PART, STEP = 512, 32
PART_INTERPRETER, STEP_INTERPRETER = 128, 64


class Prepared(NamedTuple):
    """Integers q and k `[B, H, n, hd]`, v in fp16 or fp8 as `attention.attend` takes it."""

    q: Tensor
    k: Tensor
    v: Tensor
    scales: Scales


@triton.jit
def _join(low, high, total, x_low, x_high, x_total):
    return tl.minimum(low, x_low), tl.maximum(high, x_high), total + x_total


@triton.jit(do_not_specialize=["length"])
def _ranges_kernel(
    x_ptr,
    out_ptr,
    x_strides,
    length,
    num_heads,
    HD: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
):
    """Least, largest and sum of each channel of PART tokens, out [parts, B * H, 3, HD]."""
    head = tl.program_id(1).to(tl.int64)  # of all samples
    b, h = head // num_heads, head % num_heads
    first = tl.program_id(0) * PART
    row, column = tl.arange(0, STEP), tl.arange(0, HD)
    x_ptr += b * x_strides[0] + h * x_strides[1]
    low = tl.full([STEP, HD], INFINITY, tl.float32)
    high = tl.full([STEP, HD], -INFINITY, tl.float32)
    total = tl.zeros([STEP, HD], tl.float32)
    for start in range(first, tl.minimum(first + PART, length), STEP):
        at = x_ptr + tl.cast(start, tl.int64) * x_strides[2]
        x = load_rows(at, x_strides[2], length - start, HD, HD, STEP, True).to(tl.float32)
        counted = tl.where((row < length - start)[:, None], x, 0.0)
        low, high, total = _join(low, high, total, x, x, counted)
    out_ptr += (tl.program_id(0) * tl.num_programs(1) + head) * 3 * HD + column
    tl.store(out_ptr, tl.min(low, 0))
    tl.store(out_ptr + HD, tl.max(high, 0))
    tl.store(out_ptr + 2 * HD, tl.sum(total, 0))


@triton.jit
def _whole_range(part_ptr, parts, length, HD: tl.constexpr, STEP: tl.constexpr):
    """Least, largest and mean of each channel over all parts: [HD] each."""
    heads, head = tl.num_programs(0), tl.program_id(0)
    part, column = tl.arange(0, STEP), tl.arange(0, HD)[None, :]
    low = tl.full([STEP, HD], INFINITY, tl.float32)
    high = tl.full([STEP, HD], -INFINITY, tl.float32)
    total = tl.zeros([STEP, HD], tl.float32)
    for start in range(0, parts, STEP):
        exists = (start + part < parts)[:, None]
        at = part_ptr + ((start + part).to(tl.int64)[:, None] * heads + head) * 3 * HD + column
        low, high, total = _join(
            low,
            high,
            total,
            tl.load(at, exists, INFINITY),
            tl.load(at + HD, exists, -INFINITY),
            tl.load(at + 2 * HD, exists, 0.0),
        )
    return tl.min(low, 0), tl.max(high, 0), tl.div_rn(tl.sum(total, 0), tl.cast(length, tl.float32))


@triton.jit
def _exponent(x):
    """The least e with x < 2^e."""
    return (tl.maximum(x, LEAST).to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def _power(exponent):
    """Two to it, between -126 and 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["length", "num_keys", "q_parts", "k_parts"])
def _prepare_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    num_keys,
    q_parts,
    k_parts,
    FP8: tl.constexpr,
    BITS: tl.constexpr,
    HD: tl.constexpr,
    STEP: tl.constexpr,
):
    """The five rows of `reference.Preparation` of one head, out [5, B * H, HD].

    fp8 values are made to lie within 2^BITS.
    """
    low, high, _ = _whole_range(q_ptr, q_parts, length, HD, STEP)
    q_exponent = _exponent(tl.maximum(high, -low))
    low, high, k_mean = _whole_range(k_ptr, k_parts, num_keys, HD, STEP)
    exponent = (_exponent(high - low) - q_exponent) >> 1
    exponent = tl.minimum(tl.maximum(exponent, -8), 8)
    low, high, v_mean = _whole_range(v_ptr, k_parts, num_keys, HD, STEP)
    if FP8:
        v_exponent = _exponent(tl.maximum(high - v_mean, v_mean - low)) - BITS
    else:
        v_mean = tl.zeros([HD], tl.float32)
        largest = tl.max(tl.maximum(high, -low), 0)
        v_exponent = tl.broadcast_to(_exponent(largest), [HD])
    row = tl.num_programs(0) * HD
    out_ptr += tl.program_id(0) * HD + tl.arange(0, HD)
    tl.store(out_ptr, k_mean)
    tl.store(out_ptr + row, _power(exponent))
    tl.store(out_ptr + 2 * row, _power(-exponent))
    tl.store(out_ptr + 3 * row, v_mean)
    tl.store(out_ptr + 4 * row, _power(v_exponent))


@triton.jit
def _turn(factor_ptr, HD: tl.constexpr):
    """diag(factor) H, [HD, HD]."""
    factor = tl.load(factor_ptr + tl.arange(0, HD))[:, None]
    return tl.where(odd_bits(HD) == 0, factor, -factor)


@triton.jit(do_not_specialize=["length"])
def _quantize_heads_kernel(
    x_ptr,
    factor_ptr,
    mean_ptr,
    out_ptr,
    out_scale_ptr,
    x_strides,
    length,
    num_heads,
    HD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of (x - mean) diag(factor) H in int8 [B, H, n, HD]."""
    head = tl.program_id(1).to(tl.int64)  # of all samples
    b, h = head // num_heads, head % num_heads
    first = tl.program_id(0).to(tl.int64) * BLOCK
    num_rows = (length - first).to(tl.int32)
    row, column = tl.arange(0, BLOCK), tl.arange(0, HD)
    exists = row < num_rows
    x_ptr += b * x_strides[0] + h * x_strides[1] + first * x_strides[2]
    x = load_rows(x_ptr, x_strides[2], num_rows, HD, HD, BLOCK, True)  # [BLOCK, HD]
    turn = _turn(factor_ptr + head * HD, HD)
    y = dot(x, turn.to(x.dtype), None, tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + head * HD + column)
        y -= tl.sum(mean[:, None] * turn, 0)[None, :]
    peak = tl.maximum(tl.max(tl.abs(y), 1), LEAST)
    y = round_to_int8(y * tl.div_rn(127.0, peak)[:, None])
    target = (head * length + first) * HD + row[:, None] * HD + column[None, :]
    tl.store(out_ptr + target, y, exists[:, None])
    tl.store(out_scale_ptr + head * length + first + row, tl.div_rn(peak, 127.0), exists)


@triton.jit(do_not_specialize=["length"])
def _scale_values_kernel(
    v_ptr,
    mean_ptr,
    scale_ptr,
    out_ptr,
    v_strides,
    length,
    num_heads,
    HD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(v - mean) / scale: fp16 [B, H, n, HD]; fp8 [B, H, HD, whole blocks], zeros behind, turned.

    Eight-bit products read the values of one channel side by side, and a transposition of bytes in
    registers is dear: here it is paid once, for all queries.
    """
    head = tl.program_id(1).to(tl.int64)  # of all samples
    b, h = head // num_heads, head % num_heads
    first = tl.program_id(0).to(tl.int64) * BLOCK
    num_rows = (length - first).to(tl.int32)
    row, column = tl.arange(0, BLOCK), tl.arange(0, HD)
    v_ptr += b * v_strides[0] + h * v_strides[1] + first * v_strides[2]
    v = load_rows(v_ptr, v_strides[2], num_rows, HD, HD, BLOCK, True).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + head * HD + column))  # of a power of two: exact
    v = (v - tl.load(mean_ptr + head * HD + column)[None, :]) * inverse[None, :]
    exists = (row < num_rows)[:, None]
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        width = tl.num_programs(0).to(tl.int64) * BLOCK
        target = out_ptr + (head * HD + column)[:, None] * width + (first + row)[None, :]
        v8 = cast(tl.where(exists, v, 0.0), tl.float8e4nv)
        tl.store(target, interleave(tl.trans(v8)))
    else:
        target = out_ptr + (head * length + first + row)[:, None] * HD + column[None, :]
        tl.store(target, cast(v, tl.float16), exists)


def prepare(q: Tensor, k: Tensor, v: Tensor, v_dtype: torch.dtype, bits: int) -> Prepared:
    """v within 2^bits where it becomes fp8.

    Peak: q and k in half their size, v in v_dtype, a number of each head and token.
    """
    q, k, v = rows_dense(q), rows_dense(k), rows_dense(v)
    ready = _preparation(q, k, v, v_dtype, bits)
    q8, q_scale = _quantize(q, ready.q_factor, None)
    k8, k_scale = _quantize(k, ready.k_factor, ready.k_mean)
    values = _scale_values(v, ready, v_dtype)
    return Prepared(q8, k8, values, Scales(q_scale, k_scale, ready.v_scale, ready.v_mean))


def _preparation(q: Tensor, k: Tensor, v: Tensor, v_dtype: torch.dtype, bits: int) -> Preparation:
    b, num_heads, _, head_dim = q.shape
    q_parts, k_parts, v_parts = (_ranges(x) for x in (q, k, v))
    out = torch.empty((5, b, num_heads, 1, head_dim), dtype=torch.float32, device=q.device)
    launch(
        _prepare_kernel,
        (b * num_heads,),
        q_parts,
        k_parts,
        v_parts,
        out,
        q.shape[2],
        k.shape[2],
        len(q_parts),
        len(k_parts),
        FP8=v_dtype == torch.float8_e4m3fn,
        BITS=bits,
        HD=head_dim,
        STEP=STEP,
        num_warps=4,
    )
    return Preparation(*out.unbind())


def _ranges(x: Tensor) -> Tensor:
    b, num_heads, length, head_dim = x.shape
    simulated = arch_of(x) == INTERPRETER
    part, step = (PART_INTERPRETER, STEP_INTERPRETER) if simulated else (PART, STEP)
    grid = (triton.cdiv(length, part), b * num_heads)
    out = torch.empty((*grid, 3, head_dim), dtype=torch.float32, device=x.device)
    launch(
        _ranges_kernel,
        grid,
        x,
        out,
        x.stride()[:3],
        length,
        num_heads,
        HD=head_dim,
        PART=part,
        STEP=step,
        num_warps=4,
    )
    return out


def _quantize(x: Tensor, factor: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """x in int8 and its scales [B, H, n, 1]."""
    b, num_heads, length, head_dim = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    out_scale = torch.empty((b, num_heads, length, 1), dtype=torch.float32, device=x.device)
    block = keys_of(x)
    launch(
        _quantize_heads_kernel,
        (triton.cdiv(length, block), b * num_heads),
        x,
        factor,
        mean,
        out,
        out_scale,
        x.stride()[:3],
        length,
        num_heads,
        HD=head_dim,
        BLOCK=block,
        num_warps=8,
        mma=(Mma("bf16" if x.dtype == torch.bfloat16 else "f16", "f32"),),
    )
    return out, out_scale


def _scale_values(v: Tensor, ready: Preparation, dtype: torch.dtype) -> Tensor:
    b, num_heads, length, head_dim = v.shape
    block = keys_of(v)
    blocks = triton.cdiv(length, block)
    fp8 = dtype == torch.float8_e4m3fn
    shape = (head_dim, blocks * block) if fp8 else (length, head_dim)
    out = torch.empty((b, num_heads, *shape), dtype=dtype, device=v.device)
    launch(
        _scale_values_kernel,
        (blocks, b * num_heads),
        v,
        ready.v_mean,
        ready.v_scale,
        out,
        v.stride()[:3],
        length,
        num_heads,
        HD=head_dim,
        BLOCK=block,
        num_warps=8,
    )
    return out
