"""The specification of the watermark's op: whole numbers, so that all backends agree to the bit."""

import torch
from torch import Tensor

BLOCK = 8  # pixels: rows and columns of a block, which has one strength
SHIFT = 10  # a pattern value times a strength is in units of 2^-10 levels


def mark_frame(frame: Tensor, pattern: Tensor, strength: Tensor) -> Tensor:
    """clip(frame + round(pattern * strength / 2^10), 0, 255); halves are rounded up.

    frame uint8 `[H, W, 3]`; pattern int16 `[rows, 8, columns, 24]`, the pixels of each block with
    each value thrice (R, G, B), rows = ceil(H / 8), columns = ceil(W / 8); strength int16
    `[rows, columns]`. A product with the half that is added must fit int16. -> uint8 `[H, W, 3]`.
    """
    height, width, channels = frame.shape
    rows, _, columns, _ = pattern.shape
    product = pattern.int() * strength.int()[:, None, :, None]
    change = torch.floor_divide(product + (1 << (SHIFT - 1)), 1 << SHIFT)
    change = change.reshape(rows * BLOCK, columns * BLOCK, channels)[:height, :width]
    return (frame.int() + change).clamp(0, 255).to(torch.uint8)
