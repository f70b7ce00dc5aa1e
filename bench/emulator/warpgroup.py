"""`wgmma`, the products of Hopper: four warps multiply matrices that lie in shared memory.

A descriptor says where a matrix begins and how its 8-row pieces follow each other. Within them
16-byte chunks are swizzled: some bits of an address are xored with higher ones.

Source: PTX ISA 9.0, section 9.7.15 (shared memory matrix layout, matrix descriptor).
"""

import re
from typing import NamedTuple

import numpy as np

from wanrt.bench.emulator.machine import Machine, Step
from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.operands import DTYPES, source
from wanrt.bench.emulator.program import WARP, EmulatorError, Instruction, Operand
from wanrt.bench.emulator.tensor_core import numbers, registers, rounded, vector, whole_warps

_GROUP = 4 * WARP
_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # that a swizzle goes over; without one, a chunk
_MIXED = {0: 0, 1: 0b111, 2: 0b011, 3: 0b001}  # bits of a chunk's number that are xored


class _Descriptor(NamedTuple):
    """Of one matrix for each group of warps: bytes, but for `swizzle`."""

    start: Array
    leading: Array
    stride: Array
    swizzle: int


def _multiply(instruction: Instruction) -> Step:
    """D = A B + D, or A B: A is 64 x k, of registers or shared memory; B is k x n, k 32 bytes."""
    if instruction.opcode[1] != "mma_async":
        return lambda machine: None  # results are there at once
    found = next(m for part in instruction.opcode if (m := _SHAPE.fullmatch(part)))
    columns, inner = map(int, found.groups())
    sum_type, a_type, b_type = instruction.opcode[-3:]
    target, a_operand, b_operand, keep, *flags = instruction.operands
    names = vector(target)
    turned = [str(flag) == "1" for flag in flags[2:]]  # after the signs of A and B
    if any(str(flag) != "1" for flag in flags[:2]):
        raise EmulatorError("negated operands of wgmma are not emulated")
    turn_a = len(turned) == 2 and turned[0]
    turn_b = bool(turned) and turned[-1]
    keeps = source(keep, DTYPES["pred"])

    def step(machine: Machine) -> None:
        whole_warps(machine)
        b = _from_shared(machine, b_operand, columns, inner, b_type, turn_b).swapaxes(1, 2)
        if isinstance(a_operand, tuple):
            a = _rows(numbers(registers(machine, a_operand)[..., None], a_type), inner)
        else:
            a = _from_shared(machine, a_operand, 64, inner, a_type, turn_a)
        total = a @ b
        if np.broadcast_to(keeps(machine), (machine.lanes,))[0]:
            total += _sums(numbers(registers(machine, names), sum_type))
        parts = total.reshape(-1, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
        words = rounded(parts.reshape(*parts.shape[:4], -1), sum_type)
        for i, name in enumerate(names):
            machine.write(name, words[..., i].reshape(-1))

    return step


def _rows(parts: Array, inner: int) -> Array:
    """A of registers `[warps, g, t, 4, j]` as `[groups, 64, k]`."""
    parts = parts.reshape(-1, 4, 8, 4, 2, 2, parts.shape[-1])  # groups, warp, g, t, k half, half, j
    return parts.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, 64, inner)


def _sums(parts: Array) -> Array:
    """D of registers `[warps, g, t, n]` as `[groups, 64, columns]`."""
    tiles = parts.shape[-1] // 4
    parts = parts.reshape(-1, 4, 8, 4, tiles, 2, 2)  # groups, warp, g, t, tile, half, j
    return parts.transpose(0, 1, 5, 2, 4, 3, 6).reshape(len(parts), 64, 8 * tiles)


def _from_shared(
    machine: Machine, operand: Operand, rows: int, inner: int, kind: str, turned: bool
) -> Array:
    """A matrix `[groups, rows, k]` by its descriptor; `turned`: rows lie closest together."""
    d = _descriptor(machine, operand)
    size, chunk = 32 // inner, _BYTES[d.swizzle]
    row, k = np.arange(rows)[:, None], np.arange(inner)
    if turned:
        across = chunk // size  # rows side by side
        step, other = (d.stride, d.leading) if d.swizzle == 0 else (d.leading, d.stride)
        offset = row % across * size + k % 8 * chunk
        outer, inner_steps = row // across, k // 8
    else:
        step, other = d.stride, d.leading if d.swizzle == 0 else np.zeros_like(d.leading)
        within = k * size
        offset = row % 8 * chunk + (within % 16 if d.swizzle == 0 else within)
        outer, inner_steps = row // 8, within // 16
    first = machine.place_of_block()[::_GROUP]
    place = d.start[:, None, None] + offset
    place = place + outer * step[:, None, None] + inner_steps * other[:, None, None]
    place = place ^ (place >> 7 & _MIXED[d.swizzle]) << 4
    bits = machine.shared.load((first[:, None, None] + place).reshape(-1), size, 1)
    return numbers(bits.reshape(-1, rows, inner, 1), kind)[..., 0]


def _descriptor(machine: Machine, operand: Operand) -> _Descriptor:
    bits = np.broadcast_to(source(operand, DTYPES["b64"])(machine), (machine.lanes,))[::_GROUP]
    start, leading, stride = ((bits >> np.uint64(s) & np.uint64(0x3FFF)) << np.uint64(4)
                              for s in (0, 16, 32))  # fmt: skip
    swizzle = np.unique(bits >> np.uint64(62))
    if len(swizzle) != 1 or (bits >> np.uint64(49) & np.uint64(7)).any():
        raise EmulatorError("matrix descriptors of this kind are not emulated")
    return _Descriptor(*(x.astype(np.int64) for x in (start, leading, stride)), int(swizzle[0]))


BUILDERS = {"wgmma": _multiply}
