"""The specification of the VAE's ops: plain PyTorch, fp32 inside, formula and source.

`torch_conv.py` and `torch_conv_int8.py` have the same names and signatures.
Source: Wan2.1 @9737cba `wan/modules/vae.py`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.reference import quantize, store


class QuantizedConv(NamedTuple):
    """An int8 3x3x3 convolution and the static int8 format of its input.

    A value q of input channel c stands for (q - zero_c) * step_c, so that `zero` is exactly 0; a
    value w of output channel o for w * scale_o / step_c. `border` [3, 4, 4, O] is the sum of
    zero * w over the taps that see something, by how many frames before x are missing and by
    which of the first row (1) and the last (2) a pixel lies in, and the same of columns: who
    reads padding as 0 takes it from the plain sum of products. All zeros: a symmetric format.
    """

    values: Tensor  # int8 [O, C, 3, 3, 3]
    scale: Tensor  # fp32 [O]
    step: Tensor  # fp32 [C]
    zero: Tensor  # int8 [C]
    border: Tensor  # int32 [3, 4, 4, O]


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(|x|_2, 1e-12) * sqrt(C) * gamma, the norm taken over the channel axis 1.

    x [B, C, ...], gamma with C elements (any trailing ones) -> [B, C, ...].
    """
    x32 = x.float().movedim(1, -1).contiguous()
    norm = x32.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    y = x32 / norm * math.sqrt(x.shape[1]) * gamma.float().flatten()
    return y.movedim(-1, 1).to(x.dtype)


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU(rms_norm_channels(x)), rounded once: a / (1 + e^-a).

    x [B, C, ...], gamma with C elements (any trailing ones) -> [B, C, ...].
    """
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
    """3-D convolution that sees no later frame: `history`, the frames before x, stands in front.

    None is the start of a clip, zeros. Zeros around each frame keep its size. With `gamma`, x first
    becomes `channel_norm_silu(x, gamma)`, and the history holds such frames. `residual` is added to
    the result, and may be what `out` overwrites. `stride` is that of time.
    Frame by frame, so that no bit of the result depends on where a clip is cut into pieces.
    `accumulator` permits what is not done here: fp16 lets fp16 products be added up in fp16, at
    most 128 before they join an fp32 sum. GeForce cards do so twice as fast.
    x [B, C, T, H, W], weight [O, C, kt, kh, kw], history [B, C, kt - stride, H, W]
    -> [B, O, T / stride, H, W] and the history of what follows x (None where kt is 1).
    """
    kt, kh, kw = weight.shape[2:]
    if gamma is not None:
        x = torch.cat([channel_norm_silu(frame, gamma) for frame in x.split(1, 2)], 2)
    if history is None:
        history = x.new_zeros(*x.shape[:2], kt - stride, *x.shape[3:])
    frames = torch.cat((history, x), 2)
    ends = range(kt, frames.shape[2] + 1, stride)
    y = [_conv(frames[:, :, end - kt : end], weight, bias, (0, kh // 2, kw // 2)) for end in ends]
    kept = frames[:, :, frames.shape[2] - (kt - stride) :].clone() if kt > 1 else None
    total = torch.cat(y, 2) if residual is None else torch.cat(y, 2) + residual.float()
    return store(total.to(x.dtype), out), kept


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v: one head as wide as all channels, over the pixels of each frame.

    q, k, v [B, T, L, C] with L pixels -> [B, T, L, C].
    """
    q32, k32, v32 = (x.float() for x in (q, k, v))
    scores = q32 @ k32.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v32).to(q.dtype)


def quantize_conv_weight(weight: Tensor, step: Tensor, zero: Tensor) -> QuantizedConv:
    """A convolution for inputs of a given format: weight * step, one scale per output. Offline.

    weight [O, C, 3, 3, 3], step fp32 [C], zero int8 [C]. What a channel's step takes from its
    inputs its weights get (SmoothQuant, arXiv:2211.10438).
    """
    wide = weight.float() * step[:, None, None, None]
    rows = quantize(wide.flatten(1), torch.int8)
    values = rows.values.view(weight.shape)
    return QuantizedConv(values, rows.scale[:, 0], step, zero, border_sums(values, zero))


