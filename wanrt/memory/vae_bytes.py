"""Predicts what a VAE holds at its peak: a walk over the shapes of its layers, nothing is run.

Counted is every tensor alive beside the weights and what the caller gave and keeps: activations
(what ops take while they run, too) and the caches of the causal convolutions. The walk follows
`wanrt/models/vae_stages.py`; a test holds it against the storage that the modules allocate.
"""

from typing import NamedTuple

from wanrt.config import VaeSpec, VaeWork
from wanrt.memory.vae_byte_walk import Backend, ByteWalk, Held
from wanrt.memory.vae_costs import INT8_STAGE
from wanrt.memory.vae_op_bytes import Clip, Conv
from wanrt.vae_shapes import (
    Band,
    Stage,
    decoder_bands,
    decoder_stages,
    default_chunk,
    encoder_bands,
    encoder_stages,
)


class VaeBytes(NamedTuple):
    """Peak bytes: of activations, and of the caches held at once, by where these are."""

    activations: int
    caches: int  # on the device
    host: int = 0  # in host memory


def decode_bytes(
    spec: VaeSpec,
    height: int,
    width: int,
    element_size: int,
    work: VaeWork,
    backend: Backend | None = None,
    int8: bool = False,
) -> VaeBytes:
    """Of decode_chunks for `height x width` pixels.

    backend: whose ops run; None: triton's for 16 bits an element, else torch's. int8: convolutions
    are, as `quant/policy.py` has it, and what they remember.
    """
    h, w = height // spec.spatial_stride, width // spec.spatial_stride
    frames = work.chunk or default_chunk(spec, h, w)
    stages = decoder_stages(spec)
    walk = ByteWalk(element_size, work, backend, h, INT8_STAGE if int8 else None)
    latents = walk.hold(Clip(spec.z_dim, frames, h, w))
    walk.spike(4 * latents.clip.size * 4)
    x = walk.middle(walk.conv(latents, Conv(stages[0].widths[0])))
    walk.free(latents)
    caches = [walk.take_caches()]
    pixels = 3 * height * width * frames * spec.temporal_stride * 4
    for band in decoder_bands(spec, h, work.band):
        _decode_band(walk, x, spec, band)
        caches.append(walk.take_caches())
        if work.order == "time":
            rows = band.result.stop - band.result.start + 2  # a view of what met the inner edges
            walk.live += pixels * rows // band.result.height
    walk.spike(2 * pixels if work.band else 0)
    return _total(walk, caches)


