"""The watermark's op in PyTorch: int16 throughout, each row as one line of 3 W values."""

import torch
from torch import Tensor

from wanrt.kernels.reference_watermark import BLOCK, SHIFT


def mark_frame(frame: Tensor, pattern: Tensor, strength: Tensor) -> Tensor:
    """See `reference_watermark.mark_frame`."""
    height, width, channels = frame.shape
    rows, _, columns, _ = pattern.shape
    change = pattern * strength[:, None, :, None]
    change.add_(1 << (SHIFT - 1)).bitwise_right_shift_(SHIFT)
    change = change.view(rows * BLOCK, columns * BLOCK * channels)[:height, : width * channels]
    sums = change + frame.reshape(height, width * channels)  # uint8 joins int16
    return sums.clamp_(0, 255).to(torch.uint8).view(height, width, channels)
