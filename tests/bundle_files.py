"""A small bundle and its parts, for the tests of the format: true records, made-up engine bytes."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wanrt.config import MODELS
from wanrt.engine import bundle
from wanrt.engine.manifest import (
    Engine,
    Graph,
    Input,
    Licence,
    Manifest,
    Model,
    Provenance,
    Tool,
)
from wanrt.engine.trust import Signer

RELEASE = "1.7.1.116"


def signer(seed: int = 1) -> Signer:
    private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    return Signer(private.public_key().public_bytes_raw().hex(), private.sign)


SIGNER, STRANGER = signer(1), signer(2)


def message(*fields: tuple[int, bytes | int]) -> bytes:
    """Protobuf: numbers as varints, bytes with their length."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return out


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def node(op: bytes, *attributes: bytes) -> bytes:
    return message((1, b"x"), (2, b"y"), (4, op), *((5, one) for one in attributes))


def onnx(*graph_fields: tuple[int, bytes | int]) -> bytes:
    """A ModelProto whose graph has one node and the given fields."""
    return message((1, 10), (2, b"wanrt"), (7, message((1, node(b"Gelu")), *graph_fields)))


EXTERNAL = message((8, b"w"), (13, message((1, b"location"), (2, b"../../etc/passwd"))), (14, 1))

CONTENTS: dict[str, bytes | Path] = {
    "engines/block-ada.engine": b"\x00engine for 8.9\x00" * 40,
    "engines/block-ampere.engine": b"\x00engine for 8.6\x00" * 30,
    "licences/apache-2.0.txt": b"Apache License, Version 2.0 ...\n",
    "onnx/block.onnx": onnx(),
    "weights/dit.safetensors": bytes(range(256)) * 3,
}
TOKENS = Input("x", "bf16", (1, 1024, 1536), (1, 32760, 1536), (1, 75600, 1536))


def engine(member: str, capability: int, **other: Any) -> Engine:
    made = Engine("block", member, "tensorrt-rtx", RELEASE, (capability,), 1 << 20)
    return replace(made, **other)


def manifest(contents: dict[str, bytes | Path] = CONTENTS, **other: Any) -> Manifest:
    made = Manifest(
        format=1,
        model=Model.of(MODELS["wan2.1-t2v-1.3b"]),
        graphs=(Graph("block", "onnx/block.onnx", "bf16", False, 23, (TOKENS,)),),
        engines=(
            engine("engines/block-ada.engine", 89),
            engine("engines/block-ampere.engine", 86),
        ),
        weights=("weights/dit.safetensors",),
        tokenizer="",
        licences=(Licence("Apache-2.0", "licences/apache-2.0.txt", ("weights/dit.safetensors",)),),
        provenance=Provenance("0" * 40, False, (Tool("torch", "2.13.0"), Tool("wanrt", "0.1.0"))),
        members=bundle.members_of(contents),
    )
    return replace(made, **other)


def write(path: Path, by: Signer | None = SIGNER) -> Path:
    bundle.write(path, manifest(), CONTENTS, by)
    return path


def files_of(path: Path) -> dict[str, bytes]:
    """Of a bundle in a folder, manifest and signature first."""
    found = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("man"), item[0])))


def plain_zip(files: list[tuple[str, bytes]]) -> bytes:
    """A stored zip by a writer that cares about nothing."""
    out, rows = b"", b""
    for name, data in files:
        text, crc = name.encode(), zlib.crc32(data)
        common = (0, 0, 0, 0x21, crc, len(data), len(data), len(text), 0)
        rows += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, *common, 0, 0, 0, 0,
                            len(out)) + text  # fmt: skip
        out += struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, *common) + text + data
    count = len(files)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(rows), len(out), 0)
    return out + rows + end
