"""Frames of any generator as what is watermarked and encoded: uint8 `[n, H, W, 3]`."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from wanrt.errors import UsageError
from wanrt.media.image import to_uint8

Frames = np.ndarray | Tensor | Image.Image
Clip = Frames | Iterable[Frames]


def chunks_of(clip: Clip, *, nearest: bool) -> Iterator[np.ndarray]:
    """A clip, or parts of one, as uint8 `[n, H, W, 3]`; floats are rounded or truncated.

    Takes uint8 `[n, H, W, 3]` or `[H, W, 3]`, float tensors `[3, n, H, W]` in [-1, 1], PIL images.
    Raises UsageError for others, and where the size changes.
    """
    size = None
    for chunk in [clip] if isinstance(clip, Frames) else clip:
        frames = _as_uint8(chunk, nearest)
        size = size or frames.shape[1:3]
        if frames.shape[1:3] != size:
            raise UsageError(
                f"the frames change their size, from {size[1]}x{size[0]} to "
                f"{frames.shape[2]}x{frames.shape[1]} (scale them first)"
            )
        yield frames


def _as_uint8(chunk: Any, nearest: bool) -> np.ndarray:
    if isinstance(chunk, Tensor):
        if chunk.is_floating_point() and chunk.ndim in (4, 5) and chunk.shape[-4] == 3:
            return to_uint8(chunk, nearest=nearest).cpu().numpy()
        chunk = chunk.cpu().numpy()
    if isinstance(chunk, Image.Image):
        chunk = chunk.convert("RGB")
    frames = np.require(chunk, requirements="W")  # PIL's arrays are read-only
    if frames.ndim == 3:
        frames = frames[None]
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise UsageError(
            f"frames are uint8 [n, H, W, 3] or a float tensor [3, n, H, W] in [-1, 1], "
            f"not {frames.dtype} {list(frames.shape)}"
        )
    return frames
