"""The transformer against diffusers with the same random weights, then what only ours promises."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import Tensor, nn

from wanrt.config import MODELS, DitSpec
from wanrt.errors import UsageError
from wanrt.models import layers
from wanrt.models.dit import TextCache, WanDiT, sinusoid
from wanrt.models.layers import RopeTables, inverse_frequencies
from wanrt.weights.names import to_diffusers

SMALL = DitSpec(dim=256, ffn_dim=320, num_heads=2, num_layers=3, text_dim=48)
CLIP_DIM = 80
SPECS = {
    "t2v": SMALL,
    "i2v": replace(SMALL, in_dim=36, image_dim=CLIP_DIM),
    "flf2v": replace(SMALL, in_dim=36, image_dim=CLIP_DIM, image_pos_tokens=514),
    "vace": replace(SMALL, vace_layers=(0, 2)),
    "i2v-a14b": replace(SMALL, in_dim=36),
    "ti2v-5b": replace(SMALL, in_dim=48, out_dim=48),
}
T, H, W = 3, 6, 10  # latent size; tokens are T * H/2 * W/2
TOKENS = T * H * W // 4


class Inputs(NamedTuple):
    """Arguments of one forward call."""

    latents: Tensor
    t: Tensor
    context: Tensor
    y: Tensor | None
    image_context: Tensor | None
    vace_context: Tensor | None

    def call(self, dit: WanDiT, context: TextCache | None = None, **changes: object) -> Tensor:
        names = ("y", "vace_context") if context else ("y", "image_context", "vace_context")
        kwargs = {name: getattr(self, name) for name in names} | changes
        return dit(self.latents, self.t, context or self.context, **kwargs)


def build(spec: DitSpec, seed: int = 0) -> WanDiT:
    """A model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    dit = WanDiT(spec)
    for name, p in dit.named_parameters():
        if p.ndim > 1 and not name.endswith(("modulation", "emb_pos")):
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            nn.init.normal_(p, mean="norm" in name and name.endswith("weight"), std=0.2)
    return dit.requires_grad_(False)


def inputs(spec: DitSpec, batch: int = 2, seed: int = 1) -> Inputs:
    """Text of 20 and 31 tokens, zero rows behind; two levels of t within a clip for TI2V-5B."""
    torch.manual_seed(seed)
    size = (batch, T, H, W)
    channels = 48 if spec.out_dim == 48 else 16
    context = torch.randn(batch, spec.text_len, spec.text_dim)
    for b in range(batch):
        context[b, 20 + 11 * b :] = 0
    t = torch.tensor([999, 417])[:batch]
    if channels == 48:
        t = t[:, None].repeat(1, TOKENS)
        t[:, : TOKENS // T] = 0
    clip_tokens = spec.image_pos_tokens or 257
    return Inputs(
        latents=torch.randn(batch, channels, *size[1:]),
        t=t,
        context=context,
        y=torch.randn(batch, 20, *size[1:]) if spec.in_dim == 36 else None,
        image_context=torch.randn(batch, clip_tokens, CLIP_DIM) if spec.image_dim else None,
        vace_context=torch.randn(batch, 96, *size[1:]) if spec.vace_layers else None,
    )


class Fp64Sinusoid(nn.Module):
    """Angles of t in fp64, as the reference has them, in the place of diffusers' fp32 ones."""

    def forward(self, t: Tensor) -> Tensor:
        return sinusoid(t, 256)


def diffusers_twin(dit: WanDiT) -> nn.Module:
    """Diffusers' model of the same shape and weights."""
    spec = dit.spec
    kwargs = {
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": spec.head_dim,
        "in_channels": spec.in_dim,
        "out_channels": spec.out_dim,
        "text_dim": spec.text_dim,
        "freq_dim": spec.freq_dim,
        "ffn_dim": spec.ffn_dim,
        "num_layers": spec.num_layers,
        "eps": spec.eps,
        "image_dim": spec.image_dim,
        "added_kv_proj_dim": spec.dim if spec.image_dim else None,
        "pos_embed_seq_len": spec.image_pos_tokens,
    }
    if spec.vace_layers:
        # diffusers would give VACE blocks the image projections too; no released model has both
        twin = WanVACETransformer3DModel(**kwargs, vace_layers=list(spec.vace_layers))
    else:
        twin = WanTransformer3DModel(**kwargs, cross_attn_norm=True)
    weights = dit.state_dict()
    names = to_diffusers(weights, "dit")
    twin.load_state_dict({names[n].stored[0]: w for n, w in weights.items()}, strict=True)
    return twin.eval()


def run_twin(twin: nn.Module, given: Inputs, scale: float = 1.0) -> Tensor:
    latents = given.latents if given.y is None else torch.cat((given.latents, given.y), 1)
    image = given.image_context
    if image is not None and image.shape[1] == 514:  # diffusers wants both images along the batch
        image = image.unflatten(1, (2, 257)).flatten(0, 1)
    control = {}
    if given.vace_context is not None:
        scales = torch.full((len(twin.config.vace_layers),), scale)
        control = {
            "control_hidden_states": given.vace_context,
            "control_hidden_states_scale": scales,
        }
    return twin(latents, given.t, given.context, image, return_dict=False, **control)[0]


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("variant", "scale"),
    [(name, 1.0) for name in SPECS] + [("vace", 0.0), ("vace", 0.5), ("vace", 1.7)],
)
def test_equals_diffusers(variant: str, scale: float) -> None:
    dit, given = build(SPECS[variant]), inputs(SPECS[variant])
    expected = run_twin(diffusers_twin(dit), given, scale)
    kwargs = {"context_scale": scale} if variant == "vace" else {}
    actual = given.call(dit, **kwargs)
    assert actual.dtype == torch.float32
    assert error(actual, expected) <= 1e-5


