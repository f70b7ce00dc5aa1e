"""From a model to a bundle: its parts traced, quantised, given their weights, signed.

What is finished waits in a folder beside the bundle, so that an export that was stopped goes on
where it was. Peak: the largest tensor, or with embedded weights one block and its graph.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor

from wanrt.config import WanSpec
from wanrt.engine import bundle as bundles
from wanrt.engine.manifest import FORMAT, Engine, Graph, Licence, Manifest, Model, Precision
from wanrt.engine.trust import Signer
from wanrt.errors import UsageError
from wanrt.export import dit, encoders, onnx, qdq, vae
from wanrt.export.engine_set import build_set, source_digest
from wanrt.export.engines import Job, cards_for, inputs_of, jobs_of
from wanrt.export.part import DTYPES
from wanrt.export.source import licence_text, provenance
from wanrt.quant.policy import EightBit
from wanrt.weights.contents import Weights
from wanrt.weights.load import skeleton
from wanrt.weights.names import Kind
from wanrt.weights.parts import Parts
from wanrt.weights.quantize import rewrite_model

Progress = Callable[[str, int, int], None]  # what, done, total
_TEXT: dict[Precision, Precision] = {"fp16": "fp32"}  # umT5 overflows in fp16
_LICENCE = "licences/apache-2.0.txt"


@dataclass(frozen=True)
class Order:
    """What to export. `parts` None: graphs alone, of a released model that need not be here.

    `plain` is the precision of what is not quantised, `eight_bit` that of the blocks' products.
    `embed`: weights are within the graphs; else they lie beside them, unless `weights` is false.
    `engines`: those of TensorRT-RTX, with their graphs; else the graphs that ONNX Runtime runs, of
    every part, blocks and steps whole.
    """

    spec: WanSpec
    parts: Parts | None
    plain: Precision
    eight_bit: EightBit | None = None
    embed: bool = False
    weights: bool = True
    engines: bool = False

    def __post_init__(self) -> None:
        assert self.parts is not None or not (self.embed or self.weights), f"{self=}"
        if self.embed and self.spec.boundary is not None:
            raise UsageError("--embed takes the weights of one transformer; this model has two")
        if self.engines and self.embed:
            raise UsageError("engines of TensorRT-RTX take weights as inputs; leave --embed out")
        if self.engines and self.plain == "fp32":
            raise UsageError(
                "TensorRT-RTX has no attention in fp32; choose --precision bf16, fp16, int8 or fp8"
            )

    @property
    def key(self) -> str:
        """What finished files depend on."""
        told = {"spec": asdict(self.spec), "plain": self.plain, "eight_bit": self.eight_bit}
        told |= {"embed": self.embed, "engines": self.engines, "source": source_digest()}
        found = {} if self.parts is None else self.parts.found
        told["files"] = {name: _stamp(one.path) for name, one in found.items()}
        return json.dumps(told, sort_keys=True, default=str)


def _stamp(path: Path) -> list[object]:
    """What tells a file, or the shards beside an index, from what was there before."""
    files = sorted(path.parent.glob("*.safetensors")) if path.suffix == ".json" else []
    states = [file.stat() for file in (path, *files)]
    return [str(path.resolve()), [(state.st_size, state.st_mtime_ns) for state in states]]


def export(order: Order, out: Path, signer: Signer, progress: Progress) -> Manifest:
    """Write the bundle `out`, a zip where the name ends so. Returns what it says of itself.

    Raises FormatError for the model's files, OutputError where something is in the way.
    """
    work = _work_folder(order, out)
    made = (
        _build_engines(order, work, progress) if order.engines else _export(order, work, progress)
    )
    _write_weights(order, work / "weights", progress)
    contents: dict[str, bytes | Path] = {_LICENCE: licence_text(), **made.files}
    contents |= {f"weights/{path.name}": path for path in sorted((work / "weights").glob("*"))}
    weights = tuple(sorted(name for name in contents if name.endswith(".safetensors")))
    beside = (n for n in contents if n.startswith("weights/") and n not in weights)
    manifest = Manifest(
        format=FORMAT,
        model=Model.of(order.spec),
        graphs=tuple(sorted(made.graphs, key=lambda graph: graph.name)),
        engines=tuple(sorted(made.engines, key=lambda engine: engine.member)),
        weights=weights,
        tokenizer=next(beside, ""),
        licences=(Licence("Apache-2.0", _LICENCE, tuple(g.member for g in made.graphs)),),
        provenance=provenance(),
        members=bundles.members_of(contents),
    )
    bundles.write(out, manifest, contents, signer)
    shutil.rmtree(work)
    return manifest


class _Made(NamedTuple):
    """What goes into a bundle beside weights; files by the names of members."""

    graphs: list[Graph]
    engines: list[Engine]
    files: dict[str, Path]


def _export(order: Order, work: Path, progress: Progress) -> _Made:
    """Graphs for ONNX Runtime."""
    wanted, graphs = list(wanted_graphs(order)), []
    for i, one in enumerate(wanted):
        progress(f"export {one.part.name}", i, len(wanted))
        graphs += list(_write_graphs(order, one, work / "onnx"))
    progress("export", len(wanted), len(wanted))
    return _Made(graphs, [], {g.member: work / g.member for g in graphs})


def _build_engines(order: Order, work: Path, progress: Progress) -> _Made:
    """Engines of TensorRT-RTX, and the graphs that they were built from."""
    todo = list(jobs_of(order.spec.id, order.spec, order.plain, order.eight_bit))
    built, total = 0, sum(len(cards_for(job.precision)) for job in todo)

    def report(line: str) -> None:
        nonlocal built
        built += 1
        progress("build engines", built, total)

    records = build_set(work / "engines", todo, report)
    made = _Made([], [], {})
    jobs = {job.part.name: job for job in todo}
    for record in records:
        engine = f"engines/{record.part}.sm{record.card}.engine"
        made.files[engine] = work / "engines" / record.file
        cards, memory = (record.card,), record.workspace
        made.engines.append(
            Engine(record.part, engine, "tensorrt-rtx", record.release, cards, memory)
        )
        graph = f"onnx/{record.part}.onnx"
        if graph not in made.files:
            made.files[graph] = (work / "engines" / record.file).with_name(f"{record.part}.onnx")
            made.graphs.append(_record(made.files[graph], graph, jobs[record.part], False))
    return made


def _write_weights(order: Order, folder: Path, progress: Progress) -> None:
    """The model's weights and tokenizer; of embedded weights the tokenizer alone."""
    if order.parts is None or not order.weights:
        return
    if not order.embed:
        asked = (order.parts, order.spec.id, folder, order.eight_bit, progress)
        for _ in rewrite_model(*asked, plain_vae=True):  # its graphs have plain convolutions
            pass
    elif order.parts.tokenizer is not None:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(order.parts.tokenizer, folder / order.parts.tokenizer.name)


