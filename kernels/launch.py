"""How a Triton kernel starts: on a GPU, in the interpreter, recorded, or (meta tensors) not at all.

Host functions allocate their results with `torch.empty` and start kernels through `launch` alone.
So they also run on meta and fake tensors, where only shapes and memory matter, and the compile gate
can hear what they would have started on a card that is not there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER = 0  # the architecture of tiles that are large because the interpreter pays per step


class Mma(NamedTuple):
    """A tensor-core product: what it multiplies and what it adds up in, as PTX spells them."""

    operand: str  # bf16, f16, s8, e4m3
    accumulator: str  # f32, f16, s32


class Launch(NamedTuple):
    """One kernel start as the host function asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr parameters and compiler options such as num_warps
    mma: tuple[Mma, ...]


class _StandIn(NamedTuple):
    """What takes the place of a card: its architecture, and what kernels are handed to."""

    arch: int
    start: Callable[[Launch], None]


_stand_in: ContextVar[_StandIn | None] = ContextVar("stand_in", default=None)


@contextmanager
def stand_in(arch: int, start: Callable[[Launch], None]) -> Iterator[None]:
    """Hand `start` what host functions start, as on a card of that compute capability (89: 8.9)."""
    token = _stand_in.set(_StandIn(arch, start))
    try:
        yield
    finally:
        _stand_in.reset(token)


@contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Collect what host functions start, and start nothing."""
    launches: list[Launch] = []
    with stand_in(arch, launches.append):
        yield launches


def arch_of(x: Tensor) -> int:
    """Compute capability times ten of the card that will work on x; INTERPRETER on a CPU."""
    instead = _stand_in.get()
    if instead is not None:
        return instead.arch
    return _capability(x.device.index) if x.device.type == "cuda" else INTERPRETER


def card_of(x: Tensor) -> str | None:
    """The name of the card that will work on x; None where something stands in for it."""
    if _stand_in.get() is not None:
        return None
    return _card(x.device.index) if x.device.type == "cuda" else "interpreter"


@cache
def _card(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, mma: tuple[Mma, ...] = (), **options: Any
) -> None:
    """Start a kernel. `mma` says which tensor-core products are meant; the compile gate checks."""
    instead = _stand_in.get()
    if instead is not None:
        instead.start(Launch(kernel, grid, args, options, mma))
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if first.device.type == "meta" or isinstance(first, FakeTensor):
        return
    if first.device.type == "cuda":
        with torch.cuda.device(first.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
