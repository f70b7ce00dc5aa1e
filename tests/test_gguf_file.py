"""GGUF files: what is read, what is refused and how, and that no header does worse than that."""

import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import plain, random_blocks, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wanrt.errors import FormatError
from wanrt.weights import gguf_header
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.gguf_file import GgufFile, type_counts
from wanrt.weights.quantised import PlainReader

TENSORS = {
    "a.weight": torch.randn(5, 64, generator=torch.Generator().manual_seed(0)),
    "a.bias": torch.arange(7.0),
    "patch.weight": torch.arange(96.0).view(4, 3, 2, 2, 2),
    "b.weight": torch.ones(3, 512),
}
KINDS = {"a.weight": "Q8_0", "a.bias": "F32", "patch.weight": "F16", "b.weight": "Q5_K"}


def write(path: Path, **settings: object) -> dict[str, torch.Tensor]:
    return write_gguf(path, TENSORS, lambda name, _: KINDS[name], **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.gguf"


def test_a_file_is_read(path: Path) -> None:
    held = write(path, general__name="x", some__number=3, a__list=["p", "qu"], others=[1, 2, 3])
    checkpoint = Checkpoint.open(path)
    assert checkpoint.container == "gguf" and set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.metadata == {"general.architecture": "wan", "general.name": "x"}
    assert type_counts(checkpoint.tensors) == "Q5_K 1, Q8_0 1, F16 1, F32 1"
    reader = PlainReader(checkpoint)
    for name, values in held.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(TENSORS[name].shape)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(reader.read(name, dtype), values.to(dtype))
            assert torch.equal(reader.read(name, dtype, range(2, 3)), values[2:3].to(dtype))
    file = GgufFile(path)
    assert file.array("a.list") == ["p", "qu"] and file.array("others").tolist() == [1, 2, 3]
    assert file.array("none") is None
    with pytest.raises(FormatError, match="some.number is no list"):
        file.array("some.number")


def test_packed_rows_come_as_they_are_stored(path: Path) -> None:
    write(path)
    checkpoint = Checkpoint.open(path)
    blocks = random_blocks("Q5_K", 6, seed=3).reshape(3, -1)
    assert np.array_equal(checkpoint.read("b.weight").numpy(), blocks)
    assert np.array_equal(checkpoint.read("b.weight", range(1, 3)).numpy(), blocks[1:])
    buffer = torch.empty(1000, dtype=torch.uint8)
    within = checkpoint.read("b.weight", range(1, 2), buffer)
    assert within.data_ptr() == buffer.data_ptr() and np.array_equal(within.numpy(), blocks[1:2])
    info = checkpoint.tensors["b.weight"]
    assert (info.numel, info.num_bytes, info.packing.name) == (1536, 6 * 176, "Q5_K")


def test_bf16_and_other_plain_types(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "wan")
    values = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("half", gguf.quants.quantize(values, Type.BF16), raw_dtype=Type.BF16)
    writer.add_tensor("double", values.astype(np.float64))
    writer.add_tensor("whole", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint.open(path)
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    assert dtypes == {"half": torch.bfloat16, "double": torch.float64, "whole": torch.int32}
    assert torch.equal(checkpoint.read("half"), torch.from_numpy(values).bfloat16())
    assert torch.equal(checkpoint.read("double"), torch.from_numpy(values).double())


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_versions_and_alignments(version: int, alignment: int, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_custom_alignment(alignment)
    blocks = {f"t{i}": random_blocks("Q4_0", i, seed=i).reshape(1, -1) for i in (1, 2, 3)}
    for name, rows in blocks.items():
        writer.add_tensor(name, rows, raw_dtype=Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", version)
    path.write_bytes(raw)
    checkpoint = Checkpoint.open(path)
    for name, rows in blocks.items():
        assert torch.equal(
            PlainReader(checkpoint).read(name, torch.float32), torch.from_numpy(plain(rows, "Q4_0"))
        )


def test_a_shape_that_the_settings_tell(path: Path) -> None:
    """Of a tensor that was given rows of whole blocks, or fewer dimensions."""
    stored = {"flat.weight": torch.randn(4, 256), "patch.weight": torch.arange(96.0).view(12, 8)}
    kinds = {"flat.weight": "Q8_0", "patch.weight": "F16"}
    shapes = {"flat.weight": [8, 4, 32], "patch.weight": [4, 3, 2, 2, 2]}
    given = {f"comfy.gguf.orig_shape.{name}": shape for name, shape in shapes.items()}
    held = write_gguf(path, stored, lambda name, _: kinds[name], **given)
    checkpoint = Checkpoint.open(path)
    for name, shape in shapes.items():
        assert checkpoint.tensors[name].shape == tuple(shape)
        read = PlainReader(checkpoint).read(name, torch.float32)
        assert torch.equal(read, held[name].view(shape))
        some = PlainReader(checkpoint).read(name, torch.float32, range(1, 3))
        assert torch.equal(some, held[name].view(shape)[1:3])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([3, 100], r"is \[4, 256\], which is no \[3, 100\]"),
        ([1024, 1], "has blocks that cross the rows"),
        ([-4, -256], "is no shape"),
        ([], "is no shape"),
        ([1.0, 1024.0], "is no shape"),
        (["4", "256"], "is no shape"),
    ],
)
def test_a_shape_that_cannot_be(shape: list[object], reason: str, path: Path) -> None:
    given = {"comfy.gguf.orig_shape.x": shape} if shape else {}
    write_gguf(path, {"x": torch.randn(4, 256)}, lambda *_: "Q8_0", **given)
    if not shape:  # the package writes no empty list
        header = path.read_bytes()
        key = b"comfy.gguf.orig_shape.x"
        extra = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 5, 0)
        path.write_bytes(header[:16] + struct.pack("<Q", 2) + extra + header[24:])
    with pytest.raises(FormatError, match=reason):
        Checkpoint.open(path)


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(FormatError) as error:
        GgufFile(path)
    return str(error.value)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def head(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def tensor(name: bytes = b"x", dims: tuple[int, ...] = (32,), kind: int = 0, at: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, at)


def padded(header: bytes, data: int = 0) -> bytes:
    return header + bytes(-len(header) % 32) + bytes(data)


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "truncated: the magic ends at byte 4, the file has 0"),
    "magic only": (b"GGUF", "truncated: the version"),
    "garbage": (b"\x99" * 999, "does not begin with GGUF"),
    "web page": (b"<!DOCTYPE html>", "this is a web page"),
    "pointer": (b"version https://git-lfs", "this is a Git LFS pointer"),
    "version 1": (head(version=1), "is GGUF version 1; wanrt reads 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">I", 3), "is a big-endian GGUF file"),
    "huge tensors": (head(tensors=2**63), "claims 9223372036854775808 tensors; the limit is 20000"),
    "huge settings": (head(pairs=2**40), "claims 1099511627776 settings; the limit is 21000"),
    "fewer tensors": (head(tensors=3), "truncated: the name of a tensor"),
    "long name": (
        head(tensors=1) + struct.pack("<Q", 2**62),
        "the name of a tensor is 4611686018427387904 bytes long; the limit is 1024",
    ),
    "name not text": (head(tensors=1) + tensor(b"\xff\xfe"), "the name of a tensor is not UTF-8"),
    "setting twice": (head(pairs=2) + (text(b"k") + struct.pack("<IB", 0, 1)) * 2, "'k' appears"),
    "unknown value": (
        head(pairs=1) + text(b"k") + struct.pack("<I", 77),
        "has the unknown type 77",
    ),
    "unknown items": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 77, 1),
        "has the unknown type 77",
    ),
    "lists of lists": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1),
        "is a list of lists",
    ),
    "long list": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 0, 2**50),
        "items of the setting 'k'; the limit is 524288",
    ),
    "list beyond the file": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 10, 1000),
        "truncated: the setting 'k'",
    ),
    "string beyond the file": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**63),
        "truncated: the setting 'k'",
    ),
    "no dimensions": (head(tensors=1) + tensor(dims=()), "has 0 dimensions"),
    "many dimensions": (head(tensors=1) + tensor(dims=(1,) * 9), "has 9 dimensions"),
    "empty tensor": (padded(head(tensors=1) + tensor(dims=(32, 0))), r"has shape \[0, 32\]"),
    "overflow": (padded(head(tensors=1) + tensor(dims=(2**62, 32))), "has shape"),
    "IQ4_XS": (padded(head(tensors=1) + tensor(kind=23)), "is IQ4_XS, which wanrt does not read"),
    "TQ1_0": (padded(head(tensors=1) + tensor(kind=34)), "is TQ1_0, which wanrt does not read"),
    "type 99": (padded(head(tensors=1) + tensor(kind=99)), "is type 99, which wanrt does not read"),
    "half a block": (padded(head(tensors=1) + tensor(dims=(48,), kind=2)), "no blocks of 32 .Q4_0"),
    "beyond the file": (padded(head(tensors=1) + tensor(), 64), "truncated: its tensors end at"),
    "far beyond": (padded(head(tensors=1) + tensor(at=2**63), 128), "follows a hole at byte"),
    "unaligned": (padded(head(tensors=1) + tensor(at=8), 200), "is unaligned"),
    "overlap": (
        padded(head(tensors=2) + tensor(b"x") + tensor(b"y", at=32), 200),
        "tensor 'y' overlaps",
    ),
    "same name": (padded(head(tensors=2) + tensor() + tensor(at=128), 256), "1 tensors have"),
    "more bytes": (padded(head(tensors=1) + tensor(), 128 + 32), "32 bytes follow the last tensor"),
    "alignment 3": (
        head(pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, 3),
        "its alignment is 3; it must be a power of two",
    ),
    "alignment text": (
        head(pairs=1) + text(b"general.alignment") + struct.pack("<I", 8) + text(b"32"),
        "its alignment is 32",
    ),
    "part of a file": (
        padded(head(pairs=1) + text(b"split.count") + struct.pack("<IH", 2, 3)),
        "is one of 3 parts of a split file",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, path: Path) -> None:
    content, reason = BROKEN[name]
    said = refused(path, content)
    assert said.startswith(f"{path}: ") and len(said) < 400
    assert re.search(reason, said), said


