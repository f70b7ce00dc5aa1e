"""What PyTorch computes of a case, and how near another result comes: before anything is timed."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from wanrt.kernels import registry
from wanrt.kernels.cases import Case
from wanrt.kernels.reference import Quantized, dequantize

MIN_COSINE = 0.999  # of two backends; a wrong kernel is far below, rounding far above
ONE_HEAD = 1e13  # operations, from which eight-bit attention in plain PyTorch takes a card seconds
_PLAIN = ("attention_int8", "attention_int8_fp8")


class Expected(NamedTuple):
    """PyTorch's result; of the first head alone where `one_head`."""

    tensors: list[Tensor]
    one_head: bool


def expected(case: Case, tensors: tuple[Any, ...]) -> Expected:
    """By PyTorch's backend, which has no kernel for eight-bit attention: of a long one, a head.

    Heads share nothing, so that one of them is computed as it is among the others.
    """
    function = registry.function(case.op, "torch")
    if one_head(case, tensors):
        q, k, v = (x[:, :1] for x in tensors)
        return Expected(flat(function(q, k, v, **case.kwargs)), True)
    return Expected(flat(function(*tensors, **case.kwargs)), False)


def one_head(case: Case, tensors: tuple[Any, ...]) -> bool:
    """Whether `expected` computes one head: nobody would run the rest, so nobody times it."""
    if case.op not in _PLAIN or case.flop is None or len(tensors) != 3:
        return False
    return case.flop(*tensors) > ONE_HEAD


def nearness(result: Any, wanted: Expected) -> float:
    """Cosine of the first tensor of a result with what is expected."""
    actual = flat(result)
    return cosine([actual[0][:, :1]] if wanted.one_head else actual, wanted.tensors)


def flat(result: Any) -> list[Tensor]:
    """Every tensor of a result; a quantised one as what it stands for."""
    if isinstance(result, Quantized):
        return [dequantize(result)]
    return [x for x in result if x is not None] if isinstance(result, tuple) else [result]


def parts(inputs: Any) -> Iterator[Tensor]:
    """Every tensor of a call's inputs or result; a quantised one is two."""
    for x in inputs:
        if isinstance(x, tuple):
            yield from parts(x)
        elif isinstance(x, Tensor):
            yield x


def cosine(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Of the first tensors, which may be gigabytes."""
    pieces = (x[0].flatten().split(1 << 24) for x in (actual, expected))
    return cosine_of_pieces(zip(*pieces, strict=True))


def cosine_of_pieces(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of two tensors that come in pieces, each of which is fp64 for a moment."""
    dot = left = right = 0.0
    for pair in pairs:
        a, b = (x.flatten().double() for x in pair)
        dot, left, right = dot + (a @ b).item(), left + (a @ a).item(), right + (b @ b).item()
    return dot / (left * right) ** 0.5 if left and right else float(left == right)