def test_what_is_left_is_the_sinusoid() -> None:
    """The reference has the angles of t in fp64, diffusers in fp32; ours follows the reference."""
    dit, given = build(SMALL), inputs(SMALL)
    twin, ours = diffusers_twin(dit), given.call(dit)
    assert error(ours, run_twin(twin, given)) > 1.5e-6
    twin.condition_embedder.timesteps_proj = Fp64Sinusoid()
    assert error(ours, run_twin(twin, given)) < 1e-6


def test_gradients_equal_diffusers() -> None:
    spec = replace(SMALL, num_layers=2)
    dit, given = build(spec).requires_grad_(), inputs(spec)
    twin = diffusers_twin(dit)
    with torch.enable_grad():
        given.call(dit).square().mean().backward()
        run_twin(twin, given).square().mean().backward()
    names, theirs = to_diffusers(dit.state_dict(), "dit"), dict(twin.named_parameters())
    for name, p in dit.named_parameters():
        expected = theirs[names[name].stored[0]].grad
        # the softmax ignores what is added to every key, so a key's bias has no gradient but noise
        scale = 1e-3 if name.endswith(".k.bias") else expected.abs().max()
        assert (p.grad - expected).abs().max() <= 1e-4 * scale, name


def test_sinusoid_is_the_references() -> None:
    """Values of Wan2.1 at t=999. Diffusers' fp32 angles miss them by more than fp32 needs to."""
    ours = sinusoid(torch.tensor([999]), 256)[0]
    expected = torch.tensor([0.99964985, 0.96378248, -0.39899176])
    expected_sin = torch.tensor([-0.02646075, -0.26668958, -0.91695451])
    assert (ours[:3] - expected).abs().max() <= 6e-8
    assert (ours[128:131] - expected_sin).abs().max() <= 6e-8
    theirs = get_timestep_embedding(torch.tensor([999]), 256, True, 0)[0]
    assert 1e-6 < (theirs[:3] - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("pairs", "first", "last"),
    [
        (22, (1, 0.657933225, 0.432876128), 1.51991108e-4),
        (21, (1, 0.644946677, 0.415956216), 1.55051578e-4),
    ],
)
def test_rope_inverse_frequencies(pairs: int, first: tuple[float, ...], last: float) -> None:
    values = inverse_frequencies(pairs)
    assert len(values) == pairs
    assert values[:3].tolist() == pytest.approx(first, rel=1e-8)
    assert values[-1].item() == pytest.approx(last, rel=1e-8)


def test_rope_table_places_every_axis() -> None:
    """Token (f, row, column) turns 22 pairs by f, 21 by row, 21 by column, columns fastest."""
    grid = (3, 4, 5)
    table = RopeTables(128).get(grid, torch.device("cpu"))
    assert table.shape == (60, 64, 2)
    for f, row, column in [(0, 0, 0), (2, 0, 0), (0, 3, 0), (0, 0, 4), (1, 2, 3)]:
        token = (f * 4 + row) * 5 + column
        angles = [f * 10000 ** (-i / 22) for i in range(22)]
        angles += [p * 10000 ** (-i / 21) for p in (row, column) for i in range(21)]
        expected = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
        assert torch.equal(table[token], expected)


