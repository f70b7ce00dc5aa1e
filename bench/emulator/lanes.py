"""What lanes do with each other, and what only a GPU has to wait for.

Source: PTX ISA 9.0, sections 9.7.9.6 and 9.7.13.
"""

import numpy as np

from wanrt.bench.emulator.machine import Machine, Step
from wanrt.bench.emulator.operands import U32, source
from wanrt.bench.emulator.program import WARP, EmulatorError, Instruction


def _shuffle(instruction: Instruction) -> Step:
    """`shfl.sync`: another lane of the warp's value."""
    mode, name = instruction.opcode[2], str(instruction.operands[0])
    value, by, limits = (source(operand, U32) for operand in instruction.operands[1:4])

    def step(machine: Machine) -> None:
        lane = np.arange(machine.lanes) % WARP
        distance, bound = by(machine).astype(np.int64) & 31, limits(machine).astype(np.int64)
        segment, clamp = bound >> 8 & 31, bound & 31
        first, last = lane & segment, lane & segment | clamp & ~segment
        if mode == "up":
            other = np.where(lane - distance >= last, lane - distance, lane)
        elif mode == "idx":
            chosen = first | distance & ~segment
            other = np.where(chosen <= last, chosen, lane)
        else:
            chosen = lane ^ distance if mode == "bfly" else lane + distance
            other = np.where(chosen <= last, chosen, lane)
        values = np.broadcast_to(value(machine), (machine.lanes,))
        machine.write(name, values[np.arange(machine.lanes) - lane + other])

    return step


def _barrier(instruction: Instruction) -> Step:
    """All lanes stand at the same instruction anyway; that a whole thread block does is checked."""

    def step(machine: Machine) -> None:
        if machine.active is None:
            return
        present = machine.active.reshape(machine.blocks, machine.threads)
        if (present.any(1) != present.all(1)).any():
            raise EmulatorError("only a part of a thread block reaches this barrier")

    return step


def _nothing(instruction: Instruction) -> Step:
    return lambda machine: None


BUILDERS = {
    "bar": lambda i: _nothing(i) if i.opcode[1] == "warp" else _barrier(i),
    "bra": _nothing,
    "fence": _nothing,
    "ret": _nothing,
    "shfl": _shuffle,
}
