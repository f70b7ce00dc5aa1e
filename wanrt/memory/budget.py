"""Budgets as users write them, and what a process needs beside its tensors."""

import math
import re

from wanrt.errors import UsageError

GIB = 1 << 30
FIXED = GIB // 2  # context and modules of a CUDA process, outside PyTorch's allocator
WORKSPACE = GIB // 8  # of libraries, and what the allocator rounds up, inside it
HOST_FIXED = 2 * GIB  # interpreter, libraries, frames on their way to the file
HOST_SHARE = 0.8  # of the machine's memory, where --ram is silent

_UNITS = {"": GIB, "G": GIB, "M": 1 << 20}


def parse_bytes(text: str | int | float | None, flag: str) -> int | None:
    """ "8G", "8GiB", "7.5" (GiB) or "6500M" -> bytes. Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{flag} {str(text)[:40]!r}: write a number of GiB, as 8G or 7.5G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def enough(num_bytes: int) -> str:
    """As a budget that holds so many bytes is written: `7.43G`."""
    return f"{math.ceil(100 * num_bytes / GIB) / 100}G"


def gib(num_bytes: int) -> str:
    """For people: in GiB, small numbers in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes >> 20} MiB"
