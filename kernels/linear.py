"""Linears of eight-bit values in Triton: one product on the tensor cores and what follows it.

What each op computes is said in `reference.py` under the same name. int8 adds up in s32: with one
scale for each row of x the whole sum is scaled once. Where each 128 columns have a scale, their sum
is scaled and added to an fp32 total. So is fp8 always, because Ada and Hopper keep about 13 bits of
a sum of fp8 products (SageAttention2, arXiv:2411.10958): in 128 columns that does little harm. On
8.9 sums of 64 are in fp16 (`fp8_sums.py`), where x says that it is small enough.
bf16 and fp16 linears are left to cuBLAS.

NOTE: tiles are chosen by what fits registers and shared memory; none was tried on hardware.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels import fp8_sums
from wanrt.kernels.arithmetic import cast, dot, store_quantized
from wanrt.kernels.fp8_sums import activation_peak
from wanrt.kernels.launch import INTERPRETER, Mma, arch_of, launch
from wanrt.kernels.reference import GROUP, Quantized
from wanrt.kernels.rotation import MMA as TURN
from wanrt.kernels.rotation import rotate
from wanrt.kernels.target import Target
from wanrt.kernels.winners import pick

MMA = {torch.int8: Mma("s8", "s32"), torch.float8_e4m3fn: Mma("e4m3", "f32")}
BLOCK_N = GROUP  # columns of a tile, one group of a quantised result
SWATH = 8  # tiles of rows that go through all columns together


class Tile(NamedTuple):
    """Rows of a tile, columns of x in one product, steps ahead, warps, registers of a thread."""

    rows: int
    depth: int
    stages: int
    warps: int
    registers: int


LARGE = Tile(256, 32, 3, 8, 255)  # where registers hold one sum and no residual
SMALL = Tile(128, 32, 3, 8, 192)  # where they hold more. Unasked, ptxas takes 128 and spills
TWICE = Tile(128, 32, 3, 8, 255)  # where there are sums twice: rotated ones, or fp16 ones


def _tiles(arch: int, kind: str, by_group: bool, in_fp16: bool) -> tuple[Tile, ...]:
    """Without spills, within 99 KiB of shared memory, on every architecture alike."""
    if arch == INTERPRETER:
        largest = Tile(512, GROUP // 2, 1, 4, 255)
        return largest, largest._replace(rows=32)
    if not by_group and kind != "residual":
        return LARGE, LARGE._replace(stages=2), LARGE._replace(rows=128, depth=64)
    small = TWICE if kind == "rotated" or in_fp16 else SMALL
    return small, small._replace(stages=4), small._replace(stages=2)


@triton.jit
def _place(
    num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWATH: tl.constexpr
):
    """Rows and columns of this program's tile, neighbours close in time: they read the same L2."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    swath = tl.program_id(0) // (SWATH * tiles_n)
    height = tl.minimum(tiles_m - swath * SWATH, SWATH)
    place = tl.program_id(0) % (SWATH * tiles_n)
    return swath * SWATH + place % height, place // height


