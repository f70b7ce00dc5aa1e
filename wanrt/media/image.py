"""Still images: files, PIL images and arrays to pixels in [-1, 1] and back, and PNG files."""

import logging
import struct
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from wanrt.errors import FormatError, NumericsError, UsageError
from wanrt.media.output import PendingFile, Seal, check_output, write_error

log = logging.getLogger(__name__)

ImageSource = str | PathLike[str] | Image.Image | np.ndarray | Tensor

# Decoders that may see a file from outside. PIL knows more: its EPS reader runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
STILL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 89_478_485  # PIL's own limit; 1 GiB as float32 RGB

# What PIL's decoders raise on broken bytes (found by fuzzing the formats above).
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)


def is_image(path: str | PathLike[str]) -> bool:
    """Whether a file is named as a still image (a GIF is not: it may be a clip)."""
    return Path(path).suffix.lower() in STILL_SUFFIXES


def load_image(source: ImageSource) -> Tensor:
    """Pixels `[3, H, W]`, float32 in [-1, 1], upright, at the source's own size.

    EXIF orientation is applied; alpha is composited on white (the reference's image tasks drop
    it, its VACE loader composites on white); 16-bit gray keeps its precision; gray, palette and
    CMYK become RGB; of an animation the first frame is used, which is logged. Arrays are uint8 or
    uint16 `[H, W]` or `[H, W, 1|3|4]`; tensors are float `[3, H, W]` in [-1, 1] or uint8
    `[3, H, W]`. Normalised as (x / 255 - 0.5) / 0.5, like Wan2.1 @9737cba `wan/image2video.py`.
    Raises FormatError for a file, UsageError for an object that cannot be used.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_samples(source)
    if isinstance(source, Image.Image):
        return _from_samples(_decode("this PIL image", source))
    return _from_samples(_read(Path(source)))


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FormatError(path, "is a folder" if path.is_dir() else "no such file")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on odd metadata and on sizes refused below
        try:
            image = Image.open(path, formats=formats)
        except Image.UnidentifiedImageError as error:
            names = ", ".join(formats)
            raise FormatError(path, "is not an image that can be read", names) from error
        except _BROKEN as error:
            raise FormatError(path, f"cannot be read as an image: {error}") from error
        with image:
            return _decode(path, image)


def _decode(name: object, image: Image.Image) -> np.ndarray:
    """uint16 `[H, W]`, or uint8 `[H, W, 3]` or `[H, W, 4]` where there is transparency."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise FormatError(
            name, f"{width}x{height} is more than {MAX_PIXELS} pixels", "scale it down first"
        )
    if image.mode in ("I", "F"):
        raise FormatError(
            name,
            f"has 32-bit samples (PIL mode {image.mode}), whose range is unknown",
            "save it with 8 or 16 bits per channel",
        )
    try:
        frames = getattr(image, "n_frames", 1)
        image.load()
        upright = ImageOps.exif_transpose(image)
        if not upright.mode.startswith("I;16"):
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except _BROKEN as error:
        raise FormatError(name, f"the image is broken: {error}") from error
    if frames > 1 and image.format != "MPO":  # phones store previews as further MPO frames
        log.warning("%s has %d frames; the first one is used", name, frames)
    return np.array(upright, dtype=np.uint16 if upright.mode.startswith("I;16") else np.uint8)


def _from_samples(samples: np.ndarray) -> Tensor:
    if samples.ndim == 2:
        samples = samples[:, :, None]
    limits = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
    if samples.dtype not in limits or samples.ndim != 3 or samples.shape[2] not in (1, 3, 4):
        raise UsageError(
            f"an image array is uint8 or uint16 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
            f"not {samples.dtype} {list(samples.shape)}"
        )
    unit = torch.from_numpy(samples.astype(np.float32)).permute(2, 0, 1)  # [C, H, W]
    unit = unit.contiguous().div_(limits[samples.dtype])
    if unit.shape[0] == 4:
        rgb, alpha = unit[:3], unit[3:]
        unit = rgb * alpha + (1 - alpha)
    return unit.expand(3, -1, -1).sub(0.5).div_(0.5)


