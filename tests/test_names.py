"""Names: every foreign spelling maps one to one onto the peers' own modules, in both directions."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wanrt.config import MODELS, NANO, VAE_2_1, VAE_2_2, ClipSpec, DitSpec, Umt5Spec, VaeSpec
from wanrt.weights import names
from wanrt.weights.load import skeleton
from wanrt.weights.names import Component, Source
from wanrt.weights.specs import Spec

Shapes = dict[str, tuple[int, ...]]


def peer_dit(spec: DitSpec) -> nn.Module:
    common = {
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": 128,
        "in_channels": spec.in_dim,
        "out_channels": spec.out_dim,
        "text_dim": spec.text_dim,
        "ffn_dim": spec.ffn_dim,
        "num_layers": spec.num_layers,
        "image_dim": spec.image_dim,
        "added_kv_proj_dim": spec.dim if spec.image_dim else None,
        "pos_embed_seq_len": spec.image_pos_tokens,
    }
    if spec.vace_layers:
        return WanVACETransformer3DModel(vace_layers=list(spec.vace_layers), **common)
    return WanTransformer3DModel(**common)


def peer_vae(spec: VaeSpec) -> nn.Module:
    common = {
        "base_dim": spec.base_dim,
        "decoder_base_dim": spec.decoder_base_dim,
        "z_dim": spec.z_dim,
        "dim_mult": list(spec.dim_mult),
        "num_res_blocks": spec.num_res_blocks,
        "temperal_downsample": list(spec.temporal_downsample),
    }
    if spec.residual:
        common |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    return AutoencoderKLWan(**common)


def peer_umt5(spec: Umt5Spec) -> nn.Module:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=spec.vocab_size,
            d_model=spec.dim,
            d_kv=spec.attn_dim // spec.num_heads,
            d_ff=spec.ffn_dim,
            num_heads=spec.num_heads,
            num_layers=spec.num_layers,
        )
    )


def peer_clip(spec: ClipSpec) -> nn.Module:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=spec.dim,
            intermediate_size=spec.mlp_dim,
            num_attention_heads=spec.num_heads,
            num_hidden_layers=spec.num_layers,
            image_size=spec.image_size,
            patch_size=spec.patch_size,
        )
    )


PEERS: dict[type, tuple[names.Kind, Callable[..., nn.Module]]] = {
    DitSpec: ("dit", peer_dit),
    VaeSpec: ("vae", peer_vae),
    Umt5Spec: ("umt5", peer_umt5),
    ClipSpec: ("clip", peer_clip),
}
SPECS: dict[str, Spec] = {
    **{f"dit {model.id}": model.dit for model in MODELS.values()},
    "vae 2.1": VAE_2_1,
    "vae 2.2": VAE_2_2,
    "vae nano": NANO.vae,
    "vae 2.1, 1 block": replace(VAE_2_1, num_res_blocks=1),
    "vae 2.1, 3 blocks, 3 stages": replace(
        VAE_2_1, num_res_blocks=3, dim_mult=(1, 2, 4), temporal_downsample=(True, True)
    ),
    "vae 2.2, 3 blocks": replace(VAE_2_2, num_res_blocks=3),
    "umt5-xxl": Umt5Spec(),
    "umt5 nano": NANO.umt5,
    "clip": ClipSpec(),
}
# Known differences: tied, or behind the last hidden state that Wan uses.
ONLY_THEIRS = ("encoder.embed_tokens.weight", "encoder.layers.31.", "post_layernorm.")


@cache
def both(case: str) -> tuple[names.Kind, Shapes, Shapes]:
    """Kind, our names and shapes, the peer's names and shapes; nothing is allocated."""
    kind, build = PEERS[type(SPECS[case])]
    with torch.device("meta"):
        peer = build(SPECS[case])
    ours = skeleton(kind, SPECS[case])
    return kind, *({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (ours, peer))


def write(case: str) -> dict[str, Source]:
    kind, ours, _ = both(case)
    spec = SPECS[case]
    return names.to_diffusers(ours, kind, spec if isinstance(spec, VaeSpec) else None)


@pytest.mark.parametrize("case", SPECS)
def test_written_names_are_the_peers(case: str) -> None:
    """Our tensors become just those that the peer's module has, with the peer's shapes."""
    _, ours, theirs = both(case)
    written: Shapes = {}
    for name, source in write(case).items():
        rows, *rest = ours[name][source.lead :]
        for stored in source.stored:
            assert stored not in written
            written[stored] = (rows // len(source.stored), *rest)
    expected = {name: s for name, s in theirs.items() if not name.startswith(ONLY_THEIRS)}
    assert written == expected


@pytest.mark.parametrize("case", SPECS)
def test_the_peers_names_are_read(case: str) -> None:
    """What the peer's module holds translates to exactly our names, the way they were written."""
    kind, ours, theirs = both(case)
    (component,) = names.components(theirs)
    assert component == Component(kind, "diffusers", "")
    read = names.translate(theirs, component)
    assert read.unknown == []
    assert {name: source for name, source in read.sources.items() if name in ours} == write(case)
    extra = {name for name in read.sources if name not in ours}
    assert all(name.startswith(("transformer.31.", "post_norm.")) for name in extra)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "model.diffusion_model.", "visual.", "vae.", "a.b."]
)
@pytest.mark.parametrize(
    "case", ["dit wan2.1-vace-1.3b", "vae 2.1", "vae 2.2", "umt5 nano", "clip"]
)
def test_original_names_under_any_prefix(case: str, prefix: str) -> None:
    kind, ours, _ = both(case)
    stored = [prefix + name for name in ours]
    (component,) = names.components(stored)
    assert component == Component(kind, "original", prefix)
    expected = {name: Source((prefix + name,)) for name in ours}
    assert names.translate(stored, component) == (expected, [])


