"""Cases of quantisation and of the linears that take eight-bit values."""

from collections.abc import Callable

import torch
from torch import Tensor

from wanrt.kernels.cases import (
    BF16,
    FP16,
    FP32,
    TURNED,
    Case,
    Limit,
    Rows,
    Tensors,
    heavy_tailed,
    normal,
    strided,
)

INT8, FP8 = torch.int8, torch.float8_e4m3fn
EIGHT = {"int8": INT8, "fp8": FP8}
TOKENS = 32760  # 81 frames of 480x832

_STEP = "one quantisation step where a value lies between two"
_SCALED = Limit(2e-6, 2e-6, "sums of eight-bit values are exact in s32; scaled in another order")
_ADDED = Limit(2e-6, 2**-11, "tensor cores keep 13 bits of an fp8 sum, fp16 11 of one of 64")
LIMITS = {
    "quantize": dict.fromkeys((FP32, BF16, FP16), Limit(2**-3, 1 / 127, _STEP)),
    "quantize_weight": dict.fromkeys((FP32, BF16, FP16), Limit(2**-3, 1 / 127, _STEP)),
    "dequantize": {INT8: Limit(0, 0, "one product"), FP8: Limit(0, 0, "one product")},
    "linear_quantized": {INT8: _SCALED, FP8: _ADDED},
    "linear_gated_residual": {INT8: _SCALED, FP8: _ADDED},
    "linear_quantized_out": dict.fromkeys((INT8, FP8), Limit(2**-3, 1 / 127, _STEP)),
}


def _linear(
    rows: int,
    inner: int,
    outer: int,
    group: int | None = None,
    bias: bool = True,
    small: bool = False,
) -> Callable[[], Tensors]:
    """x [1, rows, inner], weight [outer, inner], bias."""
    return lambda: (
        Rows(normal(1, rows, inner), group, small),
        Rows(normal(outer, inner) / inner**0.5),
        normal(outer) if bias else None,
    )


def _residual(
    b: int,
    rows: int,
    inner: int,
    outer: int,
    gate: tuple[int, int] | None,
    group: int | None,
    small: bool = False,
) -> Callable[[], Tensors]:
    """x, weight, bias, residual and a gate [*gate, outer]."""
    return lambda: (
        Rows(normal(b, rows, inner), group, small),
        Rows(normal(outer, inner) / inner**0.5),
        normal(outer),
        strided(b, rows, outer),
        None if gate is None else normal(*gate, outer),
    )


def flop(x: Tensor, weight: Tensor, *others: Tensor) -> int:
    """Two for each product of a row of x and a row of the weight."""
    return 2 * x.values.numel() * len(weight.values)


def _quantise(label: str, tensors: Callable[[], Tensors], **kwargs: object) -> list[Case]:
    return [
        Case("quantize", f"{label}-{name}", tensors, {"dtype": dtype, **kwargs})
        for name, dtype in EIGHT.items()
    ]


def _wan(inner: int, outer: int) -> list[Case]:
    """A linear of a released model, with whatever may follow it."""
    shape, cases = f"{inner}x{outer}", []
    wide = dict(size="wan", flop=flop, dtypes=(INT8, FP8), activations=2)
    for scales, group in (("row", None), ("group", 128)):
        linear = _linear(TOKENS, inner, outer, group)
        residual = _residual(1, TOKENS, inner, outer, (1, 1), group)
        gelu = {"activation": "gelu_tanh"}
        cases += [
            Case("linear_quantized", f"{shape}-{scales}", linear, {"dtype": BF16}, **wide),
            Case("linear_gated_residual", f"{shape}-{scales}", residual, **wide),
            *(
                Case("linear_quantized_out", f"{shape}-{scales}-{name}{turned}", linear,
                     gelu | {"dtype": dtype, "hadamard": turned != ""},
                     **wide | {"dtypes": (dtype,)})
                for name, dtype in EIGHT.items()
                for turned in ("", "-hadamard")
            ),
        ]  # fmt: skip
    return cases


def _wan_small(inner: int, outer: int) -> list[Case]:
    """As `_wan`, fp8 alone, in numbers that may add up in fp16."""
    wide = dict(size="wan", flop=flop, dtypes=(FP8,), activations=2)
    gelu = {"activation": "gelu_tanh", "dtype": FP8}
    cases = []
    for scales, group in (("row", None), ("group", 128)):
        shape = f"{inner}x{outer}-{scales}-small"
        linear = _linear(TOKENS, inner, outer, group, small=True)
        residual = _residual(1, TOKENS, inner, outer, (1, 1), group, small=True)
        cases += [
            Case("linear_quantized", shape, linear, {"dtype": BF16}, **wide),
            Case("linear_gated_residual", shape, residual, **wide),
            *(
                Case("linear_quantized_out", f"{shape}-fp8{turned}", linear,
                     gelu | {"hadamard": turned != ""}, **wide)
                for turned in ("", "-hadamard")
            ),
        ]  # fmt: skip
    return cases


