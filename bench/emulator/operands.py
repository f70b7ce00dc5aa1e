"""How operands are read: registers, numbers, and what each lane knows of itself."""

from collections.abc import Callable

import numpy as np

from wanrt.bench.emulator.machine import Machine
from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.program import WARP, EmulatorError, Instruction, Operand

Source = Callable[[Machine], Array]
DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
       for kind, code in (("s", "i"), ("u", "u"), ("b", "u")) for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}  # fmt: skip


def source(operand: Operand, dtype: np.dtype) -> Source:
    """Reads an operand as values of a type: `[lanes]`, or `[]` where all lanes have the same."""
    if not isinstance(operand, str):
        raise EmulatorError(f"{operand} is no single value")
    if operand in _SPECIAL:
        read = _SPECIAL[operand]
        return lambda machine: read(machine).astype(dtype)
    if operand.startswith("%"):
        return lambda machine: as_type(machine.read(operand), dtype)
    constant = _constant(operand, dtype)
    return lambda machine: constant


def as_type(bits: Array, dtype: np.dtype) -> Array:
    """A register's low bits as values of a type."""
    if bits.dtype == dtype:
        return bits
    if bits.itemsize != dtype.itemsize:
        bits = bits.astype(f"u{dtype.itemsize}")
    return bits.view(dtype)


def _constant(text: str, dtype: np.dtype) -> Array:
    if text.startswith(("0f", "0d")):  # the bits of a number
        return np.array(int(text[2:], 16), f"u{dtype.itemsize}").view(dtype)
    if text == "global_smem":  # the one array in shared memory, which begins at its start
        return np.array(0, dtype)
    if dtype.kind == "b":
        return np.array(int(text) != 0)
    bits = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)


_SPECIAL: dict[str, Source] = {
    "%tid.x": lambda machine: machine.thread(),
    "%laneid": lambda machine: machine.thread() % WARP,
    "%ntid.x": lambda machine: np.array(machine.threads),
    **{f"%ctaid.{axis}": lambda machine, i=i: machine.block()[i] for i, axis in enumerate("xyz")},
    **{
        f"%nctaid.{axis}": lambda machine, i=i: np.array(machine.work.grid[i])
        for i, axis in enumerate("xyz")
    },
}


U32 = DTYPES["u32"]


def dtype_of(instruction: Instruction, index: int) -> np.dtype:
    kind = instruction.opcode[index]
    if kind not in DTYPES:
        raise EmulatorError(f"no arithmetic in {kind} is emulated: {instruction.text}")
    return DTYPES[kind]


def pair_of(instruction: Instruction, dtype: np.dtype) -> tuple[Source, Source]:
    return source(instruction.operands[1], dtype), source(instruction.operands[2], dtype)
