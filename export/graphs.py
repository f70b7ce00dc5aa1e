"""The graphs of a model as files: those that ONNX Runtime runs, weights beside or within them."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

from torch import Tensor

from wanrt.engine.manifest import Graph
from wanrt.export import onnx
from wanrt.export.engines import inputs_of
from wanrt.export.jobs import Job, for_onnxruntime
from wanrt.export.order import Order
from wanrt.quant.formats import PLAIN
from wanrt.weights.contents import Weights
from wanrt.weights.load import skeleton
from wanrt.weights.names import Kind


def wanted(order: Order) -> list[Job]:
    """Every graph of an order: of the parts that the model has, or of all of them."""
    kinds = get_args(Kind) if order.parts is None else order.parts.found
    return list(for_onnxruntime(order.spec, order.plain, order.eight_bit, kinds))


def record_of(path: Path, member: str, job: Job, embedded: bool = False) -> Graph:
    """What the manifest says of a finished graph."""
    inputs = inputs_of(onnx.parse(path.read_bytes()), job.part)
    name = Path(member).name.removesuffix(".onnx")
    return Graph(name, member, job.precision, embedded, onnx.OPSET, inputs)


class GraphWriter:
    """Writes the graphs of an order into a folder; what is there already is kept.

    A part's file with embedded weights is opened once, for all of its blocks. Peak: a graph, or
    with embedded weights those of one block, as they are put in and as they are written.
    """

    def __init__(self, order: Order, folder: Path) -> None:
        self._order, self._folder = order, folder
        self._opened: dict[Kind, Weights] = {}

    def write(self, job: Job) -> Iterator[Graph]:
        """The files of one part: one, or with embedded weights one for each of its homes.

        Raises FormatError for the files of the weights.
        """
        embeds, model = self._order.embed, None
        for index in range(len(job.part.homes)) if embeds else (None,):
            name = job.part.name if index is None else job.part.name_at(index)
            path = self._folder / f"{name}.onnx"
            if not path.exists():
                model = model or job.graph()
                partial = path.with_suffix(".part")
                partial.write_bytes(
                    onnx.serialise(model) if index is None else self._embedded(job, model, index)
                )
                partial.replace(path)
            yield record_of(path, f"onnx/{path.name}", job, embeds)

    def _embedded(self, job: Job, model: onnx.Model, index: int) -> bytes:
        """The file of the graph with the weights of one of the modules that it serves."""
        weights, home = self._weights(job), job.part.homes[index]
        prefix = f"{home}." if home else ""
        weights.formats = {prefix + name: form for name, form in job.formats.items()}
        names = {f"{prefix}{value.name}": value.name for value in model.graph.inputs}
        found = weights.names()
        given: dict[str, Tensor] = {names[n]: weights.read(n) for n in found if n in names}
        return onnx.embedded(model, given)

    def _weights(self, job: Job) -> Weights:
        """Those of the part of the model that a job belongs to."""
        kind = cast(Kind, job.part.name.partition(".")[0])
        if kind not in self._opened:
            assert self._order.parts is not None
            found = self._order.parts.found[kind]
            dtype = PLAIN[self._order.plain if job.precision not in PLAIN else job.precision]
            self._opened[kind] = Weights(skeleton(kind, found.spec), found, dtype, check=True)
        return self._opened[kind]
