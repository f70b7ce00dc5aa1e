"""Eight-bit formats in plain PyTorch: CPU path and fallback."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.reference import (
    LARGEST,
    TINY,
    Quantized,
    hadamard_matrix,
    prepare_int8,
    rotate,
)
from wanrt.kernels.torch_ops import layer_norm_modulate


def quantize(
    x: Tensor, dtype: torch.dtype, group: int | None = None, hadamard: bool = False
) -> Quantized:
    """See `reference.quantize`."""
    x = rotate(x) if hadamard else x.float()
    groups = x.unflatten(-1, (-1, group or x.shape[-1]))  # [..., G, group]
    largest = torch.linalg.vector_norm(groups, torch.inf, -1, keepdim=True).clamp_min(TINY)
    values = groups * (torch.full_like(largest, LARGEST[dtype]) / largest)
    values = values.round_() if dtype == torch.int8 else values
    return Quantized(values.flatten(-2).to(dtype), (largest / LARGEST[dtype]).squeeze(-1))


def quantize_weight(weight: Tensor, dtype: torch.dtype, hadamard: bool = False) -> Quantized:
    """See `reference.quantize_weight`."""
    return quantize(weight, dtype, hadamard=hadamard)


def dequantize(x: Quantized) -> Tensor:
    """See `reference.dequantize`."""
    groups = x.values.float().unflatten(-1, (x.scale.shape[-1], -1))
    return (groups * x.scale.unsqueeze(-1)).flatten(-2)


def layer_norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> Quantized:
    """See `reference.layer_norm_modulate_quantize`."""
    return quantize(layer_norm_modulate(x, scale, shift, eps, torch.float32), dtype)


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention_int8`. The same numbers from fp32 products, at their speed."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    ready = prepare_int8(q, k, v)
    turn = hadamard_matrix(q.shape[-1], q.device)
    q32 = (q.float() * ready.q_factor) @ turn
    k32 = ((k.float() - ready.mean) * ready.k_factor) @ turn
    q32, k32 = (dequantize(quantize(x, torch.int8)) for x in (q32, k32))
    v32 = (v.float() / ready.v_scale).half().float()
    bias = None if bias is None else bias.float()
    y = F.scaled_dot_product_attention(q32, k32, v32, attn_mask=bias, scale=scale / q.shape[-1])
    return (y * ready.v_scale).to(v.dtype)
