"""The header of a GGUF file, read by a strict parser: settings, and where each tensor lies.

A file is "GGUF", the version, the numbers of tensors and of settings, the settings (name, type,
value), the tensors (name, dimensions with the fastest first, type, offset), then from the next
multiple of the alignment their bytes. It comes from a stranger: every count and length is held
against a limit and against the bytes that are left before anything is read or allocated.

Source: github ggml-org/ggml `docs/gguf.md`, versions 2 and 3, little endian.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from wanrt.errors import FormatError
from wanrt.weights.safetensors_file import MAX_DIMS, MAX_TENSORS

MAX_HEADER = 32 * 2**20  # bytes; a umT5 file holds its vocabulary here, about 8 MiB
MAX_SETTINGS = MAX_TENSORS + 1000  # some files have one per tensor
MAX_NAME = 1024  # bytes; ggml itself stops at 64 or 128
MAX_STRING = 2**20  # bytes
MAX_ITEMS = 2**19  # of an array; umT5's vocabulary has 256384
MAX_ALIGNMENT = 2**16
AGAIN = "download or copy the file again"

_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# By the number that stands for each type of value in a file.
_NUMBERS = {
    number: struct.Struct(f"<{code}")
    for number, code in {
        **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
        **{10: "Q", 11: "q", 12: "d"},
    }.items()
}

Value = str | int | float | bool


class Array(NamedTuple):
    """A list among the settings, which stays in the file until it is asked for."""

    kind: int  # type of its items
    count: int
    begin: int  # file position of the first


class Entry(NamedTuple):
    """What the header says about one tensor."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first, as in PyTorch
    kind: int  # `enum ggml_type`
    offset: int  # from the first byte of the tensors


class Header(NamedTuple):
    settings: dict[str, Value | Array]
    entries: list[Entry]
    data_start: int
    alignment: int


