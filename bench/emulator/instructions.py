"""Every instruction that is emulated."""

from functools import cache

from wanrt.bench.emulator import access, arithmetic, convert, lanes, tensor_core, warpgroup
from wanrt.bench.emulator.machine import Step
from wanrt.bench.emulator.program import EmulatorError, Instruction, Program, parse

_FAMILIES = (access, arithmetic, convert, lanes, tensor_core, warpgroup)
_BUILDERS = {name: build for family in _FAMILIES for name, build in family.BUILDERS.items()}


@cache
def load(ptx: str) -> tuple[Program, list[list[Step]]]:
    """A kernel's program, each instruction made ready to be taken."""
    program = parse(ptx)
    return program, [[_step(instruction) for instruction in block] for block in program.blocks]


def _step(instruction: Instruction) -> Step:
    build = _BUILDERS.get(instruction.opcode[0])
    if build is None:
        raise EmulatorError(f"{instruction.source}: not emulated: {instruction.text}")
    return build(instruction)
