"""What a plan is made for, and the way to run each phase that fits: the sums behind `plan.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from wanrt.config import WanSpec
from wanrt.memory.budget import HOST_FIXED, enough, gib
from wanrt.memory.dit_bytes import FORMATS
from wanrt.memory.engine_bytes import NATIVE, EngineBytes
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.memory.phases import (
    Option,
    clip_options,
    decode_options,
    dit_options,
    encode_options,
    text_options,
)
from wanrt.memory.placement import TYPICAL, Ask, Machine
from wanrt.memory.vae_formats import VaeFormat


@dataclass(frozen=True)
class Lessons:
    """What refusals of memory have taught: every later plan of the same pipeline keeps to it.

    most: bytes on the device that a phase may hold, by its name. Where no way to run it keeps to
    that, because more is asked now, the thriftiest one is taken.
    """

    apart: bool = False  # no part stays for the next phase
    most: dict[str, int] = field(default_factory=dict)

    def merged(self, other: "Lessons") -> "Lessons":
        """Both."""
        most = dict(self.most)
        for phase, num_bytes in other.most.items():
            most[phase] = min(num_bytes, most.get(phase, num_bytes))
        return Lessons(self.apart or other.apart, most)


@dataclass(frozen=True)
class Question:
    """All that a plan is made for, but the budget of the device. Sizes are bytes."""

    spec: WanSpec
    ask: Ask
    precision: str = "bf16"
    ram: int | None = None  # budget of host memory
    machine: Machine = TYPICAL
    packed: PackedWeights | None = None  # of a GGUF file, a transformer
    engines: EngineBytes = NATIVE
    packed_text: PackedWeights | None = None  # a text encoder
    vae: VaeFormat | None = None  # None: the usual one

    @property
    def vae_format(self) -> VaeFormat:
        return self.vae or self.machine.usual_vae(FORMATS[self.precision])

    @cached_property
    def phases(self) -> dict[str, list[Option]]:
        """The phases of the request in their order, each with the ways that host memory allows."""
        if self.room is None:
            return self._every
        room = self.room
        return {
            name: [option for option in options if option.phase.host <= room]
            for name, options in self._every.items()
        }

    @cached_property
    def _every(self) -> dict[str, list[Option]]:
        spec, ask, machine, engines = self.spec, self.ask, self.machine, self.engines
        form = FORMATS[self.precision]
        phases = {}
        if ask.encodes_text:
            text = text_options(spec, ask, form, machine, engines, self.packed_text)
            phases["text"] = list(text)
        if spec.clip is not None and ask.image:
            phases["image"] = list(clip_options(spec, form, machine, engines))
        if ask.image:
            phases["encode"] = list(encode_options(spec, ask, machine, self.vae_format, engines))
        steps = dit_options(spec, ask, form, machine, self.room, self.packed, engines)
        phases["step"] = list(steps)
        if ask.decodes:
            phases["decode"] = list(decode_options(spec, ask, machine, self.vae_format, engines))
        return phases

    @property
    def room(self) -> int | None:
        """Host memory for blocks that wait, staging buffers and caches."""
        return None if self.ram is None else max(0, self.ram - HOST_FIXED)

    def best(self, budget: int | None, lessons: Lessons | None = None) -> dict[str, Option] | str:
        """Of each phase the fastest option that fits; else the name of the first without one."""
        room = math.inf if budget is None else budget - self.machine.fixed
        limits, chosen = Lessons() if lessons is None else lessons, {}
        for name, options in self.phases.items():
            fitting = [option for option in options if option.phase.peak <= room]
            if not fitting:
                return name
            most = max(limits.most.get(name, math.inf), min(o.phase.peak for o in fitting))
            chosen[name] = min((o for o in fitting if o.phase.peak <= most), key=_preference)
        return chosen

    def least(self) -> int:
        """Bytes below which nothing is left to stream, cut or chunk."""
        leasts = (min(o.phase.peak for o in options) for options in self.phases.values())
        return self.machine.fixed + max(leasts)

    def least_resident(self) -> int:
        """Bytes below which blocks of the transformer stream."""
        whole = (o for o in self.phases["step"] if o.placement and not o.placement.slots)
        return max(self.least(), self.machine.fixed + min(o.phase.peak for o in whole))

    def advice(self, budget: int, phase: str) -> str:
        """What does not fit, and what would."""
        ask = self.ask
        asked = f"{ask.width}x{ask.height}, {ask.num_frames} frames"
        text = f"{self.spec.title} at {asked} in {self.precision} does not fit {gib(budget)}"
        remedies = [f"--vram {enough(self.least())}"]
        ram = self._enough_ram(budget, phase)
        if ram is not None:
            text += f" beside {gib(self.ram or 0)} of host memory"
            remedies.append(f"--ram {enough(ram)}")

        def fits(frames: int) -> bool:
            shorter = replace(self, ask=replace(ask, num_frames=frames))
            return not isinstance(shorter.best(budget), str)

        longest = _longest(ask.num_frames, fits)
        if longest:
            remedies.append(f"--frames {longest}")
        return f"{text} ({phase}); what would: {' or '.join(remedies)}"

    def _enough_ram(self, budget: int, phase: str) -> int | None:
        """Host memory with which some text would fit; None where more of it does not help."""
        if self.room is None:
            return None
        short = replace(self, ram=HOST_FIXED, ask=replace(self.ask, text_rows=1))
        options = short._every[phase]  # no block waits in memory
        hosts = [o.phase.host for o in options if o.phase.peak <= budget - self.machine.fixed]
        return HOST_FIXED + min(hosts) if hosts and min(hosts) > self.room else None


def _preference(option: Option) -> tuple[float, int]:
    """The faster; of equals, the one with more blocks in place, or (no blocks twice) the smaller.

    Estimates may be wrong: what stays needs no copy. An encoder's blocks are needed only once.
    """
    phase = option.phase
    return phase.seconds, -phase.weights if phase.name == "step" else phase.peak


def _longest(frames: int, fits: Callable[[int], bool]) -> int | None:
    """The largest 4n+1 below `frames` that fits, by halving; None where not even one does."""
    low, high = 0, (frames - 1) // 4
    if not fits(1):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(4 * middle + 1) else (low, middle)
    return 4 * low + 1
