"""The one zip file that a list of entries has: stored, in order, without gaps, times or comments.

Other zip readers open it. This reader takes no other: it walks the entries from the first byte,
rebuilds every header from name, size and CRC and compares. So there is no second directory, no
entry that only some programs see, no data between entries or after them, no overlap, and no
compression, links, encryption or zip64 field that the sizes do not ask for.

Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16 and 4.5.3.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from wanrt.errors import FormatError

MAX_ENTRIES = 4098  # members, manifest and signature
MAX_ENTRY_NAME = 128  # bytes
_WIDE, _MANY = 0xFFFFFFFF, 0xFFFF  # "see the zip64 field"
_DATE = 0x0021  # 1980-01-01, the first there is
_LOCAL, _CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
_AGAIN = "download or copy the file again; a bundle is stored by `wanrt`, not by zip programs"


class Entry(NamedTuple):
    """A file in the zip; `begin` is the position of its first byte."""

    name: str
    size: int
    crc: int
    begin: int


def local_header(name: str, size: int, crc: int) -> bytes:
    """What stands before the bytes of a file."""
    wide = size >= _WIDE
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    short = _WIDE if wide else size
    text = name.encode("ascii")
    fixed = struct.pack(
        "<4sHHHHHIIIHH",
        _LOCAL, 45 if wide else 20, 0, 0, 0, _DATE, crc, short, short, len(text), len(extra),
    )  # fmt: skip
    return fixed + text + extra


def directory(entries: Sequence[Entry], begin: int) -> bytes:
    """What stands after all files; `begin` is its own position."""
    rows = b"".join(_central_header(entry) for entry in entries)
    count, size = len(entries), len(rows)
    wide = begin >= _WIDE or count >= _MANY or size >= _WIDE
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, begin
    ) + struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + size, 1)
    shown = min(count, _MANY)
    end = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, shown, shown, min(size, _WIDE), min(begin, _WIDE), 0
    )
    return rows + (end64 if wide else b"") + end


def _central_header(entry: Entry) -> bytes:
    header = local_header(entry.name, entry.size, entry.crc)
    offset = entry.begin - len(header)
    big = [entry.size, entry.size] if entry.size >= _WIDE else []
    big += [offset] if offset >= _WIDE else []
    extra = struct.pack(f"<HH{len(big)}Q", 1, 8 * len(big), *big) if big else b""
    short, text = min(entry.size, _WIDE), entry.name.encode("ascii")
    fixed = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        _CENTRAL, 45 if big else 20, 45 if big else 20, 0, 0, 0, _DATE, entry.crc, short, short,
        len(text), len(extra), 0, 0, 0, 0, min(offset, _WIDE),
    )  # fmt: skip
    return fixed + text + extra


def read_entries(path: Path, file: BinaryIO, total: int) -> list[Entry]:
    """The entries of a file of `total` bytes. Raises FormatError where a byte is out of place."""
    entries: dict[str, Entry] = {}
    position = 0
    while (entry := _entry(path, file, position, total)) is not None:
        if entry.name in entries:
            raise FormatError(path, f"the zip holds {entry.name} twice", _AGAIN)
        if len(entries) == MAX_ENTRIES:
            raise FormatError(path, f"the zip holds more than {MAX_ENTRIES} files", _AGAIN)
        entries[entry.name] = entry
        position = entry.begin + entry.size
    file.seek(position)
    listed = list(entries.values())
    tail = directory(listed, position)
    if file.read(len(tail) + 1) != tail:
        reason = f"what follows the files, from byte {position}, is not their directory alone"
        raise FormatError(path, reason, _AGAIN)
    return listed


def _entry(path: Path, file: BinaryIO, position: int, total: int) -> Entry | None:
    """The file that begins at a position, None where the directory does."""
    file.seek(position)
    head = file.read(30)
    if position and head.startswith((_CENTRAL, b"PK\x05\x06")):
        return None
    if len(head) < 30 or not head.startswith(_LOCAL):
        raise FormatError(path, f"no file of a stored zip begins at byte {position}", _AGAIN)
    method, crc, size, name_length, extra_length = struct.unpack("<8xH4xI4xIHH", head)
    if method:
        raise FormatError(path, f"an entry at byte {position} is compressed", _AGAIN)
    if not 0 < name_length <= MAX_ENTRY_NAME or extra_length > 20:
        raise FormatError(path, f"a name or an extra field at byte {position} is long", _AGAIN)
    rest = file.read(name_length + extra_length)
    name, extra = rest[:name_length], rest[name_length:]
    if not name.isascii() or not name.decode("ascii").isprintable():
        raise FormatError(path, f"the name {ascii(name)} at byte {position} is odd", _AGAIN)
    if size == _WIDE and len(extra) == 20:
        size = struct.unpack_from("<4xQ", extra)[0]
    entry = Entry(name.decode("ascii"), size, crc, position + 30 + len(rest))
    if head + rest != local_header(entry.name, size, crc):
        raise FormatError(path, f"the header of {entry.name} is not as wanrt writes it", _AGAIN)
    if entry.begin + size > total:
        reason = f"truncated: {entry.name} ends at byte {entry.begin + size}, the file at {total}"
        raise FormatError(path, reason, _AGAIN)
    return entry
