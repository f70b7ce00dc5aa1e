"""What an op is resolved for."""

from typing import NamedTuple

import torch


class UnsupportedOp(Exception):
    """No backend can do an op here; the message lists the reason of each."""


class Target(NamedTuple):
    """Device type, compute capability times ten (0 without a GPU) and dtype of the activations."""

    device: str
    arch: int
    dtype: torch.dtype
