"""What a denoising step and a VAE hold on the device where engines compute: sums, nothing is run.

An engine takes inputs, gives outputs and works in one piece of memory, the workspace, which is all
engines' of a model and as large as the neediest one wants. `engine/memory.py` reads its size off a
bundle. Encoders of text and pictures are counted as native ones, and a workspace with them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from wanrt.config import DitSpec, VaeSpec
from wanrt.kernels.limits import PART_TOKENS
from wanrt.memory.dit_bytes import Tokens, head_bytes, prepare_bytes
from wanrt.memory.vae_bytes import VaeBytes
from wanrt.vae_sections import Section, decoder_sections, encoder_sections

_FP32 = 4
Side = Literal["encode", "decode"]


@dataclass(frozen=True)
class VaeEngines:
    """Workspace of a decoder's or encoder's engines, bytes; None where a way lacks one."""

    sections: int | None = None  # a clip goes section by section
    whole: int | None = None  # one engine is a whole step


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


class _Run(NamedTuple):
    """Bytes of one engine's input, output and caches; elements of the largest cache."""

    given: int
    made: int
    caches: int
    largest: int


def coder_bytes(
    spec: VaeSpec,
    side: Side,
    height: int,
    width: int,
    num_frames: int,
    element: int,
    host: bool,
    engines: VaeEngines,
) -> tuple[VaeBytes, int]:
    """Of a clip of `height x width` pixels in an engine of whole frames, and its workspace.

    One latent frame goes at a time. While an engine runs there are its input, its output and a
    second copy of its caches; those of the others wait, `host`: in host memory. Decoding, the
    caller has the frames before them, and turns frames into bytes; encoding, latents gather and
    are joined, caches are compared, and what entered an earlier section is kept.
    """
    by_sections = engines.whole is None or (
        engines.sections is not None and (host or side == "encode")
    )
    workspace = engines.sections if by_sections else engines.whole
    assert workspace is not None, f"{engines=}"
    runs = _runs(spec, side, height, width, element)
    if not by_sections:
        caches, largest = sum(run.caches for run in runs), max(run.largest for run in runs)
        runs = [_Run(runs[0].given, runs[-1].made, caches, largest)]
    copies = 2 if host else 1  # of the running section's caches, beside those that wait
    if side == "decode":
        frames = runs[-1].made
        peak = max(run.given + run.made + copies * run.caches for run in runs)
        activations = max(peak + frames, 4 * frames)
    else:
        latents = runs[-1].made * ((num_frames - 1) // spec.temporal_stride + 1)
        peak = earlier = 0
        for i, run in enumerate(runs):
            compared = run.given + run.made + copies * run.caches + run.largest
            peak = max(peak, compared + earlier)
            earlier = max(earlier, run.given) if i else 0
        activations = max(peak + latents, 2 * latents)
    held = sum(run.caches for run in runs)
    renewed = element * max(run.largest for run in runs)  # one at a time
    where = (0, held + renewed) if host else (held, 0)
    return VaeBytes(activations, *where), workspace


def _runs(spec: VaeSpec, side: Side, height: int, width: int, element: int) -> list[_Run]:
    """Of each section. The first input is a copy of what the caller has, the last output fp32."""
    sections = (decoder_sections if side == "decode" else encoder_sections)(spec)
    pixels = (height // spec.spatial_stride) * (width // spec.spatial_stride)
    frames = 3 * spec.temporal_stride * height * width * _FP32
    latents = spec.z_dim * pixels * _FP32
    ends = (latents, frames) if side == "decode" else (frames, latents)
    between = [_entering(section, pixels) * element for section in sections[1:]]
    sizes = [ends[0], *between, ends[1]]
    return [
        _Run(sizes[i], sizes[i + 1], sum(slots) * element, max(slots))
        for i, slots in enumerate(_slots(section, pixels) for section in sections)
    ]


def _entering(section: Section, pixels: int) -> int:
    return section.channels * section.frames * section.scale**2 * pixels


def _slots(section: Section, pixels: int) -> list[int]:
    """Elements of what each convolution remembers."""
    slots = section.slots.values()
    return [slot.channels * slot.frames * slot.scale**2 * pixels for slot in slots]
