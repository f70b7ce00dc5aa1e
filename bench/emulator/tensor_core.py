"""What a warp does together: matrices between shared memory and registers, and their products.

A lane holds parts of a matrix as the PTX ISA draws them: in rows of eight lanes groups, `g` being
the lane's number divided by four and `t` the rest. Products are added up in fp64 and rounded once
to the type of the sum, as far as one instruction goes; a GPU's own sum may differ in the last bit.

Source: PTX ISA 9.0, sections 9.7.14 (mma, ldmatrix, stmatrix) and 9.7.15 (wgmma).
"""

from collections.abc import Sequence

import numpy as np

from wanrt.bench.emulator.access import address_of
from wanrt.bench.emulator.machine import Machine, Step
from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.operands import U32, source
from wanrt.bench.emulator.program import WARP, EmulatorError, Instruction, Operand
from wanrt.bench.emulator.rounding import from_bf16, from_e4m3

_ROW = 16  # bytes of a row of an 8x8 matrix of 16-bit values


def _load_matrix(instruction: Instruction) -> Step:
    """`ldmatrix`: lanes 0 to 7 give the rows of the first 8x8 matrix, 8 to 15 of the second ..."""
    names, address = vector(instruction.operands[0]), address_of(instruction.operands[1], "shared")
    transposed = "trans" in instruction.opcode

    def step(machine: Machine) -> None:
        whole_warps(machine)
        rows = _rows(machine, address(machine), len(names))  # [warps * matrices * 8]
        _see_rows(machine, address(machine), len(names))
        words = machine.shared.load(rows, 4, _ROW // 4).T
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, len(names), 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        lanes = np.ascontiguousarray(halves).view(np.uint32)  # [warps, matrices, g, t]
        for i, name in enumerate(names):
            machine.write(name, lanes[:, i].reshape(-1))

    return step


def _store_matrix(instruction: Instruction) -> Step:
    """`stmatrix`: the same way back."""
    address, names = address_of(instruction.operands[0], "shared"), vector(instruction.operands[1])
    sources = [source(name, U32) for name in names]
    transposed = "trans" in instruction.opcode

    def step(machine: Machine) -> None:
        whole_warps(machine)
        rows = _rows(machine, address(machine), len(names))
        _see_rows(machine, address(machine), len(names))
        values = [_by_warp(machine, s(machine)).reshape(-1, 8, 4) for s in sources]
        halves = np.stack(values, 1).view(np.uint16)  # [warps, matrices, 8, 8]
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        machine.shared.store(rows, 4, halves.view(np.uint32).reshape(-1, _ROW // 4).T)

    return step


def _rows(machine: Machine, addresses: Array, matrices: int) -> Array:
    return _by_warp(machine, addresses)[:, : 8 * matrices].reshape(-1)


def _see_rows(machine: Machine, addresses: Array, matrices: int) -> None:
    machine.see("shared", addresses, _ROW, np.arange(machine.lanes) % WARP < 8 * matrices)


def _by_warp(machine: Machine, values: Array) -> Array:
    return np.ascontiguousarray(np.broadcast_to(values, (machine.lanes,))).reshape(-1, WARP)


def vector(operand: Operand) -> tuple[str, ...]:
    if not isinstance(operand, tuple):
        raise EmulatorError(f"{operand} is no list of registers")
    return tuple(map(str, operand))


def whole_warps(machine: Machine) -> None:
    """NOTE: warps that take no part compute all the same; `Machine.write` keeps their values."""
    if machine.active is not None:
        present = machine.active.reshape(-1, WARP)
        if (present.any(1) != present.all(1)).any():
            raise EmulatorError("only a part of a warp takes part")


def numbers(bits: Array, kind: str) -> Array:
    """Registers `[..., 32-bit words]` as the numbers in them `[..., numbers]`."""
    bits = np.ascontiguousarray(bits)
    if kind == "bf16":
        return from_bf16(bits.view(np.uint16)).astype(np.float64)
    if kind == "e4m3":
        return from_e4m3(bits.view(np.uint8)).astype(np.float64)
    dtype = {"f16": np.float16, "s8": np.int8, "f32": np.float32, "s32": np.int32}.get(kind)
    if dtype is None:
        raise EmulatorError(f"products of {kind} are not emulated")
    return bits.view(dtype).astype(np.float64)


def rounded(values: Array, kind: str) -> Array:
    """Numbers `[..., n]` rounded to a sum's type, as 32-bit words."""
    if kind == "s32":
        limits = np.iinfo(np.int32)
        rounded = np.clip(values, limits.min, limits.max).astype(np.int32)
    else:
        rounded = values.astype({"f16": np.float16, "f32": np.float32}[kind])
    return np.ascontiguousarray(rounded).view(np.uint32)


def registers(machine: Machine, names: Sequence[str]) -> Array:
    """`[warps, g, t, registers]` as bits."""
    values = [_by_warp(machine, source(name, U32)(machine)) for name in names]
    return np.stack(values, -1).reshape(-1, 8, 4, len(names))


def _multiply(instruction: Instruction) -> Step:
    """`mma.sync` of 16 x k by k x 8, k being 32 bytes: D = A B + C."""
    shape = next(part for part in instruction.opcode if part.startswith("m16"))
    sum_type, a_type, b_type, _ = instruction.opcode[-4:]
    if shape not in ("m16n8k16", "m16n8k32"):
        raise EmulatorError(f"the shape {shape} is not emulated")
    target, a_names, b_names, c_names = map(vector, instruction.operands)

    def step(machine: Machine) -> None:
        """Axes: warp, g, t, `high` (the upper half of rows), `late` (of k), j within 32 bits."""
        whole_warps(machine)
        a = numbers(registers(machine, a_names)[..., None], a_type)  # [warp, g, t, late high, j]
        a = a.reshape(*a.shape[:3], 2, 2, -1).transpose(0, 4, 1, 3, 2, 5)
        b = numbers(registers(machine, b_names)[..., None], b_type)  # [warp, g, t, late, j]
        b = b.transpose(0, 3, 2, 4, 1)
        c = numbers(registers(machine, c_names), sum_type)  # [warp, g, t, high j]
        c = c.reshape(*c.shape[:3], 2, 2).transpose(0, 3, 1, 2, 4)
        warps = len(a)
        total = a.reshape(warps, 16, -1) @ b.reshape(warps, -1, 8) + c.reshape(warps, 16, 8)
        parts = total.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(warps, 8, 4, 4)
        words = rounded(parts, sum_type)
        for i, name in enumerate(target):
            machine.write(name, words[..., i].reshape(-1))

    return step


BUILDERS = {"ldmatrix": _load_matrix, "stmatrix": _store_matrix, "mma": _multiply}
