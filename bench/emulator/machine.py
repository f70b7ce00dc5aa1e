"""Thread blocks of one kernel, side by side: each register is an array with one value to a lane.

All lanes take the same instruction at a time. Where they part, those that are furthest behind go
on until they meet again. Several thread blocks run at once, one behind the other in the arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from wanrt.bench.emulator.memory import Array, GlobalMemory, Space, shared_memory
from wanrt.bench.emulator.program import EmulatorError, Instruction, Program

WARP = 32
_DIGITS = "0123456789"
_WORDS = {1: bool, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_LANES = 4096  # at once: below that Python's own time counts for more than NumPy's
Step = Callable[["Machine"], None]


@dataclass
class Machine:
    """The state of the thread blocks that run at once."""

    program: Program
    grid: tuple[int, int, int]
    threads: int  # of one thread block
    first: int  # the number of the first thread block
    blocks: int  # how many run
    parameters: dict[str, bytes]
    memory: GlobalMemory
    shared: Space
    shared_size: int  # bytes of one thread block
    registers: dict[str, Array] = field(default_factory=dict)
    active: Array | None = None  # lanes that take the next instruction; None for all
    copies: list[Step] = field(default_factory=list)  # cp.async since the last group was closed
    groups: list[list[Step]] = field(default_factory=list)  # cp.async not waited for

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

    def place_of_block(self) -> Array:
        """Where in shared memory each lane's block begins."""
        return np.repeat(np.arange(self.blocks) * self.shared_size, self.threads)

    def thread(self) -> Array:
        """Each lane's number within its thread block."""
        return np.tile(np.arange(self.threads, dtype=np.uint32), self.blocks)

    def block(self) -> tuple[Array, Array, Array]:
        """Each lane's thread block, as x, y and z."""
        number = self.first + np.repeat(np.arange(self.blocks, dtype=np.uint32), self.threads)
        x, y, _ = self.grid
        return number % x, number // x % y, number // (x * y)


def run(
    program: Program,
    steps: Sequence[Sequence[Step]],
    grid: tuple[int, int, int],
    threads: int,
    parameters: dict[str, bytes],
    memory: GlobalMemory,
    shared_size: int,
) -> None:
    """Every thread block of a launch. Raises EmulatorError with the instruction at fault."""
    total, stride = grid[0] * grid[1] * grid[2], -(-shared_size // 128) * 128
    at_once = max(1, _LANES // threads)
    for first in range(0, total, at_once):
        blocks = min(at_once, total - first)
        shared = shared_memory(blocks, stride)
        machine = Machine(program, grid, threads, first, blocks, parameters, memory, shared, stride)
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
    try:
        if instruction.guard is not None:
            allowed = _guard(machine, instruction) & here
            if not allowed.any():
                return
            machine.active = None if allowed.all() else allowed
        step(machine)
    except EmulatorError as error:
        at = f"{machine.program.name}, {instruction.source}"
        raise EmulatorError(f"{at}: {error}: {instruction.text}") from error
    finally:
        machine.active = together


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
