"""True-shaped checkpoints of random values, to measure memory and speed without a download."""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wanrt.config import WanSpec, find_variant
from wanrt.weights.layouts import Layout, Part, Precision, write_model
from wanrt.weights.names import Kind
from wanrt.weights.writer import MAX_SHARD

STD = 0.02  # keeps every network finite in fp16
_NEAR_ONE = re.compile(r"norm\w*\.weight$|gamma$|img_emb\.proj\.[04]\.weight$")


def write_random(
    variant: str,
    layout: Layout,
    out: str | Path,
    *,
    components: Sequence[Kind] = ("dit", "umt5", "vae", "clip"),
    precision: Precision | None = None,
    seed: int = 0,
    spec: WanSpec | None = None,
    max_shard: int = MAX_SHARD,
) -> None:
    """variant: an id of config.MODELS, `wan2.x-` may be left out; `spec` overrides its shapes.

    A tensor's values depend on the seed, its part, its original name and its dtype, so that every
    layout holds the same model. Peak: one tensor. Raises UsageError, OutputError.
    """
    model = spec or find_variant(variant)
    write_model(
        model,
        layout,
        Path(out),
        lambda *tensor: random_values(seed, *tensor),
        components=components,
        precision=precision,
        max_shard=max_shard,
    )


def random_values(
    seed: int, part: Part, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Small normal numbers; around one for the weights of norms."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{part}/{name}".encode()))
    values = torch.empty(shape, dtype=dtype).normal_(0.0, STD, generator=generator)
    return values.add_(1.0) if _NEAR_ONE.search(name) else values
