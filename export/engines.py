"""The set of engines: which parts of which models become engines of TensorRT-RTX, and for whom.

An engine has no weights in it: they are inputs. So one engine serves every block of a model and
every checkpoint of its shape, and the set is a few megabytes per model. Engines are built for one
card each: one that is to run on several has the memory of the neediest.

`build_set` goes on where it was left: a record in the folder says what each engine was made of.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from wanrt import config
from wanrt.config import MODELS, NANO, VAE_2_1, VAE_2_2
from wanrt.engine.manifest import Input, Precision
from wanrt.errors import FormatError
from wanrt.export import dit, onnx, rtx, trt, vae
from wanrt.export.part import Axis, Part
from wanrt.kernels import onnx_ops
from wanrt.models import layers
from wanrt.quant import formats

VAES = {"vae-2.1": VAE_2_1, "vae-2.2": VAE_2_2}
IDS = (
    "nano",
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "wan2.1-i2v-14b-480p",
    "wan2.2-ti2v-5b",
    *VAES,
)
CARDS: dict[Precision, tuple[int, ...]] = {"bf16": (86, 89, 120)}
# The largest sizes of an engine, where a graph leaves more open: 81 frames of 1280x720 have 75600
# tokens (TI2V: 31 latent frames).
LARGEST = {"L": 75600, "T": 31, "rows": 80, "columns": 80}
RECORDS = "engines.jsonl"
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")
_TRACING = ("part", "onnx", "dit", "vae", "rtx")
_BF16 = torch.bfloat16
_SCORE = 2  # bytes of a score in bf16
_DTYPES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT8: "int8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class Record:
    """One engine of the set. `onnx` and `engine` are SHA-256; sizes and memory are bytes.

    usual: what of `workspace` is needed at the sizes of `at_best`.
    fused: whether attention is one kernel, None where there is none.
    recipe: a digest of what the engine was made of. sources: of what the graph was traced by, so that it need not be traced again.
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


@dataclass(frozen=True)
class Job:
    """A part of a model in a precision."""

    model: str
    precision: Precision
    part: Part

    def trace(self) -> ir.Model:
        """Its graph, as the builder takes it."""
        return rtx.spared(onnx.trace(self.part))


def jobs(models: Iterable[str] = IDS, precisions: Iterable[str] = tuple(CARDS)) -> Iterator[Job]:
    """All that are to be built, in the order of the table."""
    wanted = [precision for precision in CARDS if precision in set(precisions)]
    for model in models:
        for part in _parts(model):
            if "bf16" in wanted:
                yield Job(model, "bf16", part)


def _parts(model: str) -> Iterator[Part]:
    """The graphs of a transformer or of a VAE; nano has both, as it is alone with its own."""
    if model in VAES or model == "nano":
        yield from vae.parts(vae.empty(VAES.get(model, NANO.vae), _BF16), _BF16)
    if model in MODELS:
        empty = dit.empty(MODELS[model].dit, _BF16)
        yield dit.attention(empty, _BF16)
        yield from dit.parts(empty, _BF16)


def inputs_of(model: ir.Model, part: Part) -> tuple[Input, ...]:
    """The records of a graph's inputs, weights among them, with the ranges of an engine."""
    open_ = {value.name: value for value in part.inputs}

    def record(value: ir.Value) -> Input:
        assert value.name and value.shape is not None and value.dtype, f"{value=}"
        dtype = _DTYPES[value.dtype]
        if value.name not in open_:
            shape = tuple(int(size) for size in value.shape)
            return Input(value.name, dtype, shape, shape, shape)
        at = open_[value.name].at
        return Input(value.name, dtype, at(lambda axis: axis.min), at(_best), at(_largest))

    return tuple(record(value) for value in model.graph.inputs)


def _largest(axis: Axis) -> int:
    return min(axis.max, LARGEST.get(axis.name, axis.max))


def _best(axis: Axis) -> int:
    return min(axis.opt, _largest(axis))


def at_best(inputs: Iterable[Input]) -> tuple[Input, ...]:
    """The same inputs with nothing left open: each has the sizes that it is to be fastest at."""
    return tuple(replace(one, min=one.opt, max=one.opt) for one in inputs)


def fused(part: Part, fixed: trt.Built) -> bool | None:
    """Whether attention is one kernel; None where there is no attention.

    The builder refuses an Attention node for which it has none. Where the tokens of a clip attend
    to each other the memory has to show it too: the scores of a single head would be L * L numbers.
    `fixed` has the sizes of `at_best`: where sizes are open, the builder does not count a tensor
    that is too large for it.
    """
    if not fixed.attentions and not attends(part):
        return None
    return not attends(part) or fixed.workspace < _best(dit.TOKENS) ** 2 * _SCORE


def attends(part: Part) -> bool:
    """Whether the tokens of a clip attend to each other in it."""
    return any(axis == dit.TOKENS for value in part.inputs for axis in value.shape)


def build_set(
    folder: Path, todo: Iterable[Job], report: Callable[[str], None], workers: int = 2
) -> list[Record]:
    """Engines, graphs and records in a folder; `workers` builders run beside the tracing.

    What is there and unchanged is kept. Peak: the graphs, which have no weights, and 0.3 GB for
    each builder. Raises what `trt.build` raises.
    """
    done, sources = _read(folder), source_digest()
    found: list[Record] = []
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[Record]] = []
        for job in todo:
            kept = [
                done.get((job.model, job.part.name, job.precision, card))
                for card in CARDS[job.precision]
            ]
            if all(one and one.sources == sources and _holds(folder, one) for one in kept):
                found += [one for one in kept if one]
                continue
            model = job.trace()
            graph, inputs = onnx.serialise(model), inputs_of(model, job.part)
            for card, old in zip(CARDS[job.precision], kept, strict=True):
                work = _Work(folder, job, graph, inputs, card, sources)
                pending.append(pool.submit(work.record, old, report))
        found += [one.result() for one in pending]
    return found


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
            memory = f"it needs {fixed.workspace} bytes at {_best(dit.TOKENS)} tokens"
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
    files = [Path(str(config.__file__)), *(here / f"{name}.py" for name in _TRACING)]
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
