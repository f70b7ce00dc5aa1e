"""Thread blocks of one kernel, side by side: each register is an array with one value to a lane.

All lanes take the same instruction at a time. Where they part, those that are furthest behind go
on until they meet again. Several thread blocks run at once, one behind the other in the arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from wanrt.bench.emulator.memory import Array, GlobalMemory, Space, shared_memory
from wanrt.bench.emulator.program import WARP, EmulatorError, Instruction, Program
from wanrt.bench.emulator.traffic import Traffic

_DIGITS = "0123456789"
_WORDS = {1: bool, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_ALIGNED = 128  # bytes: all banks once
_LANES = 4096  # at once: below that Python's own time counts for more than NumPy's
Step = Callable[["Machine"], None]


@dataclass(frozen=True)
class Work:
    """A launch: thread blocks along x, y and z, threads and shared bytes of each, its arguments."""

    grid: tuple[int, int, int]
    threads: int
    shared_size: int
    parameters: dict[str, bytes]
    memory: GlobalMemory

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass
class Machine:
    """The state of the thread blocks that run at once."""

    program: Program
    work: Work
    numbers: range  # of these thread blocks
    shared: Space
    shared_stride: int  # bytes from one thread block's to the next
    traffic: Traffic | None = None
    taking: Instruction | None = None
    registers: dict[str, Array] = field(default_factory=dict)
    active: Array | None = None  # lanes that take the next instruction; None for all
    copies: list[Step] = field(default_factory=list)  # cp.async since the last group was closed
    groups: list[list[Step]] = field(default_factory=list)  # cp.async not waited for

    @property
    def blocks(self) -> int:
        return len(self.numbers)

    @property
    def threads(self) -> int:
        return self.work.threads

    @property
    def lanes(self) -> int:
        return self.blocks * self.threads

    def width(self, name: str) -> int:
        """Bits of a register, which its letters say; 1 of a predicate."""
        return self.program.widths[name.rstrip(_DIGITS)]

    def read(self, name: str) -> Array:
        """A register's bits. Some are read that were never written: nothing depends on them."""
        known = self.registers.get(name)
        if known is not None:
            return known
        bits = self.width(name)
        return np.full(self.lanes, False if bits == 1 else (1 << bits) - 1, _WORDS[bits])

    def write(self, name: str, value: Array) -> None:
        """A result, in the lanes that are active."""
        bits = np.asarray(value)
        bits = bits if bits.dtype == bool else bits.view(f"u{bits.itemsize}")
        bits = np.broadcast_to(bits, (self.lanes,))
        if self.active is not None:
            bits = np.where(self.active, bits, self.read(name))
        self.registers[name] = bits

    def here(self, values: Array) -> Array:
        """Of values `[..., lanes]` those of active lanes."""
        values = np.broadcast_to(values, (*values.shape[:-1], self.lanes))
        return values if self.active is None else values[..., self.active]

    def see(self, space: str, addresses: Array, size: int, among: Array | None = None) -> None:
        """Each lane reaches for so many bytes, or those `among` the active ones that do."""
        if self.traffic is None or self.taking is None:
            return
        active = self.active if among is None else among & (self.active is None or self.active)
        places = np.broadcast_to(addresses, (self.lanes,))
        self.traffic.see(space, self.taking, places, size, active)

    def place_of_block(self) -> Array:
        """Where in shared memory each lane's block begins."""
        return np.repeat(np.arange(self.blocks) * self.shared_stride, self.threads)

    def thread(self) -> Array:
        """Each lane's number within its thread block."""
        return np.tile(np.arange(self.threads, dtype=np.uint32), self.blocks)

    def block(self) -> tuple[Array, Array, Array]:
        """Each lane's thread block, as x, y and z."""
        number = np.repeat(np.array(self.numbers, np.uint32), self.threads)
        x, y, _ = self.work.grid
        return number % x, number // x % y, number // (x * y)


def run(
    program: Program,
    steps: Sequence[Sequence[Step]],
    work: Work,
    numbers: range | None = None,
    traffic: Traffic | None = None,
) -> None:
    """Thread blocks of a launch, all or those of these numbers; `traffic` notes what they access.

    Raises EmulatorError with the instruction at fault.
    """
    numbers = range(work.blocks) if numbers is None else numbers
    stride = -(-work.shared_size // _ALIGNED) * _ALIGNED
    at_once = max(1, _LANES // work.threads)
    for first in range(0, len(numbers), at_once):
        these = numbers[first : first + at_once]
        shared = shared_memory(len(these), stride)
        machine = Machine(program, work, these, shared, stride, traffic)
        with np.errstate(all="ignore"):
            _run_blocks(machine, steps)


def _run_blocks(machine: Machine, steps: Sequence[Sequence[Step]]) -> None:
    """Basic block after basic block; `at` is the one that each lane stands before."""
    program, end = machine.program, len(machine.program.blocks)
    at = np.zeros(machine.lanes, np.int64)
    while (current := int(at.min())) < end:
        here = at == current
        together = bool(here.all())
        machine.active = None if together else here
        instructions = program.blocks[current]
        for instruction, step in zip(instructions, steps[current], strict=True):
            _take(machine, instruction, step, here)
        machine.active = None if together else here
        at = np.where(here, _next(machine, instructions, current, end), at)


def _take(machine: Machine, instruction: Instruction, step: Step, here: Array) -> None:
    """One instruction, in the lanes whose predicate lets it run."""
    if instruction.opcode[0] in ("bra", "ret"):
        return
    together = machine.active
    machine.taking = instruction
    try:
        if instruction.guard is not None:
            allowed = _guard(machine, instruction) & here
            if not allowed.any():
                return
            machine.active = None if allowed.all() else allowed
        if machine.traffic is not None:
            machine.traffic.take(instruction, _warps(machine))
        step(machine)
    except EmulatorError as error:
        at = f"{machine.program.name}, {instruction.source}"
        raise EmulatorError(f"{at}: {error}: {instruction.text}") from error
    finally:
        machine.active = together


def _warps(machine: Machine) -> int:
    if machine.active is None:
        return machine.lanes // WARP
    return int(machine.active.reshape(-1, WARP).any(1).sum())


def _guard(machine: Machine, instruction: Instruction) -> Array:
    assert instruction.guard is not None
    predicate = machine.read(instruction.guard)
    return ~predicate if instruction.negated else predicate


def _next(
    machine: Machine, instructions: tuple[Instruction, ...], current: int, end: int
) -> Array | int:
    """Where each lane goes on: behind the block, at the target of its jump, or nowhere."""
    last = instructions[-1] if instructions else None
    if last is None or last.opcode[0] not in ("bra", "ret"):
        return current + 1
    target = end if last.opcode[0] == "ret" else machine.program.labels[str(last.operands[0])]
    if last.guard is None:
        return target
    return np.where(_guard(machine, last), target, current + 1)
