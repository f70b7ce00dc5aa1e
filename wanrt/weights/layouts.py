"""A whole model written as it is published: original, Diffusers or ComfyUI folders.

The inverse of loading, with the same tables of names. The values come from a function, so that this
file serves random weights and the export of trained ones alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wanrt.config import ClipSpec, VaeSpec, WanSpec
from wanrt.quant.formats import PLAIN
from wanrt.weights import configs
from wanrt.weights.load import skeleton
from wanrt.weights.names import Kind, Source, to_diffusers
from wanrt.weights.quantised import quantise
from wanrt.weights.specs import Spec
from wanrt.weights.writer import (
    MAX_SHARD,
    Piece,
    check_space,
    write_json,
    write_pickle,
    write_sharded,
)

Layout = Literal["original", "diffusers", "comfyui"]
Precision = Literal["fp32", "bf16", "fp16", "fp8", "fp8_scaled"]
Part = Literal["dit", "low_noise", "vae", "umt5", "clip"]
Values = Callable[
    [Part, str, tuple[int, ...], torch.dtype], Tensor
]  # original name, shape -> tensor

RELEASED: dict[Layout, dict[Kind, Precision]] = {
    "original": {"dit": "fp32", "vae": "fp32", "umt5": "bf16", "clip": "fp16"},
    "diffusers": {"dit": "fp32", "vae": "fp32", "umt5": "bf16", "clip": "fp32"},
    "comfyui": {"dit": "fp16", "vae": "fp16", "umt5": "fp16", "clip": "fp16"},
}
_KEPT_FP32 = ("dit", "patch_embedding.weight")  # in fp16 files
_CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


class PartFile(NamedTuple):
    """One part and where it goes; `path` ends in .pth or .safetensors."""

    part: Part
    kind: Kind
    spec: Spec
    path: Path
    prefix: str = ""
    config: configs.Json | None = None


def write_model(
    model: WanSpec,
    layout: Layout,
    out: Path,
    values: Values,
    *,
    components: Sequence[Kind] = ("dit", "umt5", "vae", "clip"),
    precision: Precision | None = None,
    max_shard: int = MAX_SHARD,
) -> None:
    """Write the components that the model has. Peak: one tensor.

    precision: one for all parts; None is what was released in this layout. fp8 means, as in
    ComfyUI's files, the matrices of transformer and text encoder; the rest is fp16.
    Raises OutputError.
    """
    files = [f for f in _FILES[layout](model, out, precision) if f.kind in components]
    planned = [(f, list(_pieces(f, layout, values, precision))) for f in files]
    sizes = {file.path: sum(piece.num_bytes for piece in pieces) for file, pieces in planned}
    scratch = max((size for path, size in sizes.items() if path.suffix == ".pth"), default=0)
    check_space(out, sum(sizes.values()) + scratch)
    for file, pieces in planned:
        if file.path.suffix == ".pth":
            write_pickle(file.path, pieces)
        else:
            write_sharded(file.path, pieces, max_shard)
        if file.config is not None:
            write_json(file.path.parent / "config.json", file.config)
    if layout == "diffusers":
        folders = [file.path.parent.name for file in files]
        write_json(out / "model_index.json", configs.model_index(model, folders))
        write_json(out / "scheduler" / "scheduler_config.json", configs.scheduler(model))


def _original(model: WanSpec, out: Path, precision: Precision | None) -> Iterator[PartFile]:
    config = configs.original_dit(model.dit, configs.model_type(model))
    name = "diffusion_pytorch_model.safetensors"
    if model.boundary is None:
        yield PartFile("dit", "dit", model.dit, out / name, config=config)
    else:
        yield PartFile("dit", "dit", model.dit, out / "high_noise_model" / name, config=config)
        yield PartFile("low_noise", "dit", model.dit, out / "low_noise_model" / name, config=config)
    yield PartFile("umt5", "umt5", model.umt5, out / "models_t5_umt5-xxl-enc-bf16.pth")
    version = "2.2" if model.vae.residual else "2.1"
    yield PartFile("vae", "vae", model.vae, out / f"Wan{version}_VAE.pth")
    if model.clip:
        yield PartFile("clip", "clip", model.clip, out / _CLIP_FILE, "visual.")


def _diffusers(model: WanSpec, out: Path, precision: Precision | None) -> Iterator[PartFile]:
    ours, theirs = "diffusion_pytorch_model.safetensors", "model.safetensors"
    rows = [("dit", "dit", model.dit, f"transformer/{ours}")]
    if model.boundary is not None:
        rows.append(("low_noise", "dit", model.dit, f"transformer_2/{ours}"))
    rows.append(("umt5", "umt5", model.umt5, f"text_encoder/{theirs}"))
    rows.append(("vae", "vae", model.vae, f"vae/{ours}"))
    if model.clip:
        rows.append(("clip", "clip", model.clip, f"image_encoder/{theirs}"))
    for part, kind, spec, path in rows:
        prefix = "vision_model." if kind == "clip" else ""
        yield PartFile(part, kind, spec, out / path, prefix, configs.diffusers(spec))


def _comfyui(model: WanSpec, out: Path, precision: Precision | None) -> Iterator[PartFile]:
    root, name = out / "split_files", model.id.replace("-", "_")
    ending = f"{precision or 'fp16'}.safetensors"
    prefix = "model.diffusion_model."
    for part, noise in {"dit": "_high_noise", "low_noise": "_low_noise"}.items():
        if model.boundary is None and part == "low_noise":
            continue
        file = f"{name}{noise if model.boundary is not None else ''}_{ending}"
        yield PartFile(part, "dit", model.dit, root / "diffusion_models" / file, prefix)
    yield PartFile("umt5", "umt5", model.umt5, root / "text_encoders" / f"umt5_xxl_{ending}")
    vae = "wan2.2_vae" if model.vae.residual else "wan_2.1_vae"
    yield PartFile("vae", "vae", model.vae, root / "vae" / f"{vae}.safetensors")
    if model.clip:
        path = root / "clip_vision" / "clip_vision_h.safetensors"
        yield PartFile("clip", "clip", model.clip, path, "vision_model.")


_FILES = {"original": _original, "diffusers": _diffusers, "comfyui": _comfyui}


def _pieces(
    file: PartFile, layout: Layout, values: Values, precision: Precision | None
) -> Iterator[Piece]:
    """Everything one file holds, under the names that the layout gives it."""
    precision = precision or RELEASED[layout][file.kind]
    fp8 = precision.startswith("fp8") and file.kind in ("dit", "umt5")
    dtype = PLAIN.get(precision, torch.float16)
    shapes = _shapes(file.kind, file.spec)
    sources = {name: Source((name,)) for name in shapes}
    if layout == "diffusers" or (layout == "comfyui" and file.kind in ("umt5", "clip")):
        vae = file.spec if isinstance(file.spec, VaeSpec) else None
        sources = to_diffusers(shapes, file.kind, vae)
    if precision == "fp8_scaled" and fp8:
        marker = torch.zeros(2, dtype=torch.float8_e4m3fn)
        yield Piece(f"{file.prefix}scaled_fp8", marker.dtype, (2,), lambda: marker)
    for name, source in sources.items():
        keep = dtype == torch.float16 and (file.kind, name) == _KEPT_FP32
        wanted = torch.float32 if keep else dtype
        make = partial(values, file.part, name, shapes[name], wanted)
        for piece in _split(source, file.prefix, shapes[name], wanted, make):
            if fp8 and _is_block_matrix(name, shapes[name]):
                yield from quantise(piece, scaled=precision == "fp8_scaled")
            else:
                yield piece


def _split(
    source: Source,
    prefix: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    make: Callable[[], Tensor],
) -> Iterator[Piece]:
    """One original tensor as the stored tensors that make it up."""
    shape, count = shape[source.lead :], len(source.stored)
    part = (shape[0] // count, *shape[1:])
    for i, name in enumerate(source.stored):
        yield Piece(prefix + name, dtype, part, lambda i=i: make().view(shape).chunk(count)[i])


def _shapes(kind: Kind, spec: Spec) -> dict[str, tuple[int, ...]]:
    """Original names and shapes; for CLIP with what the file has and the module leaves out."""
    outside: dict[str, tuple[int, ...]] = {}
    if isinstance(spec, ClipSpec):
        spec = replace(spec, num_layers=spec.num_layers + 1)
        outside = {"post_norm.weight": (spec.dim,), "post_norm.bias": (spec.dim,)}
    module = skeleton(kind, spec)
    return {name: tuple(t.shape) for name, t in module.state_dict().items()} | outside


def _is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    inside = name.startswith(("blocks.", "vace_blocks."))
    return inside and len(shape) == 2 and name.endswith(".weight") and "pos_embedding" not in name
