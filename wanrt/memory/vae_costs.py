"""Weights and multiplications of a VAE, counted over the shapes of its stages."""

from collections.abc import Iterator

from wanrt.config import VaeSpec
from wanrt.memory.vae_formats import VaeFormat
from wanrt.vae_shapes import Stage, decoder_stages, encoder_stages

_CUBE, _SQUARE, _LINE = 27, 9, 3  # taps of 3x3x3, of 3x3 in a frame, of 3 in time


INT8_STAGE = 2  # quant/policy.py: from here on, the decoder's residual blocks may be int8
_BORDER = 3 * 4 * 4 * 4  # bytes for each output of an int8 convolution: QuantizedConv.border


def vae_weight_bytes(spec: VaeSpec, form: VaeFormat) -> int:
    """Of encoder and decoder together; int8 convolutions have formats of their inputs beside."""
    total = vae_weights(spec) * form.element
    if not form.int8:
        return total
    for inputs, outputs in _int8_convs(spec):
        total -= inputs * outputs * _CUBE * (form.element - 1)
        total += outputs * (4 + _BORDER) + inputs * (4 + 1)  # scale and border; step and zero
    return total


def _int8_convs(spec: VaeSpec) -> Iterator[tuple[int, int]]:
    """Channels in and out."""
    for stage in decoder_stages(spec)[INT8_STAGE:]:
        for inputs, outputs in stage.blocks:
            yield inputs, outputs
            yield outputs, outputs


def vae_weights(spec: VaeSpec) -> int:
    """Numbers in encoder and decoder together."""
    z, pixels = spec.z_dim, 3 * spec.patch**2
    ends = _conv(2 * z, 2 * z, 1) + _conv(z, z, 1)
    encoder, decoder = encoder_stages(spec), decoder_stages(spec)
    for stages, given, made in ((encoder, pixels, 2 * z), (decoder, z, pixels)):
        ends += _conv(given, stages[0].widths[0], _CUBE)
        ends += stages[-1].out + _conv(stages[-1].out, made, _CUBE)
    middles = _middle(encoder[-1].out) + _middle(decoder[0].widths[0])
    return ends + middles + sum(_stage(stage) for stage in (*encoder, *decoder))


def decode_operations(spec: VaeSpec, num_frames: int, height: int, width: int) -> float:
    """Additions and multiplications of the convolutions that decode a video, of pixels."""
    stages = decoder_stages(spec)
    frames = (num_frames - 1) / spec.temporal_stride + 1
    pixels = frames * height * width / spec.spatial_stride**2
    total = 2.0 * pixels * _middle(stages[0].widths[0])
    for stage in stages:
        blocks = sum(_residual(a, b) for a, b in stage.blocks)
        total += 2.0 * pixels * blocks
        if stage.mode:
            pixels *= 4 if stage.mode.endswith("2d") else 8
            total += 2.0 * pixels * _SQUARE * stage.widths[-1] * stage.out
    return total


def _conv(inputs: int, outputs: int, taps: int) -> int:
    return inputs * outputs * taps + outputs


def _residual(a: int, b: int) -> int:
    shortcut = _conv(a, b, 1) if a != b else 0
    return a + _conv(a, b, _CUBE) + b + _conv(b, b, _CUBE) + shortcut


def _middle(dim: int) -> int:
    attention = dim + _conv(dim, 3 * dim, 1) + _conv(dim, dim, 1)
    return 2 * _residual(dim, dim) + attention


def _stage(stage: Stage) -> int:
    total = sum(_residual(a, b) for a, b in stage.blocks)
    if stage.mode is None:
        return total
    dim = stage.widths[-1]
    total += _conv(dim, stage.out, _SQUARE)
    if stage.mode.endswith("3d"):
        total += _conv(dim, 2 * dim if stage.mode.startswith("up") else dim, _LINE)
    return total
