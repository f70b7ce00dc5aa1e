"""Videos: frames appended to a file as they are made, and frames read back from one."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import av
import numpy as np
import torch
from av.container import InputContainer, OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from torch import Tensor

from wanrt.errors import FormatError, OutputError, UsageError
from wanrt.media.image import cover_crop, save_png, to_uint8
from wanrt.media.output import IMAGE_SUFFIX, PendingFile, Seal, check_output, write_error

Frames = Tensor | np.ndarray

BT709 = 1  # the same number for primaries, transfer and matrix (ITU-T H.273)

# Demuxers that may see a file from outside: none that follows references to other files or URLs.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
MAX_SOURCE_FRAMES = 36_000  # 20 minutes at 30 fps
MAX_FRAME_PIXELS = 7680 * 4320
MAX_CLIP_BYTES = 4 << 30


# FFmpeg's muxer for each ending, its options, and what it holds of the codecs below.
MUXERS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    ".mp4": ("mp4", {"movflags": "+faststart"}, ("h264", "hevc", "av1")),
    ".webm": ("webm", {}, ("av1",)),
    ".mkv": ("matroska", {}, ("h264", "hevc", "av1")),
}


@dataclass(frozen=True)
class Codec:
    """An output format: FFmpeg's encoders for it, best first, and its quality scale (CRF)."""

    encoders: tuple[str, ...]
    crf: int  # default: visually lossless or nearly so
    max_crf: int
    options: tuple[tuple[str, str], ...] = ()
    tag: str | None = None


# The reference writes H.264 at CRF 10 (imageio's "quality 8"); `--crf 10` gives that.
CODECS = {
    "h264": Codec(("libx264",), crf=18, max_crf=51),
    "hevc": Codec(
        ("libx265",),
        crf=20,
        max_crf=51,
        options=(("x265-params", "log-level=none"),),
        tag="hvc1",  # the tag that Apple's players accept
    ),
    "av1": Codec(("libsvtav1", "libaom-av1"), crf=24, max_crf=63),
}


def check_codec(
    codec: str, crf: int | None = None, path: str | PathLike[str] | None = None
) -> tuple[str, int]:
    """FFmpeg's encoder and the CRF to use, for a file of this name where one is given.

    Raises UsageError; call it before any work.
    """
    if codec not in CODECS:
        raise UsageError(f"codec {codec!r} is unknown (there are {', '.join(CODECS)})")
    suffix = "" if path is None else Path(path).suffix.lower()
    if suffix in MUXERS and codec not in MUXERS[suffix][2]:
        held = ", ".join(MUXERS[suffix][2])
        raise UsageError(f"{path} cannot hold {codec}; a {suffix} holds {held} (--codec {held})")
    row = CODECS[codec]
    encoder = next((name for name in row.encoders if name in av.codecs_available), None)
    if encoder is None:
        raise UsageError(
            f"this build of PyAV cannot encode {codec}: it lacks {' and '.join(row.encoders)} "
            "(choose another --codec)"
        )
    crf = row.crf if crf is None else crf
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= row.max_crf:
        raise UsageError(f"crf is {crf!r}; for {codec} it is a whole number 0 to {row.max_crf}")
    return encoder, crf


