"""One view on stored tensors, whatever holds them: a file, shards with an index, or a folder."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from wanrt.errors import FormatError
from wanrt.weights.gguf_file import JOIN, GgufFile
from wanrt.weights.pickle_file import PickleFile
from wanrt.weights.safetensors_file import MAX_HEADER, SafetensorsFile, TensorInfo
from wanrt.weights.stretch import Stretch
from wanrt.weights.strict_json import parse_json

__all__ = ["Checkpoint", "TensorInfo", "is_weights", "weight_sets"]

File = SafetensorsFile | PickleFile | GgufFile

_READERS: dict[str, type[SafetensorsFile] | type[PickleFile] | type[GgufFile]] = {
    ".safetensors": SafetensorsFile,
    ".sft": SafetensorsFile,
    ".pth": PickleFile,
    ".pt": PickleFile,
    ".bin": PickleFile,
    ".gguf": GgufFile,
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


class Checkpoint:
    """Stored names, dtypes and shapes from headers alone, and tensors one at a time.

    `container` is "safetensors", "pickle", "gguf" or "shards". Nothing is translated: names are the
    file's, and numbers packed in blocks stay packed (`TensorInfo.packing`).
    """

    def __init__(
        self, path: Path, container: str, parts: dict[str, File], within: Stretch | None = None
    ) -> None:
        """`parts`: stored name -> the file that holds it."""
        self.path, self.container, self._parts, self.within = path, container, parts, within
        self.tensors: dict[str, TensorInfo] = {n: part.tensors[n] for n, part in parts.items()}
        self.metadata: dict[str, str] = {}
        for part in dict.fromkeys(parts.values()):
            self.metadata.update(part.metadata)

    @classmethod
    def open(cls, path: str | Path, within: Stretch | None = None) -> "Checkpoint":
        """path: a weight file, a `*.index.json`, or a folder with exactly one of either.

        within: the safetensors file is there, and `path` is what it is called.
        """
        path = Path(path)
        if within is not None:
            held = _opened(path, lambda: SafetensorsFile(path, within))
            return cls(path, held.container, dict.fromkeys(held.tensors, held), within)
        if not path.exists():
            raise FormatError(path, "no such file or folder")
        if path.is_dir():
            path = _only_set(path)
        if path.name.endswith(".index.json"):
            return cls(path, "shards", _open_shards(path))
        part = _open_file(path)
        return cls(path, part.container, dict.fromkeys(part.tensors, part))

    def read(self, name: str, rows: range | None = None, buffer: Tensor | None = None) -> Tensor:
        """The stored tensor, or these rows of it (step 1), in fresh memory.

        `buffer`: uint8 memory to use instead, where it is large enough. A packed tensor comes as
        uint8 [rows, bytes of a row].
        """
        return self._parts[name].read(name, rows, buffer)


def is_weights(path: Path) -> bool:
    """Whether a file name says that Checkpoint can open it."""
    return path.suffix in _READERS or path.name.endswith(".index.json")


def weight_sets(folder: Path) -> list[Path]:
    """What Checkpoint.open takes directly in this folder: indexes, and files that are no shards."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and is_weights(p))
    return [p for p in files if not _SHARD.search(p.name)]


def _only_set(folder: Path) -> Path:
    found = weight_sets(folder)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found[:5])
        raise FormatError(
            folder, f"holds {len(found)} sets of weights: {names}", "name one of them"
        )
    shards = [p for p in folder.iterdir() if _SHARD.search(p.name)]
    if any(p.suffix == ".gguf" for p in shards):
        raise FormatError(folder, "holds the parts of a split GGUF file", JOIN)
    if shards:
        raise FormatError(folder, "holds shards without their index", "add the .index.json file")
    raise FormatError(folder, "holds no weights", "expected .safetensors, an index, .gguf or .pth")


def _open_file(path: Path) -> File:
    reader = _READERS.get(path.suffix)
    if reader is not None:
        return _opened(path, lambda: reader(path))
    known = ", ".join((*_READERS, ".index.json"))
    raise FormatError(
        path, f"{path.suffix or 'a file without ending'} is unknown", f"known: {known}"
    )


def _opened(path: Path, read: Callable[[], File]) -> File:
    try:
        return read()
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror}") from None


def _open_shards(index: Path) -> dict[str, File]:
    """Read an index ({"weight_map": {tensor: file}}) and the header of every file it names."""
    if index.stat().st_size > MAX_HEADER:
        raise FormatError(index, f"the index is larger than {MAX_HEADER} bytes")
    content = parse_json(index, index.read_bytes(), "index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(index, "the index has no weight_map")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(index, "the weight_map holds something else than file names")
    files = _shard_paths(index, dict.fromkeys(weight_map.values()))
    shards = {file: _open_file(path) for file, path in files.items()}
    lost = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if lost:
        reason = f"{len(lost)} tensors are not in the shard the index names: {', '.join(lost[:5])}"
        raise FormatError(index, reason, "download index and shards of one revision")
    order = (name for shard in shards.values() for name in shard.tensors)
    return {name: shards[weight_map[name]] for name in order if name in weight_map}


def _shard_paths(index: Path, files: Iterable[str]) -> dict[str, Path]:
    """Shards lie beside their index; a link may leave the folder only for the hub cache's blobs."""
    folder = index.parent.resolve()
    allowed = {folder}
    allowed.update(p.parent / "blobs" for p in folder.parents if p.name == "snapshots")
    paths: dict[str, Path] = {}
    for file in files:
        if Path(file).name != file or file == ".." or "\\" in file:
            raise FormatError(index, f"the index names {file[:80]!r}, outside its own folder")
        path = folder / file
        if not path.is_file():
            raise FormatError(index, f"the shard {file} is missing", "download it beside the index")
        if path.resolve().parent not in allowed:
            raise FormatError(
                index, f"the shard {file} is a link to {path.resolve()}", "copy it here"
            )
        paths[file] = path
    return paths
