"""Products of eight-bit values in plain PyTorch: CPU path and fallback.

int8 goes through `torch._int_mm`, exact in s32 on CPUs and GPUs; fp8 through `torch._scaled_mm`
where the card multiplies it, else through fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels.launch import arch_of
from wanrt.kernels.reference import GROUP, Quantized
from wanrt.kernels.target import MIN_ARCH_FP8
from wanrt.kernels.torch_ops import gelu
from wanrt.kernels.torch_quantize import quantize

MIN_ROWS, MULTIPLE = 32, 16  # what either product takes on a GPU: rows, and columns of both sides


def linear_quantized(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    activation: str | None = None,
) -> Tensor:
    """See `reference.linear_quantized`. Peak: two fp32 results; with groups, one product each."""
    rows = x.values.flatten(0, -2)  # [M, I]
    scale = x.scale.flatten(0, -2)  # [M, G]
    width = rows.shape[-1] // scale.shape[-1]
    groups = zip(rows.split(width, -1), weight.values.split(width, -1), strict=True)
    y = rows.new_zeros(len(rows), len(weight.values), dtype=torch.float32)
    for g, (values, columns) in enumerate(groups):
        y.addcmul_(_product(values, columns), scale[:, g, None])
    y *= weight.scale.T
    if bias is not None:
        y += bias
    if activation is not None:
        assert activation == "gelu_tanh", f"{activation=}"
        y = gelu(y, out=y)
    return y.to(dtype).unflatten(0, x.values.shape[:-1])


def linear_quantized_out(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    activation: str | None = None,
    hadamard: bool = False,
) -> Quantized:
    """See `reference.linear_quantized_out`."""
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
    """See `reference.linear_gated_residual`."""
    y = linear_quantized(x, weight, bias, torch.float32)
    if gate is None:
        return torch.add(residual, y, out=out)
    return torch.addcmul(residual, y, gate.float(), out=out)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of eight-bit [M, K] and [N, K] -> fp32 [M, N]."""
    if a.dtype == torch.int8:
        return multiply_int8(a, b).float()
    if a.device.type == "cuda" and arch_of(a) >= MIN_ARCH_FP8:
        one = torch.ones((), device=a.device)
        padded = torch._scaled_mm(*_padded(a, b), one, one, out_dtype=torch.float32)
        return padded[: len(a), : len(b)]
    return a.float() @ b.float().T


def multiply_int8(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of int8 [M, K] and [N, K] -> int32 [M, N], exact."""
    return torch._int_mm(*_padded(a, b))[: len(a), : len(b)]


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [M, K] and b^T [K, N] with zeros behind them, up to sizes that a GPU's product takes."""
    columns = -a.shape[1] % MULTIPLE
    a = _pad(a, max(MIN_ROWS - len(a), 0), columns)
    return a, _pad(b, -len(b) % MULTIPLE, columns).T


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    x = x.contiguous()
    if rows == columns == 0:
        return x
    return F.pad(x.view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)
