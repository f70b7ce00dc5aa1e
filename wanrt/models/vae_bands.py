"""A clip's way through a VAE in horizontal bands that give what whole frames give.

Every band holds its halo, the rows beyond its own that its result depends on, layer by layer fewer.
A convolution puts zeros at all edges of what it is given; at an inner edge of a band the row that
has met them is dropped. So every row that stays is computed from the same values as in the whole
frame: equal to the bit where an op computes a pixel alike whatever the height, to rounding else.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from torch import Tensor

from wanrt.config import VaeWork
from wanrt.models.vae_layers import CausalState, Place, VaeOps, Walk
from wanrt.vae_shapes import Band, Rows


class BandWalk(Walk):
    """The way of one band through the local layers."""

    def __init__(self, state: CausalState, ops: VaeOps, work: VaeWork, band: Band) -> None:
        super().__init__(state, ops, work)
        self.band = band

    @property
    def place(self) -> Place:
        return Place(self.level, self.rows)

    @place.setter
    def place(self, place: Place) -> None:
        self.level, self.rows = place

    def enter(self, x: Tensor) -> Tensor:
        self.level, self.rows = 0, self.band.given
        return x[..., self.rows.start : self.rows.stop, :]

    def trim(self, y: Tensor) -> Tensor:
        return self._narrow(y, self.rows.trimmed())

    def beside(self, x: Tensor, rows: Rows) -> Tensor:
        now = self.rows
        if rows.height != now.height:
            now = now.doubled() if rows.height > now.height else now.halved()
        return x[..., now.slice_of(rows), :]

    def doubled(self, y: Tensor) -> Tensor:
        self.level, self.rows = self.level + 1, self.rows.doubled()
        return self._narrow(y, self.band.levels[self.level])

    def halving(self, x: Tensor) -> Tensor:
        self.level += 1
        halved = self.band.levels[self.level]
        x = self._narrow(x, halved.before_halving())
        self.rows = halved
        return x

    def leave(self, y: Tensor) -> Tensor:
        return self._narrow(y, self.band.result)

    def _narrow(self, x: Tensor, rows: Rows) -> Tensor:
        x = x[..., rows.slice_of(self.rows), :]
        self.rows = rows
        return x


class Course:
    """The walks of one clip: one over whole frames, and one for each band of the local layers."""

    def __init__(
        self, state: CausalState, ops: VaeOps, work: VaeWork, bands: Sequence[Band] = ()
    ) -> None:
        assert len(state.bands) in (0, len(bands)), f"{len(state.bands)=} {len(bands)=}"
        self.whole = Walk(state, ops, work)
        nothing = (None,) * len(state.slots)
        self.bands = [
            BandWalk(CausalState(slots or nothing, state.first), ops, work, band)
            for band, slots in zip_longest(bands, state.bands)
        ]

    @property
    def locals(self) -> list[Walk]:
        """The walks through the local layers."""
        return list(self.bands) or [self.whole]

    @property
    def walks(self) -> Iterator[Walk]:
        yield self.whole
        yield from self.bands

    @property
    def first(self) -> bool:
        """No frame has been seen."""
        return self.whole.first

    def begin(self, last: bool) -> None:
        """Of a chunk; `last`: nothing follows it."""
        for walk in self.walks:
            walk.last = last

    def end(self) -> None:
        """Of a chunk."""
        for walk in self.walks:
            walk.first = False

    def state(self) -> CausalState:
        bands = tuple(tuple(walk.slots) for walk in self.bands)
        return CausalState(tuple(self.whole.slots), self.first, bands)
