"""Sound: copied from one video into another, packet by packet, without decoding."""

from collections.abc import Iterator
from contextlib import ExitStack
from heapq import merge
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from wanrt.errors import FormatError, OutputError, UsageError
from wanrt.media.video import CONTAINERS, MUXERS

_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}


def has_sound(path: Path) -> bool:
    """Raises FormatError for a file that is no video."""
    try:
        with av.open(str(path), options=_OPTIONS, metadata_errors="ignore") as container:
            return bool(container.streams.audio)
    except (av.FFmpegError, OSError) as error:
        raise FormatError(path, f"cannot be read as a video: {error.strerror}") from error


def add_sound(video: Path, source: Path, target: Path) -> None:
    """Write the pictures of `video` and the first sound track of `source` into `target`.

    Raises UsageError where that kind of file cannot hold that kind of sound, OutputError.
    """
    try:
        _mux(video, source, target)
    except (av.FFmpegError, OSError) as error:
        raise OutputError(f"cannot write the sound of {source}: {error}") from error


def _mux(video: Path, source: Path, target: Path) -> None:
    muxer, options, _ = MUXERS[target.suffix.lower()]
    with ExitStack() as opened:
        pictures = opened.enter_context(av.open(str(video)))
        sounds = opened.enter_context(
            av.open(str(source), options=_OPTIONS, metadata_errors="ignore")
        )
        out = opened.enter_context(av.open(str(target), "w", format=muxer, options=options))
        rows = [(pictures, pictures.streams.video[0]), (sounds, sounds.streams.audio[0])]
        try:
            copies = [out.add_stream_from_template(stream) for _, stream in rows]
            copies[0].codec_context.codec_tag = rows[0][1].codec_context.codec_tag
            out.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            raise UsageError(
                f"the sound of {source} does not fit into a {target.suffix}: {error} "
                "(take another ending, or take the sound out first)"
            ) from error
        packets = [
            _packets(*row, copy, order)
            for order, (row, copy) in enumerate(zip(rows, copies, strict=True))
        ]
        for _, _, packet in merge(*packets, key=lambda row: row[:2]):
            out.mux(packet)


def _packets(
    container: InputContainer, stream: Stream, copy: Stream, order: int
) -> Iterator[tuple[float, int, Packet]]:
    """Each packet with its time in seconds."""
    for packet in container.demux(stream):
        if packet.dts is None:  # the empty one at the end
            continue
        seconds = float(packet.dts * packet.time_base)
        packet.stream = copy
        yield seconds, order, packet
