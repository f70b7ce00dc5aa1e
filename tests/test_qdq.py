"""Eight-bit graphs: ONNX Runtime against the arithmetic of `wanrt.quant`; which nodes they have."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import lively
from torch import Tensor, nn

from wanrt.config import DIT_1_3B, DitSpec
from wanrt.export import dit as graphs
from wanrt.export.onnx import embed, serialise, trace
from wanrt.export.part import Axis, Part, Value
from wanrt.export.qdq import STORED, quantise
from wanrt.kernels import reference
from wanrt.kernels.cases import heavy_tailed
from wanrt.kernels.reference import GROUP, Quantized
from wanrt.models.dit import WanDiT
from wanrt.models.eight_bit import convert, policy_formats
from wanrt.models.layers import Linear
from wanrt.models.quantized import EightBitOps, Products, QuantizedLinear, Quantizers
from wanrt.quant.formats import FORMATS, INT8, LinearFormat
from wanrt.quant.policy import EightBit

PRECISIONS: tuple[EightBit, ...] = ("int8", "fp8")
T2V = DitSpec(dim=256, ffn_dim=512, num_heads=2, num_layers=1)
SPECS = {
    "t2v": T2V,
    "i2v": replace(T2V, in_dim=36, image_dim=64),
    "ti2v": replace(T2V, in_dim=48, out_dim=48),
    "vace": replace(T2V, vace_layers=(0,)),
}
# What each part asks of the policy: products in eight bits, and weights that are only kept so.
FULL = {
    "dit.pre": {"self_attn.q", "self_attn.k", "self_attn.v"},
    "dit.post": {"self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"},
}
FULL["dit.block"] = FULL["dit.pre"] | FULL["dit.post"]
WEIGHTS = {
    ("t2v", "dit.kv"): {"k", "v"},
    ("i2v", "dit.kv"): {"k", "v", "k_img", "v_img"},
    ("vace", "dit.before"): {""},
    ("vace", "dit.after"): {""},
}
# Every graph that differs: images come in behind `pre`, levels of t are not in `kv`.
PARTS = [("t2v", "dit.kv"), ("t2v", "dit.pre"), ("t2v", "dit.post"), ("t2v", "dit.block")]
PARTS += [("i2v", "dit.kv"), ("i2v", "dit.post"), ("ti2v", "dit.pre"), ("ti2v", "dit.post")]
PARTS += [("vace", "dit.before"), ("vace", "dit.after")]
BLOCKS = [("i2v", "dit.block"), ("ti2v", "dit.block")]  # both of their halves are above
NUM_ROUNDED = {"dit.pre": 1, "dit.post": 5, "dit.block": 6}  # q, k and v take the same rows
ALL_FORMATS = (*FORMATS.values(), LinearFormat("int8-weights-rotated", torch.int8, False, True))
ROWS = Axis("L", 1, 50, 4096, trace=40)


def whole_rows(
    x: Tensor, dtype: torch.dtype, group: int | None = None, hadamard: bool = False
) -> Quantized:
    """`reference.quantize` with one scale a row, whatever group is asked for: as graphs do it."""
    return reference.quantize(x, dtype, None, hadamard)


def whole_rows_out(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str | None,
    hadamard: bool,
) -> Quantized:
    y = reference.linear_quantized(x, weight, bias, torch.float32, activation)
    return whole_rows(y, dtype, hadamard=hadamard)


OPS = EightBitOps(
    Quantizers(reference.layer_norm_modulate_quantize, whole_rows),
    Products(reference.linear_quantized, whole_rows_out, reference.linear_gated_residual),
)


def run(model: ir.Model, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """ONNX Runtime on one core; products of eight-bit numbers are computed in the wider dtype."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(serialise(model), options, providers=providers)
    names = [value.name for value in session.get_outputs()]
    wanted = [value.name for value in session.get_inputs()]
    found = session.run_with_ort_values(names, {name: ort_value(feeds[name]) for name in wanted})
    return [torch.from_numpy(np.array(value.numpy())) for value in found]


