"""Plans are arithmetic; here it is held against modules, traced forward passes and real runs."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_vaes import make_empty_int8
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wanrt.config import MODELS, WanSpec
from wanrt.errors import BudgetError
from wanrt.kernels import registry
from wanrt.memory.budget import GIB, HOST_FIXED
from wanrt.memory.dit_bytes import (
    FORMATS,
    Tokens,
    activation_bytes,
    attention_extra,
    count_tokens,
    dit_weights,
    latent_bytes,
)
from wanrt.memory.measure import LiveBytes
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.memory.phases import decode_options
from wanrt.memory.placement import TYPICAL, Ask
from wanrt.memory.plan import make_plan, plan_for_any_text
from wanrt.memory.question import Question
from wanrt.memory.text_bytes import clip_weights, umt5_weights
from wanrt.memory.vae_costs import vae_weight_bytes
from wanrt.memory.vae_formats import VAE_FORMATS
from wanrt.models.dit import Block, CrossKV, TextCache, TimeEmbedding, WanDiT
from wanrt.models.eight_bit import make_eight_bit, policy_formats
from wanrt.models.layers import Chosen, Ops
from wanrt.models.packed import packed
from wanrt.models.quantized import EightBitOps, Products, QuantizedLinear, Quantizers
from wanrt.quant.gguf_blocks import FORMATS as BLOCKS
from wanrt.quant.gguf_blocks import BlockFormat
from wanrt.quant.policy import ATTENTION, EightBit
from wanrt.weights.load import skeleton

SHARE = 0.05  # by which a plan may be more than what is measured; it is never less
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def num_bytes(module: nn.Module, dtype: torch.dtype, names: tuple[str, ...] = ()) -> int:
    """Of all weights, or of some, with those in fp32 that the class wants so."""
    fp32 = re.compile("|".join(type(module).FP32_NAMES) or r"(?!)")
    return sum(
        p.numel() * (4 if fp32.search(name) else dtype.itemsize)
        for name, p in module.named_parameters()
        if not names or name in names
    )


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_eight_bit_weights_are_counted_to_the_byte(model: str, precision: EightBit) -> None:
    """As the policy makes them: eight-bit matrices with their scales, bf16 beside them."""
    spec, dit = MODELS[model], skeleton("dit", MODELS[model].dit)
    make_eight_bit(dit, policy_formats(dit, precision), precision, CPU, torch.bfloat16)
    fp32 = re.compile("|".join((*WanDiT.FP32_NAMES, r"weight_scale$")))

    def counted(names: tuple[str, ...]) -> int:
        bytes_of = {n: 4 if fp32.search(n) else min(2, p.itemsize) for n, p in named.items()}
        return sum(named[n].numel() * bytes_of[n] for n in names)

    named = dict(dit.named_parameters())
    expected = dit_weights(spec.dit, FORMATS[precision])
    blocks, texts = dit.visits()
    assert counted(blocks[0].weights) == expected.block
    assert counted(texts[0].weights) == expected.cross_kv
    assert counted(tuple(named)) == expected.total


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_counted_to_the_byte(model: str, precision: str) -> None:
    spec, dtype = MODELS[model], DTYPES[precision]
    dit = skeleton("dit", spec.dit)
    counted = dit_weights(spec.dit, FORMATS[precision])
    blocks, texts = dit.visits()
    assert num_bytes(dit, dtype, blocks[0].weights) == counted.block
    assert num_bytes(dit, dtype, texts[0].weights) == counted.cross_kv
    assert num_bytes(dit, dtype) == counted.total
    umt5 = skeleton("umt5", spec.umt5)
    table = umt5.token_embedding.weight.numel() * dtype.itemsize
    assert num_bytes(umt5, dtype) - table == umt5_weights(spec.umt5, dtype.itemsize).total
    vae = num_bytes(skeleton("vae", spec.vae), dtype)
    assert vae == vae_weight_bytes(spec.vae, VAE_FORMATS[precision])
    if spec.clip:
        clip = skeleton("clip", spec.clip)
        assert num_bytes(clip, dtype) == clip_weights(spec.clip, dtype.itemsize).total


@pytest.mark.parametrize("name", ["int8", "int8/fp32"])
@pytest.mark.parametrize("model", MODELS)
def test_an_int8_vae_is_counted_to_the_byte(model: str, name: str) -> None:
    """Everything that an int8 convolution keeps has its own dtype; the rest has the VAE's."""
    spec, form = MODELS[model].vae, VAE_FORMATS[name]
    vae = skeleton("vae", spec)
    make_empty_int8(vae)
    plain = sum(p.numel() for p in vae.parameters()) * form.element
    assert plain + sum(b.nbytes for b in vae.buffers()) == vae_weight_bytes(spec, form)


