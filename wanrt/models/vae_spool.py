"""A temporary file for what a VAE has finished before it can be handed out."""

import tempfile
from collections.abc import Hashable
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from wanrt.errors import OutputError


class _Record(NamedTuple):
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Spool:
    """Tensors by name, in a file that the system removes when it is closed or the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="wanrt-")
        self._records: dict[Hashable, _Record] = {}
        self._end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, name: Hashable, x: Tensor) -> None:
        """Write x, channels last (`[B, C, T, H, W]`). Raises OutputError when the disk is full."""
        rows = x.permute(0, 2, 3, 4, 1).contiguous().cpu()
        self._records[name] = _Record(self._end, rows.shape, x.dtype, x.device)
        try:
            self._file.seek(self._end)
            self._file.write(rows.view(torch.uint8).numpy())
        except OSError as error:
            raise OutputError(
                f"cannot write {rows.nbytes:,} bytes of unfinished frames to the folder for"
                f" temporary files, {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to"
                " another folder"
            ) from error
        self._end += rows.nbytes

    def get(self, name: Hashable) -> Tensor:
        """What was put under a name, on the device where it was; it passes through host memory."""
        offset, shape, dtype, device = self._records[name]
        data = torch.empty(shape, dtype=dtype)
        self._file.seek(offset)
        self._file.readinto(data.view(torch.uint8).numpy())
        return data.to(device).permute(0, 4, 1, 2, 3)
