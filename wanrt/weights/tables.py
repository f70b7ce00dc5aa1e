"""The rename rules: original Wan names beside Diffusers and Hugging Face ones, one table both ways.

A rule pairs two templates. `*` is the last part of a name (weight, bias or gamma), `{n}` a number,
the other holes are below. Several names on the right are one fused tensor on the left.

Source: huggingface/diffusers @58eb52c `scripts/convert_wan_to_diffusers.py`; Wan2.1 @9737cba
`wan/modules/t5.py`, `clip.py` beside transformers' `UMT5EncoderModel` and `CLIPVisionModel`.
"""

import re
from typing import NamedTuple

_HOLES = {
    "n": r"\d+",
    "block": r"(?:vace_)?blocks\.\d+",
    "qkv": "[qkv]",
    "norm": "norm_[qk]",
    "side": "encoder|decoder",
    "part": "norm|to_qkv|proj",
    "leaf": "weight|bias|gamma",
}


class Rule(NamedTuple):
    """The original name, its parts elsewhere, and how many 1-sized dimensions only ours has."""

    ours: str
    theirs: tuple[str, ...]
    lead: int = 0


class Hit(NamedTuple):
    """A foreign name understood: original name, which part of it, and by which rule."""

    name: str
    part: int
    rule: Rule


class Theirs(NamedTuple):
    stored: tuple[str, ...]
    lead: int


class Table:
    """Rules, compiled for use in both directions."""

    def __init__(self, rules: list[Rule]) -> None:
        self._ours = [(_pattern(rule.ours), rule) for rule in rules]
        self._theirs = [
            (_pattern(name), part, rule) for rule in rules for part, name in enumerate(rule.theirs)
        ]

    def to_ours(self, name: str) -> Hit | None:
        for pattern, part, rule in self._theirs:
            if match := pattern.fullmatch(name):
                return Hit(_fill(rule.ours, match), part, rule)
        return None

    def to_theirs(self, name: str) -> Theirs:
        """Raises KeyError for a name that no original Wan model has."""
        for pattern, rule in self._ours:
            if match := pattern.fullmatch(name):
                return Theirs(tuple(_fill(theirs, match) for theirs in rule.theirs), rule.lead)
        raise KeyError(name)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\}|\*)", template)
    holes = {"*": "leaf"} | {"{" + hole + "}": hole for hole in _HOLES}
    return re.compile(
        "".join(
            f"(?P<{holes[p]}>{_HOLES[holes[p]]})" if p in holes else re.escape(p) for p in pieces
        )
    )


def _fill(template: str, match: re.Match[str]) -> str:
    return template.replace("*", "{leaf}").format(**match.groupdict())


def _rules(table: dict[str, str]) -> list[Rule]:
    return [Rule(ours, (theirs,)) for ours, theirs in table.items()]


DIT = _rules(
    {
        "patch_embedding.*": "patch_embedding.*",
        "time_embedding.0.*": "condition_embedder.time_embedder.linear_1.*",
        "time_embedding.2.*": "condition_embedder.time_embedder.linear_2.*",
        "time_projection.1.*": "condition_embedder.time_proj.*",
        "text_embedding.0.*": "condition_embedder.text_embedder.linear_1.*",
        "text_embedding.2.*": "condition_embedder.text_embedder.linear_2.*",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "img_emb.proj.0.*": "condition_embedder.image_embedder.norm1.*",
        "img_emb.proj.1.*": "condition_embedder.image_embedder.ff.net.0.proj.*",
        "img_emb.proj.3.*": "condition_embedder.image_embedder.ff.net.2.*",
        "img_emb.proj.4.*": "condition_embedder.image_embedder.norm2.*",
        "{block}.modulation": "{block}.scale_shift_table",
        "{block}.self_attn.{qkv}.*": "{block}.attn1.to_{qkv}.*",
        "{block}.self_attn.{norm}.*": "{block}.attn1.{norm}.*",
        "{block}.self_attn.o.*": "{block}.attn1.to_out.0.*",
        "{block}.cross_attn.{qkv}.*": "{block}.attn2.to_{qkv}.*",
        "{block}.cross_attn.{norm}.*": "{block}.attn2.{norm}.*",
        "{block}.cross_attn.o.*": "{block}.attn2.to_out.0.*",
        "{block}.cross_attn.k_img.*": "{block}.attn2.add_k_proj.*",
        "{block}.cross_attn.v_img.*": "{block}.attn2.add_v_proj.*",
        "{block}.cross_attn.norm_k_img.*": "{block}.attn2.norm_added_k.*",
        # Swapped: the original's norm2 (before the FFN) has no tensors, its norm3 is their norm2.
        "{block}.norm3.*": "{block}.norm2.*",
        "{block}.ffn.0.*": "{block}.ffn.net.0.proj.*",
        "{block}.ffn.2.*": "{block}.ffn.net.2.*",
        "head.modulation": "scale_shift_table",
        "head.head.*": "proj_out.*",
        "vace_patch_embedding.*": "vace_patch_embedding.*",
        "vace_blocks.{n}.before_proj.*": "vace_blocks.{n}.proj_in.*",
        "vace_blocks.{n}.after_proj.*": "vace_blocks.{n}.proj_out.*",
    }
)

