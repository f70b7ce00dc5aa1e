"""The specification: every op of the models in plain PyTorch, fp32 inside, formula and source.

`torch_ops.py` has the same names and signatures; `torch_quantize.py` and `torch_linear.py` have
those of the eight-bit formats and their products. The VAE's ops are in `reference_vae.py`.
`dtype` is that of the result: the caller names the one in which the next matrix product runs (None
keeps the input's). `out` receives the result and may be the first input itself.

Source: Wan2.1 @9737cba `wan/modules/model.py`, `attention.py`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINY = 1e-30  # stands for the largest absolute value of a row of zeros
FP8_BITS = 8  # the largest power of two that fp8 (e4m3) holds
GROUP = 128  # columns that are rotated together, and that one scale of a linear's result covers


class Quantized(NamedTuple):
    """Eight-bit values `[..., D]` and fp32 `scale` `[..., G]` of each of G groups of columns.

    A value stands for value * scale of its group; the D / G columns of a group lie together. No
    |value| is above `peak`, where that is known.
    """

    values: Tensor
    scale: Tensor
    peak: float | None = None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, with the biased variance.

    x [..., D], weight [D], bias [D] -> [..., D].
    """
    return (_normalise(x, eps) * weight.float() + bias.float()).to(dtype or x.dtype)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """LN(x) * (1 + scale) + shift, where LN has no weight and no bias.

    x [B, L, D]; scale, shift [B, 1, D] per sample or [B, L, D] per token -> [B, L, D].
    """
    y = _normalise(x, eps) * (1 + scale.float()) + shift.float()
    return y.to(dtype or x.dtype)


def quantize(
    x: Tensor, dtype: torch.dtype, group: int | None = None, hadamard: bool = False
) -> Quantized:
    """x as int8 or fp8 (e4m3), one scale for each row, or for each `group` of its columns.

    scale = max|x| / M and values = round(x * (M / max|x|)), ties to even; M is 127 or 448.
    Quotients are rounded once, here and on every device: of a number and a tensor PyTorch makes a
    reciprocal, then a product (a number above on a CPU, one below on CUDA).
    With `hadamard`, x is first rotated: an outlier is spread over its 128 columns.
    x [..., D] -> values [..., D], scale [..., D / group].
    """
    x = rotate(x) if hadamard else x.float()
    groups = x.unflatten(-1, (-1, group or x.shape[-1]))  # [..., G, group]
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(TINY)
    limit = torch.full_like(largest, LARGEST[dtype])
    values = groups * (limit / largest)
    values = values.round() if dtype == torch.int8 else values
    return Quantized(values.flatten(-2).to(dtype), (largest / limit).squeeze(-1))


def quantize_weight(weight: Tensor, dtype: torch.dtype, hadamard: bool = False) -> Quantized:
    """A linear's weight [O, I], one scale for each output channel: scale [O, 1]. Done offline.

    The rotation R is symmetric and its own inverse, so that (x R) (W R)^T = x W^T: a weight that
    was rotated wants rotated activations, and nothing else changes.
    """
    return quantize(weight, dtype, hadamard=hadamard)


def rotate(x: Tensor) -> Tensor:
    """x H / sqrt(128) on each 128 columns: orthogonal and its own inverse. fp32."""
    turn = hadamard_matrix(GROUP, x.device) / math.sqrt(GROUP)
    return (x.float().unflatten(-1, (-1, GROUP)) @ turn).flatten(-2)


def hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """fp32 [size, size] of 1 and -1: minus where the numbers of row and column share odd bits."""
    assert size & (size - 1) == 0, f"{size=} is not a power of two"
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def dequantize(x: Quantized) -> Tensor:
    """fp32 [..., D]."""
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
    """`quantize(layer_norm_modulate(x, scale, shift, eps), dtype, hadamard)`: a scale a row."""
    y = layer_norm_modulate(x, scale, shift, eps, torch.float32)
    return quantize(y, dtype, hadamard=hadamard)


def linear_quantized(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activation: str | None = None,
) -> Tensor:
    """act(sum_g x.scale_g (x_g @ W_g^T) * weight.scale + bias), act None or "gelu_tanh".

    The product of the values in one scale group g is exact; the groups add up in fp32.
    x values [..., I], scale [..., 1] or [..., I / 128]; weight values [O, I], scale [O, 1] per
    channel or [1, 1] for the whole tensor; x and weight both int8 or both fp8 -> [..., O].
    """
    products = torch.zeros(*x.values.shape[:-1], len(weight.values), device=x.values.device)
    width = x.values.shape[-1] // x.scale.shape[-1]
    groups = zip(x.values.split(width, -1), weight.values.split(width, -1), strict=True)
    for g, (values, columns) in enumerate(groups):
        exact = values.double() @ columns.double().T
        products += exact.float() * x.scale[..., g, None]
    y = products * weight.scale.T.squeeze(0)
    y = y if bias is None else y + bias.float()
    if activation is not None:
        assert activation == "gelu_tanh", f"{activation=}"
        y = gelu(y)
    return y.to(dtype)


