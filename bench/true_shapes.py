"""True-shaped transformers with random weights on disk, quickly: what benches on a GPU load.

Every block has the same values, so that a 14B is written as fast as the disk takes it.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wanrt.config import WanSpec, find_variant
from wanrt.errors import UsageError
from wanrt.weights.layouts import Part, write_model
from wanrt.weights.names import Kind

_BLOCK = re.compile(r"blocks\.\d+")


def text_model(variant: str, blocks: int | None) -> WanSpec:
    """A released model that text alone conditions; of its blocks the first so many, or all."""
    spec = find_variant(variant)
    if spec.dit.image_dim or spec.dit.vace_layers or spec.dit.in_dim != spec.dit.out_dim:
        raise UsageError(f"model {variant!r} needs pictures; choose one of text to video")
    if blocks is not None:
        if not 0 < blocks <= spec.dit.num_layers:
            raise UsageError(f"{blocks} blocks asked; {variant} has {spec.dit.num_layers}")
        spec = replace(spec, dit=replace(spec.dit, num_layers=blocks))
    return replace(spec, boundary=None)  # experts are alike


def write(spec: WanSpec, folder: Path, components: tuple[Kind, ...] = ("dit",)) -> None:
    """In the Diffusers layout, which diffusers reads too; matrices bf16. Peak: one block."""
    write_model(
        spec, "diffusers", folder, _repeated_values(), components=components, precision="bf16"
    )


def _repeated_values() -> Callable[[Part, str, tuple[int, ...], torch.dtype], Tensor]:
    generator = torch.Generator().manual_seed(0)
    known: dict[tuple[str, str], Tensor] = {}

    def values(part: Part, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = (part, _BLOCK.sub("blocks", name))
        if key not in known:
            known[key] = _values(name, shape, generator).to(dtype)
        return known[key]

    return values


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Products keep the size of their input; norms are near one, all else is small."""
    values = torch.empty(shape).normal_(generator=generator)
    if ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
        return values.mul_(0.1).add_(1)
    matrix = len(shape) > 1 and "modulation" not in name
    return values.mul_(values[0].numel() ** -0.5 if matrix else 0.1)
