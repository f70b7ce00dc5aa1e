"""The VAE's convolutions in Triton: implicit matrix products over pixels that lie channels last.

What each computes is said in `reference_vae.py`. A row of the product is an output
pixel, a column an output channel; what is summed over is taps times input channels. The pixels that
a tap sees are read where they lie: earlier frames from the history, zeros by masks, doubled images
not at all. So nothing is concatenated, padded or unfolded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from wanrt.kernels.arithmetic import cast
from wanrt.kernels.channel_norm import channel_norm_silu
from wanrt.kernels.launch import INTERPRETER, Mma, arch_of, launch
from wanrt.kernels.layout import (
    empty_frames,
    frames_dense,
    is_frames_dense,
    outer_strides,
    tail,
)
from wanrt.kernels.taps import multiply, taps_inside
from wanrt.kernels.target import Target
from wanrt.kernels.tile import PIXELS, WARP_PIXELS, Tile, check_frames, turns, widths
from wanrt.kernels.winners import pick

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
FP16_TERMS = 128  # that are added up in fp16, before fp32 takes over
ENOUGH = 48  # channels of a turn, above which more pixels are worth more than a longer turn


def _tiles(x: Tensor, out_channels: int, pixels: int, in_fp16: bool) -> tuple[Tile, ...]:
    """The widths that waste least. Steps of 32 divide 96.

    NOTE: the first is chosen by what little it asks of the instructions around products, of shared
    memory and of L2 (docs/kernels.md); the others compile as well. Not yet timed.
    """
    arch, channels = arch_of(x), x.shape[1]
    wide, narrow = widths(out_channels)
    if arch == INTERPRETER:
        rows, step = (triton.next_power_of_2(n) for n in (pixels, channels))
        step = max(16, min(64, step))
        largest = Tile(max(16, min(1024, rows)), wide, narrow, step, 1, 4, 1)
        unroll = turns(largest, channels, x.element_size(), arch, FP16_TERMS)[-1]
        return largest, largest._replace(pixels=16), largest._replace(unroll=unroll)
    step = 64 if arch == 90 and channels % 64 == 0 else 32
    step = min(step, max(16, triton.next_power_of_2(channels)))
    plain = Tile(128, wide, narrow, step, 1, 8 if wide + narrow > 64 else 4, 3 if step == 16 else 4)
    many = plain if arch == 90 else plain._replace(pixels=PIXELS, warps=PIXELS // WARP_PIXELS)
    many = many._replace(step=16) if arch == 120 else many  # of 32, 128 channels would spill
    turned = [
        base._replace(step=size, unroll=unroll, stages=3)
        for base in ((many, plain) if in_fp16 else (many,))
        for size in (step, 16)
        for unroll in turns(base._replace(step=size), channels, x.element_size(), arch, FP16_TERMS)
    ]
    finer = 1 if arch == 90 else -1  # short steps take fewer registers
    long = max(turned, key=lambda t: (min(t.turn, ENOUGH), t.pixels, t.turn, finer * t.step))
    first = (many, long) if arch == 90 and not in_fp16 else (long, many)
    small = plain._replace(pixels=64, warps=4)
    return tuple(dict.fromkeys((*first, plain, plain._replace(stages=plain.stages - 1), small)))


@triton.jit
def _finish(acc, bias_ptr, residual_ptr, out_ptr, place, channel, exists, OUT: tl.constexpr):
    """Add bias and residual, round once, store; `place` is where a pixel's channels begin."""
    mask = exists[:, None] & (channel < OUT)[None, :]
    acc += tl.load(bias_ptr + channel, channel < OUT, 0.0).to(tl.float32)[None, :]
    at = place[:, None] + channel[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["frames", "height", "width", "in_height", "in_width"])
