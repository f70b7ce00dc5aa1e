"""The ops of `reference.py` in the fewest passes plain PyTorch allows: CPU path and fallback."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `reference.layer_norm`."""
    y = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y.to(dtype or x.dtype)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `reference.layer_norm_modulate`. One pass where one sample is modulated as a whole."""
    scale, shift, width = 1 + scale.float(), shift.float(), x.shape[-1:]
    if scale.numel() == shift.numel() == x.shape[-1]:
        y = F.layer_norm(x.float(), width, scale.reshape(-1), shift.reshape(-1), eps)
    else:
        y = torch.addcmul(shift, F.layer_norm(x.float(), width, eps=eps), scale)
    return y.to(dtype or x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.gated_residual`."""
    return torch.addcmul(x.float(), y.float(), gate.float(), out=out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """See `reference.rms_norm`."""
    return (_rms_normalise(x, eps) * weight.float()).to(dtype or x.dtype)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    freqs: Tensor,
    num_heads: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `reference.rms_norm_rope`; the result is a view [B, H, L, hd] of [B, L, H, hd].

    A pair is a complex number and its rotation a complex product. In fp32, 1 / RMS rides on it.
    """
    turn = torch.view_as_complex(freqs)[:, None]  # [L, 1, hd / 2]
    if x.dtype == torch.float32:
        turn = turn * _inverse_rms(x, eps).unsqueeze(-1)  # [B, L, 1, hd / 2]
        y = x * weight
    else:
        y = _rms_normalise(x, eps) * weight.float()
    pairs = torch.view_as_complex(y.unflatten(-1, (num_heads, -1, 2))) * turn
    return torch.view_as_real(pairs).flatten(-2).to(dtype or x.dtype).transpose(1, 2)


def gelu(x: Tensor, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """See `reference.gelu`."""
    if out is None:
        return F.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention`. On a CPU a backward pass through plain products is faster.

    NOTE: the bias is rounded to q's dtype on CUDA, whose kernels take no other; fp32 elsewhere.
    """
    if bias is not None and q.device.type == "cuda":
        bias = bias.to(q.dtype)
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        scores = scores if bias is None else scores + bias
        return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def _rms_normalise(x: Tensor, eps: float) -> Tensor:
    return (x * _inverse_rms(x, eps)).to(x.dtype)
