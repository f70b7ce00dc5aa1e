"""How far two tensors or two clips are apart, as engineers and eyes measure it."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5


class Closeness(NamedTuple):
    """Cosine, and the relative error in L2, of two tensors; computed in fp64."""

    cosine: float
    error: float


def closeness(actual: Tensor, expected: Tensor) -> Closeness:
    """How near a tensor is to what it should be."""
    a, b = actual.flatten().double(), expected.flatten().double()
    error = (a - b).norm() / b.norm()
    return Closeness(torch.cosine_similarity(a, b, 0).item(), error.item())


def psnr(actual: Tensor, expected: Tensor) -> float:
    """dB of two uint8 clips, peak 255; infinite where they are equal."""
    error = (actual.double() - expected.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(actual: Tensor, expected: Tensor) -> float:
    """Mean structural similarity of two uint8 clips [F, H, W, 3] over frames and channels.

    Gaussian window of 11 pixels, sigma 1.5. Source: Wang et al. 2004,
    doi:10.1109/TIP.2003.819861, with its constants K1 = 0.01 and K2 = 0.03.
    """
    x, y = (
        clip.permute(0, 3, 1, 2).reshape(-1, 1, *clip.shape[1:3]) for clip in (actual, expected)
    )
    x, y = x.double(), y.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    shape = (2 * cov + c2) / (var_x + var_y + c2)
    return (light * shape).mean().item()


def _planes(clip: Tensor) -> Tensor:
    """[F, H, W, 3] -> fp64 [F * 3, 1, H, W]."""
    return clip.permute(0, 3, 1, 2).reshape(-1, 1, *clip.shape[1:3]).double()


def _blur(x: Tensor) -> Tensor:
    """x [N, 1, H, W], without a border."""
    at = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    row = torch.exp(-(at**2) / (2 * _SIGMA**2))
    row = row / row.sum()
    return F.conv2d(F.conv2d(x, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))
