"""What a graph is spared before TensorRT-RTX builds it: forms that its builder falls over.

Release 1.7.1.116 dies (segmentation fault) where two Attention nodes read the same queries, as in
the models with a CLIP image: the text and the image are attended to by one q. Identity, a product
with 1 and a second transposition are seen through; the larger of q and minus infinity is q as well,
and is not.
"""

import numpy as np
import onnx_ir as ir

from wanrt.export.onnx import checked

_LOWEST = "queries.lowest"


def spared(model: ir.Model) -> ir.Model:
    """A copy of a graph in which no two Attention nodes read the same queries; same results."""
    made = model.clone()
    seen: set[ir.Value] = set()
    for node in [node for node in made.graph if node.op_type == "Attention"]:
        q = node.inputs[0]
        assert q is not None, f"{node.name=}"
        if q in seen:
            node.replace_input_with(0, _another(made.graph, node, q))
        seen.add(q)
    return checked(made)


def _another(graph: ir.Graph, reader: ir.Node, q: ir.Value) -> ir.Value:
    """max(q, -inf), put in before the node that reads it."""
    lowest = graph.initializers.get(_LOWEST)
    if lowest is None:
        assert q.dtype is not None, f"{q.name=}"
        number = np.array(-np.inf, dtype=q.dtype.numpy())
        tensor = ir.Tensor(number, name=_LOWEST)
        lowest = ir.Value(
            name=_LOWEST, type=ir.TensorType(q.dtype), shape=ir.Shape([]), const_value=tensor
        )
        graph.initializers.add(lowest)
    own = ir.node("Max", [q, lowest], name=f"{reader.name}.queries")
    own.outputs[0].name = f"{reader.name}.q"
    graph.insert_before(reader, own)
    return own.outputs[0]
