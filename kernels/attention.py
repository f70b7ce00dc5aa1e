"""Attention in Triton: every query sees every key, scores never leave the chip.

What it computes is said in `reference.py`. A program holds BLOCK_M queries of one head and walks
over the keys, BLOCK_N at a time, with the running maximum and sum of its softmax in fp32. With
scales of q and k (`attention_int8.py`) the same kernel multiplies eight-bit integers, and fp8
probabilities by fp8 values where those are given.
Source: FlashAttention-2, arXiv 2307.08691, algorithm 1.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels import fp8_sums
from wanrt.kernels.arithmetic import cast, dot
from wanrt.kernels.launch import INTERPRETER, Mma, arch_of, launch
from wanrt.kernels.reference import LARGEST
from wanrt.kernels.target import Target
from wanrt.kernels.winners import pick

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
HEADROOM = 8.0  # the largest probability is two to this: fp16 holds those down to 2^-32 of it
# NOTE: a bias below this counts as -inf.
LEAST: tl.constexpr = tl.constexpr(-1e30)


class Tile(NamedTuple):
    """Queries and keys of one step of a program, its warps, and stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# 128 queries of 128 columns fill the registers of 8 warps. Untested on hardware.
# Keys stay 64: prepared fp8 values lie in such blocks, and sums in eight or 16 bits are of so many.
TILES = (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2))
TILES_BIASED = TILES[:1]  # a bias takes registers and shared memory that the others do not leave
TILES_INTERPRETER = (Tile(128, 128, 4, 1), Tile(32, 128, 4, 1))


class Scales(NamedTuple):
    """What integers q and k and prepared v are multiplied by, and v's mean: dense, fp32."""

    q: Tensor  # [B, H, L, 1]
    k: Tensor  # [B, H, n, 1]
    v: Tensor  # [B, H, 1, hd]
    v_mean: Tensor  # [B, H, 1, hd]


