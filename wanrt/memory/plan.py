"""Before a byte is loaded: what each phase of a request will hold on the device, and what streams.

`make_plan` is a pure function of numbers. Its answer fits the budget, or BudgetError says what
would. Times are estimates; they only choose between placements.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from wanrt.config import VaeWork, WanSpec
from wanrt.errors import BudgetError
from wanrt.memory.budget import GIB, gib
from wanrt.memory.dit_bytes import FORMATS
from wanrt.memory.phases import (
    Option,
    clip_options,
    decode_options,
    dit_options,
    encode_options,
    text_options,
)
from wanrt.memory.placement import TYPICAL, Ask, Guidance, Machine, Phase, Placement

_STEP_DOWN = 0.85  # of what did not fit, what is tried next
HOST_FIXED = 2 * GIB  # interpreter, libraries, frames on their way to the file


@dataclass(frozen=True)
class Plan:
    """Where everything of a request will be. Peaks are bytes on the device, `fixed` included."""

    model: str
    precision: str
    ask: Ask
    budget: int | None
    ram: int | None  # budget of host memory
    machine: Machine
    keep: bool  # every part fits beside the others and stays for the next request
    options: dict[str, Option]  # by phase: text, image, encode, step, decode

    @property
    def fixed(self) -> int:
        """What the process holds on the device beside all tensors."""
        return self.machine.fixed

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(option.phase for option in self.options.values())

    @property
    def peak(self) -> int:
        """The most at any time; parts that are kept are there in every phase."""
        if not self.keep:
            return self.fixed + max(phase.peak for phase in self.phases)
        return self.fixed + _together(self.phases)

    @property
    def pinned(self) -> int:
        """Host memory pinned at one time, bytes: parts come one after the other."""
        return max(o.placement.pinned for o in self.options.values() if o.placement)

    def placement(self, phase: str) -> Placement:
        """Of the part that a phase runs: `text`, `image` or `step`."""
        placement = self.options[phase].placement
        assert placement is not None, f"{phase=}"
        return placement

    def work(self, phase: str) -> VaeWork:
        """How the VAE goes about `encode` or `decode`."""
        work = self.options[phase].work
        assert work is not None, f"{phase=}"
        return work

    @property
    def guidance(self) -> Guidance:
        return self.options["step"].guidance


@dataclass(frozen=True)
class _Question:
    """All that a plan is made for, but the budget of the device."""

    spec: WanSpec
    ask: Ask
    precision: str
    ram: int | None
    machine: Machine

    @cached_property
    def phases(self) -> dict[str, list[Option]]:
        """The phases of the request in their order, each with every way to run it."""
        spec, ask, machine = self.spec, self.ask, self.machine
        form = FORMATS[self.precision]
        pinned_room = None if self.ram is None else max(0, self.ram - HOST_FIXED)
        phases = {}
        if ask.encodes_text:
            phases["text"] = list(text_options(spec, ask, form, machine))
        if spec.clip is not None and ask.image:
            phases["image"] = list(clip_options(spec, form, machine))
        if ask.image:
            phases["encode"] = list(encode_options(spec, ask, form, machine))
        phases["step"] = list(dit_options(spec, ask, form, machine, pinned_room))
        if ask.decodes:
            phases["decode"] = list(decode_options(spec, ask, form, machine))
        return phases

    def best(self, budget: int | None) -> dict[str, Option] | str:
        """Of each phase the fastest option that fits; else the name of the first without one."""
        room = math.inf if budget is None else budget - self.machine.fixed
        chosen = {}
        for name, options in self.phases.items():
            fitting = [option for option in options if option.phase.peak <= room]
            if not fitting:
                return name
            chosen[name] = min(fitting, key=_preference)
        return chosen

    def least(self) -> int:
        """Bytes below which nothing is left to stream, cut or chunk."""
        leasts = (min(o.phase.peak for o in options) for options in self.phases.values())
        return self.machine.fixed + max(leasts)


def make_plan(
    spec: WanSpec,
    ask: Ask,
    precision: str = "bf16",
    budget: int | None = None,
    ram: int | None = None,
    machine: Machine = TYPICAL,
) -> Plan:
    """The fastest plan within `budget` bytes on the device and `ram` bytes of host memory.

    budget None: everything stays on the device. Raises BudgetError with the smallest budget that
    would do and the longest video that this one allows.
    """
    question = _Question(spec, ask, precision, ram, machine)
    options = question.best(budget)
    if isinstance(options, str):
        assert budget is not None
        raise BudgetError(_advice(question, budget, options))
    whole = question.best(None)
    assert not isinstance(whole, str), f"{whole=}"
    needed = machine.fixed + _together(tuple(option.phase for option in whole.values()))
    keep = spec.boundary is None and (budget is None or needed <= budget)
    chosen = whole if keep else options
    return Plan(spec.id, precision, ask, budget, ram, machine, keep, chosen)


def smallest_budget(
    spec: WanSpec, ask: Ask, precision: str, ram: int | None, machine: Machine = TYPICAL
) -> int:
    """Bytes that the thriftiest plan needs."""
    return _Question(spec, ask, precision, ram, machine).least()


def step_down(spec: WanSpec, plan: Plan, phase: str) -> Plan:
    """The next plan to try: without the parts that are kept, then with less for this one phase.

    Raises BudgetError where the phase already holds the least it can.
    """
    if plan.keep:
        return replace(plan, keep=False)
    now = plan.options[phase].phase.peak
    question = _Question(spec, plan.ask, plan.precision, plan.ram, plan.machine)
    less = [option for option in question.phases[phase] if option.phase.peak < now]
    if not less:
        raise BudgetError(
            f"memory ran out ({phase}), which holds {gib(plan.fixed + now)} and cannot do with "
            "less; close other programs, or ask for fewer --frames or a smaller --size"
        )
    enough = [option for option in less if option.phase.peak <= _STEP_DOWN * now]
    chosen = min(enough or less, key=lambda o: o.phase.seconds if enough else o.phase.peak)
    return replace(plan, keep=False, options={**plan.options, phase: chosen})


def _preference(option: Option) -> tuple[float, int]:
    """The faster; of equals, the one with more blocks in place, or (no blocks twice) the smaller.

    Estimates may be wrong: what stays needs no copy. An encoder's blocks are needed only once.
    """
    phase = option.phase
    return phase.seconds, -phase.weights if phase.name == "step" else phase.peak


def _together(phases: tuple[Phase, ...]) -> int:
    """Peak where no part goes before the next one comes. The VAE is one part of two phases."""
    parts = {"vae" if p.name in ("encode", "decode") else p.name: p.weights for p in phases}
    return sum(parts.values()) + max(phase.peak - phase.weights for phase in phases)


def _advice(question: _Question, budget: int, phase: str) -> str:
    """What does not fit, and what would."""
    ask = question.ask
    asked = f"{ask.width}x{ask.height}, {ask.num_frames} frames"
    text = f"{question.spec.title} at {asked} in {question.precision} does not fit {gib(budget)}"
    remedies = [f"--vram {math.ceil(100 * question.least() / GIB) / 100}G"]

    def fits(frames: int) -> bool:
        shorter = replace(question, ask=replace(ask, num_frames=frames))
        return not isinstance(shorter.best(budget), str)

    longest = _longest(ask.num_frames, fits)
    if longest:
        remedies.append(f"--frames {longest}")
    return f"{text} ({phase}); what would: {' or '.join(remedies)}"


def _longest(frames: int, fits: Callable[[int], bool]) -> int | None:
    """The largest 4n+1 below `frames` that fits, by halving; None where not even one does."""
    low, high = 0, (frames - 1) // 4
    if not fits(1):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(4 * middle + 1) else (low, middle)
    return 4 * low + 1
