"""Graphs made on the spot, for tests of what runs them."""

from collections.abc import Iterable

import torch

from wanrt.engine.ort import OrtRunner
from wanrt.export import onnx
from wanrt.export.part import Part

CPU = torch.device("cpu")


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