class VideoWriter:
    """Encodes frames as they arrive; holds none, and the file appears only when it is complete.

    Use it as a context manager: on any exception, Ctrl-C included, the temporary file is removed.
    4:2:0, 8 bits, BT.709 in limited range and tagged as such. Raises OutputError when the disk
    does not take the data.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        fps: float,
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
        seal: Seal | None = None,
    ) -> None:
        self.encoder, self.crf = check_codec(codec, crf, path)
        self.target = check_output(path, overwrite)
        if self.target.suffix.lower() == IMAGE_SUFFIX:
            raise UsageError(f"{self.target} is the name of an image (name an .mp4 file)")
        self.codec, self.fps, self.num_frames = CODECS[codec], fps, 0
        self._pending, self._seal = PendingFile(self.target), seal
        self._container: OutputContainer | None = None  # opened by the first frame
        self._stream: VideoStream | None = None

    def __enter__(self) -> Self:
        return self

    def append(self, frames: Frames) -> None:
        """uint8 `[n, H, W, 3]`, or float `[3, n, H, W]` or `[1, 3, n, H, W]` in [-1, 1]."""
        if isinstance(frames, Tensor):
            frames = (to_uint8(frames) if frames.is_floating_point() else frames).cpu().numpy()
        assert frames.ndim == 4 and frames.shape[3] == 3, f"{frames.shape=}"
        assert frames.dtype == np.uint8, f"{frames.dtype=}"
        with self._disk_errors(), ordinary_priority():
            for frame in frames:  # [H, W, 3]
                self._encode(frame)

    def _encode(self, frame: np.ndarray) -> None:
        if self._stream is None:
            self._open(*frame.shape[:2])
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yuv = rgb.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        self._container.mux(self._stream.encode(yuv))
        self.num_frames += 1

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise UsageError(
                f"a video of {width}x{height} cannot be encoded: 4:2:0 needs even width and height"
            )
        if self.encoder == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors only; else a banner on stderr
        muxer, options, _ = MUXERS[self.target.suffix.lower()]
        self._container = av.open(str(self._pending.part), "w", format=muxer, options=options)
        rate = Fraction(self.fps).limit_denominator(1001)
        options = {"crf": str(self.crf), **dict(self.codec.options)}
        self._stream = self._container.add_stream(self.encoder, rate=rate, options=options)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = BT709
        if self.codec.tag is not None and muxer == "mp4":
            context.codec_tag = self.codec.tag

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self.target, error) from error
        except av.FFmpegError as error:
            raise OutputError(
                f"cannot write {self.target}: the encoder {self.encoder} failed: {error}"
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._container is not None:
                with suppress(OSError, av.FFmpegError):  # the first error is on its way already
                    self._container.close()
            self._pending.discard()

    def _finish(self) -> None:
        assert self._stream is not None, "no frames were appended"
        with self._disk_errors(), ordinary_priority():
            self._container.mux(self._stream.encode(None))
            self._container.close()
        if self._seal is not None:
            self._seal(self._pending.part)
        self._pending.commit()


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """SVT-AV1, where root runs it, leaves its caller a real-time thread that starves all others."""
    if not hasattr(os, "sched_getscheduler"):  # only Linux has them
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_video(
    path: str | PathLike[str],
    chunks: Iterable[Frames],
    fps: float,
    codec: str = "h264",
    crf: int | None = None,
    overwrite: bool = False,
    seal: Seal | None = None,
) -> Path:
    """Write chunks of frames, as `VideoWriter.append` takes them, to a video, or one to `.png`.

    Marks nothing by itself: see `wanrt.media.saving`.
    """
    if Path(path).suffix.lower() == IMAGE_SUFFIX:
        frames = [frame for chunk in chunks for frame in _split(chunk)]
        target = check_output(path, overwrite, num_frames=len(frames))
        return save_png(frames[0], target, overwrite, seal)
    with VideoWriter(path, fps, codec, crf, overwrite, seal) as writer:
        for chunk in chunks:
            writer.append(chunk)
    return writer.target


def _split(chunk: Frames) -> Sequence[Frames]:
    """The frames of a chunk: float `[3, H, W]` or uint8 `[H, W, 3]`."""
    if isinstance(chunk, Tensor) and chunk.is_floating_point():
        return chunk.reshape(chunk.shape[-4:]).unbind(1)
    return list(chunk)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. `width` and `height` are as shown, after rotation.

    Frame i is on screen from `times[i]` to `times[i + 1]`, in the stream's own whole units.
    """

    width: int
    height: int
    fps: float
    times: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        return len(self.times) - 1


class Clip(NamedTuple):
    frames: Tensor  # [3, F, H, W], float32 in [-1, 1]
    fps: float


