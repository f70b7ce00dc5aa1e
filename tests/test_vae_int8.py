"""The int8 VAE: its formats cover what was seen, its state is int8, its error keeps the bars."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wanrt.bench import fp16_sums, quality_vae
from wanrt.config import NANO, VAE_2_2, VaeSpec, VaeWork
from wanrt.errors import UsageError
from wanrt.kernels import reference_vae
from wanrt.models.vae import WanVAE
from wanrt.models.vae_int8 import calibrate, default_convs, quantize_vae
from wanrt.models.vae_layers import Int8CausalConv3d
from wanrt.quant.conv_int8 import LEAST, Range, StaticInt8, observe, quantize_conv
from wanrt.weights.hub import NANO_WEIGHTS

TINY = replace(NANO.vae, base_dim=8, decoder_base_dim=8)


@pytest.fixture(autouse=True)
def without_gradients() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def random_vae(spec: VaeSpec = TINY) -> WanVAE:
    """The reference's arithmetic: frame by frame, so that bits can be compared."""
    return WanVAE(spec, quality_vae.EXACT).eval().requires_grad_(False)


def latents(frames: int = 3) -> Tensor:
    return torch.randn(1, 16, frames, 4, 6)


def int8_of(vae: WanVAE, **options: object) -> WanVAE:
    return quantize_vae(vae, calibrate(vae, [latents()]), **options)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_a_format_holds_what_was_seen(symmetric: bool, smoothing: float) -> None:
    x, gamma = torch.randn(1, 24, 2, 5, 7), torch.rand(24) * 3
    seen = observe(x, gamma)
    conv = quantize_conv(torch.randn(5, 24, 3, 3, 3), seen, StaticInt8(smoothing, 1.0, symmetric))
    a = reference_vae.channel_norm_silu(x, gamma)
    q = reference_vae.channel_norm_silu_quantize(x, gamma, conv.step, conv.zero)
    step, zero = (v.view(1, -1, 1, 1, 1) for v in (conv.step, conv.zero))
    error = ((q.float() - zero) * step - a).abs()
    assert (error <= step * 0.501).all(), "a value that was seen is clipped"
    assert not symmetric or not conv.zero.any()
    assert (seen.low >= LEAST - 1e-4).all()


def test_ranges_join() -> None:
    joined = Range(torch.tensor([-0.1, -0.2]), torch.tensor([1.0, 4.0])).joined(
        Range(torch.tensor([-0.2, -0.1]), torch.tensor([2.0, 3.0]))
    )
    assert torch.equal(joined.low, torch.tensor([-0.2, -0.2]))
    assert torch.equal(joined.high, torch.tensor([2.0, 4.0]))


def test_a_channel_that_was_never_seen_alive() -> None:
    weight = torch.randn(5, 2, 3, 3, 3)
    conv = quantize_conv(weight, Range(torch.zeros(2), torch.tensor([0.0, 1.0])), StaticInt8())
    assert conv.step.isfinite().all() and (conv.step > 0).all() and conv.scale.isfinite().all()


@pytest.mark.parametrize("spec", [TINY, replace(VAE_2_2, decoder_base_dim=8, base_dim=8)])
def test_which_convolutions_change(spec: VaeSpec) -> None:
    """Two of each residual block at half and at full size, in either VAE."""
    vae = WanVAE(spec).eval()
    names = default_convs(vae)
    assert len(names) == 4 * (spec.num_res_blocks + 1)
    assert not any(name.startswith(("conv1", "middle", "head")) for name in names)
    assert all(name.endswith(("residual.2", "residual.6")) for name in names)


