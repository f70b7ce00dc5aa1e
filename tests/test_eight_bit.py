"""Eight-bit transformers: each product against fp64, the same bits wherever the weights lie."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wanrt.config import DIT_1_3B, MODELS, NANO
from wanrt.errors import UsageError
from wanrt.kernels import torch_quantize
from wanrt.kernels.cases import heavy_tailed
from wanrt.kernels.reference import GROUP, quantize, rotate
from wanrt.memory.placement import Placement
from wanrt.models.dit import Block, TimeEmbedding
from wanrt.models.eight_bit import convert, policy_formats, quantize_attention
from wanrt.models.layers import RopeTables
from wanrt.models.lora import LowRankBranch
from wanrt.models.quantized import QuantizedLinear
from wanrt.quant.formats import FORMATS, LinearFormat
from wanrt.quant.policy import EightBit, level_of
from wanrt.weights.load import load_component, skeleton
from wanrt.weights.quantised import scale_of

CPU = torch.device("cpu")
PRECISIONS: tuple[EightBit, ...] = ("int8", "fp8")


def filled(
    form: LinearFormat, inner: int = 256, outer: int = 384
) -> tuple[QuantizedLinear, Tensor]:
    """A product with random weights, and the weights it stands for, fp64."""
    linear = QuantizedLinear(inner, outer, form, torch.float32)
    made = torch_quantize.quantize_weight(torch.randn(outer, inner), form.dtype, form.rotated)
    linear.weight.data, linear.weight_scale.data = made.values, made.scale
    linear.bias.data = torch.randn(outer)
    plain = torch_quantize.dequantize(made)
    return linear, (rotate(plain) if form.rotated else plain).double()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@torch.no_grad()
def test_a_product(form: LinearFormat) -> None:
    """Of the numbers that weight and activations stand for: only sums round."""
    torch.manual_seed(0)
    linear, weight = filled(form)
    x = torch.randn(2, 5, 256)
    seen = x.double()
    if form.activations:
        made = quantize(x, form.dtype, GROUP, form.rotated)
        seen = torch_quantize.dequantize(made)
        seen = (rotate(seen) if form.rotated else seen).double()
    expected = seen @ weight.T + linear.bias.double()
    assert torch.allclose(linear(x).double(), expected, rtol=1e-5, atol=2e-5)
    residual, gate = torch.randn(2, 5, 384), torch.randn(2, 1, 384)
    if form.activations:
        assert torch.equal(linear(x), linear(made))
        added = linear.add_to(residual.clone(), x, gate)
        assert torch.allclose(added.double(), residual + gate * expected, rtol=1e-5, atol=5e-5)
    else:
        assert linear.input_form is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@torch.no_grad()
def test_loras_and_differences_add_to_a_product(form: LinearFormat) -> None:
    torch.manual_seed(1)
    linear, _ = filled(form)
    x, down, up = torch.randn(1, 5, 256), torch.randn(4, 256), torch.randn(384, 4)
    base = linear(x)
    linear.branch = LowRankBranch.join([(down, up)])
    assert linear.input_form is None  # the branch wants activations that are not rounded
    assert torch.allclose(linear(x) - base, x @ down.T @ up.T, atol=1e-4, rtol=1e-4)
    linear.branch, linear.difference = None, up @ down
    assert torch.allclose(linear(x) - base, x @ down.T @ up.T, atol=1e-4, rtol=1e-4)
    linear.difference = None
    assert torch.equal(linear(x), base)


@torch.no_grad()
def test_safe_products_round_no_activations() -> None:
    torch.manual_seed(2)
    linear, weight = filled(FORMATS["int8-rotated"])
    x = heavy_tailed(1, 7, 256)
    linear.safe = True
    expected = x.double() @ weight.T + linear.bias.double()
    assert torch.allclose(linear(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_long_sequences_go_in_parts(precision: EightBit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, samples and per-token gates included; sums of fp8 are made in another order."""
    torch.manual_seed(3)
    spec = replace(NANO.dit, num_layers=1)
    block, x = eight_bit(Block(spec), precision).ffn, torch.randn(2, 50, spec.dim)
    residual = torch.randn(2, 50, spec.dim)
    for gate in (torch.randn(1, 1, spec.dim), torch.randn(2, 50, spec.dim)):
        whole = block.add_to(residual.clone(), x, gate, None)
        monkeypatch.setattr("wanrt.models.layers.FEED_FORWARD_ROWS", 16)
        parts = block.add_to(residual.clone(), x, gate, None)
        monkeypatch.undo()
        error = (parts - whole).norm() / whole.norm()
        assert error == 0 if precision == "int8" else error < 1e-3


def eight_bit(block: Block, precision: EightBit) -> Block:
    """The block with the policy's formats, made of its own weights."""
    model = nn.Module()
    model.blocks = nn.ModuleList([block.requires_grad_(False)])
    formats = policy_formats(model, precision)
    convert(model, {name.removesuffix(".weight"): form for name, form in formats.items()})
    quantize_attention(model, precision, CPU, torch.float32)
    return block.eval()


