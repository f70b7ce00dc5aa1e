"""The block formats of GGUF files, unpacked to plain numbers in plain PyTorch.

A row of a matrix is a run of equal blocks. A block is one or two fp16 numbers (and in the K formats
a small scale for each of its groups) and integers of 2 to 8 bits. A number is scale * integer, or
scale * integer - minimum, computed in fp32: to the bit what the package `gguf` computes.

Source: github ggml-org/ggml `src/ggml-common.h` (bytes of a block), `src/ggml-quants.c`
(dequantize_row_*); the package `gguf` 0.19.0 is the oracle of the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """How `numel` numbers share `num_bytes` bytes."""

    name: str
    numel: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor] = field(repr=False)  # uint8 [n, bytes] -> fp32 [n, numel]


def unpack(packed: Tensor, form: BlockFormat, dtype: torch.dtype) -> Tensor:
    """uint8 [..., bytes of a row] -> [..., numbers of a row], computed in fp32 and rounded once."""
    numbers = packed.shape[-1] // form.num_bytes * form.numel
    plain = torch.empty(*packed.shape[:-1], numbers, dtype=dtype, device=packed.device)
    unpack_into(plain, packed, form)
    return plain


def unpack_into(plain: Tensor, packed: Tensor, form: BlockFormat) -> None:
    """`unpack` into contiguous memory that is there.

    Peak: at most 16 bytes for each number of a piece: 4 MiB on a CPU, 16 MiB elsewhere.
    """
    assert packed.numel() * form.numel == plain.numel() * form.num_bytes, f"{form} {plain.shape=}"
    piece = 2**18 if packed.device.type == "cpu" else 2**20
    blocks = packed.view(-1, form.num_bytes).split(piece // form.numel)
    rows = plain.view(-1, form.numel).split(piece // form.numel)
    for some, numbers in zip(blocks, rows, strict=True):
        numbers.copy_(form.decode(some))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block, as fp32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, bits: int, run: int) -> Tensor:
    """The integers of `bits` bits in bytes [n, B] -> uint8 [n, B * 8 / bits].

    Bytes go in runs: the lowest bits of all bytes of a run, then the next higher, to the highest.
    """
    runs = data.unflatten(1, (-1, 1, run))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return runs.bitwise_right_shift(shifts[:, None]).bitwise_and_(2**bits - 1).flatten(1)


def _times(scale: Tensor, integers: Tensor) -> Tensor:
    """scale fp32 [n, groups] times integers [n, numel] of any dtype -> fp32 [n, numel]."""
    grouped = integers.float().unflatten(1, (scale.shape[1], -1))
    return grouped.mul_(scale[..., None]).flatten(1)


def _minus(numbers: Tensor, minimum: Tensor) -> Tensor:
    """numbers fp32 [n, numel] less minimum fp32 [n, groups]."""
    grouped = numbers.unflatten(1, (minimum.shape[1], -1))
    return grouped.sub_(minimum[..., None]).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _times(_half(b, 0), _fields(b[:, 2:], 4, 16).float().sub_(8))


def _q4_1(b: Tensor) -> Tensor:
    return _times(_half(b, 0), _fields(b[:, 4:], 4, 16)).add_(_half(b, 2))


def _q5_0(b: Tensor) -> Tensor:
    q = _fields(b[:, 6:], 4, 16) | _fields(b[:, 2:6], 1, 1) << 4
    return _times(_half(b, 0), q.float().sub_(16))


def _q5_1(b: Tensor) -> Tensor:
    q = _fields(b[:, 8:], 4, 16) | _fields(b[:, 4:8], 1, 1) << 4
    return _times(_half(b, 0), q).add_(_half(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return _times(_half(b, 0), b[:, 2:].view(torch.int8))


def _q2_k(b: Tensor) -> Tensor:
    scale = _half(b, 80) * (b[:, :16] & 15)
    minimum = _half(b, 82) * (b[:, :16] >> 4)
    return _minus(_times(scale, _fields(b[:, 16:80], 2, 32)), minimum)


def _q3_k(b: Tensor) -> Tensor:
    low, high = _fields(b[:, 96:104], 4, 8), _fields(b[:, 104:108], 2, 4)
    scale = _half(b, 108) * (low | high << 4).float().sub_(32)
    q = _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << 2
    return _times(scale, q.float().sub_(4))


def _scale_and_minimum(b: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n, 8] each, of Q4_K and Q5_K: six bits each in 12 bytes, and two fp16 factors.

    The last four have their upper bits where the first four leave two free.
    """
    x, y, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((x & 63, (rest & 15) | (x >> 6) << 4), 1)
    minimum = torch.cat((y & 63, (rest >> 4) | (y >> 6) << 4), 1)
    return _half(b, 0) * scale, _half(b, 2) * minimum


def _q4_k(b: Tensor) -> Tensor:
    scale, minimum = _scale_and_minimum(b)
    return _minus(_times(scale, _fields(b[:, 16:], 4, 32)), minimum)


def _q5_k(b: Tensor) -> Tensor:
    scale, minimum = _scale_and_minimum(b)
    q = _fields(b[:, 48:], 4, 32) | _fields(b[:, 16:48], 1, 32) << 4
    return _minus(_times(scale, q), minimum)


def _q6_k(b: Tensor) -> Tensor:
    scale = _half(b, 208) * b[:, 192:208].view(torch.int8)
    q = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << 4
    return _times(scale, q.float().sub_(32))


# By the number that stands for each in a file (`enum ggml_type`).
FORMATS: dict[int, BlockFormat] = {
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
}
