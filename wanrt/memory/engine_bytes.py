"""What a denoising step holds on the device where engines compute: sums, nothing is run.

An engine takes inputs, gives outputs and works in one piece of memory, the workspace, which is all
engines' of a model and as large as the neediest one wants. `engine/memory.py` reads its size off a
bundle. Encoders of text and pictures are counted as native ones, and a workspace with them.
"""

from dataclasses import dataclass
from typing import Literal

from wanrt.config import DitSpec
from wanrt.kernels.limits import PART_TOKENS
from wanrt.memory.dit_bytes import Tokens, head_bytes, prepare_bytes
from wanrt.memory.vae_engine_bytes import VaeEngines

_FP32 = 4


@dataclass(frozen=True)
class EngineBytes:
    """Workspaces of the engines of a bundle on a card, bytes; 0 and None where all is native.

    blocks: `halves` are engines before and after the native attention, `whole` has it within.
    `step` is that of everything in a transformer, what makes keys and values of a text included.
    """

    blocks: Literal["native", "halves", "whole"] = "native"
    step: int = 0
    decode: VaeEngines | None = None
    encode: VaeEngines | None = None
    text: int = 0
    image: int = 0


NATIVE = EngineBytes()


def step_activations(
    spec: DitSpec, tokens: Tokens, element: int, branches: int, whole: bool, extra: int = 0
) -> int:
    """The most a forward pass holds beside weights, text cache, latents and the workspace.

    N are the elements of a tensor [L, D] over all tokens, P those of 8192 of them, e the bytes of
    one, s the residual streams: one for each text, with VACE two. Streams are fp32. Halves:

        4sN + the largest of
            3e(N + P)          q, k and v, whole; of the first part, whose shapes they have, too
            4eN + extra        with what the native attention makes; `extra` as in dit_bytes
            eN + 4N + (4 + e)P its result, new tokens beside the old ones, and a part of both
            2eN                of VACE: control tokens before they meet the others
            the embedded texts, or the head, natively

    Up to 8192 tokens go at once, without the first part. An engine of a whole block has only the
    new tokens, 4N. The cap of P is `kernels.limits.PART_TOKENS`.
    """
    n = tokens.length * spec.dim
    part = min(tokens.length, PART_TOKENS) * spec.dim
    first = part if tokens.length > PART_TOKENS else 0
    streams = branches * (2 if spec.vace_layers else 1) * _FP32 * n
    new = _FP32 * (n + first)
    inside = (
        (_FP32 * n,)
        if whole
        else (3 * element * (n + first), 4 * element * n + extra, element * (n + part) + new)
    )
    around = (prepare_bytes(spec, tokens, element), head_bytes(spec, tokens))
    vace = 2 * element * n if spec.vace_layers else 0
    return streams + max(*inside, *around, vace)
