"""Temporal Winograd F(2, 3): two frames of a 3x3x3 convolution from four 3x3 ones, not from six.

With frames x0 .. x3 and the temporal taps g0, g1, g2 of the kernel (each a 3x3 convolution *):

    m1 = (x0 - x2) * g0                    m2 = (x1 + x2) * (g0 + g1 + g2) / 2
    m4 = (x1 - x3) * g2                    m3 = (x2 - x1) * (g0 - g1 + g2) / 2
    y0 = m1 + m2 + m3                      y1 = m2 - m3 - m4

Only additions go over time, so fp32 keeps its accuracy; bf16 would round every difference.
Source: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


def convolve_pairs(frames: Tensor, weight: Tensor, bias: Tensor, convolve: Convolve) -> Tensor:
    """frames [B, C, T + 2, H, W], weight [O, C, 3, 3, 3] -> [B, O, T, H, W], T even, channels last.

    `convolve` applies a weight [O, C, 1, 3, 3] and a bias to every frame. Peak: beside the result,
    three clips of half its length (one of C channels, two of O).
    """
    b, _, t, h, w = frames.shape
    pairs = t - 3  # steps of 2 that a slice takes from its first frame
    x0, x1, x2, x3 = (frames[:, :, i : i + pairs : 2] for i in range(4))
    g0, g1, g2 = weight.split(1, 2)
    ends, nothing = g0 + g2, torch.zeros_like(bias)
    y = frames.new_empty(b, t - 2, h, w, weight.shape[0]).permute(0, 4, 1, 2, 3)
    even, odd = y[:, :, 0::2], y[:, :, 1::2]
    m2 = convolve(x1 + x2, (ends + g1).mul_(0.5), bias)
    m3 = convolve(x2 - x1, (ends - g1).mul_(0.5), nothing)
    torch.add(m2, m3, out=even)
    torch.sub(m2, m3, out=odd)
    del m2, m3
    even.add_(convolve(x0 - x2, g0, nothing))
    odd.sub_(convolve(x1 - x3, g2, nothing))
    return y
