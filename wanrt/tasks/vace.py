"""Conditioning of VACE: the context tensor, and the source video and mask of each kind of edit."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.errors import UsageError
from wanrt.media.image import cover_crop, is_image, load_image
from wanrt.media.video import probe_video, read_video
from wanrt.tasks.i2v import VaeEncode
from wanrt.tasks.sizes import Size, vace_frame_indices, vace_grid

Direction = Literal["left", "right", "up", "down"]


class Source(NamedTuple):
    """What a VACE request edits. Without a video: text and reference images alone.

    `video` is `[3, F, H, W]` in [-1, 1], gray (0) where it is unknown. `mask` is `[1, F, H, W]` or
    `[1, 1, H, W]` (one for all frames) in [0, 1], 1 = generate, 0 = keep; None = all 1, which
    makes the video a control video.
    """

    video: Tensor | None = None
    mask: Tensor | None = None


class VaceCondition(NamedTuple):
    context: Tensor  # [1, 96, num_refs + T, h, w]
    num_refs: int  # latent frames to drop before decoding


def vace_condition(
    source: Source, refs: Sequence[Tensor], num_frames: int, size: Size, vae_encode: VaeEncode
) -> VaceCondition:
    """The `vace_context` for the DiT: kept part, generated part, references and mask.

    References `[3, H0, W0]` in [-1, 1] come first in time, in the order given (diffusers reverses
    it). The mask splits the video at 0.5, but enters its own 64 channels as it is. Two encodes of
    a clip (one without a video), one of a frame per reference; peak: one clip beside the video.
    Source: Wan2.1 @9737cba `wan/vace.py`.
    """
    assert size.height % 16 == 0 and size.width % 16 == 0, f"{size=}"
    video, mask = source
    if video is None and mask is not None:
        raise UsageError("a mask needs the video that it belongs to (--video)")
    if video is not None:
        assert video.shape == (3, num_frames, *size), f"{video.shape=}, {num_frames=}, {size=}"
    clip = _encode_halves(video, mask, num_frames, size, vae_encode)  # [1, 32, T, h, w]
    frames = [_encode_reference(image, size, vae_encode) for image in refs]
    latents = torch.cat([*frames, clip], dim=2)
    if mask is None:
        mask = torch.ones(1, 1, *size)
    mask = mask_channels(mask, num_frames).to(latents)  # [1, 64, T, h, w]
    mask = F.pad(mask, (0, 0, 0, 0, len(refs), 0))
    return VaceCondition(torch.cat([latents, mask], dim=1), len(refs))


def _encode_halves(
    video: Tensor | None, mask: Tensor | None, num_frames: int, size: Size, vae_encode: VaeEncode
) -> Tensor:
    """Latents of the kept pixels, then of the pixels to generate, each 0 elsewhere."""
    if video is None:
        gray = vae_encode(torch.zeros(1, 3, num_frames, *size))
        return torch.cat([gray, gray], dim=1)
    generate = 1.0 if mask is None else (mask > 0.5).to(video)  # [1, F or 1, H, W]
    kept = vae_encode((video * (1 - generate))[None])
    return torch.cat([kept, vae_encode((video * generate)[None])], dim=1)


def _encode_reference(image: Tensor, size: Size, vae_encode: VaeEncode) -> Tensor:
    latents = vae_encode(on_white(image, size)[None, :, None])
    return torch.cat([latents, torch.zeros_like(latents)], dim=1)  # [1, 32, 1, h, w]


def on_white(image: Tensor, size: Size) -> Tensor:
    """Scale `[3, H0, W0]` to fit inside the size, bilinear, and center it on white."""
    if image.shape[1:] == tuple(size):
        return image
    scale = min(size.height / image.shape[1], size.width / image.shape[2])
    rows, columns = (max(1, int(length * scale)) for length in image.shape[1:])
    canvas = image.new_ones(3, *size)
    top, left = (size.height - rows) // 2, (size.width - columns) // 2
    canvas[:, top : top + rows, left : left + columns] = F.interpolate(
        image[None], size=(rows, columns), mode="bilinear", align_corners=False
    )[0]
    return canvas


def mask_channels(mask: Tensor, num_frames: int) -> Tensor:
    """`[1, F or 1, H, W]` -> `[1, 64, T, h, w]`: channel dy * 8 + dx of each 8x8 block.

    Latent frame i takes the mask of frame floor((i + 0.5) * F / T), so frame 0 takes that of 1.
    """
    latent_frames = (num_frames + 3) // 4
    mask = mask.expand(1, num_frames, -1, -1)[0]
    index = [(2 * i + 1) * num_frames // (2 * latent_frames) for i in range(latent_frames)]
    return F.pixel_unshuffle(mask[index].float()[:, None], 8).transpose(0, 1)[None]


def inpaint(video: Tensor, mask: Tensor) -> Source:
    """Generate anew where `mask` is over 0.5: `[H, W]`, `[F, H, W]` or `[1, F, H, W]`.

    Blanks that area (the reference's preprocessing does too); without that, what was there would
    guide what is generated.
    """
    mask = mask.reshape(1, -1, *mask.shape[-2:]).float()
    return Source(video * (mask <= 0.5), mask)


def outpaint(
    video: Tensor, directions: Sequence[Direction], ratio: float = 0.25, multiple: int = 16
) -> Source:
    """Extend the picture by `ratio` of its side in each direction, gray and to be generated.

    The canvas is padded to a multiple of 16 in the same proportion, or right and below on an axis
    without a direction. Source: VACE @48eb44f `vace/annotators/outpainting.py`.
    """
    unknown = set(directions) - {"left", "right", "up", "down"}
    if unknown or not directions:
        raise UsageError(
            f"outpaint directions are left, right, up, down, not {sorted(unknown) or 'none'}"
        )
    if not 0 < ratio <= 1:
        raise UsageError(f"outpaint ratio is {ratio}; it must be over 0 and at most 1")
    height, width = video.shape[2:]
    up, rows = _extent(height, "up" in directions, "down" in directions, ratio, multiple)
    left, columns = _extent(width, "left" in directions, "right" in directions, ratio, multiple)
    canvas = video.new_zeros(3, video.shape[1], rows, columns)
    canvas[:, :, up : up + height, left : left + width] = video
    mask = torch.ones(1, 1, rows, columns)
    mask[:, :, up : up + height, left : left + width] = 0
    return Source(canvas, mask)


def _extent(length: int, before: bool, after: bool, ratio: float, multiple: int) -> tuple[int, int]:
    """How much to add in front, and the whole length."""
    added = int(ratio * length)
    whole = math.ceil((length + added * (before + after)) / multiple) * multiple
    return (whole - length) // (1 + after) if before else 0, whole


def extend(num_frames: int, first: Tensor | None = None, last: Tensor | None = None) -> Source:
    """Generate what follows `first`, precedes `last`, or lies between: images or clips.

    Each is `[3, H, W]` or `[3, n, H, W]`, of one size. The reference's modes firstframe, lastframe,
    firstlastframe, firstclip, lastclip and firstlastclip
    (VACE @48eb44f `vace/annotators/frameref.py`).
    """
    head, tail = (x[:, None] if x is not None and x.ndim == 3 else x for x in (first, last))
    known = [x for x in (head, tail) if x is not None]
    if not known:
        raise UsageError("to extend a video, give its first or its last frames (--image, --video)")
    size = known[0].shape[2:]
    if known[-1].shape[2:] != size:
        raise UsageError(
            f"the first frames are {size[1]}x{size[0]}, the last ones "
            f"{known[-1].shape[3]}x{known[-1].shape[2]} (scale them to one size)"
        )
    given = sum(x.shape[1] for x in known)
    if given >= num_frames:
        raise UsageError(f"{given} frames are given and {num_frames} asked for: none to generate")
    video = known[0].new_zeros(3, num_frames, *size)
    mask = torch.ones(1, num_frames, *size)
    if head is not None:
        video[:, : head.shape[1]], mask[:, : head.shape[1]] = head, 0
    if tail is not None:
        video[:, -tail.shape[1] :], mask[:, -tail.shape[1] :] = tail, 0
    return Source(video, mask)


def read_end(video: str | PathLike[str], last: bool, at_most: int, size: Size) -> Tensor:
    """The last (or first) frames of a file, scaled and cropped: `[3, at_most or fewer, H, W]`.

    Raises FormatError. Only these frames are held.
    """
    length = probe_video(video).num_frames
    count = min(length, at_most)
    start = length - count if last else 0
    return read_video(video, range(start, start + count), size).frames


def fit(source: Source, size: Size) -> Source:
    """Scale and crop a source to the output size, as the reference does with its files."""
    video, mask = source
    if video is not None:
        video = cover_crop(video.transpose(0, 1), *size).transpose(0, 1).clamp(-1, 1)
    if mask is not None:
        mask = cover_crop(mask.transpose(0, 1), *size).transpose(0, 1).clamp(0, 1)
    return Source(video, mask)


def read_source(
    video: str | PathLike[str],
    mask: str | PathLike[str] | None,
    max_area: int,
    max_tokens: int | None = None,
) -> Source:
    """Load a video and its mask at the size and length that `vace_grid` gives.

    The frames are spread over the whole source, whose frame rate is ignored: a long one plays
    faster. The mask is a video, or an image for all frames; its red channel counts. Raises
    FormatError.
    """
    info = probe_video(video)
    length = info.num_frames
    if mask is not None and not is_image(mask):
        length = min(length, probe_video(mask).num_frames)
    grid = vace_grid(length, info.width, info.height, max_area, max_tokens)
    indices = vace_frame_indices(info.times[: length + 1], grid.num_frames)
    frames = read_video(video, indices, grid.size).frames
    if mask is None:
        return Source(frames)
    if is_image(mask):
        shades = cover_crop(load_image(mask)[None], *grid.size).transpose(0, 1)
    else:
        shades = read_video(mask, indices, grid.size).frames
    return Source(frames, shades[:1].add(1).div_(2).clamp_(0, 1))