def encode_bytes(
    spec: VaeSpec,
    height: int,
    width: int,
    element_size: int,
    work: VaeWork,
    backend: Backend | None = None,
    still: bool = True,
) -> VaeBytes:
    """Of encode_chunks for `height x width` pixels; see decode_bytes.

    still: as WanVAE.encode has it; then every band keeps what enters its second stage.
    """
    h, w = height // spec.spatial_stride, width // spec.spatial_stride
    frames = work.chunk or default_chunk(spec, h, w)
    stages = encoder_stages(spec)
    walk = ByteWalk(element_size, work, backend, h)
    dense = Clip(stages[-1].out, frames, h, w)
    side = spec.patch
    pixels = Clip(3 * side**2, frames * spec.temporal_stride, height // side, width // side)
    caches = _encode_bands(walk, pixels, spec, encoder_bands(spec, h, work.band), still)
    walk.spike((3 if work.band else 1) * dense.size * element_size)
    walk.start(h)
    walk.conv(walk.middle(walk.hold(dense)), Conv(2 * spec.z_dim, norm=True))
    caches.append(walk.take_caches())
    return _total(walk, caches)


def _encode_bands(
    walk: ByteWalk, pixels: Clip, spec: VaeSpec, bands: tuple[Band, ...], still: bool
) -> list[int]:
    """Every band in turn; leaves live what they keep. Returns their caches."""
    caches, in_time = [], walk.work.order == "time"
    kept = [_second_stage(pixels, spec, band) * walk.size for band in bands]
    total = sum(kept) if still and in_time else 0
    results = []
    for band, own in zip(bands, kept, strict=True):
        others = max(0, total - own)
        walk.live += others
        results.append(_encode_band(walk, pixels, spec, band))
        walk.live -= others
        caches.append(walk.take_caches())
        if not in_time:
            walk.free(results.pop())
    for y in results:
        walk.free(y)
    walk.live += total
    return caches


def _decode_band(walk: ByteWalk, middle: Held, spec: VaeSpec, band: Band) -> None:
    """From what the mid-block gave, which stays, to pixels, which the caller counts."""
    stages = decoder_stages(spec)
    doubling = [i for i, stage in enumerate(stages) if stage.mode == "upsample3d"]
    free = doubling[-1] + 1 if doubling else 0
    walk.start(band.given.height)
    x = walk.narrow(Held(middle.clip, 0), band.given)
    for stage in stages[:free]:
        x = walk.stage(x, stage, band, spec.residual)
    scale = 2 ** sum(stage.mode is not None for stage in stages[free:])
    height, frames = band.result.stop - band.result.start, x.clip.frames
    pixels = Clip(3 * spec.patch**2, frames, height, x.clip.width * scale)
    given, earlier = Held(x.clip, 0), Held(pixels, 0)
    if walk.work.frames and walk.work.frames < frames:
        rows = band.result.grown(1)  # the head's results are views of these
        held = pixels._replace(rows=rows.stop - rows.start)
        earlier = walk.hold(held._replace(frames=frames - walk.work.frames))
        given, x = x, Held(x.clip._replace(frames=walk.work.frames), 0)
    for stage in stages[free:]:
        x = walk.stage(x, stage, band, spec.residual)
    walk.free(walk.conv(x, Conv(pixels.channels, norm=True)))
    for held in (x, given, earlier):
        walk.free(held)
    walk.spike(3 * pixels.size * 4)


def _encode_band(walk: ByteWalk, pixels: Clip, spec: VaeSpec, band: Band) -> Held:
    """From pixels to what enters the mid-block."""
    stages = encoder_stages(spec)
    held = walk.hold(pixels)
    walk.spike(2 * held.stored)
    walk.start(band.given.height)
    x = walk.narrow(held, band.given)
    whole = stages
    if walk.work.frames and walk.work.frames < pixels.frames:
        x, whole = _encode_in_pieces(walk, x, spec, band)
    else:
        x = _first_layer(walk, x, stages[0])
    for stage in whole:
        x = walk.stage(x, stage, band, spec.residual)
    walk.free(held)
    return x


def _first_layer(walk: ByteWalk, x: Held, stage: Stage) -> Held:
    return walk.narrow(walk.conv(x, Conv(stage.widths[0])), walk.rows.trimmed())


def _encode_in_pieces(
    walk: ByteWalk, x: Held, spec: VaeSpec, band: Band
) -> tuple[Held, tuple[Stage, ...]]:
    """The layers before the first halving of the frame rate; gives the stages that are left.

    Groups of layers that end where the size changes; each gathers its result.
    """
    stages = encoder_stages(spec)
    for i, stage in enumerate(stages):
        halves = stage.mode == "downsample3d"
        widths = stage.widths[:1] if halves and spec.residual else stage.widths
        part = stage._replace(widths=widths, mode=None if halves else stage.mode)
        if i == 0 or part.blocks:
            x = _piece(walk, x, part, band, spec.residual, first=i == 0)
        if halves:
            rest = stage if spec.residual else stage._replace(widths=stage.widths[-1:])
            return x, (rest, *stages[i + 1 :])
    return x, ()


def _piece(walk: ByteWalk, x: Held, stage: Stage, band: Band, residual: bool, first: bool) -> Held:
    """One piece beside what the pieces give together. Frees x, unless it is the pixels."""
    rows = walk.rows.trimmed() if first else walk.rows
    width, channels = x.clip.width, stage.widths[-1]
    for _ in range(2 * len(stage.blocks)):
        rows = rows.trimmed()
    if stage.mode is not None:
        rows, width, channels = band.levels[walk.level + 1], width // 2, stage.out
    result = walk.hold(Clip(channels, x.clip.frames, rows.stop - rows.start, width))
    y = Held(x.clip._replace(frames=walk.work.frames), 0)
    if first:
        y = _first_layer(walk, y, stage)
    if stage.blocks:
        y = walk.stage(y, stage, band, residual)
    walk.free(y)
    if not first:
        walk.free(x)
    return result


def _second_stage(pixels: Clip, spec: VaeSpec, band: Band) -> int:
    """Elements of what enters it."""
    rows, stage = band.levels[1], encoder_stages(spec)[0]
    return Clip(stage.out, pixels.frames, rows.stop - rows.start, pixels.width // 2).size


def _total(walk: ByteWalk, caches: list[int]) -> VaeBytes:
    """With bands as the outer loop, one part's caches are held, else those of all."""
    held = max(caches) if walk.work.order == "bands" else sum(caches)
    return VaeBytes(walk.peak, *((0, held) if walk.work.host else (held, 0)))
