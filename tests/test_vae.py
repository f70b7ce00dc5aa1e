"""Both VAEs against diffusers' AutoencoderKLWan, in chunks against whole, and trap by trap."""

import io

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from wanrt.config import MODELS, VaeSpec
from wanrt.kernels import reference_vae
from wanrt.models.vae import LATENT_STATISTICS, WanVAE, patchify, unpatchify
from wanrt.models.vae_layers import (
    TORCH,
    CausalState,
    Resample,
    VaeOps,
    Walk,
    number_slots,
)
from wanrt.models.vae_stages import average_down, duplicate_up
from wanrt.weights.names import to_diffusers

REFERENCE = VaeOps(*(getattr(reference_vae, name) for name in VaeOps._fields))

WAN_21 = VaeSpec(base_dim=8, decoder_base_dim=8)
WAN_22 = VaeSpec(z_dim=48, base_dim=8, decoder_base_dim=16, patch=2)
SPECS = {
    "2.1": WAN_21,
    "2.1-wider": VaeSpec(base_dim=24, decoder_base_dim=24),
    "2.1-one-block": VaeSpec(base_dim=16, decoder_base_dim=16, num_res_blocks=1),
    "2.2": WAN_22,
    "2.2-one-block": VaeSpec(48, base_dim=8, decoder_base_dim=8, num_res_blocks=1, patch=2),
}
BOTH = {"2.1": WAN_21, "2.2": WAN_22}
# Samples, latent frames, latent height and width.
CLIPS = {
    "image": (1, 1, 3, 5),
    "9-frames": (1, 3, 2, 3),
    "17-frames": (1, 5, 3, 2),
    "two": (2, 2, 2, 2),
}


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def random_vae(spec: VaeSpec, ops: VaeOps = TORCH) -> WanVAE:
    """Weights large enough that every layer matters, a head small enough that few pixels clamp."""
    generator = torch.Generator().manual_seed(0)
    vae = WanVAE(spec, ops).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
        p.copy_(torch.randn(p.shape, generator=generator) * scale)
        if name.endswith("gamma"):
            p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
        elif name.startswith("decoder.head.2"):
            p.mul_(0.4)
    return vae


def oracle(vae: WanVAE) -> AutoencoderKLWan:
    """diffusers' VAE with the same weights."""
    spec = vae.spec
    mean, std = LATENT_STATISTICS[spec.z_dim]
    model = AutoencoderKLWan(
        base_dim=spec.base_dim, decoder_base_dim=spec.decoder_base_dim, z_dim=spec.z_dim,
        dim_mult=list(spec.dim_mult), num_res_blocks=spec.num_res_blocks,
        temperal_downsample=list(spec.temporal_downsample), is_residual=spec.residual,
        in_channels=3 * spec.patch**2, out_channels=3 * spec.patch**2,
        patch_size=spec.patch if spec.patch > 1 else None,
        latents_mean=list(mean), latents_std=list(std), scale_factor_spatial=spec.spatial_stride,
    ).eval()  # fmt: skip
    ours = vae.state_dict()
    names = to_diffusers(ours, "vae", spec)
    model.load_state_dict({source.stored[0]: ours[name] for name, source in names.items()})
    return model


