"""Makes a transformer eight-bit before its weights come: which products, and which attention."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt.kernels.reference import GROUP
from wanrt.kernels.torch_quantize import quantize_weight
from wanrt.models.dit import Block
from wanrt.models.layers import Linear, choose
from wanrt.models.quantized import EightBitOps, Products, QuantizedLinear, Quantizers
from wanrt.quant.formats import LinearFormat
from wanrt.quant.policy import ATTENTION, EightBit, format_of


class AttentionInt8(NamedTuple):
    """The attention of int8 precision; `kernels/reference.py` says it."""

    attention_int8: Callable[..., Tensor]


class AttentionInt8Fp8(NamedTuple):
    """That of fp8 precision."""

    attention_int8_fp8: Callable[..., Tensor]


_ATTENTION = {"attention_int8": AttentionInt8, "attention_int8_fp8": AttentionInt8Fp8}


def policy_formats(dit: nn.Module, precision: EightBit) -> dict[str, LinearFormat]:
    """Of each weight that the policy changes, by its name.

    One whose rows do not divide into groups of 128 stays as it is; no released model has any.
    """
    named = ((name, format_of(name, precision), linear) for name, linear in linears(dit))
    return {
        f"{name}.weight": form
        for name, form, linear in named
        if form is not None and linear.in_features % GROUP == 0
    }


def make_eight_bit(
    dit: nn.Module,
    formats: Mapping[str, LinearFormat],
    precision: EightBit,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give an empty transformer eight-bit products, by weight, and eight-bit attention.

    `device` is where it will run, `dtype` what its other products have. Raises UsageError where no
    backend can do it.
    """
    named = {weight.removesuffix(".weight"): form for weight, form in formats.items()}
    quantize_linears(dit, named, device, dtype)
    quantize_attention(dit, precision, device, dtype)


def safer(dit: nn.Module) -> str | None:
    """Take the next risk out of a loaded transformer; says what changed, None where none is left.

    First attention, whose softmax multiplies errors, then the rounding of activations.
    """
    blocks = [part for part in dit.modules() if isinstance(part, Block)]
    if any(block.attend is not block.ops.attention for block in blocks):
        for block in blocks:
            block.attend = block.ops.attention
        return "attention no longer in eight bits"
    products = [part for part in dit.modules() if isinstance(part, QuantizedLinear)]
    if any(product.multiplies for product in products):
        for product in products:
            product.safe = True
        return "activations no longer in eight bits"
    return None


def linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every product that may become eight-bit."""
    for name, part in module.named_modules():
        if isinstance(part, Linear):
            yield name, part


def quantize_linears(
    module: nn.Module,
    formats: Mapping[str, LinearFormat],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put an empty QuantizedLinear in the place of each named product, on its device (meta).

    `device` is where it will run, `dtype` what its results have. Raises UsageError where no backend
    can do it.
    """
    ops = {form: _ops(form, device, dtype) for form in set(formats.values())}
    for name, form in formats.items():
        old = module.get_submodule(name)
        with old.weight.device:
            new = QuantizedLinear(old.in_features, old.out_features, form, dtype, ops[form])
        module.set_submodule(name, new)


def convert(module: nn.Module, formats: Mapping[str, LinearFormat]) -> None:
    """Give products of a loaded fp32 model on the CPU eight-bit forms of their own weights."""
    plain = {name: module.get_submodule(name) for name in formats}
    quantize_linears(module, formats, torch.device("cpu"), torch.float32)
    for name, form in formats.items():
        made, old = module.get_submodule(name), plain[name]
        weight = quantize_weight(old.weight, form.dtype, form.rotated)
        made.weight.data, made.weight_scale.data = weight.values, weight.scale
        made.bias.data = old.bias.data


def quantize_attention(
    dit: nn.Module, precision: EightBit, device: torch.device, dtype: torch.dtype
) -> None:
    """Have the tokens of every block attend to each other in eight bits."""
    (attend,) = choose(_ATTENTION[ATTENTION[precision]], device, dtype)
    for part in dit.modules():
        if isinstance(part, Block):
            part.attend = attend


def _ops(form: LinearFormat, device: torch.device, dtype: torch.dtype) -> EightBitOps:
    return EightBitOps(
        choose(Quantizers, device, dtype, form.dtype), choose(Products, device, form.dtype)
    )
