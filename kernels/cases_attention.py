"""Cases of attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wanrt.kernels.cases import BF16, FP16, FP32, Case, Limit, Tensors, heavy_tailed, normal

_PROBABILITIES = "probabilities are rounded to the values' dtype before they meet them"
_FOUR_SUMS = "fp16 sums of 64 keys, rounded (2^-11) after each 16; then the result is rounded"
_OTHER_PEAK = (
    "fp8 probabilities (2^-4) are rounded beside the largest so far, in the reference beside the "
    "largest of all; a result adds up several"
)
LIMITS = {
    "attention": {
        FP32: Limit(0, 2e-6, "sums in another order"),
        BF16: Limit(0, 2**-7, _PROBABILITIES),
        FP16: Limit(0, 2**-10, _PROBABILITIES),
    },
    "attention_int8": {
        FP32: Limit(0, 2**-10, "the reference rounds probabilities to fp16, PyTorch does not"),
        BF16: Limit(0, 2**-7, _FOUR_SUMS),
        FP16: Limit(0, 2**-9 + 2**-11, _FOUR_SUMS),
    },
    "attention_int8_fp8": dict.fromkeys((FP32, BF16, FP16), Limit(0, 2**-4, _OTHER_PEAK)),
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


def qkv(b: int, h: int, length: int, num_keys: int, d: int = 128) -> Callable[[], Tensors]:
    return lambda: (heads(b, h, length, d), heads(b, h, num_keys, d), heads(b, h, num_keys, d))


def slices(b: int, h: int, n: int, d: int) -> Tensors:
    """q, k and v as views of one projection to all three; tokens, too, are every second one."""
    return torch.randn(b, 2 * n, 3, h, d)[:, ::2].transpose(1, 3).unbind(2)


def hidden_keys(*shown: int) -> Tensor:
    """Key bias of 300 rows: sample b sees its last `shown[b]`, so that whole blocks are hidden."""
    bias = torch.zeros(len(shown), 1, 1, 300)
    for b, count in enumerate(shown):
        bias[b, ..., : 300 - count] = -torch.inf
    return bias


def real(b: int, h: int, length: int, num_keys: int) -> Tensors:
    """Heads with outliers, and keys whose channels have means as large as those."""
    q, k, v = (heavy_tailed(b, n, h * 128) for n in (length, num_keys, num_keys))
    k = k + 20 * torch.randn(h * 128)
    return tuple(x.unflatten(-1, (h, 128)).transpose(1, 2) for x in (q, k, v))


def shared(num_keys: int) -> tuple[Tensor, Tensor]:
    """k and v of one sample, for two."""
    k, v = (heads(1, 3, num_keys, 128).expand(2, -1, -1, -1) for _ in range(2))
    return k, v


def products(q: Tensor, k: Tensor, *_: Tensor | None) -> int:
    """q k^T and p v."""
    return 4 * q.numel() * k.shape[2]


def _wan(op: str) -> list[Case]:
    """Self-attention of the released models at 480p and 720p; text, image and collapsed text."""
    real: dict[str, Any] = dict(activations=3, dtypes=(BF16, FP16), size="wan", flop=products)
    return [
        Case(op, "1.3B-480p", qkv(1, 12, 32760, 32760), **real),
        Case(op, "14B-720p", qkv(1, 40, 75600, 75600), **real),
        Case(op, "1.3B-480p-text", qkv(1, 12, 32760, 512), **real),
        Case(op, "14B-480p-image", qkv(1, 40, 32760, 257), **real),
        Case(
            op,
            "14B-720p-collapsed-text",
            lambda: (*qkv(1, 40, 75600, 32)(), torch.zeros(1, 1, 1, 32)),
            **real,
        ),
    ]


def _eight_bits(op: str) -> list[Case]:
    def case(label: str, tensors: Callable[[], Tensors]) -> Case:
        return Case(op, label, tensors, activations=3)

    return [
        case("odd", lambda: slices(2, 2, 65, 128)),
        case("real", lambda: real(1, 3, 63, 257)),
        case("head-of-64", qkv(1, 2, 33, 150, 64)),
        case("one-token", qkv(1, 2, 1, 1)),
        case("key-bias", lambda: (*qkv(2, 2, 65, 9)(), lengths_bias(3, 500))),
        case("shared-context", lambda: (heads(2, 3, 65, 128), *shared(9), lengths_bias(7))),
        case("position-bias", lambda: (*qkv(2, 4, 11, 140)(), normal(1, 4, 11, 140))),
    ]


CASES = [
    Case("attention", "one-token", qkv(1, 2, 1, 1), activations=3),
    Case("attention", "image-keys", qkv(1, 2, 63, 257), activations=3),
    Case("attention", "slices", lambda: slices(2, 2, 130, 64), activations=3),
    Case("attention", "head-of-80", qkv(1, 2, 33, 150, 80), activations=3),
    Case(
        "attention",
        "hidden-keys",
        lambda: (*qkv(2, 2, 9, 300)(), hidden_keys(300, 5)),
        activations=3,
    ),
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
    *_eight_bits("attention_int8"),
    *_eight_bits("attention_int8_fp8"),
    *_wan("attention"),
    *_wan("attention_int8"),
    *_wan("attention_int8_fp8"),
    Case(
        "attention",
        "clip",
        qkv(1, 16, 257, 257, 80),
        activations=3,
        dtypes=(BF16, FP16),
        size="wan",
        flop=products,
    ),
    Case(
        "attention",
        "umt5",
        lambda: (*qkv(1, 64, 512, 512, 64)(), normal(1, 64, 512, 512)),
        {"scale": 1.0},
        activations=3,
        dtypes=(BF16, FP16),
        size="wan",
        flop=products,
    ),
]