def statistics(model: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = model.config.latents_mean, model.config.latents_std
    return torch.tensor(mean).view(-1, 1, 1, 1), torch.tensor(std).view(-1, 1, 1, 1)


def draw_latents(spec: VaeSpec, clip: tuple[int, int, int, int]) -> Tensor:
    b, t, h, w = clip
    return torch.randn(b, spec.z_dim, t, h, w)


def draw_video(spec: VaeSpec, clip: tuple[int, int, int, int]) -> Tensor:
    b, t, h, w = clip
    stride = spec.spatial_stride
    return torch.rand(b, 3, 4 * t - 3, h * stride, w * stride) * 2 - 1


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_decode_matches_diffusers(spec: VaeSpec, clip: tuple[int, int, int, int]) -> None:
    vae = random_vae(spec)
    model = oracle(vae)
    latents = draw_latents(spec, clip)
    mean, std = statistics(model)
    expected = model.decode(latents * std + mean).sample
    assert (expected.abs() < 1).float().mean() > 0.5, "too much is clamped to compare"
    assert relative_error(vae.decode(latents), expected) <= 1e-4


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_encode_matches_diffusers(spec: VaeSpec, clip: tuple[int, int, int, int]) -> None:
    vae = random_vae(spec)
    model = oracle(vae)
    video = draw_video(spec, clip)
    mean, std = statistics(model)
    expected = (model.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(vae.encode(video), expected) <= 1e-4


@pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
def test_reference_arithmetic_matches_diffusers(spec: VaeSpec) -> None:
    vae = random_vae(spec, REFERENCE)
    model = oracle(vae)
    latents, video = draw_latents(spec, (1, 2, 2, 3)), draw_video(spec, (1, 2, 2, 3))
    mean, std = statistics(model)
    assert relative_error(vae.decode(latents), model.decode(latents * std + mean).sample) <= 1e-4
    expected = (model.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(vae.encode(video), expected) <= 1e-4


def test_latent_statistics_are_those_of_diffusers() -> None:
    config = AutoencoderKLWan(base_dim=8).config
    assert LATENT_STATISTICS[16] == (tuple(config.latents_mean), tuple(config.latents_std))


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
def test_chunks_equal_the_whole_to_the_bit(spec: VaeSpec, chunk: int) -> None:
    """With the reference arithmetic."""
    vae = random_vae(spec, REFERENCE)
    latents, video = draw_latents(spec, (1, 5, 2, 3)), draw_video(spec, (1, 5, 2, 3))
    assert torch.equal(vae.decode(latents, chunk=chunk), vae.decode(latents, chunk=5))
    assert torch.equal(vae.encode(video, chunk=chunk), vae.encode(video, chunk=5))


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_chunks_equal_the_whole_on_the_fast_path(spec: VaeSpec, chunk: int) -> None:
    """To rounding: oneDNN picks its blocking by shape, and so the order of a sum's terms."""
    vae = random_vae(spec)
    latents, video = draw_latents(spec, (2, 5, 2, 3)), draw_video(spec, (2, 5, 2, 3))
    whole = vae.decode(latents, chunk=5)
    assert (vae.decode(latents, chunk=chunk) - whole).abs().max() <= 1e-5
    whole = vae.encode(video, chunk=5)
    assert (vae.encode(video, chunk=chunk) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("side", ["encode", "decode"])
def test_a_saved_state_goes_on_where_it_stopped(side: str, spec: VaeSpec) -> None:
    vae = random_vae(spec)
    if side == "decode":
        run, clip, cut = vae.decode_chunks, draw_latents(spec, (1, 4, 2, 3)), 2
    else:
        run, clip, cut = vae.encode_chunks, draw_video(spec, (1, 4, 2, 3)), 5
    steps = list(run(clip, chunk=1))
    whole = torch.cat([part for part, _ in steps], 2)
    assert torch.equal(whole, getattr(vae, side)(clip, chunk=1))
    kept = steps[1][1]  # two further chunks have been coded since
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    with torch.serialization.safe_globals([CausalState]):
        loaded = torch.load(file, weights_only=True)
    for state in (kept, loaded):
        rest = torch.cat([part for part, _ in run(clip[:, :, cut:], state, chunk=1)], 2)
        assert torch.equal(rest, whole[:, :, -rest.shape[2] :])


@pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
def test_a_state_does_not_grow(spec: VaeSpec) -> None:
    """Two frames for each convolution, one for a strided one, in memory of their own."""
    vae = random_vae(spec)
    runs = {
        "encoder": vae.encode_chunks(draw_video(spec, (1, 5, 2, 2)), chunk=2),
        "decoder": vae.decode_chunks(draw_latents(spec, (1, 5, 2, 2)), chunk=2),
    }
    for side, run in runs.items():
        *_, (_, state) = run
        convs = [m for m in getattr(vae, side).modules() if getattr(m, "slot", -1) >= 0]
        assert len(convs) == len(state.slots)
        for conv, frames in zip(convs, state.slots, strict=True):
            assert frames.shape[1:3] == (conv.in_channels, 3 - conv.stride[0])
            assert frames.untyped_storage().nbytes() == frames.numel() * frames.element_size()


def test_memory_follows_the_chunk_not_the_clip() -> None:
    """decode() takes small frames many at a time and large ones alone."""
    vae = random_vae(WAN_21)
    spans, whole = [], vae.decoder.whole
    vae.decoder.whole = lambda x, walk: spans.append(x.shape[2]) or whole(x[..., :1, :1], walk)
    for h, w in ((8, 8), (90, 160)):
        vae.decode(torch.zeros(1, 16, 21, h, w))
    assert spans[0] == 21 and spans[1:] == [1] * 21


TOTALS = {
    "2.1": ("wan2.1-t2v-1.3b", 53_595_872, 73_295_331, 126_892_531),
    "2.2": ("wan2.2-ti2v-5b", 149_627_776, 555_049_228, 704_688_668),
}


@pytest.mark.parametrize(("model", "encoder", "decoder", "total"), TOTALS.values(), ids=TOTALS)
def test_parameters_and_slots(model: str, encoder: int, decoder: int, total: int) -> None:
    with torch.device("meta"):
        vae = WanVAE(MODELS[model].vae)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert (count(vae.encoder), count(vae.decoder), count(vae)) == (encoder, decoder, total)
    assert (len(vae.encoder_state().slots), len(vae.decoder_state().slots)) == (24, 32)
    assert not list(vae.buffers())


@pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
def test_gradients_match_reference(spec: VaeSpec) -> None:
    gradients = []
    latents, video = draw_latents(spec, (1, 2, 1, 2)), draw_video(spec, (1, 2, 1, 2))
    for ops in (TORCH, REFERENCE):
        with torch.no_grad():
            vae = random_vae(spec, ops)
        vae.requires_grad_(True)
        loss = vae.decode(latents).square().mean() + vae.encode(video).square().mean()
        named = {n: p for n, p in vae.named_parameters()}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradients.append(dict(zip(named, found, strict=True)))
    fast, exact = gradients
    for name, expected in exact.items():
        assert relative_error(fast[name], expected) <= 1e-4, name


@pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
def test_inference_mode_changes_nothing(spec: VaeSpec) -> None:
    vae = random_vae(spec)
    latents = draw_latents(spec, (1, 3, 2, 2))
    expected = vae.decode(latents, chunk=1)
    with torch.inference_mode():
        states = list(vae.decode_chunks(latents[:, :, :2]))
    rest = [frames for frames, _ in vae.decode_chunks(latents[:, :, 2:], states[-1][1])]
    assert torch.equal(torch.cat([frames for frames, _ in states] + rest, 2), expected)


def test_surplus_frames_are_ignored() -> None:
    vae = random_vae(WAN_21)
    video = draw_video(WAN_21, (1, 3, 2, 2))
    longer = torch.cat([video, torch.full_like(video[:, :, :3], torch.nan)], 2)
    for chunk in (None, 1, 2):
        assert torch.equal(vae.encode(longer, chunk=chunk), vae.encode(video, chunk=chunk))


def test_bf16_drifts_but_stays_near() -> None:
    """Trap 19: why the VAE runs in fp32 unless asked. Results are fp32 either way."""
    vae = random_vae(WAN_21)
    latents, video = draw_latents(WAN_21, (1, 3, 2, 3)), draw_video(WAN_21, (1, 3, 2, 3))
    pixels, encoded = vae.decode(latents), vae.encode(video)
    vae.bfloat16()
    for drifted, exact in ((vae.decode(latents), pixels), (vae.encode(video), encoded)):
        assert drifted.dtype == torch.float32
        assert 1e-3 < relative_error(drifted, exact) < 0.1


def random_resample(mode: str, ops: VaeOps = TORCH) -> tuple[Resample, Walk]:
    layer = Resample(4, 4, mode).requires_grad_(False)
    return layer, Walk(CausalState((None,) * number_slots(layer)), ops)


@pytest.mark.parametrize("ops", [TORCH, REFERENCE], ids=["torch", "reference"])
@pytest.mark.parametrize("mode", ["upsample3d", "downsample3d"])
def test_the_first_frame_bypasses_time(mode: str, ops: VaeOps) -> None:
    """Trap 18: NaN weights of the temporal convolution do not reach it."""
    layer, walk = random_resample(mode, ops)
    layer.time_conv.weight.fill_(torch.nan)
    y = layer(torch.randn(1, 4, 5, 4, 4), walk)
    assert y.shape[2] == (9 if mode == "upsample3d" else 3)
    assert y[:, :, 0].isfinite().all() and y[:, :, 1:].isnan().all()


def test_the_doubled_frames_never_see_the_first() -> None:
    """Trap 18: the second latent frame has zeros behind it."""
    x = torch.randn(1, 4, 3, 4, 4)
    changed = x.clone()
    changed[:, :, 0] += 1
    layer, walk = random_resample("upsample3d")
    _, other = random_resample("upsample3d")
    a, b = layer(x, walk), layer(changed, other)
    assert torch.equal(a[:, :, 1:], b[:, :, 1:]) and not torch.equal(a[:, :, 0], b[:, :, 0])


def test_halving_uses_frames_before_its_own() -> None:
    """Output k of downsample3d sees frames 2k-2, 2k-1, 2k: no zeros, nothing later."""
    layer, _ = random_resample("downsample3d")
    x = torch.randn(1, 4, 5, 4, 4)
    outputs = []
    for frame in range(5):
        changed = x.clone()
        changed[:, :, frame] += 1
        both = (layer(v, random_resample("downsample3d")[1]) for v in (x, changed))
        a, b = both
        outputs.append([k for k in range(3) if not torch.equal(a[:, :, k], b[:, :, k])])
    assert outputs == [[0, 1], [1], [1, 2], [2], [2]]


def test_latents_are_the_posterior_mean_in_standard_units() -> None:
    """Trap 20: the log-variance has no say; mean and std go in on one side, out on the other."""
    vae = random_vae(WAN_21)
    mean, std = (torch.tensor(values) for values in LATENT_STATISTICS[16])
    vae.conv1.weight.zero_()
    vae.conv1.weight[16:] = torch.nan
    vae.conv1.bias[:16], vae.conv1.bias[16:] = mean + 2 * std, torch.nan
    latents = vae.encode(draw_video(WAN_21, (1, 1, 1, 1)))
    assert (latents - 2).abs().max() <= 1e-5
    eye = torch.eye(16).view(16, 16, 1, 1, 1)
    vae.conv2.weight.copy_(eye)
    vae.conv2.bias.zero_()
    seen = []
    vae.decoder.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    vae.decode(torch.full((1, 16, 1, 1, 1), 2.0))
    assert (seen[0].flatten() - (mean + 2 * std)).abs().max() <= 1e-5


def test_patches_have_the_row_offset_fastest() -> None:
    """Trap 21: channel c*4 + column*2 + row."""
    video = torch.arange(3 * 4 * 6.0).view(1, 3, 1, 4, 6)
    x = patchify(video, 2)
    assert x.shape == (1, 12, 1, 2, 3)
    for c in range(3):
        for column in range(2):
            for row in range(2):
                expected = video[:, c, :, row::2, column::2]
                assert torch.equal(x[:, 4 * c + 2 * column + row], expected)
    assert torch.equal(unpatchify(x, 2), video)


def test_the_first_chunk_has_zeros_in_even_channels() -> None:
    """Trap 21: one frame, halved in time, is averaged with a frame of zeros in front."""
    x = torch.rand(1, 4, 1, 4, 4) + 1
    y = average_down(x, 8, 2, 2)
    assert (y[:, 0::2] == 0).all()
    means = x.view(1, 4, 1, 2, 2, 2, 2).mean((4, 6))
    assert torch.allclose(y[:, 1::2], means)
    assert (average_down(x.expand(-1, -1, 2, -1, -1), 8, 2, 2) != 0).all()


def test_duplicated_channels_go_to_space_and_time() -> None:
    """Trap 21: 2x2x2 places of an output channel are 8 / repeats input channels in a row."""
    x = torch.arange(8.0).view(1, 8, 1, 1, 1) * torch.ones(1, 1, 2, 1, 1)
    y = duplicate_up(x, 4, 2, 2, first=False)  # 8 channels, each 4 times, to 4 of 8 places
    assert y.shape == (1, 4, 4, 2, 2)
    for channel in range(4):
        for frame in range(4):
            assert (y[0, channel, frame] == 2 * channel + frame % 2).all()
    assert torch.equal(duplicate_up(x, 4, 2, 2, first=True), y[:, :, 1:])


def test_upsampling_keeps_channels_in_22_and_halves_them_in_21() -> None:
    """Trap 21."""
    with torch.device("meta"):
        small, large = (WanVAE(MODELS[model].vae) for model, *_ in TOTALS.values())
    shapes = [small.decoder.upsamples[3].resample[1].weight.shape[:2]]
    shapes += [
        stage.upsamples[3].resample[1].weight.shape[:2] for stage in large.decoder.upsamples[:3]
    ]
    assert shapes == [(192, 384), (1024, 1024), (1024, 1024), (512, 512)]
