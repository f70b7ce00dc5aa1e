"""Which product gets which format, and why: the first rule that fits a name.

Three levels. `full`: weights and activations in eight bits, the fast product. `weights`: eight bits
in memory, the product in the model's own dtype. `plain`: nothing is quantised.

The figures come from `wanrt bench quality --part layers` (docs/quality.md). No block stands out, so
that none is exempt: alone in int8, nano's six cost its latents 0.8 to 1.3 %, the first one least.
"""

import re
from dataclasses import dataclass
from typing import Literal

from wanrt.quant.formats import FP8, FP8_WEIGHTS, INT8_ROTATED, INT8_WEIGHTS, LinearFormat

Level = Literal["full", "weights", "plain"]
EightBit = Literal["int8", "fp8"]


@dataclass(frozen=True)
class Rule:
    """`pattern` is found in the name of a module, or in the place of a convolution."""

    pattern: str
    level: Level
    reason: str


RULES = (
    Rule(
        r"blocks\.\d+\.cross_attn\.[kv](_img)?$",
        "weights",
        "computed once per request: nothing to gain from a faster product",
    ),
    Rule(
        r"vace_blocks\.\d+\.(before|after)_proj$",
        "weights",
        "they take the residual stream itself, with its few large channels, and are two of nine",
    ),
    Rule(
        r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.[02])$",
        "full",
        "nine tenths of all products; of the 1.3B's block all of them together cost 1.7 % in int8 "
        "(5.2 % without the rotation), 5.0 % in fp8",
    ),
    Rule(
        r"",
        "plain",
        "embeddings of patches, text, time and image, the head, norms and modulation: few bytes, "
        "little time, and everything passes through them",
    ),
)

# Of the VAE, by place: the side, the number of upsamplings before it, and whether a norm precedes
# it; as `decoder.2.normalised`. The figures come from `wanrt bench quality --part vae`.
CONV_RULES = (
    Rule(
        r"^decoder\.[23]\.normalised$",
        "full",
        "behind the second upsampling are 78 % of the multiplications of Wan 2.1's 3x3x3 taps and "
        "three quarters of its history, and what they get wrong meets few layers more: 45.4 dB; "
        "with all 29 of the decoder in int8 it is 42.4 dB",
    ),
    Rule(
        r"",
        "plain",
        "the encoder makes what a whole clip goes by; the last convolution has 3 results; before "
        "the first one, 1x1x1, 3x1x1 and each frame's own 3x3 stands no norm to bound their inputs",
    ),
)

FULL: dict[EightBit, LinearFormat] = {"int8": INT8_ROTATED, "fp8": FP8}
WEIGHTS: dict[EightBit, LinearFormat] = {"int8": INT8_WEIGHTS, "fp8": FP8_WEIGHTS}
ATTENTION: dict[EightBit, str] = {"int8": "attention_int8", "fp8": "attention_int8_fp8"}


def level_of(name: str) -> Level:
    """`name`: of a module, as `blocks.3.ffn.0`."""
    return next(rule.level for rule in RULES if re.search(rule.pattern, name))


def is_int8_conv(place: str) -> bool:
    """Whether a convolution of an int8 VAE is int8; `place` as `decoder.2.normalised`."""
    return next(rule.level for rule in CONV_RULES if re.search(rule.pattern, place)) == "full"


def format_of(name: str, precision: EightBit) -> LinearFormat | None:
    """The format of a product; None where it stays as it is."""
    match level_of(name):
        case "full":
            return FULL[precision]
        case "weights":
            return WEIGHTS[precision]
        case _:
            return None