def wanted_graphs(order: Order) -> Iterator[Job]:
    """Every graph that ONNX Runtime wants of a model, in the order of a request."""
    spec, there = order.spec, None if order.parts is None else order.parts.found
    name, plain, dtype = spec.id, order.plain, DTYPES[order.plain]
    text = _TEXT.get(plain, plain)
    if there is None or "umt5" in there:
        encoder = encoders.empty_umt5(spec.umt5, DTYPES[text])
        yield from (Job(name, text, part) for part in encoders.umt5_parts(encoder, DTYPES[text]))
    if spec.clip is not None and (there is None or "clip" in there):
        tower = encoders.empty_clip(spec.clip, dtype)
        yield from (Job(name, plain, part) for part in encoders.clip_parts(tower, dtype))
    transformer = dit.empty(spec.dit, dtype)
    for part in dit.parts(transformer, dtype):
        if part.name not in ("dit.pre", "dit.post"):
            formats = dit.formats(transformer, part, order.eight_bit) if order.eight_bit else {}
            yield Job(name, order.eight_bit if formats else plain, part, formats)
    if there is None or "vae" in there:
        parts = vae.parts(vae.empty(spec.vae, dtype), dtype)
        yield from (Job(name, plain, part) for part in parts if not vae.is_section(part))


def _work_folder(order: Order, out: Path) -> Path:
    """Where finished files wait; emptied where they are of another order."""
    work = out.with_name(f".{out.name}.part")
    note, key = work / "order.json", order.key
    if work.exists() and (not note.exists() or note.read_text() != key):
        shutil.rmtree(work)
    (work / "onnx").mkdir(parents=True, exist_ok=True)
    note.write_text(key)
    return work


def _write_graphs(order: Order, wanted: Job, folder: Path) -> Iterator[Graph]:
    """The files of one part: one, or with embedded weights one for each of its homes."""
    part = wanted.part
    indices = range(len(part.homes)) if order.embed else [None]
    names = {i: part.name if i is None else part.name_at(i) for i in indices}
    model: onnx.Model | None = None
    for i, name in names.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            model = model or _trace(wanted)
            held = model if i is None else onnx.embed(model, _weights_of(order, wanted, model, i))
            partial = path.with_suffix(".part")
            partial.write_bytes(onnx.serialise(held))
            partial.replace(path)
        yield _record(path, f"onnx/{path.name}", wanted, order.embed)


def _trace(wanted: Job) -> onnx.Model:
    model = onnx.trace(wanted.part)
    return qdq.quantise(model, wanted.formats) if wanted.formats else model


def _weights_of(order: Order, wanted: Job, model: onnx.Model, index: int) -> dict[str, Tensor]:
    """What a graph's inputs are in one of the modules that it serves."""
    assert order.parts is not None
    kind = cast(Kind, wanted.part.name.partition(".")[0])
    found = order.parts.found[kind]
    dtype = DTYPES.get(wanted.precision, DTYPES[order.plain])
    weights = Weights(skeleton(kind, found.spec), found, dtype, check=True)
    home = wanted.part.homes[index]
    prefix = f"{home}." if home else ""
    weights.formats = {prefix + name: form for name, form in wanted.formats.items()}
    names = {f"{prefix}{value.name}": value.name for value in model.graph.inputs}
    return {names[name]: weights.read(name) for name in weights.names() if name in names}


def _record(path: Path, member: str, wanted: Job, embedded: bool) -> Graph:
    """What the manifest says of a finished graph."""
    inputs = inputs_of(onnx.parse(path.read_bytes()), wanted.part)
    name = Path(member).name.removesuffix(".onnx")
    return Graph(name, member, wanted.precision, embedded, onnx.OPSET, inputs)
