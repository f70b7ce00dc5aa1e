"""Eight-bit activations in Triton: one pass over a row or its groups, rotated first if asked.

What it computes is said in `reference.quantize`, bit for bit where nothing is rotated. Groups of
columns are rows of their own: a program takes BLOCK_M of them whole.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.arithmetic import store_quantized
from wanrt.kernels.fp8_sums import activation_peak
from wanrt.kernels.launch import INTERPRETER, arch_of, launch
from wanrt.kernels.norm import DTYPES, MAX_WIDTH
from wanrt.kernels.reference import GROUP, Quantized
from wanrt.kernels.rotation import MIN_TURNED, MMA, TURNED, rotate
from wanrt.kernels.target import Target


class Tile(NamedTuple):
    """Rows of one program, columns rounded up to a power of two, and warps."""

    rows: int
    columns: int
    warps: int


def _tile(x: Tensor, group: int, hadamard: bool) -> Tile:
    """4096 values, 32 for each thread, unless one row has more."""
    assert group <= MAX_WIDTH, f"{group=} {MAX_WIDTH=}"
    columns, values = triton.next_power_of_2(group), 4096
    if hadamard and x.dtype == torch.float32:
        values = GROUP * GROUP  # with fewer rows each warp takes them all, and its registers spill
    if arch_of(x) == INTERPRETER:
        values = 1 << 18
    rows = max(1, values // columns)
    if hadamard:
        rows = max(rows, MIN_TURNED * GROUP // columns)
    return Tile(rows, columns, max(4, min(8, rows * columns // 1024)))


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_rows,
    groups,
    width,
    stride_xm,
    largest,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row r is group r % groups, `width` columns, of token r // groups."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < num_rows
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (column < width)[None, :]  # [M, D]
    source = (row // groups).to(tl.int64) * stride_xm + row % groups * width
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask, 0.0)
    if HADAMARD:
        turned = rotate(tl.reshape(x, (BLOCK_M * BLOCK_D // TURNED, TURNED)))
        x = tl.reshape(turned, (BLOCK_M, BLOCK_D))
    y = x.to(tl.float32)
    target = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    store_quantized(y, target, mask, scale_ptr + row, exists, largest)


def quantize(
    x: Tensor, dtype: torch.dtype, group: int | None = None, hadamard: bool = False
) -> Quantized:
    """See `reference.quantize`."""
    width = x.shape[-1]
    group = group or width
    assert width % group == 0, f"{width=} {group=}"
    assert not hadamard or (group % GROUP == 0 and group >= GROUP), f"{group=} {hadamard=}"
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], width // group), dtype=torch.float32, device=x.device)
    tile, peak = _tile(x, group, hadamard), activation_peak(dtype, arch_of(x))
    launch(
        _quantize_kernel,
        (triton.cdiv(scale.numel(), tile.rows),),
        rows,
        values,
        scale,
        scale.numel(),
        width // group,
        group,
        rows.stride(0),
        peak,
        HADAMARD=hadamard,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.warps,
        enable_fp_fusion=False,  # a product is rounded by itself: every bit counts
        mma=(MMA[x.dtype],) if hadamard else (),
    )
    return Quantized(values, scale, peak)


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, not {target.dtype}"
    return None
