"""From a model to a bundle: its parts traced, quantised, given their weights, signed.

What is finished waits in a folder beside the bundle, so that an export that was stopped goes on
where it was. Peak: the largest tensor, or with embedded weights one block and its graph.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wanrt.config import WanSpec
from wanrt.engine import bundle as bundles
from wanrt.engine.manifest import FORMAT, Graph, Input, Licence, Manifest, Model, Precision
from wanrt.engine.trust import Signer
from wanrt.errors import UsageError
from wanrt.export import dit, encoders, onnx, qdq, vae
from wanrt.export.part import Part
from wanrt.export.source import licence_text, provenance
from wanrt.quant.formats import LinearFormat
from wanrt.quant.policy import EightBit
from wanrt.weights.contents import Weights
from wanrt.weights.load import skeleton
from wanrt.weights.names import Kind
from wanrt.weights.parts import Parts
from wanrt.weights.quantize import rewrite_model

Progress = Callable[[str, int, int], None]  # what, done, total
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_TEXT: dict[Precision, Precision] = {"fp16": "fp32"}  # umT5 overflows in fp16
_LICENCE = "licences/apache-2.0.txt"


@dataclass(frozen=True)
class Order:
    """What to export. `parts` None: graphs alone, of a released model that need not be here.

    `plain` is the precision of what is not quantised, `eight_bit` that of the blocks' products.
    `embed`: weights are within the graphs; else they lie beside them, unless `weights` is false.
    `wanted` says of a graph's name whether it is.
    """

    spec: WanSpec
    parts: Parts | None
    plain: Precision
    eight_bit: EightBit | None = None
    embed: bool = False
    weights: bool = True
    wanted: Callable[[str], bool] = field(default=lambda name: True, compare=False)

    def __post_init__(self) -> None:
        assert self.parts is not None or not (self.embed or self.weights), f"{self=}"
        if self.embed and self.spec.boundary is not None:
            raise UsageError("--embed takes the weights of one transformer; this model has two")

    @property
    def key(self) -> str:
        """What finished files depend on."""
        told = {"spec": asdict(self.spec), "plain": self.plain, "eight_bit": self.eight_bit}
        told |= {"embed": self.embed, "source": asdict(provenance())}
        return json.dumps(told, sort_keys=True, default=str)


@dataclass(frozen=True)
class Wanted:
    """A part, the formats of its weights, and the precision of its products."""

    kind: Kind
    part: Part
    precision: Precision
    formats: dict[str, LinearFormat]


def export(order: Order, out: Path, signer: Signer, progress: Progress) -> Manifest:
    """Write the bundle `out`, a zip where the name ends so. Returns what it says of itself.

    Raises FormatError for the model's files, OutputError where something is in the way.
    """
    work = _work_folder(order, out)
    wanted = list(wanted_graphs(order))
    graphs = []
    for i, one in enumerate(wanted):
        progress(f"export {one.part.name}", i, len(wanted))
        graphs += list(_write_graphs(order, one, work))
    progress("export", len(wanted), len(wanted))
    tokenizer = ""
    if order.weights and not order.embed:
        for _ in rewrite_model(
            order.parts, order.spec.id, work / "weights", order.eight_bit, progress
        ):
            pass
    elif order.embed and order.parts.tokenizer is not None:
        (work / "weights").mkdir(exist_ok=True)
        shutil.copyfile(order.parts.tokenizer, work / "weights" / order.parts.tokenizer.name)
    contents: dict[str, bytes | Path] = {_LICENCE: licence_text()}
    for folder in ("onnx", "weights"):
        contents |= {f"{folder}/{path.name}": path for path in sorted((work / folder).glob("*"))}
    weights = tuple(sorted(n for n in contents if n.endswith(".safetensors")))
    tokenizer = next((n for n in contents if n.startswith("weights/") and n not in weights), "")
    manifest = Manifest(
        format=FORMAT,
        model=Model.of(order.spec),
        graphs=tuple(sorted(graphs, key=lambda graph: graph.name)),
        engines=(),
        weights=weights,
        tokenizer=tokenizer,
        licences=(Licence("Apache-2.0", _LICENCE, tuple(graph.member for graph in graphs)),),
        provenance=provenance(),
        members=bundles.members_of(contents),
    )
    bundles.write(out, manifest, contents, signer)
    shutil.rmtree(work)
    return manifest


def wanted_graphs(order: Order) -> Iterator[Wanted]:
    """Every graph of the order's model, in the order of a request."""
    spec, there = order.spec, None if order.parts is None else order.parts.found
    text = _TEXT.get(order.plain, order.plain)

    def has(kind: Kind) -> bool:
        return there is None or kind in there

    if has("umt5"):
        encoder = encoders.empty_umt5(spec.umt5, DTYPES[text])
        for part in encoders.umt5_parts(encoder, DTYPES[text]):
            yield Wanted("umt5", part, text, {})
    if spec.clip is not None and has("clip"):
        tower = encoders.empty_clip(spec.clip, DTYPES[order.plain])
        for part in encoders.clip_parts(tower, DTYPES[order.plain]):
            yield Wanted("clip", part, order.plain, {})
    transformer = dit.empty(spec.dit, DTYPES[order.plain])
    for part in dit.parts(transformer, DTYPES[order.plain]):
        formats = dit.formats(transformer, part, order.eight_bit) if order.eight_bit else {}
        if order.wanted(part.name):
            yield Wanted("dit", part, order.eight_bit if formats else order.plain, formats)
    if has("vae"):
        coder = vae.empty(spec.vae, DTYPES[order.plain])
        for part in vae.parts(coder, DTYPES[order.plain]):
            if order.wanted(part.name):
                yield Wanted("vae", part, order.plain, {})


