"""Images of every kind read right, and broken ones refused in one line."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wanrt.errors import FormatError, OutputError, UsageError
from wanrt.media.image import lanczos_cover, load_image, save_png

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def normalised(samples: np.ndarray, limit: int = 255) -> Tensor:
    """(x / limit - 0.5) / 0.5 in float32, as `[3, H, W]`."""
    unit = samples.astype(np.float32) / np.float32(limit)
    unit = np.broadcast_to(unit[..., None], (*unit.shape, 3)) if unit.ndim == 2 else unit
    return torch.from_numpy(np.moveaxis((unit - 0.5) / 0.5, -1, 0).astype(np.float32))


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def png(folder: Path, width: int, height: int, depth: int, colour: int, rows: bytes) -> Path:
    """A PNG made by hand, for what PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = folder / "made.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.webp"])
def test_lossless_formats(name: str, tmp_path: Path) -> None:
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, Image.fromarray(PIXELS), name, **options)
    assert torch.equal(load_image(path), normalised(PIXELS))
    assert torch.equal(load_image(str(path)), load_image(path))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, np.rot90(PIXELS, 2)),
        (6, np.rot90(PIXELS, -1)),
        (8, np.rot90(PIXELS, 1)),
    ],
)
def test_exif_rotation(orientation: int, upright: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(PIXELS), "a.png", exif=exif)
    assert torch.equal(load_image(path), normalised(upright))
    with Image.open(path) as image:
        assert torch.equal(load_image(image), normalised(upright))


