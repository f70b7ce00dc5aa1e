"""The VAE's ops of `reference_vae.py` in plain PyTorch, channels last: CPU path and fallback.

Where no backward pass will come, a clip goes through a few frames at a time, so that what lies
between two passes (normalised input, raw output of a convolution) stays small and in cache.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.torch_winograd import convolve_pairs, transform

_PIECE = 1 << 21  # elements of input that go through a convolution at once
_SLAB = 1 << 17  # elements that go through a norm at once, on a CPU
_SCORES = 1 << 24  # attention scores of one frame at once, where PyTorch writes them all
_FEW_PIXELS = 512  # on smaller frames, another weight costs as much as multiplying by zeros


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.rms_norm_channels`."""
    gamma = gamma.view(-1, *[1] * (x.ndim - 2))
    return (x * _root_over_length(x) * gamma).to(x.dtype)


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
    """See `reference_vae.causal_conv3d`; what sums are added up in is PyTorch's choice.

    A few frames at a time go through one buffer, behind those that they see.
    """
    b, c, t, h, w = x.shape
    kt = weight.shape[2]
    conv = _Convolution(weight, bias, stride, _pairs_pay(x, weight, stride))
    if _tracked(x, weight):
        return _convolve_tracked(conv, x, history, gamma, residual)
    if kt == 1 and gamma is None and out is None and _is_dense(x):
        return conv.store(conv(x), residual, None), None
    past, starts = kt - stride, history is None and kt > 1
    sizes = _pieces(x, weight, lone=starts and conv.taps is not None)
    if out is None and len(sizes) > 1:
        out = _empty(x, (b, weight.shape[0], t // stride, h, w))
    frames = _empty(x, (b, c, past + max(sizes), h, w))
    frames[:, :, :past] = 0 if history is None else history
    y, done = out, 0
    for n in sizes:
        held = frames[:, :, : past + n]
        _fill(held[:, :, past:], x[:, :, done : done + n], gamma)
        now = slice(done // stride, (done + n) // stride)
        beside = None if residual is None else residual[:, :, now]
        y = conv.into(held, beside, None if out is None else out[:, :, now], starts and not done)
        done += n
        if done < t:
            frames[:, :, :past] = held[:, :, n:] if n >= past else held[:, :, n:].clone()
    return y if out is None else out, held[:, :, n:].clone() if kt > 1 else None


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


class _Convolution:
    """A weight and what is made of it once for all pieces of a clip."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, in_pairs: bool) -> None:
        self.weight, self.bias, self.stride = weight, bias, stride
        self.padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
        self.taps = transform(weight) if in_pairs else None

    def __call__(self, frames: Tensor, weight: Tensor | None = None) -> Tensor:
        """Of frames that have their past before them, with the last taps or all."""
        weight = self.weight if weight is None else weight
        return _conv(frames, weight, self.bias, (self.stride, 1, 1), self.padding)

    def into(
        self, frames: Tensor, residual: Tensor | None, out: Tensor | None, starts: bool
    ) -> Tensor:
        """Of frames behind their past; `starts`: that is zeros. The result, in out if given."""
        past = self.weight.shape[2] - self.stride
        if starts and frames[0, 0, 0].numel() >= _FEW_PIXELS and self.stride == 1:
            return self.store(self.start(frames[:, :, past:]), residual, out)
        paired = (frames.shape[2] - past) // 2 * 2 if self.taps else 0
        if not paired:
            return self.store(self(frames), residual, out)
        if out is None:
            b, _, n, h, w = frames.shape
            out = _empty(frames, (b, len(self.weight), n - past, h, w))
        rest = frames[:, :, paired:]
        each = partial(_conv, padding=self.padding)
        beside = None if residual is None else residual[:, :, :paired]
        paired_frames, y = frames[:, :, : past + paired], out[:, :, :paired]
        convolve_pairs(paired_frames, self.taps, self.bias, each, beside, y)
        if rest.shape[2] > past:
            beside = None if residual is None else residual[:, :, paired:]
            self.store(self(rest), beside, out[:, :, paired:])
        return out

    def start(self, x: Tensor) -> Tensor:
        """Of the first frames of a clip: taps that would meet zeros are left out."""
        kt, t = self.weight.shape[2], x.shape[2]
        heads = range(1, min(kt, t + 1))  # output frame i - 1 sees i frames and the last i taps
        parts = [self(x[:, :, :i], self.weight[:, :, -i:]) for i in heads]
        if t >= kt:
            parts.append(self(x))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    @staticmethod
    def store(y: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        """y, which nobody else holds, and the residual; out may be the residual."""
        if out is None:
            return y if residual is None else y.add_(residual)
        return out.copy_(y) if residual is None else torch.add(y, residual, out=out)


def _convolve_tracked(
    conv: _Convolution,
    x: Tensor,
    history: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv3d` in one piece, for a backward pass."""
    x = x if gamma is None else channel_norm_silu(x, gamma)
    past = conv.weight.shape[2] - conv.stride
    few = x[0, 0, 0].numel() < _FEW_PIXELS or conv.stride > 1
    if history is None and past and not (few and x.shape[2] > 1):
        y, frames = conv.start(x), F.pad(x, (0, 0, 0, 0, past, 0))
    else:
        behind = x.new_zeros((*x.shape[:2], past, *x.shape[3:])) if history is None else history
        frames = torch.cat([behind, x], dim=2) if past else x
        y = conv(frames)
    kept = frames[:, :, frames.shape[2] - past :].clone() if conv.weight.shape[2] > 1 else None
    return conv.store(y, residual, None), kept


def _fill(frames: Tensor, x: Tensor, gamma: Tensor | None) -> None:
    """x, normalised and through SiLU where gamma is given, into frames that lie channels last."""
    if gamma is None:
        frames.copy_(x)
        return
    _, c, t, h, w = x.shape
    size = max(1, _SLAB // c) if x.device.type == "cpu" else t * h * w
    for source, target in zip(x, frames, strict=True):
        rows = source.permute(1, 2, 3, 0).reshape(-1, c)  # [THW, C]
        targets = target.permute(1, 2, 3, 0).view(-1, c)
        for a, y in zip(rows.split(size), targets.split(size), strict=True):
            if y.dtype == torch.float32:
                torch.mul(a, _root_over_length(a), out=y)
                F.silu(y.mul_(gamma.flatten()), inplace=True)
            else:
                wide = a.float()
                wide.mul_(_root_over_length(wide)).mul_(gamma.flatten())
                y.copy_(F.silu(wide, inplace=True))


def _root_over_length(x: Tensor) -> Tensor:
    """sqrt(C) / max(|x|, 1e-12) over the channels, dimension 1; fp32."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return math.sqrt(x.shape[1]) / norm.clamp_min(1e-12)


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
    if x.device.type == "cpu" and x.dtype == torch.float16 and not _tracked(x, weight):
        # NOTE: F.conv3d of fp16 takes a CPU without instructions for it far longer than of fp32.
        y = _conv(x.float(), weight.float(), bias.float(), stride, padding)
        return y.to(x.dtype, memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, stride, padding)


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """fp32 on a CPU, no backward pass."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return fp32_on_cpu and not _tracked(x, weight) and torch.backends.mkldnn.is_available()


def _fold(weight: Tensor, dim: int) -> Tensor:
    """Three taps over pixels that stand twice -> two taps over the pixels, for either place."""
    a, b, c = weight.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])


def _frames_at_once(x: Tensor, weight: Tensor) -> int:
    """An even number, for the sake of strides; all frames where a backward pass wants them."""
    b, c, t, h, w = x.shape
    return t if _tracked(x, weight) else max(2, _PIECE // (b * c * h * w) // 2 * 2)


def _pieces(x: Tensor, weight: Tensor, lone: bool) -> list[int]:
    """Frames of each piece; `lone`: of an odd number the first stands alone, the rest are pairs."""
    t, size = x.shape[2], _frames_at_once(x, weight)
    first = [1] if lone and t % 2 and t > 1 else []
    return first + [min(size, t - i) for i in range(len(first), t, size)]


def _pairs_pay(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Two frames in four products, not six; in fp32 on a CPU, and where frames are large."""
    if not _onednn(x, weight) or x.shape[2] == 1 or weight.shape[2:] != (3, 3, 3) or stride > 1:
        return False
    return x.shape[3] * x.shape[4] >= _FEW_PIXELS


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def _tracked(*tensors: Tensor) -> bool:
    """A backward pass will come."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d
    )
