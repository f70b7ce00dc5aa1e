"""Live and peak bytes of a VAE, layer by layer, from shapes alone; `vae_bytes.py` walks it."""

from typing import Literal, NamedTuple

from wanrt.config import VaeWork
from wanrt.memory.vae_op_bytes import Clip, Conv, CpuOps, TorchOps, TritonOps
from wanrt.vae_shapes import Band, Rows, Stage

Backend = Literal["cpu", "torch", "triton"]
_OPS = {"cpu": CpuOps, "torch": TorchOps, "triton": TritonOps}


class Held(NamedTuple):
    """A live tensor: what is seen of it, and the bytes of its storage."""

    clip: Clip
    stored: int


class ByteWalk:
    """Bytes and the rows that a band holds; what a method frees or holds, it says."""

    def __init__(
        self,
        element_size: int,
        work: VaeWork,
        backend: Backend | None,
        height: int,
        int8_from: int | None = None,
    ) -> None:
        """int8_from: the first level whose residual blocks are int8."""
        backend = backend or ("triton" if element_size == 2 else "torch")
        self.ops = _OPS[backend](element_size)
        self.size, self.work = element_size, work
        self.int8_from = int8_from
        self.live = self.peak = self.caches = 0
        self.start(height)

    def start(self, height: int) -> None:
        """What comes next is a whole frame."""
        self.level, self.rows = 0, Rows(0, height, height)

    def take_caches(self) -> int:
        caches, self.caches = self.caches, 0
        return caches

    def spike(self, size: int) -> None:
        self.peak = max(self.peak, self.live + size)

    def hold(self, clip: Clip) -> Held:
        stored = clip.size * self.size
        self.live += stored
        self.spike(0)
        return Held(clip, stored)

    def free(self, x: Held) -> None:
        self.live -= x.stored

    def narrow(self, x: Held, rows: Rows) -> Held:
        """A view of x, which holds the rows now under way; those become `rows`."""
        fewer = rows.stop - rows.start
        cropped = x.clip.cropped or fewer < self.rows.stop - self.rows.start
        self.rows = rows
        return Held(x.clip._replace(rows=fewer, cropped=cropped), x.stored)

    def conv(self, x: Held, conv: Conv) -> Held:
        """Holds the result, unless it takes the place of x."""
        past = conv.past * x.clip.frame * (1 if conv.int8 else self.size)
        need = self.ops.conv_int8 if conv.int8 else self.ops.conv
        self.spike(need(x.clip, conv) + (past if self.work.host else 0))
        self.caches += past
        if conv.in_place:
            return x
        shape = x.clip._replace(channels=conv.out, cropped=False)
        return self.hold(shape._replace(frames=shape.frames // conv.stride))

    def middle(self, x: Held) -> Held:
        dim = x.clip.channels
        x = self.block(x, dim)
        self.spike(2 * x.stored + self.ops.attention(x.clip._replace(frames=1)))
        return self.block(x, dim)

    def block(self, x: Held, out: int, keep: bool = False) -> Held:
        """A residual block; `keep`: somebody else holds x as well."""
        int8 = self.int8_from is not None and self.level >= self.int8_from
        first = Conv(out, norm=True, int8=int8)
        y = self.narrow(self.conv(x, first), self.rows.trimmed())
        if x.clip.channels != out:
            beside = x.clip._replace(rows=y.clip.rows, cropped=x.clip.cropped or y.clip.cropped)
            shortcut = self.conv(Held(beside, x.stored), Conv(out, past=0))
        self.conv(y, first._replace(in_place=True))
        if x.clip.channels != out:
            self.free(shortcut)
        if not keep:
            self.free(x)
        return self.narrow(y, self.rows.trimmed())

    def stage(self, x: Held, stage: Stage, band: Band, residual: bool) -> Held:
        """Frees x. A residual stage holds it to its end, for the shortcut."""
        start = x
        for i, (_, out) in enumerate(stage.blocks):
            x = self.block(x, out, keep=residual and i == 0)
        up = (stage.mode or "").startswith("up")
        if stage.mode:
            x = (self.upsample if up else self.downsample)(x, stage, band)
        if residual and not up:
            self.spike(2 * start.clip.size * self.size)
        elif residual:
            places = 8 if stage.mode == "upsample3d" else 4
            seen = start.clip.width * (x.clip.rows // 2 + 1) * start.clip.frames
            self.spike(2 * seen * places * stage.out * self.size)
        if residual:
            self.free(start)
        return x

    def upsample(self, x: Held, stage: Stage, band: Band) -> Held:
        source, clip = x, x.clip
        if stage.mode == "upsample3d":
            y = self.conv(x, Conv(2 * clip.channels))
            source = self.hold(clip._replace(frames=2 * clip.frames, cropped=False))
            self.free(y)
        clip = source.clip
        self.spike(self.ops.upsample(clip, stage.out))
        y = self.hold(Clip(stage.out, clip.frames, 2 * clip.rows, 2 * clip.width))
        if source is not x:
            self.free(source)
        self.free(x)
        self.level, self.rows = self.level + 1, self.rows.doubled()
        return self.narrow(y, band.levels[self.level])

    def downsample(self, x: Held, stage: Stage, band: Band) -> Held:
        self.level += 1
        rows = band.levels[self.level]
        source = self.narrow(x, rows.before_halving())
        clip = source.clip
        self.spike(self.ops.downsample(clip, stage.out))
        half = Clip(stage.out, clip.frames, rows.stop - rows.start, clip.width // 2)
        y = self.hold(half)
        self.rows = rows
        if stage.mode == "downsample3d":
            half, y = y, self.conv(y, Conv(stage.out, past=1, stride=2))
            self.free(half)
        self.free(x)
        return y