def border_sums(values: Tensor, zero: Tensor) -> Tensor:
    """`QuantizedConv.border`, int32 [3, 4, 4, O], from its values and zero points; exact."""
    sums = (values.double() * zero.double()[:, None, None, None]).sum(1)  # [O, 3, 3, 3]
    sides = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 1, 0]], device=values.device)
    ages = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]], device=values.device)
    seen = [table.double() for table in (ages, sides, sides)]
    return torch.einsum("othw,at,rh,cw->arco", sums, *seen).int().contiguous()


def channel_norm_silu_quantize(x: Tensor, gamma: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """`channel_norm_silu` in int8: clamp(round(a * (1 / step_c) + zero_c), -127, 127).

    x [B, C, ...], gamma, step and zero with C elements -> int8 [B, C, ...].
    """
    shape = (1, -1, *[1] * (x.ndim - 2))
    a = F.silu(rms_norm_channels(x.float(), gamma))
    q = a * step.reciprocal().view(shape) + zero.float().view(shape)
    return q.round().clamp(-127, 127).to(torch.int8)


def causal_conv3d_int8(
    x: Tensor,
    weight: QuantizedConv,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv3d` with norm, SiLU and 3x3x3 taps, whose products are of int8.

    x becomes q = channel_norm_silu_quantize(x, gamma, step, zero); y = s * scale_o + bias with the
    exact integer s, the sum over the taps of (q - zero) * values; the residual is added and the
    result rounded once. Outside of frames and before the clip, q is `zero`. The scales are static:
    one for each pixel would not factor out of a sum over taps, and the past would need them all.
    x [B, C, T, H, W], history int8 [B, C, 2, H, W] or None -> [B, O, T, H, W] in x's dtype and the
    int8 history of what follows x.
    """
    zero = weight.zero.view(1, -1, 1, 1, 1)
    frames = [
        channel_norm_silu_quantize(frame, gamma, weight.step, weight.zero)
        for frame in x.split(1, 2)
    ]
    first = zero.expand(*x.shape[:2], 2, *x.shape[3:]) if history is None else history
    q = torch.cat((first, *frames), 2)
    taps = weight.values.double()
    scale, bias = (v.float().view(1, -1, 1, 1, 1) for v in (weight.scale, bias))
    y = []
    for end in range(3, q.shape[2] + 1):
        whole = q[:, :, end - 3 : end].double() - zero.double()
        y.append(F.conv3d(whole, taps, padding=(0, 1, 1)).float() * scale + bias)
    total = torch.cat(y, 2) if residual is None else torch.cat(y, 2) + residual.float()
    return store(total.to(x.dtype), out), q[:, :, q.shape[2] - 2 :].clone()


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each frame to twice its height and width (every pixel four times), then a 3x3 convolution.

    x [B, C, T, H, W], weight [O, C, 3, 3] -> [B, O, T, 2H, 2W].
    """
    large = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
    y = [_conv(frame, weight[:, :, None], bias, (0, 1, 1)) for frame in large.split(1, 2)]
    return torch.cat(y, 2).to(x.dtype)


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of stride 2 on each frame, zeros at its right and bottom edge only.

    x [B, C, T, H, W] of even H and W, weight [O, C, 3, 3] -> [B, O, T, H / 2, W / 2].
    """
    padded = F.pad(x, (0, 1, 0, 1))
    frames = padded.split(1, 2)
    y = [_conv(frame, weight[:, :, None], bias, stride=(1, 2, 2)) for frame in frames]
    return torch.cat(y, 2).to(x.dtype)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: tuple[int, int, int] = (0, 0, 0),
    stride: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    return F.conv3d(x.float().contiguous(), weight.float(), bias.float(), stride, padding)
