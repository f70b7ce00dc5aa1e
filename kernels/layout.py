"""How the VAE's tensors lie in memory: every frame dense and channels last, `[B, C, T, H, W]`."""

import torch
from torch import Tensor


def tail(history: Tensor | None, x: Tensor, num: int, missing: Tensor | float = 0.0) -> Tensor:
    """A copy of the last frames; where there are fewer, `missing` in front."""
    b, c, t, h, w = x.shape
    kept = empty_frames(x, (b, c, num, h, w))
    older = max(0, num - t)
    if older:
        kept[:, :, :older] = missing if history is None else history[:, :, num - older :]
    kept[:, :, older:] = x[:, :, t - (num - older) :]
    return kept


def is_frames_dense(x: Tensor) -> bool:
    return x[:1, :, :1].is_contiguous(memory_format=torch.channels_last_3d)


def frames_dense(x: Tensor) -> Tensor:
    """Every frame channels last and dense; samples and frames may lie anywhere."""
    return x if is_frames_dense(x) else x.contiguous(memory_format=torch.channels_last_3d)


def outer_strides(x: Tensor | None) -> tuple[int, int]:
    """Of samples and frames."""
    return (0, 0) if x is None else (x.stride(0), x.stride(2))


def empty_frames(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last_3d,
    )
