"""A part of a model becomes an ONNX graph: opset 23, open sizes, weights as inputs or embedded.

The graph is traced from the runtime's own modules, whose ops are the lowerings of the op table. No
weight is read while it is: one graph serves every block of a model and every checkpoint.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CheckerPass,
    ClearMetadataAndDocStringPass,
    RemoveUnusedOpsetsPass,
    ShapeInferencePass,
)
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from wanrt.export.part import Axis, Multiple, Part, Size, Value

OPSET = 23
IR_VERSION = 10
DTYPES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT8: "int8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}
Model = ir.Model
_TIDY = ir.passes.Sequential(ClearMetadataAndDocStringPass(), RemoveUnusedOpsetsPass())
# Whose warnings concern no graph: of operators that are not installed, of types yet to be inferred.
_NOISE = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


class _Pure(nn.Module):
    """A part as a function of its inputs and of all its weights."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self._call = [_Call(part)]  # in a list: its weights are to be no parameters of this one
        self._names = [f"module.{name}" for name in part.weights()]

    def forward(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> object:
        given = dict(zip(self._names, weights, strict=True))
        return functional_call(self._call[0], given, inputs)


class _Call(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.module, self._function = part.module, part.function

    def forward(self, *inputs: Tensor) -> object:
        return self._function(self.module, *inputs)


def trace(part: Part) -> ir.Model:
    """The graph of a part, its weights inputs; peak: the tensors between its ops, at trace size.

    Raises whatever the exporter raises: a part that cannot be traced is a fault of ours.
    """
    weights = part.weights()
    inputs = tuple(_stand_in(value.dtype, value.at(lambda a: a.trace)) for value in part.inputs)
    held = tuple(_stand_in(tensor.dtype, tuple(tensor.shape)) for tensor in weights.values())
    dims: dict[str, Dim] = {}
    shapes = tuple(_open_sizes(value, dims) for value in part.inputs)
    with torch.enable_grad(), _quiet():  # with autograd, ops overwrite nothing
        program = torch.onnx.export(
            _Pure(part).eval(),
            (inputs, held),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(shapes, tuple({} for _ in held)),
            input_names=[*(value.name for value in part.inputs), *weights],
            output_names=list(part.outputs),
            optimize=True,
            verbose=False,
        )
    model = program.model
    model.ir_version = IR_VERSION
    for value in [value for value in model.graph.inputs if value.name in weights]:
        if not value.uses():
            model.graph.inputs.remove(value)
    model.producer_name, model.producer_version = "wanrt", None
    return checked(_TIDY(model).model)


def embed(model: ir.Model, weights: Mapping[str, Tensor]) -> ir.Model:
    """A copy of a graph in which these inputs are constants. Peak: the weights once more."""
    made = model.clone()
    for value in [value for value in made.graph.inputs if value.name in weights]:
        made.graph.inputs.remove(value)
        value.const_value = constant(value.name, weights[value.name])
        made.graph.initializers.add(value)
    return checked(made)


def embedded(model: ir.Model, weights: Mapping[str, Tensor]) -> bytes:
    """The file of such a copy. Peak: the weights three times; nothing of them stays behind.

    A graph and its values refer to each other. So the numbers are let go by hand: they would wait
    for Python's collector, which counts objects and not bytes.
    """
    made = embed(model, weights)
    try:
        return serialise(made)
    finally:
        for value in made.graph.initializers.values():
            value.const_value = None


def constant(name: str, tensor: Tensor) -> ir.Tensor:
    """A tensor of ours as one of ONNX, in the same dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return ir.Tensor(tensor.view(torch.uint16).numpy(), ir.DataType.BFLOAT16, name=name)
    if tensor.dtype == torch.float8_e4m3fn:
        return ir.Tensor(tensor.view(torch.uint8).numpy(), ir.DataType.FLOAT8E4M3FN, name=name)
    return ir.Tensor(tensor.numpy(), name=name)


def checked(model: ir.Model) -> ir.Model:
    """The same graph with every shape inferred, once ONNX's own checker has nothing against it."""
    with _quiet():
        model = ShapeInferencePass(check_type=True, strict_mode=True)(model).model
    return CheckerPass()(model).model


def serialise(model: ir.Model) -> bytes:
    """One file, all data within; the same bytes for the same graph."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def parse(graph: bytes) -> ir.Model:
    """The reverse of `serialise`."""
    return ir.from_proto(onnx.ModelProto.FromString(graph))


def _stand_in(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros that takes no memory."""
    return torch.zeros((), dtype=dtype).expand(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' chatter; their errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in _NOISE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _open_sizes(value: Value, dims: dict[str, Dim]) -> dict[int, object]:
    def dim(size: Size) -> object:
        axis = size.axis if isinstance(size, Multiple) else size
        own = dims.setdefault(axis.name, Dim(axis.name, min=axis.min, max=axis.max))
        return own if isinstance(size, Axis) else size.factor * own + size.offset

    return {i: dim(size) for i, size in enumerate(value.shape) if not isinstance(size, int)}
