"""The VAE's int8 convolution in plain PyTorch: CPU path and fallback.

A frame lies in rows of pixels with a border of zero points around it. Then what one tap sees is a
slice of those rows, and a tap is one product of `torch._int_mm`: exact in s32 on CPUs and GPUs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference_vae
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.kernels.torch_linear import multiply_int8


def quantize_conv_weight(weight: Tensor, step: Tensor, zero: Tensor) -> QuantizedConv:
    """See `reference_vae.quantize_conv_weight`; values lie channels last."""
    conv = reference_vae.quantize_conv_weight(weight, step, zero)
    return conv._replace(values=conv.values.contiguous(memory_format=torch.channels_last_3d))


def channel_norm_silu_quantize(x: Tensor, gamma: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """See `reference_vae`. A frame at a time; the result lies channels last."""
    if x.ndim < 5:
        return _quantize(x, gamma, step, zero)
    q = torch.empty(
        x.shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last_3d
    )
    for t in range(x.shape[2]):
        q[:, :, t] = _quantize(x[:, :, t], gamma, step, zero)
    return q


def causal_conv3d_int8(
    x: Tensor,
    weight: QuantizedConv,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `reference_vae`. Peak: int8 frames, and three results of one frame in 32 bits."""
    b, c, t, h, w = x.shape
    o = len(weight.values)
    rows = (h + 2) * (w + 2) + 2  # the last tap of the last pixel reads two rows beyond
    frames = weight.zero.expand(b, t + 2, rows, c).contiguous()
    inner = frames[:, :, :-2].unflatten(2, (h + 2, w + 2))[:, :, 1:-1, 1:-1]  # [B, T + 2, H, W, C]
    if history is not None:
        inner[:, :2] = history.movedim(1, -1)
    for j in range(t):
        inner[:, 2 + j] = _quantize(x[:, :, j], gamma, weight.step, weight.zero).movedim(1, -1)
    taps = weight.values.permute(2, 3, 4, 0, 1).contiguous()  # [3, 3, 3, O, C]
    if out is None:
        shape = (b, o, t, h, w)
        out = torch.empty(
            shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
        )
    for i in range(b):
        for j in range(t):
            beside = None if residual is None else residual[i, :, j]
            out[i, :, j] = _frame(frames[i, j : j + 3], taps, weight, bias, beside, (h, w))
    return out, inner[:, t:].movedim(-1, 1).contiguous(memory_format=torch.channels_last_3d)


def _frame(
    frames: Tensor,
    taps: Tensor,
    weight: QuantizedConv,
    bias: Tensor,
    residual: Tensor | None,
    size: tuple[int, int],
) -> Tensor:
    """frames [3, rows, C], residual [O, H, W] -> fp32 [O, H, W]."""
    h, w = size
    whole = weight.border[0, 0, 0]  # the border is in the frames: no tap sees nothing
    sums = _sum(frames, taps, h, w + 2).sub_(whole)
    y = sums.unflatten(0, (h, w + 2))[:, :w] * weight.scale
    y += bias
    if residual is not None:
        y += residual.movedim(0, -1)
    return y.movedim(-1, 0)


def _sum(frames: Tensor, taps: Tensor, height: int, stride: int) -> Tensor:
    """frames [3, rows, C] -> int32 [height * stride, O]; two columns of each row mean nothing."""
    total, length = None, height * stride
    for frame, planes in zip(frames, taps, strict=True):
        for dh in range(3):
            for dw in range(3):
                seen = frame[dh * stride + dw :][:length]
                part = multiply_int8(seen, planes[dh, dw])
                total = part if total is None else total.add_(part)
                del part  # or it would be there while the next one is made
    assert total is not None
    return total


def _quantize(x: Tensor, gamma: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """x [B, C, ...]."""
    shape = (-1, *[1] * (x.ndim - 2))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    a = x * (math.sqrt(x.shape[1]) / norm.clamp_min(1e-12)) * gamma.view(shape)
    a = F.silu(a.float(), inplace=True)
    a = a.mul_(step.reciprocal().view(shape)).add_(zero.view(shape))
    return a.round_().clamp_(-127, 127).to(torch.int8)
