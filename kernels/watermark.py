"""The watermark's op in Triton: one pass over a frame, each value read and written once.

What it computes is said in `reference_watermark.py`. Bound by memory: a byte in, a byte out, and
two bytes of pattern, which stays in the cache from frame to frame.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanrt.kernels.launch import launch
from wanrt.kernels.reference_watermark import BLOCK, SHIFT
from wanrt.kernels.target import Target

VALUES, WARPS = 1024, 4  # of one program: 8 values of a line for each thread


@triton.jit
def _mark_frame_kernel(
    frame_ptr,
    pattern_ptr,
    strength_ptr,
    out_ptr,
    line,
    columns,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr,
    VALUES: tl.constexpr,
):
    """A part of one line: `line` values of the frame, rounded up to whole blocks in the pattern."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    exists = place < line
    padded = columns * (SIDE * CHANNELS)
    pattern = tl.load(pattern_ptr + row * padded + place, exists, 0).to(tl.int32)
    block = row // SIDE * columns + place // (SIDE * CHANNELS)
    strength = tl.load(strength_ptr + block, exists, 0).to(tl.int32)
    change = (pattern * strength + (1 << (SHIFT - 1))) >> SHIFT
    value = tl.load(frame_ptr + row * line + place, exists, 0).to(tl.int32) + change
    value = tl.minimum(tl.maximum(value, 0), 255)
    tl.store(out_ptr + row * line + place, value.to(tl.uint8), exists)


def mark_frame(frame: Tensor, pattern: Tensor, strength: Tensor) -> Tensor:
    """See `reference_watermark.mark_frame`."""
    height, width, channels = frame.shape
    frame, pattern, strength = (x.contiguous() for x in (frame, pattern, strength))
    out = torch.empty(frame.shape, dtype=torch.uint8, device=frame.device)
    line = width * channels
    launch(
        _mark_frame_kernel,
        (height, triton.cdiv(line, VALUES)),
        frame,
        pattern,
        strength,
        out,
        line,
        pattern.shape[2],
        SIDE=BLOCK,
        CHANNELS=channels,
        SHIFT=SHIFT,
        VALUES=VALUES,
        num_warps=WARPS,
    )
    return out


def supports(op: str, target: Target) -> str | None:
    """None, or why this kernel declines."""
    return None if target.dtype == torch.uint8 else f"takes uint8, not {target.dtype}"
