"""Containers: every dtype is read bit for bit, every damaged or hostile file refused in words."""

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wanrt.errors import FormatError
from wanrt.weights.checkpoint import Checkpoint, weight_sets

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def packed(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of this header (bytes, text, or anything JSON can say) and data."""
    if not isinstance(header, bytes | str):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: object) -> dict[str, object]:
    return {"a": F32 | changes}


def two(first: list[int], second: list[int]) -> dict[str, object]:
    return {name: F32 | {"data_offsets": o} for name, o in (("a", first), ("b", second))}


HOSTILE = {
    "empty file": (b"", "too few"),
    "shorter than its length field": (b"\x10\0\0", "too few"),
    "header cut": (packed(entry(), b"\0" * 8)[:30], "truncated"),
    "tensor bytes cut": (packed(entry(), b"\0" * 7), "truncated"),
    "extra bytes": (packed(entry(), b"\0" * 9), "follow the last tensor"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}" * 20, "limit"),
    "garbage": (bytes(range(1, 200)), "limit"),
    "text": (b"hello, this is not a model at all", "limit"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "not valid"),
    "not JSON": (packed("{'a': 1}"), "not valid"),
    "no header at all": (packed("") + b"  ", "not valid"),
    "a list": (packed([1, 2]), "no table"),
    "deep nesting": (packed('{"a":' + "[" * 200_000), "nested"),
    "duplicate key": (packed('{"a":%s,"a":%s}' % ((json.dumps(F32),) * 2), b"\0" * 8), "twice"),
    "duplicate field": (packed('{"a":{"dtype":"F32","dtype":"I8"}}'), "twice"),
    "unknown dtype": (packed(entry(dtype="Q4_K"), b"\0" * 8), "Q4_K"),
    "dtype no string": (packed(entry(dtype=["F32"]), b"\0" * 8), "dtype"),
    "negative size": (packed(entry(shape=[-2]), b"\0" * 8), "shape"),
    "fractional size": (packed(entry(shape=[2.0]), b"\0" * 8), "shape"),
    "true as a size": (packed(entry(shape=[True]), b"\0" * 8), "shape"),
    "overflowing shape": (packed(entry(shape=[2**62, 2**62]), b"\0" * 8), "range holds"),
    "shape beyond int64": (packed(entry(shape=[2**64]), b"\0" * 8), "shape"),
    "number of 5000 digits": (packed('{"a":{"shape":[' + "9" * 5000 + "]}}"), "not valid"),
    "nine dimensions": (packed(entry(shape=[1] * 8 + [2]), b"\0" * 8), "shape"),
    "shape against range": (packed(entry(shape=[3]), b"\0" * 8), "range holds"),
    "reversed range": (packed(entry(shape=[0], data_offsets=[8, 0]), b"\0" * 8), "range holds"),
    "three offsets": (packed(entry(data_offsets=[0, 4, 8]), b"\0" * 8), "byte range"),
    "missing field": (packed({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "data_offsets"),
    "extra field": (packed(entry(code="x"), b"\0" * 8), "is not"),
    "overlap": (packed(two([0, 8], [4, 12]), b"\0" * 12), "overlap"),
    "same bytes twice": (packed(two([0, 8], [0, 8]), b"\0" * 8), "overlap"),
    "hole": (packed(two([0, 8], [12, 20]), b"\0" * 20), "hole"),
    "hole at the start": (packed(entry(data_offsets=[4, 12]), b"\0" * 12), "hole"),
    "metadata no table": (packed({"__metadata__": [1]}), "__metadata__"),
    "metadata no strings": (packed({"__metadata__": {"a": {"b": 1}}}), "__metadata__"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "pickle under a wrong name": (b"PK\x03\x04" + b"\0" * 60, "zip"),
    "GGUF under a wrong name": (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(case: str, tmp_path: Path) -> None:
    content, word = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=word) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(caught.value.reason) < 300


def test_a_sound_file_is_the_base_of_the_hostile_ones(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(packed(entry(), struct.pack("<2f", 1.5, -2.0)))
    assert Checkpoint.open(tmp_path).read("a").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("num_tensors", [400_000, 60_000], ids=["23 MB", "below the size limit"])
def test_header_bomb_costs_nothing(num_tensors: int, tmp_path: Path) -> None:
    """Empty tensors are legal one by one; refused without parsing: CPU time and memory stay low."""
    item = '"t%06d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(packed("{" + ",".join(item % i for i in range(num_tensors)) + "}"))
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FormatError, match="limit|more than 20000"):
        Checkpoint.open(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 10 * 2**20


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    cut=st.integers(),
)
def test_damaged_files_raise_nothing_but_format_error(
    edits: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    content = bytearray(packed({"__metadata__": {"k": "v"}} | two([0, 8], [8, 16]), b"\1" * 16))
    for at, value in edits:
        content[at % len(content)] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content[: cut % 200 + 1])
    try:
        checkpoint = Checkpoint.open(path)
    except FormatError:
        return
    for name, info in checkpoint.tensors.items():
        assert checkpoint.read(name).shape == info.shape


def samples() -> dict[str, torch.Tensor]:
    """One tensor of every stored dtype, a scalar, an empty one, and one of an odd length."""
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    floats += (torch.float8_e4m3fn, torch.float8_e5m2)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): numbers.to(dtype) for dtype in floats}
    tensors |= {str(dtype): (numbers.abs() * 9).to(dtype) for dtype in integers}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": torch.arange(7).to(torch.int8),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def as_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "m.safetensors", metadata={"format": "pt"})
    return folder / "m.safetensors"


def as_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    names = list(tensors)
    weight_map = {}
    for i in range(3):
        file = f"m-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "m.safetensors.index.json"


def as_pickle(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "m.pth")
    return folder / "m.pth"


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Path]] = {
    "safetensors": as_safetensors,
    "shards": as_shards,
    "pickle": as_pickle,
}


@pytest.mark.parametrize("through_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("container", WRITERS)
def test_every_dtype_is_read_bit_for_bit(
    container: str, through_folder: bool, tmp_path: Path
) -> None:
    """Oracle: the safetensors package and torch.save have written the files."""
    expected = samples()
    path = WRITERS[container](tmp_path, expected)
    checkpoint = Checkpoint.open(tmp_path if through_folder else path)
    assert checkpoint.container == container
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert info.num_bytes == tensor.numel() * tensor.element_size()
        assert same_bits(checkpoint.read(name), tensor)


def test_metadata(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"format": "pt", "x": "ü"}
    )
    assert Checkpoint.open(tmp_path).metadata == {"format": "pt", "x": "ü"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_reading_leaves_nothing_mapped(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(as_safetensors(tmp_path, samples()))
    kept = checkpoint.read("torch.float32")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    os.truncate(tmp_path / "m.safetensors", 0)
    assert same_bits(kept, samples()["torch.float32"])


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = as_safetensors(tmp_path, {"a": torch.zeros(1000), "b": torch.ones(1000)})
    checkpoint = Checkpoint.open(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match="ended while b was being read"):
        checkpoint.read("b")


def edit_index(folder: Path, **changes: object) -> Path:
    path = as_shards(folder, samples())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_missing_shard(tmp_path: Path) -> None:
    path = as_shards(tmp_path, samples())
    (tmp_path / "m-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match="m-00002-of-00003.safetensors is missing"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "file", ["../m.safetensors", "/etc/passwd", "sub/m.safetensors", "..", "a\\b"]
)
def test_index_may_not_point_elsewhere(file: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    as_safetensors(tmp_path, samples())
    with pytest.raises(FormatError, match="outside its own folder"):
        Checkpoint.open(edit_index(inner, weight_map={"scalar": file}))


def test_shard_that_links_outside(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    target = as_safetensors(tmp_path, samples())
    (inner / "linked.safetensors").symlink_to(target)
    with pytest.raises(FormatError, match="is a link to"):
        Checkpoint.open(edit_index(inner, weight_map={"scalar": "linked.safetensors"}))


def test_hub_cache_links_are_allowed(tmp_path: Path) -> None:
    """The cache keeps snapshots/REVISION/FILE as links to blobs/HASH."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "transformer"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    as_shards(blobs, samples())
    for i, blob in enumerate(sorted(blobs.iterdir())):
        (snapshot / blob.name).symlink_to(blob.rename(blobs / f"hash{i}"))
    checkpoint = Checkpoint.open(snapshot)
    assert same_bits(checkpoint.read("torch.int8"), samples()["torch.int8"])


INDEXES = {
    "no weight_map": ("{}", "no weight_map"),
    "weight_map a list": ('{"weight_map": ["a"]}', "no weight_map"),
    "files no strings": ('{"weight_map": {"a": 1}}', "something else"),
    "duplicate tensor": ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
    "garbage": ("\0\1\2", "not valid"),
    "deep": ('{"weight_map":' + "[" * 200_000, "nested"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_index(case: str, tmp_path: Path) -> None:
    text, word = INDEXES[case]
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=word):
        Checkpoint.open(tmp_path)


def test_index_of_another_revision(tmp_path: Path) -> None:
    path = edit_index(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"]["new.weight"] = "m-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match="new.weight"):
        Checkpoint.open(path)


def test_folders_need_exactly_one_set(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no weights"):
        Checkpoint.open(tmp_path)
    as_shards(tmp_path, samples())
    assert [path.name for path in weight_sets(tmp_path)] == ["m.safetensors.index.json"]
    (tmp_path / "m.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="shards without their index"):
        Checkpoint.open(tmp_path)
    as_pickle(tmp_path, samples())
    as_safetensors(tmp_path, samples())
    with pytest.raises(FormatError, match="2 sets of weights: m.pth, m.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "word"),
    [("missing.safetensors", "no such file"), ("model.ckpt", "unknown"), ("model", "unknown")],
)
def test_paths_that_are_no_weights(name: str, word: str, tmp_path: Path) -> None:
    if word == "unknown":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError, match=word):
        Checkpoint.open(tmp_path / name)
