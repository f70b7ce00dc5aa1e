"""Cases of attention."""

import torch
from torch import Tensor

from wanrt.kernels.cases import BF16, FP16, FP32, Case, Limit, normal

_PROBABILITIES = "probabilities are rounded to the values' dtype before they meet them"
LIMITS = {
    "attention": {
        FP32: Limit(0, 2e-6, "sums in another order"),
        BF16: Limit(0, 2**-7, _PROBABILITIES),
        FP16: Limit(0, 2**-10, _PROBABILITIES),
    }
}


def heads(b: int, h: int, n: int, d: int) -> Tensor:
    """[B, H, n, hd] as a view of [B, n, H, hd], which is what a projection gives."""
    return torch.randn(b, n, h, d).transpose(1, 2)


def lengths_bias(*counts: int) -> Tensor:
    """Key bias of 9 rows: row 4 + b of sample b counts `counts[b]` times, those behind it never."""
    bias = torch.zeros(len(counts), 1, 1, 9)
    for b, count in enumerate(counts):
        bias[b, ..., 4 + b] = torch.log(torch.tensor(float(count)))
        bias[b, ..., 5 + b :] = -torch.inf
    return bias


CASES = [
    Case("attention", "odd", lambda: tuple(heads(2, 3, 65, 128) for _ in range(3)), activations=3),
    Case(
        "attention",
        "other-keys",
        lambda: (heads(2, 3, 65, 128), heads(2, 3, 9, 128), heads(2, 3, 9, 128)),
        activations=3,
    ),
    Case(
        "attention",
        "one-key",
        lambda: (heads(1, 2, 65, 128), heads(1, 2, 1, 128), heads(1, 2, 1, 128)),
        activations=3,
    ),
    Case(
        "attention",
        "key-bias",
        lambda: (
            heads(2, 3, 65, 128),
            heads(2, 3, 9, 128),
            heads(2, 3, 9, 128),
            lengths_bias(3, 500),
        ),
        activations=3,
    ),
    Case(
        "attention",
        "shared-context",
        lambda: (
            heads(2, 3, 65, 128),
            heads(1, 3, 9, 128).expand(2, -1, -1, -1),
            heads(1, 3, 9, 128).expand(2, -1, -1, -1),
            lengths_bias(7),
        ),
        activations=3,
    ),
    Case(
        "attention",
        "position-bias",
        lambda: (*(heads(2, 4, 11, 64) / 3 for _ in range(3)), normal(1, 4, 11, 11)),
        {"scale": 1.0},
        activations=3,
    ),
]
