"""Graphs made on the spot, for tests of what runs them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from wanrt.engine.ort import OrtRunner
from wanrt.export import onnx
from wanrt.export.part import Part

CPU = torch.device("cpu")


@contextmanager
def each_graph_traced_once() -> Iterator[None]:
    """Within it, for all exports: tracing is what takes their time."""
    traced: dict[object, bytes] = {}
    trace = onnx.trace

    def remember(part: Part) -> onnx.Model:
        weights = tuple((name, w.dtype, w.shape) for name, w in part.weights().items())
        key = (part.name, part.inputs, weights)
        if key not in traced:
            traced[key] = onnx.serialise(trace(part))
        return onnx.parse(traced[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "trace", remember)
        yield


class TracedGraphs:
    """Parts as `graphs.Graphs`: each traced and loaded into ONNX Runtime when first asked for."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = {part.name: part for part in parts}
        self._loaded: dict[str, OrtRunner] = {}

    def has(self, name: str) -> bool:
        return name in self._parts

    def get(self, name: str) -> OrtRunner:
        if name not in self._loaded:
            graph = onnx.serialise(onnx.trace(self._parts[name]))
            self._loaded[name] = OrtRunner(name, graph, CPU, threads=1)
        return self._loaded[name]


class Without:
    """The same graphs but for some."""

    def __init__(self, graphs: TracedGraphs, *names: str) -> None:
        self._graphs, self._names = graphs, names

    def has(self, name: str) -> bool:
        return name not in self._names and self._graphs.has(name)

    def get(self, name: str) -> OrtRunner:
        assert name not in self._names, f"{name=}"
        return self._graphs.get(name)
