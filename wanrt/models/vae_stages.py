"""The stages of both Wan VAEs, assembled into encoder and decoder."""

from collections.abc import Callable, Iterable

import torch
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
from wanrt.vae_shapes import Stage, decoder_stages, encoder_stages

Layer = Callable[[Tensor, Walk], Tensor]


class Encoder(nn.Module):
    """Pixels to latent moments."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        stages = encoder_stages(spec)
        dim = stages[-1].out
        self.conv1 = CausalConv3d(3 * spec.patch**2, stages[0].widths[0], 3)
        build = DownStage if spec.residual else _layers
        self.downsamples = _flat(build(stage) for stage in stages)
        self.middle = _middle(dim)
        self.head = Head(dim, spec.z_dim * 2)
        self.num_slots = number_slots(self)

    @property
    def local_layers(self) -> list[nn.Module]:
        """Each output row sees a few input rows."""
        return [self.conv1, *self.downsamples]

    def local_steps(self, frames: int | None) -> list[nn.Module]:
        """The local layers; those before the first halving of the frame rate `frames` at once."""
        if frames is None:
            return self.local_layers
        steps: list[nn.Module] = []
        groups = _by_size(self.local_layers)
        while groups and not any(map(_changes_time, groups[0])):
            steps.append(InPieces(groups.pop(0), frames))
        rest = [layer for group in groups for layer in group]
        free = next((i for i, layer in enumerate(rest) if _changes_time(layer)), len(rest))
        return [*steps, *([InPieces(rest[:free], frames)] if free else []), *rest[free:]]

    @property
    def whole_layers(self) -> list[nn.Module]:
        """The rest: attention sees the whole frame."""
        return [*self.middle, self.head]

    @property
    def sections(self) -> list[list[Layer]]:
        """The layers as `vae_sections.encoder_sections` cuts them."""
        layers = self.local_layers
        change = next((i for i, layer in enumerate(layers) if _changes_time(layer)), len(layers))
        apart = change if change > 1 else 0  # conv1 alone is no section
        return [*_by_block(layers[:apart]), *_by_size(layers[apart:]), self.whole_layers]

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        for layer in (*self.local_layers, *self.whole_layers):
            x = layer(x, walk)
        return x


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        stages = decoder_stages(spec)
        self.conv1 = CausalConv3d(spec.z_dim, stages[0].widths[0], 3)
        self.middle = _middle(stages[0].widths[0])
        build = UpStage if spec.residual else _layers
        self.upsamples = _flat(build(stage) for stage in stages)
        self.head = Head(stages[-1].out, 3 * spec.patch**2)
        self.num_slots = number_slots(self)

    @property
    def sections(self) -> list[list[Layer]]:
        """The layers as `vae_sections.decoder_sections` cuts them."""
        layers = [*self.upsamples, self.head]
        if isinstance(stage := self.upsamples[-1], UpStage):  # without a shortcut
            layers[-2:-1] = stage.upsamples
        free = _behind_doubling(layers)
        before, after = _by_size(layers[:free]), _by_block(layers[free:])
        if before and isinstance(last := before[-1][-1], Resample):
            before[-1][-1] = last.double
            after[0].insert(0, last.enlarge)
        return [[self.conv1, *self.middle], *before, *after]

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        return self.local(self.whole(x, walk), walk)

    def whole(self, x: Tensor, walk: Walk) -> Tensor:
        """The layers up to the mid-block, whose attention sees the whole frame."""
        for layer in (self.conv1, *self.middle):
            x = layer(x, walk)
        return x

    def local(self, x: Tensor, walk: Walk) -> Tensor:
        """The layers after it: each output row sees a few input rows."""
        x = walk.enter(x)
        layers = [*self.upsamples, self.head]
        free = _behind_doubling(layers)
        for layer in layers[:free]:
            x = layer(x, walk)
        if walk.work.frames and walk.work.frames < x.shape[2]:
            return _in_pieces(layers[free:], x, walk, walk.work.frames)
        for layer in layers[free:]:
            x = layer(x, walk)
        return walk.leave(x)


class InPieces(nn.ModuleList):
    """Layers of an encoder that keep the frame rate: x goes through all of them in pieces of time.

    The result is as large as ever, what lies between the layers as large as a piece.
    """

    def __init__(self, layers: Iterable[nn.Module], size: int) -> None:
        super().__init__(layers)
        self.size = size

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        if x.shape[2] <= self.size:
            return self._pass(x, walk)
        place, last, settled, result = walk.place, walk.last, [], None
        for begin in range(0, x.shape[2], self.size):
            end = min(begin + self.size, x.shape[2])
            walk.place, walk.last = place, last and end == x.shape[2]
            y = self._pass(x[:, :, begin:end], walk)
            if result is None:
                shape = (*y.shape[:2], x.shape[2], *y.shape[3:])
                like = {"dtype": y.dtype, "device": y.device}
                result = torch.empty(shape, **like, memory_format=torch.channels_last_3d)
            result[:, :, begin:end] = y
            del y  # or it would lie beside the next piece
            settled.append(frozenset(walk.settled or ()))
        if walk.settled is not None:  # a past is as it was where no piece has changed it
            walk.settled.intersection_update(*settled)
        return result

    def _pass(self, x: Tensor, walk: Walk) -> Tensor:
        for layer in self:
            x = layer(x, walk)
        return x


def _in_pieces(layers: list[nn.Module], x: Tensor, walk: Walk, size: int) -> Tensor:
    """x through layers that keep the frame rate, `size` frames at once."""
    place, last = walk.place, walk.last
    parts, results = x.split(size, 2), []
    for i, y in enumerate(parts):
        walk.place, walk.last = place, last and i == len(parts) - 1
        for layer in layers:
            y = layer(y, walk)
        results.append(walk.leave(y))
    return torch.cat(results, 2)


def _by_size(layers: list[nn.Module]) -> list[list[Layer]]:
    """Layers in groups that end where the size changes."""
    groups: list[list[Layer]] = []
    ended = True
    for layer in layers:
        groups += [[]] if ended else []
        groups[-1].append(layer)
        ended = any(isinstance(m, Resample) for m in layer.modules())
    return groups


def _by_block(layers: list[nn.Module]) -> list[list[Layer]]:
    """Layers in groups, each with one residual block, or one stage that has a shortcut, or the
    head."""
    groups: list[list[Layer]] = []
    full = True
    for layer in layers:
        block = isinstance(layer, ResidualBlock | DownStage | UpStage | Head)
        if not groups or (block and full):
            groups.append([])
            full = False
        groups[-1].append(layer)
        full = full or block
    return groups


def _behind_doubling(layers: list[nn.Module]) -> int:
    """The first of the layers that keep the frame rate until the end."""
    doubling = [i for i, layer in enumerate(layers) if _changes_time(layer)]
    return doubling[-1] + 1 if doubling else 0


def _changes_time(layer: nn.Module) -> bool:
    return any(isinstance(m, Resample) and m.mode.endswith("3d") for m in layer.modules())


def _layers(stage: Stage) -> nn.ModuleList:
    layers: list[nn.Module] = [ResidualBlock(a, b) for a, b in stage.blocks]
    if stage.mode:
        layers.append(Resample(stage.widths[-1], stage.out, stage.mode))
    return nn.ModuleList(layers)


def _flat(stages: Iterable[nn.Module]) -> nn.ModuleList:
    """Wan 2.1 numbers the layers of all stages through; 2.2 keeps its stages."""
    parts = [list(s) if isinstance(s, nn.ModuleList) else [s] for s in stages]
    return nn.ModuleList([layer for part in parts for layer in part])


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


class Head(nn.ModuleList):
    """Norm, SiLU and the last 3x3x3 convolution."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__([RmsNorm(dim, 3), nn.SiLU(), CausalConv3d(dim, out_dim, 3)])

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        return self[2](x, walk, gamma=self[0].gamma)


class DownStage(nn.Module):
    """A residual stage of the Wan 2.2 encoder."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.downsamples = _layers(stage)
        self.out_dim = stage.out
        self.factors = (2 if stage.mode == "downsample3d" else 1, 2 if stage.mode else 1)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        y, rows = x, walk.rows
        for layer in self.downsamples:
            y = layer(y, walk)
        shortcut = average_down(walk.beside(x, rows), self.out_dim, *self.factors)
        return y.add_(shortcut)


class UpStage(nn.Module):
    """A residual stage of the Wan 2.2 decoder."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.upsamples = _layers(stage)
        self.out_dim = stage.out
        self.factors = (2 if stage.mode == "upsample3d" else 1, 2) if stage.mode else None

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        y, rows = x, walk.rows
        for layer in self.upsamples:
            y = layer(y, walk)
        if self.factors is None:
            return y
        if rows:
            x = walk.beside(x, rows)
            rows = walk.rows.halved().doubled()
        shortcut = duplicate_up(x, self.out_dim, *self.factors, first=walk.first)
        return y.add_(walk.beside(shortcut, rows))


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
