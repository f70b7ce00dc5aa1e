"""Eight-bit formats in plain PyTorch: CPU path and fallback."""

import torch
from torch import Tensor

from wanrt.kernels.reference import LARGEST, TINY, Quantized, rotate
from wanrt.kernels.torch_ops import layer_norm_modulate


def quantize(
    x: Tensor, dtype: torch.dtype, group: int | None = None, hadamard: bool = False
) -> Quantized:
    """See `reference.quantize`."""
    x = rotate(x) if hadamard else x.float()
    groups = x.unflatten(-1, (-1, group or x.shape[-1]))  # [..., G, group]
    largest = torch.linalg.vector_norm(groups, torch.inf, -1, keepdim=True).clamp_min(TINY)
    limit = torch.full_like(largest, LARGEST[dtype])
    values = groups * (limit / largest)
    values = values.round_() if dtype == torch.int8 else values
    return Quantized(values.flatten(-2).to(dtype), (largest / limit).squeeze(-1))


def quantize_weight(weight: Tensor, dtype: torch.dtype, hadamard: bool = False) -> Quantized:
    """See `reference.quantize_weight`."""
    return quantize(weight, dtype, hadamard=hadamard)


def dequantize(x: Quantized) -> Tensor:
    """See `reference.dequantize`."""
    groups = x.values.float().unflatten(-1, (x.scale.shape[-1], -1))
    return (groups * x.scale.unsqueeze(-1)).flatten(-2)


def layer_norm_modulate_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    hadamard: bool = False,
) -> Quantized:
    """See `reference.layer_norm_modulate_quantize`."""
    y = layer_norm_modulate(x, scale, shift, eps, torch.float32)
    return quantize(y, dtype, hadamard=hadamard)
