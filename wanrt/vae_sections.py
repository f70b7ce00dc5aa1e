"""The sections of the Wan VAEs that graphs are made of, what each remembers, and for which sizes.

Layers that change no rate in time, at the full one, take one frame at a time and are cut at every
residual block: the caches of one block are all that need be there twice. The others take what
belongs to a latent frame, and are cut where the size changes.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from wanrt.config import VaeSpec
from wanrt.vae_shapes import Stage, decoder_stages, encoder_stages


class Range(NamedTuple):
    """The sizes that an engine of a section takes: up to so many pixels."""

    name: str
    height: int
    width: int

    def covers(self, height: int, width: int) -> bool:
        return height <= self.height and width <= self.width


# The narrowest first. An engine's memory is that of its largest size, and the released models make
# 1280x720 either way round, or as many pixels in another shape.
RANGES = (Range("wide", 720, 1280), Range("tall", 1280, 720), Range("any", 1280, 1280))


class Slot(NamedTuple):
    """What one causal convolution remembers: `[B, channels, frames, scale * h, scale * w]`."""

    channels: int
    frames: int
    scale: int  # for latents [h, w]
    late: bool = False  # it remembers nothing of a clip's first frame


class Section(NamedTuple):
    """Layers of a decoder or encoder that follow each other, and what enters them.

    single: one frame enters and one leaves, the first of a clip like any other. What else there is
    takes one frame at a clip's start and `frames` later.
    """

    channels: int
    frames: int  # at once
    times: int  # for each latent frame but a clip's first
    scale: int  # rows for each latent row
    slots: dict[int, Slot]  # by their number in the state
    single: bool

    @property
    def graphs(self) -> tuple[str, ...]:
        """What its graphs are called behind its number."""
        return ("frame",) if self.single else ("first", "step")


class _Group(NamedTuple):
    """Layers of a section, before their slots have numbers."""

    channels: int
    slots: list[Slot]
    scale: int
    frames: int  # for each latent frame but a clip's first
    alone: bool  # each frame for itself
    changes: bool = False  # the rate of frames


def decoder_sections(spec: VaeSpec) -> tuple[Section, ...]:
    """The layers up to the mid-block, then those of each stage; the last one has the head."""
    return _numbered(_decoder_groups(spec))


def encoder_sections(spec: VaeSpec) -> tuple[Section, ...]:
    """The layers of each stage, the first with the layer before it, then the mid-block and head."""
    return _numbered(_encoder_groups(spec))


def _decoder_groups(spec: VaeSpec) -> Iterator[_Group]:
    """The last doubling of the frames ends a section; that of the sides, unless a shortcut leads
    past both, belongs to the next."""
    stages = decoder_stages(spec)
    width = stages[0].widths[0]
    yield _Group(spec.z_dim, [Slot(spec.z_dim, 2, 1), *[Slot(width, 2, 1)] * 4], 1, 1, False)
    last = max((i for i, stage in enumerate(stages) if stage.mode == "upsample3d"), default=-1)
    frames, scale = 1, 1
    given: tuple[int, int] | None = None  # channels and scale of what enters before a doubling
    for i, stage in enumerate(stages):
        doubles = stage.mode == "upsample3d"
        groups = _blocks(stage, scale, apart=i > last and not (spec.residual and stage.mode))
        if doubles:
            groups[-1][1].append(Slot(stage.widths[-1], 2, scale, late=True))
        if stage is stages[-1]:
            groups.append((stage.out, [Slot(stage.out, 2, scale)]))
        for channels, slots in groups:
            entering = given or (channels, scale)
            yield _Group(entering[0], slots, entering[1], frames, i > last, doubles)
            given = None
        if i == last and not spec.residual:
            given = stage.widths[-1], scale
        frames *= 2 if doubles else 1
        scale *= 2 if stage.mode else 1


def _encoder_groups(spec: VaeSpec) -> Iterator[_Group]:
    """Where a stage changes the rate, what comes before the change takes frames one by one, too,
    unless a shortcut leads past it."""
    stages = encoder_stages(spec)
    modes = [stage.mode for stage in stages]
    change = modes.index("downsample3d") if "downsample3d" in modes else len(stages)
    frames, scale = spec.temporal_stride, spec.spatial_stride // spec.patch
    for i, stage in enumerate(stages):
        alone = i <= change and not (spec.residual and i == change)
        groups = _blocks(stage, scale, apart=alone and not spec.residual)
        if i == 0:
            channels = 3 * spec.patch**2
            groups[0] = (channels, [Slot(channels, 2, scale), *groups[0][1]])
        halved = stage.mode == "downsample3d"
        if halved:
            slot = Slot(stage.out, 1, scale // 2)
            if alone:
                groups.append((stage.widths[-1], [slot]))
            else:
                groups[-1][1].append(slot)
        for channels, slots in groups:
            changes = halved and slots is groups[-1][1]
            yield _Group(channels, slots, scale, frames, alone and not changes, changes)
        frames //= 2 if halved else 1
        scale //= 2 if stage.mode else 1
    yield _Group(stages[-1].out, [Slot(stages[-1].out, 2, scale)] * 5, scale, frames, False)


def _blocks(stage: Stage, scale: int, apart: bool) -> list[tuple[int, list[Slot]]]:
    """What enters the residual blocks of a stage and what they remember: of each, or of all."""
    each = [(given, [Slot(given, 2, scale), Slot(made, 2, scale)]) for given, made in stage.blocks]
    if apart:
        return each
    return [(stage.widths[0], [slot for _, slots in each for slot in slots])]


def _numbered(groups: Iterable[_Group]) -> tuple[Section, ...]:
    sections, count = [], 0
    for group in groups:
        slots = dict(enumerate(group.slots, count))
        single = not group.changes and (group.alone or group.frames == 1)
        frames, times = (1, group.frames) if single else (group.frames, 1)
        sections.append(Section(group.channels, frames, times, group.scale, slots, single))
        count += len(slots)
    return tuple(sections)
