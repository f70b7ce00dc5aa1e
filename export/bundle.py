"""From a model to a bundle: its parts traced, quantised, given their weights, signed.

What is finished waits in a folder beside the bundle, so that an export that was stopped goes on
where it was. Peak: the largest tensor, or with embedded weights one block and its graph.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from wanrt.engine import bundle as bundles
from wanrt.engine.manifest import FORMAT, Engine, Graph, Licence, Manifest, Model
from wanrt.engine.trust import Signer
from wanrt.export.engine_set import build_set
from wanrt.export.engines import cards_for
from wanrt.export.graphs import GraphWriter, record_of, wanted
from wanrt.export.jobs import for_engines
from wanrt.export.order import Order
from wanrt.export.source import licence_text, provenance
from wanrt.weights.quantize import rewrite_model

__all__ = ["Order", "export"]

Progress = Callable[[str, int, int], None]  # what, done, total
_LICENCE = "licences/apache-2.0.txt"


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
    jobs, writer, made = wanted(order), GraphWriter(order, work / "onnx"), []
    for i, job in enumerate(jobs):
        progress(f"export {job.part.name}", i, len(jobs))
        made += list(writer.write(job))
    progress("export", len(jobs), len(jobs))
    return _Made(made, [], {graph.member: work / graph.member for graph in made})


def _build_engines(order: Order, work: Path, progress: Progress) -> _Made:
    """Engines of TensorRT-RTX, and the graphs that they were built from."""
    todo = list(for_engines(order.spec, order.plain, order.eight_bit, order.attention))
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
            made.graphs.append(record_of(made.files[graph], graph, jobs[record.part]))
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


def _work_folder(order: Order, out: Path) -> Path:
    """Where finished files wait; emptied where they are of another order."""
    work = out.with_name(f".{out.name}.part")
    note, key = work / "order.json", order.key
    if work.exists() and (not note.exists() or note.read_text() != key):
        shutil.rmtree(work)
    (work / "onnx").mkdir(parents=True, exist_ok=True)
    note.write_text(key)
    return work
