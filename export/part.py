"""Parts: the pieces of a model that become one graph each, and the sizes that they may have."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Axis:
    """A size that a graph leaves open; `opt` is what an engine is built to be fastest at.

    `trace` is a size that it has while it is traced: any that is legal, small, and not 0 or 1.
    """

    name: str
    min: int
    opt: int
    max: int
    trace: int

    def __post_init__(self) -> None:
        assert self.min <= self.opt <= self.max and self.trace > 1, f"{self=}"


@dataclass(frozen=True)
class Multiple:
    """A size that is `factor` times an open one, plus `offset`."""

    axis: Axis
    factor: int
    offset: int = 0


Size = int | Axis | Multiple


@dataclass(frozen=True)
class Value:
    """An input or output of a graph that is no weight."""

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]

    def at(self, pick: Callable[[Axis], int]) -> tuple[int, ...]:
        """Its shape where every open size is what `pick` says."""

        def number(size: Size) -> int:
            if isinstance(size, Multiple):
                return size.factor * pick(size.axis) + size.offset
            return pick(size) if isinstance(size, Axis) else size

        return tuple(number(size) for size in self.shape)

    @property
    def least(self) -> tuple[int, ...]:
        return self.at(lambda axis: axis.min)

    @property
    def best(self) -> tuple[int, ...]:
        return self.at(lambda axis: axis.opt)

    @property
    def most(self) -> tuple[int, ...]:
        return self.at(lambda axis: axis.max)


@dataclass(frozen=True)
class Part:
    """`function(module, *inputs)` gives the outputs; the weights of `module` are inputs as well.

    `module` may be on the meta device: only the shapes and dtypes of its weights count. Its ops are
    the ones of ONNX. Weights have the names that they have in it; those that the function does not
    use are left out. `homes` are the modules of the model that the graph serves:
    one, or one after the other where they are alike; "" is the model itself. Parts with the same
    `graph` differ in the ranges of their sizes alone; "" is a graph of its own.
    """

    name: str
    module: nn.Module
    function: Callable[..., Any]
    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    homes: tuple[str, ...]
    graph: str = ""

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers, by the names of the graph's inputs."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def name_at(self, index: int) -> str:
        """The name of the graph that has the weights of one of the homes within it."""
        return self.name if len(self.homes) == 1 else f"{self.name}.{index}"


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the weights of an empty module the dtypes that the loader would; in place."""
    fp32 = re.compile("|".join(module.FP32_NAMES) or r"(?!)")
    for name, weight in module.named_parameters():
        weight.data = weight.data.to(torch.float32 if fp32.search(name) else dtype)
    return module
