"""Does an ONNX graph name files outside itself? A look at its fields, before a parser gets it.

A tensor may keep its data in another file, by a path of the graph's choosing, and ONNX Runtime's
EPContext nodes name a file too. A bundle's graphs have no weights, so none may. Only what contains
tensors is entered; the rest is stepped over.

Source: onnx.proto (ONNX 1.23) for field numbers; protobuf's encoding guide for the wire.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wanrt.errors import FormatError

MAX_DEPTH = 32  # messages within messages
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of TensorProto
_OP_TYPE, _CONTEXT = 4, b"EPContext"  # of NodeProto

# Message -> the fields that lead to tensors, and what they hold.
_WITHIN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}


class _Field(NamedTuple):
    number: int
    wire: int
    value: int  # of a varint
    begin: int  # of the bytes
    end: int


class _Part(NamedTuple):
    message: str
    begin: int
    end: int
    depth: int


def check_self_contained(data: bytes, path: Path, name: str) -> None:
    """Raises FormatError where `data` is no ONNX model, or a tensor's data lies elsewhere."""
    waiting, has_graph = [_Part("model", 0, len(data), 0)], False
    while waiting:
        part = waiting.pop()
        if part.depth > MAX_DEPTH:
            raise FormatError(path, f"{name} is nested more than {MAX_DEPTH} deep")
        try:
            found = list(_fields(data, part.begin, part.end))
        except (IndexError, ValueError):
            raise FormatError(path, f"{name} is no ONNX model", "build the bundle again") from None
        for field in found:
            if _names_a_file(part.message, field, data):
                reason = f"{name} has a tensor or an engine that lies in another file"
                raise FormatError(path, reason, "a bundle's graphs are whole in themselves")
            inner = _WITHIN[part.message].get(field.number)
            if inner is None:
                continue
            if field.wire != _BYTES:
                raise FormatError(path, f"{name} is no ONNX model", "build the bundle again")
            has_graph = has_graph or inner == "graph"
            waiting.append(_Part(inner, field.begin, field.end, part.depth + 1))
    if not has_graph:
        raise FormatError(path, f"{name} holds no graph", "build the bundle again")


def _names_a_file(message: str, field: _Field, data: bytes) -> bool:
    if message == "tensor":
        return field.number == _EXTERNAL_DATA or (
            field.number == _DATA_LOCATION and field.value > 0
        )
    return (
        message == "node" and field.number == _OP_TYPE and data[field.begin : field.end] == _CONTEXT
    )


def _fields(data: bytes, position: int, end: int) -> Iterator[_Field]:
    """Raises ValueError or IndexError where the bytes are no message."""
    while position < end:
        tag, position = _varint(data, position)
        number, wire, value, size = tag >> 3, tag & 7, 0, 0
        if not 0 < number < 2**29:
            raise ValueError(tag)
        if wire == _VARINT:
            value, position = _varint(data, position)
        elif wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(wire)  # groups, which ONNX has none of
        if position + size > end:
            raise ValueError(size)
        yield _Field(number, wire, value, position, position + size)
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at a position, of ten bytes at most, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise ValueError(position)
