"""Every spelling of a tensor's name, translated to the original Wan one, and back.

A spelling is recognised by one marker name; what stands before the marker in the file is its prefix
(`model.diffusion_model.`, `visual.`, none ...). The rename rules themselves are `tables.py`.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from wanrt.config import VaeSpec
from wanrt.weights.tables import CLIP, DIT, UMT5, UMT5_LLAMA, Table, vae_rules

Kind = Literal["dit", "vae", "umt5", "clip"]
Spelling = Literal["original", "diffusers", "llama.cpp"]

MARKERS: dict[tuple[Kind, Spelling], str] = {
    ("dit", "original"): "head.modulation",
    ("dit", "diffusers"): "condition_embedder.time_proj.weight",
    ("vae", "original"): "decoder.head.0.gamma",
    ("vae", "diffusers"): "decoder.norm_out.gamma",
    ("umt5", "original"): "blocks.0.pos_embedding.embedding.weight",
    ("umt5", "diffusers"): "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ("umt5", "llama.cpp"): "enc.blk.0.attn_rel_b.weight",
    ("clip", "original"): "transformer.0.attn.to_qkv.weight",
    ("clip", "diffusers"): "embeddings.class_embedding",
}

# Beside a quantised `X.weight`: how to undo it (scales), or how somebody's kernels run it.
QUANT_LEAVES = frozenset(
    ("scale_weight", "weight_scale", "scale_input", "input_scale", "input_step", "input_zero")
    + ("comfy_quant", "weight_scale_2", "pre_quant_scale")
)
# Stored beside the weights, of no use to any module.
_IGNORED: dict[str, re.Pattern[str]] = {
    "dit": re.compile(r"scaled_fp8|.*\.norm_added_q\..*"),
    "vae": re.compile(r"scaled_fp8"),
    "umt5": re.compile(r"scaled_fp8|spiece_model|logit_scale"),
    "clip": re.compile(r"scaled_fp8|head|log_scale|embeddings\.position_ids|visual_projection\..*"),
}
_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}  # tied; either may be the stored one


@dataclass(frozen=True)
class Component:
    """One model found among stored names."""

    kind: Kind
    spelling: Spelling
    prefix: str


class Source(NamedTuple):
    """Where an original tensor comes from: stored names, concatenated along the first dimension.

    `lead`: how many leading dimensions of size 1 the stored tensor lacks.
    """

    stored: tuple[str, ...]
    lead: int = 0


class Translation(NamedTuple):
    """What became of a component's stored names."""

    sources: dict[str, Source]  # original name -> where it is, in stored order
    unknown: list[str]  # stored names that mean nothing


def components(names: Iterable[str]) -> list[Component]:
    """Every model among the names; an all-in-one file has several, a foreign file none."""
    found = []
    for name in names:
        for (kind, spelling), marker in MARKERS.items():
            prefix = name.removesuffix(marker)
            if prefix != name and (not prefix or prefix.endswith(".")):
                found.append(Component(kind, spelling, prefix))
    return found


def own_names(names: Collection[str], component: Component, others: list[Component]) -> list[str]:
    """The names of a component: under its prefix, and not under a longer one of another."""
    longer = tuple(o.prefix for o in others if len(o.prefix) > len(component.prefix))
    return [n for n in names if n.startswith(component.prefix) and not n.startswith(longer)]


def translate(names: Iterable[str], component: Component) -> Translation:
    """Stored names of one component -> original names without prefix."""
    stems = {name.removeprefix(component.prefix): name for name in names}
    table = _foreign_table(component, stems)
    partial: dict[str, dict[int, str]] = {}
    lead: dict[str, int] = {}
    unknown = []
    for stem, name in stems.items():
        if stem.rpartition(".")[2] in QUANT_LEAVES or _IGNORED[component.kind].fullmatch(stem):
            continue
        if table is None:
            partial[stem], lead[stem] = {0: name}, 0
            continue
        hit = table.to_ours(_ALIASES.get(stem, stem))
        if hit is None:
            unknown.append(name)
            continue
        partial.setdefault(hit.name, {}).setdefault(hit.part, name)
        lead[hit.name] = hit.rule.lead
    sources = {}
    for ours, parts in partial.items():
        sources[ours] = Source(tuple(parts[i] for i in sorted(parts)), lead[ours])
        if table is not None and len(parts) < len(table.to_theirs(ours).stored):
            unknown.extend(sources.pop(ours).stored)
    return Translation(sources, unknown)


def to_diffusers(names: Iterable[str], kind: Kind, vae: VaeSpec | None = None) -> dict[str, Source]:
    """Original names -> Diffusers and Hugging Face ones; the other direction of the same tables."""
    if kind == "vae":
        assert vae is not None, "the VAE's names depend on its shape"
        table = Table(vae_rules(vae.num_res_blocks, len(vae.dim_mult), vae.residual))
    else:
        table = _TABLES[kind]
    return {name: Source(*table.to_theirs(name)) for name in names}


_TABLES = {"dit": Table(DIT), "umt5": Table(UMT5), "clip": Table(CLIP)}
_UMT5_LLAMA = Table(UMT5_LLAMA)


def _foreign_table(component: Component, stems: Iterable[str]) -> Table | None:
    """None for original names. The VAE's table depends on its number of blocks: its names tell."""
    if component.spelling == "original":
        return None
    if component.spelling == "llama.cpp":
        return _UMT5_LLAMA
    if component.kind != "vae":
        return _TABLES[component.kind]
    text = "\n".join(stems)
    blocks = set(re.findall(r"^decoder\.up_blocks\.0\.resnets\.(\d+)\.", text, re.MULTILINE))
    stages = set(re.findall(r"^decoder\.up_blocks\.(\d+)\.", text, re.MULTILINE))
    residual = re.search(r"^encoder\.down_blocks\.0\.resnets\.", text, re.MULTILINE) is not None
    return Table(vae_rules(len(blocks) - 1, len(stages), residual))
