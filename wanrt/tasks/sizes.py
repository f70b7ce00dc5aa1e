"""Size arithmetic of the reference: output sizes, latent shapes, tokens, and the VACE grid."""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from wanrt.config import VAE_2_1, VaeSpec
from wanrt.errors import UsageError

REFERENCE_LATENT_FRAMES = 21  # 81 frames; the reference's VACE token budgets are 21 x area / 256


class Size(NamedTuple):
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class LatentShape(NamedTuple):
    channels: int
    frames: int
    height: int
    width: int


class VaceGrid(NamedTuple):
    """Output of a VACE request that has a source video."""

    num_frames: int
    size: Size


def i2v_size(width: int, height: int, max_area: int) -> Size:
    """Output size for an input image, of its aspect ratio and at most `max_area` pixels.

    Evaluated in float64 exactly as the reference does, rounding losses included: an image of
    832x480 at an area of 832 * 480 becomes 832x464. Source: Wan2.1 @9737cba
    `wan/image2video.py`.
    """
    aspect = height / width
    rows = round(math.sqrt(max_area * aspect) // 8 // 2 * 2)
    columns = round(math.sqrt(max_area / aspect) // 8 // 2 * 2)
    _require_area(width, height, min(rows, columns))
    return Size(8 * rows, 8 * columns)


def ti2v_size(width: int, height: int, max_area: int = 1280 * 704, multiple: int = 32) -> Size:
    """Output size of TI2V-5B for an input image: of two candidates the one nearer its aspect.

    Source: Wan2.2 @42bf4cf `wan/utils/utils.py` (`best_output_size`).
    """
    aspect = width / height
    ideal_width = (max_area * aspect) ** 0.5
    ideal_height = max_area / ideal_width

    def steps(length: float) -> int:
        cells = int(length // multiple)
        _require_area(width, height, cells)
        return cells * multiple

    wide = steps(ideal_width)
    by_width = Size(steps(max_area / wide), wide)
    high = steps(ideal_height)
    by_height = Size(high, steps(max_area / high))

    def distortion(size: Size) -> float:
        ratio = size.width / size.height
        return max(aspect / ratio, ratio / aspect)

    return by_width if distortion(by_width) < distortion(by_height) else by_height


def vace_grid(
    source_frames: int, width: int, height: int, max_area: int, max_tokens: int | None = None
) -> VaceGrid:
    """Frames and size of the output for a source video: its aspect, its length, within a budget.

    Cells are 4 frames of 16x16 pixels. `max_tokens` defaults to 81 frames of `max_area`, which is
    the reference's 32,760 at 480p and 75,600 at 720p; a source smaller than `max_area` keeps its
    area and may be longer. Source: Wan2.1 @9737cba `wan/utils/vace_processor.py`.
    """
    if max_tokens is None:
        max_tokens = REFERENCE_LATENT_FRAMES * max_area // 256
    area = min(max_tokens, max_area / 256, (height // 16) * (width // 16))
    _require_area(width, height, int(area))
    latent_frames = min((source_frames - 1) // 4 + 1, int(max_tokens / area))
    area = min(area, int(max_tokens / latent_frames))
    rows = round(math.sqrt(area * (height / width)))
    _require_area(width, height, rows)
    columns = int(area / rows)
    _require_area(width, height, columns)
    return VaceGrid(4 * (latent_frames - 1) + 1, Size(16 * rows, 16 * columns))


def vace_frame_indices(times: Sequence[int], num_frames: int) -> list[int]:
    """Source frames at `num_frames` equally spaced times over the whole source.

    `times` are the starts of the frames and the end of the last one, in any whole unit. The last
    time is the middle of the last frame; a time on a boundary takes the earlier frame. Integer
    arithmetic, so no rounding decides. Source: Wan2.1 @9737cba `wan/utils/vace_processor.py`.
    """
    steps = max(num_frames - 1, 1)
    twice_duration = times[-2] + times[-1] - 2 * times[0]
    starts = [(time - times[0]) * 2 * steps for time in times[:-1]]
    asked = (i * twice_duration for i in range(num_frames))
    return [max(0, bisect_left(starts, time) - 1) for time in asked]


def _require_area(width: int, height: int, cells: int) -> None:
    if cells < 1:
        raise UsageError(
            f"an input of {width}x{height} is too small or too narrow for the output size "
            "(crop it, or raise --size)"
        )


def latent_shape(
    num_frames: int, size: Size, vae: VaeSpec = VAE_2_1, num_refs: int = 0
) -> LatentShape:
    """Shape of the latents; each VACE reference image adds one frame in front."""
    frames = (num_frames - 1) // vae.temporal_stride + 1 + num_refs
    stride = vae.spatial_stride
    return LatentShape(vae.z_dim, frames, size.height // stride, size.width // stride)


def token_count(latents: LatentShape) -> int:
    """Tokens in the DiT, whose patches are 1x2x2."""
    return latents.frames * (latents.height // 2) * (latents.width // 2)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`832x480` (or `832*480`, as the reference writes it) -> width, height."""
    if text is None:
        return None, None
    sides = re.fullmatch(r"([0-9]{1,9})[xX*]([0-9]{1,9})", text)
    if sides is None:
        raise UsageError(f"size {text[:80]!r}: write WIDTHxHEIGHT, as 832x480")
    return int(sides[1]), int(sides[2])