@pytest.mark.parametrize("alpha", [0, 1, 128, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(alpha: int, mode: str, tmp_path: Path) -> None:
    colour = (51, 51, 51, alpha) if mode == "RGBA" else (51, alpha)
    pixels = load_image(saved(tmp_path, Image.new(mode, (4, 3), colour), "a.png"))
    opacity = alpha / 255
    expected = 2 * (51 / 255 * opacity + 1 - opacity) - 1
    assert pixels.shape == (3, 3, 4) and torch.allclose(pixels, torch.tensor(expected), atol=1e-6)


def test_transparent_palette_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    opaque = load_image(saved(tmp_path, image, "a.gif"))
    assert opaque[:, 0].T.tolist() == [[1, -1, -1], [-1, -1, 1]]
    seen = load_image(saved(tmp_path, image, "b.png", transparency=1))
    assert seen[:, 0].T.tolist() == [[1, -1, -1], [1, 1, 1]]


DEEP = np.array([[0, 1, 255, 256], [32767, 32768, 65534, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_gray_is_scaled_and_keeps_its_precision(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(DEEP), name)
    assert torch.equal(load_image(path), normalised(DEEP, 65535))


def test_16_bit_big_endian(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (4, 2), DEEP.astype(">u2").tobytes())
    assert torch.equal(load_image(image), normalised(DEEP, 65535))


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    """PIL keeps 8 of the 16 bits: within one level, not clipped at 255."""
    samples = np.random.default_rng(1).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    pixels = load_image(png(tmp_path, 7, 5, 16, 2, rows))
    assert (pixels - normalised(samples, 65535)).abs().max() <= 2 / 255


def test_cmyk_gray_and_bilevel(tmp_path: Path) -> None:
    red = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=100)
    assert (load_image(red)[:, 4, 4] - torch.tensor([1.0, -1, -1])).abs().max() < 0.05
    gray = saved(tmp_path, Image.fromarray(PIXELS[..., 0]), "a.png")
    assert torch.equal(load_image(gray), normalised(PIXELS[..., 0]))
    bits = saved(tmp_path, Image.new("1", (3, 2), 1), "b.png")
    assert load_image(bits).tolist() == torch.ones(3, 2, 3).tolist()


def test_of_an_animation_the_first_frame(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(path)[:, 0, 0].tolist() == [1, -1, -1]
    assert "has 3 frames; the first one is used" in caplog.text
    caplog.clear()
    load_image(saved(tmp_path, frames[0], "b.gif"))
    assert not caplog.text


def test_arrays_and_tensors() -> None:
    expected = normalised(PIXELS)
    assert torch.equal(load_image(PIXELS), expected)
    assert torch.equal(load_image(torch.from_numpy(PIXELS).permute(2, 0, 1)), expected)
    assert torch.equal(load_image(expected), expected)
    assert torch.equal(load_image(PIXELS[..., :1]), normalised(PIXELS[..., 0]))
    assert torch.equal(load_image(DEEP), normalised(DEEP, 65535))
    assert torch.equal(load_image(PIXELS[:, ::-2]), normalised(PIXELS[:, ::-2]))


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(4, 4, 3),
        torch.full((3, 4, 4), 255.0),
        torch.full((3, 4, 4), float("nan")),
        torch.zeros(3, 0, 4),
    ],
)
def test_arrays_that_are_no_image(source: np.ndarray | Tensor) -> None:
    with pytest.raises(UsageError, match="an image (array|tensor)") as caught:
        load_image(source)
    assert caught.value.exit_code == 2


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture = np.random.default_rng(2).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


BAD_IMAGES = {
    "empty": (lambda: b"", "is not an image that can be read"),
    "garbage": (lambda: random.Random(0).randbytes(4000), "is not an image that can be read"),
    "text": (lambda: b"hello", "PNG, JPEG, WEBP"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "cut-off PNG": (lambda: encoded("PNG")[:3000], "the image is broken"),
    "cut-off JPEG": (lambda: encoded("JPEG")[:1500], "the image is broken"),
    "cut-off WEBP": (lambda: encoded("WEBP")[:1500], "image"),
    "PNG header alone": (lambda: encoded("PNG")[:33], "image"),
}


@pytest.mark.parametrize("name", list(BAD_IMAGES))
def test_bad_images(name: str, tmp_path: Path) -> None:
    make, reason = BAD_IMAGES[name]
    path = tmp_path / "bad.png"
    path.write_bytes(make())
    with pytest.raises(FormatError, match=reason) as caught:
        load_image(path)
    assert caught.value.exit_code == 3 and str(path) in str(caught.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.png", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(FormatError, match=reason):
            load_image(path)


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (10000, 9000)])
def test_a_decompression_bomb_is_refused_by_its_header(
    width: int, height: int, tmp_path: Path
) -> None:
    """The first is beyond PIL's own error, the second only beyond its warning."""
    with pytest.raises(FormatError, match="pixels") as caught:
        load_image(png(tmp_path, width, height, 8, 2, bytes(1000)))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bit_samples_have_no_known_range(mode: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new(mode, (4, 4), 1), "a.tiff")
    with pytest.raises(FormatError, match="32-bit samples"):
        load_image(path)


def test_damaged_bytes_raise_nothing_else(tmp_path: Path) -> None:
    """900 files with random damage: read, or refused with FormatError."""
    rng, refused = random.Random(7), 0
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "MPO"):
        whole = encoded(kind)
        for _ in range(100):
            data = bytearray(whole[: rng.randrange(1, len(whole)) if rng.random() < 0.3 else None])
            for _ in range(rng.choice([1, 2, 20])):
                data[rng.randrange(min(len(data), rng.choice([60, 300, 9000])))] = rng.randrange(
                    256
                )
            (tmp_path / "a").write_bytes(data)
            try:
                assert load_image(tmp_path / "a").isfinite().all()
            except FormatError:
                refused += 1
    assert 200 < refused < 900


def test_save_png(tmp_path: Path) -> None:
    path = save_png(PIXELS, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(path)), PIXELS)
    save_png(load_image(path), tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), PIXELS)
    with pytest.raises(OutputError, match="exists already"):
        save_png(PIXELS, path)
    save_png(PIXELS[::-1].copy(), path, overwrite=True)
    assert np.array_equal(np.asarray(Image.open(path)), PIXELS[::-1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_lanczos_cover() -> None:
    """An 80x60 picture to 64x32: scaled to 64x48 by PIL, then 8 rows off at both ends."""
    picture = Image.open(io.BytesIO(encoded("PNG")))
    resized = picture.resize((64, 48), Image.Resampling.LANCZOS)
    expected = normalised(np.asarray(resized)[8:40])
    assert torch.equal(lanczos_cover(load_image(picture), 32, 64), expected)
