"""What happens to a video after it was saved: codecs, scaling, crops and the like, in memory."""

import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from wanrt.media.video import ordinary_priority

Edit = Callable[[np.ndarray], np.ndarray]
RATE = 16


class Attack(NamedTuple):
    """What is done to frames uint8 `[n, H, W, 3]`."""

    name: str
    run: Edit
    promised: bool  # from 256x256 pixels and 17 frames up
    promised_nano: bool = False


def encode(frames: np.ndarray, codec: str = "libx264", crf: int = 23, scale: float = 1) -> bytes:
    """An MP4 of 4:2:0 in BT.709, scaled (bicubic) to even sides."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only; else a banner on stderr
    options = {"crf": str(crf)}
    if codec == "libx265":
        options["x265-params"] = "log-level=none"
    file = io.BytesIO()
    with ordinary_priority(), av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = (round(side * scale / 2) * 2 for side in frames.shape[1:3])
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                stream.width,
                stream.height,
                "yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation="BICUBIC",
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


def decode(file: bytes | Path) -> Iterator[np.ndarray]:
    """Frames uint8 `[H, W, 3]`, one by one."""
    with av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709)


def remux(file: bytes) -> bytes:
    """The same packets in a Matroska file, without metadata."""
    out = io.BytesIO()
    with av.open(io.BytesIO(file)) as source, av.open(out, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return out.getvalue()


def save(frames: np.ndarray, codec: str = "libx264", crf: int = 23, scale: float = 1) -> np.ndarray:
    return np.stack(list(decode(encode(frames, codec, crf, scale))))


def remuxed(frames: np.ndarray) -> np.ndarray:
    return np.stack(list(decode(remux(encode(frames, crf=18)))))


def halved_twice_saved(frames: np.ndarray) -> np.ndarray:
    return save(save(frames, crf=18, scale=0.5), crf=28)


def brighter(frames: np.ndarray, gain: float) -> np.ndarray:
    return (frames * np.float32(gain)).clip(0, 255).astype(np.uint8)


def crop(frames: np.ndarray, share: float, where: float) -> np.ndarray:
    """Without `share` of height and width; `where` 0 keeps the top left, 0.5 the middle."""
    height, width = (round(side * (1 - share) / 2) * 2 for side in frames.shape[1:3])
    top = round((frames.shape[1] - height) * where)
    left = round((frames.shape[2] - width) * where)
    return frames[:, top : top + height, left : left + width]


def narrow(frames: np.ndarray, share: float) -> np.ndarray:
    """Cropped at the left only."""
    return frames[:, :, round(frames.shape[2] * share / 2) * 2 :]


def turned(frames: np.ndarray, degrees: float) -> np.ndarray:
    """Rotated about the middle, nearest pixel."""
    height, width = frames.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(float)
    y, x = y - height / 2, x - width / 2
    angle = np.deg2rad(degrees)
    rows = (y * np.cos(angle) - x * np.sin(angle) + height / 2).round().astype(int)
    columns = (y * np.sin(angle) + x * np.cos(angle) + width / 2).round().astype(int)
    return frames[:, rows.clip(0, height - 1), columns.clip(0, width - 1)]


def then_saved(edit: Edit, crf: int = 23) -> Edit:
    return lambda frames: save(edit(frames), crf=crf)


# Edits are saved with x264 at CRF 23 afterwards, as a program would.
ATTACKS = (
    Attack("none", lambda frames: frames, True, True),
    Attack("x264 CRF 18", partial(save, crf=18), True, True),
    Attack("x264 CRF 23", partial(save, crf=23), True, True),
    Attack("x264 CRF 28", partial(save, crf=28), True, True),
    Attack("x264 CRF 33", partial(save, crf=33), False),
    Attack("x265 CRF 28", partial(save, codec="libx265", crf=28), False),
    Attack("AV1 CRF 35", partial(save, codec="libsvtav1", crf=35), True),
    Attack("re-muxed", remuxed, True, True),
    Attack("half the size", partial(save, scale=0.5), True),
    Attack("one and a half times the size", partial(save, scale=1.5), True),
    Attack("half the size, then CRF 28", halved_twice_saved, True),
    Attack("10 % cropped, middle", then_saved(partial(crop, share=0.1, where=0.5)), True),
    Attack("10 % cropped, corner", then_saved(partial(crop, share=0.1, where=0)), True),
    Attack("10 % cropped, left side", then_saved(partial(narrow, share=0.1)), True),
    Attack("brightness +15 %", then_saved(partial(brighter, gain=1.15)), True),
    Attack("brightness -15 %", then_saved(partial(brighter, gain=0.85)), True),
    Attack("every other frame dropped", then_saved(lambda frames: frames[::2]), True, True),
    Attack("mirrored", then_saved(lambda frames: frames[:, :, ::-1]), True),
    Attack("one frame, as a picture", lambda frames: frames[:1], False),
    Attack("20 % cropped, middle", then_saved(partial(crop, share=0.2, where=0.5)), False),
    Attack("turned by 1 degree", then_saved(partial(turned, degrees=1)), False),
)
