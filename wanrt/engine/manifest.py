"""What a bundle says of itself: the records of `manifest.json`, and the rules they keep.

Specification: docs/bundle.md. Every record is checked when it is made, by a writer as by a reader.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from wanrt.config import DitSpec, VaeSpec, WanSpec
from wanrt.engine.records import MAX_INTEGER, parse
from wanrt.errors import FormatError
from wanrt.weights.strict_json import parse_json

FORMAT = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"  # the two files that are not members
MAX_NAME, MAX_DEPTH = 128, 4  # characters and parts of a member's name

EngineKind = Literal["tensorrt-rtx", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8"]
DType = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int32", "int64", "bool"]

_BEGIN = b'{"engines":'  # the first key, by its name
_PART = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
_HASH = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})?")
_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")  # files of these names: not on Windows
_ENDINGS = {
    "engine": (".engine",),
    "graph": (".onnx",),
    "weights": (".safetensors",),
    "tokenizer": (".json", ".model"),
    "licence": (".txt",),
}


@dataclass(frozen=True)
class Member:
    """One file: lower-case name with `/`, bytes, SHA-256 in lower-case hexadecimal."""

    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        check_name(self.name)
        _require(0 <= self.size < MAX_INTEGER, f"{self.name} would have {self.size} bytes")
        _require(bool(_HASH.fullmatch(self.sha256)), f"{self.name}: sha256 is no SHA-256")


@dataclass(frozen=True)
class DitShape:
    """The numbers of a DitSpec that shapes depend on; image_dim 0 where there is no CLIP."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int
    text_len: int
    image_dim: int
    vace_layers: tuple[int, ...]


@dataclass(frozen=True)
class VaeShape:
    """The numbers of a VaeSpec that shapes depend on."""

    z_dim: int
    base_dim: int
    decoder_base_dim: int
    patch: int


@dataclass(frozen=True)
class Model:
    """Which model a bundle computes: its id, as in `config.MODELS`, and its shapes."""

    family: Literal["wan"]
    id: str
    dit: DitShape
    vae: VaeShape

    @classmethod
    def of(cls, spec: WanSpec) -> "Model":
        dit = DitShape(**_numbers(DitShape, spec.dit))
        return cls("wan", spec.id, dit, VaeShape(**_numbers(VaeShape, spec.vae)))


@dataclass(frozen=True)
class Input:
    """An input and the sizes it may have; `opt` is what an engine is built to be fastest at."""

    name: str
    dtype: DType
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = list(zip(self.min, self.opt, self.max, strict=False))
        ordered = all(low <= best <= high for low, best, high in sizes)
        same = len(self.min) == len(self.opt) == len(self.max)
        _require(ordered and same, f"input {self.name}: not min <= opt <= max in every dimension")


@dataclass(frozen=True)
class Graph:
    """An ONNX graph, such as one block of the transformer: its weights are inputs, or `embedded`.

    `precision` is that of its products.
    """

    name: str
    member: str
    precision: Precision
    embedded: bool
    opset: int
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class Engine:
    """A graph, built: for this release alone (as "1.7.1.116") and these cards (89 is 8.9)."""

    graph: str
    member: str
    kind: EngineKind
    release: str
    compute_capabilities: tuple[int, ...]
    workspace_bytes: int

    def __post_init__(self) -> None:
        _require(bool(self.compute_capabilities), f"engine {self.member} names no card")


@dataclass(frozen=True)
class Tool:
    """A program that took part in the build."""

    name: str
    version: str


@dataclass(frozen=True)
class Provenance:
    """The source: git's hash ("" where unknown), whether it had changes, tools sorted by name."""

    commit: str
    dirty: bool
    tools: tuple[Tool, ...]

    def __post_init__(self) -> None:
        _require(bool(_COMMIT.fullmatch(self.commit)), "commit is no git hash")
        _ascending((tool.name for tool in self.tools), "tools")


