"""The building blocks of both Wan VAEs, and the state that carries their past from chunk to chunk."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.kernels import torch_conv as ops


@dataclass(frozen=True)
class CausalState:
    """What a causal encoder or decoder remembers between chunks; nothing in it is changed in place.

    `slots[i]` holds the last frames that the i-th temporal convolution has seen: `[B, C, 2, H, W]`,
    or one frame for the strided ones of the encoder; None before the first frame.
    """

    slots: tuple[Tensor | None, ...]
    first: bool = True  # no frame has been seen


@dataclass
class Walk:
    """One pass over a chunk: reads the old state, collects the new one."""

    old: CausalState
    slots: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = list(self.old.slots)

    @property
    def first(self) -> bool:
        return self.old.first

    def finish(self) -> CausalState:
        return CausalState(tuple(self.slots), first=False)


class CausalConv3d(nn.Conv3d):
    """Convolution over time that sees only the past; its history lives in the state."""

    slot: int = -1  # place in CausalState.slots, given by number_slots; 1x1x1 has none

    def forward(self, x: Tensor, walk: Walk, gamma: Tensor | None = None) -> Tensor:
        """x `[B, C, T, H, W]` -> `[B, O, T, H, W]`; `gamma`: RMS norm and SiLU come first."""
        history = self.history(x, walk)
        y, kept = ops.causal_conv3d(x, self.weight, self.bias, history, gamma)
        if self.slot >= 0:
            walk.slots[self.slot] = kept
        return y

    def history(self, x: Tensor, walk: Walk) -> Tensor | None:
        """The frames before x, zeros at the start of the clip."""
        if self.slot < 0:
            return None
        stored = walk.slots[self.slot]
        if stored is not None:
            return stored
        b, c, _, h, w = x.shape
        return x.new_zeros((b, c, self.kernel_size[0] - 1, h, w))


def number_slots(module: nn.Module) -> int:
    """Give every convolution that has a past its place in the state; returns how many there are."""
    convs: Iterator[CausalConv3d] = (
        m for m in module.modules() if isinstance(m, CausalConv3d) and m.kernel_size[0] > 1
    )
    count = 0
    for conv in convs:
        conv.slot, count = count, count + 1
    return count


class RmsNorm(nn.Module):
    """Scale each pixel's channel vector to length sqrt(C), then by gamma."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm_channels(x, self.gamma)


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
        y = conv1(x, walk, gamma=norm1.gamma)
        y = conv2(y, walk, gamma=norm2.gamma)
        if isinstance(self.shortcut, CausalConv3d):
            x = self.shortcut(x, walk)
        return y.add_(x)


class AttentionBlock(nn.Module):
    """Self-attention with one head over the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RmsNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # [BT, HW, 3C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # [BT, 1, HW, C]
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        y = self.proj(y).view(b, t, c, h, w).transpose(1, 2)
        return x + y


class Resample(nn.Module):
    """Halve or double height and width, and for the 3d modes the frame rate with them.

    The first frame of a clip bypasses both temporal convolutions, and never enters the history of
    the doubling one. Source: Wan2.1 `wan/modules/vae.py` Resample, in the full-sequence form.
    """

    def __init__(self, dim: int, out_dim: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        if mode.startswith("up"):
            conv = nn.Conv2d(dim, out_dim, 3, padding=1)
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)
        else:
            conv = nn.Conv2d(dim, out_dim, 3, stride=2)
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1))
        elif mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        if self.mode == "upsample3d":
            return self._per_frame(self._double(x, walk))
        x = self._per_frame(x)
        return self._halve(x, walk) if self.mode == "downsample3d" else x

    def _per_frame(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        frames = self.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
        return frames.view(b, t, *frames.shape[1:]).transpose(1, 2)

    def _double(self, x: Tensor, walk: Walk) -> Tensor:
        """`[B, C, T, H, W]` -> twice the frames; once the clip's first frame alone stays single."""
        head, x = (x[:, :, :1], x[:, :, 1:]) if walk.first else (x[:, :, :0], x)
        b, c, t, h, w = x.shape
        if t == 0:
            return head
        y = self.time_conv(x, walk)
        y = y.view(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
        return torch.cat([head, y], dim=2) if walk.first else y

    def _halve(self, x: Tensor, walk: Walk) -> Tensor:
        """Frames 2k-2, 2k-1, 2k make output frame k; the clip's first frame is output 0 as it is."""
        conv = self.time_conv
        stored = walk.slots[conv.slot]
        frames = x if stored is None else torch.cat([stored, x], dim=2)
        walk.slots[conv.slot] = x[:, :, -1:].clone()
        if frames.shape[2] < 3:
            return x
        y = F.conv3d(frames, conv.weight, conv.bias, stride=conv.stride)
        return torch.cat([x[:, :, :1], y], dim=2) if walk.first else y
