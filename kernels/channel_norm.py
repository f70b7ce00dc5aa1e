"""Norms over the channels of the VAE's pixels in Triton: one pass, statistics in fp32 registers.

What each computes is said in `reference_vae.py`. Pixels lie channels last, so that
a pixel is a row; a program takes several, as a row of 96 channels would leave most of it idle.
Source: Wan2.1 @9737cba `wan/modules/vae.py` RMS_norm.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.arithmetic import cast, round_to_int8
from wanrt.kernels.launch import INTERPRETER, arch_of, launch
from wanrt.kernels.target import Target

MAX_CHANNELS = 4096  # fp32 values of a row that fit the registers of one program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VALUES = 4096  # of one program of 4 warps: 32 to a thread


@triton.jit(do_not_specialize=["num_rows", "length"])
def _channel_norm_kernel(
    x_ptr,
    gamma_ptr,
    step_ptr,
    zero_ptr,
    out_ptr,
    num_rows,
    length,
    stride_xb,
    stride_xl,
    root,
    C: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x / max(|x|, 1e-12) * root * gamma for each row, then SiLU and eight bits if asked for."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    mask = (row < num_rows)[:, None] & (channel < C)[None, :]  # [M, C]
    source = (row // length).to(tl.int64) * stride_xb + (row % length).to(tl.int64) * stride_xl
    x = tl.load(x_ptr + source[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), 1e-12)
    gamma = tl.load(gamma_ptr + channel, channel < C, 0.0).to(tl.float32)
    y = tl.div_rn(x, norm[:, None]) * root * gamma[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    target = out_ptr + row.to(tl.int64)[:, None] * C + channel[None, :]
    if step_ptr is None:
        tl.store(target, cast(y, out_ptr.dtype.element_ty), mask)
    else:
        step = tl.load(step_ptr + channel, channel < C, 1.0)
        zero = tl.load(zero_ptr + channel, channel < C, 0.0).to(tl.float32)
        y = y * tl.div_rn(tl.full((BLOCK_C,), 1.0, tl.float32), step)[None, :] + zero[None, :]
        tl.store(target, round_to_int8(y), mask)


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.rms_norm_channels`."""
    return _channel_norm(x, gamma, silu=False)


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.channel_norm_silu`."""
    return _channel_norm(x, gamma, silu=True)


def channel_norm_silu_quantize(x: Tensor, gamma: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """See `reference_vae.channel_norm_silu_quantize`."""
    return _channel_norm(x, gamma, silu=True, step=step, zero=zero)


def _channel_norm(
    x: Tensor,
    gamma: Tensor,
    silu: bool,
    step: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """The result lies channels last, whatever x does."""
    c = x.shape[1]
    assert c <= MAX_CHANNELS, f"{x.shape=}"
    pixels = x.movedim(1, -1)  # [B, ..., C]
    rows = pixels.reshape(x.shape[0], -1, c)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    dtype = x.dtype if step is None else torch.int8
    out = torch.empty(pixels.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(c)
    size = max(1, (1 << 17 if arch_of(x) == INTERPRETER else _VALUES) // block)
    launch(
        _channel_norm_kernel,
        (triton.cdiv(rows.shape[0] * rows.shape[1], size),),
        rows,
        gamma,
        step,
        zero,
        out,
        rows.shape[0] * rows.shape[1],
        rows.shape[1],
        *rows.stride()[:2],
        math.sqrt(c),
        C=c,
        SILU=silu,
        BLOCK_M=size,
        BLOCK_C=block,
        num_warps=4,
    )
    return out.movedim(-1, 1)


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, not {target.dtype}"
    return None
