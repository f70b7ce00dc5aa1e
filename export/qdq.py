"""Graphs of eight-bit products: QuantizeLinear and DequantizeLinear around what a format names.

A weight `NAME` `[O, I]` becomes eight-bit, and an input `NAME_scale` fp32 `[O, 1]` comes beside it:
what a `QuantizedLinear` holds, under its names. Each row of activations has one scale, of the whole
row. With U a power of two, M the largest number of the format and m the largest |x| of a row:

    values = QuantizeLinear(x * (M U / m), U)                                int8 or fp8
    y      = Gemm(DequantizeLinear(values, U), DequantizeLinear(weight, U), transB=1)
    result = y * (m / (M U^2)) * weight_scale + bias

All is fp32 but `y`, which has the dtype that the product had; `result` is rounded to it once more.
In bf16 that costs nothing to speak of: of heavy-tailed rows of 1536, int8 loses 1.215 % where fp32
inside would lose 1.194 %, fp8 3.232 % and 3.228 %; in fp16 both are the same.

Why this form. TensorRT-RTX 1.7.1, a product of 8192 x 1536 by 8960 x 1536 in bf16, int8 and fp8
alike, built for SM86 (int8 alone), SM89 and SM120; memory is from the builder's log. No engine was
run, so that this says what lies between kernels, and not which instructions multiply.

- Constant scales. 168 MB: y (147), x (13) and 8 of its own, so what comes to the product is eight
  bits wide. With `weight_scale` in DequantizeLinear it is 195 MB: the widened weight (28) is there
  too. `dit.post` of the 1.3B: 287 MB in fp8, 437 if the scale is applied before the product.
- Gemm. With Transpose and MatMul, a transposed copy of the weight is made at each call (14 MB).
  The Reshape to rows stands before QuantizeLinear: one behind DequantizeLinear is refused by ONNX
  Runtime 1.31 as it is set by default.
- U is 1/128 for int8 and 1/512 for fp8, and not 1, so that the sum of I products below one fits
  fp16 (I <= 65504). A power of two rounds nothing.
- y in fp32 would be right too, but is written out before its scales are applied: 294 MB.

On a CPU, ONNX Runtime 1.31 must get `session.disable_quant_qdq=1`. Without it fp8 graphs are
refused, and int8 goes to a product of uint8 and int8 that saturates on x86 without VNNI (its own
remedy, `session.x64quantprecision`, knows only weights that are constants of the graph).

With `rotated`, each 128 columns of x first meet the Hadamard matrix, in the dtype of the product;
weights come rotated. Weights of `weights` formats are widened in fp32, as the runtime does it, and
multiplied in the dtype of the part. Attention is never quantised. LoRAs and differences are not in
graphs: who wants one merges it before the weights are quantised, or runs the modules.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from torch import Tensor

from wanrt.export.onnx import checked, constant
from wanrt.kernels.reference import GROUP, LARGEST, TINY, hadamard_matrix
from wanrt.quant.formats import LinearFormat

FP32 = ir.DataType.FLOAT
STORED = {torch.int8: ir.DataType.INT8, torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN}
UNIT = {torch.int8: 2.0**-7, torch.float8_e4m3fn: 2.0**-9}  # U: M U is just below 1
TURN = 2.0**-4  # of a rotation's entries: every dtype holds it, and fp16 the sum of 128 products
_TORCH = {
    FP32: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


class _Rows(NamedTuple):
    """Activations as a product takes them."""

    values: ir.Value  # [rows, I], dequantised by U
    scale: ir.Value  # fp32 [..., 1]: m / (M U^2)


class _Product(NamedTuple):
    """x W^T + bias as it was traced; `result` is what the rest of the graph reads."""

    node: ir.Node
    x: ir.Value
    bias: ir.Value | None
    result: ir.Value


class _Weight(NamedTuple):
    """A weight that has its format."""

    values: ir.Value  # eight-bit [O, I]
    scale: ir.Value  # fp32 [O, 1]
    form: LinearFormat
    dtype: ir.DataType  # of its product


def quantise(model: ir.Model, formats: Mapping[str, LinearFormat]) -> ir.Model:
    """A copy of a traced graph whose products have these formats, by the names of their weights.

    Names that the graph does not have are passed over: a part may use only some of its module.
    """
    made = model.clone()
    rewriter = _Rewriter(made.graph)
    for weight in [value for value in made.graph.inputs if value.name in formats]:
        rewriter.rewrite(weight, formats[weight.name])
    RemoveUnusedNodesPass()(made)
    return checked(made)


class _Rewriter:
    """Rewrites the products of one graph, one by one; what several of them take is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rows: dict[tuple[ir.Value, torch.dtype, bool], _Rows] = {}
        self._tape = Tape()  # nodes that are not in the graph yet

    def rewrite(self, weight: ir.Value, form: LinearFormat) -> None:
        """Give a weight its format, and its product what that asks for."""
        product, dtype, inputs = _product_of(weight), weight.dtype, self._graph.inputs
        scale = ir.Value(
            name=f"{weight.name}_scale",
            type=ir.TensorType(FP32),
            shape=ir.Shape([weight.shape[0], 1]),
        )
        inputs.insert(inputs.index(weight) + 1, scale)
        weight.type = ir.TensorType(STORED[form.dtype])
        if form.activations:
            self._multiply(product, _Weight(weight, scale, form, dtype))
            place = product.node
        else:
            ((place, index),) = weight.uses()
            place.replace_input_with(index, self._widened(_Weight(weight, scale, form, dtype)))
        self._graph.insert_before(place, self._tape.nodes)
        self._tape = Tape()

    def _multiply(self, product: _Product, weight: _Weight) -> None:
        """Compute the result of a product from eight-bit numbers."""
        form, dtype, outer = weight.form, weight.dtype, weight.values.shape[0]
        rows = self._quantised(product.x, form, dtype)
        columns = self._dequantised(weight.values, form, UNIT[form.dtype], dtype)
        y = self._op("Gemm", rows.values, columns, transB=1)
        y = self._cast(self._reshape(y, product.x.shape[:-1], outer), dtype, FP32)
        y = self._op("Mul", self._op("Mul", y, rows.scale), self._reshape(weight.scale, (), outer))
        if product.bias is not None:
            y = self._op("Add", y, self._cast(product.bias, product.bias.dtype, FP32))
        y, old = self._cast(y, FP32, dtype), product.result
        y.name, y.type, y.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(y, replace_graph_outputs=True)
        old.name = None

    def _quantised(self, x: ir.Value, form: LinearFormat, dtype: ir.DataType) -> _Rows:
        source = x if form.rotated else _before_rounding(x)
        key = (source, form.dtype, form.rotated)
        if key not in self._rows:
            self._rows[key] = self._quantise(source, form, dtype)
        return self._rows[key]

    def _quantise(self, x: ir.Value, form: LinearFormat, dtype: ir.DataType) -> _Rows:
        """Every row by its own largest number."""
        unit, top, shape, held = UNIT[form.dtype], LARGEST[form.dtype], x.shape, x.dtype
        divisor = top * unit**2
        if form.rotated:
            x = self._reshape(self._turned(x, TURN, held), shape[:-1], shape[-1])
            divisor *= TURN * math.sqrt(GROUP)  # a rotation has entries of 1 / sqrt(GROUP)
        x = self._cast(x, held, FP32)
        axes = self._constant("last_axis", torch.tensor([-1]))
        largest = self._op("ReduceMax", self._op("Abs", x), axes, keepdims=1)
        largest = self._op("Max", largest, self._number(TINY))
        x = self._op("Mul", x, self._op("Div", self._number(top * unit), largest))
        x = self._reshape(x, (-1,), shape[-1])
        values = self._op("QuantizeLinear", x, self._number(unit), self._zero(form))
        scale = self._op("Div", largest, self._number(divisor))
        return _Rows(self._dequantised(values, form, unit, dtype), scale)

    def _widened(self, weight: _Weight) -> ir.Value:
        """A weight as its values and scales say, [O, I] in the dtype of its product."""
        plain = self._dequantised(weight.values, weight.form, 1.0, FP32)
        plain = self._op("Mul", plain, weight.scale)
        if weight.form.rotated:
            plain = self._turned(plain, GROUP**-0.5, FP32)
            plain = self._reshape(plain, (weight.values.shape[0],), weight.values.shape[1])
        return self._cast(plain, FP32, weight.dtype)

    def _turned(self, x: ir.Value, entry: float, dtype: ir.DataType) -> ir.Value:
        """x [..., I] times a Hadamard matrix of `entry` and -`entry`, as [all, 128]."""
        matrix = hadamard_matrix(GROUP, torch.device("cpu")) * entry
        turn = self._constant(f"hadamard_{entry:g}_{dtype}", matrix.to(_TORCH[dtype]))
        return self._op("MatMul", self._reshape(x, (-1,), GROUP), turn)

    def _dequantised(
        self, values: ir.Value, form: LinearFormat, scale: float, dtype: ir.DataType
    ) -> ir.Value:
        return self._op("DequantizeLinear", values, self._number(scale, dtype), self._zero(form))

    def _reshape(self, x: ir.Value, rows: Sequence[int | ir.SymbolicDim], width: int) -> ir.Value:
        """x as [*rows, width]; at most one of the rows' sizes may be open."""
        sizes = [size if isinstance(size, int) else -1 for size in (*rows, width)]
        assert sizes.count(-1) <= 1, f"{rows=}"
        name = "_".join(["shape", *map(str, sizes)])
        made = self._op("Reshape", x, self._constant(name, torch.tensor(sizes)))
        if -1 not in rows:  # else nobody has named the size
            made.shape = ir.Shape([*rows, width])
        return made

    def _cast(self, x: ir.Value, held: ir.DataType, wanted: ir.DataType) -> ir.Value:
        return x if held == wanted else self._op("Cast", x, to=wanted)

    def _op(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self._tape.op(kind, inputs, attributes)

    def _number(self, number: float, dtype: ir.DataType = FP32) -> ir.Value:
        return self._constant(f"{number!r}_{dtype}", torch.tensor(number, dtype=_TORCH[dtype]))

    def _zero(self, form: LinearFormat) -> ir.Value:
        return self._constant(f"zero_{STORED[form.dtype]}", torch.zeros((), dtype=form.dtype))

    def _constant(self, name: str, tensor: Tensor) -> ir.Value:
        """A constant of the graph; there once, however often it is asked for."""
        known = self._graph.initializers
        if name not in known:
            made = constant(name, tensor)
            kind = ir.TensorType(made.dtype)
            known.add(ir.Value(name=name, type=kind, shape=made.shape, const_value=made))
        return known[name]


def _product_of(weight: ir.Value) -> _Product:
    """The one product that a weight is in: a Gemm, or Transpose, MatMul and the Add of a bias."""
    node = _only_reader(weight)
    if node.op_type == "Gemm":
        assert node.inputs[1] is weight and node.attributes.get_int("transB", 0) == 1, f"{node=}"
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        assert factors == [1, 1] and node.attributes.get_int("transA", 0) == 0, f"{node=}"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return _Product(node, node.inputs[0], bias, node.outputs[0])
    assert node.op_type == "Transpose", f"{node=}"
    matmul = _only_reader(node.outputs[0])
    assert matmul.op_type == "MatMul" and matmul.inputs[1] is node.outputs[0], f"{matmul=}"
    x, y = matmul.inputs[0], matmul.outputs[0]
    bias = _bias_of(y, weight)
    return _Product(matmul, x, bias, y if bias is None else _only_reader(y).outputs[0])


def _bias_of(y: ir.Value, weight: ir.Value) -> ir.Value | None:
    """What is added to a product before anything else happens to it, if it has a channel's size."""
    readers = [node for node, _ in y.uses()]
    if len(readers) != 1 or readers[0].op_type != "Add" or y.is_graph_output():
        return None
    (other,) = (value for value in readers[0].inputs if value is not y)
    return other if other.is_graph_input() and other.shape == (weight.shape[0],) else None


def _only_reader(value: ir.Value) -> ir.Node:
    readers = [node for node, _ in value.uses()]
    assert len(readers) == 1, f"{value.name}: {readers=}"
    return readers[0]


def _before_rounding(x: ir.Value) -> ir.Value:
    """What a product's input was in fp32, where it is rounded for the product alone."""
    node = x.producer()
    rounded = node is not None and node.op_type == "Cast" and node.inputs[0].dtype == FP32
    return node.inputs[0] if rounded else x