@triton.jit
def load_rows(
    ptr,
    stride,
    count,
    HEAD_DIM: tl.constexpr,
    HD: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """[BLOCK, HD] from ptr on: zeros past HEAD_DIM and, at an EDGE, the last row past `count`.

    To repeat a row takes fewer registers than to mask it.
    """
    row, column = tl.arange(0, BLOCK), tl.arange(0, HD)[None, :]
    if EDGE:
        row = tl.minimum(row, count - 1)
    at = ptr + row[:, None] * stride + column
    if HEAD_DIM < HD:
        return tl.load(at, column < HEAD_DIM, 0.0)
    return tl.load(at)


@triton.jit
def interleave(x):
    """The columns of each 32 in the order in which threads hold them: 0 1 8 9 2 3 10 11 ...

    Of 32 scores a tensor core leaves a thread two neighbours in each 8 columns, and wants four
    neighbours in each 16 of the next, eight-bit product. In this order they are the same numbers,
    so that none goes to another thread. Values come in the same order: sums do not mind.
    """
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    parts = tl.permute(tl.reshape(x, (m, n // 32, 2, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
    return tl.reshape(parts, (m, n))


@triton.jit
def _add_products(acc, shrink, p, v, SUM: tl.constexpr):
    """acc * shrink + p v: within a block of keys in SUM, over all in fp32.

    NOTE: fp8 products have fewer bits than fp32 in their fp32 sums, so that a block starts from
    zero. Triton gives a product whatever is added to it as its first sum; it leaves an fma alone.
    """
    if SUM == tl.float16:
        acc = acc * shrink[:, None] + dot(p, v, None, SUM).to(tl.float32)
    elif v.dtype == tl.float8e4nv:
        acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), dot(p, v, None, SUM))
    else:
        acc = dot(p, v, acc * shrink[:, None], SUM)
    return acc


@triton.jit(do_not_specialize=["length", "num_keys"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    scale_ptrs,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    length,
    num_keys,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM: tl.constexpr,
    PEAK: tl.constexpr,
):
    """softmax(q k^T * scale + bias) v. fp8 v is [B, H, hd, whole blocks], see `interleave`.

    A row's largest probability is two to PEAK; a block of keys adds up in SUM.
    """
    FP8: tl.constexpr = v_ptr.dtype.element_ty == tl.float8e4nv
    head = tl.program_id(1).to(tl.int64)  # of all samples
    b, h = head // num_heads, head % num_heads
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, key, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, HD)
    num_rows = (length - first).to(tl.int32)
    row_exists = row < num_rows
    q_ptr += b * q_strides[0] + h * q_strides[1] + first * q_strides[2]
    k_ptr += b * k_strides[0] + h * k_strides[1]
    v_ptr += b * v_strides[0] + h * v_strides[1]
    q = load_rows(q_ptr, q_strides[2], num_rows, HEAD_DIM, HD, BLOCK_M, True)  # [M, HD]
    factor = tl.full([BLOCK_M], scale * LOG2_E, tl.float32)  # scores become powers of two
    if scale_ptrs is not None:
        factor *= tl.load(scale_ptrs[0] + head * length + first + row, row_exists, 1.0)
    if bias_ptr is not None:
        bias_ptr += b * bias_strides[0] + h * bias_strides[1]
    acc = tl.zeros([BLOCK_M, HD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LEAST, tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    for LAST in tl.static_range(2):  # the whole blocks without masks, then what is left
        for start in range(whole if LAST else 0, num_keys if LAST else whole, BLOCK_N):
            left = num_keys - start
            at = tl.cast(start, tl.int64)
            k = load_rows(
                k_ptr + at * k_strides[2], k_strides[2], left, HEAD_DIM, HD, BLOCK_N, LAST
            )
            if scale_ptrs is None:
                scores = dot(q, tl.trans(k), None, tl.float32)  # [M, N]
            else:
                scores = dot(q, tl.trans(k), None, tl.int32).to(tl.float32)
                k_scale = tl.load(scale_ptrs[1] + head * num_keys + at + key, key < left, 0.0)
                scores *= k_scale[None, :]
            if LAST:
                scores = tl.where((key < left)[None, :], scores, -float("inf"))
            if bias_ptr is None:
                peak_next = tl.maximum(peak, tl.max(scores, 1) * factor)
                powers = scores * factor[:, None]
            else:
                bias_at = bias_ptr + (at + key)[None, :] * bias_strides[3]
                exists = (key < left)[None, :]
                if bias_strides[2] is not None:
                    bias_at += (first + row)[:, None] * bias_strides[2]
                    exists &= row_exists[:, None]
                bias = tl.load(bias_at, exists, 0.0).to(tl.float32)  # [M or 1, N]
                powers = scores * factor[:, None] + bias * LOG2_E
                peak_next = tl.maximum(peak, tl.max(powers, 1))
            p = tl.exp2(powers - (peak_next - PEAK)[:, None])
            shrink = tl.exp2(peak - peak_next)
            total = total * shrink + tl.sum(p, 1)
            peak = peak_next
            if FP8:
                v = tl.trans(tl.load(v_ptr + at + column[:, None] * v_strides[2] + key[None, :]))
                p = interleave(p)
            else:
                v = load_rows(
                    v_ptr + at * v_strides[2], v_strides[2], left, HEAD_DIM, HD, BLOCK_N, LAST
                )
            acc = _add_products(acc, shrink, cast(p, v.dtype), v, SUM)
    if FP8:
        at = head * HD + column
        mean = tl.load(scale_ptrs[3] + at)
        acc = acc * tl.load(scale_ptrs[2] + at)[None, :] + total[:, None] * mean[None, :]
    elif scale_ptrs is not None:
        acc *= tl.load(scale_ptrs[2] + head * HD)  # the same for all channels
    out_ptr += b * out_strides[0] + h * out_strides[1] + first * out_strides[2]
    target = out_ptr + row[:, None] * out_strides[2] + column[None, :]
    result = cast(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(target, result, row_exists[:, None] & (column < HEAD_DIM)[None, :])


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention`; the result is a view [B, H, L, hd] of [B, L, H, hd]."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    assert q.dtype == k.dtype == v.dtype, f"{q.dtype=} {k.dtype=} {v.dtype=}"
    operand = {torch.bfloat16: "bf16", torch.float16: "f16"}[q.dtype]
    return attend(q, k, v, bias, scale, None, empty_heads(q, v.dtype), (Mma(operand, "f32"),))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    scales: Scales | None,
    out: Tensor,
    mma: tuple[Mma, ...],
) -> Tensor:
    """Start the kernel, which fills `out`.

    With `scales`, q and k are int8, v fp16, or fp8 as the kernel wants it.
    """
    b, num_heads, length, head_dim = q.shape
    num_keys = k.shape[2]
    assert head_dim <= MAX_HEAD_DIM and scale > 0, f"{q.shape=} {scale=}"
    assert k.shape == (b, num_heads, num_keys, head_dim), f"{k.shape=}"
    assert v.shape == k.shape or v.dtype == torch.float8_e4m3fn, f"{v.shape=}"
    q, k, v = rows_dense(q), rows_dense(k), rows_dense(v)
    width = max(32, triton.next_power_of_2(head_dim))
    key = f"attention/{'-'.join(product.operand for product in mma)}/{head_dim}"
    key += "" if bias is None else "/bias"
    tile = pick(key, _tiles(q, bias is not None), q)
    in_fp16 = mma[-1].accumulator == "f16"
    launch(
        _attention_kernel,
        (triton.cdiv(length, tile.queries), b * num_heads),
        q,
        k,
        v,
        bias,
        out,
        scales,
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        None if bias is None else _broadcast(bias, (b, num_heads, length, num_keys)),
        out.stride()[:3],
        length,
        num_keys,
        num_heads,
        scale,
        HEAD_DIM=head_dim,
        HD=width,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        SUM=tl.float16 if in_fp16 else tl.float32,
        PEAK=_peak(v.dtype, in_fp16, tile.keys),
        num_warps=tile.warps,
        num_stages=tile.stages,
        mma=mma,
    )
    return out


def _peak(values: torch.dtype, in_fp16: bool, keys: int) -> float:
    """The power of two that a row's largest probability becomes."""
    if values != torch.float8_e4m3fn:
        return HEADROOM
    if in_fp16:
        return math.log2(fp8_sums.LARGEST_SUM / (keys * 2**fp8_sums.VALUE_BITS))
    return math.log2(LARGEST[values])


def _tiles(x: Tensor, biased: bool = False) -> tuple[Tile, ...]:
    if arch_of(x) == INTERPRETER:
        return TILES_INTERPRETER
    return TILES_BIASED if biased else TILES


def keys_of(x: Tensor) -> int:
    """Keys of one block, in every tile alike."""
    return _tiles(x)[0].keys


def empty_heads(q: Tensor, dtype: torch.dtype) -> Tensor:
    """A view [B, H, L, hd] of [B, L, H, hd]: heads that are joined without a copy."""
    b, num_heads, length, head_dim = q.shape
    return torch.empty(b, length, num_heads, head_dim, dtype=dtype, device=q.device).transpose(1, 2)


def rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _broadcast(bias: Tensor, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """Strides of the bias; no stride of rows where all share one."""
    b, h, row, key = bias.expand(shape).stride()
    return b, h, None if bias.shape[-2] == 1 else row, key


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"tensor cores multiply bf16 and fp16, not {target.dtype}"
    return None
