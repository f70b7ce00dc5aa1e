"""The VAE's ops of `reference_vae.py` as torch.onnx.export is to see them: standard ops of ONNX.

They run in PyTorch too, which is how they are tested, but nothing is chosen for speed there. The
norms become ReduceL2 and products in fp32, upsampling Resize and attention MatMul, Softmax, MatMul.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.reference import store


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.rms_norm_channels`."""
    return _normalised(x, gamma).to(x.dtype)


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """See `reference_vae.channel_norm_silu`."""
    return F.silu(_normalised(x, gamma)).to(x.dtype)


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
    """See `reference_vae.causal_conv3d`; what sums are added up in is the engine's choice.

    A single frame at the start of a clip meets the last taps alone: the others would see zeros.
    """
    kt, kh, kw = weight.shape[2:]
    padding, past = (0, kh // 2, kw // 2), kt - stride
    if gamma is not None:
        x = channel_norm_silu(x, gamma)
    alone = history is None and x.shape[2] == 1
    frames = F.pad(x, (0, 0, 0, 0, past, 0)) if history is None else torch.cat((history, x), 2)
    if alone:
        y = F.conv3d(x, weight[:, :, kt - 1 :], bias, (stride, 1, 1), padding)
    else:
        y = F.conv3d(frames, weight, bias, (stride, 1, 1), padding)
    kept = frames[:, :, frames.shape[2] - past :].clone() if kt > 1 else None
    return store(y if residual is None else y + residual, out), kept


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_vae.upsample_conv2d`."""
    large = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
    return F.conv3d(large, weight.unsqueeze(2), bias, padding=(0, 1, 1))


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_vae.downsample_conv2d`."""
    return F.conv3d(F.pad(x, (0, 1, 0, 1)), weight.unsqueeze(2), bias, stride=(1, 2, 2))


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference_vae.frame_attention`; the scores are written out, in q's dtype.

    No fused kernel of TensorRT for RTX takes heads as wide as these (384 in Wan 2.1).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v


def _normalised(x: Tensor, gamma: Tensor) -> Tensor:
    """`rms_norm_channels` before it is rounded, fp32."""
    x = x.float()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    gamma = gamma.float().view(-1, *[1] * (x.ndim - 2))
    return x / norm * math.sqrt(x.shape[1]) * gamma