_T5 = "encoder.block.{n}.layer.0"
_T5_FFN = "encoder.block.{n}.layer.1"
UMT5 = _rules(
    {
        "token_embedding.*": "shared.*",
        "blocks.{n}.norm1.*": f"{_T5}.layer_norm.*",
        "blocks.{n}.attn.{qkv}.*": f"{_T5}.SelfAttention.{{qkv}}.*",
        "blocks.{n}.attn.o.*": f"{_T5}.SelfAttention.o.*",
        "blocks.{n}.pos_embedding.embedding.*": f"{_T5}.SelfAttention.relative_attention_bias.*",
        "blocks.{n}.norm2.*": f"{_T5_FFN}.layer_norm.*",
        "blocks.{n}.ffn.gate.0.*": f"{_T5_FFN}.DenseReluDense.wi_0.*",
        "blocks.{n}.ffn.fc1.*": f"{_T5_FFN}.DenseReluDense.wi_1.*",
        "blocks.{n}.ffn.fc2.*": f"{_T5_FFN}.DenseReluDense.wo.*",
        "norm.*": "encoder.final_layer_norm.*",
    }
)

# Source: llama.cpp `gguf-py/gguf/constants.py`, MODEL_ARCH.T5ENCODER.
_BLK = "enc.blk.{n}"
UMT5_LLAMA = _rules(
    {
        "token_embedding.*": "token_embd.*",
        "blocks.{n}.norm1.*": f"{_BLK}.attn_norm.*",
        "blocks.{n}.attn.{qkv}.*": f"{_BLK}.attn_{{qkv}}.*",
        "blocks.{n}.attn.o.*": f"{_BLK}.attn_o.*",
        "blocks.{n}.pos_embedding.embedding.*": f"{_BLK}.attn_rel_b.*",
        "blocks.{n}.norm2.*": f"{_BLK}.ffn_norm.*",
        "blocks.{n}.ffn.gate.0.*": f"{_BLK}.ffn_gate.*",
        "blocks.{n}.ffn.fc1.*": f"{_BLK}.ffn_up.*",
        "blocks.{n}.ffn.fc2.*": f"{_BLK}.ffn_down.*",
        "norm.*": "enc.output_norm.*",
    }
)

_VIT = "encoder.layers.{n}"
CLIP = [
    Rule("cls_embedding", ("embeddings.class_embedding",), lead=2),
    Rule("pos_embedding", ("embeddings.position_embedding.weight",), lead=1),
    Rule(
        "transformer.{n}.attn.to_qkv.*",
        tuple(f"{_VIT}.self_attn.{x}_proj.*" for x in ("q", "k", "v")),
    ),
    *_rules(
        {
            "patch_embedding.*": "embeddings.patch_embedding.*",
            "pre_norm.*": "pre_layrnorm.*",
            "transformer.{n}.norm1.*": f"{_VIT}.layer_norm1.*",
            "transformer.{n}.attn.proj.*": f"{_VIT}.self_attn.out_proj.*",
            "transformer.{n}.norm2.*": f"{_VIT}.layer_norm2.*",
            "transformer.{n}.mlp.0.*": f"{_VIT}.mlp.fc1.*",
            "transformer.{n}.mlp.2.*": f"{_VIT}.mlp.fc2.*",
            "post_norm.*": "post_layernorm.*",
        }
    ),
]

_VAE_OUTSIDE = {
    "conv1.*": "quant_conv.*",
    "conv2.*": "post_quant_conv.*",
    "{side}.conv1.*": "{side}.conv_in.*",
    "{side}.middle.1.{part}.*": "{side}.mid_block.attentions.0.{part}.*",
    "{side}.head.0.*": "{side}.norm_out.*",
    "{side}.head.2.*": "{side}.conv_out.*",
}
# Inside a residual block or a resampling layer; which one stands at a place does not matter here.
_VAE_INSIDE = {
    "residual.0.*": "norm1.*",
    "residual.2.*": "conv1.*",
    "residual.3.*": "norm2.*",
    "residual.6.*": "conv2.*",
    "shortcut.*": "conv_shortcut.*",
    "resample.1.*": "resample.1.*",
    "time_conv.*": "time_conv.*",
}


def vae_rules(num_res_blocks: int, num_stages: int, residual: bool) -> list[Rule]:
    """The VAE's rules; a decoder stage has a block more than an encoder stage, then a resampler."""
    places = {
        "{side}.middle.0": "{side}.mid_block.resnets.0",
        "{side}.middle.2": "{side}.mid_block.resnets.1",
    }
    if residual:
        for side, down, num in (
            ("encoder", "down", num_res_blocks),
            ("decoder", "up", num_res_blocks + 1),
        ):
            stage, theirs = (
                f"{side}.{down}samples.{{n}}.{down}samples",
                f"{side}.{down}_blocks.{{n}}",
            )
            places |= {f"{stage}.{i}": f"{theirs}.resnets.{i}" for i in range(num)}
            places[f"{stage}.{num}"] = f"{theirs}.{down}sampler"
    else:
        places["encoder.downsamples.{n}"] = "encoder.down_blocks.{n}"
        per_stage = num_res_blocks + 2
        for i in range(num_stages * per_stage):
            stage, block = divmod(i, per_stage)
            last = "upsamplers.0" if block == per_stage - 1 else f"resnets.{block}"
            places[f"decoder.upsamples.{i}"] = f"decoder.up_blocks.{stage}.{last}"
    inside = [
        Rule(f"{place}.{a}", (f"{theirs}.{b}",))
        for place, theirs in places.items()
        for a, b in _VAE_INSIDE.items()
    ]
    return _rules(_VAE_OUTSIDE) + inside
