"""Budgets as users write them, and what a card has left."""

import re
from functools import cache

import torch

from wanrt.errors import BudgetError, UsageError

GIB = 1 << 30
FIXED = GIB // 2  # context and modules of a CUDA process, outside PyTorch's allocator
WORKSPACE = GIB // 8  # of libraries, and what the allocator rounds up, inside it
MARGIN = GIB // 4  # of the free memory, left to others where no budget is named

_UNITS = {"": GIB, "G": GIB, "M": 1 << 20}


def parse_bytes(text: str | int | float | None, flag: str) -> int | None:
    """ "8G", "8GiB", "7.5" (GiB) or "6500M" -> bytes. Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{flag} {str(text)[:40]!r}: write a number of GiB, as 8G or 7.5G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def gib(num_bytes: int) -> str:
    """For people: in GiB, small numbers in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes >> 20} MiB"


def free_bytes(device: torch.device) -> int:
    """What the driver has left on a CUDA device, less a margin, plus what this process holds."""
    free, _ = torch.cuda.mem_get_info(device)
    return free - MARGIN + torch.cuda.memory_reserved(device)


def enforce(budget: int, device: torch.device) -> None:
    """From here on PyTorch's allocator refuses to hold more than the budget on this device.

    Segments grow page by page, so that what is reserved follows what is planned. Raises BudgetError
    where the budget is more than the card has.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    if budget > total:
        raise BudgetError(f"--vram {gib(budget)} is more than the card's {gib(total)}")
    _grow_by_pages()
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction((budget - FIXED) / total, index)


@cache
def _grow_by_pages() -> None:
    """PyTorch 2.13 moved the function to where all accelerators find it."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
