"""A Linear of eight-bit numbers: products of int8 or fp8, and weights that are only kept so."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.kernels import torch_linear, torch_ops, torch_quantize
from wanrt.kernels.limits import WIDENED_AT_ONCE
from wanrt.kernels.reference import GROUP, Quantized, rotate
from wanrt.models.lora import LowRankBranch
from wanrt.quant.formats import LinearFormat


class Quantizers(NamedTuple):
    """What makes eight-bit activations; `kernels/reference.py` says it."""

    layer_norm_modulate_quantize: Callable[..., Quantized]
    quantize: Callable[..., Quantized]


class Products(NamedTuple):
    """What multiplies them."""

    linear_quantized: Callable[..., Tensor]
    linear_quantized_out: Callable[..., Quantized]
    linear_gated_residual: Callable[..., Tensor]


class EightBitOps(NamedTuple):
    """The arithmetic of a `QuantizedLinear`."""

    make: Quantizers
    multiply: Products


TORCH = EightBitOps(
    Quantizers(*(getattr(torch_quantize, name) for name in Quantizers._fields)),
    Products(*(getattr(torch_linear, name) for name in Products._fields)),
)


class QuantizedLinear(nn.Module):
    """x W^T + bias, with W `[O, I]` in eight bits and one fp32 `weight_scale` per output channel.

    `dtype` is that of its results and of what LoRAs add. Takes activations as they are, or as the
    op before it has quantised them for it (`input_form`). `safe` keeps activations out of eight
    bits from then on: the weight is widened instead, as in a format of weights alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: LinearFormat,
        dtype: torch.dtype,
        ops: EightBitOps = TORCH,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.form, self.dtype, self.ops, self.safe = form, dtype, ops, False
        self.branch: LowRankBranch | None = None
        self.difference: Tensor | None = None  # added to the weight, fp32 [O, I]
        weight = torch.empty(out_features, in_features, dtype=form.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(out_features, 1, dtype=torch.float32)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)

    @property
    def multiplies(self) -> bool:
        """Whether activations are rounded to eight bits too."""
        return self.form.activations and not self.safe

    @property
    def input_form(self) -> LinearFormat | None:
        """What the op before may make of its result; None: a LoRA wants it as it is, too."""
        alone = self.branch is None and self.difference is None
        return self.form if self.multiplies and alone else None

    @property
    def quantized(self) -> Quantized:
        """The weight."""
        return Quantized(self.weight, self.weight_scale)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x [..., I] -> [..., O] in `dtype`."""
        if self.multiplies:
            taken = self._take(x)
            y = self.ops.multiply.linear_quantized(taken, self.quantized, self.bias, self.dtype)
        else:
            y = F.linear(x.to(self.dtype), self._widened(), self.bias)
        if self.difference is not None:
            y = y + F.linear(x.to(self.dtype), self.difference.to(self.dtype))
        return y if self.branch is None else self.branch.add_to(y, x)

    def gelu(self, x: Tensor | Quantized, form: LinearFormat | None) -> Tensor | Quantized:
        """GELU (tanh) of the product, in the form that the next one takes."""
        multiply = self.ops.multiply
        if self.input_form is None:
            y = self(x)
            return torch_ops.gelu(y, out=None if torch.is_grad_enabled() else y)
        taken = self._take(x)
        if form is None or form.dtype != self.form.dtype:
            return multiply.linear_quantized(
                taken, self.quantized, self.bias, self.dtype, "gelu_tanh"
            )
        return multiply.linear_quantized_out(
            taken, self.quantized, self.bias, form.dtype, "gelu_tanh", form.rotated
        )

    def add_to(self, residual: Tensor, x: Tensor | Quantized, gate: Tensor | None) -> Tensor:
        """residual + gate * (the product), fp32 [B, L, O], in place; where `input_form` is set."""
        return self.ops.multiply.linear_gated_residual(
            self._take(x), self.quantized, self.bias, residual, gate, out=residual
        )

    def _take(self, x: Tensor | Quantized) -> Quantized:
        if isinstance(x, Quantized):
            return x
        return self.ops.make.quantize(x, self.form.dtype, GROUP, self.form.rotated)

    def _widened(self) -> Tensor:
        """The weight in `dtype`, made some rows at a time; lives as long as one product."""
        step = max(1, WIDENED_AT_ONCE // self.in_features)
        plain = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        for begin in range(0, self.out_features, step):
            rows = slice(begin, begin + step)
            some = torch_quantize.dequantize(Quantized(self.weight[rows], self.weight_scale[rows]))
            plain[rows] = rotate(some) if self.form.rotated else some
        return plain