def _work_folder(order: Order, out: Path) -> Path:
    """Where finished files wait; emptied where they are of another order."""
    work = out.with_name(f".{out.name}.part")
    note = work / "order.json"
    if work.exists() and (not note.exists() or note.read_text() != order.key):
        shutil.rmtree(work)
    (work / "onnx").mkdir(parents=True, exist_ok=True)
    note.write_text(order.key)
    return work


def _write_graphs(order: Order, wanted: Wanted, work: Path) -> Iterator[Graph]:
    """The files of one part: one, or with embedded weights one for each of its homes."""
    part = wanted.part
    indices = range(len(part.homes)) if order.embed else [None]
    folder = work / "onnx"
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
        yield _record(path, wanted, order.embed)


def _trace(wanted: Wanted) -> onnx.Model:
    model = onnx.trace(wanted.part)
    return qdq.quantise(model, wanted.formats) if wanted.formats else model


def _weights_of(order: Order, wanted: Wanted, model: onnx.Model, index: int) -> dict[str, Tensor]:
    """What a graph's inputs are in one of the modules that it serves."""
    assert order.parts is not None
    found = order.parts.found[wanted.kind]
    dtype = DTYPES[wanted.precision if wanted.precision in DTYPES else order.plain]
    weights = Weights(skeleton(wanted.kind, found.spec), found, dtype, check=True)
    home = wanted.part.homes[index]
    prefix = f"{home}." if home else ""
    weights.formats = {prefix + name: form for name, form in wanted.formats.items()}
    names = {f"{prefix}{value.name}": value.name for value in model.graph.inputs}
    return {names[name]: weights.read(name) for name in weights.names() if name in names}


def _record(path: Path, wanted: Wanted, embedded: bool) -> Graph:
    """What the manifest says of a finished graph."""
    model = onnx.parse(path.read_bytes())
    values = {value.name: value for value in wanted.part.inputs}
    inputs = []
    for given in model.graph.inputs:
        dtype = onnx.DTYPES[given.dtype]
        if given.name in values:
            value = values[given.name]
            least, best, most = (
                value.at(lambda axis, name=name: getattr(axis, name))
                for name in ("min", "opt", "max")
            )
            inputs.append(Input(given.name, dtype, least, best, most))
        else:
            shape = tuple(given.shape.numpy())
            inputs.append(Input(given.name, dtype, shape, shape, shape))
    name = path.name.removesuffix(".onnx")
    member = f"onnx/{path.name}"
    return Graph(name, member, wanted.precision, embedded, onnx.OPSET, tuple(inputs))
