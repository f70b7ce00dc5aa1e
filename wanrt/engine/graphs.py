"""What an engine is to the rest of wanrt: graphs by name, each called with tensors by name."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from wanrt.engine.bundle import Host


class Runner(Protocol):
    """One graph, ready to run on one device.

    `inputs` are the dtypes of all that it takes, weights among them unless they are embedded;
    `outputs` those of what it gives. Shapes are those of `export/`: one sample, open sizes within
    the ranges that the bundle states.
    """

    inputs: Mapping[str, torch.dtype]
    outputs: Mapping[str, torch.dtype]

    def __call__(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Every output by name; `out` are contiguous tensors that receive some of them.

        Inputs that are not contiguous are copied. Raises UsageError where a tensor is missing or
        is of another dtype, shape range or device.
        """
        ...


class Graphs(Protocol):
    """The graphs of one model in one precision, on one device; each is loaded when first asked."""

    def has(self, name: str) -> bool: ...

    def get(self, name: str) -> Runner:
        """Raises FormatError where the bundle has no such graph, or none that runs here."""
        ...


class PlannedGraphs(Graphs, Protocol):
    """Graphs that work in memory of ours, so that a plan counts it."""

    host: Host

    def limit(self, num_bytes: int) -> None:
        """Work in no more than this from now on; what would then raises BudgetError."""
        ...

    def release(self) -> None:
        """Let go of what they work in until it is wanted again."""
        ...
