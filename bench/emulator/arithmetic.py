"""What each lane computes by itself.

Source: PTX ISA 9.0, sections 9.7.1 to 9.7.8. Approximate instructions (`ex2.approx`, `div.full`)
give fp32's nearest value here, where a GPU may be off by a unit or two.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np

from wanrt.bench.emulator.machine import Machine, Step
from wanrt.bench.emulator.memory import Array
from wanrt.bench.emulator.operands import DTYPES, U32, Source, dtype_of, pair_of, source
from wanrt.bench.emulator.program import Instruction, Operand
from wanrt.bench.emulator.rounding import from_bf16


def _elementwise(function: Callable[..., Array]) -> Callable[[Instruction], Step]:
    """An instruction whose operands and result all have the type that ends its name."""

    def build(instruction: Instruction) -> Step:
        target, *operands = instruction.operands
        kind, before = instruction.opcode[-1], instruction.opcode[-2]
        if kind == "f32x2":
            sources = [_pair_of_fp32(operand) for operand in operands]
        elif kind in ("bf16", "f16") and before == "f32":  # all but the last, a sum, are narrow
            sources = [_as_fp32(operand, kind) for operand in operands[:-1]]
            sources.append(source(operands[-1], DTYPES["f32"]))
        else:
            sources = [source(operand, dtype_of(instruction, -1)) for operand in operands]
        name, whole = str(target), DTYPES["b64"]

        def step(machine: Machine) -> None:
            result = function(*(s(machine) for s in sources))
            machine.write(name, result.view(whole)[..., 0] if kind == "f32x2" else result)

        return step

    return build


def _pair_of_fp32(operand: Operand) -> Source:
    read = source(operand, DTYPES["b64"])
    return lambda machine: np.ascontiguousarray(read(machine))[..., None].view(np.float32)


def _as_fp32(operand: Operand, kind: str) -> Source:
    if kind == "f16":
        halves = source(operand, DTYPES["f16"])
        return lambda machine: halves(machine).astype(np.float32)
    bits = source(operand, DTYPES["b16"])
    return lambda machine: from_bf16(bits(machine))


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once, but where fp64's own rounding lies on the middle between two of fp32."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _most(*values: Array) -> Array:
    """NaN is passed over."""
    return reduce(np.fmax if values[0].dtype.kind == "f" else np.maximum, values)


def _least(*values: Array) -> Array:
    return reduce(np.fmin if values[0].dtype.kind == "f" else np.minimum, values)


def _divide(a: Array, b: Array) -> Array:
    """Whole numbers towards zero; of fp32 the nearest."""
    if a.dtype.kind == "f":
        return a / b
    wide = a.astype(np.int64)
    quotient = np.abs(wide) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (quotient * np.sign(wide) * np.sign(b.astype(np.int64))).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b) * b


def _shift_left(instruction: Instruction) -> Step:
    return _shift(instruction, np.left_shift)


def _shift_right(instruction: Instruction) -> Step:
    return _shift(instruction, np.right_shift)


def _shift(instruction: Instruction, function: Callable[..., Array]) -> Step:
    """By 32-bit counts; beyond the width only zeros, or the sign, are left."""
    dtype, name = dtype_of(instruction, -1), str(instruction.operands[0])
    value, count = source(instruction.operands[1], dtype), source(instruction.operands[2], U32)
    most = 8 * dtype.itemsize - 1
    signed = dtype.kind == "i" and function is np.right_shift

    def step(machine: Machine) -> None:
        by = count(machine)
        shifted = function(value(machine), np.minimum(by, most).astype(dtype))
        machine.write(name, shifted if signed else np.where(by > most, 0, shifted).astype(dtype))

    return step


def _multiply(instruction: Instruction) -> Step:
    if instruction.opcode[1] not in ("lo", "hi", "wide"):  # of numbers with a point
        return _elementwise(np.multiply)(instruction)
    part, dtype = instruction.opcode[1], dtype_of(instruction, -1)
    name, (a, b) = str(instruction.operands[0]), pair_of(instruction, dtype)
    return lambda machine: machine.write(name, _product(a(machine), b(machine), part))


def _multiply_add(instruction: Instruction) -> Step:
    part, dtype = instruction.opcode[1], dtype_of(instruction, -1)
    name, (a, b) = str(instruction.operands[0]), pair_of(instruction, dtype)
    width = dtype.itemsize * (2 if part == "wide" else 1)
    c = source(instruction.operands[3], np.dtype(f"{dtype.kind}{width}"))
    return lambda machine: machine.write(name, _product(a(machine), b(machine), part) + c(machine))


def _product(a: Array, b: Array, part: str) -> Array:
    """The low or the high half of the product, or all of it in twice the width."""
    if part == "lo":
        return a * b
    bits = 8 * a.itemsize
    if bits == 64:
        high = [int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)]
        return np.array(high, a.dtype)
    wide = a.astype(f"{a.dtype.kind}{a.itemsize * 2}") * b
    return wide if part == "wide" else (wide >> bits).astype(a.dtype)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _set_predicate(instruction: Instruction) -> Step:
    comparison, dtype = instruction.opcode[1], dtype_of(instruction, -1)
    either = comparison.endswith("u") and comparison != "u" and dtype.kind == "f"
    compare = _COMPARE[comparison.removesuffix("u") if either else comparison]
    name, (a, b) = str(instruction.operands[0]), pair_of(instruction, dtype)

    def step(machine: Machine) -> None:
        x, y = a(machine), b(machine)
        result = compare(x, y)
        if dtype.kind == "f":  # NaN is in no order with anything
            unordered = np.isnan(x) | np.isnan(y)
            result = result | unordered if either else result & ~unordered
        machine.write(name, result)

    return step


def _select(instruction: Instruction) -> Step:
    dtype, name = dtype_of(instruction, -1), str(instruction.operands[0])
    (a, b), which = pair_of(instruction, dtype), source(instruction.operands[3], DTYPES["pred"])
    return lambda machine: machine.write(name, np.where(which(machine), a(machine), b(machine)))


def _extract_bits(instruction: Instruction) -> Step:
    """`bfe`: some bits from a place on, the sign carried on where the type has one."""
    dtype, name = dtype_of(instruction, -1), str(instruction.operands[0])
    value = source(instruction.operands[1], np.dtype(f"u{dtype.itemsize}"))
    place, count = (source(operand, U32) for operand in instruction.operands[2:4])

    def step(machine: Machine) -> None:
        start, bits = (x(machine).astype(np.int64) & 0xFF for x in (place, count))
        kept = value(machine).astype(np.int64) >> start & (1 << bits) - 1
        if dtype.kind == "i":
            kept = np.where(kept >> np.maximum(bits - 1, 0) & 1, kept - (1 << bits), kept)
        machine.write(name, kept.astype(dtype))

    return step


def _permute_bytes(instruction: Instruction) -> Step:
    """`prmt`: each byte of the result is one of eight, or its sign eight times."""
    name = str(instruction.operands[0])
    a, b, selector = (source(operand, U32) for operand in instruction.operands[1:4])

    def step(machine: Machine) -> None:
        both = a(machine).astype(np.uint64) | b(machine).astype(np.uint64) << np.uint64(32)
        which, result = selector(machine), np.zeros((), np.uint32)
        for i in range(4):
            choice = which >> np.uint32(4 * i) & np.uint32(0xF)
            place = (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = both >> place & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), 0xFF, 0)
            byte = np.where(choice & np.uint32(8), sign, byte).astype(np.uint32)
            result = result | byte << np.uint32(8 * i)
        machine.write(name, result)

    return step


BUILDERS: dict[str, Callable[[Instruction], Step]] = {
    "abs": _elementwise(np.abs),
    "add": _elementwise(np.add),
    "and": _elementwise(np.bitwise_and),
    "bfe": _extract_bits,
    "div": _elementwise(_divide),
    "ex2": _elementwise(np.exp2),
    "fma": _elementwise(_fma),
    "lg2": _elementwise(np.log2),
    "mad": _multiply_add,
    "max": _elementwise(_most),
    "min": _elementwise(_least),
    "mul": _multiply,
    "neg": _elementwise(np.negative),
    "not": _elementwise(np.invert),
    "or": _elementwise(np.bitwise_or),
    "prmt": _permute_bytes,
    "rcp": _elementwise(np.reciprocal),
    "rem": _elementwise(_remainder),
    "rsqrt": _elementwise(lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)),
    "selp": _select,
    "setp": _set_predicate,
    "shl": _shift_left,
    "shr": _shift_right,
    "sqrt": _elementwise(np.sqrt),
    "sub": _elementwise(np.subtract),
    "xor": _elementwise(np.bitwise_xor),
}
