"""Layers that repeat themselves on a clip that stands still, and need not be run again then.

A causal layer whose chunk of input equals the chunk before, and whose past does, gives the same
output. After a picture comes constant gray: the pasts of the first layers are equal soon, those of
later ones some chunks later. Nothing is predicted: pasts and pixels are compared, bit by bit.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from wanrt.models.vae_layers import CausalConv3d, Place, Resample, Walk


class Result(NamedTuple):
    """What a chunk becomes; `same`: as the chunk before."""

    x: Tensor
    same: bool


class Start(NamedTuple):
    """A layer that the next chunk may start with, what that is given, and where it lies."""

    layer: int = 0
    x: Tensor | None = None
    place: Place | None = None


class Layers:
    """Runs layers of an encoder over chunk after chunk; skips those that would repeat themselves.

    Costs, where `walk.settled` asks for it: a comparison of each layer's past, and one activation
    kept from chunk to chunk. It is the input of a layer behind a downsampling, or of what follows
    the last layer, so never of full size.
    """

    def __init__(self, layers: Sequence[nn.Module], walk: Walk) -> None:
        self.layers, self.walk = layers, walk
        self._start = Start()

    def __call__(self, x: Tensor, same: bool) -> Result:
        """`same`: x equals the x before."""
        start = self._start if same else Start()
        self._start = Start()
        if start.layer:
            x, self.walk.place = start.x, start.place
        first = start.layer
        del start
        settled = self.walk.settled is not None
        for i in range(first, len(self.layers)):
            if settled and i and (i == first or _resamples(self.layers[i - 1])):
                self._start = Start(i, x, self.walk.place)
            x = self.layers[i](x, self.walk)
            settled = settled and self._has_settled(self.layers[i])
        if settled:
            self._start = Start(len(self.layers), x, self.walk.place)
        return Result(x, same and first == len(self.layers))

    def _has_settled(self, layer: nn.Module) -> bool:
        """The chunk left the layer's past as it was."""
        convs = (m for m in layer.modules() if isinstance(m, CausalConv3d) and m.slot >= 0)
        return all(m.slot in self.walk.settled for m in convs)


def _resamples(layer: nn.Module) -> bool:
    return any(isinstance(m, Resample) for m in layer.modules())
