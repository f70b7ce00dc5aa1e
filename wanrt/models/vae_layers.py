"""The building blocks of both Wan VAEs, and the state that carries the past between chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt import env
from wanrt.config import VaeWork
from wanrt.errors import UsageError
from wanrt.kernels import registry, torch_conv, torch_conv_int8
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.kernels.target import UnsupportedOp
from wanrt.models.layers import reusable
from wanrt.vae_shapes import Rows


class VaeOps(NamedTuple):
    """The arithmetic of a VAE, chosen when it is built; `kernels/reference_vae.py` says it."""

    rms_norm_channels: Callable[..., Tensor]
    causal_conv3d: Callable[..., tuple[Tensor, Tensor | None]]
    causal_conv3d_int8: Callable[..., tuple[Tensor, Tensor | None]]
    upsample_conv2d: Callable[..., Tensor]
    downsample_conv2d: Callable[..., Tensor]
    frame_attention: Callable[..., Tensor]


TORCH = VaeOps(
    torch_conv.rms_norm_channels,
    torch_conv.causal_conv3d,
    torch_conv_int8.causal_conv3d_int8,
    torch_conv.upsample_conv2d,
    torch_conv.downsample_conv2d,
    torch_conv.frame_attention,
)


def check_fp16_sums(device: torch.device) -> None:
    """Raises UsageError where the convolution of fp16 on this device cannot add up in fp16."""
    target = registry.here(torch.float16, device.type)
    try:
        choice = registry.resolve("causal_conv3d", target, env.ops_backend())
    except UnsupportedOp as error:
        raise UsageError(str(error)) from error
    if choice.backend != "triton":
        why = choice.declined.get("triton", "another backend was named")
        raise UsageError(
            f"VAE precision fp16-accumulate needs Triton's convolution, and on {device.type} it is "
            f"{choice.backend}'s (Triton: {why}); use --vae-precision fp16"
        )


def with_fp16_sums(ops: VaeOps) -> VaeOps:
    """3x3x3 taps of fp16 are added up in fp16, at most 128 products before they join an fp32 sum.

    The backend of `ops` does it where `check_fp16_sums` has no objection. Others round less.
    """
    convolve = ops.causal_conv3d

    def causal_conv3d(
        x: Tensor, weight: Tensor, bias: Tensor, *more: object, **named: object
    ) -> tuple[Tensor, Tensor | None]:
        sums = torch.float16 if weight.shape[2:] == (3, 3, 3) else torch.float32
        return convolve(x, weight, bias, *more, **named, accumulator=sums)

    return ops._replace(causal_conv3d=causal_conv3d)


@dataclass(frozen=True)
class CausalState:
    """What a causal encoder or decoder remembers between chunks; nothing in it is changed in place.

    `slots[i]` holds the last frames that the i-th temporal convolution has seen: `[B, C, 2, H, W]`,
    or one frame for the strided ones of the encoder; None before its first frame. Those of int8
    convolutions are int8. Of a clip coded in bands, `bands` holds the slots of each band's layers,
    and `slots` those of the others.
    """

    slots: tuple[Tensor | None, ...]
    first: bool = True  # no frame has been seen
    bands: tuple[tuple[Tensor | None, ...], ...] = ()


class Place(NamedTuple):
    """How far a band has come: the stage it is in, the rows that it holds there."""

    level: int
    rows: Rows


class Walk:
    """The way of one clip through an encoder or decoder: holds the state while it changes.

    Frames are whole here: what a band does at its inner edges (`vae_bands.BandWalk`), these do not.
    """

    rows: Rows | None = None  # that the tensor now under way holds
    place: Place | None = None  # where it is; set to go back there

    def __init__(
        self, state: CausalState, ops: VaeOps = TORCH, work: VaeWork | None = None
    ) -> None:
        self.slots = list(state.slots)
        self.first = state.first
        self.ops = ops
        self.work = work or VaeWork()
        self.last = False  # no chunk follows this one: nothing need be remembered
        self.settled: set[int] | None = None  # slots that the last chunk left as they were

    def history(self, slot: int, device: torch.device) -> Tensor | None:
        """What the slot remembers, on the device of the frames that follow."""
        frames = self.slots[slot]
        return frames if frames is None else frames.to(device)

    def keep(self, slot: int, frames: Tensor) -> None:
        """Remember frames in place of the older ones."""
        if self.settled is not None:
            self._compare(slot, frames)
        kept = frames.cpu() if self.work.host else frames
        self.slots[slot] = None if self.last else kept

    def _compare(self, slot: int, frames: Tensor) -> None:
        old = self.history(slot, frames.device)
        same = old is not None and torch.equal(old, frames)
        (self.settled.add if same else self.settled.discard)(slot)

    def state(self) -> CausalState:
        """The past so far. The walk replaces its tensors but never changes them."""
        return CausalState(tuple(self.slots), self.first)

    def enter(self, x: Tensor) -> Tensor:
        """What the local layers take of x."""
        return x

    def trim(self, y: Tensor) -> Tensor:
        """The result of a 3x3 convolution, less the rows that zeros at an inner edge have met."""
        return y

    def beside(self, x: Tensor, rows: Rows | None) -> Tensor:
        """Of x, which holds `rows`, those now under way; x may be twice or half as high."""
        return x

    def doubled(self, y: Tensor) -> Tensor:
        """The result of an upsampling, as the next stage wants it."""
        return y

    def halving(self, x: Tensor) -> Tensor:
        """What a downsampling takes of x; after it `rows` are those of its result."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """The result of the local layers."""
        return y


class CausalConv3d(nn.Conv3d):
    """Convolution over time that sees only the past; its history lives in the state."""

    slot: int = -1  # place in CausalState.slots, given by number_slots; 1x1x1 has none

    def forward(
        self,
        x: Tensor,
        walk: Walk | None,
        gamma: Tensor | None = None,
        residual: Tensor | None = None,
        history: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x `[B, C, T, H, W]` -> `[B, O, T, H, W]`; `gamma`: RMS norm and SiLU come first.

        `residual` is added; `history` stands in front of x where the state has nothing; `out` may
        be x itself; a 1x1x1 convolution needs no walk.
        """
        ops = walk.ops if walk else TORCH
        if self.slot < 0:
            return ops.causal_conv3d(x, self.weight, self.bias, None)[0]
        past = walk.history(self.slot, x.device)
        history = history if past is None else past
        y, kept = ops.causal_conv3d(
            x, self.weight, self.bias, history, gamma, residual, self.stride[0], out
        )
        walk.keep(self.slot, kept)
        return walk.trim(y) if self.kernel_size[1] > 1 else y


