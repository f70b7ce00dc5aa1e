"""The ops of `reference.py` as torch.onnx.export is to see them: each as the standard ops of ONNX.

They run in PyTorch too, which is how they are tested, but nothing is chosen for speed there. The
norms become LayerNormalization and RMSNormalization, rotation becomes RotaryEmbedding (interleaved)
and attention Attention, all of opset 23.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.reference import store


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `reference.layer_norm`."""
    y = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y.to(dtype or x.dtype)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See `reference.layer_norm_modulate`."""
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (y * (1 + scale.float()) + shift.float()).to(dtype or x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.gated_residual`."""
    return store(x.float() + gate.float() * y.float(), out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """See `reference.rms_norm`.

    The normalised value is rounded to x's dtype, so the op itself is given a weight of ones; in
    fp32 there is nothing to round and it takes the weight.
    """
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight.float(), eps).to(dtype or x.dtype)
    y = F.rms_norm(x.float(), x.shape[-1:], torch.ones_like(weight, dtype=torch.float32), eps)
    return (y.to(x.dtype).float() * weight.float()).to(dtype or x.dtype)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    freqs: Tensor,
    num_heads: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `reference.rms_norm_rope`; the result is a view [B, H, L, hd] of [B, L, H, hd]."""
    y = rms_norm(x, weight, eps, torch.float32)
    cos, sin = freqs.expand(len(x), -1, -1, -1).unbind(-1)  # [B, L, hd / 2] each
    y = torch.onnx.ops.rotary_embedding(y, cos, sin, interleaved=True, num_heads=num_heads)
    return y.to(dtype or x.dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def gelu(x: Tensor, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """See `reference.gelu`."""
    return store(F.gelu(x, approximate=approximate), out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention`; the bias is rounded to q's dtype, which is what the op takes.

    NOTE: it is written out for every query: ONNX Runtime 1.31's op does not broadcast it.
    """
    if bias is not None:
        bias = bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
