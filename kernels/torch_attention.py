"""Attention of eight-bit values in plain PyTorch: the same numbers from fp32 products."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.limits import SCORES
from wanrt.kernels.reference import LARGEST, Preparation, hadamard_matrix, prepare_int8
from wanrt.kernels.torch_quantize import dequantize, quantize

FP8 = torch.float8_e4m3fn


class _Prepared(NamedTuple):
    """q and k `[B, H, n, hd]`, turned, rounded to their integers, in fp32."""

    q: Tensor
    k: Tensor
    scale: float  # of q k^T


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention_int8`; probabilities are not rounded."""
    ready = prepare_int8(q, k, v, torch.float16)
    x = _quantized(q, k, scale, ready)
    values = (v.float() / ready.v_scale).half().float()
    bias = None if bias is None else bias.float()
    y = F.scaled_dot_product_attention(x.q, x.k, values, attn_mask=bias, scale=x.scale)
    return (y * ready.v_scale).to(v.dtype)


def attention_int8_fp8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See `reference.attention_int8_fp8`. Peak: SCORES scores at a time, three times."""
    ready = prepare_int8(q, k, v, FP8)
    x = _quantized(q, k, scale, ready)
    values = ((v.float() - ready.v_mean) / ready.v_scale).to(FP8).float()
    b, h, length, _ = q.shape
    rows = max(1, SCORES // (b * h * k.shape[2]))
    y = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    for first in range(0, length, rows):
        some = slice(first, first + rows)
        scores = (x.q[:, :, some] * x.scale) @ x.k.transpose(-1, -2)
        if bias is not None:
            scores += bias if bias.shape[2] == 1 else bias[:, :, some]
        p = (scores - scores.amax(-1, keepdim=True)).exp_().mul_(LARGEST[FP8])
        sums = p.to(FP8).float() @ values / p.sum(-1, keepdim=True)
        y[:, :, some] = sums * ready.v_scale + ready.v_mean
    return y


def _quantized(q: Tensor, k: Tensor, scale: float | None, ready: Preparation) -> _Prepared:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    turn = hadamard_matrix(q.shape[-1], q.device)
    q32 = (q.float() * ready.q_factor) @ turn
    k32 = ((k.float() - ready.k_mean) * ready.k_factor) @ turn
    q32, k32 = (dequantize(quantize(x, torch.int8)) for x in (q32, k32))
    return _Prepared(q32, k32, scale / q.shape[-1])
