"""The LoRAs of a request on one loaded transformer, put on and taken off without a trace."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt.loras import Use
from wanrt.memory.offload import WeightStream, assign
from wanrt.models.lora import LowRankBranch
from wanrt.models.packed import PackedLinear
from wanrt.models.quantized import QuantizedLinear


class _Branched(NamedTuple):
    """The branch of one module, and which LoRAs (by index) its parts come from."""

    branch: LowRankBranch
    uses: tuple[int, ...]


class _Difference(NamedTuple):
    use: int
    values: Tensor  # of the weight's shape, on the device


class Adapter:
    """Side branches beside the matrices, and weights replaced by base + difference.

    An eight-bit matrix is never made anew: its difference is a product of its own. Other base
    weights that lie on the device are kept while they are replaced; those that stream are changed
    in the ring's buffer, at every visit; packed ones whenever they are unpacked.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._stream: WeightStream | None = getattr(module, "weight_stream", None)
        self._uses: tuple[Use, ...] = ()
        self._branches: list[_Branched] = []
        self._differences: dict[str, list[_Difference]] = {}
        self._base: dict[str, Tensor] = {}

    def put_on(self, uses: Sequence[Use]) -> None:
        """Have exactly these LoRAs; files are read only where the set of them has changed."""
        uses = tuple(uses)
        strengths = [use.strength for use in uses]
        if [use.key for use in uses] != [use.key for use in self._uses]:
            self._take_off()
            self._read(uses)
        elif strengths == [use.strength for use in self._uses]:
            return
        self._uses = uses
        for branch, own in self._branches:
            branch.set_strengths([strengths[i] for i in own])
        self._apply_differences(strengths)

    def _read(self, uses: tuple[Use, ...]) -> None:
        """Attach nothing before everything is read: a broken file leaves the model as it was."""
        branches, differences = {}, {}
        for name in dict.fromkeys(name for use in uses for name in use.fit.names):
            shape, dtype = self._plain(name)
            parts, own = [], []
            for i, use in enumerate(uses):
                if name not in use.fit.names:
                    continue
                change = use.read(name, shape)
                if change.low_rank is not None:
                    parts.append([p.to(self._device, dtype) for p in change.low_rank])
                    own.append(i)
                if change.diff is not None:
                    values = change.diff.to(self._device)
                    differences.setdefault(name, []).append(_Difference(i, values))
            if parts:
                branches[name] = _Branched(LowRankBranch.join(parts), tuple(own))
        for name, branched in branches.items():
            self._owner(name).branch = branched.branch
        self._branches, self._differences = list(branches.values()), differences

    def _apply_differences(self, strengths: Sequence[float]) -> None:
        streamed = {}
        for name, parts in self._differences.items():
            delta = sum(part.values * strengths[part.use] for part in parts)
            if (layer := self._stays(name)) is not None:
                layer.difference = delta
                continue
            if self._stream is not None and self._stream.streams(name):
                streamed[name] = delta
                continue
            if name not in self._base:
                self._base[name] = self._module.get_parameter(name).data
            base = self._base[name]
            assign(self._module, name, (base.float() + delta).to(base.dtype))
        if self._stream is not None:
            self._stream.change(streamed)

    def _owner(self, name: str) -> nn.Module:
        """The module that has a weight."""
        return self._module.get_submodule(name.rpartition(".")[0])

    def _stays(self, name: str) -> PackedLinear | QuantizedLinear | None:
        """The layer of a matrix that is not made anew, but takes its difference as it is."""
        layer = self._owner(name)
        taken = name.endswith(".weight") and isinstance(layer, PackedLinear | QuantizedLinear)
        return layer if taken else None

    def _plain(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype that a weight has in its product."""
        if (layer := self._stays(name)) is not None:
            return (layer.out_features, layer.in_features), layer.dtype
        weight = self._module.get_parameter(name)
        return tuple(weight.shape), weight.dtype

    def _take_off(self) -> None:
        for use in self._uses:
            for name in use.fit.names:
                owner = self._owner(name)
                if hasattr(owner, "branch"):
                    owner.branch = None
                if isinstance(owner, PackedLinear | QuantizedLinear):
                    owner.difference = None
        for name, base in self._base.items():
            assign(self._module, name, base)
        if self._stream is not None:
            self._stream.change({})
        self._branches, self._differences, self._base, self._uses = [], {}, {}, ()
