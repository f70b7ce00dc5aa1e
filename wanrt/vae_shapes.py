"""The stages of the Wan VAEs as shapes, and the rows that a horizontal band needs of each.

A decoder is local after its mid-block and an encoder before it: an output row sees a few input rows
only. A band that holds those, its halo, gives what the whole frame gives.
"""

from typing import NamedTuple

from wanrt.config import VaeSpec

# Fewer, longer chunks save the work done once per chunk, until activations outgrow the caches.
_CHUNK_BYTES = 64 << 20  # of fp32 activations at full resolution


class Stage(NamedTuple):
    """Residual blocks from width to width, then perhaps a resampling to `out` channels."""

    widths: tuple[int, ...]
    mode: str | None  # upsample2d, upsample3d, downsample2d, downsample3d
    out: int

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Input and output channels of each residual block."""
        return list(zip(self.widths, self.widths[1:], strict=False))

    @property
    def halo(self) -> int:
        """Rows beyond its own that an output row of the residual blocks sees: two convolutions."""
        return 2 * len(self.blocks)


def encoder_stages(spec: VaeSpec) -> tuple[Stage, ...]:
    """From full resolution down."""
    dims = [spec.base_dim * m for m in (1, *spec.dim_mult)]
    stages = []
    for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:], strict=False)):
        mode = None
        if i < len(spec.dim_mult) - 1:
            mode = f"downsample{3 if spec.temporal_downsample[i] else 2}d"
        stages.append(Stage((in_dim, *[out_dim] * spec.num_res_blocks), mode, out_dim))
    return tuple(stages)


def decoder_stages(spec: VaeSpec) -> tuple[Stage, ...]:
    """From latent resolution up. In Wan 2.1 an upsampling halves the channels as well."""
    dims = [spec.decoder_base_dim * m for m in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
    stages = []
    for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:], strict=False)):
        mode, out = None, out_dim
        if i < len(spec.dim_mult) - 1:
            mode = f"upsample{3 if spec.temporal_downsample[-1 - i] else 2}d"
            out = out_dim if spec.residual else out_dim // 2
        first = stages[-1].out if stages else in_dim
        stages.append(Stage((first, *[out_dim] * (spec.num_res_blocks + 1)), mode, out))
    return tuple(stages)


def default_chunk(spec: VaeSpec, h: int, w: int) -> int:
    """Latent frames `[z, h, w]` to code at once: as many as keep an activation small."""
    pixels = h * w * (spec.spatial_stride // spec.patch) ** 2
    per_frame = spec.temporal_stride * pixels * spec.decoder_base_dim * 4
    return max(1, _CHUNK_BYTES // per_frame)


class Rows(NamedTuple):
    """Rows `[start, stop)` of a frame of `height` rows; inner is an edge inside the frame."""

    start: int
    stop: int
    height: int

    def grown(self, by: int) -> "Rows":
        """With `by` rows more at either side, as far as the frame goes."""
        return Rows(max(0, self.start - by), min(self.height, self.stop + by), self.height)

    def trimmed(self) -> "Rows":
        """Without the outermost row of each inner edge."""
        return Rows(
            self.start + (self.start > 0), self.stop - (self.stop < self.height), self.height
        )

    def doubled(self) -> "Rows":
        """The same rows of the frame at twice its height."""
        return Rows(*(2 * n for n in self))

    def halved(self) -> "Rows":
        """The rows of the frame at half its height that these lie on."""
        return Rows(self.start // 2, (self.stop + 1) // 2, self.height // 2)

    def before_halving(self) -> "Rows":
        """What a 3x3 convolution of stride 2, padded at the bottom alone, reads for these."""
        return Rows(2 * self.start, min(2 * self.stop + 1, 2 * self.height), 2 * self.height)

    def slice_of(self, held: "Rows") -> slice:
        """Where these rows lie in a tensor of the rows `held`."""
        inside = held.start <= self.start <= self.stop <= held.stop
        assert inside and self.height == held.height, f"{self} of {held}"
        return slice(self.start - held.start, self.stop - held.start)


class Band(NamedTuple):
    """Rows that one band holds on its way through the local layers."""

    given: Rows  # of what enters the first layer
    levels: tuple[Rows, ...]  # of what enters each stage
    result: Rows


def decoder_bands(spec: VaeSpec, height: int, rows: int | None) -> tuple[Band, ...]:
    """Bands of `rows` latent rows (the last may be lower) for latents of `height` rows."""
    stages = decoder_stages(spec)
    bands = []
    for latent in _cut(height, rows):
        result = latent
        for stage in stages:
            result = result.doubled() if stage.mode else result
        needed = result.grown(1)  # the head's convolution
        levels = []
        for stage in reversed(stages):
            needed = needed.grown(1).halved() if stage.mode else needed
            needed = needed.grown(stage.halo)
            levels.append(needed)
        bands.append(Band(needed, tuple(reversed(levels)), result))
    return tuple(bands)


def encoder_bands(spec: VaeSpec, height: int, rows: int | None) -> tuple[Band, ...]:
    """Bands of `rows` latent rows (the last may be lower) for latents of `height` rows.

    What is given counts rows after Wan 2.2's patches, half as many as pixels have.
    """
    bands = []
    for result in _cut(height, rows):
        needed, levels = result, []
        for stage in reversed(encoder_stages(spec)):
            needed = needed.before_halving() if stage.mode else needed
            needed = needed.grown(stage.halo)
            levels.append(needed)
        bands.append(Band(needed.grown(1), tuple(reversed(levels)), result))
    return tuple(bands)


def _cut(height: int, rows: int | None) -> list[Rows]:
    rows = rows or height
    return [Rows(a, min(a + rows, height), height) for a in range(0, height, rows)]
