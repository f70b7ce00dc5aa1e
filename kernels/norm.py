"""Norms and the residual stream in Triton: one pass over each row, statistics in fp32 registers.

What each computes is said in `reference.py` under the same name. A row is a token, whole in one
program: these kernels are bound by memory, so that what counts is how often a row is read.
Source: Wan2.1 @9737cba `wan/modules/model.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.arithmetic import cast, store_quantized
from wanrt.kernels.fp8_sums import activation_peak
from wanrt.kernels.launch import INTERPRETER, arch_of, launch
from wanrt.kernels.reference import GROUP, Quantized
from wanrt.kernels.rotation import MMA, TURNED, rotate
from wanrt.kernels.target import Target

TURNED_VALUES = 8192  # of one program: the more, the more rows share the matrix; twice that spills
MAX_WIDTH = 16384  # fp32 values of a row that fit the registers of one program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Rows of one program, and its warps."""

    rows: int
    warps: int


def _tile(x: Tensor) -> Tile:
    """64 bytes of a row for each thread; several rows only where the interpreter counts steps."""
    assert x.shape[-1] <= MAX_WIDTH, f"{x.shape=}"
    if arch_of(x) == INTERPRETER:
        return Tile(64, 4)
    return Tile(1, max(1, min(8, triton.next_power_of_2(x.shape[-1]) // 512)))


@triton.jit
def _rows(num_rows, length, BLOCK_M: tl.constexpr):
    """This program's rows, which of them exist, and the sample and token of each."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row < num_rows, row // length, row % length


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    out_scale_ptr,
    num_rows,
    length,
    width,
    stride_xb,
    stride_xl,
    stride_mb,
    stride_ml,
    eps,
    largest,
    ADD_ONE: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LN(x) * (ADD_ONE + scale) + shift; with `largest`, quantised by row."""
    row, exists, sample, token = _rows(num_rows, length, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (column < width)[None, :]  # [M, D]
    source = sample.to(tl.int64) * stride_xb + token.to(tl.int64) * stride_xl
    modulation = sample.to(tl.int64) * stride_mb + token.to(tl.int64) * stride_ml
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    mean = tl.sum(x, 1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    scale = tl.load(scale_ptr + modulation[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + modulation[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    if ADD_ONE:
        scale += 1.0
    y = centred * inverse[:, None] * scale + shift
    target = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    if out_scale_ptr is None:
        tl.store(target, cast(y, out_ptr.dtype.element_ty), mask)
    else:
        y = tl.where(mask, y, 0.0)
        if HADAMARD:
            turned = rotate(tl.reshape(y, (BLOCK_M * BLOCK_D // TURNED, TURNED)))
            y = tl.reshape(turned, (BLOCK_M, BLOCK_D))
        store_quantized(y, target, mask, out_scale_ptr + row, exists, largest)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    freqs_ptr,
    out_ptr,
    num_rows,
    length,
    width,
    pairs,
    stride_xb,
    stride_xl,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """RMSNorm, rounded to x's dtype, times weight; with `freqs`, each adjacent pair is rotated."""
    row, exists, sample, token = _rows(num_rows, length, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (column < width)[None, :]  # [M, D]
    source = sample.to(tl.int64) * stride_xb + token.to(tl.int64) * stride_xl
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    n = cast(x * inverse[:, None], x_ptr.dtype.element_ty).to(tl.float32)
    y = n * tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    if freqs_ptr is not None:
        pair = tl.arange(0, BLOCK_D // 2)
        rotation = token.to(tl.int64)[:, None] * (2 * pairs) + (2 * (pair % pairs))[None, :]
        held = exists[:, None] & (2 * pair < width)[None, :]
        cos = tl.load(freqs_ptr + rotation, held, 0.0)  # [M, D / 2]
        sin = tl.load(freqs_ptr + rotation + 1, held, 0.0)
        a, b = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_D // 2, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK_M, BLOCK_D))
    target = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, cast(y, out_ptr.dtype.element_ty), mask)


@triton.jit
def _gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    num_rows,
    length,
    width,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gb,
    stride_gl,
    stride_ob,
    stride_ol,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x + gate * y; a program takes a piece of BLOCK_D columns of its rows."""
    _, exists, sample, token = _rows(num_rows, length, BLOCK_M)
    sample, token = sample.to(tl.int64)[:, None], token.to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask = exists[:, None] & (column < width)
    x = tl.load(x_ptr + sample * stride_xb + token * stride_xl + column, mask).to(tl.float32)
    y = tl.load(y_ptr + sample * stride_yb + token * stride_yl + column, mask).to(tl.float32)
    gate = tl.load(gate_ptr + sample * stride_gb + token * stride_gl + column, mask)
    target = out_ptr + sample * stride_ob + token * stride_ol + column
    tl.store(target, x + gate.to(tl.float32) * y, mask)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `reference.layer_norm`."""
    x3 = _three(x)
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    _layer_norm(x3, weight, bias, (0, 0), eps, out, None)
    return out


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `reference.layer_norm_modulate`."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    scale, shift = _dense(scale), _dense(shift)
    _layer_norm(_rows_dense(x), scale, shift, _broadcast(scale, x), eps, out, None, add_one=True)
    return out


def layer_norm_modulate_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    hadamard: bool = False,
) -> Quantized:
    """See `reference.layer_norm_modulate_quantize`."""
    assert not hadamard or x.shape[-1] % GROUP == 0, f"{x.shape=}"
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    out_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    scale, shift = _dense(scale), _dense(shift)
    strides = _broadcast(scale, x)
    _layer_norm(_rows_dense(x), scale, shift, strides, eps, out, out_scale, True, hadamard)
    return Quantized(out, out_scale, activation_peak(dtype, arch_of(x)))


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """See `reference.rms_norm`."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    _rms_norm(_three(x), weight, None, eps, out)
    return out


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    freqs: Tensor,
    num_heads: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `reference.rms_norm_rope`; the result is a view [B, H, L, hd] of [B, L, H, hd]."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    _rms_norm(_rows_dense(x), weight, freqs, eps, out)
    return out.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.gated_residual`."""
    x, y, gate = _rows_dense(x), _rows_dense(y), _dense(gate)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device) if out is None else out
    assert out.stride(-1) == 1, f"{out.stride()=}"
    b, length, width = x.shape
    rows, warps = _tile(x)
    block = min(triton.next_power_of_2(width), 1024)
    launch(
        _gated_residual_kernel,
        (triton.cdiv(b * length, rows), triton.cdiv(width, block)),
        x,
        y,
        gate,
        out,
        b * length,
        length,
        width,
        *x.stride()[:2],
        *y.stride()[:2],
        *_broadcast(gate, x),
        *out.stride()[:2],
        BLOCK_M=rows,
        BLOCK_D=block,
        num_warps=min(warps, 4),
    )
    return out


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    modulation: tuple[int, int],
    eps: float,
    out: Tensor,
    out_scale: Tensor | None,
    add_one: bool = False,
    hadamard: bool = False,
) -> None:
    b, length, width = x.shape
    rows, warps = _tile(x)
    columns = triton.next_power_of_2(width)
    if hadamard:
        rows, warps = max(rows, TURNED_VALUES // columns), 8
    launch(
        _layer_norm_kernel,
        (triton.cdiv(b * length, rows),),
        x,
        scale,
        shift,
        out,
        out_scale,
        b * length,
        length,
        width,
        *x.stride()[:2],
        *modulation,
        eps,
        1.0 if out_scale is None else activation_peak(out.dtype, arch_of(x)),
        ADD_ONE=add_one,
        HADAMARD=hadamard,
        BLOCK_M=rows,
        BLOCK_D=columns,
        num_warps=warps,
        mma=(MMA[torch.float32],) if hadamard else (),
    )


def _rms_norm(x: Tensor, weight: Tensor, freqs: Tensor | None, eps: float, out: Tensor) -> None:
    b, length, width = x.shape
    rows, warps = _tile(x)
    launch(
        _rms_norm_kernel,
        (triton.cdiv(b * length, rows),),
        x,
        weight,
        freqs,
        out,
        b * length,
        length,
        width,
        1 if freqs is None else freqs.shape[1],
        *x.stride()[:2],
        eps,
        BLOCK_M=rows,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=warps,
    )


def _three(x: Tensor) -> Tensor:
    """[..., D] as [B, L, D]."""
    return _rows_dense(x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]))


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(modulation: Tensor) -> Tensor:
    """Two tensors that are dense have one set of strides."""
    return modulation.contiguous()


def _broadcast(modulation: Tensor, x: Tensor) -> tuple[int, int]:
    """Strides of [B or 1, L or 1, D] along the samples and tokens of x."""
    b, length, _ = modulation.shape
    assert b in (1, x.shape[0]) and length in (1, x.shape[1]), f"{modulation.shape=} {x.shape=}"
    return modulation.stride(0) * (b > 1), modulation.stride(1) * (length > 1)


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, not {target.dtype}"
    return None
