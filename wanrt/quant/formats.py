"""How numbers are kept: the plain dtypes by name, and every eight-bit format of a Linear.

A weight `[O, I]` has one fp32 scale for each output channel, `weight_scale` `[O, 1]`. Activations
have one for each token where a norm makes them, and for each token and 128 columns elsewhere: the
kernel that makes those sees no whole row. The VAE's format is made in `conv_int8.py`.
"""

from dataclasses import dataclass

import torch

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LinearFormat:
    """One way to keep and multiply a weight.

    `activations`: they are rounded to `dtype` too, and the product is one of eight-bit numbers;
    else the weight is widened when it is used. `rotated`: each 128 columns of weight and
    activations met a Hadamard matrix, which spreads an outlier over all of them and changes no
    product (arXiv:2404.00456).
    """

    name: str
    dtype: torch.dtype
    activations: bool = True
    rotated: bool = False


INT8 = LinearFormat("int8", torch.int8)
INT8_ROTATED = LinearFormat("int8-rotated", torch.int8, rotated=True)
INT8_WEIGHTS = LinearFormat("int8-weights", torch.int8, activations=False)
FP8 = LinearFormat("fp8", torch.float8_e4m3fn)
FP8_ROTATED = LinearFormat("fp8-rotated", torch.float8_e4m3fn, rotated=True)
FP8_WEIGHTS = LinearFormat("fp8-weights", torch.float8_e4m3fn, activations=False)

INT8_STATIC = "int8-static"  # of a VAE's convolution: scales and zero points that never change

FORMATS = {
    form.name: form for form in (INT8, INT8_ROTATED, INT8_WEIGHTS, FP8, FP8_ROTATED, FP8_WEIGHTS)
}