@dataclass(frozen=True)
class Licence:
    """The licence of some members: its SPDX identifier and the member that holds its text."""

    spdx: str
    member: str
    covers: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All of it. `weights` are names of members, and may be none; `tokenizer` is one or "".

    Raises ValueError where the parts do not fit each other: members, graphs and tools are sorted
    by name, every member has a use, every use a member, every engine a graph.
    """

    format: int
    model: Model
    graphs: tuple[Graph, ...]
    engines: tuple[Engine, ...]
    weights: tuple[str, ...]
    tokenizer: str
    licences: tuple[Licence, ...]
    provenance: Provenance
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        _require(self.format == FORMAT, f"format is {self.format}; this wanrt reads {FORMAT}")
        _ascending((member.name for member in self.members), "members")
        _ascending((graph.name for graph in self.graphs), "graphs")
        names = {member.name for member in self.members}
        folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
        own = {MANIFEST, SIGNATURE}
        for name in (names & (folders | own)) | (folders & own):
            raise ValueError(f"member {name} has the name of a folder or of the manifest")
        uses = list(self._uses())
        for role, name in uses:
            _require(name in names, f"{role} {name} is no member")
            endings = _ENDINGS[role]
            _require(name.endswith(endings), f"{role} {name}: not {' or '.join(endings)}")
        used = [name for role, name in uses if role != "licence"]
        _ascending(sorted(used), "uses of members")
        idle = names - {name for _, name in uses}
        _require(not idle, f"member {min(idle, default='')} is of no use")
        graphs = {graph.name for graph in self.graphs}
        for engine in self.engines:
            _require(engine.graph in graphs, f"engine {engine.member}: no graph {engine.graph!r}")
        for name in (name for licence in self.licences for name in licence.covers):
            _require(name in names, f"a licence covers {name}, which is no member")

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(sorted({graph.precision for graph in self.graphs}))

    def _uses(self) -> Iterator[tuple[str, str]]:
        yield from (("graph", graph.member) for graph in self.graphs)
        yield from (("engine", engine.member) for engine in self.engines)
        yield from (("weights", name) for name in self.weights)
        yield from (("tokenizer", name) for name in (self.tokenizer,) if name)
        yield from (("licence", licence.member) for licence in self.licences)


def is_bundle(path: Path) -> bool:
    """Whether a path looks like one: a zip, or a folder with a manifest in its canonical form."""
    if not path.is_dir():
        return path.suffix.lower() == ".zip"
    try:
        with open(path / MANIFEST, "rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """The manifest with this text. Raises FormatError, for another format by its number."""
    value = parse_json(path, raw, "manifest")
    found = value.get("format") if isinstance(value, dict) else None
    if type(found) is int and found != FORMAT:
        reason = f"has format {ascii(found)[:20]}; this wanrt reads format {FORMAT}"
        raise FormatError(path, reason, "get the bundle that was built for this version")
    return parse(Manifest, raw, path, "manifest")


def check_name(name: str) -> None:
    """Raises ValueError for a member's name that some system could take for another file."""
    parts = name.split("/")
    _require(len(name) <= MAX_NAME and len(parts) <= MAX_DEPTH, f"the name {name[:80]!r} is long")
    for part in parts:
        plain = _PART.fullmatch(part) and ".." not in part
        _require(
            bool(plain) and not _DEVICES.fullmatch(part.partition(".")[0]),
            f"the name {name[:80]!r} is not of a-z, 0-9, and . _ - within, joined by /",
        )


def _numbers(kind: type, spec: DitSpec | VaeSpec) -> dict[str, Any]:
    """The fields of `kind` as the spec has them; 0 for what the model does not have."""
    values = {field.name: getattr(spec, field.name) for field in fields(kind)}
    return {name: 0 if value is None else value for name, value in values.items()}


def _ascending(names: Iterable[str], what: str) -> None:
    listed = list(names)
    for name, after in zip(listed, listed[1:], strict=False):
        _require(name < after, f"{what} are not sorted, or {after[:80]!r} is there twice")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
