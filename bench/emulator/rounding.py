"""bf16, fp16 and e4m3 to and from fp32, as NVIDIA's GPUs round. bf16 and e4m3 are kept as bits."""

import numpy as np

from wanrt.bench.emulator.memory import Array


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even; NaN becomes 0x7fff."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_fp16(x: Array, mode: str) -> Array:
    """`rn`: to the nearest, ties to even; `rz`: towards zero."""
    with np.errstate(over="ignore"):  # infinity is what is meant
        nearest = np.asarray(x).astype(np.float16)
    if mode == "rn":
        return nearest
    too_large = np.abs(nearest.astype(np.float32)) > np.abs(x)
    return np.where(too_large, np.nextafter(nearest, np.float16(0)), nearest).astype(np.float16)


def _values() -> Array:
    """What each byte of e4m3 means: four bits of exponent, bias 7, no infinity, 0x7f is NaN."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = np.where(
        exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7)
    )
    size[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte & 0x80, -size, size).astype(np.float32)


_E4M3 = _values()
_SIZES = _E4M3[:0x7F]  # from 0 to 448


def from_e4m3(byte: Array) -> Array:
    return _E4M3[byte]


def to_e4m3(x: Array) -> Array:
    """To the nearest, ties to even, held within 448."""
    size = np.minimum(np.abs(x), np.float32(448))
    above = np.minimum(np.searchsorted(_SIZES, size), len(_SIZES) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = _SIZES[above] - size, size - _SIZES[below]
    up = (to_above < to_below) | (to_above == to_below) & (above % 2 == 0)
    byte = np.where(up, above, below) | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, byte).astype(np.uint8)
