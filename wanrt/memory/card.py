"""What a CUDA card has left, and how PyTorch is held to a part of it."""

import os
from functools import cache

import torch

from wanrt.errors import BudgetError
from wanrt.memory.budget import FIXED, GIB, gib

MARGIN = GIB // 4  # of the free memory, left to others where no budget is named
_UNDERSIZED = 0.03  # what a card may lack of the size that it is sold as


def free_bytes(device: torch.device) -> int:
    """What the driver has left on a CUDA device, less a margin, plus what this process holds."""
    free, _ = torch.cuda.mem_get_info(device)
    return free - MARGIN + torch.cuda.memory_reserved(device)


def held_bytes(device: torch.device) -> int | None:
    """What this process holds on a CUDA device as the driver counts it.

    None where nobody says: without nvidia-ml-py, on Windows (WDDM), or in a container whose process
    numbers are its own. Source: NVML, nvmlDeviceGetComputeRunningProcesses.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)


def driver_release() -> str | None:
    """Of NVIDIA's driver, as 580.65.06; None where nobody says: see `held_bytes`."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return found.decode() if isinstance(found, bytes) else found  # bytes: old releases


def on_card(budget: int, device: torch.device) -> int:
    """A budget as the card can keep it, in bytes.

    Cards have a little less than they are sold as: a 12 GB one 12282 MiB, and 12G means all of it.
    Raises BudgetError for more than that.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    if budget * (1 - _UNDERSIZED) > total:
        raise BudgetError(f"--vram {gib(budget)} is more than the card's {gib(total)}")
    return min(budget, total)


def enforce(budget: int, device: torch.device) -> None:
    """From here on PyTorch's allocator refuses to hold more than the budget on this device.

    Segments grow page by page, so that what is reserved follows what is planned.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    _grow_by_pages()
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction((budget - FIXED) / total, index)


@cache
def _grow_by_pages() -> None:
    """PyTorch 2.13 moved the function to where all accelerators find it."""
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
