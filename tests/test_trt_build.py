"""Engines of TensorRT-RTX, built without a GPU: what the builder's log says of them, its refusals.

No engine is run here: that takes a card. What is checked is that they are built, how large they
are, what memory they ask for, and that the same graph gives the same bytes.
"""

import struct
import zlib
from functools import cache

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from wanrt.config import MODELS, NANO
from wanrt.engine.manifest import Input
from wanrt.engine.ort import OrtRunner
from wanrt.errors import FormatError, UsageError
from wanrt.export import dit, engine_set, engines, onnx, qdq, rtx, trt
from wanrt.export.part import Axis, Part, Value
from wanrt.models.layers import Linear
from wanrt.quant.formats import FP8, INT8_ROTATED, INT8_WEIGHTS, LinearFormat

pytest.importorskip("tensorrt_rtx", reason="the builder is not installed (wanrt[rtx])")

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = 32760  # 81 frames of 832x480
SCORES = TOKENS**2 * 2  # bytes of one head's scores in bf16
MEGABYTE = 10**6


@cache
def part_of(model: str, name: str) -> Part:
    empty = dit.empty(MODELS[model].dit, BF16)
    return {p.name: p for p in (dit.attention(empty, BF16), *dit.parts(empty, BF16))}[name]


@cache
def graph_of(model: str, name: str) -> ir.Model:
    return onnx.trace(part_of(model, name))


def build(model: ir.Model, part: Part, card: int, fixed: bool = False) -> trt.Built:
    inputs = engines.inputs_of(model, part)
    given = engines.at_best(inputs) if fixed else inputs
    return trt.build(part.name, onnx.serialise(model), given, (card,))


@pytest.mark.parametrize("card", [86, 89, 120])
@pytest.mark.parametrize("name", ["dit.attention", "dit.block"])
def test_attention_is_one_kernel(name: str, card: int) -> None:
    """No buffer of L * L scores, not even one head's."""
    part = part_of("wan2.1-t2v-1.3b", name)
    built = build(graph_of("wan2.1-t2v-1.3b", name), part, card, fixed=True)
    assert built.attentions == (1 if name == "dit.attention" else 2)
    assert 0 < built.workspace < SCORES
    assert len(built.engine) <= 4 * MEGABYTE
    assert engines.fused(part, built) is True


PRELUDE_END = b"/*__MYELIN_NVRTC_KGEN_BUILTINS_END__*/"


def test_what_a_block_in_int8_is_made_of() -> None:
    """Why it is over four megabytes: text of the builder's, and numbers for as many tokens as may
    come. Should a release change that, docs/engines.md has to."""
    jobs = engines.jobs(["wan2.1-t2v-1.3b"], ["int8"])
    job = next(job for job in jobs if job.part.name == "dit.block")
    model = job.trace()
    built = build(model, job.part, 89)
    pieces = built.engine.split(PRELUDE_END)[:-1]
    assert len({piece[-128_000:] for piece in pieces}) == 1
    assert len(pieces) * 128_000 > 0.6 * len(built.engine)
    for number in (1.0, 0.0):
        assert struct.pack("<f", number) * 75600 in built.engine
    assert 4 * MEGABYTE < len(built.engine) <= 4.7 * MEGABYTE
    assert len(zlib.compress(built.engine)) < 0.4 * MEGABYTE
    assert len(build(model, job.part, 89, fixed=True).engine) < 4 * MEGABYTE


def test_the_gate_sees_attention_that_is_not_fused() -> None:
    """Scores that pass through tanh fit no kernel: 12 heads of them lie in memory, twice."""

    def decomposed(_: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.transpose(2, 3)).tanh().softmax(-1) @ v).transpose(1, 2)

    plain = part_of("wan2.1-t2v-1.3b", "dit.attention")
    part = Part(plain.name, plain.module, decomposed, plain.inputs, ("y",), plain.homes)
    built = build(onnx.trace(part), part, 89, fixed=True)
    assert built.attentions == 0 and built.workspace > 12 * SCORES
    assert engines.fused(part, built) is False
    assert build(onnx.trace(part), part, 89).workspace < SCORES  # why the gate fixes the sizes


