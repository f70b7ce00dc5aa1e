"""XMP that says "made by AI" (IPTC DigitalSourceType), written into and read from MP4 and PNG.

The packet is ISO 16684-1; where it lies is XMP specification part 3, sections 1.1.4 (PNG) and
1.2.6 (MP4). Neither place moves another byte that an index points to.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from wanrt.errors import FormatError
from wanrt.media.output import PendingFile

PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
RDF_RESOURCE = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}resource"
MP4_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
PNG_KEYWORD = b"XML:com.adobe.xmp"
PNG_START = b"\x89PNG\r\n\x1a\n"
MAX_PACKET = 1 << 20
SUFFIXES = (".mp4", ".png")

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    Iptc4xmpExt:DigitalSourceType={source}
    xmp:CreatorTool={tool}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def embed(path: Path, source_type: str, tool: str) -> None:
    """Write the packet into a finished MP4 (a box at its end) or PNG (a chunk after its header).

    The file stays as it was where that fails. Peak: the bytes of a PNG. Raises OSError.
    """
    packet = _PACKET.format(source=quoteattr(source_type), tool=quoteattr(tool)).encode()
    if path.suffix.lower() == ".png":
        with PendingFile(path) as changed:
            changed.part.write_bytes(_png_with(path.read_bytes(), packet))
        return
    box = struct.pack(">I4s16s", 24 + len(packet), b"uuid", MP4_BOX) + packet
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(box)
    except OSError:
        os.truncate(path, size)
        raise


def _png_with(data: bytes, packet: bytes) -> bytes:
    assert data.startswith(PNG_START) and data[12:16] == b"IHDR", data[:16]
    after = 8 + 12 + 13  # signature, then the header chunk
    # No compression, no language, no translated keyword: five zero bytes (PNG, 11.3.3.4).
    body = b"iTXt" + PNG_KEYWORD + bytes(5) + packet
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:after] + chunk + data[after:]


def read(path: Path) -> str | None:
    """The digital source type that a file's XMP states, None where there is no such statement.

    Reads box and chunk headers and at most 1 MiB of packet. Raises FormatError for a packet that
    cannot be read, OSError.
    """
    with path.open("rb") as file:
        start = file.read(8)
        packet = _in_png(file) if start == PNG_START else _in_mp4(file)
    return None if packet is None else _source_type(path, packet)


def _in_png(file: BinaryIO) -> bytes | None:
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"iTXt" and length <= MAX_PACKET:
            keyword, _, rest = file.read(length).partition(b"\0")
            file.seek(4, os.SEEK_CUR)
            if keyword == PNG_KEYWORD and rest[:1] == b"\0":  # XMP is never compressed
                return rest[2:].split(b"\0", 2)[-1]
        else:
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _in_mp4(file: BinaryIO) -> bytes | None:
    end = file.seek(0, os.SEEK_END)
    for kind, start, stop in _boxes(file, end):
        if kind == b"uuid" and 16 <= stop - start <= MAX_PACKET:
            file.seek(start)
            body = file.read(stop - start)
            if body.startswith(MP4_BOX):
                return body[16:]
    return None


def _boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind and body of each box at the top of an ISO media file; ends where the sizes do not."""
    position = 0
    while position + 8 <= end:
        file.seek(position)
        size, kind = struct.unpack(">I4s", file.read(8))
        start = position + 8
        if size == 1 and start + 8 <= end:
            size, start = struct.unpack(">Q", file.read(8))[0], start + 8
        stop = end if size == 0 else position + size
        if not start <= stop <= end:
            return
        yield kind, start, stop
        position = stop


def _source_type(path: Path, packet: bytes) -> str | None:
    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise FormatError(path, "its XMP defines entities, which XMP has no use for")
    try:
        tree = ElementTree.fromstring(packet.strip(b"\0 \r\n\t"))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise FormatError(path, f"its XMP is not XML: {error}") from error
    for element in tree.iter():
        if PROPERTY in element.attrib:
            return element.attrib[PROPERTY]
        if element.tag == PROPERTY:
            return element.attrib.get(RDF_RESOURCE) or (element.text or "").strip() or None
    return None
