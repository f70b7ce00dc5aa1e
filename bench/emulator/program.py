"""PTX text, as Triton's compiler leaves it, read into instructions.

Source: NVIDIA, Parallel Thread Execution ISA 9.0, chapters 4 (syntax) and 9 (instructions).
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from wanrt.errors import WanrtError

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{\n(.*)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s.*?(\w+)(?:,|\n|$)")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)<\d+>")
_LOCATION = re.compile(r"//\s*(\S+:\d+):\d+")
_LABEL = re.compile(r"(\$?[\w$]+):$")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);$")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_PART = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
WARP = 32  # lanes that take an instruction together
WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


class EmulatorError(WanrtError):
    """A kernel does what a GPU would not allow, or what is not emulated; the message says where."""


class Address(NamedTuple):
    """`[base + offset]`, the base a register or the name of a parameter."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]  # a register, number or name; a place; a vector


class Instruction(NamedTuple):
    """One statement. `opcode` is its parts between dots; `guard` the predicate that lets it run."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str
    source: str  # line of the kernel's Python file


@dataclass(frozen=True)
class Program:
    """One kernel. A block is entered at its start alone and left at its end."""

    name: str
    parameters: tuple[str, ...]
    widths: dict[str, int]  # bits of a register, by the letters it begins with
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]  # which block each begins


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module. Raises EmulatorError where a line is not understood."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise EmulatorError("no kernel in this PTX: `.visible .entry` is missing")
    name, parameters, _, body = entry.groups()
    widths = {prefix: WIDTHS[kind] for kind, prefix in _REGISTERS.findall(body)}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    source = name
    for line in body.splitlines():
        location = _LOCATION.search(line) if ".loc" in line else None
        source = location[1] if location else source
        code = line.split("//")[0].strip()
        label = _LABEL.match(code)
        if label is not None:
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif code and code not in "{}" and not code.startswith("."):
            instruction = _instruction(code, source)
            blocks[-1].append(instruction)
            if instruction.opcode[0] in ("bra", "ret"):
                blocks.append([])
    names = tuple(_PARAMETER.findall(parameters))
    return Program(name, names, widths, tuple(map(tuple, blocks)), labels)


def _instruction(code: str, source: str) -> Instruction:
    found = _STATEMENT.match(code)
    if found is None:
        raise EmulatorError(f"{source}: not understood as PTX: {code}")
    negated, guard, opcode, rest = found.groups()
    operands = tuple(_operand(part) for part in _PART.findall(rest))
    parts = tuple(opcode.replace("::", ".").split("."))
    return Instruction(parts, operands, guard, negated == "!", code, source)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(text.strip("{} ").replace(" ", "").split(","))
    if text.startswith("["):
        found = _ADDRESS.match(text)
        if found is None:
            raise EmulatorError(f"not understood as a PTX address: {text}")
        return Address(found[1], int(found[2] or "0", 0))
    return text