def test_two_builds_give_the_same_bytes() -> None:
    """`dit.pre`, of whose three like products the builder is free to take any first."""
    part, model = part_of("wan2.1-t2v-1.3b", "dit.pre"), graph_of("wan2.1-t2v-1.3b", "dit.pre")
    first, *others = [build(model, part, 89) for _ in range(3)]
    if not first.reproducible:
        pytest.skip("this system does not let a process fix its addresses (personality)")
    assert [other.engine for other in others] == [first.engine] * 2
    assert first.release == engine_set.release() and first.kind == "tensorrt-rtx"
    assert len(first.engine) <= 4 * MEGABYTE and engines.fused(part, first) is None


SIZES = (Input("x", "bf16", (1, 128), (64, 128), (64, 128)),)


def eight_bit(dtype: ir.DataType) -> bytes:
    """x W^T with x and W rounded to eight bits."""
    graph = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        product (bfloat16[n, 128] x, bfloat16[128, 128] w) => (bfloat16[n, 128] y) {{
            scale = Constant <value = bfloat16 {{1}}> ()
            a = QuantizeLinear <output_dtype = {dtype.value}> (x, scale)
            b = QuantizeLinear <output_dtype = {dtype.value}> (w, scale)
            c = DequantizeLinear (a, scale)
            d = DequantizeLinear (b, scale)
            y = Gemm <transB = 1> (c, d)
        }}"""
    )
    return onnx.serialise(graph)


@cache
def product() -> tuple[onnx.Model, Part]:
    """The first product of the 1.3B's feed-forward, for 8192 tokens."""
    tokens = Axis("L", 4, 8192, 8192, trace=40)
    module = Linear(1536, 8960, device="meta", dtype=BF16)
    x = Value("x", BF16, (1, tokens, 1536))
    part = Part("product", module, lambda module, x: module(x), (x,), ("y",), ("",))
    return onnx.trace(part), part


WIDENED = 1536 * 8960 * 2  # bytes of its weight in bf16


@pytest.mark.parametrize(
    ("form", "card"), [(INT8_ROTATED, 86), (INT8_ROTATED, 120), (FP8, 89), (FP8, 120)]
)
def test_eight_bit_products_stay_so_where_weights_are_inputs(form: LinearFormat, card: int) -> None:
    """They work in the same memory as with weights within, where there is no wide copy of one."""
    plain, part = product()
    model = qdq.quantise(plain, {"weight": form})
    given = {
        "weight": torch.ones(8960, 1536).to(form.dtype),
        "weight_scale": torch.ones(8960, 1),
        "bias": torch.ones(8960, dtype=BF16),
    }
    embedded = onnx.embed(model, given)
    ours, theirs = (build(one, part, card) for one in (model, embedded))
    assert ours.workspace == theirs.workspace
    assert len(ours.engine) < MEGABYTE < 1536 * 8960 < len(theirs.engine)


def test_a_weight_that_is_widened_shows_in_the_memory() -> None:
    """So that the test above can fail: formats of weights alone multiply in bf16."""
    plain, part = product()
    model = qdq.quantise(plain, {"weight": INT8_WEIGHTS})
    assert WIDENED < build(model, part, 89).workspace < 2 * WIDENED


def test_fp8_is_refused_on_ampere() -> None:
    graph = eight_bit(ir.DataType.FLOAT8E4M3FN)
    with pytest.raises(
        UsageError, match=r"product computes in fp8, which needs .* 8\.9 .* for 8\."
    ):
        trt.build("product", graph, SIZES, (86,))
    with pytest.raises(UsageError, match=r"8\.6, 8\.9 \(take int8 or bf16"):
        trt.build("product", graph, SIZES, (86, 89))
    assert trt.build("product", graph, SIZES, (89,)).engine


def test_int8_is_not_refused_on_ampere() -> None:
    assert trt.build("product", eight_bit(ir.DataType.INT8), SIZES, (86,)).engine