def ort_value(tensor: Tensor) -> onnxruntime.OrtValue:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:
        element = int(ir.DataType.FLOAT8E4M3FN)
        array = tensor.view(torch.uint8).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def product(inner: int, outer: int, dtype: torch.dtype, rank: int = 3) -> Part:
    """One Linear as a graph: x [1, L, I], or [L, I]."""
    with torch.device("meta"):
        linear = Linear(inner, outer).to(dtype)
    x = Value("x", dtype, (1, ROWS, inner)[3 - rank :])
    return Part("linear", linear, lambda linear, x: linear(x), (x,), ("y",), ("",))


def rows_of(inner: int) -> Tensor:
    """[1, 8, I]: plain, outliers, one number alone, zeros, tiny, ties of int8 and fp8, large."""
    x = torch.randn(8, inner)
    x[1, ::37] *= 300
    x[2] = 0
    x[2, 5] = -7
    x[3] = 0
    x[4] *= 1e-6
    whole = torch.arange(inner) % 50
    x[5] = whole + 0.5  # with 127 as the largest, all halves of an int8 step
    x[5, 0] = 127
    x[6] = 33 + 2 * (whole % 15)  # with 448, halfway between two numbers of fp8
    x[6, 0] = 448
    x[7] *= 1000
    return x[None]


def seen_by(x: Tensor, form: LinearFormat) -> Quantized:
    """Activations [1, L, I] as a graph makes eight bits of them.

    Those in fp16 are rotated there: entries of 1/16 instead of 1/sqrt(128), and a rounding.
    """
    if not form.rotated or x.dtype == torch.float32:
        return whole_rows(x, form.dtype, hadamard=form.rotated)
    groups = x.float().unflatten(-1, (-1, GROUP))
    turned = groups @ (reference.hadamard_matrix(GROUP, x.device) / 16)
    return whole_rows(turned.flatten(-2).to(x.dtype).float() * (16 / GROUP**0.5), form.dtype)


class Expected(NamedTuple):
    y: Tensor  # fp32
    size: Tensor  # of what is summed up in it: bounds what summation rounds


def expected_of(x: Tensor, weight: Quantized, bias: Tensor, form: LinearFormat) -> Expected:
    """What the specification makes of one product."""
    plain = reference.dequantize(weight)
    if form.activations:
        rows = seen_by(x, form)
        y = reference.linear_quantized(rows, weight, bias, torch.float32)
        size = reference.dequantize(rows).abs() @ plain.abs().T
    else:
        plain = (reference.rotate(plain) if form.rotated else plain).to(x.dtype).float()
        y = nn.functional.linear(x.float(), plain, bias.float())
        size = x.float().abs() @ plain.abs().T
    return Expected(y, size + bias.float().abs())


@pytest.mark.parametrize("rank", [3, 2])
@pytest.mark.parametrize("form", ALL_FORMATS, ids=lambda form: form.name)
def test_a_product(form: LinearFormat, rank: int) -> None:
    """The same eight-bit numbers as the specification's: a step more or less would be seen."""
    torch.manual_seed(0)
    x, weight, bias = rows_of(256), heavy_tailed(384, 256), torch.randn(384)
    made = reference.quantize_weight(weight, form.dtype, form.rotated)
    model = quantise(trace(product(256, 384, torch.float32, rank)), {"weight": form})
    feeds = {"weight": made.values, "weight_scale": made.scale, "bias": bias}
    x = x[0] if rank == 2 else x
    (y,) = run(model, {"x": x, **feeds})
    expected = expected_of(x, made, bias, form)
    assert ((y - expected.y).abs() <= 1e-6 * expected.size).all()
    (embedded,) = run(embed(model, feeds), {"x": x})
    assert ((embedded - expected.y).abs() <= 1e-6 * expected.size).all()


