"""One latent frame's way through a VAE's graphs, and what it leaves behind for the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wanrt.engine.graphs import Graphs
from wanrt.models.vae_layers import CausalState
from wanrt.vae_sections import Range, Section, Slot


class Run(NamedTuple):
    """A graph's name less `.first`, `.step` or `.frame`, its input and output, and its slots."""

    name: str
    given: str
    result: str
    scale: int  # rows of its input for each latent row
    slots: Mapping[int, Slot]
    single: bool = False  # see vae_sections.Section
    times: int = 1  # for each latent frame but a clip's first
    suffix: str = ""  # of its graphs' names

    def graph(self, first: bool) -> str:
        """The name of the one for a clip's first latent frame, or for a later one."""
        when = "frame" if self.single else "first" if first else "step"
        return f"{self.name}.{when}{self.suffix}"


@dataclass(frozen=True)
class Side:
    """The decoder or the encoder; `scale`: rows of what it is given for each latent row."""

    name: str
    given: str
    result: str
    scale: int
    sections: tuple[Section, ...]

    @property
    def num_slots(self) -> int:
        return sum(len(section.slots) for section in self.sections)

    @property
    def whole(self) -> tuple[Run, ...]:
        """One graph."""
        slots = {n: slot for section in self.sections for n, slot in section.slots.items()}
        return (Run(f"vae.{self.name}", self.given, self.result, self.scale, slots),)

    def cut(self, sizes: Range) -> tuple[Run, ...]:
        """A graph of each section, for the sizes of a range."""
        runs = []
        for i, (_, _, times, scale, slots, single) in enumerate(self.sections):
            name, suffix = f"vae.{self.name}.{i}", f".{sizes.name}"
            runs.append(Run(name, "x", "y", scale, slots, single, times, suffix))
        runs[0] = runs[0]._replace(given=self.given, scale=self.scale)
        runs[-1] = runs[-1]._replace(result=self.result)
        return tuple(runs)


class Past:
    """What a clip has left behind, while it changes.

    host: it waits in host memory. reuse: nobody else holds its tensors; the memory of what is
    forgotten serves what comes next.
    """

    def __init__(self, state: CausalState, host: bool, reuse: bool = False) -> None:
        self.slots, self.first = list(state.slots), state.first
        self._host, self._reuse = host, reuse
        self._free: list[Tensor] = []

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any values."""
        for i, x in enumerate(self._free):
            if (x.shape, x.dtype, x.device) == (shape, dtype, device):
                return self._free.pop(i)
        return torch.empty(shape, dtype=dtype, device=device)

    def keep(self, slot: int, frames: Tensor) -> None:
        """Remember frames in place of the older ones."""
        old, self.slots[slot] = self.slots[slot], frames.cpu() if self._host else frames
        spare = old if self.slots[slot] is frames else frames
        if self._reuse and spare is not None:
            self._free.append(spare)

    def state(self) -> CausalState:
        return CausalState(tuple(self.slots), self.first)


class Start(NamedTuple):
    """The leg that the same input need be given to first, and what it takes then."""

    leg: int = 0
    x: Tensor | None = None


class Way:
    """Graphs, one after the other, and the weights that they take as inputs.

    A leg is one graph, or several through which one frame goes before the next.
    """

    def __init__(
        self,
        graphs: Graphs,
        runs: tuple[Run, ...],
        weights: Mapping[str, Tensor],
        still: bool = False,
    ) -> None:
        """still: see WanVAE.encode; costs a comparison of each graph's past."""
        self._graphs, self._weights, self._still = graphs, weights, still
        self._legs = _legs(runs)
        self._start = Start()

    @property
    def in_one(self) -> bool:
        """One graph does it all, so that what is kept goes to and fro between two places."""
        return [len(leg) for leg in self._legs] == [1]

    def __call__(self, x: Tensor, past: Past, same: bool = False) -> Tensor:
        """What a latent frame stands for, or the other way round; changes the past.

        same: x equals the x before; legs whose past has not changed since are not run again.
        """
        if not same:
            self._start = Start(0, x)
        first, y = self._start
        settled = self._still and not past.first
        for i, leg in enumerate(self._legs[first:], first):
            apart = leg[0].times > 1
            frames = [frame.contiguous() for frame in y.split(1, 2)] if apart else [y]
            del y  # what it is cut into is let go of frame by frame
            y, unchanged = self._leg(leg, frames, past, settled)
            settled = settled and unchanged
            if settled:
                self._start = Start(i + 1, y)
        past.first = False
        return y

    def _leg(
        self, leg: tuple[Run, ...], frames: list[Tensor], past: Past, compare: bool
    ) -> tuple[Tensor, bool]:
        """Its result, and whether its past is what it was (False unless compared)."""
        made: list[Tensor] = []
        unchanged = compare
        while frames:
            x = frames.pop(0)
            for run in leg:
                x, same = self._run(run, x, past, compare)
                unchanged = unchanged and same
            made.append(x)
        return torch.cat(made, dim=2) if len(made) > 1 else made[0], unchanged

    def _run(self, run: Run, x: Tensor, past: Past, compare: bool) -> tuple[Tensor, bool]:
        """The graph's result, and whether its past is what it was (False unless compared)."""
        runner = self._graphs.get(run.graph(past.first))
        size = [side // run.scale for side in x.shape[3:]]
        given = {name: w for name, w in self._weights.items() if name in runner.inputs}
        given[run.given] = x.to(runner.inputs[run.given])
        rooms: dict[str, Tensor] = {}
        for number, slot in run.slots.items():
            shape = (1, slot.channels, slot.frames, *(side * slot.scale for side in size))
            cache, kept = f"cache.{number}", f"kept.{number}"
            if cache in runner.inputs:
                given[cache] = _or_zeros(past.slots[number], shape, runner.inputs[cache], x.device)
            if kept in runner.outputs:
                rooms[kept] = past.room(shape, runner.outputs[kept], x.device)
        made = runner(given, rooms)
        unchanged = compare and all(
            equal(given[f"cache.{number}"], made[f"kept.{number}"]) for number in run.slots
        )
        for number in run.slots:
            if f"kept.{number}" in made:
                past.keep(number, made[f"kept.{number}"])
        return made[run.result], unchanged


def _legs(runs: tuple[Run, ...]) -> list[tuple[Run, ...]]:
    """Those that go frame by frame belong together where they follow each other."""
    legs: list[tuple[Run, ...]] = []
    for run in runs:
        joins = legs and run.times > 1 and legs[-1][-1].times > 1
        if joins:
            legs[-1] += (run,)
        else:
            legs.append((run,))
    return legs


def equal(a: Tensor, b: Tensor) -> bool:
    """To the bit; NaN equals nothing."""
    return a.shape == b.shape and torch.equal(a, b)


def _or_zeros(
    frames: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a slot remembers; zeros where it remembers nothing, as before a clip."""
    if frames is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return frames.to(device)
