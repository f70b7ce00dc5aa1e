"""The VAE's int8 convolution: exact sums, exact zeros around it, and where a clip may be cut."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference_vae, registry, winners
from wanrt.kernels.cases import all_cases
from wanrt.kernels.cases_conv_int8 import quantized, step_and_zero
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.kernels.tile import Tile

CPU = "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "triton"])


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else CPU


def op(backend: str, name: str = "causal_conv3d_int8") -> Callable[..., Any]:
    target = registry.here(torch.bfloat16, device_of(backend))
    reason = registry.reason_against(name, backend, target)
    if reason is not None:
        pytest.skip(reason)
    return registry.function(name, backend)


def drawn(label: str, dtype: torch.dtype, backend: str) -> list[Any]:
    return list(all_cases()[f"causal_conv3d_int8-{label}"].draw(dtype, device_of(backend)))


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN in deterministic mode (int8: the largest value)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def from_integers(
    q: Tensor, weight: QuantizedConv, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    """What follows int8 frames [B, C, 2 + T, H, W], by sums in fp64 on the CPU."""
    weight = QuantizedConv(*(part.cpu() for part in weight))
    whole = q.cpu().double() - weight.zero.double().view(1, -1, 1, 1, 1)
    sums = F.conv3d(whole, weight.values.double(), padding=(0, 1, 1)).float()
    y = sums * weight.scale.view(1, -1, 1, 1, 1) + bias.cpu().view(1, -1, 1, 1, 1)
    return y if residual is None else y + residual.cpu()


@BACKENDS
@pytest.mark.parametrize("label", ["odd", "one-row", "one-column", "chunks", "start"])
def test_sums_are_exact(backend: str, label: str) -> None:
    """In fp32 nothing is lost but by the rounding of the sum and what follows it."""
    x, weight, bias, history, gamma, residual = drawn(label, torch.float32, backend)
    y, kept = op(backend)(x, weight, bias, history, gamma, residual)
    quantise = op(backend, "channel_norm_silu_quantize")
    q = quantise(x, gamma, weight.step, weight.zero)
    zero = weight.zero.view(1, -1, 1, 1, 1)
    past = zero.expand(*x.shape[:2], 2, *x.shape[3:]) if history is None else history
    frames = torch.cat((past, q), 2)
    assert torch.equal(kept, frames[:, :, -2:]) and kept.dtype == torch.int8
    expected = from_integers(frames, weight, bias, residual)
    torch.testing.assert_close(y.cpu(), expected, rtol=3e-7, atol=1e-6)


@BACKENDS
def test_sums_past_2_to_the_24(backend: str) -> None:
    """Inputs and weights all near the largest: fp32 would round on the way."""
    device, channels = device_of(backend), 96
    step, zero = (v.to(device) for v in step_and_zero(channels))
    weight = op("torch", "quantize_conv_weight")(
        torch.rand(16, channels, 3, 3, 3, device=device) + 3, step, zero
    )
    x = torch.rand(1, channels, 1, 5, 7, device=device) + 1
    history = torch.full((1, channels, 2, 5, 7), 127, dtype=torch.int8, device=device)
    history[:, :, :, ::2, ::3] = 120
    gamma, bias = torch.full((channels,), 3.9, device=device), torch.zeros(16, device=device)
    y, kept = op(backend)(x, weight, bias, history, gamma)
    frames = torch.cat((history, kept[:, :, 1:]), 2)
    expected = from_integers(frames, weight, bias)
    assert (expected / weight.scale.cpu().view(1, -1, 1, 1, 1)).max() > 2**24
    torch.testing.assert_close(y.cpu(), expected, rtol=1.2e-7, atol=0)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_two_halves_make_a_whole(backend: str, cut: int, dtype: torch.dtype) -> None:
    conv = op(backend)
    x, weight, bias, _, gamma, _ = drawn("start", dtype, backend)
    whole, kept = conv(x, weight, bias, None, gamma)
    a, history = conv(x[:, :, :cut], weight, bias, None, gamma)
    b, kept_too = conv(x[:, :, cut:], weight, bias, history, gamma)
    assert torch.equal(torch.cat([a, b], 2), whole)
    assert torch.equal(kept_too, kept)


@BACKENDS
def test_inputs_that_are_dense_nowhere(backend: str) -> None:
    conv = op(backend)
    x, weight, bias, history, gamma, residual = drawn("odd", torch.float16, backend)

    def holes(v: Tensor) -> Tensor:
        large = torch.full([2 * n for n in v.shape], 77).to(v)
        return large[::2, ::2, ::2, ::2, ::2].copy_(v)

    expected, kept = conv(x, weight, bias, history, gamma, residual)
    weight = weight._replace(values=holes(weight.values), border=weight.border.clone())
    place = holes(residual)
    y, kept_too = conv(holes(x), weight, bias, holes(history), gamma, place, out=place)
    assert y is place and torch.equal(y, expected) and torch.equal(kept_too, kept)


@BACKENDS
def test_out_may_be_the_input(backend: str) -> None:
    conv = op(backend)
    x, weight, bias, history, gamma, _ = drawn("one-frame", torch.float16, backend)
    weight = QuantizedConv(*(v.to(x.device) for v in quantized(24, 24)))
    bias = torch.randn(24).to(bias)
    expected, _ = conv(x, weight, bias, history, gamma)
    for place in (x.clone(memory_format=torch.preserve_format), x.contiguous()):
        assert torch.equal(conv(place, weight, bias, history, gamma, out=place)[0], expected)


def test_the_symmetric_format_is_zero_at_zero() -> None:
    """With no zero point there is no border, and the weight alone is what is rounded."""
    step, _ = step_and_zero(24)
    conv = reference_vae.quantize_conv_weight(
        torch.randn(5, 24, 3, 3, 3), step, torch.zeros_like(step).char()
    )
    assert not conv.border.any()
    assert conv.values.abs().flatten(1).amax(1).eq(127).all()


@pytest.mark.parametrize(
    ("channels", "unrolls"), [(96, (1, 3)), (72, (1, 3))], ids=["whole", "ragged"]
)
@pytest.mark.parametrize("history", [True, False])
def test_a_turn_of_the_loop_may_be_long(
    channels: int, unrolls: tuple[int, ...], history: bool
) -> None:
    """Steps of 32 channels in turns of several change no bit."""
    conv, device = op("triton"), device_of("triton")
    x = torch.randn(1, channels, 2, 4, 5).to(device)
    past = torch.randint(-128, 128, (1, channels, 2, 4, 5)).char().to(device) if history else None
    weight = QuantizedConv(*(v.to(device) for v in quantized(48, channels)))
    given = (x, weight, torch.randn(48).to(device), past, torch.rand(channels, 1, 1, 1).to(device))
    expected = conv(*given)[0]  # `test_sums_are_exact` tells whether these are right
    for unroll in unrolls:
        tile = Tile(pixels=16, wide=32, narrow=16, step=32, unroll=unroll, warps=4, stages=1)
        with winners.trial({f"conv_int8/{channels}-48": tile}) as trial:
            y = conv(*given)[0]
        assert list(trial.asked) == [f"conv_int8/{channels}-48"] and torch.equal(y, expected)
