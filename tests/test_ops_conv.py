"""The VAE's ops against the reference ones, and all of them against what their words promise.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference_vae, registry, torch_conv, winners
from wanrt.kernels.tile import Tile, check_frames


class Backend(NamedTuple):
    """Where an op comes from, what it is tried in, and how far its results may be from others."""

    name: str
    dtype: torch.dtype
    limit: float  # of the largest result
    norm_limit: float  # of the largest normalised input

    @property
    def device(self) -> str:
        """PyTorch and the reference are tried on the CPU, where fp32 is fp32."""
        return "cuda" if self.name == "triton" and torch.cuda.is_available() else "cpu"

    def op(self, name: str) -> Callable[..., Any]:
        reason = registry.reason_against(name, self.name, registry.here(self.dtype))
        if reason is not None:
            pytest.skip(reason)
        return registry.function(name, self.name)


REFERENCE = Backend("reference", torch.float32, 3e-6, 1e-6)
TORCH = Backend("torch", torch.float32, 3e-6, 1e-6)
# The normalised input and the result are rounded, each once: two units of 2^-8 or 2^-11.
TORCH_BF16 = Backend("torch", torch.bfloat16, 2**-7, 2**-7)
TRITON_BF16 = Backend("triton", torch.bfloat16, 2**-7, 2**-7)
TRITON = Backend("triton", torch.float16, 2**-10, 2**-10)
BACKENDS = pytest.mark.parametrize(
    "backend", [REFERENCE, TORCH, TRITON], ids=["reference", "torch", "triton"]
)


class Conv(NamedTuple):
    """One causal convolution: x `[B, C, T, H, W]`, weight `[O, C, *kernel]`."""

    x: tuple[int, int, int, int, int]
    out_dim: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    history: bool = True
    norm: bool = True
    residual: bool = False
    stride: int = 1
    layout: Callable[[Tensor], Tensor] = torch.Tensor.contiguous


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def holes(x: Tensor) -> Tensor:
    """The same values, dense in no dimension."""
    large = torch.full([2 * n for n in x.shape], torch.nan).to(x)
    view = large[::2, ::2, ::2, ::2, ::2]
    return view.copy_(x)


CONVS = {
    "one-frame": Conv((1, 24, 1, 5, 7), 20),
    "one-frame-start": Conv((1, 24, 1, 5, 7), 20, history=False),
    "two-frames-start": Conv((1, 24, 2, 5, 7), 20, history=False, residual=True),
    "four-frames-start": Conv((1, 24, 4, 5, 7), 20, history=False),
    "start-small-frames": Conv((2, 24, 5, 5, 7), 20, history=False),
    "start-large-frames": Conv((1, 8, 5, 33, 40), 6, history=False),
    "start-two-large-frames": Conv((2, 8, 2, 33, 40), 6, history=False, residual=True),
    "pieces": Conv((1, 40, 7, 160, 164), 3, residual=True, layout=channels_last),
    "pieces-start": Conv((1, 40, 5, 160, 164), 3, history=False, layout=channels_last),
    "pieces-of-two": Conv((2, 24, 5, 160, 140), 3, layout=channels_last),
    "channels-last": Conv((2, 24, 3, 5, 7), 20, layout=channels_last),
    "holes": Conv((2, 24, 3, 5, 7), 20, residual=True, layout=holes),
    "pixels-in": Conv((1, 3, 4, 17, 19), 24, norm=False, layout=channels_last),
    "pixels-out": Conv((1, 24, 4, 17, 19), 3, residual=True, layout=channels_last),
    "below-oneDNN-limit": Conv((1, 16, 8, 32, 9), 16, layout=channels_last),
    "time-only": Conv((1, 24, 3, 5, 7), 48, (3, 1, 1), norm=False),
    "time-only-start": Conv((1, 24, 4, 5, 7), 48, (3, 1, 1), history=False, norm=False),
    "halving": Conv((2, 24, 4, 5, 7), 24, (3, 1, 1), norm=False, residual=True, stride=2),
    "halving-pieces": Conv((1, 16, 6, 300, 304), 4, (3, 1, 1), norm=False, stride=2),
    "pointwise": Conv((2, 24, 3, 5, 7), 9, (1, 1, 1), history=False, norm=False, residual=True),
    "pointwise-pieces": Conv((1, 40, 5, 160, 164), 3, (1, 1, 1), history=False, norm=False),
}
MAX_STEPS = 200  # frames times taps that Triton's interpreter is asked for


def too_long(backend: Backend, case: Conv) -> bool:
    b, _, t, h, w = case.x
    long = b * t * math.prod(case.kernel) > MAX_STEPS or h * w > 2000
    return backend.name == "triton" and long


def runs(*backends: Backend) -> pytest.MarkDecorator:
    """Every convolution in every backend."""
    params = [
        pytest.param(backend, case, id=f"{name}-{backend.name}-{str(backend.dtype)[6:]}")
        for name, case in CONVS.items()
        for backend in backends
        if not too_long(backend, case)
    ]
    return pytest.mark.parametrize("backend, case", params)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN in deterministic mode, so that a hole in a result shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(case: Conv, backend: Backend = TORCH) -> tuple[Tensor | None, ...]:
    """x, weight, bias, history, gamma, residual."""
    b, c, t, h, w = case.x
    weight = torch.randn(case.out_dim, c, *case.kernel) * (c * 27) ** -0.5
    past = case.kernel[0] - case.stride
    history = torch.randn(b, c, past, h, w) if case.history else None
    gamma = torch.rand(c, 1, 1, 1) + 0.5 if case.norm else None
    residual = torch.randn(b, case.out_dim, t // case.stride, h, w) if case.residual else None
    tensors = (torch.randn(case.x), weight, torch.randn(case.out_dim), history, gamma, residual)
    x, *others = (None if t is None else t.to(backend.device, backend.dtype) for t in tensors)
    return (case.layout(x), *others)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    assert actual.dtype == expected.dtype
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@runs(TORCH, TORCH_BF16, TRITON, TRITON_BF16)
def test_conv_matches_reference(backend: Backend, case: Conv) -> None:
    causal_conv3d, tensors = backend.op("causal_conv3d"), draw(case, backend)
    y, kept = causal_conv3d(*tensors, stride=case.stride)
    expected, expected_kept = reference_vae.causal_conv3d(*tensors, stride=case.stride)
    assert error(y, expected) <= backend.limit
    if case.kernel[0] == 1:
        assert kept is expected_kept is None
    else:
        assert error(kept, expected_kept) <= backend.norm_limit


@runs(TORCH)
def test_gradient_path_gives_the_same_numbers(backend: Backend, case: Conv) -> None:
    tensors = draw(case, backend)
    y, _ = torch_conv.causal_conv3d(*tensors, stride=case.stride)
    tensors[1].requires_grad_()
    tracked, _ = torch_conv.causal_conv3d(*tensors, stride=case.stride)
    assert tracked.requires_grad and not y.requires_grad
    assert error(tracked.detach(), y) <= backend.limit


SAME_WIDTH = {
    name: CONVS[name]._replace(out_dim=CONVS[name].x[1])
    for name in ("channels-last", "pieces", "start-small-frames", "pointwise")
}


@BACKENDS
@pytest.mark.parametrize("gamma", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("name", SAME_WIDTH)
def test_out_may_be_the_input(backend: Backend, name: str, gamma: bool) -> None:
    if too_long(backend, SAME_WIDTH[name]):
        pytest.skip("too long for Triton's interpreter")
    causal_conv3d = backend.op("causal_conv3d")
    x, *others = draw(SAME_WIDTH[name]._replace(norm=gamma), backend)
    expected, kept = causal_conv3d(x, *others)
    result, kept_too = causal_conv3d(x, *others, out=x)
    assert result is x
    assert torch.equal(result, expected)
    assert kept is kept_too is None or torch.equal(kept_too, kept)


@BACKENDS
def test_out_may_be_the_residual(backend: Backend) -> None:
    causal_conv3d = backend.op("causal_conv3d")
    *inputs, residual = draw(CONVS["two-frames-start"], backend)
    expected, _ = causal_conv3d(*inputs, residual)
    for layout in (torch.clone, channels_last, holes):
        place = layout(residual)
        result, _ = causal_conv3d(*inputs, place, out=place)
        assert result is place and torch.equal(result, expected)


@runs(REFERENCE, TORCH, TRITON)
def test_history_is_a_copy_and_inputs_are_left_alone(backend: Backend, case: Conv) -> None:
    causal_conv3d, tensors = backend.op("causal_conv3d"), draw(case, backend)
    before = [None if t is None else t.clone() for t in tensors]
    _, kept = causal_conv3d(*tensors, stride=case.stride)
    if kept is not None:
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        kept.fill_(torch.nan)
    assert all(a is None or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@BACKENDS
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", ["four-frames-start", "start-large-frames", "pieces-start"])
def test_two_halves_make_a_whole(backend: Backend, name: str, cut: int) -> None:
    if too_long(backend, CONVS[name]):
        pytest.skip("too long for Triton's interpreter")
    causal_conv3d = backend.op("causal_conv3d")
    x, weight, bias, _, gamma, _ = draw(CONVS[name], backend)
    whole, kept = causal_conv3d(x, weight, bias, None, gamma)
    a, history = causal_conv3d(x[:, :, :cut], weight, bias, None, gamma)
    b, kept_too = causal_conv3d(x[:, :, cut:], weight, bias, history, gamma)
    joined = torch.cat([a, b], 2)
    if backend.name != "torch":
        assert torch.equal(joined, whole) and torch.equal(kept_too, kept)
    assert error(joined, whole) <= 3e-6 and error(kept_too, kept) <= 1e-6


@BACKENDS
def test_no_frame_sees_a_later_one(backend: Backend) -> None:
    causal_conv3d = backend.op("causal_conv3d")
    x, weight, bias, _, gamma, _ = draw(CONVS["four-frames-start"], backend)
    x[:, :, 3] = torch.nan
    y, _ = causal_conv3d(x, weight, bias, None, gamma)
    assert y[:, :, :3].isfinite().all() and y[:, :, 3:].isnan().all()


@BACKENDS
def test_conv_is_the_textbook(backend: Backend) -> None:
    """Zeros before the clip and around each frame, in fp64."""
    causal_conv3d = backend.op("causal_conv3d")
    x, weight, bias, *_ = draw(CONVS["pixels-in"], backend)
    y, _ = causal_conv3d(x, weight, bias, None)
    padded = F.pad(x.double(), (1, 1, 1, 1, 2, 0))
    expected = F.conv3d(padded, weight.double(), bias.double())
    assert error(y.double(), expected) <= backend.norm_limit


@BACKENDS
def test_norm_is_by_length_alone(backend: Backend) -> None:
    """Trap 16: x / max(|x|, 1e-12) * sqrt(C) * gamma, without a mean square's epsilon."""
    rms_norm_channels = backend._replace(dtype=torch.float32).op("rms_norm_channels")
    x = torch.randn(2, 6, 3, 4, 5) * torch.logspace(-8, 8, 5)
    x[0, :, 0], x[1, :, 1] = 0, 1e-14
    gamma = torch.rand(6, 1, 1, 1) + 0.5
    wide = x.double()
    length = wide.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    expected = wide / length * 6**0.5 * gamma.double()
    y = rms_norm_channels(x.to(backend.device), gamma.to(backend.device)).cpu()
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=0)
    assert (y[0, :, 0] == 0).all() and 0 < y[1, :, 1].abs().max() < 0.1


