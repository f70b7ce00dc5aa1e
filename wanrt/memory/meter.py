"""How much memory a run really held on its device: the figure beside the plan's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from wanrt.memory.measure import LiveBytes


@dataclass
class Meter:
    """Peak bytes since it began: on CUDA what the driver sees, on a CPU the counted tensors."""

    peak: int = 0


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Measure what happens inside. On CUDA: what PyTorch reserved at most, and what the process
    holds besides (context, modules, libraries), as the driver counts it."""
    meter = Meter()
    if device.type != "cuda":
        with LiveBytes(device.type) as count:
            yield meter
        meter.peak = count.peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield meter
    free, total = torch.cuda.mem_get_info(device)
    besides = total - free - torch.cuda.memory_reserved(device)
    meter.peak = torch.cuda.max_memory_reserved(device) + besides