@pytest.mark.parametrize("form", ALL_FORMATS, ids=lambda form: form.name)
def test_a_product_in_fp16(form: LinearFormat) -> None:
    """Two roundings to fp16, no overflow: the last row adds up to 1.4e8 steps of int8."""
    torch.manual_seed(1)
    inner, outer = 8960, 128
    x, weight, bias = rows_of(inner).half(), torch.randn(outer, inner) * 0.01, torch.randn(outer)
    bias = bias.half().float()
    x[:, 7], weight[0] = 0.5, 0.01
    made = reference.quantize_weight(weight, form.dtype, form.rotated)
    model = quantise(trace(product(inner, outer, torch.float16)), {"weight": form})
    feeds = {"weight": made.values, "weight_scale": made.scale, "bias": bias.half()}
    (y,) = run(model, {"x": x, **feeds})
    expected = expected_of(x, made, bias, form)
    assert y.dtype == torch.float16
    rounded = (expected.y - bias).abs() + expected.y.abs()
    bound = 1.01 * 2**-11 * rounded + 1e-6 * expected.size
    assert ((y.float() - expected.y).abs() <= bound).all()


def filled(spec: DitSpec) -> WanDiT:
    """A transformer with weights, and the ops of graphs."""
    dit = WanDiT(spec, graphs.OPS)
    for name, weight in dit.named_parameters():
        weight.data = lively("dit", name, tuple(weight.shape), torch.float32)
    return dit.eval().requires_grad_(False)


def part_of(dit: WanDiT, name: str) -> Part:
    return next(part for part in graphs.parts(dit, torch.float32) if part.name == name)


def inputs_of(part: Part, size: int) -> dict[str, Tensor]:
    """Random ones; levels of t in no order."""

    def number(axis: Axis) -> int:
        return {"L": size, "n": 24, "levels": 3}[axis.name]

    torch.manual_seed(2)
    made = {}
    for value in part.inputs:
        shape = value.at(number)
        levels = value.dtype == torch.int64
        made[value.name] = torch.randint(0, 3, shape) if levels else torch.randn(shape)
    return made


@cache
def traced(spec: DitSpec, name: str, dtype: torch.dtype = torch.float32) -> ir.Model:
    parts = graphs.parts(graphs.empty(spec, dtype), dtype)
    return trace(next(part for part in parts if part.name == name))


@torch.no_grad()
def check_part(spec: DitSpec, name: str, precision: EightBit, size: int) -> None:
    """A graph against eight-bit modules, measured by how far those are from what they were.

    A row with a number next to the middle of two steps may be rounded the other way. Few have one;
    the others differ by what fp32 rounds.
    """
    plain = filled(spec)
    empty = graphs.empty(spec, torch.float32)
    inputs = inputs_of(part_of(plain, name), size)
    before = outputs(part_of(plain, name), inputs)
    formats = policy_formats(plain, precision)
    convert(plain, {weight.removesuffix(".weight"): form for weight, form in formats.items()})
    for linear in plain.modules():
        if isinstance(linear, QuantizedLinear):
            linear.ops = OPS
    part = part_of(plain, name)
    quantised = quantise(traced(spec, name), graphs.formats(empty, part, precision))
    held = dict(part.module.named_parameters())
    for value in quantised.graph.inputs[len(inputs) :]:
        assert value.name in held and tuple(value.shape) == tuple(held[value.name].shape)
    found = run(quantised, {**inputs, **held})
    for y, wanted, was in zip(found, outputs(part, inputs), before, strict=True):
        assert y.dtype == wanted.dtype and y.shape == wanted.shape
        off = row_norms(y - wanted) / row_norms(wanted - was)
        assert (off < 1e-4).float().mean() > 0.9 and off.max() < 1


def row_norms(x: Tensor) -> Tensor:
    return x.flatten(0, -2).norm(dim=-1)


def outputs(part: Part, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    made = part.function(part.module, *(tensor.clone() for tensor in inputs.values()))
    return [made] if isinstance(made, Tensor) else list(made)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("model", "name"), PARTS)
