"""Layers that repeat themselves on a clip that stands still, and need not be run again then.

A causal layer whose chunk of input equals the chunk before, and whose past does, gives the same
output. After a picture comes constant gray: the pasts of the first layers are equal soon, those of
later ones some chunks later. Nothing is predicted: pasts and pixels are compared, bit by bit.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from wanrt.models.vae_layers import CausalConv3d, Place, Walk


class Result(NamedTuple):
    """What a chunk becomes; `same`: as the chunk before."""

    x: Tensor
    same: bool


class Layers:
    """Runs layers of an encoder over chunk after chunk; skips those that would repeat themselves.

    Costs, where `walk.settled` asks for it: a comparison of each layer's past, and one activation
    kept from chunk to chunk, the input of the first layer that has not settled.
    """

    def __init__(self, layers: Sequence[nn.Module], walk: Walk) -> None:
        self.layers, self.walk = layers, walk
        self._start, self._held = 0, None  # where the next chunk may start if it is the same
        self._place: Place | None = None

    def __call__(self, x: Tensor, same: bool) -> Result:
        """`same`: x equals the x before."""
        start = self._start if same else 0
        if start:
            x, self.walk.place = self._held, self._place
        self._start, self._held = 0, None
        settled = self.walk.settled is not None
        for i in range(start, len(self.layers)):
            given, place = x, self.walk.place
            x = self.layers[i](x, self.walk)
            if settled and not self._has_settled(self.layers[i]):
                settled = False
                self._hold(i, given, place)
            del given
        if settled:
            self._hold(len(self.layers), x, self.walk.place)
        return Result(x, same and start == len(self.layers))

    def _hold(self, start: int, x: Tensor, place: Place | None) -> None:
        self._start, self._held, self._place = start, x if start else None, place

    def _has_settled(self, layer: nn.Module) -> bool:
        """The chunk left the layer's past as it was."""
        convs = (m for m in layer.modules() if isinstance(m, CausalConv3d) and m.slot >= 0)
        return all(m.slot in self.walk.settled for m in convs)