def _conv_kernel(
    x_ptr,
    history_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    frames,
    height,
    width,
    in_height,
    in_width,
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
    TAPS_T: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    UP: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NARROW_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """TAPS_T x TAPS x TAPS taps over history and x; a program's pixels are of one frame.

    `weight` [UP^2, OUT, taps, IN]: with UP = 2, each place of an output pixel over its input pixel
    has taps of its own; program axis 1 counts the places, axis 2 the frames of all samples.
    """
    CHUNKS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (OUT + BLOCK_N + NARROW_N - 1) // (BLOCK_N + NARROW_N)
    PAST: tl.constexpr = TAPS_T - STRIDE_T
    PLANE: tl.constexpr = TAPS * TAPS
    SPAN: tl.constexpr = TAPS_T * PLANE * IN  # of the weights of one output channel
    WHOLE: tl.constexpr = IN % BLOCK_K == 0 and OUT % (BLOCK_N + NARROW_N) == 0
    TURNS: tl.constexpr = CHUNKS // UNROLL

    place, frame = tl.program_id(1), tl.program_id(2)
    sample, time = (frame // frames).to(tl.int64), (frame % frames).to(tl.int64)
    pixel = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = pixel // width, pixel % width
    top = row * STRIDE - PAD + place // UP  # of the first tap
    left = column * STRIDE - PAD + place % UP
    inside = taps_inside(row < height, top, left, in_height, in_width, TAPS)
    k = tl.arange(0, BLOCK_K)
    corner = ((top * in_width + left) * IN)[:, None] + k[None, :]  # 32 bits do within a frame
    x_ptr += sample * stride_xb
    if history_ptr is not None:
        history_ptr += sample * stride_hb
    weight_ptr += place.to(tl.int64) * OUT * SPAN

    channel = tl.program_id(0) % TILES * (BLOCK_N + NARROW_N) + tl.arange(0, BLOCK_N)
    columns = channel[None, :] * SPAN + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NARROW_N > 0:
        narrow = tl.program_id(0) % TILES * (BLOCK_N + NARROW_N) + BLOCK_N + tl.arange(0, NARROW_N)
        narrow_columns = narrow[None, :] * SPAN + k[:, None]
        narrow_acc = tl.zeros((BLOCK_M, NARROW_N), tl.float32)

    first = 0
    if history_ptr is None:  # there is nothing before x, so the taps that would see it are left out
        first = tl.maximum(PAST - STRIDE_T * time.to(tl.int32), 0) * PLANE * TURNS
    for turn in range(first, TAPS_T * PLANE * TURNS):
        tap, done = turn // TURNS, turn % TURNS * UNROLL * BLOCK_K
        dt, spot = tap // PLANE, tap % PLANE
        seen = time * STRIDE_T + dt  # frame, counted from the first of the history
        source = x_ptr + (seen - PAST) * stride_xt
        if history_ptr is not None:
            source = tl.where(seen < PAST, history_ptr + seen * stride_ht, source)
        source += (spot // TAPS * in_width + spot % TAPS) * IN + done
        taps_ptr = weight_ptr + tap * IN + done
        seen_by = ((inside >> spot) & 1 != 0)[:, None]
        part = acc if ACCUMULATOR == tl.float32 else tl.zeros(acc.shape, ACCUMULATOR)
        if NARROW_N > 0:
            narrow_part = narrow_acc
            if ACCUMULATOR != tl.float32:
                narrow_part = tl.zeros(narrow_acc.shape, ACCUMULATOR)
        for i in tl.static_range(UNROLL):
            past = i * BLOCK_K
            there = k < IN - done - past
            mask = seen_by if WHOLE else seen_by & there[None, :]
            pixels = tl.load(source + past + corner, mask, 0.0)  # [M, K]
            held = None if WHOLE else there[:, None] & (channel < OUT)[None, :]
            part = multiply(pixels, taps_ptr + past + columns, held, part, ACCUMULATOR)
            if NARROW_N > 0:
                held = None if WHOLE else there[:, None] & (narrow < OUT)[None, :]
                narrow_part = multiply(
                    pixels, taps_ptr + past + narrow_columns, held, narrow_part, ACCUMULATOR
                )
        acc = part if ACCUMULATOR == tl.float32 else acc + part.to(tl.float32)
        if NARROW_N > 0:
            narrow_acc = (
                narrow_part
                if ACCUMULATOR == tl.float32
                else narrow_acc + narrow_part.to(tl.float32)
            )

    target = ((row * UP + place // UP) * (width * UP) + column * UP + place % UP) * OUT
    out_ptr += sample * stride_ob + time * stride_ot
    if residual_ptr is not None:
        residual_ptr += sample * stride_rb + time * stride_rt
    _finish(acc, bias_ptr, residual_ptr, out_ptr, target, channel, row < height, OUT)
    if NARROW_N > 0:
        _finish(narrow_acc, bias_ptr, residual_ptr, out_ptr, target, narrow, row < height, OUT)


@triton.jit
def _fold_kernel(weight_ptr, out_ptr, count, IN: tl.constexpr, BLOCK: tl.constexpr):
    """3x3 taps over doubled pixels -> 2x2 taps over the pixels, for one of 2x2 places.

    `weight` [O, 3, 3, IN] -> `out` [2, 2, O, 2, 2, IN]; program axis 1 counts places, then taps.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # over O and IN
    exists = index < count
    channel, place, tap = index % IN, tl.program_id(1) // 4, tl.program_id(1) % 4
    i, j, a, b = place // 2, place % 2, tap // 2, tap % 2
    source = weight_ptr + index // IN * (9 * IN) + channel
    total = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            seen = ((r > i) == (a > 0)) & ((s > j) == (b > 0))
            total += tl.load(source + (3 * r + s) * IN, exists & seen, 0.0).to(tl.float32)
    target = out_ptr + place.to(tl.int64) * (4 * count) + index // IN * (4 * IN) + tap * IN
    tl.store(target + channel, cast(total, out_ptr.dtype.element_ty), exists)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    out: Tensor | None = None,
    accumulator: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """See `reference_vae.causal_conv3d`; no bit depends on where a clip is cut here either.

    A weight that lies channels last is read as it is; any other is copied so, at every call.
    """
    b, _, t, h, w = x.shape
    taps_t = weight.shape[2]
    x = frames_dense(x if gamma is None else channel_norm_silu(x, gamma))
    history = None if history is None else frames_dense(history)
    y = out
    if out is None or gamma is None or not is_frames_dense(out):  # x may be what out overwrites
        y = empty_frames(x, (b, weight.shape[0], t // stride, h, w))
    _convolve(
        x,
        _packed(weight, x.dtype),
        bias,
        y,
        history=history,
        residual=residual,
        taps=weight.shape[2:4],
        strides=(stride, 1),
        pad=weight.shape[3] // 2,
        accumulator=accumulator,
    )
    kept = tail(history, x, taps_t - stride) if taps_t > 1 else None
    return (y if out is None or y is out else out.copy_(y)), kept


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_vae.upsample_conv2d`.

    An output pixel sees 2x2 input pixels, so the 3x3 taps fold into 2x2 for each of the four places
    of an output pixel over its input pixel: 4/9 of the multiplications.
    """
    x = frames_dense(x)
    b, c, t, h, w = x.shape
    o = weight.shape[0]
    folded = torch.empty((4, o, 4, c), dtype=x.dtype, device=x.device)
    block = 1024
    launch(
        _fold_kernel,
        (cdiv(o * c, block), 16),
        weight.contiguous(memory_format=torch.channels_last),
        folded,
        o * c,
        IN=c,
        BLOCK=block,
        num_warps=4,
    )
    y = empty_frames(x, (b, o, t, 2 * h, 2 * w))
    _convolve(x, folded, bias, y, taps=(1, 2), pad=1, up=2)
    return y


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_vae.downsample_conv2d`."""
    x = frames_dense(x)
    b, _, t, h, w = x.shape
    y = empty_frames(x, (b, weight.shape[0], t, h // 2, w // 2))
    _convolve(x, _packed(weight.unsqueeze(2), x.dtype), bias, y, taps=(1, 3), strides=(1, 2))
    return y


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    history: Tensor | None = None,
    residual: Tensor | None = None,
    taps: tuple[int, int] = (1, 1),
    strides: tuple[int, int] = (1, 1),
    pad: int = 0,
    up: int = 1,
    accumulator: torch.dtype = torch.float32,
) -> None:
    """`taps` and `strides` of time and of both sides of a frame; weight dense, channels last."""
    b, o, t, h, w = out.shape
    check_frames(x, out)
    h, w = h // up, w // up
    in_fp16 = accumulator == x.dtype == torch.float16
    key = f"conv/{taps[0]}x{taps[1]}x{taps[1]}/{x.shape[1]}-{o}{'/up' if up > 1 else ''}"
    key += "/fp16" if in_fp16 else ""
    tile = pick(key, _tiles(x, o, h * w, in_fp16), x)
    residual = None if residual is None else frames_dense(residual)
    launch(
        _conv_kernel,
        (
            cdiv(h * w, tile.pixels) * cdiv(o, tile.wide + tile.narrow),
            up * up,
            b * t,
        ),
        x,
        history,
        weight,
        bias,
        residual,
        out,
        t,
        h,
        w,
        *x.shape[3:],
        *outer_strides(x),
        *outer_strides(history),
        *outer_strides(residual),
        *outer_strides(out),
        mma=(Mma(DTYPES[x.dtype], "f16" if in_fp16 else "f32"),),
        IN=x.shape[1],
        OUT=o,
        TAPS_T=taps[0],
        TAPS=taps[1],
        STRIDE_T=strides[0],
        STRIDE=strides[1],
        PAD=pad,
        UP=up,
        ACCUMULATOR=tl.float16 if in_fp16 else tl.float32,
        BLOCK_M=tile.pixels,
        BLOCK_N=tile.wide,
        NARROW_N=tile.narrow,
        BLOCK_K=tile.step,
        UNROLL=tile.unroll,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, C, kt, kh, kw] as [O, kt, kh, kw, C] in memory: a copy unless it lies so already."""
    return weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def supports(op: str, target: Target) -> str | None:
    """None, or why these kernels decline."""
    if target.dtype not in DTYPES:
        return f"multiplies bf16 and fp16, not {target.dtype}"
    return None
