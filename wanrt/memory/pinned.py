"""Host memory that a CUDA device copies from by itself, of exactly the size that was asked for.

PyTorch's own pinned memory comes in powers of two, which can be twice what was asked for.
"""

import contextlib
import logging
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("wanrt")


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes], page-locked where the device is a CUDA one.

    Its pages are its own: the driver refuses to lock a page twice. Raises RuntimeError where no
    more can be locked.
    """
    memory = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    if device.type == "cuda":
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        try:
            torch.cuda.check_error(runtime.cudaHostRegister(address, num_bytes, 0))
        except RuntimeError:
            _forget_error(device)
            raise
        weakref.finalize(memory, runtime.cudaHostUnregister, address)
    return torch.from_numpy(memory)


def host_memory(num_bytes: int, device: torch.device) -> Tensor | None:
    """As `host_buffer`; None, and a warning, where no more can be locked."""
    try:
        return host_buffer(num_bytes, device)
    except RuntimeError as error:
        log.warning("no more host memory can be pinned (%s): blocks come from their file", error)
        return None


def _forget_error(device: torch.device) -> None:
    """A failed call of the runtime is reported once more, by the next kernel: let this be it.

    Source: `cudaGetLastError` in PyTorch's c10/cuda/CUDAException.h, C10_CUDA_KERNEL_LAUNCH_CHECK.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
