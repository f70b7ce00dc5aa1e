"""The VAE's convolutions in plain PyTorch, channels last: CPU fast path and fallback.

Without gradients they go through a clip a few frames at a time, so that what lies between two
passes (the normalised input, a convolution's raw output) stays small and in cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 1 << 21  # elements of the input that go through a convolution at once
_SLAB = 1 << 17  # elements that go through a norm at once
_FEW_PIXELS = 1024  # on smaller frames, another weight costs as much as multiplying by zeros


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference.rms_norm_channels`."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = math.sqrt(x.shape[1]) / norm.clamp_min(1e-12)
    gamma = gamma.view(-1, *[1] * (x.ndim - 2))
    return (x * scale * gamma).to(x.dtype)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None = None,
    stride: int = 1,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.causal_conv3d`."""
    b, _, t, h, w = x.shape
    size = t if torch.is_grad_enabled() else _piece(x)
    if out is None and size >= t:
        return _step(x, weight, bias, history, gamma, stride)
    if out is None:
        out = _empty(x, (b, weight.shape[0], t // stride, h, w))
    for source, target in zip(x.split(size, 2), out.split(size // stride, 2), strict=True):
        target[:], history = _step(source, weight, bias, history, gamma, stride)
    return out, history


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference.upsample_conv2d`.

    Each output pixel sees 2x2 input pixels, so the 3x3 kernel folds into one 2x2 kernel for each of
    the four places (row, column) that an output pixel can take: 4/9 of the multiplications.
    """
    if torch.is_grad_enabled():
        large = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
        return F.conv3d(large, weight.unsqueeze(2), bias, padding=(0, 1, 1))
    b, _, t, h, w = x.shape
    folded = _fold(_fold(weight.float(), -1), -2)  # [2, 2, O, C, 2, 2]
    folded = folded.flatten(0, 2).unsqueeze(2).to(weight.dtype)  # [4O, C, 1, 2, 2]
    y = _empty(x, (b, weight.shape[0], t, 2 * h, 2 * w))
    size = _piece(x)
    for source, target in zip(x.split(size, 2), y.split(size, 2), strict=True):
        z = _conv(source, folded, bias.repeat(4))
        z = z.unflatten(1, (2, 2, -1))  # [B, 2, 2, O, n, H+1, W+1]
        for row in range(2):
            for column in range(2):
                place = z[:, row, column, :, :, row : row + h, column : column + w]
                target[:, :, :, row::2, column::2] = place
    return y


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference.downsample_conv2d`."""
    frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    y = F.conv2d(frames, weight, bias, stride=2)
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Three taps over doubled pixels as two over the pixels themselves, `[2, ...]`: left, right."""
    a, b, c = weight.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])


def _step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv3d` of a few frames."""
    kt = weight.shape[2]
    frames = _behind(history, x, gamma)
    if kt == 1:
        return _conv(frames, weight, bias), None
    convolve = _start if history is None else _conv
    return convolve(frames, weight, bias, stride), _tail(frames, kt - stride)


def _behind(history: Tensor | None, x: Tensor, gamma: Tensor | None) -> Tensor:
    """History, then x (normalised and through SiLU when gamma is given), in one buffer."""
    if gamma is None:
        return x if history is None else torch.cat([history, x], dim=2)
    if torch.is_grad_enabled():
        x = F.silu(rms_norm_channels(x.float(), gamma)).to(x.dtype)
        return x if history is None else torch.cat([history, x], dim=2)
    b, c, t, h, w = x.shape
    past = 0 if history is None else history.shape[2]
    frames = _empty(x, (b, c, past + t, h, w))
    if history is not None:
        frames[:, :, :past] = history
    for source, target in zip(x, frames[:, :, past:], strict=True):
        rows = source.permute(1, 2, 3, 0).reshape(-1, c)  # [THW, C]
        targets = target.permute(1, 2, 3, 0).view(-1, c)
        size = max(1, _SLAB // c)
        for a, y in zip(rows.split(size), targets.split(size), strict=True):
            y.copy_(F.silu(rms_norm_channels(a.float(), gamma), inplace=True))
    return frames


def _start(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """The convolution at the start of a clip: with zeros before x, hardly multiplying by them."""
    b, c, t, h, w = x.shape
    kt = weight.shape[2]
    if stride > 1 or (t > 1 and h * w < _FEW_PIXELS):
        zeros = x.new_zeros((b, c, kt - stride, h, w))
        return _conv(torch.cat([zeros, x], dim=2), weight, bias, stride)
    parts = [
        _conv(x[:, :, : i + 1], weight[:, :, kt - 1 - i :], bias) for i in range(min(kt - 1, t))
    ]
    if t >= kt:
        parts.append(_conv(x, weight, bias))
    return torch.cat(parts, dim=2)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Valid in time, padded by half the kernel in space."""
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    # NOTE: F.conv3d itself leaves fp32 inputs of one sample with C*T*H <= 20480 to a kernel that is
    # up to 25 times slower than oneDNN's (torch 2.13, ATen/native/Convolution.cpp use_mkldnn).
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
        if torch.backends.mkldnn.is_available():
            return torch.mkldnn_convolution(x, weight, bias, padding, (stride, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, (stride, 1, 1), padding)


def _tail(frames: Tensor, num: int) -> Tensor:
    """A copy of the last frames; where there are fewer, zeros in front."""
    missing = num - frames.shape[2]
    return F.pad(frames, (0, 0, 0, 0, missing, 0)) if missing > 0 else frames[:, :, -num:].clone()


def _piece(x: Tensor) -> int:
    """How many frames go through a convolution at once; even, for the strides."""
    b, c, _, h, w = x.shape
    return max(2, _PIECE // (b * c * h * w) // 2 * 2)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d
    )
