"""Moves and conversions: `mov`, which also packs and unpacks registers, and `cvt`.

Source: PTX ISA 9.0, sections 9.7.9.2 and 9.7.9.21.
"""

import numpy as np

from wanrt.bench.emulator.machine import Machine, Step
from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.operands import DTYPES, dtype_of, source
from wanrt.bench.emulator.program import Instruction, Operand
from wanrt.bench.emulator.rounding import from_bf16, from_e4m3, to_bf16, to_e4m3, to_fp16


def _move(instruction: Instruction) -> Step:
    target, value = instruction.operands
    dtype = dtype_of(instruction, -1)
    if isinstance(value, tuple):
        return _pack(str(target), value, dtype)
    if isinstance(target, tuple):
        return _unpack(target, value, dtype)
    name, read = str(target), source(value, dtype)
    return lambda machine: machine.write(name, read(machine))


def _pack(name: str, parts: tuple[str, ...], dtype: np.dtype) -> Step:
    narrow = np.dtype(f"u{dtype.itemsize // len(parts)}")
    sources = [source(part, narrow) for part in parts]

    def step(machine: Machine) -> None:
        values = np.broadcast_arrays(*(s(machine) for s in sources))
        machine.write(name, np.stack(values, -1).view(dtype)[..., 0])

    return step


def _unpack(names: tuple[str, ...], value: Operand, dtype: np.dtype) -> Step:
    narrow, read = np.dtype(f"u{dtype.itemsize // len(names)}"), source(value, dtype)

    def step(machine: Machine) -> None:
        whole = np.ascontiguousarray(np.broadcast_to(read(machine), (machine.lanes,)))
        for name, part in zip(names, whole[:, None].view(narrow).T, strict=True):
            if name != "_":
                machine.write(name, np.ascontiguousarray(part))

    return step


def _convert(instruction: Instruction) -> Step:
    """`cvt`: from the last type of its name to the one before, rounding as it says."""
    *modes, to, from_ = instruction.opcode[1:]
    name, operands = str(instruction.operands[0]), instruction.operands[1:]
    if to in _PACKED:
        return _convert_pair(name, operands, to, from_)
    read = source(operands[0], DTYPES["b16" if from_ == "bf16" else from_])

    def step(machine: Machine) -> None:
        x = read(machine)
        x = from_bf16(x) if from_ == "bf16" else x
        result = to_bf16(x) if to == "bf16" else _converted(x, DTYPES[to], modes)
        bits = machine.width(name)
        if result.dtype.kind in "iu" and 8 * result.itemsize != bits:
            result = result.astype(f"{result.dtype.kind}{bits // 8}")  # carries the sign on
        machine.write(name, result)

    return step


_PACKED = {
    "bf16x2": to_bf16,
    "f16x2": lambda x: to_fp16(x, "rn").view(np.uint16),
    "e4m3x2": to_e4m3,
}


def _convert_pair(name: str, operands: tuple[Operand, ...], to: str, from_: str) -> Step:
    """Two values into one register, the first into its upper half."""
    if from_ == "e4m3x2":
        read_bytes = source(operands[0], DTYPES["b16"])
        return lambda machine: machine.write(name, _widened(read_bytes(machine)))
    convert = _PACKED[to]
    if from_ == "f16x2":
        packed = source(operands[0], DTYPES["b32"])

        def both(machine: Machine) -> list[Array]:
            halves = np.ascontiguousarray(packed(machine))[..., None].view(np.float16)
            return [halves[..., 0].astype(np.float32), halves[..., 1].astype(np.float32)]
    else:
        high, low = (source(operand, DTYPES[from_]) for operand in operands)

        def both(machine: Machine) -> list[Array]:
            return [low(machine), high(machine)]

    def step(machine: Machine) -> None:
        parts = np.broadcast_arrays(*map(convert, both(machine)))
        wide = f"u{2 * parts[0].itemsize}"
        machine.write(name, np.stack(parts, -1).view(wide)[..., 0])

    return step


def _widened(pair: Array) -> Array:
    """Two of e4m3 as two of fp16."""
    halves = from_e4m3(np.ascontiguousarray(pair)[..., None].view(np.uint8)).astype(np.float16)
    return halves.view(np.uint32)[..., 0]


def _converted(x: Array, to: np.dtype, modes: list[str]) -> Array:
    if x.dtype.kind == "f" and to.kind in "iu":
        whole = np.trunc(x) if "rzi" in modes else np.rint(x)
        limits = np.iinfo(to)
        held = np.clip(np.nan_to_num(whole.astype(np.float64)), limits.min, limits.max)
        return held.astype(to)
    if to == np.float16 and x.dtype != np.float16:
        return to_fp16(x.astype(np.float32), "rz" if "rz" in modes else "rn")
    return x.astype(to)


BUILDERS = {"cvt": _convert, "mov": _move}