def test_rope_tables_are_kept_and_bounded() -> None:
    tables, cpu = RopeTables(128, capacity=2), torch.device("cpu")
    first = tables.get((1, 2, 2), cpu)
    assert tables.get((1, 2, 2), cpu) is first
    tables.get((2, 2, 2), cpu)
    tables.get((3, 2, 2), cpu)
    assert tables.get((1, 2, 2), cpu) is not first


# Spec 7.1 and 6.2: parameters in all, tensors in all (27 per block, 15 outside).
TOTALS = {
    "wan2.1-t2v-1.3b": (1_418_996_800, 825),
    "wan2.1-t2v-14b": (14_288_491_584, 1095),
    "wan2.1-i2v-14b-480p": (16_394_878_784, 1095 + 40 * 5 + 8),
    "wan2.1-i2v-14b-720p": (16_394_878_784, 1095 + 40 * 5 + 8),
    "wan2.1-flf2v-14b-720p": (16_395_536_704, 1095 + 40 * 5 + 9),
    "wan2.1-vace-1.3b": (2_153_972_032, 825 + 15 * 29 + 4),
    "wan2.1-vace-14b": (17_337_592_896, 1095 + 8 * 29 + 4),
    "wan2.2-t2v-a14b": (14_288_491_584, 1095),
    "wan2.2-i2v-a14b": (14_288_901_184, 1095),
    "wan2.2-ti2v-5b": (4_999_787_712, 825),
}


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"nano"}))
def test_parameter_totals(model: str) -> None:
    with torch.device("meta"):
        dit = WanDiT(MODELS[model].dit)
    tensors = dit.state_dict()
    assert (sum(w.numel() for w in tensors.values()), len(tensors)) == TOTALS[model]
    assert all(w.is_meta for w in tensors.values())


NAMES_1_3B = {
    "patch_embedding.weight": (1536, 16, 1, 2, 2),
    "text_embedding.0.weight": (1536, 4096),
    "text_embedding.2.bias": (1536,),
    "time_embedding.0.weight": (1536, 256),
    "time_embedding.2.weight": (1536, 1536),
    "time_projection.1.weight": (9216, 1536),
    "blocks.29.modulation": (1, 6, 1536),
    "blocks.0.self_attn.o.weight": (1536, 1536),
    "blocks.0.self_attn.norm_k.weight": (1536,),
    "blocks.0.norm3.bias": (1536,),
    "blocks.0.cross_attn.norm_q.weight": (1536,),
    "blocks.0.ffn.0.weight": (8960, 1536),
    "blocks.0.ffn.2.weight": (1536, 8960),
    "head.modulation": (1, 2, 1536),
    "head.head.weight": (64, 1536),
    "vace_patch_embedding.weight": (1536, 96, 1, 2, 2),
    "vace_blocks.0.before_proj.weight": (1536, 1536),
    "vace_blocks.14.after_proj.bias": (1536,),
    "vace_blocks.14.cross_attn.v.weight": (1536, 1536),
}
NAMES_FLF2V = {
    "patch_embedding.weight": (5120, 36, 1, 2, 2),
    "blocks.39.cross_attn.k_img.weight": (5120, 5120),
    "blocks.39.cross_attn.v_img.bias": (5120,),
    "blocks.39.cross_attn.norm_k_img.weight": (5120,),
    "img_emb.proj.0.bias": (1280,),
    "img_emb.proj.1.weight": (1280, 1280),
    "img_emb.proj.3.weight": (5120, 1280),
    "img_emb.proj.4.weight": (5120,),
    "img_emb.emb_pos": (1, 514, 1280),
}


