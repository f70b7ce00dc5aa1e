"""Video files written and read back, and files that are no video."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wanrt.errors import FormatError, NumericsError, UsageError
from wanrt.media import video
from wanrt.media.image import to_uint8
from wanrt.media.video import VideoWriter, check_codec, probe_video, read_video, write_video
from wanrt.tasks import vace

COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (255, 128, 0),
    (30, 200, 170),
]


def flat(colours: list[tuple[int, int, int]], height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 `[n, H, W, 3]`, one colour per frame."""
    frames = np.array(colours, dtype=np.uint8)[:, None, None]
    return np.broadcast_to(frames, (len(colours), height, width, 3)).copy()


def grays(count: int) -> np.ndarray:
    """Frames that tell their number: gray 10 * i."""
    return flat([(10 * i,) * 3 for i in range(count)])


def noisy(count: int, size: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("codec", list(video.CODECS))
def test_colours_read_back_right(codec: str, tmp_path: Path) -> None:
    """Default CRF. Wrong matrix or range costs 20 levels and more (27 dB); rounding costs 2."""
    path = write_video(tmp_path / "flat.mp4", [flat(COLOURS)], fps=16, codec=codec)
    frames, fps = read_video(path)
    assert fps == 16 and frames.shape == (3, 8, 64, 96)
    error = (frames.permute(1, 2, 3, 0) + 1) * 127.5 - torch.tensor(flat(COLOURS))
    psnr = 20 * torch.log10(255 / error.square().mean().sqrt())
    assert psnr > 48 and error.abs().max() <= 3
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert stream.frames == 8 and context.pix_fmt == "yuv420p"
        tags = [context.color_primaries, context.color_trc, context.colorspace]
        assert tags == [1, 1, 1] and context.color_range == 1  # BT.709, limited range
        assert context.name == {"h264": "h264", "hevc": "hevc", "av1": "libdav1d"}[codec]


def test_frames_may_come_in_any_chunks_and_forms(tmp_path: Path) -> None:
    """uint8 or float, `[3, n, H, W]` or `[1, 3, n, H, W]`: the same file, byte for byte."""
    frames = noisy(9, 64)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float().add(0.5) / 127.5 - 1
    chunks: list[list] = [
        [frames],
        [torch.from_numpy(frames)],
        [frames[:1], frames[1:5], frames[5:]],
        list(pixels.split(4, dim=1)),
        [chunk[None] for chunk in pixels.split(1, dim=1)],
    ]
    files = [write_video(tmp_path / f"{i}.mp4", c, 24) for i, c in enumerate(chunks)]
    assert len({file.read_bytes() for file in files}) == 1
    assert probe_video(files[0]).num_frames == 9


def test_pixels_are_converted_as_the_reference_does() -> None:
    """clamp, (x + 1) / 2 * 255, truncated; a PNG is rounded. In float32, checked in numpy."""
    values = np.concatenate([np.linspace(-1.2, 1.2, 9997), [-1, 1, 0]]).astype(np.float32)
    pixels = torch.from_numpy(values).expand(3, 1, 1, -1)
    unit = (np.clip(values, -1, 1) + np.float32(1)) / np.float32(2) * np.float32(255)
    assert np.array_equal(to_uint8(pixels)[0, 0, :, 1], unit.astype(np.uint8))
    rounded = np.clip(unit + np.float32(0.5), 0, 255).astype(np.uint8)
    assert np.array_equal(to_uint8(pixels, nearest=True)[0, 0, :, 2], rounded)
    half = to_uint8(pixels.to(torch.bfloat16))
    assert torch.equal(half, to_uint8(pixels.to(torch.bfloat16).float()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_written(value: float, tmp_path: Path) -> None:
    pixels = torch.zeros(3, 2, 16, 16)
    pixels[1, 1, 3, 3] = value
    with pytest.raises(NumericsError) as caught:
        write_video(tmp_path / "nan.mp4", [pixels], 16)
    assert caught.value.exit_code == 7 and not list(tmp_path.iterdir())


def test_crf_reaches_the_encoder(tmp_path: Path) -> None:
    sizes = [
        write_video(tmp_path / f"{crf}.mp4", [noisy(5)], 16, crf=crf).stat().st_size
        for crf in (10, 30)
    ]
    assert sizes[0] > 2 * sizes[1]


def test_hevc_carries_the_tag_that_apple_reads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [grays(2)], 16, codec="hevc")
    assert b"hvc1" in path.read_bytes() and b"hev1" not in path.read_bytes()


@pytest.mark.parametrize("fps", [16, 24, 23.976, 7.5])
def test_frame_rates(fps: float, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [grays(9)], fps)
    info = probe_video(path)
    assert info.fps == pytest.approx(fps, rel=1e-5)
    spacing = np.diff(info.times)
    assert spacing.min() >= spacing.max() - 1 and info.times[0] == 0


def test_a_single_frame_is_a_video_or_a_png(tmp_path: Path) -> None:
    frame = flat([(30, 200, 170)])
    assert read_video(write_video(tmp_path / "a.mp4", [frame], 16)).frames.shape[1] == 1
    pixels = torch.from_numpy(frame).permute(3, 0, 1, 2).float() / 127.5 - 1
    for name, chunk in (("a.png", frame), ("b.PNG", pixels), ("c.png", pixels[None])):
        written = write_video(tmp_path / name, [chunk], 16)
        assert np.array_equal(np.asarray(Image.open(written)), frame[0])
    with pytest.raises(UsageError, match="holds one image, but 2 frames"):
        write_video(tmp_path / "d.png", [grays(2)], 16)


def test_only_the_frames_asked_for_in_their_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [grays(25)], 16)  # has B-frames: stored out of order
    frames = read_video(path, [0, 3, 3, 8, 24], (64, 96)).frames
    shades = (frames.mean((0, 2, 3)) + 1) * 127.5
    assert torch.allclose(shades, torch.tensor([0.0, 30, 30, 80, 240]), atol=2)
    assert torch.allclose(read_video(path).frames[:, [0, 3, 3, 8, 24]], frames)


@pytest.mark.parametrize(
    ("name", "codec", "times"),
    [
        ("a.avi", "libx264", [0, 1, 2, 3, 4, 5]),  # frames
        ("a.mkv", "libx264", [0, 67, 133, 200, 267, 333]),  # milliseconds
        ("a.ts", "libx264", [0, 6000, 12000, 18000, 24000, 30000]),  # starts late
        ("a.gif", "gif", [0, 7, 13, 20, 27, 33]),
    ],
)
def test_other_containers(name: str, codec: str, times: list[int], tmp_path: Path) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=15)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "gray" if codec == "gif" else "yuv420p"
        for frame in grays(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    info = probe_video(tmp_path / name)
    assert info.num_frames == 5 and info.fps == pytest.approx(15, rel=0.15)
    assert np.abs(np.subtract(info.times[:5], times[:5])).max() <= 1
    shades = (read_video(tmp_path / name).frames.mean((0, 2, 3)) + 1) * 127.5
    assert torch.allclose(shades, torch.arange(5) * 10.0, atol=2)


def test_frames_without_times_or_rate() -> None:
    """No muxer here writes such a file: what PyAV reports of one."""
    stream = SimpleNamespace(average_rate=None, guessed_rate=None, time_base=Fraction(1, 25))
    frame = SimpleNamespace(width=4, height=2, rotation=90)
    assert video._info(stream, frame, [None] * 3, 0) == video.VideoInfo(2, 4, 25.0, (0, 1, 2, 3))
    assert video._info(stream, frame, [9, 3, 5], 4).times == (0, 2, 6, 10)


def test_frames_are_scaled_and_cropped_as_they_are_read(tmp_path: Path) -> None:
    """Against PIL, whose bicubic filter is the same (8-bit, antialiased)."""
    path = write_video(tmp_path / "a.mp4", [noisy(2, 96)], 16)
    full = ((read_video(path).frames + 1) * 127.5).round().byte()
    small = ((read_video(path, size=(32, 48)).frames + 1) * 127.5).round()
    for i in range(2):
        picture = Image.fromarray(full[:, i].permute(1, 2, 0).numpy())
        resized = picture.resize((48, 48), Image.Resampling.BICUBIC).crop((0, 8, 48, 40))
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        assert (small[:, i] - expected).abs().max() <= 1


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation_is_applied(degrees: int, tmp_path: Path) -> None:
    stored = flat([(0, 0, 0)], height=32, width=64)[0]
    stored[:16, :16] = 255  # top left
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees)  # counter-clockwise
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    info, shown = probe_video(tmp_path / "a.mp4"), np.rot90(stored, degrees // 90)
    assert (info.height, info.width) == shown.shape[:2]
    frames = read_video(tmp_path / "a.mp4").frames
    assert frames.shape[2:] == shown.shape[:2]
    error = (frames[:, 1] + 1) * 127.5 - torch.from_numpy(shown.copy()).permute(2, 0, 1)
    assert error.abs().mean() < 4  # a wrong turn: 64


def test_vace_source_files(tmp_path: Path) -> None:
    """A video and a shorter mask, then an image as the mask of all frames."""
    size = (64, 128)
    clip = write_video(tmp_path / "v.mp4", [flat([(9 * i,) * 3 for i in range(24)], *size)], 30)
    masks = flat([(255,) * 3, *[(51,) * 3] * 10, *[(0,) * 3] * 10], *size)
    mask = write_video(tmp_path / "m.mp4", [masks], 16)
    source = vace.read_source(clip, mask, max_area=64 * 128)
    assert source.video.shape == (3, 21, *size) and source.mask.shape == (1, 21, *size)
    shown = (source.video.mean((0, 2, 3)) + 1) * 127.5
    assert torch.allclose(shown, 9 * torch.arange(21.0), atol=2)
    expected = torch.tensor([1.0] + [0.2] * 10 + [0.0] * 10)
    assert torch.allclose(source.mask.mean((0, 2, 3)), expected, atol=0.01)

    still = np.zeros((32, 64), dtype=np.uint8)
    still[:, 32:] = 255
    Image.fromarray(still).save(tmp_path / "m.png")
    source = vace.read_source(clip, tmp_path / "m.png", max_area=64 * 128)
    assert source.mask.shape == (1, 1, *size)
    assert source.mask[0, 0, :, :60].max() < 0.1 and source.mask[0, 0, :, 68:].min() > 0.9
    assert vace.read_source(clip, None, max_area=64 * 128).mask is None


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = np.zeros((1, 1024), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut_off(path: Path) -> None:
    data = write_video(path, [noisy(20)], 16).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def unknown_codec(path: Path) -> None:
    path.write_bytes(write_video(path, [noisy(3)], 16).read_bytes().replace(b"avc1", b"zzzz"))


BAD_VIDEOS = {
    "missing": (lambda path: None, "no such file"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (Path.touch, "cannot be read as a video"),
    "garbage": (lambda path: path.write_bytes(os.urandom(5000)), "cannot be read as a video"),
    "cut off": (cut_off, "is cut off: [0-9]+ of 20 frames"),
    "header only": (
        lambda path: path.write_bytes(write_video(path, [noisy(9)], 16).read_bytes()[:600]),
        "cannot be read as a video",
    ),
    "unknown codec": (unknown_codec, "holds no video of a known codec"),
    "sound only": (audio_only, "holds no video"),
}


@pytest.mark.parametrize("name", list(BAD_VIDEOS))
@pytest.mark.parametrize("read", [probe_video, read_video])
def test_bad_videos(name: str, read, tmp_path: Path) -> None:
    make, reason = BAD_VIDEOS[name]
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(FormatError, match=reason) as caught:
        read(path)
    assert caught.value.exit_code == 3 and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n"),
        ("a.ffconcat", "ffconcat version 1.0\nfile real.mp4\n"),
    ],
)
def test_playlists_are_not_followed(name: str, text: str, tmp_path: Path) -> None:
    """FFmpeg would: to a file of their choice, or to the network."""
    write_video(tmp_path / "real.mp4", [grays(3)], 16)
    (tmp_path / name).write_text(text)
    with av.open(str(tmp_path / name)) as container:
        assert container.streams.video
    with pytest.raises(FormatError, match="cannot be read as a video"):
        read_video(tmp_path / name)


def test_limits_on_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", [grays(9)], 16)
    for name, value, reason in (
        ("MAX_SOURCE_FRAMES", 8, "more than 8 frames"),
        ("MAX_FRAME_PIXELS", 6143, "96x64 is more than 6143 pixels"),
        ("MAX_CLIP_BYTES", 9 * 96 * 64 * 12 - 1, "9 frames of 96x64"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video, name, value)
            with pytest.raises(FormatError, match=reason):
                read_video(path)
    with pytest.raises(FormatError, match="frame 9 cannot be decoded"):
        read_video(path, [0, 9])


@pytest.mark.parametrize(
    ("codec", "crf", "named"),
    [
        ("vp9", None, "'vp9' is unknown .*h264, hevc, av1"),
        ("h264", 52, "crf is 52; for h264 it is a whole number 0 to 51"),
        ("h264", -1, "crf is -1"),
        ("av1", 64, "0 to 63"),
        ("h264", 18.5, "crf is 18.5"),
        ("h264", True, "crf is True"),
    ],
)
def test_codec_settings(codec: str, crf: object, named: str, tmp_path: Path) -> None:
    for call in (check_codec, lambda *args: VideoWriter(tmp_path / "a.mp4", 16, *args)):
        with pytest.raises(UsageError, match=named) as caught:
            call(codec, crf)
        assert caught.value.exit_code == 2
    assert check_codec("av1", 63) == ("libsvtav1", 63) or check_codec("av1", 63)[0] == "libaom-av1"


def test_a_build_without_the_encoder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"libx264"})
    with pytest.raises(UsageError, match="cannot encode hevc: it lacks libx265"):
        check_codec("hevc")


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 95)])
def test_odd_sizes(height: int, width: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{width}x{height} cannot be encoded"):
        write_video(tmp_path / "a.mp4", [flat(COLOURS, height, width)], 16)
    assert not list(tmp_path.iterdir())


def test_the_encoders_keep_quiet(tmp_path: Path) -> None:
    """stderr belongs to the progress bars; SVT-AV1 and x265 print banners by default."""
    script = (
        "import sys, numpy as np\n"
        "from wanrt.media.video import write_video\n"
        "for codec in ('h264', 'hevc', 'av1'):\n"
        "    frames = np.zeros((3, 64, 64, 3), np.uint8)\n"
        "    write_video(f'{sys.argv[1]}/{codec}.mp4', [frames], 16, codec=codec)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux has schedulers")
def test_writing_av1_leaves_the_priority_alone(tmp_path: Path) -> None:
    """SVT-AV1 makes its caller a real-time thread where it may."""
    before = os.sched_getscheduler(0)
    write_video(tmp_path / "a.mp4", [np.zeros((3, 64, 64, 3), np.uint8)], 16, "av1")
    assert os.sched_getscheduler(0) == before
