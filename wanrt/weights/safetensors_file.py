"""The safetensors container: a strict reader of its header, then of one tensor at a time.

A file is 8 bytes with the length of the header (little endian), the header (JSON: name -> dtype,
shape, byte range), and the tensors one after the other. The header comes from a stranger, so every
number in it is checked before anything is allocated.

Source: safetensors format description, github huggingface/safetensors README.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanrt.errors import FormatError
from wanrt.quant.gguf_blocks import BlockFormat
from wanrt.weights.stretch import Stretch
from wanrt.weights.strict_json import AGAIN, parse_json

MAX_HEADER = 8 * 2**20  # bytes; the largest released Wan header is a few hundred KiB
MAX_TENSORS = 20_000
MAX_DIMS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_IMPOSTORS = {
    b"version ": "this is a Git LFS pointer, not the weights",
    b"<!DOCTYP": "this is a web page, not the weights",
    b"PK\x03\x04": "this is a zip file (a .pth?), not safetensors",
    b"GGUF": "this is a GGUF file, not safetensors (name it .gguf)",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor."""

    dtype: torch.dtype  # uint8 where numbers are packed
    shape: tuple[int, ...]  # of the numbers
    file: Path
    packing: BlockFormat | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        if self.packing is not None:
            return self.numel // self.packing.numel * self.packing.num_bytes
        return self.numel * self.dtype.itemsize


class SafetensorsFile:
    """One file: `tensors` in the order of their bytes, `metadata`, and `read`."""

    container = "safetensors"

    def __init__(self, path: Path, within: Stretch | None = None) -> None:
        """Reads the header only. Raises FormatError for anything that is not in order.

        within: where its bytes are, if `path` is its name inside another file.
        """
        self.path = path
        place = within or Stretch.whole(path)
        self._file = place.file
        header, length = _read_header(path, place)
        data_start = place.begin + length
        self.metadata = _metadata(path, header.pop("__metadata__", {}))
        entries = {name: _entry(path, name, value) for name, value in header.items()}
        self._begin: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, (info, begin, _) in sorted(entries.items(), key=lambda item: item[1][1:]):
            self.tensors[name] = info
            self._begin[name] = data_start + begin
        _check_ranges(path, entries, place.size - length)

    def read(self, name: str, rows: range | None = None, buffer: Tensor | None = None) -> Tensor:
        """The tensor or some rows of it, as stored, in fresh memory or in `buffer` (uint8)."""
        info, begin = self.tensors[name], self._begin[name]
        if rows is not None:
            begin += rows.start * (info.num_bytes // info.shape[0])
            info = replace(info, shape=(len(rows), *info.shape[1:]))
        raw = read_bytes(self._file, name, begin, info.num_bytes, buffer)
        return raw.view(info.dtype).view(info.shape)


def read_bytes(path: Path, name: str, begin: int, size: int, buffer: Tensor | None) -> Tensor:
    """uint8 [size]: the bytes of a tensor, in fresh memory or in a large enough `buffer`."""
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8)
    raw = buffer[:size]
    rest = memoryview(raw.numpy())
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while len(rest):  # one call returns 2 GiB at most
            count = file.readinto(rest)
            if not count:
                raise FormatError(path, f"ended while {name} was being read", AGAIN)
            rest = rest[count:]
    return raw


def _read_header(path: Path, place: Stretch) -> tuple[dict[str, Any], int]:
    """The parsed header and how many bytes stand before the first tensor."""
    size = place.size
    with open(place.file, "rb") as file:
        file.seek(place.begin)
        start = file.read(min(8, size))
        for magic, meaning in _IMPOSTORS.items():
            if start.startswith(magic):
                raise FormatError(path, meaning, "get the real file")
        if size < 10:
            raise FormatError(path, f"{size} bytes are too few for a safetensors file", AGAIN)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            reason = f"its header would be {length} bytes long; the limit is {MAX_HEADER}"
            raise FormatError(path, reason, "it is no safetensors file, or a hostile one")
        if 8 + length > size:
            reason = f"truncated: the header needs {8 + length} bytes, the file has {size}"
            raise FormatError(path, reason, AGAIN)
        raw = file.read(length)
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        reason = f"its header names more than {MAX_TENSORS} tensors"
        raise FormatError(path, reason, "no Wan checkpoint has that many")
    header = parse_json(path, raw, "header")
    if not isinstance(header, dict) or len(header) > MAX_TENSORS + 1:
        reason = f"its header is no table of at most {MAX_TENSORS} tensors"
        raise FormatError(path, reason, AGAIN)
    return header, 8 + length


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(path, "__metadata__ in its header is not a table of strings", AGAIN)
    return value


def _entry(path: Path, name: str, value: object) -> tuple[TensorInfo, int, int]:
    """One header entry, checked by itself: info, first byte, byte after the last."""
    label = f"tensor {name[:80]!r} in its header"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(path, f"{label} is not (dtype, shape, data_offsets)", AGAIN)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise FormatError(path, f"{label} has dtype {str(dtype)[:20]!r}", f"known: {known}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise FormatError(path, f"{label} has shape {str(shape)[:80]}", AGAIN)
    if not _naturals(offsets) or len(offsets) != 2:
        raise FormatError(path, f"{label} has byte range {str(offsets)[:80]}", AGAIN)
    info = TensorInfo(DTYPES[dtype], tuple(shape), path)
    begin, end = offsets
    if end - begin != info.num_bytes:
        size = f"{dtype} {list(shape)} is {info.num_bytes} bytes, its range holds {end - begin}"
        raise FormatError(path, f"{label}: {size}", AGAIN)
    return info, begin, end


def _naturals(value: object) -> bool:
    """A list of plain integers from 0 to 2^63."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_ranges(
    path: Path, entries: dict[str, tuple[TensorInfo, int, int]], data_size: int
) -> None:
    """The tensors must fill the rest of the file: no overlap, no hole, nothing after them."""
    position = 0
    for begin, end in sorted((begin, end) for _, begin, end in entries.values()):
        if begin != position:
            fault = "overlap" if begin < position else "leave a hole"
            raise FormatError(path, f"its tensors {fault} at byte {begin}", AGAIN)
        position = end
    if position > data_size:
        missing = f"{position - data_size} of {position} tensor bytes are missing"
        raise FormatError(path, f"truncated: {missing}", AGAIN)
    if position < data_size:
        extra = f"{data_size - position} bytes follow the last tensor"
        raise FormatError(path, extra, AGAIN)