def test_a_part(model: str, name: str, precision: EightBit) -> None:
    """The same results and the same names of weights as eight-bit modules."""
    check_part(SPECS[model], name, precision, 50)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("model", "name"), BLOCKS)
def test_a_block(model: str, name: str, precision: EightBit) -> None:
    check_part(SPECS[model], name, precision, 50)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["dit.pre", "dit.post", "dit.kv"])
def test_a_part_of_the_1_3b(name: str, precision: EightBit) -> None:
    check_part(replace(DIT_1_3B, num_layers=1), name, precision, 300)


def nodes(model: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("model", "name", "dtype"),
    [(model, name, torch.float32) for model, name in PARTS]
    + [("t2v", name, torch.bfloat16) for name in ("dit.pre", "dit.post", "dit.kv")],
)
def test_which_products_are_eight_bit(
    model: str, name: str, dtype: torch.dtype, precision: EightBit
) -> None:
    """Those of the policy, each between two DequantizeLinear of constant scales, and no other."""
    dit = graphs.empty(SPECS[model], dtype)
    part = next(part for part in graphs.parts(dit, dtype) if part.name == name)
    plain = traced(SPECS[model], name, dtype)
    graph = quantise(plain, graphs.formats(dit, part, precision))
    full, weights = FULL.get(name, set()), WEIGHTS.get((model, name), set())
    named = {f"{linear}.weight".removeprefix(".") for linear in full | weights}
    inputs = {value.name: value.dtype for value in graph.graph.inputs}
    added = {f"{weight}_scale" for weight in named}
    assert inputs.keys() - added == {value.name for value in plain.graph.inputs}
    assert {name for name, held in inputs.items() if held in STORED.values()} == named
    check_nodes(graph, full, NUM_ROUNDED.get(name, 0))


def check_nodes(graph: ir.Model, full: set[str], num_rounded: int) -> None:
    """Products of eight-bit numbers are those of `full`; nothing else reads what was rounded."""
    products, makers = nodes(graph, "Gemm"), nodes(graph, "QuantizeLinear")
    weights = [origin(gemm.inputs[1], "DequantizeLinear").name for gemm in products]
    assert sorted(weights) == sorted(f"{linear}.weight" for linear in full)
    rounded = {origin(gemm.inputs[0], "DequantizeLinear") for gemm in products}
    assert rounded == {node.outputs[0] for node in makers} and len(makers) == num_rounded
    wideners = nodes(graph, "DequantizeLinear")
    for node in makers + wideners:
        assert all(value.const_value is not None for value in node.inputs[1:])
    for node in wideners:
        readers = {reader.op_type for reader, _ in node.outputs[0].uses()}
        assert readers == ({"Gemm"} if full else {"Mul"})


def origin(value: ir.Value, kind: str) -> ir.Value:
    """What a node of this kind made the value from."""
    node = value.producer()
    assert node is not None and node.op_type == kind, f"{node=}"
    return node.inputs[0]


@pytest.mark.parametrize("name", ["dit.text", "dit.time", "dit.head", "dit.patch"])
def test_the_rest_stays_as_it_is(name: str) -> None:
    dit = graphs.empty(T2V, torch.float32)
    part = part_of(dit, name)
    assert graphs.formats(dit, part, "int8") == {}


def test_narrow_rows_stay_as_they_are() -> None:
    """As `policy_formats` has it: a width that is no multiple of 128."""
    dit = graphs.empty(replace(T2V, ffn_dim=320), torch.float32)
    formats = graphs.formats(dit, part_of(dit, "dit.post"), "int8")
    assert "ffn.2.weight" not in formats and "ffn.0.weight" in formats


def test_what_is_no_product_is_refused() -> None:
    """A weight that the graph reads in another way has no eight-bit form."""
    part = product(256, 384, torch.float32)
    part = replace(part, function=lambda linear, x: linear(x) + linear.weight.sum())
    with pytest.raises(AssertionError, match="weight"):
        quantise(trace(part), {"weight": INT8})