@pytest.mark.parametrize("case", ["dit wan2.1-i2v-14b-480p", "vae 2.2", "umt5 nano", "clip"])
def test_foreign_names_under_a_prefix(case: str) -> None:
    kind, ours, theirs = both(case)
    prefix = "vision_model." if kind == "clip" else "text_encoders.umt5xxl.transformer."
    stored = [prefix + name for name in theirs]
    (component,) = names.components(stored)
    assert component == Component(kind, "diffusers", prefix)
    read = names.translate(stored, component)
    assert not read.unknown and set(ours) <= set(read.sources)


def test_the_norms_swap_their_numbers() -> None:
    """The reference's norm3 (affine, before cross-attention) is Diffusers' norm2, spec trap 5."""
    table = names.to_diffusers(["blocks.7.norm3.bias", "vace_blocks.1.norm3.weight"], "dit")
    assert [s.stored for s in table.values()] == [
        ("blocks.7.norm2.bias",),
        ("vace_blocks.1.norm2.weight",),
    ]


def test_fused_clip_projection_keeps_the_order() -> None:
    name = "transformer.3.attn.to_qkv.weight"
    stored = tuple(f"encoder.layers.3.self_attn.{x}_proj.weight" for x in "qkv")
    assert names.to_diffusers([name], "clip")[name] == Source(stored)
    component = Component("clip", "diffusers", "")
    assert names.translate(reversed(stored), component).sources == {name: Source(stored)}
    assert names.translate(stored[:2], component) == ({}, list(stored[:2]))


IGNORED = {
    "scaled fp8 marker": ("dit", "original", ["scaled_fp8", "blocks.0.ffn.0.scale_weight"]),
    "newer ComfyUI": (
        "dit",
        "original",
        ["blocks.0.ffn.0.weight_scale", "blocks.0.ffn.0.comfy_quant"],
    ),
    "activation scales": (
        "dit",
        "diffusers",
        ["blocks.0.ffn.net.2.input_scale", "proj_out.scale_input"],
    ),
    "stray norm": ("dit", "diffusers", ["blocks.0.attn2.norm_added_q.weight"]),
    "embedded tokenizer": ("umt5", "diffusers", ["spiece_model", "scaled_fp8"]),
    "projection": ("clip", "diffusers", ["visual_projection.weight", "embeddings.position_ids"]),
    "head": ("clip", "original", ["head", "log_scale"]),
}


@pytest.mark.parametrize("case", IGNORED)
def test_names_that_are_no_weights(case: str) -> None:
    kind, spelling, stored = IGNORED[case]
    assert names.translate(stored, Component(kind, spelling, "")) == ({}, [])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dit", "blocks.0.attn3.to_q.weight"), ("vae", "decoder.up_blocks.0.resnets.0.conv9.weight")],
)
def test_unknown_names_are_reported(kind: names.Kind, name: str) -> None:
    assert names.translate([name], Component(kind, "diffusers", "")).unknown == [name]


@pytest.mark.parametrize("stored", [["shared.weight"], ["encoder.embed_tokens.weight"]])
def test_either_name_of_the_tied_embedding(stored: list[str]) -> None:
    read = names.translate(stored, Component("umt5", "diffusers", ""))
    assert read.sources == {"token_embedding.weight": Source(tuple(stored))}


def test_clip_file_with_its_text_tower() -> None:
    """The original .pth holds the whole CLIP; only what is under visual. counts."""
    _, ours, _ = both("clip")
    visual = [f"visual.{name}" for name in ours]
    rest = ["log_scale", "textual.token_embedding.weight", "textual.blocks.0.attn.to_qkv.weight"]
    (component,) = names.components(visual + rest)
    own = names.own_names(visual + rest, component, [component])
    assert own == visual


def test_all_in_one_file() -> None:
    """A ComfyUI checkpoint: three models in one file, told apart by prefix."""
    prefixes = {
        "dit nano": "model.diffusion_model.",
        "vae nano": "vae.",
        "umt5 nano": "te.umt5xxl.transformer.",
    }
    stored = [p + n for case, p in prefixes.items() for n in both(case)[2 if "umt5" in case else 1]]
    found = names.components(stored)
    assert {(c.kind, c.prefix) for c in found} == {(c.split()[0], p) for c, p in prefixes.items()}
    for component in found:
        _, ours, _ = both(f"{component.kind} nano")
        read = names.translate(names.own_names(stored, component, found), component)
        assert not read.unknown and read.sources.keys() == ours.keys()


def test_bare_model_beside_a_prefixed_one() -> None:
    stored = [*both("dit nano")[1], *(f"vae.{name}" for name in both("vae nano")[1])]
    found = names.components(stored)
    bare = next(c for c in found if not c.prefix)
    assert set(names.own_names(stored, bare, found)) == set(both("dit nano")[1])


def test_foreign_files_have_no_component() -> None:
    assert names.components(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]) == []
    assert (
        names.components(["decoder.mid_block.attentions.0.to_q.weight", "decoder.conv_in.weight"])
        == []
    )