def linear_quantized_out(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    activation: str | None = None,
    hadamard: bool = False,
) -> Quantized:
    """`quantize(linear_quantized(x, weight, bias, fp32, activation), dtype, 128, hadamard)`.

    What the next linear takes: values [..., O] in dtype (int8 or fp8), scale [..., O / 128].
    """
    y = linear_quantized(x, weight, bias, torch.float32, activation)
    return quantize(y, dtype, GROUP, hadamard)


def linear_gated_residual(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual + gate * linear_quantized(x, weight, bias, fp32); no gate is a gate of one.

    x [B, L, I], residual fp32 [B, L, O], gate [B or 1, L or 1, O] -> fp32 [B, L, O].
    `out` may be the residual itself.
    """
    y = linear_quantized(x, weight, bias, torch.float32)
    return store(residual + (y if gate is None else gate.float() * y), out)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """x + gate * y in fp32: the residual stream.

    x, y [B, L, D]; gate [B, 1, D] per sample or [B, L, D] per token -> fp32 [B, L, D].
    """
    return store(x.float() + gate.float() * y.float(), out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    The normalised value is rounded to x's dtype before it meets the fp32 weight, as in the source.
    x [..., D], weight [D] -> [..., D].
    """
    x32 = x.float()
    n = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (n.to(x.dtype).float() * weight.float()).to(dtype or x.dtype)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    freqs: Tensor,
    num_heads: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`rms_norm` over the full width, then heads, then a rotation of each adjacent pair.

    (a, b) = (y[2j], y[2j+1]) -> (a cos - b sin, a sin + b cos), with cos, sin = freqs[l, j].
    x [B, L, H * hd], weight [H * hd], freqs fp32 [L, hd / 2, 2] = (cos, sin) -> [B, H, L, hd].
    """
    y = rms_norm(x, weight, eps, torch.float32)
    a, b = y.unflatten(-1, (num_heads, -1, 2)).transpose(1, 2).unbind(-1)  # [B, H, L, hd / 2]
    cos, sin = freqs.unbind(-1)
    pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return pairs.flatten(-2).to(dtype or x.dtype)


def gelu(x: Tensor, approximate: str = "tanh", out: Tensor | None = None) -> Tensor:
    """0.5 x (1 + f), f = tanh(sqrt(2 / pi) (x + 0.044715 x^3)), or erf(x / sqrt 2) for "none"."""
    x32 = x.float()
    if approximate == "tanh":
        inner = torch.tanh(math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32.pow(3)))
    else:
        assert approximate == "none", f"{approximate=}"
        inner = torch.erf(x32 / math.sqrt(2))
    return store((0.5 * x32 * (1 + inner)).to(x.dtype), out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v: dense, every query sees every key.

    q [B, H, L, hd], k and v [B, H, n, hd], one dtype; `scale` defaults to 1 / sqrt(hd). `bias` is
    additive and broadcasts to [B, H, L, n]: [B or 1, 1, 1, n] is a key bias. -> [B, H, L, hd].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.float() @ k.float().transpose(-1, -2) * scale  # [B, H, L, n]
    if bias is not None:
        scores = scores + bias.float()
    return (scores.softmax(-1) @ v.float()).to(v.dtype)


class Preparation(NamedTuple):
    """What q, k and v meet before the products of `attention_int8`, fp32 [B, H, 1, hd].

    k loses its mean over the keys, v where it becomes fp8; then all three meet powers of two.
    """

    k_mean: Tensor
    q_factor: Tensor
    k_factor: Tensor  # the inverse of q_factor
    v_mean: Tensor  # zeros for fp16
    # (v - v_mean) / v_scale lies within 1, or for fp8 within 2^8 (2^2 where sums are in fp16); for
    # fp16 there is one number a head.
    v_scale: Tensor


def prepare_int8(q: Tensor, k: Tensor, v: Tensor, v_dtype: torch.dtype) -> Preparation:
    """Five numbers of each channel, all from ranges and means over the tokens."""
    of_q, of_k, of_v = _range(q), _range(k), _range(v)
    q_exponent = _exponent(torch.maximum(of_q.high, -of_q.low))
    k_exponent = _exponent(of_k.high - of_k.low)
    exponent = ((k_exponent - q_exponent) >> 1).clamp(-8, 8)  # fp16 holds 2^-8 and 2^8 alike
    one = torch.ones_like(of_k.mean)
    factors = torch.ldexp(one, exponent), torch.ldexp(one, -exponent)
    v_mean = of_v.mean if v_dtype == torch.float8_e4m3fn else torch.zeros_like(one)
    v_exponent = _exponent(torch.maximum(of_v.high - v_mean, v_mean - of_v.low))
    if v_dtype == torch.float8_e4m3fn:
        v_exponent -= FP8_BITS
    else:
        v_exponent = v_exponent.amax(-1, keepdim=True).expand_as(one)
    return Preparation(of_k.mean, *factors, v_mean, torch.ldexp(one, v_exponent))


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`attention` whose q k^T multiplies int8, and whose p v multiplies fp16.

    Rows of q and k are quantised as by `quantize`, after three changes that leave the softmax as it
    is and make eight bits enough. k loses its mean over the keys: q · mean is one number for all
    keys of a query, and adding a number to a whole row of scores changes no probability. Each
    channel of q meets a power of two, that of k its inverse, so that their ranges are alike. Both
    are turned by one Hadamard matrix, H H^T = hd, which spreads a large channel over all.
    Probabilities are rounded relative to the largest of their row. hd is a power of two.
    Source: arXiv 2410.02367 (mean), 2211.10438 (factors), 2404.00456 (Hadamard).
    """
    ready = prepare_int8(q, k, v, torch.float16)
    p = _int8_probabilities(q, k, bias, scale, ready) * 256  # fp16 holds a 2^32nd of the largest
    v16 = (v.float() / ready.v_scale).half()
    return (p.half().float() @ v16.float() / p.sum(-1, keepdim=True) * ready.v_scale).to(v.dtype)


def attention_int8_fp8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`attention_int8` whose p v multiplies fp8 (e4m3): a row's largest p becomes 448.

    v loses its mean over the keys, which is added to the result, for probabilities add up to one;
    a power of two for each channel then makes it lie within 2^8.
    Tensor cores may add up 64 keys in as few bits as they have (13 on Ada and Hopper), or in fp16,
    for which the largest p becomes 240 and v lies within 2^2, so that no sum overflows; such sums
    add up in fp32. Probabilities below a 2^18th of a row's largest are lost.
    Source: SageAttention2, arXiv 2411.10958, for fp8, its sums in two levels, and v's mean;
    SageAttention2++, arXiv 2505.21136, for sums in fp16.
    """
    ready = prepare_int8(q, k, v, torch.float8_e4m3fn)
    p = _int8_probabilities(q, k, bias, scale, ready) * LARGEST[torch.float8_e4m3fn]
    p8 = p.to(torch.float8_e4m3fn)
    v8 = ((v.float() - ready.v_mean) / ready.v_scale).to(torch.float8_e4m3fn)
    y = p8.float() @ v8.float() / p.sum(-1, keepdim=True)
    return (y * ready.v_scale + ready.v_mean).to(v.dtype)


def _int8_probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None, ready: Preparation
) -> Tensor:
    """exp(score - the row's largest), fp32 [B, H, L, n]."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    turn = hadamard_matrix(q.shape[-1], q.device)
    q8 = quantize((q.float() * ready.q_factor) @ turn, torch.int8)
    k8 = quantize(((k.float() - ready.k_mean) * ready.k_factor) @ turn, torch.int8)
    scores = q8.values.float() @ k8.values.float().transpose(-1, -2)  # whole numbers below 2^24
    scores = scores * q8.scale * k8.scale.transpose(-1, -2) * (scale / q.shape[-1])
    if bias is not None:
        scores = scores + bias.float()
    return (scores - scores.amax(-1, keepdim=True)).exp()


class _Range(NamedTuple):
    """Of each channel over the tokens, fp32 [B, H, 1, hd]."""

    low: Tensor
    high: Tensor
    mean: Tensor


def _range(x: Tensor) -> _Range:
    low, high = x.aminmax(dim=2, keepdim=True)
    return _Range(low.float(), high.float(), x.mean(2, keepdim=True, dtype=torch.float32))


def _exponent(x: Tensor) -> Tensor:
    """The least e with x < 2^e."""
    return torch.frexp(x.clamp_min(TINY)).exponent


def _normalise(x: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def store(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)
