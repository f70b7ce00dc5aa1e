"""The VAE's causal convolution in plain PyTorch: history in front, norm and SiLU in the same pass."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN's conv3d falls off a cliff in fp32 at 16 channels or fewer (17 against 350 GFLOP/s on two
# AVX-512 cores, torch 2.13); there the temporal taps run as 2-D convolutions, summed.
_FEW_CHANNELS = 16


def rms_norm_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """`x / max(|x|, 1e-12) * sqrt(C) * gamma`, the norm taken over channels; x `[B, C, ...]`."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scale = math.sqrt(x.shape[1]) / norm.clamp_min(1e-12)
    return (x * scale.to(x.dtype)) * gamma.to(x.dtype)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve over `history` and `x`, spatially padded with zeros to keep its size.

    x `[B, C, T, H, W]`; weight `[O, C, kt, kh, kw]`; history `[B, C, kt-1, H, W]`, the frames that
    came before (zeros at the start), or None where kt is 1. With `gamma` `[C, 1, 1, 1]` the input
    is first normalised over channels and passed through SiLU; the history holds such frames then.
    Returns `[B, O, T, H, W]` and the history for the next call.
    Source: Wan2.1 @9737cba `wan/modules/vae.py` CausalConv3d, ResidualBlock.
    """
    kt = weight.shape[2]
    frames = _behind(history, x, gamma)
    kept = frames[:, :, frames.shape[2] - (kt - 1) :].clone() if kt > 1 else None
    return _conv(frames, weight, bias), kept


def _behind(history: Tensor | None, x: Tensor, gamma: Tensor | None) -> Tensor:
    """History, then x (normalised when gamma is given), in one buffer."""
    if torch.is_grad_enabled():
        x = x if gamma is None else F.silu(rms_norm_channels(x, gamma))
        return x if history is None else torch.cat([history, x], dim=2)
    if gamma is None:
        return x if history is None else torch.cat([history, x], dim=2)
    b, c, t, h, w = x.shape
    n = 0 if history is None else history.shape[2]
    out = torch.empty(
        (b, c, n + t, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    )
    if history is not None:
        out[:, :, :n] = history
    for i in range(t):  # a frame at a time stays in cache between the passes
        y = rms_norm_channels(x[:, :, i], gamma[..., 0])
        out[:, :, n + i] = F.silu(y, inplace=True)
    return out


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Valid in time, same size in space."""
    kt, kh, kw = weight.shape[2:]
    pad = (kh // 2, kw // 2)
    few = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] <= _FEW_CHANNELS
    if not (few and kh > 1 and x.shape[0] == 1):
        return F.conv3d(x, weight, bias, padding=(0, *pad))
    planes = x[0].transpose(0, 1)  # [kt-1+T, C, H, W]
    t = planes.shape[0] - kt + 1
    y = F.conv2d(planes[:t], weight[:, :, 0], bias, padding=pad)
    for i in range(1, kt):
        y = y + F.conv2d(planes[i : i + t], weight[:, :, i], padding=pad)
    return y.transpose(0, 1).unsqueeze(0)
