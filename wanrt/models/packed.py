"""Layers whose weight stays as a GGUF file packs it, and is unpacked for each use.

They give, bit for bit, what the plain layers give with weights that were unpacked at load: both
compute a weight in fp32 and round it once. A model holds the packed weights and, for the length of
one call, one matrix.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.models.lora import LowRankBranch
from wanrt.quant.gguf_blocks import BlockFormat, unpack


class PackedLinear(nn.Module):
    """A matrix product in `dtype`, its weight uint8 [O, bytes of a row], and what LoRAs add."""

    input_form = None  # it takes no eight-bit activations
    branch: LowRankBranch | None = None
    difference: Tensor | None = None  # fp32 [O, I], added to the weight itself

    def __init__(self, plain: nn.Linear, form: BlockFormat, dtype: torch.dtype) -> None:
        """Takes the place of `plain`, whose weight is not looked at."""
        super().__init__()
        self.form, self.dtype = form, dtype
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = _bytes_of(plain.weight, form)
        self.bias = plain.bias
        self._held: Tensor | None = None

    def unpacked(self) -> Tensor:
        """The weight [O, I]; fresh memory, unless it is held."""
        if self._held is not None:
            return self._held
        weight = unpack(self.weight, self.form, self.dtype)
        if self.difference is not None:
            weight = (weight.float() + self.difference).to(self.dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = F.linear(x, self.unpacked(), self.bias)
        return y if self.branch is None else self.branch.add_to(y, x)

    def hold(self) -> None:
        """Keep the unpacked weight until `let_go`."""
        self._held = self.unpacked()

    def let_go(self) -> None:
        self._held = None


class PackedEmbedding(nn.Module):
    """A table uint8 [rows, bytes of a row], of which only the rows in use are unpacked."""

    def __init__(self, plain: nn.Embedding, form: BlockFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form, dtype
        self.weight = _bytes_of(plain.weight, form)

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape -> [..., D]."""
        return unpack(self.weight[ids], self.form, self.dtype)


def packed(plain: nn.Module, form: BlockFormat, dtype: torch.dtype) -> nn.Module | None:
    """The packed twin of a layer, on the meta device; None where there is none."""
    match plain:
        case nn.Linear():
            return PackedLinear(plain, form, dtype)
        case nn.Embedding():
            return PackedEmbedding(plain, form, dtype)
    return None


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Unpack the matrices right below a module once for all calls within; does nothing to others.

    Peak: all of them, unpacked.
    """
    matrices = [child for child in module.children() if isinstance(child, PackedLinear)]
    try:
        for matrix in matrices:
            matrix.hold()
        yield
    finally:
        for matrix in matrices:
            matrix.let_go()


def _bytes_of(weight: Tensor, form: BlockFormat) -> nn.Parameter:
    """A place for the packed weight, without memory."""
    columns = weight.shape[1] // form.numel * form.num_bytes
    place = torch.empty(weight.shape[0], columns, dtype=torch.uint8, device="meta")
    return nn.Parameter(place, requires_grad=False)
