"""The VAE's int8 convolution in Triton: an implicit matrix product of s8 with sums in s32.

What it computes is said in `reference_vae.causal_conv3d_int8`, integer sums bit for bit. As in
`conv.py`, a row of the product is an output pixel and nothing is concatenated, padded or unfolded.
What a tap sees outside of frames is loaded as 0, as asynchronous copies do it, although the format
has another zero point: sums start from a table of what that makes of each border.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from wanrt.kernels.arithmetic import cast
from wanrt.kernels.channel_norm import channel_norm_silu_quantize
from wanrt.kernels.launch import INTERPRETER, Mma, arch_of, launch
from wanrt.kernels.layout import empty_frames, frames_dense, is_frames_dense, outer_strides, tail
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.kernels.taps import multiply, taps_inside
from wanrt.kernels.target import Target
from wanrt.kernels.tile import PIXELS, WARP_PIXELS, Tile, check_frames, turns, widths
from wanrt.kernels.winners import pick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tiles(x: Tensor, out_channels: int, pixels: int) -> tuple[Tile, ...]:
    """Steps of 32 divide 96.

    NOTE: the first is chosen as that of `conv.py`; the others compile as well. Not yet timed.
    """
    arch, channels = arch_of(x), x.shape[1]
    wide, narrow = widths(out_channels)
    if arch == INTERPRETER:
        rows, step = (triton.next_power_of_2(n) for n in (pixels, channels))
        step = max(32, min(64, step))
        largest = Tile(max(16, min(1024, rows)), wide, narrow, step, 1, 4, 1)
        unroll = turns(largest, channels, 1, arch, channels)[-1]
        return largest, largest._replace(pixels=16), largest._replace(unroll=unroll)
    step = 64 if channels % 64 == 0 else 32
    plain = Tile(128, wide, narrow, step, 1, 8 if wide + narrow > 64 else 4, 4)
    small = plain._replace(pixels=64, warps=4)
    many = plain._replace(pixels=PIXELS, step=32, warps=PIXELS // WARP_PIXELS, stages=3)
    if arch == 90:
        many = plain._replace(stages=3)
    longest = 32 if arch == 120 else channels if arch == 90 else 96  # on 12.0 longer turns spill
    long = many._replace(unroll=turns(many, channels, 1, arch, longest)[-1])
    return tuple(dict.fromkeys((long, many, plain, plain._replace(stages=3), small)))


@triton.jit
def _begin(border_ptr, border, exists, channel, OUT: tl.constexpr):
    """What sums start from, so that zeros outside of frames count as the format's own zero."""
    mask = exists[:, None] & (channel < OUT)[None, :]
    return -tl.load(border_ptr + (border[:, None] + channel[None, :]), mask, 0)


