"""Bytes that the VAE's ops take while they run, beside what they are given: by backend.

The numbers follow the code of `kernels/torch_conv.py` (a norm as off the CPU, where it is not cut
into slabs), `torch_winograd.py`, `torch_conv_int8.py`, `conv.py` and `conv_int8.py`. What a library
allocates inside one call (cuDNN's workspace, a fused attention's sums) is not seen here; a plan
needs room for it.
"""

from dataclasses import dataclass
from typing import NamedTuple

PIECE = 1 << 21  # kernels/torch_conv.py: elements of input that go through a convolution at once
FEW_PIXELS = 512  # the same: on smaller frames no pairs are made
SCORES = 1 << 24  # models/vae_layers.py: attention scores at once
_BIAS = 8  # bytes for each output: models/vae_layers.py makes int8 convolutions a bias


class Clip(NamedTuple):
    """The shape of an activation; `cropped`: a view of more rows."""

    channels: int
    frames: int
    rows: int
    width: int
    cropped: bool = False

    @property
    def pixels(self) -> int:
        return self.rows * self.width

    @property
    def frame(self) -> int:
        """Elements of one frame."""
        return self.channels * self.pixels

    @property
    def scattered(self) -> bool:
        """Pixels lie in more than one run, so that a norm over all of them copies them first."""
        return self.cropped and self.frames > 1

    @property
    def size(self) -> int:
        """Elements."""
        return self.frames * self.frame


class Conv(NamedTuple):
    """A causal convolution; `past`: frames of history, 0 for 1x1x1."""

    out: int
    past: int = 2
    stride: int = 1
    norm: bool = False
    in_place: bool = False
    int8: bool = False


@dataclass(frozen=True)
class TorchOps:
    """`kernels/torch_conv.py`: a few frames at a time."""

    element_size: int

    def conv(self, x: Clip, conv: Conv) -> int:
        """Peak bytes, the result and the frames to remember with it."""
        e, tail = self.element_size, conv.past * x.frame * self.element_size
        result = conv.out * x.pixels * e  # of one frame
        whole = result * x.frames // conv.stride
        if not (conv.past or conv.norm or conv.in_place or x.scattered):
            return whole
        sizes = self._pieces(x)
        piece, kept = result * sizes[0] // conv.stride, 0 if conv.in_place else whole
        if len(sizes) == 1 and not conv.in_place:
            piece, kept, tail = 0, 0, tail + whole
        norm = self._norm(x._replace(frames=sizes[0])) if conv.norm else 0
        piece = max(piece, self._in_pairs(x, conv, sizes[0], tail))
        return kept + (conv.past + sizes[0]) * x.frame * e + max(norm, piece, tail)

    def _in_pairs(self, x: Clip, conv: Conv, frames: int, result: int) -> int:
        """Beside these frames, where Winograd takes them in pairs; it does not here."""
        return 0

    def conv_int8(self, x: Clip, conv: Conv) -> int:
        """Padded int8 frames, and one frame at a time in 32 bits: its input, or sums and result."""
        frames = x.channels * (x.frames + 2) * ((x.rows + 2) * (x.width + 2) + 2)
        quantising = 8 * x.frame + 8 * x.pixels
        sums, result = 4 * conv.out * x.rows * (x.width + 2), 4 * conv.out * x.pixels
        made = 0 if conv.in_place else conv.out * x.pixels * x.frames * self.element_size
        made += 27 * conv.out * x.channels
        inside = made + max(2 * sums, sums + result, 2 * x.frame)
        return _BIAS * conv.out + frames + max(quantising, inside)

    def upsample(self, x: Clip, out: int) -> int:
        e = self.element_size
        sizes = self._pieces(x)
        places = 4 * out * (x.rows + 1) * (x.width + 1) * sizes[0] * min(2, len(sizes)) * e
        folded = 16 * out * x.channels * e
        return max(4 * out * x.pixels * x.frames * e + folded + places, 32 * out * x.channels * 4)

    def downsample(self, x: Clip, out: int) -> int:
        e, done, peak = self.element_size, 0, 0
        for n in self._pieces(x):
            padded = x.channels * (x.rows + 1) * (x.width + 1) * n * e
            result = out * (x.rows // 2) * (x.width // 2) * n * e
            peak = max(peak, done + padded + max(padded if done else 0, result))
            done += result
        return max(peak, 2 * done + padded)

    def attention(self, x: Clip) -> int:
        """Of one frame: norm; queries, keys, values; scores and weights where nothing is fused."""
        e, queries = self.element_size, max(1, SCORES // x.pixels)
        scores = 2 * min(queries, x.pixels) * x.pixels * e
        return max(3 * x.size * 4 + 4 * x.pixels * 4, 7 * x.frame * e + scores)

    def _norm(self, x: Clip) -> int:
        """Of a norm and SiLU, beside the buffer that takes the result."""
        rows = x.size * self.element_size if x.scattered else 0
        as_fp32 = 0 if self.element_size == 4 else x.size * 4
        return rows + as_fp32 + 4 * x.pixels * x.frames * 4

    def _pieces(self, x: Clip) -> list[int]:
        n = max(2, PIECE // x.frame // 2 * 2)
        return [min(n, x.frames - i) for i in range(0, x.frames, n)]


class CpuOps(TorchOps):
    """Those of torch_conv.py in fp32 on a CPU, where frames go in pairs."""

    def _in_pairs(self, x: Clip, conv: Conv, frames: int, result: int) -> int:
        """Four clips of half the length, a third of the weight twice, and the result."""
        taps = conv.past == 2 and conv.stride == 1
        if not taps or frames == 1 or x.pixels < FEW_PIXELS:
            return 0
        halves = frames // 2 * (x.frame + 3 * conv.out * x.pixels)
        return (halves + 2 * 9 * conv.out * x.channels) * self.element_size + result


@dataclass(frozen=True)
class TritonOps:
    """`kernels/conv.py`: only a norm and the result take room, and weights that lie otherwise."""

    element_size: int

    def conv(self, x: Clip, conv: Conv) -> int:
        taps = 27 if conv.past else 1
        frames = 0 if conv.in_place else conv.out * x.pixels * x.frames // conv.stride
        normed = x.size if conv.norm else 0
        convolving = normed + frames + conv.out * x.channels * taps + conv.past * x.frame
        return max(normed * (1 + x.scattered), convolving) * self.element_size

    def conv_int8(self, x: Clip, conv: Conv) -> int:
        frames = 0 if conv.in_place else conv.out * x.pixels * x.frames
        scattered = x.size * self.element_size if x.scattered else 0
        convolving = frames * self.element_size + conv.out * x.channels * 27 + conv.past * x.frame
        return _BIAS * conv.out + x.size + max(scattered, convolving)

    def upsample(self, x: Clip, out: int) -> int:
        return (4 * out * x.pixels * x.frames + 25 * out * x.channels) * self.element_size

    def downsample(self, x: Clip, out: int) -> int:
        pixels = (x.rows // 2) * (x.width // 2)
        return (out * pixels * x.frames + 9 * out * x.channels) * self.element_size

    def attention(self, x: Clip) -> int:
        return TorchOps(self.element_size).attention(x)
