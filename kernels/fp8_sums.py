"""fp8 products whose sums are fp16: on which cards, and how large numbers may be for that.

By the data sheet of RTX 40 cards fp8 products add up in fp16 at twice their rate in fp32, the rate
of int8. fp16 ends at 65504. So what is multiplied is kept small, and few products make a sum, such
that none can overflow whatever the numbers are; then fp32 takes over. e4m3 has exponents to spare:
its numbers keep three bits down to 2^-6, and what is below loses no more than int8 does everywhere.
cuBLASLt has no such mode (NVIDIA developer forum, thread 294400). Untested on hardware.
Source: SageAttention2++, arXiv 2505.21136.
"""

import torch

from wanrt.kernels.reference import LARGEST

# The data sheet of 12.0 says the same, but others (BLACKWALL) measured an RTX 5060 Ti at full rate
# in fp32: 184.6 TFLOPS beside 47.0 in bf16.
ARCHS = (89,)

SUM_COLUMNS = 64  # products in one sum of a linear: 64 * 448 * 2 = 57344
ACTIVATION_PEAK = 2.0  # beside weights of up to 448
VALUE_BITS = 2  # attention's values lie within 2^2, and probabilities are such that
LARGEST_SUM = 61440  # no block of keys adds up to more


def used_on(arch: int) -> bool:
    """Whether cards of this compute capability (89 for 8.9) have them."""
    return arch in ARCHS


def activation_peak(dtype: torch.dtype, arch: int) -> float:
    """What the largest number of a row of activations becomes in eight bits."""
    return ACTIVATION_PEAK if dtype == torch.float8_e4m3fn and used_on(arch) else LARGEST[dtype]
