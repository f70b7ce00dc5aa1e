"""Weight files written one tensor at a time: safetensors, shards with an index, and `.pth`."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanrt.errors import OutputError
from wanrt.weights.safetensors_file import DTYPES, TensorInfo

MAX_SHARD = 10 * 10**9  # bytes, about what the releases use
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """A tensor to be written: its header entry now, its values when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return TensorInfo(self.dtype, self.shape, Path()).num_bytes


def write_safetensors(path: Path, pieces: Sequence[Piece]) -> None:
    """Peak: one tensor. Raises OutputError and leaves no partial file."""
    with _new_file(path), open(path, "xb") as file:
        file.write(_header(pieces, {"format": "pt"}))
        for piece in pieces:
            file.write(_bytes(piece))


def write_resumable(
    path: Path,
    pieces: Sequence[Piece],
    metadata: dict[str, str],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """As `write_safetensors`, under `path.part` until complete; goes on where it was stopped.

    Whole tensors of an unfinished file are kept if its header is the same. A file of this name that
    is there already is left alone if it has that header and length. Raises OutputError.
    `progress` is called with the bytes of each tensor that is there.
    """
    header = _header(pieces, {"format": "pt", **metadata})
    total = len(header) + sum(piece.num_bytes for piece in pieces)
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            if path.stat().st_size != total or not _begins(path, header):
                raise OutputError(f"{path} is another file; choose another folder")
            progress(total - len(header))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (part.exists() and _begins(part, header)):
            part.write_bytes(header)
        with open(part, "r+b") as file:
            position, there = len(header), part.stat().st_size
            for piece in pieces:
                if position + piece.num_bytes > there:
                    file.seek(position)
                    file.write(_bytes(piece))
                    there = 0  # whatever follows belongs to an older attempt
                position += piece.num_bytes
                progress(piece.num_bytes)
            file.truncate(total)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None


def _begins(path: Path, header: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _header(pieces: Sequence[Piece], metadata: dict[str, str]) -> bytes:
    """Length, names, dtypes, shapes and places of all tensors, as safetensors has it."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for piece in pieces:
        end = position + piece.num_bytes
        header[piece.name] = {
            "dtype": _DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(piece: Piece) -> memoryview:
    return memoryview(_values(piece).view(-1).view(torch.uint8).numpy())


def write_sharded(path: Path, pieces: Sequence[Piece], max_shard: int = MAX_SHARD) -> None:
    """One file, or `NAME-0000k-of-0000n.safetensors` and their index, as the releases have it."""
    shards: list[list[Piece]] = [[]]
    room = max_shard
    for piece in pieces:
        if shards[-1] and piece.num_bytes > room:
            shards.append([])
            room = max_shard
        shards[-1].append(piece)
        room -= piece.num_bytes
    if len(shards) == 1:
        return write_safetensors(path, pieces)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{path.stem}-{i:05d}-of-{len(shards):05d}{path.suffix}"
        write_safetensors(path.with_name(name), shard)
        weight_map.update(dict.fromkeys((piece.name for piece in shard), name))
    total = sum(piece.num_bytes for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path.with_name(f"{path.name}.index.json"), index)


def write_pickle(path: Path, pieces: Sequence[Piece]) -> None:
    """A state dict as torch.save writes it. Peak: one tensor; the rest waits in a scratch file."""
    with _new_file(path), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        files = (Path(folder) / str(i) for i in range(len(pieces)))
        state = {p.name: _on_disk(p, file) for p, file in zip(pieces, files, strict=True)}
        with open(path, "xb") as file:
            torch.save(state, file)
        state.clear()  # unmaps the files, without which Windows could not remove them


def check_space(out: Path, needed: int) -> None:
    """Raises OutputError where `needed` bytes do not fit below the folder `out`."""
    root = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(root).free
    if needed > free:
        gib = 2**30
        raise OutputError(f"{out}: needs {needed / gib:.1f} GiB, {free / gib:.1f} GiB are free")


def _on_disk(piece: Piece, file: Path) -> Tensor:
    """The piece's values in memory that is this file's."""
    numel = TensorInfo(piece.dtype, piece.shape, file).numel
    mapped = torch.from_file(str(file), shared=True, size=numel, dtype=piece.dtype)
    return mapped.view(piece.shape).copy_(_values(piece))


def write_json(path: Path, content: dict[str, object]) -> None:
    with _new_file(path), open(path, "x", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


def _values(piece: Piece) -> Tensor:
    tensor = piece.make()
    assert tuple(tensor.shape) == piece.shape, f"{piece.name}: {tensor.shape=} {piece.shape=}"
    assert tensor.dtype == piece.dtype, f"{piece.name}: {tensor.dtype=} {piece.dtype=}"
    return tensor.contiguous()


@contextmanager
def _new_file(path: Path) -> Iterator[None]:
    """Never overwrites, and removes what a failed write has left."""
    if path.exists():
        raise OutputError(f"{path} is already there; choose another folder")
    done = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        done = True
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if not done:
            path.unlink(missing_ok=True)
