"""The stages of both Wan VAEs, assembled into encoder and decoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.config import VaeSpec
from wanrt.models.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Resample,
    ResidualBlock,
    RmsNorm,
    Walk,
    number_slots,
)


class Encoder(nn.Module):
    """Pixels to latent moments."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        dims = [spec.base_dim * m for m in (1, *spec.dim_mult)]
        self.conv1 = CausalConv3d(3 * spec.patch**2, dims[0], 3)
        stages: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:], strict=False)):
            last = i == len(spec.dim_mult) - 1
            mode = None if last else f"downsample{3 if spec.temporal_downsample[i] else 2}d"
            if spec.residual:
                stages.append(DownStage(in_dim, out_dim, spec.num_res_blocks, mode))
                continue
            widths = [in_dim] + [out_dim] * spec.num_res_blocks
            stages += [ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)]
            stages += [Resample(out_dim, out_dim, mode)] if mode else []
        self.downsamples = nn.ModuleList(stages)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], spec.z_dim * 2)
        self.num_slots = number_slots(self)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        x = self.conv1(x, walk)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, walk)
        return self.head[2](x, walk, gamma=self.head[0].gamma)


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        mult = (spec.dim_mult[-1], *reversed(spec.dim_mult))
        dims = [spec.decoder_base_dim * m for m in mult]
        self.conv1 = CausalConv3d(spec.z_dim, dims[0], 3)
        self.middle = _middle(dims[0])
        stages: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:], strict=False)):
            last = i == len(spec.dim_mult) - 1
            mode = None if last else f"upsample{3 if spec.temporal_downsample[-1 - i] else 2}d"
            if spec.residual:
                stages.append(UpStage(in_dim, out_dim, spec.num_res_blocks + 1, mode))
                continue
            widths = [in_dim // 2 if i else in_dim] + [out_dim] * (spec.num_res_blocks + 1)
            stages += [ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)]
            stages += [Resample(out_dim, out_dim // 2, mode)] if mode else []
        self.upsamples = nn.ModuleList(stages)
        self.head = _head(dims[-1], 3 * spec.patch**2)
        self.num_slots = number_slots(self)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        x = self.conv1(x, walk)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, walk)
        return self.head[2](x, walk, gamma=self.head[0].gamma)


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def _head(dim: int, out_dim: int) -> nn.ModuleList:
    return nn.ModuleList([RmsNorm(dim, 3), nn.SiLU(), CausalConv3d(dim, out_dim, 3)])


class DownStage(nn.Module):
    """A residual stage of the Wan 2.2 encoder."""

    def __init__(self, in_dim: int, out_dim: int, num_res: int, mode: str | None) -> None:
        super().__init__()
        dims = [in_dim] + [out_dim] * num_res
        layers: list[nn.Module] = [
            ResidualBlock(a, b) for a, b in zip(dims, dims[1:], strict=False)
        ]
        self.downsamples = nn.ModuleList(
            layers + ([Resample(out_dim, out_dim, mode)] if mode else [])
        )
        self.out_dim = out_dim
        self.factors = (2 if mode == "downsample3d" else 1, 2 if mode else 1)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, walk)
        return y.add_(average_down(x, self.out_dim, *self.factors))


class UpStage(nn.Module):
    """A residual stage of the Wan 2.2 decoder."""

    def __init__(self, in_dim: int, out_dim: int, num_res: int, mode: str | None) -> None:
        super().__init__()
        dims = [in_dim] + [out_dim] * num_res
        layers: list[nn.Module] = [
            ResidualBlock(a, b) for a, b in zip(dims, dims[1:], strict=False)
        ]
        self.upsamples = nn.ModuleList(
            layers + ([Resample(out_dim, out_dim, mode)] if mode else [])
        )
        self.out_dim = out_dim
        self.factors = (2 if mode == "upsample3d" else 1, 2) if mode else None

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, walk)
        if self.factors is None:
            return y
        return y.add_(duplicate_up(x, self.out_dim, *self.factors, first=walk.first))


def average_down(x: Tensor, out_dim: int, ft: int, fs: int) -> Tensor:
    """Space-time to channels, then the mean of neighbouring channels: the shortcut of a down stage.

    x `[B, C, T, H, W]` -> `[B, out_dim, T/ft, H/fs, W/fs]`; an odd clip start gets a zero frame.
    """
    x = F.pad(x, (0, 0, 0, 0, (-x.shape[2]) % ft, 0))
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // ft, ft, h // fs, fs, w // fs, fs).permute(0, 2, 4, 6, 1, 3, 5, 7)
    x = x.reshape(b, t // ft, h // fs, w // fs, out_dim, -1).mean(dim=-1)
    return x.permute(0, 4, 1, 2, 3)


def duplicate_up(x: Tensor, out_dim: int, ft: int, fs: int, first: bool) -> Tensor:
    """Repeat channels, then channels to space-time: the shortcut of an up stage.

    x `[B, C, T, H, W]` -> `[B, out_dim, T*ft, H*fs, W*fs]`, less `ft - 1` frames at a clip's start.
    """
    b, c, t, h, w = x.shape
    x = x.permute(0, 2, 3, 4, 1).repeat_interleave(out_dim * ft * fs * fs // c, dim=-1)
    x = x.view(b, t, h, w, out_dim, ft, fs, fs).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, t * ft, h * fs, w * fs, out_dim).permute(0, 4, 1, 2, 3)
    return x[:, :, ft - 1 :] if first else x