def probe_video(path: str | PathLike[str]) -> VideoInfo:
    """Read a video's frame times and its first frame; the others are not decoded.

    Raises FormatError for a file that is missing, not a video, truncated or beyond the limits.
    """
    path = Path(path)
    starts, count, first, last = [], 0, None, 0
    with _open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            count += packet.size > 0
            if packet.size == 0 or packet.is_discard:
                continue
            starts.append(packet.pts)
            last = packet.duration or last
            if len(starts) > MAX_SOURCE_FRAMES:
                raise FormatError(
                    path, f"has more than {MAX_SOURCE_FRAMES} frames", "cut out the part you need"
                )
        if count < stream.frames:
            raise FormatError(path, f"is cut off: {count} of {stream.frames} frames are there")
        if first is None:
            raise FormatError(path, "has no frame that can be decoded")
        return _info(stream, first, starts, last)


def _info(
    stream: VideoStream, first: av.VideoFrame, starts: list[int | None], last: int
) -> VideoInfo:
    if None in starts:  # carelessly muxed files: equal spacing is all that is known
        starts, last = list(range(len(starts))), 1
    starts = sorted(starts)
    end = starts[-1] + max(last, 1)
    times = tuple(start - starts[0] for start in [*starts, end])
    seconds = (end - starts[0]) * stream.time_base
    rate = stream.average_rate or stream.guessed_rate or len(starts) / seconds
    size = (first.width, first.height)
    width, height = size[::-1] if _quarter_turns(first) % 2 else size
    return VideoInfo(width, height, float(rate), times)


def read_video(
    path: str | PathLike[str],
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> Clip:
    """Decode the frames at `indices` (rising; all by default), scaled and cropped to `size` (H, W).

    Peak: the result and one decoded frame. Rotation metadata is applied. Pixels are x / 127.5 - 1,
    as in Wan2.1 @9737cba `wan/utils/vace_processor.py`. Raises FormatError.
    """
    path = Path(path)
    info = probe_video(path)
    wanted = range(info.num_frames) if indices is None else list(indices)
    height, width = size or (info.height, info.width)
    if len(wanted) * height * width * 12 > MAX_CLIP_BYTES:
        raise FormatError(
            path,
            f"{len(wanted)} frames of {width}x{height} are more than {MAX_CLIP_BYTES >> 30} GiB",
            "cut it or scale it down",
        )
    out = torch.empty(3, len(wanted), height, width)
    for position, rgb in enumerate(_decode(path, wanted)):
        frame = torch.from_numpy(rgb).permute(2, 0, 1)[None]  # [1, 3, H0, W0], uint8
        out[:, position] = cover_crop(frame, height, width)[0]
    return Clip(out.div_(127.5).sub_(1), info.fps)


def iter_frames(path: str | PathLike[str]) -> Iterator[np.ndarray]:
    """Every frame, upright uint8 `[H, W, 3]`, one at a time. Raises FormatError."""
    with _open_video(Path(path)) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield _upright(frame)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame)).copy()


def _decode(path: Path, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Upright uint8 `[H, W, 3]` for each wanted index; stops after the last one."""
    position = 0
    with _open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index == wanted[position]:
                rgb = _upright(frame)
            while position < len(wanted) and index == wanted[position]:
                yield rgb
                position += 1
            if position == len(wanted):
                return
        raise FormatError(path, f"frame {wanted[position]} cannot be decoded", "is it cut off?")


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise, from the display matrix."""
    return round(frame.rotation / 90) % 4


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    if not path.is_file():
        raise FormatError(path, "is a folder" if path.is_dir() else "no such file")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(str(path), options=options, metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise FormatError(path, "holds no video" + (" of a known codec" if stream else ""))
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_FRAME_PIXELS:
                raise FormatError(
                    path,
                    f"{width}x{height} is more than {MAX_FRAME_PIXELS} pixels",
                    "scale it down",
                )
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise FormatError(path, f"cannot be read as a video: {error.strerror}") from error
