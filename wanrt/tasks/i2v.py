"""Conditioning on known first and last frames: I2V, FLF2V and TI2V-5B."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.errors import UsageError
from wanrt.media.image import lanczos_cover
from wanrt.tasks.sizes import Size

VaeEncode = Callable[[Tensor], Tensor]  # pixels [1, 3, F, H, W] -> latents [1, C, T, h, w]


def i2v_condition(image: Tensor, num_frames: int, size: Size, vae_encode: VaeEncode) -> Tensor:
    """`y` `[1, 20, T, h, w]`: 4 mask channels (1 = known), then latents of the gray-filled clip.

    `image` is `[3, H0, W0]` in [-1, 1], resized bicubic without antialias or crop. The whole clip
    goes through the VAE, mid-gray (0) after the first frame, as the weights were trained for.
    Peak: one clip beside what the VAE needs. Source: Wan2.1 @9737cba `wan/image2video.py`.
    """
    video = image.new_zeros(1, 3, num_frames, *size)
    video[0, :, 0] = _resize(image, size)
    return _masked(video, [0], vae_encode)


def flf2v_condition(
    first: Tensor, last: Tensor, num_frames: int, size: Size, vae_encode: VaeEncode
) -> Tensor:
    """`y` `[1, 20, T, h, w]` with the first and the last frame known.

    Source: Wan2.1 @9737cba `wan/first_last_frame2video.py`, whose mask is built for 81 frames
    only; here for any count. See `match_last` for images of different shapes.
    """
    if num_frames < 5:
        raise UsageError(f"frames is {num_frames}; between two images it must be 5 or more")
    video = first.new_zeros(1, 3, num_frames, *size)
    video[0, :, 0] = _resize(first, size)
    video[0, :, -1] = _resize(match_last(first, last), size)
    return _masked(video, [0, num_frames - 1], vae_encode)


def match_last(first: Tensor, last: Tensor) -> Tensor:
    """The last frame cropped centrally to the aspect ratio of the first, ready for CLIP as well.

    NOTE: the reference means to do this but swaps width and height and crops before scaling, so
    for images of different sizes its pixels differ.
    """
    height, width = last.shape[1:]
    scale = max(first.shape[1] / height, first.shape[2] / width)
    rows = min(height, max(1, round(first.shape[1] / scale)))
    columns = min(width, max(1, round(first.shape[2] / scale)))
    top, left = (height - rows) // 2, (width - columns) // 2
    return last[:, top : top + rows, left : left + columns]


def _resize(image: Tensor, size: Size) -> Tensor:
    return F.interpolate(image[None], size=tuple(size), mode="bicubic")[0]  # [3, H, W]


def _masked(video: Tensor, known: Sequence[int], vae_encode: VaeEncode) -> Tensor:
    num_frames = video.shape[2]
    latents = vae_encode(video)  # [1, 16, T, h, w]
    mask = known_mask(num_frames, known).to(latents)  # [4, T]
    mask = mask[None, :, :, None, None].expand(1, *mask.shape, *latents.shape[3:])
    return torch.cat([mask, latents], dim=1)


def known_mask(num_frames: int, known: Sequence[int]) -> Tensor:
    """`[4, T]`, 1 where a frame is known: column t holds the four frames behind latent frame t.

    The first frame stands alone behind latent frame 0 and fills all four of its rows.
    """
    flags = torch.zeros(num_frames)
    flags[list(known)] = 1
    return torch.cat([flags[:1].repeat(3), flags]).view(-1, 4).T


def ti2v_condition(image: Tensor, size: Size, vae_encode: VaeEncode) -> Tensor:
    """Latents `[1, 48, 1, h, w]` of the first frame, Lanczos-scaled to cover the size and cropped.

    Source: Wan2.2 @42bf4cf `wan/textimage2video.py`.
    """
    frame = lanczos_cover(image, *size).to(image.device)
    return vae_encode(frame[None, :, None])


def hold_first_frame(latents: Tensor, first: Tensor) -> Tensor:
    """Overwrite latent frame 0 in place: before sampling and after every step of TI2V."""
    latents[:, :, :1] = first
    return latents


def token_times(t: float | Tensor, grid: tuple[int, int, int], known_frames: int = 1) -> Tensor:
    """`t` per token `[1, L]`, float32: 0 for the tokens of the known latent frames, else `t`."""
    frames, rows, columns = grid
    times = torch.as_tensor(t, dtype=torch.float32).repeat(1, frames * rows * columns)
    times[:, : known_frames * rows * columns] = 0
    return times
