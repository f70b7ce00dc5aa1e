"""Plans are arithmetic; here it is held against modules, traced forward passes and real runs."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wanrt.config import MODELS, WanSpec
from wanrt.kernels import registry
from wanrt.memory.dit_bytes import (
    FORMATS,
    Tokens,
    activation_bytes,
    count_tokens,
    dit_weights,
    latent_bytes,
)
from wanrt.memory.measure import LiveBytes
from wanrt.memory.text_bytes import clip_weights, umt5_weights
from wanrt.memory.vae_costs import vae_weights
from wanrt.models.dit import CrossKV, TextCache, TimeEmbedding, WanDiT
from wanrt.models.layers import Ops
from wanrt.weights.load import skeleton

SHARE = 0.05  # by which a plan may be more than what is measured; it is never less
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def num_bytes(module: nn.Module, dtype: torch.dtype, names: tuple[str, ...] = ()) -> int:
    """Of all weights, or of some, with those in fp32 that the class wants so."""
    fp32 = re.compile("|".join(type(module).FP32_NAMES) or r"(?!)")
    return sum(
        p.numel() * (4 if fp32.search(name) else dtype.itemsize)
        for name, p in module.named_parameters()
        if not names or name in names
    )


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
    assert num_bytes(skeleton("vae", spec.vae), torch.float32) == 4 * vae_weights(spec.vae)
    if spec.clip:
        clip = skeleton("clip", spec.clip)
        assert num_bytes(clip, dtype) == clip_weights(spec.clip, dtype.itemsize).total


def ops_of(backend: str) -> Ops:
    names = {n: backend if getattr(registry.OPS[n], backend) else "torch" for n in Ops._fields}
    return Ops(*(registry.function(n, b) for n, b in names.items()))


def fill(module: nn.Module, dtype: torch.dtype) -> None:
    fp32 = re.compile("|".join(WanDiT.FP32_NAMES))
    for name, p in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        values = torch.empty(p.shape, dtype=torch.float32 if fp32.search(name) else dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))


@torch.inference_mode()
def traced_step(
    spec: WanSpec, tokens: Tokens, size: tuple[int, int, int], dtype: torch.dtype,
    backend: str, branches: int
) -> int:  # fmt: skip
    """Peak bytes of a forward pass of some blocks at real sizes, in fake tensors."""
    d, text = spec.dit, []
    with FakeTensorMode():
        dit = WanDiT(d, ops_of(backend))
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
