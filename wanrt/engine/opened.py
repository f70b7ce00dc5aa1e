"""A bundle opened for one executor and one device: which parts of a model it computes, and how."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import nn

from wanrt.config import MODELS, VaeSpec, WanSpec
from wanrt.engine.attach import attach
from wanrt.engine.bundle import Bundle
from wanrt.engine.graphs import Graphs, PlannedGraphs
from wanrt.engine.manifest import Graph, Manifest, Model, is_bundle
from wanrt.engine.memory import check_shapes, engine_bytes
from wanrt.errors import FormatError, UsageError
from wanrt.memory.engine_bytes import EngineBytes
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.detect import Detected, identify
from wanrt.weights.names import Kind
from wanrt.weights.parts import Parts, choose_parts

EngineName = Literal["onnxruntime", "tensorrt-rtx"]
KINDS: tuple[Kind, ...] = ("dit", "vae", "umt5", "clip")


class Engine:
    """What a bundle does for a model; parts that it has no graphs of stay native."""

    def __init__(self, name: EngineName, bundle: Bundle, graphs: Graphs) -> None:
        self.name, self.bundle, self._graphs = name, bundle, graphs
        self._records: dict[str, list[Graph]] = {kind: [] for kind in KINDS}
        for graph in bundle.manifest.graphs:
            kind = graph.name.partition(".")[0]
            if kind not in self._records:
                reason = f"has a graph {graph.name}, which belongs to no part of a model"
                raise FormatError(bundle.path, reason, "export the model again")
            if graphs.has(graph.name):
                self._records[kind].append(graph)

    @classmethod
    def open(cls, name: str, path: Path, device: torch.device) -> "Engine":
        """Of a bundle whose signature is trusted. Raises FormatError, UsageError."""
        if name not in get_args(EngineName):
            known = ", ".join(("native", *get_args(EngineName)))
            raise UsageError(f"engine {name!r} does not exist; choose {known}")
        bundle = Bundle.open(path)
        return cls(name, bundle, _EXECUTORS[name](bundle, device))

    def serves(self, kind: Kind) -> bool:
        """Whether the bundle has graphs of a part of the model."""
        return bool(self._records[kind])

    def embeds(self, kind: Kind) -> bool:
        """Whether these hold all of its weights."""
        return self.serves(kind) and all(graph.embedded for graph in self._records[kind])

    def precisions(self, kind: Kind) -> frozenset[str]:
        """Of the products of a part: eight-bit ones stand beside those of another."""
        return frozenset(graph.precision for graph in self._records[kind])

    def attach(self, kind: Kind, module: nn.Module) -> nn.Module:
        """The part with graphs in the place of its arithmetic, where the bundle has them."""
        return attach(kind, module, self._graphs) if self.serves(kind) else module

    def memory(self, vae: VaeSpec) -> EngineBytes:
        """What its engines work in, for the plan of a request. Not of ONNX Runtime, which has
        memory of its own."""
        planned = self._planned
        assert planned is not None, f"{self.name=}"
        return engine_bytes(self.bundle, vae, planned.host.compute_capability, planned.host.release)

    def limit(self, num_bytes: int) -> None:
        """See `graphs.PlannedGraphs`."""
        if self._planned is not None:
            self._planned.limit(num_bytes)

    def release(self) -> None:
        """See `graphs.PlannedGraphs`."""
        if self._planned is not None:
            self._planned.release()

    @property
    def _planned(self) -> PlannedGraphs | None:
        return None if self.name == "onnxruntime" else cast(PlannedGraphs, self._graphs)

    def check(self, spec: WanSpec) -> None:
        """Raises FormatError for a model of other shapes than the bundle's."""
        check_shapes(self.bundle, spec)


def open_engine(
    name: str,
    bundle: str | Path | None,
    model: Path,
    device: torch.device,
    vram: object = None,
    asked: str = "MODEL",
) -> Engine:
    """What `--engine` asks for, of `bundle`, or of the model where that is one itself.

    asked: what the user calls the model. Raises UsageError, FormatError.
    """
    path = model if bundle is None else Path(bundle)
    if name == "native":
        raise UsageError(f"{path} is a bundle of graphs: say what runs them, --engine ...")
    if vram is not None and name == "onnxruntime":
        raise UsageError("--vram is kept by the native engine; ONNX Runtime has memory of its own")
    if not is_bundle(path):
        raise UsageError(
            f"--engine {name} wants a bundle: `wanrt export {asked} -o BUNDLE --engine {name}` "
            "makes one, for --model or --bundle"
        )
    return Engine.open(name, path, device)


def model_in(path: Path, engine: Engine) -> Parts:
    """The model that a bundle brings along, as weights or within its graphs.

    engine: what computes; where it is of the same bundle, that is open already. Members are hashed
    before they are read. Raises FormatError where there is neither.
    """
    bundle = engine.bundle if engine.bundle.path == path else Bundle.open(path)
    held = bundle.manifest
    embedded = bool(held.graphs) and all(graph.embedded for graph in held.graphs)
    if not held.weights and not embedded:
        fix = "give the model with --model and this with --bundle"
        raise FormatError(path, "is a bundle without weights", fix)
    parts = _beside(bundle) if held.weights else _embedded(bundle)
    if not held.tokenizer:
        return parts
    vocabulary = bundle.read(held.tokenizer)
    return replace(parts, tokenizer=path / held.tokenizer, vocabulary=vocabulary)


def _beside(bundle: Bundle) -> Parts:
    """Parts that lie beside the graphs; of a zip, within it."""
    places = {name: bundle.locate(name) for name in bundle.manifest.weights}
    opened = (Checkpoint.open(bundle.path / name, place) for name, place in places.items())
    found = [one for checkpoint in opened for one in identify(checkpoint)]
    return choose_parts(bundle.path, found)


def _embedded(bundle: Bundle) -> Parts:
    """Parts that are nowhere but in graphs: their shapes are those of the released model."""
    held = bundle.manifest
    spec = MODELS.get(held.model.id)
    if spec is None or Model.of(spec) != held.model:
        reason = f"its graphs hold the weights of {held.model.id!r}, whose shapes are not known"
        raise FormatError(bundle.path, reason, "export it without --embed")
    specs = {"dit": spec.dit, "vae": spec.vae, "umt5": spec.umt5, "clip": spec.clip}
    kinds = {graph.name.partition(".")[0] for graph in held.graphs}
    found = {
        kind: _detected(kind, specs[kind], bundle.path, held) for kind in KINDS if kind in kinds
    }
    return Parts(**dict.fromkeys(found, bundle.path), found=found)


def _detected(kind: Kind, spec: object, path: Path, manifest: Manifest) -> Detected:
    members = {graph.member for graph in manifest.graphs if graph.name.startswith(f"{kind}.")}
    size = sum(member.size for member in manifest.members if member.name in members)
    return Detected(kind, manifest.model.id, path, "bundle", spec=spec, num_bytes=size)


def _onnxruntime(bundle: Bundle, device: torch.device) -> Graphs:
    try:
        from wanrt.engine.ort import OrtGraphs
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed: pip install 'wanrt[onnx]', or onnxruntime-gpu for CUDA"
        ) from error
    return OrtGraphs(bundle, device)


def _tensorrt_rtx(bundle: Bundle, device: torch.device) -> Graphs:
    from wanrt.engine.trt import TrtGraphs

    return TrtGraphs(bundle, device, "tensorrt-rtx")


_EXECUTORS: dict[str, Callable[[Bundle, torch.device], Graphs]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _tensorrt_rtx,
}