def ops_of(backend: str, kind: type[Chosen] = Ops) -> Chosen:
    names = {n: backend if getattr(registry.OPS[n], backend) else "torch" for n in kind._fields}
    return kind(*(registry.function(n, b) for n, b in names.items()))


def fill(module: nn.Module, dtype: torch.dtype) -> None:
    fp32 = re.compile("|".join((*WanDiT.FP32_NAMES, "weight_scale$")))
    for name, p in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        wanted = torch.float32 if fp32.search(name) else min(dtype, p.dtype, key=by_size)
        values = torch.empty(p.shape, dtype=wanted)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))


def by_size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def use_backend(dit: WanDiT, precision: EightBit, backend: str) -> None:
    """Eight-bit products and attention of this backend, whatever the machine would choose."""
    make_eight_bit(dit, policy_formats(dit, precision), precision, CPU, torch.bfloat16)
    ops = EightBitOps(ops_of(backend, Quantizers), ops_of(backend, Products))
    for part in dit.modules():
        if isinstance(part, QuantizedLinear):
            part.ops = ops
        if isinstance(part, Block):
            part.attend = registry.function(ATTENTION[precision], backend)


@torch.inference_mode()
def traced_step(
    spec: WanSpec, tokens: Tokens, size: tuple[int, int, int], dtype: torch.dtype,
    backend: str, branches: int, precision: EightBit | None = None, form: BlockFormat | None = None
) -> int:  # fmt: skip
    """Peak bytes of a forward pass of some blocks at real sizes, in fake tensors."""
    d, text = spec.dit, []
    with FakeTensorMode():
        dit = WanDiT(d, ops_of(backend))
        if precision is not None:
            use_backend(dit, precision, backend)
        for name, part in list(dit.blocks.named_modules()):
            if form is not None and isinstance(part, nn.Linear):
                dit.blocks.set_submodule(name, packed(part, form, dtype))
        fill(dit, dtype)
        rows = torch.empty(1, d.num_heads, tokens.text, d.head_dim, dtype=dtype)
        image = torch.empty(1, d.num_heads, tokens.image, d.head_dim, dtype=dtype)
        kv = CrossKV(rows, rows, image, image) if tokens.image else CrossKV(rows, rows)
        bias = torch.zeros(1, tokens.text)
        text = TextCache((kv,) * d.num_layers, (kv,) * len(d.vace_layers), bias)
        given = {"y": torch.empty(1, d.in_dim - d.out_dim, *size)} if d.in_dim > d.out_dim else {}
        if d.vace_layers:
            given["vace_context"] = torch.empty(1, d.vace_in_dim, *size)
        latents = torch.empty(1, d.out_dim, *size)
        if tokens.levels:  # how many distinct values t has is nothing a fake tensor can tell
            level = torch.zeros(1, tokens.length, dtype=torch.int64)
            time = TimeEmbedding(torch.empty(2, 1, d.dim), torch.empty(2, 6, d.dim), level)
            dit._embed_time = lambda t, x: time
        grid = tuple(n // p for n, p in zip(size, d.patch_size, strict=True))
        dit.rope.get(grid, torch.device("cpu"))
        with LiveBytes(granule=512) as count:
            dit.forward_each(latents, 500.0, [text] * branches, **given)
    return count.peak


TRACED = [
    ("wan2.1-t2v-1.3b", 832, 480, 81),
    ("wan2.1-t2v-14b", 1280, 720, 81),
    ("wan2.1-i2v-14b-480p", 832, 480, 81),
    ("wan2.1-vace-14b", 832, 480, 81),
    ("wan2.2-ti2v-5b", 1280, 704, 121),
    ("nano", 96, 96, 33),
]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("model,width,height,frames", TRACED[:3])
def test_a_traced_eight_bit_step_peaks_where_the_plan_says(
    model: str, width: int, height: int, frames: int, backend: str, precision: EightBit
) -> None:
    spec, fused = MODELS[model], backend == "triton"
    spec = replace(spec, dit=replace(spec.dit, num_layers=2))
    tokens = count_tokens(spec, width, height, frames, text=60)
    size = ((frames - 1) // 4 + 1, height // 8, width // 8)
    measured = traced_step(spec, tokens, size, torch.bfloat16, backend, 1, precision)
    extra = attention_extra(spec.dit, tokens, FORMATS[precision], fused)
    planned = activation_bytes(spec.dit, tokens, 2, 1, fused, extra)
    assert measured <= planned + latent_bytes(spec.dit, tokens)
    assert planned <= measured * (1 + SHARE)


@pytest.mark.parametrize("width,height", [(832, 480), (256, 256)])
def test_a_traced_step_of_packed_blocks_peaks_where_the_plan_says(width: int, height: int) -> None:
    """Beside the tokens, the matrices that are unpacked: of a long feed-forward both at once."""
    spec = MODELS["wan2.1-t2v-1.3b"]
    spec = replace(spec, dit=replace(spec.dit, num_layers=1))
    tokens = count_tokens(spec, width, height, 81, text=60)
    size = (21, height // 8, width // 8)
    form = next(one for one in BLOCKS.values() if one.name == "Q4_K")
    measured = traced_step(spec, tokens, size, torch.bfloat16, "triton", 1, form=form)
    weights = PackedWeights((), 0, 0, matrices=True, table=0)
    planned = activation_bytes(spec.dit, tokens, 2, 1, fused=True, packed=weights)
    assert measured <= planned + latent_bytes(spec.dit, tokens)
    assert planned <= measured * (1 + SHARE) + weights.scratch
    assert planned > activation_bytes(spec.dit, tokens, 2, 1, fused=True)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("model,width,height,frames", TRACED)
def test_a_traced_step_peaks_where_the_plan_says(
    model: str, width: int, height: int, frames: int, backend: str, branches: int
) -> None:
    spec = MODELS[model]
    dtype = torch.float32 if model == "nano" and backend == "torch" else torch.bfloat16
    spec = replace(spec, dit=replace(spec.dit, num_layers=2, vace_layers=spec.dit.vace_layers[:1]))
    image = model == "wan2.2-ti2v-5b" and backend == "torch"
    tokens = count_tokens(spec, width, height, frames, text=60, image=image)
    stride = spec.vae.spatial_stride
    size = ((frames - 1) // 4 + 1, height // stride, width // stride)
    measured = traced_step(spec, tokens, size, dtype, backend, branches)
    planned = activation_bytes(
        spec.dit, tokens, dtype.itemsize, branches, fused=backend == "triton"
    )
    latents = latent_bytes(spec.dit, tokens)
    assert measured <= planned + latents
    assert planned <= measured * (1 + SHARE)


def failing(error: BudgetError) -> str:
    """The phase that does not fit."""
    return str(error).partition(" (")[2].partition(")")[0]


def failing_with(question: Question, budget: int) -> str | None:
    try:
        plan_for_any_text(question, budget)
    except BudgetError as error:
        return failing(error)
    return None


def test_host_memory_that_is_too_little_is_named() -> None:
    question = Question(MODELS["wan2.1-i2v-14b-720p"], Ask(1280, 720, 81), "bf16", 3 * GIB)
    with pytest.raises(BudgetError, match=r"beside 3.00 GiB of host memory \(step\)") as error:
        plan_for_any_text(question, 8 * GIB)
    enough = re.search(r"--ram ([0-9.]+)G", str(error.value))
    assert enough
    plan = plan_for_any_text(replace(question, ram=int(float(enough[1]) * GIB)), 8 * GIB)
    assert plan.placement("step").num_pinned == 0 and plan.host > GIB


BARS = [  # model, size, precision, GB at most: what the released models must fit
    ("wan2.1-t2v-1.3b", (832, 480), "bf16", 4.0),
    ("wan2.1-t2v-14b", (832, 480), "int8", 6.0),
    ("wan2.1-t2v-14b", (832, 480), "fp8", 6.0),
    ("wan2.1-t2v-14b", (832, 480), "bf16", 8.0),
    ("wan2.1-t2v-14b", (1280, 720), "int8", 8.0),
]


@pytest.mark.parametrize("model,size,precision,gigabytes", BARS)
def test_released_models_fit_small_cards(
    model: str, size: tuple[int, int], precision: str, gigabytes: float
) -> None:
    question = Question(MODELS[model], Ask(*size, 81), precision, 32 * GIB)
    plan = plan_for_any_text(question, int(gigabytes * 1e9))
    assert plan.peak <= gigabytes * 1e9 and plan.ask.text_rows >= 256


def test_the_1_3b_stays_whole_in_5_gb() -> None:
    question = Question(MODELS["wan2.1-t2v-1.3b"], Ask(832, 480, 81), "bf16", 32 * GIB)
    plan = make_plan(question, int(5e9))
    assert plan.placement("step").slots == 0


@pytest.mark.parametrize("size,gigabytes", [((832, 480), 3), ((1280, 720), 6)])
def test_decoding_whole_frames_in_16_bits_is_small(size: tuple[int, int], gigabytes: int) -> None:
    spec, ask = MODELS["wan2.1-t2v-14b"], Ask(*size, 81)
    options = list(decode_options(spec, ask, TYPICAL, VAE_FORMATS["bf16"]))
    whole = [o.phase.peak for o in options if not (o.work.band or o.work.host)]
    assert min(whole) <= gigabytes * 1e9
    assert min(o.phase.peak for o in options if o.work.band) <= 3e9


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(sorted(set(MODELS) - {"nano"})),
    budget=st.integers(2, 40),
    ram=st.integers(3, 64),
    width=st.integers(4, 45),
    height=st.integers(4, 45),
    frames=st.integers(0, 40),
    precision=st.sampled_from(sorted(FORMATS)),
    guided=st.booleans(),
)
def test_a_plan_fits_or_says_what_would(
    model: str, budget: int, ram: int, width: int, height: int, frames: int,
    precision: str, guided: bool,
) -> None:  # fmt: skip
    spec, ask = MODELS[model], Ask(32 * width, 32 * height, 4 * frames + 1, guided, image=True)
    question = Question(spec, ask, precision, ram * GIB)
    try:
        plan = make_plan(question, budget * GIB)
    except BudgetError as error:
        vram = re.search(r"--vram ([0-9.]+)G", str(error))
        assert vram, str(error)
        enough = int(float(vram[1]) * GIB)
        assert enough > budget * GIB
        assert make_plan(question, enough).peak <= enough
        shorter = re.search(r"--frames ([0-9]+)", str(error))
        if shorter:
            ask = replace(ask, num_frames=int(shorter[1]))
            assert make_plan(replace(question, ask=ask), budget * GIB)
        more = re.search(r"--ram ([0-9.]+)G", str(error))
        if more:
            enough = int(float(more[1]) * GIB)
            assert enough > ram * GIB
            assert failing(error) != failing_with(replace(question, ram=enough), budget * GIB)
        return
    assert plan.peak <= budget * GIB
    assert plan.host <= max(0, ram * GIB - HOST_FIXED)
    step = plan.placement("step")
    assert len(step.resident()) == step.num_resident
    assert (step.slots == 0) == (step.num_resident == step.num_blocks)