class Int8CausalConv3d(nn.Module):
    """A CausalConv3d behind a norm, in int8; its history too. Everything but the bias keeps its
    dtype for good: cast a VAE first, then quantise it.
    """

    def __init__(self, conv: CausalConv3d, quantized: QuantizedConv) -> None:
        super().__init__()
        self.slot = conv.slot
        self.bias = conv.bias
        for name, part in quantized._asdict().items():
            self.register_buffer(name, part)

    def forward(
        self,
        x: Tensor,
        walk: Walk,
        gamma: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See CausalConv3d. Where `residual` is beside x, x goes nowhere else, and int8 has no NaN:
        what is not finite in x shows in the bias, and so in all results."""
        assert self.scale.dtype == self.step.dtype == torch.float32, f"{self.scale.dtype=}"
        weight = QuantizedConv(*(getattr(self, name) for name in QuantizedConv._fields))
        bias, history = self.bias, walk.history(self.slot, x.device)
        if residual is not None:
            bias = bias + 0 * torch.linalg.vector_norm(x, torch.inf)
        y, kept = walk.ops.causal_conv3d_int8(x, weight, bias, history, gamma, residual, out)
        walk.keep(self.slot, kept)
        return walk.trim(y)


def number_slots(module: nn.Module) -> int:
    """Give every convolution that has a past its place in the state; returns how many there are."""
    convs = [m for m in module.modules() if isinstance(m, CausalConv3d) and m.kernel_size[0] > 1]
    for slot, conv in enumerate(convs):
        conv.slot = slot
    return len(convs)


class RmsNorm(nn.Module):
    """Holds the gamma of an RMS norm over channels."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))


class ResidualBlock(nn.Module):
    """Two normalised causal convolutions beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RmsNorm(in_dim, 3),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3),
            RmsNorm(out_dim, 3),
            nn.SiLU(),
            nn.Identity(),  # the reference's dropout, kept for the names
            CausalConv3d(out_dim, out_dim, 3),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        rows = walk.rows
        y = conv1(x, walk, gamma=norm1.gamma)
        x = walk.beside(x, rows)
        if isinstance(self.shortcut, CausalConv3d):
            x = self.shortcut(x, walk)
        return conv2(y, walk, gamma=norm2.gamma, residual=x, out=reusable(y))


class AttentionBlock(nn.Module):
    """Self-attention with one head over the pixels of each frame, one frame at a time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RmsNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        return torch.cat([self._frame(frame, walk) for frame in x.split(1, 2)], dim=2)

    def _frame(self, x: Tensor, walk: Walk) -> Tensor:
        """x `[B, C, 1, H, W]`."""
        h, w = x.shape[3:]
        y = walk.ops.rms_norm_channels(x, self.norm.gamma)
        qkv = self._pointwise(y, self.to_qkv, walk).permute(0, 2, 3, 4, 1)  # [B, 1, H, W, 3C]
        q, k, v = qkv.flatten(2, 3).chunk(3, dim=-1)
        y = walk.ops.frame_attention(q, k, v).unflatten(2, (h, w)).permute(0, 4, 1, 2, 3)
        return self._pointwise(y, self.proj, walk, residual=x)

    def _pointwise(
        self, x: Tensor, conv: nn.Conv2d, walk: Walk, residual: Tensor | None = None
    ) -> Tensor:
        weight = conv.weight.unsqueeze(2)
        return walk.ops.causal_conv3d(x, weight, conv.bias, None, residual=residual)[0]


class Resample(nn.Module):
    """Halve or double height and width, and for the 3d modes the frame rate with them.

    The first frame of a clip bypasses both temporal convolutions, and never enters the history of
    the doubling one. Source: Wan2.1 `wan/modules/vae.py` Resample, in the full-sequence form.
    """

    def __init__(self, dim: int, out_dim: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        up = mode.startswith("up")
        conv = nn.Conv2d(dim, out_dim, 3, padding=1) if up else nn.Conv2d(dim, out_dim, 3, stride=2)
        self.resample = nn.Sequential(nn.Identity(), conv)  # 0: the reference's upsampling or pad
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1))
        elif mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        if self.mode.startswith("up"):
            return self.enlarge(self.double(x, walk) if self.mode == "upsample3d" else x, walk)
        conv = self.resample[1]
        x = walk.ops.downsample_conv2d(walk.halving(x), conv.weight, conv.bias)
        return self._halve(x, walk) if self.mode == "downsample3d" else x

    def enlarge(self, x: Tensor, walk: Walk) -> Tensor:
        """Twice the height and width, each frame for itself."""
        conv = self.resample[1]
        return walk.doubled(walk.ops.upsample_conv2d(x, conv.weight, conv.bias))

    def double(self, x: Tensor, walk: Walk) -> Tensor:
        """`[B, C, T, H, W]` -> twice the frames; once the clip's first frame alone stays single."""
        head, x = (x[:, :, :1], x[:, :, 1:]) if walk.first else (x[:, :, :0], x)
        b, c, t, h, w = x.shape
        if t == 0:
            return head
        y = self.time_conv(x, walk).permute(0, 2, 3, 4, 1).unflatten(-1, (2, c))
        y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c).permute(0, 4, 1, 2, 3)
        return torch.cat([head, y], dim=2) if walk.first else y

    def _halve(self, x: Tensor, walk: Walk) -> Tensor:
        """Frames 2k-2, 2k-1, 2k make output frame k; a clip's first frame stays as it is."""
        if not walk.first:
            return self.time_conv(x, walk)
        head, x = x[:, :, :1], x[:, :, 1:]
        if x.shape[2] == 0:
            walk.keep(self.time_conv.slot, head.clone())
            return head
        return torch.cat([head, self.time_conv(x, walk, history=head)], dim=2)
