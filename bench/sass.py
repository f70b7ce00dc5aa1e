"""What a compiled kernel's busiest loop consists of, read from its machine code.

A multiprocessor's quarter issues one instruction in a cycle, of whatever kind; a tensor-core
product keeps its core busy for many. So the fewer instructions there are to a product, the less
stands between a kernel and the rate of its tensor cores. It says nothing of waiting.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"\.(L_\w+):")
_CODE = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([^;]*);")
_TARGET = re.compile(r"BRA\b.*`\(\.(L_\w+)\)")
_PRODUCT = re.compile(r"[HIQ](?:G)?MMA\b")


@dataclass(frozen=True)
class Loop:
    """Instructions of one turn of a loop, and how many of them are tensor-core products."""

    instructions: int
    products: int


def busiest_loop(cubin: bytes) -> Loop | None:
    """The loop with the most products to an instruction; None where no loop has any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [TOOLS / "nvdisasm", "-c", path]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (loop for loop in loops(code) if loop.products)
    return max(found, key=lambda loop: loop.products / loop.instructions, default=None)


def loops(code: str) -> Iterator[Loop]:
    """Every stretch of code that ends with a jump to its own beginning."""
    begins: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        label, instruction = _LABEL.match(line), _CODE.match(line)
        if label is not None:
            begins[label[1]] = len(instructions)
        elif instruction is not None:
            instructions.append(instruction[1])
            target = _TARGET.match(instruction[1])
            if target is not None and target[1] in begins:
                turn = instructions[begins[target[1]] :]
                yield Loop(len(turn), sum(_PRODUCT.match(one) is not None for one in turn))
