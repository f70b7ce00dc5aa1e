"""From the shapes of the tensors to the shape of the model: one function per kind of model.

Every reader takes `shapes` (original name -> shape) and `config` (the fields of a config.json, or
nothing), and returns the spec or raises ValueError. Shapes decide; the config adds what they do not
tell.
`contradiction` says where the config is another model's.
"""

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

from wanrt.config import ClipSpec, DitSpec, Umt5Spec, VaeSpec

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]
Spec = DitSpec | VaeSpec | Umt5Spec | ClipSpec

DIT_HEAD, CLIP_HEAD = 128, 80


def dit_spec(shapes: Shapes, config: Config) -> DitSpec:
    """Source of the recipe: ComfyUI `comfy/model_detection.py`."""
    dim = shapes["head.modulation"][-1]
    _require(dim % DIT_HEAD == 0, f"its width {dim} is no multiple of the head size {DIT_HEAD}")
    patch = shapes["patch_embedding.weight"]  # [dim, in, 1, 2, 2]
    area = patch[2] * patch[3] * patch[4]
    num_layers = _count(shapes, r"blocks\.(\d+)\.")
    image = shapes.get("img_emb.proj.1.weight")
    positions = shapes.get("img_emb.emb_pos")
    vace_in = shapes.get("vace_patch_embedding.weight")
    return DitSpec(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=dim // DIT_HEAD,
        num_layers=num_layers,
        in_dim=patch[1],
        out_dim=shapes["head.head.weight"][0] // area,
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=int(config.get("text_len", 512)),
        eps=float(config.get("eps", 1e-6)),
        image_dim=image[1] if image else None,
        image_pos_tokens=positions[1] if positions else None,
        vace_layers=_vace_layers(_count(shapes, r"vace_blocks\.(\d+)\."), num_layers, config),
        vace_in_dim=vace_in[1] if vace_in else 96,
        patch_size=(patch[2], patch[3], patch[4]),
    )


