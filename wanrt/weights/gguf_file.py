"""The GGUF container: tensors of plain numbers, or of packed blocks, one at a time.

`gguf_header.py` reads the header; here its tensors are held against the file: known types, whole
blocks, every byte inside the file and belonging to one tensor.

Source: github ggml-org/ggml `docs/gguf.md`; city96/ComfyUI-GGUF @795e451 `loader.py` (orig_shape).
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanrt.errors import FormatError
from wanrt.quant.gguf_blocks import FORMATS
from wanrt.weights.gguf_header import AGAIN, Array, Entry, Header, read_array, read_header
from wanrt.weights.safetensors_file import TensorInfo, read_bytes

# By the number that stands for each type in a file (`enum ggml_type`).
_PLAIN = {
    **{0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16},
    **{24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64},
}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_REFUSED = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
JOIN = "join them with `llama-gguf-split --merge`"
_REMEDY = "get the Q4_0 to Q8_0 or Q2_K to Q6_K file"
_SHAPE = "comfy.gguf.orig_shape."


class GgufFile:
    """One file: `tensors` in the order of their bytes, where they `begin`, `metadata`, `read`."""

    container = "gguf"

    def __init__(self, path: Path) -> None:
        """Reads the header only. Raises FormatError for anything that is not in order."""
        self.path = path
        header = read_header(path)
        _check_split(path, header)
        self.settings = header.settings
        self.metadata = {k: v for k, v in header.settings.items() if isinstance(v, str)}
        self.tensors: dict[str, TensorInfo] = {}
        self.begin: dict[str, int] = {}
        for entry in sorted(header.entries, key=lambda entry: entry.offset):
            self.tensors[entry.name] = self._info(entry)
            self.begin[entry.name] = header.data_start + entry.offset
        self._check_ranges(header)

    def read(self, name: str, rows: range | None = None, buffer: Tensor | None = None) -> Tensor:
        """The tensor or some rows of it, in fresh memory or in `buffer` (uint8).

        Packed ones come as they are stored: uint8 [rows, bytes of a row].
        """
        info, begin = self.tensors[name], self.begin[name]
        if rows is not None:
            begin += rows.start * (info.num_bytes // info.shape[0])
            info = replace(info, shape=(len(rows), *info.shape[1:]))
        raw = read_bytes(self.path, name, begin, info.num_bytes, buffer)
        if info.packing is not None:
            return raw.view(info.shape[0], -1)
        return raw.view(info.dtype).view(info.shape)

    def array(self, key: str) -> list[str] | np.ndarray | None:
        """A list among the settings. Raises FormatError where it is no list."""
        value = self.settings.get(key)
        if value is None:
            return None
        if not isinstance(value, Array):
            raise FormatError(self.path, f"the setting {key} is no list", AGAIN)
        return read_array(self.path, value)

    def _info(self, entry: Entry) -> TensorInfo:
        label = f"tensor {entry.name[:80]!r}"
        packing, dtype = FORMATS.get(entry.kind), _PLAIN.get(entry.kind, torch.uint8)
        if packing is None and entry.kind not in _PLAIN:
            named = _REFUSED.get(entry.kind, f"type {entry.kind}")
            raise FormatError(self.path, f"{label} is {named}, which wanrt does not read", _REMEDY)
        if math.prod(entry.shape) >= 2**62 or 0 in entry.shape:
            raise FormatError(self.path, f"{label} has shape {list(entry.shape)}", AGAIN)
        if packing is not None and entry.shape[-1] % packing.numel:
            reason = f"{label} has rows of {entry.shape[-1]}, no blocks of {packing.numel}"
            raise FormatError(self.path, f"{reason} ({packing.name})", AGAIN)
        shape = self._original_shape(entry.name) or entry.shape
        if math.prod(shape) != math.prod(entry.shape):
            reason = f"{label} is {list(entry.shape)}, which is no {list(shape)}"
            raise FormatError(self.path, reason, AGAIN)
        if packing is not None and math.prod(shape[1:]) % packing.numel:
            reason = f"{label} has blocks that cross the rows of its shape {list(shape)}"
            raise FormatError(self.path, reason, _REMEDY)
        return TensorInfo(dtype, shape, self.path, packing)

    def _original_shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor that was given another shape to make whole blocks, or fewer dimensions."""
        sizes = self.array(_SHAPE + name)
        if sizes is None:
            return None
        legal = isinstance(sizes, np.ndarray) and sizes.dtype.kind in "iu" and 0 < len(sizes) <= 8
        if not legal or (sizes <= 0).any():
            raise FormatError(self.path, f"{_SHAPE}{name[:80]} is no shape", AGAIN)
        return tuple(map(int, sizes))

    def _check_ranges(self, header: Header) -> None:
        """Tensors follow each other; between and behind them is less than the alignment."""
        position = header.data_start
        for name, info in self.tensors.items():
            begin = self.begin[name]
            if begin % header.alignment or not 0 <= begin - position < header.alignment:
                fault = "overlaps" if begin < position else "is unaligned or follows a hole"
                raise FormatError(self.path, f"tensor {name[:80]!r} {fault} at byte {begin}", AGAIN)
            position = begin + info.num_bytes
        size = self.path.stat().st_size
        if position > size:
            missing = f"its tensors end at byte {position}, the file has {size}"
            raise FormatError(self.path, f"truncated: {missing}", AGAIN)
        if size - position >= header.alignment:
            extra = f"{size - position} bytes follow the last tensor"
            raise FormatError(self.path, extra, AGAIN)


def type_counts(tensors: dict[str, TensorInfo]) -> str:
    """How many tensors have which type: `Q4_K 240, F32 365`, the most bytes first."""
    count, size = Counter[str](), Counter[str]()
    for info in tensors.values():
        name = info.packing.name if info.packing else _NAMES.get(info.dtype, str(info.dtype))
        count[name] += 1
        size[name] += info.num_bytes
    return ", ".join(f"{name} {count[name]}" for name, _ in size.most_common())


def _check_split(path: Path, header: Header) -> None:
    parts = header.settings.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        reason = f"is one of {parts} parts of a split file"
        raise FormatError(path, reason, JOIN)
