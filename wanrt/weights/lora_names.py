"""The spellings of LoRA keys: which weight of a Wan transformer a key changes, and in which role.

A key is a prefix, the name of a module and an ending. The module is spelled as in the original or
in Diffusers (`tables.py`), with dots or with underscores. Sources: diffusers 0.42.1
`loaders/lora_conversion_utils.py`; ComfyUI @6fd406f `comfy/weight_adapter/lora.py`; LightX2V
@0d6b494 `lightx2v/utils/lora_loader.py` (`.diff_m`); DiffSynth-Studio @9534a78
`diffsynth/lora/__init__.py`; musubi-tuner @d2ec562 `convert_lora.py`.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

from wanrt.weights.tables import DIT

Role = Literal["down", "up", "up_bias", "mid", "alpha", "diff", "diff_b", "diff_m", "refused"]
Dialect = Literal["Diffusers", "kohya", "ComfyUI", "original"]

# What stands behind the module's name. `.default` and the like is PEFT's name of an adapter.
_ENDINGS: tuple[tuple[Role, str], ...] = (
    ("up_bias", r"\.lora_(?:B|up)(?:\.\w+)?\.bias"),
    ("down", r"\.lora_(?:A|down)(?:\.\w+)?(?:\.weight)?"),
    ("up", r"\.lora_(?:B|up)(?:\.\w+)?(?:\.weight)?"),
    ("down", r"(?:_lora|\.lora|\.lora_linear_layer)\.down(?:\.weight)?"),
    ("up", r"(?:_lora|\.lora|\.lora_linear_layer)\.up(?:\.weight)?"),
    ("mid", r"\.lora_mid(?:\.weight)?"),
    ("alpha", r"\.alpha"),
    ("diff", r"\.(?:diff|w_norm)"),
    ("diff_b", r"\.(?:diff_b|b_norm)"),
    ("diff_m", r"\.diff_m"),
    ("refused", r"\.(?:dora_scale|lora_magnitude_vector|hada_\w+|lokr_\w+|oft_\w+)(?:\.\w+)*"),
)
_KEY = [(role, re.compile(rf"(?P<stem>.+?){ending}")) for role, ending in _ENDINGS]
_PREFIX = re.compile(
    r"lora_unet_|lora_transformer(?:_2)?_|lycoris_"
    r"|(?:base_model\.model\.|pipe\.|model\.)*"
    r"(?:diffusion_model\.|transformer(?:_2)?\.|unet\.|dit\.)?"
)
_FLAT = ("lora_", "lycoris_")
_BLOCK = re.compile(r"(?<=blocks[._])(?:0|[1-9]\d*)(?=[._]|$)")
_HOLES = {
    "block": ("blocks.#", "vace_blocks.#"),
    "n": ("#",),
    "qkv": ("q", "k", "v"),
    "norm": ("norm_q", "norm_k"),
}


class Key(NamedTuple):
    """A key understood. `second`: it is under `transformer_2`, the low-noise expert."""

    role: Role
    module: str  # original name, as blocks.0.self_attn.q, or of a parameter without a module
    dialect: Dialect
    second: bool


class _Spelled(NamedTuple):
    module: str
    dialect: Dialect


def parse(key: str) -> Key | None:
    """What a stored key is; None for what no Wan transformer has."""
    for role, pattern in _KEY:
        if match := pattern.fullmatch(key):
            found = _module(match["stem"], "modulation" if role == "diff_m" else "")
            return found and Key(role, found.module, found.dialect, "transformer_2" in key)
    return None


def is_lora_key(key: str) -> bool:
    """Whether the ending alone says that this belongs to a LoRA of whatever model."""
    lone = ("alpha", "refused")
    return any(pattern.fullmatch(key) for role, pattern in _KEY if role not in lone)


def _module(stem: str, leaf: str) -> _Spelled | None:
    prefix = _PREFIX.match(stem)
    assert prefix is not None, f"{stem=}"
    flat = prefix[0].startswith(_FLAT)
    rest = stem[prefix.end() :].replace(".processor.", ".")
    if leaf:
        rest += ("_" if flat else ".") + leaf
    numbers = _BLOCK.findall(rest)
    spelled = _spellings().get(_BLOCK.sub("#", rest))
    if spelled is None:
        return None
    module = spelled.module.replace("#", numbers[0]) if numbers else spelled.module
    if flat:
        return _Spelled(module, "kohya")
    comfy = "diffusion_model." in prefix[0] and spelled.dialect == "original"
    return _Spelled(module, "ComfyUI" if comfy else spelled.dialect)


@cache
def _spellings() -> dict[str, _Spelled]:
    """Every way to write a module, with # for the number of its block."""
    table = {}
    for rule in DIT:
        (theirs,) = rule.theirs
        for ours, other in zip(_expand(rule.ours), _expand(theirs), strict=True):
            diffusers = [other]
            if other.endswith(".to_out.0"):
                diffusers.append(other.removesuffix(".0"))
            for name in diffusers:
                table[name] = table[name.replace(".", "_")] = _Spelled(ours, "Diffusers")
            table[ours] = table[ours.replace(".", "_")] = _Spelled(ours, "original")
    return table


def _expand(template: str) -> Iterator[str]:
    """A rule's template without its leaf, once for every filling of its holes."""
    template = template.removesuffix(".*")
    holes = [hole for hole in _HOLES if "{" + hole + "}" in template]
    for filling in product(*(_HOLES[hole] for hole in holes)):
        yield template.format(**dict(zip(holes, filling, strict=True)))
