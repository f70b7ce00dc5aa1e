"""Products and roundings that give the same numbers on a GPU and in Triton's interpreter.

NOTE: Triton's interpreter (3.6 to 3.9) multiplies bf16 tiles wrongly, truncates when it casts fp32
to bf16, and loses the carry when it casts fp32 to fp8. On a GPU these are plain instructions.
"""

import triton
import triton.language as tl

from wanrt.kernels.launch import INTERPRETING
from wanrt.kernels.reference import TINY

SIMULATED: tl.constexpr = tl.constexpr(INTERPRETING)
LEAST: tl.constexpr = tl.constexpr(TINY)
ROUNDING: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: fp32 has whole numbers only there


@triton.jit
def dot(a, b, acc, OUT: tl.constexpr):
    """acc + a @ b, added up in OUT."""
    if SIMULATED:
        if a.dtype == tl.bfloat16:
            return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, out_dtype=OUT)
        if OUT == tl.float16:  # not after each term: a tensor core rounds after each sixteenth
            return tl.dot(a.to(tl.float32), b.to(tl.float32), acc).to(OUT)
    return tl.dot(a, b, acc, out_dtype=OUT)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, to the nearest, ties to even."""
    if SIMULATED:
        if DTYPE == tl.bfloat16:
            return _to_bfloat16(x)
        if DTYPE == tl.float8e4nv:
            return _to_float8(x)
    if DTYPE == tl.float8e4nv:
        return _round_to_float8(x)
    return x.to(DTYPE)


@triton.jit
def round_to_int8(x):
    """fp32 to the nearest whole number, ties to even, held within [-127, 127].

    A sum with 1.5 * 2^23 has no bits behind the point, and the number in its lowest byte.
    """
    held = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return (held + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_quantized(y, target, mask, scale_ptr, exists, largest):
    """Rows of fp32 y `[M, N]`, zeros where masked, as eight bits with one scale for each row."""
    peak = tl.maximum(tl.max(tl.abs(y), 1), LEAST)
    y *= tl.div_rn(largest, peak)[:, None]
    if target.dtype.element_ty == tl.int8:
        tl.store(target, round_to_int8(y), mask)
    else:
        tl.store(target, cast(y, target.dtype.element_ty), mask)
    tl.store(scale_ptr, tl.div_rn(peak, largest), exists)


@triton.jit
def _round_to_float8(x):
    """One instruction for two numbers. Triton (3.6 to 3.8) cuts them to fp16 first on 8.9."""
    bits = tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,r,r", [x], tl.int8, is_pure=True, pack=2
    )
    return bits.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _to_bfloat16(x):
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> 16) & 1
    rounded = (bits + 0x7FFF + odd) & -65536
    kept = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, rounded)  # NaN stays NaN
    return kept.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _to_float8(x):
    """Rounded in fp32 to a value that e4m3 has (3 bits, least exponent -6), which casts exactly."""
    size = tl.abs(x)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    step = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - (exponent - 3)) << 23).to(tl.float32, bitcast=True)
    count = (size * inverse + ROUNDING) - ROUNDING
    rounded = tl.minimum(count * step, 448.0).to(tl.int32, bitcast=True)
    sign = x.to(tl.int32, bitcast=True) & -2147483648  # zero has one too
    return (rounded | sign).to(tl.float32, bitcast=True).to(tl.float8e4nv)