SIZES = {"small": (1, 6, 3, 4, 5), "batch": (2, 6, 2, 3, 4), "pieces": (1, 24, 5, 160, 164)}
# A bf16 or fp16 result is rounded, and so are folded taps.
RESAMPLING = [TORCH, TORCH_BF16._replace(limit=2**-6), TRITON_BF16._replace(limit=2**-6),
              TRITON._replace(limit=2**-9)]  # fmt: skip


@pytest.mark.parametrize("op", ["upsample_conv2d", "downsample_conv2d"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, holes])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend", RESAMPLING, ids=["fp32", "bf16", "triton-bf16", "triton-fp16"])
def test_resampling_matches_reference(
    backend: Backend, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], op: str
) -> None:
    if backend.name == "triton" and shape == SIZES["pieces"]:
        pytest.skip("too long for Triton's interpreter")
    b, c, t, h, w = shape
    x = torch.randn(b, c, t, 2 * (h // 2), 2 * (w // 2))
    weight, bias = torch.randn(5, c, 3, 3) * (9 * c) ** -0.5, torch.randn(5)
    x, weight, bias = (t.to(backend.device, backend.dtype) for t in (x, weight, bias))
    x = layout(x)
    actual = backend.op(op)(x, weight, bias)
    assert error(actual, getattr(reference_vae, op)(x, weight, bias)) <= backend.limit


@pytest.mark.parametrize("op", ["upsample_conv2d", "downsample_conv2d"])
def test_resampling_gradients_match_reference(op: str) -> None:
    x, weight, bias = torch.randn(2, 6, 3, 4, 6), torch.randn(5, 6, 3, 3), torch.randn(5)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    gradients = []
    for ops in (torch_conv, reference_vae):
        y = getattr(ops, op)(*tensors)
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        gradients.append(torch.autograd.grad(loss, tensors))
    for actual, exact in zip(*gradients, strict=True):
        assert error(actual, exact) <= 1e-5


@BACKENDS
def test_upsampling_repeats_every_pixel(backend: Backend) -> None:
    """Trap 17: nearest-exact by two, then zeros around the doubled frame."""
    upsample_conv2d = backend.op("upsample_conv2d")
    x = torch.randn(2, 3, 1, 4, 5).to(backend.device, backend.dtype)
    twice = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    padded = F.pad(twice, (1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(3, 3, 3, 3).to(x)
            weight[[0, 1, 2], [0, 1, 2], i, j] = 1
            y = upsample_conv2d(x, weight, torch.zeros(3).to(x))
            assert torch.equal(y, padded[..., i : i + 8, j : j + 10])


@BACKENDS
def test_downsampling_pads_right_and_bottom(backend: Backend) -> None:
    """Trap 17."""
    downsample_conv2d = backend.op("downsample_conv2d")
    x = torch.randn(2, 3, 1, 4, 6).to(backend.device, backend.dtype)
    padded = F.pad(x, (0, 1, 0, 1))
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(3, 3, 3, 3).to(x)
            weight[[0, 1, 2], [0, 1, 2], i, j] = 1
            y = downsample_conv2d(x, weight, torch.zeros(3).to(x))
            assert torch.equal(y, padded[..., i : i + 3 : 2, j : j + 5 : 2])


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float16,) * 2],
    ids=["bf16", "fp16", "fp16-sums"],
)
@pytest.mark.parametrize(
    ("channels", "unrolls"), [(96, (1, 2, 3, 6)), (40, (1, 3))], ids=["whole", "ragged"]
)
def test_a_turn_of_the_loop_may_be_long(
    channels: int, unrolls: tuple[int, ...], dtype: torch.dtype, accumulator: torch.dtype
) -> None:
    """Steps of 16 channels in turns of several: fp32 sums to the bit, fp16 sums nearly."""
    backend = Backend("triton", dtype, 0, 0)
    conv = backend.op("causal_conv3d")
    x, past = (torch.randn(1, channels, t, 4, 5).to(backend.device, dtype) for t in (2, 2))
    weight = (torch.randn(48, channels, 3, 3, 3) / 30).to(x)
    bias, residual = torch.randn(48).to(x), torch.randn(1, 48, 2, 4, 5).to(x)
    given = (x, weight, bias, past, None, residual)
    expected = reference_vae.causal_conv3d(*given)[0].float()
    key = f"conv/3x3x3/{channels}-48{'/fp16' if accumulator == torch.float16 else ''}"
    results = []
    for unroll in unrolls:
        tile = Tile(pixels=16, wide=32, narrow=16, step=16, unroll=unroll, warps=4, stages=1)
        with winners.trial({key: tile}) as trial:
            results.append(conv(*given, accumulator=accumulator)[0].float())
        assert list(trial.asked) == [key]
    limit = {torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype] * float(expected.abs().max())
    for y in results:
        assert accumulator == torch.float16 or torch.equal(y, results[0])
        assert float((y - expected).abs().max()) <= limit


def test_frames_are_counted_in_32_bits() -> None:
    """The largest frame of VAE 2.2 at 4096x4096, the largest size of all, is just within."""
    check_frames(torch.empty(1, 512, 1, 2048, 2048, device="meta"))
    with pytest.raises(AssertionError, match="over 2"):
        check_frames(torch.empty(1, 512, 1, 2048, 2049, device="meta"))
