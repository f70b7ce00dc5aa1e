"""The VAE's ops of `reference_vae.py` in plain PyTorch, channels last: CPU path and fallback.

Where no backward pass will come, a clip goes through a few frames at a time, so that what lies
between two passes (normalised input, raw output of a convolution) stays small and in cache.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.torch_winograd import convolve_pairs

_PIECE = 1 << 21  # elements of input that go through a convolution at once
_SLAB = 1 << 17  # elements that go through a norm at once, on a CPU
_SCORES = 1 << 24  # attention scores of one frame at once, where PyTorch writes them all
_FEW_PIXELS = 1024  # on smaller frames, another weight costs as much as multiplying by zeros


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.rms_norm_channels`."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = math.sqrt(x.shape[1]) / norm.clamp_min(1e-12)
    gamma = gamma.view(-1, *[1] * (x.ndim - 2))
    return (x * scale * gamma).to(x.dtype)


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.channel_norm_silu`."""
    return F.silu(rms_norm_channels(x.float(), gamma)).to(x.dtype)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    out: Tensor | None = None,
    accumulator: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """See `reference_vae.causal_conv3d`; what sums are added up in is PyTorch's choice."""
    b, _, t, h, w = x.shape
    size = _frames_at_once(x, weight)
    if out is None and size >= t:
        y, history = _convolve(x, weight, bias, history, gamma, stride)
        return y if residual is None else y.add_(residual), history
    if out is None:
        out = _empty(x, (b, weight.shape[0], t // stride, h, w))
    for i, source in enumerate(x.split(size, 2)):
        y, history = _convolve(source, weight, bias, history, gamma, stride)
        frames = slice(i * size // stride, (i + 1) * size // stride)
        out[:, :, frames] = y if residual is None else y.add_(residual[:, :, frames])
    return out, history


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_vae.upsample_conv2d`.

    An output pixel sees 2x2 input pixels, so the 3x3 kernel folds into a 2x2 kernel for each of the
    four places (row, column) of an output pixel over its input pixel: 4/9 of the multiplications.
    """
    if _tracked(x, weight):
        large = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
        return F.conv3d(large, weight.unsqueeze(2), bias, padding=(0, 1, 1))
    b, _, t, h, w = x.shape
    folded = _fold(_fold(weight.float(), -1), -2)  # [2, 2, O, C, 2, 2]
    folded = folded.flatten(0, 2).unsqueeze(2).to(weight.dtype)  # [4O, C, 1, 2, 2]
    y = _empty(x, (b, weight.shape[0], t, 2 * h, 2 * w))
    size = _frames_at_once(x, weight)
    for source, target in zip(x.split(size, 2), y.split(size, 2), strict=True):
        places = _conv(source, folded, bias.repeat(4), padding=(0, 1, 1)).unflatten(1, (2, 2, -1))
        for i in range(2):
            for j in range(2):
                target[..., i::2, j::2] = places[:, i, j, ..., i : i + h, j : j + w]
    return y


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_vae.downsample_conv2d`."""
    padded = (F.pad(piece, (0, 1, 0, 1)) for piece in x.split(_frames_at_once(x, weight), 2))
    return torch.cat([_conv(p, weight.unsqueeze(2), bias, stride=(1, 2, 2)) for p in padded], dim=2)


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference_vae.frame_attention`; so many queries at once.

    Peak: the scores of these, where no fused kernel takes them.
    """
    size = max(1, _SCORES // k.shape[2])
    parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(size, 2)]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv3d` of a few frames."""
    kt, kh, kw = weight.shape[2:]
    frames = _behind(history, x, gamma)
    strides, padding = (stride, 1, 1), (0, kh // 2, kw // 2)
    if history is None and kt > 1:
        y = _clip_start(frames, weight, bias, strides, padding)
    else:
        y = _valid(frames, weight, bias, strides, padding)
    return y, _tail(frames, kt - stride) if kt > 1 else None


def _behind(history: Tensor | None, x: Tensor, gamma: Tensor | None) -> Tensor:
    """History, then x (normalised and through SiLU when gamma is given), in one buffer."""
    if gamma is not None and _tracked(x, gamma):
        x, gamma = channel_norm_silu(x, gamma), None
    if gamma is None:
        return x if history is None else torch.cat([history, x], dim=2)
    b, c, t, h, w = x.shape
    past = 0 if history is None else history.shape[2]
    frames = _empty(x, (b, c, past + t, h, w))
    if history is not None:
        frames[:, :, :past] = history
    size = max(1, _SLAB // c) if x.device.type == "cpu" else t * h * w
    for source, target in zip(x, frames[:, :, past:], strict=True):
        rows = source.permute(1, 2, 3, 0).reshape(-1, c)  # [THW, C]
        targets = target.permute(1, 2, 3, 0).view(-1, c)
        for a, y in zip(rows.split(size), targets.split(size), strict=True):
            y.copy_(F.silu(rms_norm_channels(a.float(), gamma), inplace=True))
    return frames


def _clip_start(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
) -> Tensor:
    """The convolution with zeros before x; where it pays, without the taps that would meet them."""
    b, c, t, h, w = x.shape
    kt = weight.shape[2]
    if stride[0] > 1 or (t > 1 and h * w < _FEW_PIXELS):
        zeros = x.new_zeros((b, c, kt - stride[0], h, w))
        return _conv(torch.cat([zeros, x], dim=2), weight, bias, stride, padding)
    heads = range(1, min(kt, t + 1))  # output frame i - 1 sees i frames and the last i taps
    parts = [_conv(x[:, :, :i], weight[:, :, -i:], bias, stride, padding) for i in heads]
    if t >= kt:
        parts.append(_valid(x, weight, bias, stride, padding))
    return torch.cat(parts, dim=2)


def _valid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
) -> Tensor:
    """The convolution of frames that have their past before them; in pairs where that pays."""
    t = x.shape[2] - 2
    if not (_onednn(x, weight) and t > 1 and stride[0] == 1 and weight.shape[2:] == (3, 3, 3)):
        return _conv(x, weight, bias, stride, padding)
    if x.shape[3] * x.shape[4] < _FEW_PIXELS:
        return _conv(x, weight, bias, stride, padding)
    each = partial(_conv, padding=padding)
    if t % 2 == 0:
        return convolve_pairs(x, weight, bias, each)
    pairs = convolve_pairs(x[:, :, :-1], weight, bias, each)
    return torch.cat([pairs, _conv(x[:, :, -3:], weight, bias, stride, padding)], dim=2)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    # NOTE: F.conv3d itself leaves fp32 inputs of one sample with C*T*H <= 20480 to a kernel that is
    # up to 25 times slower than oneDNN's (torch 2.13, ATen/native/Convolution.cpp use_mkldnn).
    if _onednn(x, weight):
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """fp32 on a CPU, no backward pass."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return fp32_on_cpu and not _tracked(x, weight) and torch.backends.mkldnn.is_available()


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Three taps over pixels that stand twice -> two taps over the pixels, for either place."""
    a, b, c = weight.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])


def _tail(frames: Tensor, num: int) -> Tensor:
    """A copy of the last frames; where there are fewer, zeros in front."""
    missing = num - frames.shape[2]
    return F.pad(frames, (0, 0, 0, 0, missing, 0)) if missing > 0 else frames[:, :, -num:].clone()


def _frames_at_once(x: Tensor, weight: Tensor) -> int:
    """An even number, for the sake of strides; all frames where a backward pass wants them."""
    b, c, t, h, w = x.shape
    return t if _tracked(x, weight) else max(2, _PIECE // (b * c * h * w) // 2 * 2)


def _tracked(*tensors: Tensor) -> bool:
    """A backward pass will come."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d
    )
