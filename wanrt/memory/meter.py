"""How much memory a run really held on its device: the figure beside the plan's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from wanrt.memory.card import held_bytes
from wanrt.memory.measure import LiveBytes


@dataclass
class Meter:
    """Reads the peak bytes since it began."""

    read: Callable[[], int] = lambda: 0
    whole_card: bool = False  # the driver did not say what is ours: other programs' bytes are in it

    @property
    def peak(self) -> int:
        return self.read()


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Measure what happens inside.

    On CUDA: the most that PyTorch reserved, and what the process holds besides (context, modules,
    libraries), as the driver counts it. On a CPU: the tensors that were alive together.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield Meter(lambda: _cuda_peak(device), whole_card=held_bytes(device) is None)
    else:
        with LiveBytes(device.type) as count:
            yield Meter(lambda: count.peak)


def _cuda_peak(device: torch.device) -> int:
    held = held_bytes(device)
    if held is None:
        free, total = torch.cuda.mem_get_info(device)
        held = total - free
    return torch.cuda.max_memory_reserved(device) + held - torch.cuda.memory_reserved(device)
