"""Where an engine of TensorRT runs: a card's memory and streams, as PyTorch manages them."""

import ctypes
import hashlib
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wanrt.engine.store_write import replace_file
from wanrt.errors import BudgetError, OutputError, UsageError

log = logging.getLogger("wanrt")


class Place(Protocol):
    """What a runner asks of a device."""

    device: torch.device

    def stream(self) -> int:
        """The handle of the stream that PyTorch works on now."""
        ...

    def hold(self, tensor: Tensor) -> None:
        """Have nobody reuse its memory before the work that is on the stream now is done."""
        ...

    def here(self) -> AbstractContextManager[Any]:
        """Within it, what the library does is for this device."""
        ...

    def identity(self) -> str:
        """Card and driver, for the name of a file."""
        ...


class CudaPlace:
    """A card. Not tested on hardware."""

    def __init__(self, device: torch.device) -> None:
        """Raises UsageError where there is no such card."""
        if device.type != "cuda" or not torch.cuda.is_available():
            raise UsageError(
                f"engines of TensorRT run on an NVIDIA card with its driver, not on {device.type!r}"
                " here; choose --engine onnxruntime or native"
            )
        self.device = device

    @property
    def compute_capability(self) -> int:
        """89 for 8.9."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def stream(self) -> int:
        """See `Place`. On the default stream the library waits for the device at every call."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def hold(self, tensor: Tensor) -> None:
        """See `Place`."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def here(self) -> AbstractContextManager[Any]:
        """See `Place`."""
        return torch.cuda.device(self.device)

    def identity(self) -> str:
        """See `Place`; the driver by the version of CUDA that it brings."""
        driver = ctypes.c_int()
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(driver))
        card = torch.cuda.get_device_name(self.device)
        return f"{hashlib.sha256(card.encode()).hexdigest()[:8]}-{driver.value}"


class Workspace:
    """The memory that engines work in: one piece for all of a model, which run one by one.

    It grows to what is asked for, up to `limit` bytes, so that a plan can count it.
    """

    def __init__(self, place: Place, limit: int | None = None) -> None:
        self._place, self.limit = place, limit
        self.release()

    def release(self) -> None:
        """Nothing is held until the next engine runs; the work on the stream keeps what it uses."""
        self._memory = torch.empty(0, dtype=torch.uint8, device=self._place.device)

    def of(self, size: int) -> Tensor:
        """At least so many bytes, for work on the current stream. Raises BudgetError."""
        if self.limit is not None and size > self.limit:
            raise BudgetError(f"an engine works in {size} bytes; the plan leaves {self.limit}")
        if size > self._memory.nbytes:
            self.release()
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._place.device)
        self._place.hold(self._memory)
        return self._memory


class CompiledKernels:
    """What the runtime compiled from one engine on one card, in a file of the user's cache.

    The library itself checks whether it fits card, driver and release, and else begins anew.
    """

    def __init__(self, folder: Path | None, engine: bytes, place: Place) -> None:
        """folder: None keeps nothing."""
        digest = hashlib.sha256(engine).hexdigest()[:32]
        name = f"{digest}-{place.identity()}.kernels" if folder else ""
        self._path = folder / "tensorrt-rtx" / name if folder else None
        self._cache: Any = None
        self._kept = b""

    def attach(self, config: Any) -> None:
        """Give a runtime's configuration a cache, filled with what the file has."""
        self._cache = config.create_runtime_cache()
        if self._path is not None and self._path.is_file():
            held = self._path.read_bytes()
            if self._cache.deserialize(held):
                self._kept = held
            else:
                log.info("%s is of another card, driver or release: compiling anew", self._path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what is new; where it cannot be written, say so and go on."""
        if self._path is None or self._cache is None:
            return
        held = bytes(self._cache.serialize())
        if held == self._kept:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, held)
        except (OSError, OutputError) as error:
            log.warning("kernels are compiled again the next time: %s", error)
            return
        self._kept = held