def _from_tensor(pixels: Tensor) -> Tensor:
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.numel() == 0:
        raise UsageError(f"an image tensor is [3, H, W], not {list(pixels.shape)}")
    if pixels.dtype == torch.uint8:
        return _from_samples(pixels.permute(1, 2, 0).cpu().numpy())
    pixels = pixels.float()
    low, high = pixels.aminmax()
    if not (low >= -1.001 and high <= 1.001):  # NaN fails too
        raise UsageError(
            f"an image tensor holds pixels in [-1, 1], this one {low:.4g} to {high:.4g}"
        )
    return pixels


def to_uint8(pixels: Tensor, *, nearest: bool = False) -> Tensor:
    """Float `[..., 3, n, H, W]` (leading axes of size 1) in [-1, 1] -> uint8 `[n, H, W, 3]`.

    Truncates as the reference does for videos; `nearest` rounds as it does for a PNG
    (Wan2.1 @9737cba `wan/utils/utils.py`). Raises NumericsError for NaN and infinity.
    """
    assert pixels.shape[-4] == 3 and pixels.shape[:-4].numel() == 1, f"{pixels.shape=}"
    pixels = pixels.detach().float().reshape(pixels.shape[-4:])
    if not bool(torch.isfinite(pixels).all()):
        raise NumericsError("the decoded frames contain NaN or infinity")
    scaled = pixels.clamp(-1, 1).add_(1).div_(2).mul_(255)
    if nearest:
        scaled.add_(0.5).clamp_(0, 255)
    return scaled.permute(1, 2, 3, 0).to(torch.uint8).contiguous()


def to_pil(frame: np.ndarray) -> Image.Image:
    """uint8 `[H, W, 3]` as a PIL image."""
    return Image.fromarray(frame)


def save_png(
    image: Tensor | np.ndarray,
    path: str | PathLike[str],
    overwrite: bool = False,
    seal: Seal | None = None,
) -> Path:
    """Write one image, float `[3, H, W]` in [-1, 1] (rounded) or uint8 `[H, W, 3]`.

    Marks nothing by itself: see `wanrt.media.saving`.
    """
    target = check_output(path, overwrite, num_frames=1)
    if isinstance(image, Tensor) and image.is_floating_point():
        image = to_uint8(image[:, None], nearest=True)[0]
    picture = to_pil(np.asarray(image.cpu() if isinstance(image, Tensor) else image))
    with PendingFile(target) as pending:
        try:
            picture.save(pending.part, format="PNG")
        except OSError as error:
            raise write_error(target, error) from error
        if seal is not None:
            seal(pending.part)
    return target


def cover_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale `[n, C, H0, W0]` to cover the size, antialiased bicubic, and crop centrally.

    uint8 stays uint8, rounded between the two passes of the filter as the reference's frames are
    (Wan2.1 @9737cba `wan/utils/vace_processor.py`). Float may overshoot its range a little.
    """
    rows, columns = frames.shape[-2:]
    if (rows, columns) == (height, width):
        return frames
    scale = max(width / columns, height / rows)
    size = (round(scale * rows), round(scale * columns))
    frames = F.interpolate(frames, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width]


def lanczos_cover(image: Tensor, height: int, width: int) -> Tensor:
    """Scale `[3, H0, W0]` in [-1, 1] to cover the size with PIL's Lanczos filter, crop centrally.

    Works on 8-bit samples, as Wan2.2 @42bf4cf `wan/textimage2video.py` does.
    """
    picture = to_pil(to_uint8(image[:, None], nearest=True)[0].cpu().numpy())
    scale = max(width / picture.width, height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return _from_samples(np.array(picture.crop((left, top, left + width, top + height))))