@pytest.mark.parametrize(("precision", "bar"), [("int8", 0.999), ("fp8", 0.997)])
@torch.no_grad()
def test_a_true_shaped_block_with_heavy_tails(precision: EightBit, bar: float) -> None:
    """What a block of the 1.3B adds to its tokens: cosine with fp32."""
    torch.manual_seed(4)
    block = Block(DIT_1_3B).eval().requires_grad_(False)
    for name, p in block.named_parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim == 2 else 0.1)
        if "norm" in name and name.endswith("weight"):
            p.add_(1.0)
    grid, dim = (1, 8, 16), DIT_1_3B.dim
    freqs = RopeTables(DIT_1_3B.head_dim).get(grid, CPU)
    x, text = heavy_tailed(1, 128, dim), heavy_tailed(1, 40, dim)
    time = TimeEmbedding(torch.randn(1, 1, dim), torch.randn(1, 6, dim), None)

    def added() -> Tensor:
        kv = block.cross_attn.prepare(text, None)
        return (block(x.clone(), time, freqs, kv) - x).flatten().double()

    expected = added()
    eight_bit(block, precision)
    assert torch.cosine_similarity(added(), expected, 0) >= bar


@pytest.mark.parametrize("model", MODELS)
def test_policy_covers_every_model(model: str) -> None:
    """Every product of a block is in eight bits, nothing else is."""
    dit = skeleton("dit", MODELS[model].dit)
    formats = policy_formats(dit, "int8")
    for name, part in dit.named_modules():
        if isinstance(part, nn.Linear):
            inside = name.startswith(("blocks.", "vace_blocks."))
            assert (f"{name}.weight" in formats) == inside, name
            assert (level_of(name) != "plain") == inside, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["nano", "wan2.1-i2v-14b-480p", "wan2.1-vace-1.3b"])
def test_loaded_weights_are_those_of_the_file(model: str, precision: EightBit, zoo: Any) -> None:
    """Quantised as the reference does it, to the bit; what is beside stays as wide as it is."""
    path = zoo.path(model)
    plain = load_component(path, "dit").state_dict()
    made = load_component(path, "dit", eight_bit=precision)
    formats = policy_formats(skeleton("dit", zoo.specs[model].dit), precision)
    state = made.state_dict()
    assert set(state) == set(plain) | {scale_of(name) for name in formats}
    for name, tensor in state.items():
        if name in formats:
            expected = quantize(plain[name], formats[name].dtype, hadamard=formats[name].rotated)
            assert torch.equal(tensor.view(torch.uint8), expected.values.view(torch.uint8)), name
            assert torch.equal(state[scale_of(name)], expected.scale), name
        elif name in plain:
            assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("placed", [(0, 2, None), (1, 2, None), (0, 3, 0), (1, 2, 1)])
@torch.no_grad()
def test_streamed_equals_resident(
    precision: EightBit, placed: tuple[int, int, int | None], zoo: Any
) -> None:
    """From memory and from the file, and again in the next pass."""
    resident, slots, pinned = placed
    num = NANO.dit.num_layers
    placement = Placement(num, resident, slots, num - resident if pinned is None else pinned)
    torch.manual_seed(5)
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 9, NANO.dit.text_dim)
    whole = load_component(zoo.path("nano"), "dit", eight_bit=precision)
    streamed = load_component(zoo.path("nano"), "dit", eight_bit=precision, placement=placement)
    for t in (900, 300):
        assert torch.equal(streamed(x, t, text), whole(x, t, text))
    streamed.weight_stream.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_request(precision: EightBit, zoo: Any) -> None:
    """Close to fp32, and not equal: the precision is really used."""
    settings = {"num_frames": 9, "width": 32, "height": 32, "num_steps": 3, "seed": 1}
    plain = zoo.open("nano").generate("a red circle", output="latents", **settings)
    pipe = zoo.open("nano", precision=precision)
    made = pipe.generate("a red circle", output="latents", **settings)
    assert pipe.components.dtypes.eight_bit == precision
    assert not torch.equal(made, plain)
    assert torch.cosine_similarity(made.flatten(), plain.flatten(), 0) > 0.99


def test_rounding_has_no_bias() -> None:
    """Errors are above and below zero equally often: binomial, within 5 standard deviations."""
    torch.manual_seed(6)
    x = torch.randn(512, 1024)
    for form in (FORMATS["int8"], FORMATS["fp8"]):
        made = torch_quantize.quantize_weight(x, form.dtype)
        error = (torch_quantize.dequantize(made) - x)[made.values.float().abs() < 100]
        above, count = int((error > 0).sum()), int((error != 0).sum())
        assert abs(above - count / 2) < 5 * (count / 4) ** 0.5


def test_a_format_that_is_unknown(zoo: Any) -> None:
    with pytest.raises(UsageError, match="int4"):
        zoo.open("nano", precision="int4")
