"""What a VAE holds on the device where engines code: sums over its sections, nothing is run.

`engine/vae.py` is what runs so; a test holds these sums against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from wanrt.config import VaeSpec
from wanrt.memory.vae_bytes import VaeBytes
from wanrt.vae_sections import RANGES, Section, decoder_sections, encoder_sections

_FP32 = 4
Side = Literal["encode", "decode"]


@dataclass(frozen=True)
class VaeEngines:
    """Workspaces of a decoder's or encoder's engines, bytes.

    sections: by the range of sizes that a complete set of them takes, where a clip goes section by
    section. whole: of the engines of whole steps, None where there are none.
    """

    sections: Mapping[str, int] = field(default_factory=dict)
    whole: int | None = None

    def of(self, height: int, width: int) -> "VaeEngines":
        """Those for so many pixels: of sections, the narrowest range."""
        fitting = (r.name for r in RANGES if r.covers(height, width) and r.name in self.sections)
        return VaeEngines({name: self.sections[name] for name in [*fitting][:1]}, self.whole)

    def __bool__(self) -> bool:
        return bool(self.sections) or self.whole is not None


class Coded(NamedTuple):
    """What a clip takes in engines, bytes. moved: from the host for each latent frame, and back."""

    need: VaeBytes
    workspace: int
    moved: int


class _Run(NamedTuple):
    """Bytes of one engine's input, output and caches; elements of the largest cache."""

    given: int
    made: int
    caches: int
    largest: int
    times: int = 1  # for each latent frame


class _Leg(NamedTuple):
    """Engines through which one frame goes before the next, see `engine.vae_way.Way`."""

    runs: list[_Run]

    @property
    def given(self) -> int:
        """Bytes of what enters for a latent frame."""
        return self.runs[0].given * self.runs[0].times

    @property
    def made(self) -> int:
        return self.runs[-1].made * self.runs[-1].times

    def peak(self, copies: int, compares: bool) -> int:
        """The most beside the caches that wait; frames wait before and behind the engines."""
        times = self.runs[0].times
        waiting = max(self.given, self.made) * (times - 1) // times
        running = max(
            run.given + run.made + copies * run.caches + compares * run.largest for run in self.runs
        )
        cut = 2 * max(self.given, self.made) if times > 1 else 0
        return max(running + waiting, cut)


def coder_bytes(
    spec: VaeSpec,
    side: Side,
    height: int,
    width: int,
    num_frames: int,
    element: int,
    host: bool,
    engines: VaeEngines,
) -> Coded:
    """Of a clip of `height x width` pixels in engines of that size (`VaeEngines.of`).

    One latent frame goes at a time. While an engine runs there are its input, its output and a
    second copy of its caches; those of the others wait, `host`: in host memory. Decoding, the
    caller has the frames before them, and turns frames into bytes; encoding, latents gather and
    are joined, caches are compared, and what entered an earlier section is kept.
    """
    cut = bool(engines.sections) and (engines.whole is None or host or side == "encode")
    runs = _runs(spec, side, height, width, element)
    held = sum(run.caches for run in runs)
    largest = max(run.largest for run in runs)
    legs = _legs(runs)
    workspace = min(engines.sections.values()) if cut else engines.whole
    assert workspace is not None, f"{engines=}"
    legs = legs if cut else [_Leg([_Run(legs[0].given, legs[-1].made, held, largest)])]
    copies = 2 if host else 1  # of the running section's caches, beside those that wait
    if side == "decode":
        frames = legs[-1].made
        peak = max(leg.peak(copies, compares=False) for leg in legs)
        activations = max(peak + frames, 4 * frames)
    else:
        latents = legs[-1].made * ((num_frames - 1) // spec.temporal_stride + 1)
        peak = earlier = 0
        for i, leg in enumerate(legs):
            peak = max(peak, leg.peak(copies, compares=True) + earlier)
            earlier = max(earlier, leg.given) if i else 0
        activations = max(peak + latents, 2 * latents)
    where = (0, held + element * largest) if host else (held, 0)  # renewed one at a time
    moved = sum(run.caches * run.times for leg in legs for run in leg.runs) if host else 0
    return Coded(VaeBytes(activations, *where), workspace, moved)


def _runs(spec: VaeSpec, side: Side, height: int, width: int, element: int) -> list[_Run]:
    """Of each section. The first input is a copy of what the caller has, the last output fp32."""
    sections = (decoder_sections if side == "decode" else encoder_sections)(spec)
    pixels = (height // spec.spatial_stride) * (width // spec.spatial_stride)
    frames = 3 * spec.temporal_stride * height * width * _FP32
    latents = spec.z_dim * pixels * _FP32
    ends = (latents, frames) if side == "decode" else (frames, latents)
    between = [_entering(section, pixels) * element for section in sections[1:]]
    sizes = [ends[0], *between, ends[1]]
    runs = []
    for i, section in enumerate(sections):
        slots, times = _slots(section, pixels), section.times
        ends = sizes[i] // times, sizes[i + 1] // times
        runs.append(_Run(*ends, sum(slots) * element, max(slots), times))
    return runs


def _legs(runs: list[_Run]) -> list[_Leg]:
    legs: list[_Leg] = []
    for run in runs:
        if legs and run.times > 1 and legs[-1].runs[-1].times > 1:
            legs[-1].runs.append(run)
        else:
            legs.append(_Leg([run]))
    return legs


def _entering(section: Section, pixels: int) -> int:
    """Elements, for a latent frame."""
    frames = section.frames * section.times
    return section.channels * frames * section.scale**2 * pixels


def _slots(section: Section, pixels: int) -> list[int]:
    """Elements of what each convolution remembers."""
    slots = section.slots.values()
    return [slot.channels * slot.frames * slot.scale**2 * pixels for slot in slots]
