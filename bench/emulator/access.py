"""Loads, stores and asynchronous copies.

Source: PTX ISA 9.0, section 9.7.9.
"""

from collections.abc import Callable

import numpy as np

from wanrt.bench.emulator.machine import Machine, Step
from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.operands import DTYPES, dtype_of, source
from wanrt.bench.emulator.program import Address, EmulatorError, Instruction, Operand


def address_of(operand: Operand, space: str) -> Callable[[Machine], Array]:
    """Reads the address of every lane; in shared memory as a place among all thread blocks."""
    if not isinstance(operand, Address):
        raise EmulatorError(f"{operand} is no address")
    shared = space == "shared"
    base = source(operand.base, DTYPES["u32" if shared else "u64"])

    def read(machine: Machine) -> Array:
        first = base(machine).astype(np.int64) + operand.offset
        return first + machine.place_of_block() if shared else first

    return read


def _shape(instruction: Instruction) -> tuple[str, np.dtype, int]:
    """Space, type and number of the words that an access takes."""
    parts = instruction.opcode
    space = next((part for part in parts if part in ("global", "shared", "param")), "generic")
    if space == "generic":
        raise EmulatorError(f"generic addresses are not emulated: {instruction.text}")
    count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    return space, DTYPES[parts[-1]], count


def _load(instruction: Instruction) -> Step:
    space, dtype, _ = _shape(instruction)
    if space == "param":
        return _load_parameter(instruction)
    names, address = _registers(instruction.operands[0]), address_of(instruction.operands[1], space)

    def step(machine: Machine) -> None:
        memory = machine.shared if space == "shared" else machine.work.memory
        places = address(machine)
        machine.see(space, places, dtype.itemsize * len(names))
        loaded = memory.load(machine.here(places), dtype.itemsize, len(names))
        for name, values in zip(names, loaded.view(dtype), strict=True):
            machine.write(name, _spread(machine, _widened(machine, name, values)))

    return step


def _load_parameter(instruction: Instruction) -> Step:
    address, dtype = instruction.operands[1], dtype_of(instruction, -1)
    name = str(instruction.operands[0])
    assert isinstance(address, Address)

    def step(machine: Machine) -> None:
        stored = machine.work.parameters[address.base]
        value = np.frombuffer(stored, dtype, 1, address.offset)[0]
        bits = machine.width(name)
        wide = np.array(value).astype(f"{dtype.kind}{bits // 8}") if dtype.kind in "iu" else value
        machine.write(name, np.array(wide))

    return step


def _widened(machine: Machine, name: str, values: Array) -> Array:
    """A value in a register that is wider: a signed one carries its sign on."""
    bits = machine.width(name)
    if 8 * values.itemsize == bits:
        return values
    return values.astype(f"{values.dtype.kind}{bits // 8}")


def _spread(machine: Machine, values: Array) -> Array:
    """Values of active lanes, each at its lane."""
    if machine.active is None:
        return values
    spread = np.zeros(machine.lanes, values.dtype)
    spread[machine.active] = values
    return spread


def _store(instruction: Instruction) -> Step:
    space, dtype, _ = _shape(instruction)
    address = address_of(instruction.operands[0], space)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sources = [source(name, unsigned) for name in _registers(instruction.operands[1])]

    def step(machine: Machine) -> None:
        memory = machine.shared if space == "shared" else machine.work.memory
        values = [np.broadcast_to(s(machine), (machine.lanes,)) for s in sources]
        places = address(machine)
        machine.see(space, places, dtype.itemsize * len(sources))
        memory.store(machine.here(places), dtype.itemsize, machine.here(np.stack(values)))

    return step


def _registers(operand: Operand) -> tuple[str, ...]:
    if isinstance(operand, tuple) and not isinstance(operand, Address):
        return operand
    return (str(operand),)


def _copy(instruction: Instruction) -> Step:
    """`cp.async`: written when it is waited for, so that what is read too early is not there."""
    if instruction.opcode[2] == "commit_group":
        return _close_group
    if instruction.opcode[2] == "wait_group":
        return _wait(int(str(instruction.operands[0]), 0))
    target, origin, size, *rest = instruction.operands
    to, from_ = address_of(target, "shared"), address_of(origin, "global")
    whole = int(str(size), 0)
    given = source(rest[0] if rest else str(whole), DTYPES["u32"])

    def step(machine: Machine) -> None:
        sizes = np.broadcast_to(given(machine), (machine.lanes,))
        machine.see("shared", to(machine), whole)
        machine.see("global", from_(machine), whole, sizes == whole)
        places, addresses = (machine.here(x(machine)) for x in (to, from_))
        sizes = machine.here(sizes)
        words = np.zeros((whole // 4, places.size), np.uint32)  # what is not given is zero
        full = sizes == whole
        if (~full & (sizes != 0)).any():
            raise EmulatorError("copies of a part are not emulated")
        words[:, full] = machine.work.memory.load(addresses[full], 4, whole // 4)
        machine.copies.append(lambda later: later.shared.store(places, 4, words))

    return step


def _close_group(machine: Machine) -> None:
    machine.groups.append(machine.copies)
    machine.copies = []


def _wait(pending: int) -> Step:
    """Until at most so many groups are under way."""

    def step(machine: Machine) -> None:
        while len(machine.groups) > pending:
            for copy in machine.groups.pop(0):
                copy(machine)

    return step


BUILDERS = {"cp": _copy, "ld": _load, "st": _store}
