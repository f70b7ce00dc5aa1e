"""What an op is resolved for."""

from typing import NamedTuple

import torch

MIN_ARCH_FP8 = 89  # the oldest cards that multiply fp8 (e4m3), and that Triton casts to it for


class UnsupportedOp(Exception):
    """No backend can do an op here; the message lists the reason of each."""


class Target(NamedTuple):
    """Device type, compute capability times ten (0 without a GPU), dtypes of input and result.

    The input is the activations. An op that takes `Quantized` has them in int8 or fp8. `result`
    is None where it does not matter; not every card makes every eight-bit value.
    """

    device: str
    arch: int
    dtype: torch.dtype
    result: torch.dtype | None = None


def lacks_fp8(target: Target) -> str | None:
    """Why a GPU cannot, or None."""
    if target.device != "cuda" or target.arch >= MIN_ARCH_FP8:
        return None
    return f"fp8 needs compute capability {MIN_ARCH_FP8 / 10}, not {target.arch / 10}"