def read_header(path: Path) -> Header:
    """Raises FormatError. Peak: the strings of the header, at most MAX_HEADER."""
    with open(path, "rb") as file:
        cursor = _Cursor(path, file)
        _check_magic(path, cursor.take(4, "the magic"))
        version = cursor.u32("the version")
        if version not in _VERSIONS:
            raise FormatError(path, *_wrong_version(version))
        num_tensors = cursor.count("tensors", MAX_TENSORS)
        num_settings = cursor.count("settings", MAX_SETTINGS)
        settings: dict[str, Value | Array] = {}
        for _ in range(num_settings):
            key = cursor.text("the name of a setting", MAX_NAME)
            if key in settings:
                raise FormatError(path, f"the setting {key[:80]!r} appears twice", AGAIN)
            settings[key] = cursor.value(key)
        entries = [_entry(cursor) for _ in range(num_tensors)]
        end = cursor.at
    names = {entry.name for entry in entries}
    if len(names) < len(entries):
        raise FormatError(path, f"{len(entries) - len(names)} tensors have another's name", AGAIN)
    alignment = _alignment(path, settings)
    return Header(settings, entries, -(-end // alignment) * alignment, alignment)


def read_array(path: Path, array: Array) -> list[str] | np.ndarray:
    """The items of a list, strings as str and numbers as a 1-D array. Raises FormatError."""
    with open(path, "rb") as file:
        cursor = _Cursor(path, file, array.begin)
        if array.kind == _STRING:
            return [cursor.text("an item", MAX_STRING) for _ in range(array.count)]
        form = _NUMBERS[array.kind]
        raw = cursor.take(array.count * form.size, "a list")
        return np.frombuffer(raw, np.dtype(form.format))


class _Cursor:
    """Reads one thing after the other, none of it beyond the file or the limit."""

    def __init__(self, path: Path, file: BinaryIO, at: int = 0) -> None:
        self.path, self._file, self.at = path, file, at
        self._size = path.stat().st_size
        file.seek(at)

    def take(self, size: int, what: str) -> bytes:
        self._check(size, what)
        raw = self._file.read(size)
        if len(raw) < size:
            raise FormatError(self.path, f"ended while {what} was being read", AGAIN)
        self.at += size
        return raw

    def skip(self, size: int, what: str) -> None:
        self._check(size, what)
        self.at = self._file.seek(self.at + size)

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def count(self, what: str, most: int) -> int:
        """The u64 that says how many of something come."""
        number = self.u64(f"the number of {what}")
        if number > most:
            reason = f"its header claims {number} {what}; the limit is {most}"
            raise FormatError(self.path, reason, "no Wan model has that many")
        return number

    def text(self, what: str, most: int) -> str:
        size = self.u64(what)
        if size > most:
            raise FormatError(self.path, f"{what} is {size} bytes long; the limit is {most}", AGAIN)
        raw = self.take(size, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FormatError(self.path, f"{what} is not UTF-8: {raw[:40]!r}", AGAIN) from None

    def value(self, key: str) -> Value | Array:
        """The value of a setting; a list is stepped over."""
        label = f"the setting {key[:80]!r}"
        kind = self.u32(label)
        if kind == _STRING:
            return self.text(label, MAX_STRING)
        if kind != _ARRAY:
            return self._number(kind, label)
        kind, count = self.u32(label), self.count(f"items of {label}", MAX_ITEMS)
        array = Array(kind, count, self.at)
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.u64(label), label)
        elif kind == _ARRAY:
            raise FormatError(self.path, f"{label} is a list of lists", "no Wan model has that")
        else:
            self.skip(count * self._form(kind, label).size, label)
        return array

    def _number(self, kind: int, label: str) -> int | float | bool:
        form = self._form(kind, label)
        return form.unpack(self.take(form.size, label))[0]

    def _form(self, kind: int, label: str) -> struct.Struct:
        if kind not in _NUMBERS:
            raise FormatError(self.path, f"{label} has the unknown type {kind}", AGAIN)
        return _NUMBERS[kind]

    def _check(self, size: int, what: str) -> None:
        end = self.at + size
        if end > self._size:
            reason = f"truncated: {what} ends at byte {end}, the file has {self._size}"
            raise FormatError(self.path, reason, AGAIN)
        if end > MAX_HEADER:
            reason = f"its header is longer than the limit of {MAX_HEADER} bytes"
            raise FormatError(self.path, reason, "it is no model of Wan's, or a hostile one")


def _check_magic(path: Path, magic: bytes) -> None:
    if magic == b"GGUF":
        return
    meaning = "it does not begin with GGUF"
    if magic == b"vers":
        meaning = "this is a Git LFS pointer, not the weights"
    elif magic.lower() in (b"<!do", b"<htm"):
        meaning = "this is a web page, not the weights"
    raise FormatError(path, meaning, "get the real file")


def _wrong_version(version: int) -> tuple[str, str]:
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
        return "is a big-endian GGUF file; wanrt reads little-endian ones", "get the usual file"
    known = " and ".join(map(str, _VERSIONS))
    return f"is GGUF version {version}; wanrt reads {known}", "convert it with a newer tool"


def _entry(cursor: _Cursor) -> Entry:
    name = cursor.text("the name of a tensor", MAX_NAME)
    label = f"tensor {name[:80]!r}"
    num_dims = cursor.u32(label)
    if not 1 <= num_dims <= MAX_DIMS:
        reason = f"{label} has {num_dims} dimensions; the limits are 1 and {MAX_DIMS}"
        raise FormatError(cursor.path, reason, AGAIN)
    dims = [cursor.u64(label) for _ in range(num_dims)]
    return Entry(name, tuple(reversed(dims)), cursor.u32(label), cursor.u64(label))


def _alignment(path: Path, settings: dict[str, Value | Array]) -> int:
    given = settings.get("general.alignment", _ALIGNMENT)
    if type(given) is not int or not 1 <= given <= MAX_ALIGNMENT or given & (given - 1):
        reason = f"its alignment is {str(given)[:40]}; it must be a power of two to {MAX_ALIGNMENT}"
        raise FormatError(path, reason, AGAIN)
    return given
