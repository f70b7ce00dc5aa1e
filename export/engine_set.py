"""Builds the set of engines into a folder, and goes on where it was left.

A record in the folder says of each engine what it was made of. What is there and unchanged is not
built again, nor is its graph traced.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from wanrt import config, vae_sections, vae_shapes
from wanrt.engine.manifest import Input
from wanrt.errors import FormatError
from wanrt.export import onnx, trt
from wanrt.export.engines import LARGEST, Job, at_best, cards_for, fused, inputs_of
from wanrt.kernels import onnx_ops
from wanrt.models import layers
from wanrt.quant import formats

RECORDS = "engines.jsonl"
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")
_TRACING = ("part", "onnx", "dit", "vae", "encoders", "qdq", "rtx")


@dataclass(frozen=True)
class Record:
    """One engine of the set. `onnx` and `engine` are SHA-256; sizes and memory are bytes.

    usual: what of `workspace` is needed at the sizes of `at_best`.
    fused: whether attention is one kernel, None where there is none.
    recipe: a digest of what the engine was made of. sources: of what its graph was traced by, so
    that it need not be traced again.
    """

    model: str
    part: str
    precision: str
    card: int
    release: str
    recipe: str
    onnx: str
    engine: str
    size: int
    workspace: int
    usual: int
    seconds: float
    fused: bool | None
    reproducible: bool
    sources: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.model, self.part, self.precision, self.card

    @property
    def file(self) -> str:
        """Where the engine lies in the folder; its graph lies beside it."""
        return f"{self.model}/{self.precision}/{self.part}.sm{self.card}.engine"


def build_set(
    folder: Path, todo: Iterable[Job], report: Callable[[str], None], workers: int = 2
) -> list[Record]:
    """Engines, graphs and records in a folder; `workers` builders run beside the tracing.

    What is there and unchanged is kept. Peak: the graphs, which have no weights, and 0.3 GB for
    each builder. Raises what `trt.build` raises.
    """
    done, sources = _read(folder), source_digest()
    found: list[Record] = []
    traced = Traced()
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[Record]] = []
        for job in todo:
            kept = [
                done.get((job.model, job.part.name, job.precision, card))
                for card in cards_for(job.precision)
            ]
            if all(one and one.sources == sources and _holds(folder, one) for one in kept):
                found += [one for one in kept if one]
                continue
            model = traced.of(job)
            graph, inputs = onnx.serialise(model), inputs_of(model, job.part)
            for card, old in zip(cards_for(job.precision), kept, strict=True):
                work = _Work(folder, job, graph, inputs, card, sources)
                pending.append(pool.submit(work.record, old, report))
        found += [one.result() for one in pending]
    return found


class Traced:
    """The graph of the last job: the next one may differ in the ranges of its sizes alone."""

    def __init__(self) -> None:
        self._last: tuple[tuple[str, str, str], onnx.Model] | None = None

    def of(self, job: Job) -> onnx.Model:
        key = job.model, job.precision, job.part.graph or job.part.name
        if self._last is None or self._last[0] != key:
            self._last = key, job.trace()
        return self._last[1]


@dataclass(frozen=True)
class _Work:
    """One engine to build."""

    folder: Path
    job: Job
    graph: bytes
    inputs: tuple[Input, ...]
    card: int
    sources: str

    def record(self, old: Record | None, report: Callable[[str], None]) -> Record:
        """Build it, unless the old one was made of the same."""
        made_of = recipe(self.graph, self.inputs)
        if old and old.recipe == made_of and _holds(self.folder, old):
            built = replace(old, sources=self.sources)
        else:
            made = self._build(self.inputs)
            built = self._described(made, made_of)
            file = self.folder / built.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_name(f"{built.part}.onnx").write_bytes(self.graph)
            file.write_bytes(made.engine)
            report(
                f"{built.model} {built.part} {built.precision} sm{built.card}: {built.seconds} s"
            )
        with (self.folder / RECORDS).open("a") as file:
            file.write(json.dumps(asdict(built)) + "\n")
        return built

    def _described(self, made: trt.Built, made_of: str) -> Record:
        """Its record. Raises FormatError where attention is not one kernel."""
        job, fixed = self.job, made
        if any(one.opt != one.max for one in self.inputs):
            fixed = self._build(at_best(self.inputs))
        whole = fused(job.part, fixed)
        if whole is False:
            memory = f"it needs {fixed.workspace} bytes at the usual size"
            reason = f"its attention is not one kernel on sm{self.card}: {memory}"
            raise FormatError(f"{job.model} {job.part.name}", reason)
        return Record(
            model=job.model,
            part=job.part.name,
            precision=job.precision,
            card=self.card,
            release=made.release,
            recipe=made_of,
            onnx=hashlib.sha256(self.graph).hexdigest(),
            engine=hashlib.sha256(made.engine).hexdigest(),
            size=len(made.engine),
            workspace=made.workspace,
            usual=fixed.workspace,
            seconds=round(made.seconds, 2),
            fused=whole,
            reproducible=made.reproducible,
            sources=self.sources,
        )

    def _build(self, inputs: tuple[Input, ...]) -> trt.Built:
        return trt.build(self.job.part.name, self.graph, inputs, (self.card,))


def _read(folder: Path) -> dict[tuple[str, str, str, int], Record]:
    """The newest record of each engine."""
    path = folder / RECORDS
    rows = path.read_text().splitlines() if path.exists() else []
    records = (Record(**json.loads(row)) for row in rows)
    return {record.key: record for record in records}


def _holds(folder: Path, record: Record) -> bool:
    """Whether the file is there as it was written."""
    path = folder / record.file
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == record.engine


def release() -> str:
    """Of the builder that is installed."""
    return version("tensorrt-rtx-cu13")


def source_digest() -> str:
    """Of all that decides how graphs look: our sources and the versions of what traces them."""
    here = Path(__file__).parent
    shapes = (config, vae_sections, vae_shapes)
    files = [
        *(Path(str(module.__file__)) for module in shapes),
        *(here / f"{name}.py" for name in _TRACING),
    ]
    for module in (onnx_ops, formats, layers):
        files += sorted(Path(str(module.__file__)).parent.glob("*.py"))
    digest = hashlib.sha256(repr(LARGEST).encode())
    for name in _TOOLS:
        digest.update(f"{name} {version(name)}\n".encode())
    for file in files:
        digest.update(file.name.encode() + b"\n" + file.read_bytes())
    return digest.hexdigest()


def recipe(graph: bytes, inputs: tuple[Input, ...]) -> str:
    """A digest of all that an engine is made of, but for the card."""
    digest = hashlib.sha256(graph)
    digest.update(f"{inputs} {release()}\n".encode() + trt.CHILD.read_bytes())
    return digest.hexdigest()