def test_the_vae_it_came_from_is_left_alone() -> None:
    vae, z = random_vae(), latents()
    before = vae.decode(z)
    result = int8_of(vae)
    assert torch.equal(vae.decode(z), before)
    assert not torch.equal(result.decode(z), before)
    assert result.decoder.conv1.weight is vae.decoder.conv1.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_chunks_or_bands(dtype: torch.dtype) -> None:
    vae, z = random_vae(), latents(5)
    result = quantize_vae(vae.to(dtype), calibrate(vae, [z]))
    whole = result.decode(z, chunk=5)
    assert torch.equal(result.decode(z, chunk=2), whole)
    first, state = next(result.decode_chunks(z))
    for work in (
        VaeWork(chunk=2, band=2),
        VaeWork(chunk=1, frames=1),
        VaeWork(chunk=1, frames=1, host=True),
        VaeWork(chunk=1, band=2, frames=1, order="bands"),
    ):
        assert torch.equal(result.decode(z, work=work), whole), work
    rest = [frames for frames, _ in result.decode_chunks(z[:, :, 1:], state)]
    assert torch.equal(torch.cat([first, *rest], 2), whole)


def test_the_history_of_int8_convolutions_is_int8() -> None:
    vae, z = random_vae().half(), latents(2)
    result = int8_of(vae)
    (*_, (_, plain)), (*_, (_, state)) = vae.decode_chunks(z), result.decode_chunks(z)
    convs = [m for m in result.decoder.modules() if isinstance(m, Int8CausalConv3d)]
    assert len(convs) == len(default_convs(vae))
    for conv in convs:
        assert state.slots[conv.slot].dtype == torch.int8
        assert 2 * state.slots[conv.slot].nbytes == plain.slots[conv.slot].nbytes
    others = set(range(len(plain.slots))) - {conv.slot for conv in convs}
    assert {state.slots[slot].dtype for slot in others} == {torch.float16}


def test_a_cast_of_the_scales_is_refused() -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        int8_of(random_vae()).bfloat16().decode(latents())


def test_psnr() -> None:
    assert quality_vae.psnr(torch.full((9,), 0.2), torch.zeros(9)) == pytest.approx(20)
    assert quality_vae.psnr(torch.ones(9), torch.ones(9)) == math.inf


def test_fp16_sums_are_those_of_the_reference_where_nothing_is_rounded() -> None:
    x, history = (torch.randint(-2, 3, (1, 160, t, 4, 5)).half() for t in (3, 2))
    weight, bias = torch.randint(-1, 2, (6, 160, 3, 3, 3)).half(), torch.zeros(6).half()
    for past in (history, None):
        y, kept = fp16_sums.causal_conv3d(x, weight, bias, past)
        expected, expected_kept = reference_vae.causal_conv3d(x, weight, bias, past)
        assert torch.equal(y, expected) and torch.equal(kept, expected_kept)


def test_fp16_sums_round() -> None:
    x, weight = torch.randn(1, 128, 1, 4, 5).half(), torch.randn(6, 128, 3, 3, 3).half()
    y, _ = fp16_sums.causal_conv3d(x, weight, torch.zeros(6).half(), None)
    expected, _ = reference_vae.causal_conv3d(x, weight, torch.zeros(6).half(), None)
    error = (y.float() - expected.float()).norm() / expected.float().norm()
    assert 2**-12 < error < 2**-9


def test_quality_names_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="no variant 'int4'"):
        list(quality_vae.rows(None, "48x48", ["int4"]))
    with pytest.raises(UsageError, match="multiples of 8"):
        list(quality_vae.rows(None, "50x48", ["int8"]))


def check_bars(given: quality_vae.Subject) -> None:
    """Every figure that has a bar, and bf16's beside them."""
    rows = {row.variant: row for row in quality_vae.measure(given, ["bf16", *quality_vae.BARS])}
    for row in rows.values():
        print(f"{row.vae}: {row.variant} {row.db:.2f} dB, bar {row.bar}")
    assert all(rows[name].db >= bar for name, bar in quality_vae.BARS.items()), rows


def test_nano_keeps_the_bars() -> None:
    check_bars(quality_vae.trained(NANO_WEIGHTS / "vae.safetensors", clips=2))


@pytest.mark.slow
def test_the_true_size_vae_keeps_the_bars() -> None:
    check_bars(quality_vae.random(4, 4))