@triton.jit
def _finish(
    acc,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    place,
    channel,
    exists,
    OUT: tl.constexpr,
):
    """Scale, add bias and residual, round once; `place` is where a pixel's channels begin."""
    held = channel < OUT
    mask = exists[:, None] & held[None, :]
    y = acc.to(tl.float32) * tl.load(scale_ptr + channel, held, 0.0)[None, :]
    y += tl.load(bias_ptr + channel, held, 0.0).to(tl.float32)[None, :]
    at = place[:, None] + channel[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + at, cast(y, out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _conv_int8_kernel(
    x_ptr,
    history_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    border_ptr,
    residual_ptr,
    out_ptr,
    frames,
    height,
    width,
    stride_xb,
    stride_xt,
    stride_hb,
    stride_ht,
    stride_rb,
    stride_rt,
    stride_ob,
    stride_ot,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NARROW_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """3x3x3 taps over history and x; a program's pixels are of one frame. weight [OUT, 27, IN]."""
    CHUNKS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (OUT + BLOCK_N + NARROW_N - 1) // (BLOCK_N + NARROW_N)
    SPAN: tl.constexpr = 27 * IN  # of the weights of one output channel
    TURNS: tl.constexpr = CHUNKS // UNROLL
    WHOLE: tl.constexpr = IN % BLOCK_K == 0 and OUT % (BLOCK_N + NARROW_N) == 0

    frame = tl.program_id(1)
    sample, time = (frame // frames).to(tl.int64), (frame % frames).to(tl.int64)
    pixel = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = pixel // width, pixel % width
    top, left = row - 1, column - 1  # of the first tap
    inside = taps_inside(row < height, top, left, height, width, 3)
    k = tl.arange(0, BLOCK_K)
    corner = ((top * width + left) * IN)[:, None] + k[None, :]  # 32 bits do within a frame
    x_ptr += sample * stride_xb
    missing = 0  # frames before x that are not there
    if history_ptr is None:
        missing = tl.maximum(2 - time.to(tl.int32), 0)
    else:
        history_ptr += sample * stride_hb

    channel = tl.program_id(0) % TILES * (BLOCK_N + NARROW_N) + tl.arange(0, BLOCK_N)
    columns = channel[None, :] * SPAN + k[:, None]
    side_h = tl.where(row == 0, 1, 0) + tl.where(row == height - 1, 2, 0)
    side_w = tl.where(column == 0, 1, 0) + tl.where(column == width - 1, 2, 0)
    border = (missing * 16 + side_h * 4 + side_w) * OUT
    acc = _begin(border_ptr, border, row < height, channel, OUT)
    if NARROW_N > 0:
        narrow = tl.program_id(0) % TILES * (BLOCK_N + NARROW_N) + BLOCK_N + tl.arange(0, NARROW_N)
        narrow_columns = narrow[None, :] * SPAN + k[:, None]
        narrow_acc = _begin(border_ptr, border, row < height, narrow, OUT)

    for turn in range(missing * 9 * TURNS, 27 * TURNS):
        tap, done = turn // TURNS, turn % TURNS * UNROLL * BLOCK_K
        dt, spot = tap // 9, tap % 9
        seen = time + dt  # frame, counted from the first of the history
        source = x_ptr + (seen - 2) * stride_xt
        if history_ptr is not None:
            source = tl.where(seen < 2, history_ptr + seen * stride_ht, source)
        source += (spot // 3 * width + spot % 3) * IN + done
        taps_ptr = weight_ptr + tap * IN + done
        seen_by = ((inside >> spot) & 1 != 0)[:, None]
        for i in tl.static_range(UNROLL):
            past = i * BLOCK_K
            there = k < IN - done - past
            mask = seen_by if WHOLE else seen_by & there[None, :]
            pixels = tl.load(source + past + corner, mask, 0)  # [M, K]
            held = None if WHOLE else there[:, None] & (channel < OUT)[None, :]
            acc = multiply(pixels, taps_ptr + past + columns, held, acc, tl.int32)
            if NARROW_N > 0:
                held = None if WHOLE else there[:, None] & (narrow < OUT)[None, :]
                narrow_acc = multiply(
                    pixels, taps_ptr + past + narrow_columns, held, narrow_acc, tl.int32
                )

    place = pixel * OUT  # 32 bits do within a frame
    out_ptr += sample * stride_ob + time * stride_ot
    if residual_ptr is not None:
        residual_ptr += sample * stride_rb + time * stride_rt
    exists = row < height
    _finish(acc, scale_ptr, bias_ptr, residual_ptr, out_ptr, place, channel, exists, OUT)
    if NARROW_N > 0:
        _finish(narrow_acc, scale_ptr, bias_ptr, residual_ptr, out_ptr, place, narrow, exists, OUT)


def causal_conv3d_int8(
    x: Tensor,
    weight: QuantizedConv,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `reference_vae.causal_conv3d_int8`; no bit depends on where a clip is cut.

    Values of the weight that lie channels last are read as they are, others copied at every call.
    """
    b, _, t, h, w = x.shape
    assert weight.values.shape[2:] == (3, 3, 3), f"{weight.values.shape=}"
    q = frames_dense(channel_norm_silu_quantize(x, gamma, weight.step, weight.zero))
    y = out
    if out is None or not is_frames_dense(out):
        y = empty_frames(x, (b, len(weight.values), t, h, w))
    history = None if history is None else frames_dense(history)
    _convolve(q, weight, bias, history, residual, y)
    kept = tail(history, q, 2, weight.zero.view(-1, 1, 1, 1))
    return (y if out is None or y is out else out.copy_(y)), kept


def _convolve(
    q: Tensor,
    weight: QuantizedConv,
    bias: Tensor,
    history: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    b, o, t, h, w = out.shape
    check_frames(q, out)
    tile = pick(f"conv_int8/{q.shape[1]}-{o}", _tiles(q, o, h * w), q)
    residual = None if residual is None else frames_dense(residual)
    launch(
        _conv_int8_kernel,
        (cdiv(h * w, tile.pixels) * cdiv(o, tile.wide + tile.narrow), b * t),
        q,
        history,
        weight.values.contiguous(memory_format=torch.channels_last_3d),
        weight.scale,
        bias,
        weight.border.contiguous(),
        residual,
        out,
        t,
        h,
        w,
        *outer_strides(q),
        *outer_strides(history),
        *outer_strides(residual),
        *outer_strides(out),
        mma=(Mma("s8", "s32"),),
        IN=q.shape[1],
        OUT=o,
        BLOCK_M=tile.pixels,
        BLOCK_N=tile.wide,
        NARROW_N=tile.narrow,
        BLOCK_K=tile.step,
        UNROLL=tile.unroll,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, not {target.dtype}"
    return None
