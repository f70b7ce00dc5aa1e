"""Temporal Winograd F(2, 3): two frames of a 3x3x3 convolution from four 3x3 ones, not from six.

With frames x0 .. x3 and the temporal taps g0, g1, g2 of the kernel (each a 3x3 convolution *):

    m1 = (x0 - x2) * g0                    m2 = (x1 + x2) * (g0 + g1 + g2) / 2
    m4 = (x1 - x3) * g2                    m3 = (x2 - x1) * (g0 - g1 + g2) / 2
    y0 = m1 + m2 + m3                      y1 = m2 - m3 - m4

Only additions go over time, so fp32 keeps its accuracy; bf16 would round every difference.
Source: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


class Taps(NamedTuple):
    """What the four products are with, `[O, C, 1, 3, 3]` each: 4/3 of the weight's size."""

    first: Tensor  # g0
    sums: Tensor  # (g0 + g1 + g2) / 2
    differences: Tensor  # (g0 - g1 + g2) / 2
    last: Tensor  # g2


def transform(weight: Tensor) -> Taps:
    """weight [O, C, 3, 3, 3]."""
    g0, g1, g2 = weight.split(1, 2)
    ends = g0 + g2
    return Taps(g0, (ends + g1).mul_(0.5), ends.sub_(g1).mul_(0.5), g2)


def convolve_pairs(
    frames: Tensor, taps: Taps, bias: Tensor, convolve: Convolve, residual: Tensor | None, y: Tensor
) -> None:
    """frames [B, C, T + 2, H, W], T even -> y [B, O, T, H, W], to which `residual` is added.

    `convolve` applies a weight [O, C, 1, 3, 3] and a bias to every frame. y may be the residual.
    Peak: four clips of half the length (one of C channels, three of O).
    """
    pairs = frames.shape[2] - 3  # steps of 2 that a slice takes from its first frame
    x0, x1, x2, x3 = (frames[:, :, i : i + pairs : 2] for i in range(4))
    nothing = torch.zeros_like(bias)
    m2 = convolve(x1 + x2, taps.sums, bias)
    m3 = convolve(x2 - x1, taps.differences, nothing)
    even = convolve(x0 - x2, taps.first, nothing).add_(m2)
    _store(even, m3, 1, residual, y, 0)
    del even
    odd = m2.sub_(m3)
    del m3
    _store(odd, convolve(x1 - x3, taps.last, nothing), -1, residual, y, 1)


def _store(a: Tensor, b: Tensor, sign: int, residual: Tensor | None, y: Tensor, start: int) -> None:
    """Every second frame of y: a + sign * b and the residual's; a is used up."""
    target = y[:, :, start::2]
    if residual is None:
        torch.add(a, b, alpha=sign, out=target)
    else:
        torch.add(a.add_(b, alpha=sign), residual[:, :, start::2], out=target)
