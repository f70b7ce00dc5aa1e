"""The watermark's op in Triton: one pass over a frame, each value read and written once.

What it computes is said in `reference_watermark.py`. Bound by memory: a byte in, a byte out, and
two bytes of pattern, which stays in the cache from frame to frame.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.launch import INTERPRETER, arch_of, launch
from wanrt.kernels.reference_watermark import BLOCK, SHIFT
from wanrt.kernels.target import Target

VALUES, WARPS = 2048, 4  # of one program: 16 values for each thread


@triton.jit(do_not_specialize=["num_values"])
def _mark_frame_kernel(
    frame_ptr,
    pattern_ptr,
    strength_ptr,
    out_ptr,
    num_values,
    line,
    columns,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Values of the frame one after the other; a line of it has `line`, one of the pattern more."""
    index = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    exists = index < num_values
    row, place = index // line, index % line
    padded = columns * (SIDE * CHANNELS)
    pattern = tl.load(pattern_ptr + row * padded + place, exists, 0).to(tl.int32)
    block = row // SIDE * columns + place // (SIDE * CHANNELS)
    strength = tl.load(strength_ptr + block, exists, 0).to(tl.int32)
    change = (pattern * strength + (1 << (SHIFT - 1))) >> SHIFT
    value = tl.load(frame_ptr + index, exists, 0).to(tl.int32) + change
    value = tl.minimum(tl.maximum(value, 0), 255)
    tl.store(out_ptr + index, value.to(tl.uint8), exists)


def mark_frame(frame: Tensor, pattern: Tensor, strength: Tensor) -> Tensor:
    """See `reference_watermark.mark_frame`."""
    _, width, channels = frame.shape
    frame, pattern, strength = (x.contiguous() for x in (frame, pattern, strength))
    out = torch.empty(frame.shape, dtype=torch.uint8, device=frame.device)
    values = 1 << 18 if arch_of(frame) == INTERPRETER else VALUES
    launch(
        _mark_frame_kernel,
        (triton.cdiv(frame.numel(), values),),
        frame,
        pattern,
        strength,
        out,
        frame.numel(),
        width * channels,
        pattern.shape[2],
        SIDE=BLOCK,
        CHANNELS=channels,
        SHIFT=SHIFT,
        VALUES=values,
        num_warps=WARPS,
    )
    return out


def supports(op: str, target: Target) -> str | None:
    """None, or why this kernel declines."""
    return None if target.dtype == torch.uint8 else f"takes uint8, not {target.dtype}"