def _wan_quantize(width: int) -> list[Case]:
    """What quantises the input of a linear of a released model."""
    return [
        Case("quantize", f"{width}-{scales}-{name}{turned}", lambda: (normal(1, TOKENS, width),),
             {"dtype": dtype, "group": group, "hadamard": turned != ""},
             dtypes=(BF16,), size="wan")
        for scales, group in (("row", None), ("group", 128))
        for name, dtype in EIGHT.items()
        for turned in ("", "-hadamard")
    ]  # fmt: skip


_EIGHT = dict(dtypes=(INT8, FP8), activations=2)
_FP32 = {"dtype": FP32}

CASES = [
    *_quantise("row", lambda: (heavy_tailed(2, 7, 130),)),
    *_quantise("strided", lambda: (strided(2, 7, 130),)),
    *_quantise("group", lambda: (heavy_tailed(2, 9, 384),), group=128),
    *_quantise("small-group", lambda: (normal(65, 36),), group=12),
    *_quantise("zeros", lambda: (torch.zeros(1, 3, 130),)),
    *_quantise("hadamard-row", lambda: (heavy_tailed(2, 7, 384),), hadamard=True),
    *_quantise("hadamard-group", lambda: (strided(2, 9, 384),), group=128, hadamard=True),
    Case("quantize_weight", "int8", lambda: (normal(33, 130),), {"dtype": INT8}),
    Case("quantize_weight", "hadamard", lambda: (normal(33, 256),),
         {"dtype": FP8, "hadamard": True}),
    Case("dequantize", "row", lambda: (Rows(normal(2, 7, 130)),), dtypes=(INT8, FP8)),
    Case("dequantize", "group", lambda: (Rows(normal(2, 7, 384), 128),), dtypes=(INT8, FP8)),
    Case("linear_quantized", "odd", _linear(263, 200, 77), _FP32, **_EIGHT),
    Case("linear_quantized", "one-row", _linear(1, 128, 77, bias=False), _FP32, **_EIGHT),
    Case("linear_quantized", "group", _linear(263, 384, 77, 128), _FP32, **_EIGHT),
    Case("linear_quantized", "gelu", _linear(9, 1100, 136), _FP32 | {"activation": "gelu_tanh"},
         **_EIGHT),
    Case("linear_quantized", "small", _linear(65, 384, 77, small=True), _FP32,
         activations=2, dtypes=(FP8,)),
    Case("linear_quantized", "small-group", _linear(65, 384, 77, 128, small=True), _FP32,
         activations=2, dtypes=(FP8,)),
    Case("linear_quantized_out", "odd", _linear(263, 200, 256), {"dtype": INT8}, **_EIGHT),
    Case("linear_quantized_out", "gelu", _linear(9, 256, 384, 128),
         {"dtype": FP8, "activation": "gelu_tanh"}, **_EIGHT),
    Case("linear_quantized_out", "hadamard", _linear(263, 200, 256),
         {"dtype": INT8, "hadamard": True}, limit=TURNED, **_EIGHT),
    Case("linear_quantized_out", "hadamard-gelu", _linear(9, 256, 384, 128),
         {"dtype": FP8, "activation": "gelu_tanh", "hadamard": True}, limit=TURNED, **_EIGHT),
    Case("linear_gated_residual", "sample", _residual(2, 63, 200, 77, (2, 1), None), **_EIGHT),
    Case("linear_gated_residual", "token", _residual(2, 9, 256, 130, (1, 9), 128), **_EIGHT),
    Case("linear_gated_residual", "small", _residual(2, 9, 256, 130, (1, 9), 128, small=True),
         dtypes=(FP8,), activations=2),
    Case("linear_gated_residual", "no-gate", _residual(1, 9, 130, 77, None, None), **_EIGHT),
    *(case for width in (1536, 8960, 5120, 13824) for case in _wan_quantize(width)),
    *_wan(1536, 1536),
    *_wan(1536, 8960),
    *_wan(8960, 1536),
    *_wan(5120, 5120),
    *_wan(5120, 13824),
    *_wan(13824, 5120),
    *_wan_small(1536, 8960),
    *_wan_small(8960, 1536),
    *_wan_small(5120, 5120),
]  # fmt: skip