@triton.jit
def _product(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    row,
    column,
    num_rows,
    num_columns,
    depth,
    groups,
    stride_xm,
    stride_wn,
    BY_GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    SUM: tl.constexpr,
):
    """fp32 [M, N]: x W^T, scaled by the scales of x. EVEN: STEP divides `depth`.

    By groups, SUM columns of each STEP add up in ACC.
    """
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(row, num_rows - 1).to(tl.int64)  # what lies outside is never stored
    column = tl.minimum(column, num_columns - 1).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * stride_xm + k[None, :]  # [M, K]
    w_ptrs = w_ptr + column[None, :] * stride_wn + k[:, None]  # [K, N]
    scale_ptrs = x_scale_ptr + row * groups
    following = tl.load(scale_ptrs)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if BY_GROUP else ACC)
    for begin in range(0, depth, STEP):
        scale = following[:, None]
        if BY_GROUP:  # the next is asked for a turn ahead, so that no product waits for it
            scale_ptrs += tl.where((groups > 1) & (begin + STEP < depth), 1, 0)
            following = tl.load(scale_ptrs)
        for _ in tl.static_range(STEP // SUM):
            acc = tl.zeros((BLOCK_M, BLOCK_N), ACC) if BY_GROUP else total
            # NOTE: several products a step. Of one alone Triton 3.8 fetches the next operands early
            # and carries them through the loop, each byte in a register of its own.
            for _ in tl.static_range(SUM // BLOCK_K):
                if EVEN:
                    x, w = tl.load(x_ptrs), tl.load(w_ptrs)
                else:
                    x = tl.load(x_ptrs, (k < depth)[None, :], 0.0)
                    w = tl.load(w_ptrs, (k < depth)[:, None], 0.0)
                    k += BLOCK_K
                acc = dot(x, w, acc, ACC)
                x_ptrs += BLOCK_K
                w_ptrs += BLOCK_K
            total = total + acc.to(tl.float32) * scale if BY_GROUP else acc
    return total if BY_GROUP else total.to(tl.float32) * following[:, None]


@triton.jit
def _gelu_tanh(x):
    """0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _store_residual(
    y,
    residual_ptr,
    gate_ptr,
    out_ptr,
    row,
    first_column,
    num_rows,
    num_columns,
    length,
    stride_rm,
    stride_gb,
    stride_gl,
    stride_om,
    GATE_BY_ROW: tl.constexpr,
):
    """residual + gate * y, half of the columns at a time: that halves the registers it takes."""
    rows: tl.constexpr = y.shape[0]
    half: tl.constexpr = y.shape[1] // 2
    pair = tl.split(tl.permute(tl.reshape(y, (rows, 2, half)), (0, 2, 1)))
    residual_ptr += row.to(tl.int64)[:, None] * stride_rm
    out_ptr += row.to(tl.int64)[:, None] * stride_om
    for i in tl.static_range(2):
        column = first_column + i * half + tl.arange(0, half)
        held = column < num_columns
        mask = (row < num_rows)[:, None] & held[None, :]
        added = pair[i]
        if GATE_BY_ROW:
            source = (row // length).to(tl.int64) * stride_gb + (row % length) * stride_gl
            gate = tl.load(gate_ptr + source[:, None] + column[None, :], mask, 0.0)
            added *= gate.to(tl.float32)
        elif gate_ptr is not None:
            added *= tl.load(gate_ptr + column, held, 0.0).to(tl.float32)[None, :]
        added += tl.load(residual_ptr + column[None, :], mask, 0.0)
        tl.store(out_ptr + column[None, :], added, mask)


@triton.jit(do_not_specialize=["num_rows", "length"])
def _linear_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    out_ptr,
    out_scale_ptr,
    num_rows,
    num_columns,
    depth,
    groups,
    length,
    stride_xm,
    stride_wn,
    stride_wscale,
    stride_rm,
    stride_gb,
    stride_gl,
    stride_om,
    largest,
    GELU: tl.constexpr,
    HADAMARD: tl.constexpr,
    GATE_BY_ROW: tl.constexpr,
    BY_GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    SUM: tl.constexpr,
    SWATH: tl.constexpr,
):
    """One tile [M, N] of act(x W^T * scales + bias), added to a residual or quantised if asked."""
    tile_m, tile_n = _place(num_rows, num_columns, BLOCK_M, BLOCK_N, SWATH)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _product(x_ptr, x_scale_ptr, w_ptr, row, column, num_rows, num_columns, depth, groups,
                 stride_xm, stride_wn, BY_GROUP, EVEN, ACC, BLOCK_M, BLOCK_N, BLOCK_K,
                 STEP, SUM)  # fmt: skip
    exists, held = row < num_rows, column < num_columns
    y *= tl.load(w_scale_ptr + column * stride_wscale, held, 0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, held, 0.0).to(tl.float32)[None, :]
    if GELU:
        y = _gelu_tanh(y)
    if HADAMARD:
        y = rotate(y)
    mask = exists[:, None] & held[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * stride_om + column[None, :]
    if residual_ptr is not None:
        _store_residual(y, residual_ptr, gate_ptr, out_ptr, row, tile_n * BLOCK_N, num_rows,
                        num_columns, length, stride_rm, stride_gb, stride_gl, stride_om,
                        GATE_BY_ROW)  # fmt: skip
    elif out_scale_ptr is not None:
        scale = out_scale_ptr + row.to(tl.int64) * tl.cdiv(num_columns, BLOCK_N) + tile_n
        store_quantized(y, target, mask, scale, exists, largest)
    else:
        tl.store(target, cast(y, out_ptr.dtype.element_ty), mask)


def linear_quantized(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activation: str | None = None,
) -> Tensor:
    """See `reference.linear_quantized`."""
    shape = (*x.values.shape[:-1], len(weight.values))
    out = torch.empty(shape, dtype=dtype, device=x.values.device)
    _linear(x, weight, bias, out, activation)
    return out


def linear_quantized_out(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    activation: str | None = None,
    hadamard: bool = False,
) -> Quantized:
    """See `reference.linear_quantized_out`."""
    leading, width, device = x.values.shape[:-1], len(weight.values), x.values.device
    assert width % GROUP == 0, f"{weight.values.shape=}"
    values = torch.empty((*leading, width), dtype=dtype, device=device)
    scale = torch.empty((*leading, width // GROUP), dtype=torch.float32, device=device)
    _linear(x, weight, bias, values, activation, out_scale=scale, hadamard=hadamard)
    return Quantized(values, scale, activation_peak(dtype, arch_of(values)))


def linear_gated_residual(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_gated_residual`; the rows of `out` must lie at one distance."""
    assert residual.dtype == torch.float32, f"{residual.dtype=}"
    out = torch.empty(residual.shape, device=residual.device) if out is None else out
    gate = None if gate is None else gate.contiguous()
    _linear(x, weight, bias, out, residual=residual, gate=gate)
    return out


def _linear(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    out: Tensor,
    activation: str | None = None,
    out_scale: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    hadamard: bool = False,
) -> None:
    """Starts the kernel, which sees every tensor as rows."""
    assert activation in (None, "gelu_tanh"), f"{activation=}"
    rows, columns, scale = _rows(x.values), _rows(weight.values), x.scale.contiguous()
    (num_columns, depth), groups = columns.shape, scale.shape[-1]
    assert groups in (1, depth / GROUP), f"{x.scale.shape=} {depth=}"
    assert weight.scale.shape in ((num_columns, 1), (1, 1)), f"{weight.scale.shape=}"
    arch = arch_of(out)
    by_group = groups > 1 or rows.dtype == torch.float8_e4m3fn
    kind = "plain" if out_scale is None else "rotated" if hadamard else "quantized"
    kind = kind if residual is None else "residual"
    in_fp16 = _in_fp16(x, arch)
    product = Mma("e4m3", "f16") if in_fp16 else MMA[rows.dtype]
    sums = "groups" if by_group else "rows"
    key = f"linear/{str(rows.dtype).removeprefix('torch.')}/{kind}/{sums}"
    key += "/fp16" if in_fp16 else ""
    tile = pick(key, _tiles(arch, kind, by_group, in_fp16), out)
    weight_scale, bias = weight.scale.contiguous(), None if bias is None else bias.contiguous()
    residual = None if residual is None else _rows(residual)
    gate_strides = (0, 0) if gate is None else _broadcast(gate, out)
    result = out.view(-1, num_columns)
    launch(
        _linear_kernel,
        (triton.cdiv(len(rows), tile.rows) * triton.cdiv(num_columns, BLOCK_N),),
        rows,
        scale,
        columns,
        weight_scale,
        bias,
        residual,
        gate,
        result,
        out_scale,
        len(rows),
        num_columns,
        depth,
        groups,
        out.shape[-2] if out.ndim > 1 else 1,
        rows.stride(0),
        columns.stride(0),
        int(len(weight_scale) > 1),
        0 if residual is None else residual.stride(0),
        *gate_strides,
        result.stride(0),
        1.0 if out_scale is None else activation_peak(out.dtype, arch),
        GELU=activation is not None,
        HADAMARD=hadamard,
        GATE_BY_ROW=any(gate_strides),
        BY_GROUP=by_group,
        EVEN=depth % GROUP == 0,
        ACC={"s32": tl.int32, "f16": tl.float16, "f32": tl.float32}[product.accumulator],
        BLOCK_M=tile.rows,
        BLOCK_N=BLOCK_N,
        BLOCK_K=tile.depth,
        STEP=GROUP,
        SUM=fp8_sums.SUM_COLUMNS if in_fp16 else GROUP,
        SWATH=SWATH,
        num_stages=tile.stages,
        num_warps=tile.warps,
        maxnreg=tile.registers,
        mma=(product, TURN[torch.float32]) if hadamard else (product,),
    )


def _in_fp16(x: Quantized, arch: int) -> bool:
    """Whether x is fp8, small enough for sums in fp16, and on a card that gains by them."""
    small = x.peak is not None and x.peak <= fp8_sums.ACTIVATION_PEAK
    return small and x.values.dtype == torch.float8_e4m3fn and fp8_sums.used_on(arch)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [M, D]."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _broadcast(gate: Tensor, out: Tensor) -> tuple[int, int]:
    """Strides of [B or 1, L or 1, O] along the samples and tokens of out."""
    b, length, _ = gate.shape
    assert b in (1, out.shape[0]) and length in (1, out.shape[1]), f"{gate.shape=} {out.shape=}"
    return gate.stride(0) * (b > 1), gate.stride(1) * (length > 1)


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in MMA:
        return f"multiplies int8 and fp8 (e4m3), not {target.dtype}"
    return None