def test_a_folder_of_parts(path: Path) -> None:
    path.with_name("a-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match="holds the parts of a split GGUF file .join them with"):
        Checkpoint.open(path.parent)


def test_a_header_beyond_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 1000)
    item = text(b"y" * 100)
    content = head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 20) + item * 20
    assert "its header is longer than the limit of 1000 bytes" in refused(path, content)


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    write(path)
    checkpoint = Checkpoint.open(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(FormatError, match="ended while [ab].weight was being read"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write(path, general__name="x", number=3, words=["p", "qu"], numbers=[1, 2], real=1.5, yes=True)
    return path.read_bytes()


def opens(path: Path, content: bytes) -> bool:
    """Whether the file opens and all of it can be read; anything but FormatError is a failure."""
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        for key in file.settings:
            if isinstance(file.settings[key], gguf_header.Array):
                file.array(key)
        for name in file.tensors:
            file.read(name)
    except FormatError:
        return False
    return True


def test_every_truncation(sound: bytes, path: Path) -> None:
    """In the header at every byte, in the tensors here and there."""
    start = sound.index(b"patch.weight") + 200
    last = len(sound) - 32  # what follows is padding
    for size in (*range(start), *range(start, last, 97)):
        assert not opens(path, sound[:size]), size
    assert opens(path, sound)


Change = Callable[[bytes, int, int], bytes]
CHANGES: dict[str, Change] = {
    "byte": lambda raw, at, value: raw[:at] + bytes([value & 255]) + raw[at + 1 :],
    "word": lambda raw, at, value: raw[:at] + struct.pack("<Q", value) + raw[at + 8 :],
    "cut": lambda raw, at, value: raw[:at] + raw[at + 1 + value % 16 :],
    "more": lambda raw, at, value: raw[:at] + struct.pack("<Q", value) + raw[at:],
}
WORDS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 300),
    st.sampled_from([2**n + d for n in (16, 20, 31, 32, 48, 62, 63) for d in (-1, 0, 1)]),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 700), WORDS),
        min_size=1,
        max_size=4,
    )
)
def test_changed_headers(sound: bytes, path: Path, changes: list[tuple[str, int, int]]) -> None:
    for kind, at, value in changes:
        sound = CHANGES[kind](sound, at, value)
    tracemalloc.start()
    try:
        opens(path, sound)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 4), st.integers(0, 4), st.binary(max_size=400))
def test_noise_behind_a_sound_start(path: Path, tensors: int, pairs: int, noise: bytes) -> None:
    opens(path, head(tensors, pairs) + noise)


def test_a_long_list_is_not_kept(path: Path) -> None:
    """A list of empty strings is stepped over; it is not kept."""
    count = 2**17
    begin = head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 8, count)
    path.write_bytes(padded(begin + bytes(8 * count)))
    tracemalloc.start()
    try:
        assert GgufFile(path).tensors == {}
        assert tracemalloc.get_traced_memory()[1] < 2**19
    finally:
        tracemalloc.stop()