def vae_spec(shapes: Shapes, config: Config) -> VaeSpec:
    """Stages are read off the encoder: blocks, then a resampler (two levels of names in 2.2)."""
    residual = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
    base = shapes["encoder.conv1.weight"][0]
    widths: list[list[int]] = [[]]  # per stage, the width after each of its blocks
    temporal: list[bool] = []
    for layer in _encoder_layers(shapes):
        block = shapes.get(f"{layer}.residual.6.weight")
        if block:
            widths[-1].append(block[0])
        else:
            temporal.append(f"{layer}.time_conv.weight" in shapes)
            widths.append([])
    _require(all(widths), "the stages of its encoder are incomplete")
    _require(
        all(stage[-1] % base == 0 for stage in widths), f"its widths are no multiples of {base}"
    )
    dim_mult = tuple(stage[-1] // base for stage in widths)
    spec = VaeSpec(
        z_dim=shapes["conv2.weight"][0],
        base_dim=base,
        decoder_base_dim=shapes["decoder.head.0.gamma"][0] // dim_mult[0],
        dim_mult=dim_mult,
        num_res_blocks=len(widths[0]),
        temporal_downsample=tuple(temporal),
        patch=isqrt(shapes["encoder.conv1.weight"][1] // 3),
    )
    known = spec.patch == (2 if residual else 1)
    _require(known, f"patch size {spec.patch} does not go with its stages")
    return spec


def umt5_spec(shapes: Shapes, config: Config) -> Umt5Spec:
    """The heads come from the bias tables `[buckets, heads]`, one per layer (a T5 has only one)."""
    num_layers = _count(shapes, r"blocks\.(\d+)\.")
    tables = sum(name.endswith("pos_embedding.embedding.weight") for name in shapes)
    _require(
        tables == num_layers, f"it is a T5, not a umT5: {tables} bias tables, {num_layers} layers"
    )
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocab_size, dim = shapes["token_embedding.weight"]
    spec = Umt5Spec(
        vocab_size=vocab_size,
        dim=dim,
        attn_dim=shapes["blocks.0.attn.q.weight"][0],
        ffn_dim=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        num_layers=num_layers,
        num_buckets=num_buckets,
        max_distance=int(config.get("relative_attention_max_distance", 128)),
        eps=float(config.get("layer_norm_epsilon", 1e-6)),
    )
    _require(spec.attn_dim % num_heads == 0, f"{num_heads} heads do not divide {spec.attn_dim}")
    return spec


def clip_spec(shapes: Shapes, config: Config) -> ClipSpec:
    dim, _, patch_size, _ = shapes["patch_embedding.weight"]
    _require(dim % CLIP_HEAD == 0, f"its width {dim} is no multiple of the head size {CLIP_HEAD}")
    return ClipSpec(
        dim=dim,
        mlp_dim=shapes["transformer.0.mlp.0.weight"][0],
        num_heads=dim // CLIP_HEAD,
        num_layers=_count(shapes, r"transformer\.(\d+)\."),
        image_size=patch_size * isqrt(shapes["pos_embedding"][1] - 1),
        patch_size=patch_size,
        eps=float(config.get("layer_norm_eps", 1e-5)),
    )


READERS: dict[str, Callable[[Shapes, Config], Spec]] = {
    "dit": dit_spec,
    "vae": vae_spec,
    "umt5": umt5_spec,
    "clip": clip_spec,
}

# Field of the spec -> its names in config.json files: Wan's, then Diffusers' or Hugging Face's.
_FIELDS: dict[type, dict[str, tuple[str, ...]]] = {
    DitSpec: {
        "dim": ("dim",),
        "ffn_dim": ("ffn_dim",),
        "num_heads": ("num_heads", "num_attention_heads"),
        "num_layers": ("num_layers",),
        "in_dim": ("in_dim", "in_channels"),
        "out_dim": ("out_dim", "out_channels"),
        "freq_dim": ("freq_dim",),
        "text_dim": ("text_dim",),
    },
    VaeSpec: {
        "z_dim": ("z_dim",),
        "base_dim": ("base_dim",),
        "num_res_blocks": ("num_res_blocks",),
    },
    Umt5Spec: {"dim": ("d_model",), "ffn_dim": ("d_ff",), "num_heads": ("num_heads",)},
    ClipSpec: {"dim": ("hidden_size",), "num_heads": ("num_attention_heads",)},
}


def contradiction(spec: Spec, config: Config) -> str | None:
    """The first field in which config.json and tensors differ, in words."""
    for field, keys in _FIELDS[type(spec)].items():
        for key in keys:
            if config.get(key) not in (None, getattr(spec, field)):
                return f"{key} {config[key]}, the tensors say {getattr(spec, field)}"
    return None


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbered modules match; they are numbered from 0."""
    found = {int(m[1]) for name in shapes if (m := re.match(pattern, name))}
    _require(found == set(range(len(found))), f"numbers are missing in {pattern}")
    return len(found)


def _encoder_layers(shapes: Shapes) -> list[str]:
    """Prefixes of the encoder's blocks and resamplers, in order."""
    pattern = re.compile(
        r"encoder(?:\.downsamples\.\d+)+(?=\.(?:residual|shortcut|resample|time_conv)\.)"
    )
    found = {m[0] for name in shapes if (m := pattern.match(name))}
    return sorted(found, key=lambda layer: [int(n) for n in re.findall(r"\d+", layer)])


def _vace_layers(num_blocks: int, num_layers: int, config: Config) -> tuple[int, ...]:
    """From the config, or evenly spread as in both released models."""
    if not num_blocks:
        return ()
    layers = config.get("vace_layers") or range(0, num_layers, max(1, num_layers // num_blocks))
    layers = tuple(int(i) for i in layers)
    _require(
        len(layers) == num_blocks, f"{num_blocks} VACE blocks, but vace_layers is {list(layers)}"
    )
    return layers


def _require(condition: bool, reason: str) -> None:
    """Raises ValueError; the caller knows the file and makes it a FormatError."""
    if not condition:
        raise ValueError(reason)