def test_what_cannot_be_built_is_said_in_a_sentence() -> None:
    """Naming the graph, the card and the builder's own reason."""
    attention = """<ir_version: 10, opset_import: ["" : 23]>
        graph (float[1, 2, n, 64] q, float[1, 2, 9, 64] k, float[1, 2, 9, 64] v)
        => (float[1, 2, n, 64] y) { y = Attention (q, k, v) }"""
    sizes = (Input("q", "fp32", (1, 2, 4, 64), (1, 2, 8, 64), (1, 2, 8, 64)),)
    graph = onnx.serialise(ir.from_onnx_text(attention))
    for given, ranges, cards, says in (
        (b"", sizes, (89,), r"dit\.x: tensorrt-rtx .* for 8\.9: it is no ONNX graph"),
        (graph[:20], sizes, (120,), r"dit\.x: .* for 12\.0: .*Failed to parse the ONNX model"),
        (graph, (), (89,), r"no sizes were given for q"),
        (graph, sizes, (89,), r"not supported by a dedicated kernel"),
    ):
        with pytest.raises(FormatError, match=says) as caught:
            trt.build("dit.x", given, ranges, cards)
        assert "CUDA driver" not in str(caught.value) and "\n" not in str(caught.value)


def test_cards_and_builders_that_are_not_there() -> None:
    with pytest.raises(UsageError, match=r"nothing for compute capability 9\.0; choose of 8\.0, "):
        trt.build("dit.x", b"", (), (90,))
    absent = trt.Flavour("tensorrt", "tensorrt_of_nobody", "tensorrt-cu13", ())
    with pytest.raises(UsageError, match=r"not installed: pip install 'tensorrt-cu13'"):
        trt.build("dit.x", b"", (), (), absent)


class TestQueriesOfTwo:
    """Blocks of the models with a CLIP image attend twice by one q."""

    def test_a_builder_that_dies_takes_nothing_with_it(self) -> None:
        """Should a release survive this graph, `rtx.spared` has become needless."""
        part = part_of("wan2.1-i2v-14b-480p", "dit.post")
        with pytest.raises(FormatError, match=r"dit\.post: .* for 8\.9; .* ended with SIGSEGV"):
            build(graph_of("wan2.1-i2v-14b-480p", "dit.post"), part, 89)

    def test_spared_graphs_are_built(self) -> None:
        part = part_of("wan2.1-i2v-14b-480p", "dit.post")
        built = build(rtx.spared(graph_of("wan2.1-i2v-14b-480p", "dit.post")), part, 89)
        assert built.attentions == 2 and len(built.engine) <= 4 * MEGABYTE

    def test_spared_graphs_compute_the_same(self) -> None:
        text = """<ir_version: 10, opset_import: ["" : 23]>
            graph (float[1, 2, n, 8] q, float[1, 2, 5, 8] k, float[1, 2, 3, 8] l)
            => (float[1, 2, n, 8] y, float[1, 2, n, 8] z)
            { y = Attention (q, k, k)  z = Attention (q, l, l) }"""
        plain = onnx.checked(ir.from_onnx_text(text))
        made = rtx.spared(plain)
        assert [n.op_type for n in made.graph] == ["Attention", "Max", "Attention"]
        inputs = {name: torch.randn(1, 2, n, 8) for name, n in (("q", 7), ("k", 5), ("l", 3))}
        cpu = torch.device("cpu")
        ours, theirs = (
            OrtRunner("graph", onnx.serialise(model), cpu, threads=1)(inputs)
            for model in (made, plain)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ("y", "z"))

    def test_other_graphs_stay_as_they_are(self) -> None:
        empty = dit.empty(NANO.dit, FP32)
        part = next(part for part in dit.parts(empty, FP32) if part.name == "dit.head")
        plain = onnx.trace(part)
        assert onnx.serialise(rtx.spared(plain)) == onnx.serialise(plain)


@pytest.mark.slow
def test_a_step_of_the_vae_is_small() -> None:
    """One latent frame with its 32 caches; at 832x480 it works in 1.7 GB."""
    part = next(job.part for job in engines.jobs(["vae-2.1"], ["bf16"]) if "step" in job.part.name)
    assert part.name == "vae.decode.step"
    model = rtx.spared(onnx.trace(part))
    built = build(model, part, 89)
    assert len(built.engine) <= 12 * MEGABYTE
    assert build(model, part, 89, fixed=True).workspace < 2000 * MEGABYTE