@pytest.mark.parametrize(
    ("model", "names"),
    [("wan2.1-vace-1.3b", NAMES_1_3B), ("wan2.1-flf2v-14b-720p", NAMES_FLF2V)],
)
def test_original_names(model: str, names: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        tensors = WanDiT(MODELS[model].dit).state_dict()
    assert {name: tuple(tensors[name].shape) for name in names} == names


@pytest.mark.parametrize("variant", SPECS)
def test_prepared_context_is_the_direct_call(variant: str) -> None:
    dit, given = build(SPECS[variant]), inputs(SPECS[variant])
    cache = dit.prepare(given.context, given.image_context)
    direct = given.call(dit)
    for _ in range(2):  # the cache serves every step
        assert torch.equal(given.call(dit, cache), direct)


@pytest.mark.parametrize("variant", ["t2v", "i2v", "vace"])
def test_one_row_stands_for_all_pad_rows(variant: str) -> None:
    """512 - n equal rows are one row with log(512 - n) on its score; rows at -inf do not count."""
    dit, given = build(SPECS[variant]), inputs(SPECS[variant])
    context, bias = given.context[:, :40], torch.full((2, 40), -torch.inf)
    for b, length in enumerate((20, 31)):
        bias[b, :length] = 0
        bias[b, length] = math.log(512 - length)
    cache = dit.prepare(context, given.image_context, key_bias=bias)
    assert error(given.call(dit, cache), given.call(dit)) <= 1e-6


def test_gradient_flows_through_the_cache() -> None:
    dit, given = build(SMALL).requires_grad_(), inputs(SMALL)
    grads = []
    with torch.enable_grad():
        for prepared in (False, True):
            context = given.context.clone().requires_grad_()
            cache = dit.prepare(context) if prepared else None
            loss = given._replace(context=context).call(dit, cache).square().mean()
            grads.append(torch.autograd.grad(loss, [context, *dit.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(g.abs().max() > 0 for g in grads[0])


def test_one_context_serves_a_batch() -> None:
    dit, given = build(SMALL), inputs(SMALL)
    context = given.context[:1]
    expected = given._replace(context=context.repeat(2, 1, 1)).call(dit)
    assert error(given._replace(context=context).call(dit), expected) <= 1e-6


@pytest.mark.parametrize("t", [417, 417.0, 363.25])
def test_one_t_is_the_same_t_for_all(t: float) -> None:
    dit, given = build(SMALL), inputs(SMALL)
    scalar = given._replace(t=t).call(dit)
    assert torch.equal(given._replace(t=torch.tensor([t, t])).call(dit), scalar)
    per_token = given._replace(t=torch.full((2, TOKENS), t))
    assert error(per_token.call(dit), scalar) <= 1e-6
    assert error(given._replace(t=t + 100).call(dit), scalar) > 1e-3


@pytest.mark.parametrize("variant", SPECS)
def test_samples_of_a_batch_are_independent(variant: str) -> None:
    dit, given = build(SPECS[variant]), inputs(SPECS[variant])
    both = given.call(dit)
    for b in range(2):
        alone = Inputs(*(None if x is None else x[b : b + 1] for x in given)).call(dit)
        assert error(alone, both[b : b + 1]) <= 2e-6


@pytest.mark.parametrize("variant", SPECS)
def test_inference_equals_training_and_touches_no_input(variant: str) -> None:
    """Without autograd the residual stream is updated in place: its result and the inputs stay."""
    dit, given, before = build(SPECS[variant]), inputs(SPECS[variant]), inputs(SPECS[variant])
    with torch.inference_mode():
        fast = given.call(dit).clone()
    with torch.enable_grad():
        assert torch.equal(given.call(dit), fast)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True) if x is not None)


def test_trains_after_inference_mode() -> None:
    """Tables first built in inference mode serve a backward pass."""
    dit, given = build(SMALL).requires_grad_(), inputs(SMALL)
    with torch.inference_mode():
        given.call(dit)
    with torch.enable_grad():
        given.call(dit).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.parameters())


FP32 = (
    "time_embedding.0.weight time_embedding.2.bias time_projection.1.weight head.modulation"
    " head.head.weight head.head.bias blocks.1.modulation blocks.1.norm3.weight blocks.1.norm3.bias"
    " blocks.1.self_attn.norm_q.weight blocks.1.cross_attn.norm_k.weight"
    " blocks.1.cross_attn.norm_k_img.weight vace_blocks.1.modulation vace_blocks.0.norm3.weight"
    " img_emb.proj.0.weight img_emb.proj.4.bias img_emb.emb_pos"
)
HALF = (
    "patch_embedding.weight patch_embedding.bias text_embedding.0.weight"
    " text_embedding.2.bias img_emb.proj.1.weight img_emb.proj.3.bias"
    " blocks.1.self_attn.q.weight blocks.1.self_attn.o.bias blocks.1.cross_attn.k.weight"
    " blocks.1.cross_attn.v_img.weight blocks.1.ffn.0.weight blocks.1.ffn.2.bias"
    " vace_patch_embedding.weight vace_blocks.0.before_proj.weight"
    " vace_blocks.1.after_proj.bias vace_blocks.1.self_attn.k.weight"
)


def is_island(name: str) -> bool:
    return any(re.search(pattern, name) for pattern in WanDiT.FP32_NAMES)


@pytest.mark.parametrize(("names", "island"), [(FP32, True), (HALF, False)])
def test_fp32_islands(names: str, island: bool) -> None:
    known = {n for s in ("flf2v", "vace") for n in WanDiT(SPECS[s]).state_dict()}
    for name in names.split():
        assert name in known, name
        assert is_island(name) == island, name


def lower(dit: WanDiT, dtype: torch.dtype) -> WanDiT:
    for name, p in dit.named_parameters():
        if not is_island(name):
            p.data = p.data.to(dtype)
    return dit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", SPECS)
def test_half_precision_stays_close(variant: str, dtype: torch.dtype) -> None:
    """Against fp32 with the same rounded weights: only the activations differ in precision."""
    half, full = lower(build(SPECS[variant]), dtype), lower(build(SPECS[variant]), dtype).float()
    given = inputs(SPECS[variant])
    actual = given.call(half)
    assert actual.dtype == torch.float32
    assert 0 < error(actual, given.call(full)) < 2e-2


def test_activation_dtypes() -> None:
    """The table of the reference's policy, seen at the modules' borders."""
    spec, seen = SPECS["vace"], {}
    dit = lower(build(spec), torch.bfloat16)

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            seen[name] = (args[0].dtype, result.dtype)

        module.register_forward_hook(hook)

    for name, module in dit.named_modules():
        watch(name, module)
    attended = set()

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        attended.update((q.dtype, k.dtype, v.dtype))
        return original(q, k, v, bias)

    original = layers.TORCH.attention
    for module in dit.modules():
        if hasattr(module, "ops"):
            module.ops = module.ops._replace(attention=attention)
    inputs(spec).call(dit)
    fp32, bf16 = torch.float32, torch.bfloat16
    expected = {
        "patch_embedding": (fp32, bf16),
        "time_embedding": (fp32, fp32),
        "time_projection": (fp32, fp32),
        "text_embedding": (fp32, bf16),
        "blocks.0": (fp32, fp32),
        "blocks.0.self_attn.q": (bf16, bf16),
        "blocks.0.self_attn.o": (bf16, bf16),
        "blocks.0.cross_attn.q": (bf16, bf16),
        "blocks.0.norm3": (fp32, bf16),
        "blocks.0.ffn.0": (bf16, bf16),
        "blocks.0.ffn.1": (bf16, bf16),
        "blocks.2": (fp32, fp32),
        "vace_blocks.1": (fp32, fp32),
        "vace_blocks.1.after_proj": (fp32, bf16),
        "head.head": (fp32, fp32),
    }
    assert {name: seen[name] for name in expected} == expected
    assert attended == {bf16}


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("i2v-a14b", {"y": None}, "have 16 channels together; this model takes 36"),
        (
            "t2v",
            {"y": torch.zeros(2, 20, T, H, W)},
            "have 36 channels together; this model takes 16",
        ),
        ("t2v", {"latents": torch.zeros(2, 16, T, H, 5)}, r"\[3, 6, 5\] do not divide"),
        ("t2v", {"context": torch.zeros(2, 512, 7)}, "text of width 7; this model takes 48"),
        ("t2v", {"image_context": torch.zeros(2, 257, CLIP_DIM)}, "takes no image_context"),
        ("i2v", {"image_context": None}, "needs image_context"),
        ("vace", {"vace_context": None}, "needs vace_context"),
        ("t2v", {"vace_context": torch.zeros(2, 96, T, H, W)}, "takes no vace_context"),
        (
            "t2v",
            {"t": torch.zeros(3)},
            rf"t of shape \[3\]; give one number, \[2\] or \[2, {TOKENS}\]",
        ),
    ],
)
def test_wrong_conditions_are_named(
    variant: str, changes: dict[str, Tensor | None], message: str
) -> None:
    dit, given = build(SPECS[variant]), inputs(SPECS[variant])
    with pytest.raises(UsageError, match=message):
        given._replace(**changes).call(dit)


def test_image_context_is_given_once() -> None:
    dit, given = build(SPECS["i2v"]), inputs(SPECS["i2v"])
    cache = dit.prepare(given.context, given.image_context)
    with pytest.raises(UsageError, match="already part of the prepared context"):
        given.call(dit, cache, image_context=given.image_context)
