"""The text encoder and the CLIP tower as graphs: a block each, and what stands around the blocks.

umt5.embed   token ids -> x         umt5.block   x, bucket of each distance, pads -> x
umt5.norm    x -> features          clip.embed   pixels -> x     clip.block   x -> x
"""

from collections.abc import Iterator

import torch

from wanrt.config import ClipSpec, Umt5Spec
from wanrt.export.part import Axis, Part, Value, cast
from wanrt.models.clip import ClipVision
from wanrt.models.umt5 import Umt5Encoder

TOKENS = Axis("n", 1, 512, 512, trace=24)


def empty_umt5(spec: Umt5Spec, dtype: torch.dtype) -> Umt5Encoder:
    """On the meta device."""
    with torch.device("meta"):
        return cast(Umt5Encoder(spec), dtype)


def empty_clip(spec: ClipSpec, dtype: torch.dtype) -> ClipVision:
    """On the meta device."""
    with torch.device("meta"):
        return cast(ClipVision(spec), dtype)


def umt5_parts(encoder: Umt5Encoder, dtype: torch.dtype) -> Iterator[Part]:
    """Every graph of a text encoder; blocks are alike."""
    x = Value("x", dtype, (1, TOKENS, encoder.spec.dim))
    ids = Value("ids", torch.int64, (1, TOKENS))
    buckets = Value("buckets", torch.int64, (TOKENS, TOKENS))
    pad = Value("pad", torch.bool, (1, 1, 1, TOKENS))
    blocks = tuple(f"blocks.{i}" for i in range(len(encoder.blocks)))
    embed, block, norm = encoder.token_embedding, encoder.blocks[0], encoder.norm
    yield Part("umt5.embed", embed, _call, (ids,), ("out",), ("token_embedding",))
    yield Part("umt5.block", block, _call, (x, buckets, pad), ("out",), blocks)
    yield Part("umt5.norm", norm, _call, (x,), ("out",), ("norm",))


def clip_parts(clip: ClipVision, dtype: torch.dtype) -> Iterator[Part]:
    """Every graph of a CLIP tower; blocks are alike."""
    spec = clip.spec
    tokens = 1 + (spec.image_size // spec.patch_size) ** 2
    pixels = Value("pixels", dtype, (1, 3, spec.image_size, spec.image_size))
    x = Value("x", dtype, (1, tokens, spec.dim))
    blocks = tuple(f"transformer.{i}" for i in range(len(clip.transformer)))
    yield Part("clip.embed", clip, lambda module, y: module.embed(y), (pixels,), ("out",), ("",))
    yield Part("clip.block", clip.transformer[0], _call, (x,), ("out",), blocks)


def _call(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return module(*inputs)
