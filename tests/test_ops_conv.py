"""The VAE's torch ops against the reference ones, and both against what their words promise."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference, torch_conv

MODULES = pytest.mark.parametrize("ops", [reference, torch_conv], ids=["reference", "torch"])


class Conv(NamedTuple):
    """One causal convolution: x `[B, C, T, H, W]`, weight `[O, C, *kernel]`."""

    x: tuple[int, int, int, int, int]
    out_dim: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    history: bool = True
    norm: bool = True
    stride: int = 1
    layout: Callable[[Tensor], Tensor] = torch.Tensor.contiguous


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def holes(x: Tensor) -> Tensor:
    """The same values, dense in no dimension."""
    large = torch.full([2 * n for n in x.shape], torch.nan, dtype=x.dtype)
    view = large[::2, ::2, ::2, ::2, ::2]
    return view.copy_(x)


CONVS = {
    "one-frame": Conv((1, 24, 1, 5, 7), 20),
    "one-frame-start": Conv((1, 24, 1, 5, 7), 20, history=False),
    "two-frames-start": Conv((1, 24, 2, 5, 7), 20, history=False),
    "start-small-frames": Conv((2, 24, 5, 5, 7), 20, history=False),
    "start-large-frames": Conv((1, 8, 5, 33, 40), 6, history=False),
    "start-two-large-frames": Conv((2, 8, 2, 33, 40), 6, history=False),
    "pieces": Conv((1, 40, 7, 160, 164), 3, layout=channels_last),
    "pieces-start": Conv((1, 40, 5, 160, 164), 3, history=False, layout=channels_last),
    "pieces-of-two": Conv((2, 24, 5, 160, 140), 3, layout=channels_last),
    "channels-last": Conv((2, 24, 3, 5, 7), 20, layout=channels_last),
    "holes": Conv((2, 24, 3, 5, 7), 20, layout=holes),
    "pixels-in": Conv((1, 3, 4, 17, 19), 24, norm=False, layout=channels_last),
    "pixels-out": Conv((1, 24, 4, 17, 19), 3, layout=channels_last),
    "below-oneDNN-limit": Conv((1, 16, 8, 32, 9), 16, layout=channels_last),
    "time-only": Conv((1, 24, 3, 5, 7), 48, (3, 1, 1), norm=False),
    "time-only-start": Conv((1, 24, 4, 5, 7), 48, (3, 1, 1), history=False, norm=False),
    "halving": Conv((2, 24, 4, 5, 7), 24, (3, 1, 1), norm=False, stride=2),
    "halving-pieces": Conv((1, 16, 6, 300, 304), 4, (3, 1, 1), norm=False, stride=2),
    "pointwise": Conv((2, 24, 3, 5, 7), 9, (1, 1, 1), history=False, norm=False),
    "pointwise-pieces": Conv((1, 40, 5, 160, 164), 3, (1, 1, 1), history=False, norm=False),
}
ALL = pytest.mark.parametrize("case", CONVS.values(), ids=CONVS)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN in deterministic mode, so that a hole in a result shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(case: Conv, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
    b, c, _, h, w = case.x
    weight = torch.randn(case.out_dim, c, *case.kernel) * (c * 27) ** -0.5
    past = case.kernel[0] - case.stride
    history = torch.randn(b, c, past, h, w) if case.history else None
    gamma = torch.rand(c, 1, 1, 1) + 0.5 if case.norm else None
    tensors = (torch.randn(case.x), weight, torch.randn(case.out_dim), history, gamma)
    x, *others = (None if t is None else t.to(dtype) for t in tensors)
    return (case.layout(x), *others)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    assert actual.dtype == expected.dtype
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@ALL
def test_conv_matches_reference(case: Conv) -> None:
    tensors = draw(case)
    y, kept = torch_conv.causal_conv3d(*tensors, stride=case.stride)
    expected, expected_kept = reference.causal_conv3d(*tensors, stride=case.stride)
    assert error(y, expected) <= 3e-6
    if case.kernel[0] == 1:
        assert kept is expected_kept is None
    else:
        assert error(kept, expected_kept) <= 1e-6


@ALL
def test_conv_in_bf16_matches_reference(case: Conv) -> None:
    """Both round the normalised input and the result, each once: two units of 2^-8."""
    tensors = draw(case, torch.bfloat16)
    y, kept = torch_conv.causal_conv3d(*tensors, stride=case.stride)
    expected, expected_kept = reference.causal_conv3d(*tensors, stride=case.stride)
    assert error(y, expected) <= 2**-7
    assert kept is None or error(kept, expected_kept) <= 2**-7


@ALL
def test_gradient_path_gives_the_same_numbers(case: Conv) -> None:
    tensors = draw(case)
    y, _ = torch_conv.causal_conv3d(*tensors, stride=case.stride)
    tensors[1].requires_grad_()
    tracked, _ = torch_conv.causal_conv3d(*tensors, stride=case.stride)
    assert tracked.requires_grad and not y.requires_grad
    assert error(tracked.detach(), y) <= 3e-6


@MODULES
@pytest.mark.parametrize("name", ["channels-last", "pieces", "start-small-frames"])
def test_out_may_be_the_input(ops: ModuleType, name: str) -> None:
    case = CONVS[name]
    case = case._replace(out_dim=case.x[1])
    x, *others = draw(case)
    expected, kept = ops.causal_conv3d(x, *others)
    result, kept_too = ops.causal_conv3d(x, *others, out=x)
    assert result is x
    assert torch.equal(result, expected) and torch.equal(kept_too, kept)


@MODULES
@ALL
def test_history_is_a_copy_and_inputs_are_left_alone(ops: ModuleType, case: Conv) -> None:
    tensors = draw(case)
    before = [None if t is None else t.clone() for t in tensors]
    _, kept = ops.causal_conv3d(*tensors, stride=case.stride)
    if kept is not None:
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        kept.fill_(torch.nan)
    assert all(a is None or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@MODULES
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", ["start-small-frames", "start-large-frames", "pieces-start"])
def test_two_halves_make_a_whole(ops: ModuleType, name: str, cut: int) -> None:
    x, weight, bias, _, gamma = draw(CONVS[name])
    whole, kept = ops.causal_conv3d(x, weight, bias, None, gamma)
    a, history = ops.causal_conv3d(x[:, :, :cut], weight, bias, None, gamma)
    b, kept_too = ops.causal_conv3d(x[:, :, cut:], weight, bias, history, gamma)
    joined = torch.cat([a, b], 2)
    if ops is reference:
        assert torch.equal(joined, whole) and torch.equal(kept_too, kept)
    assert error(joined, whole) <= 3e-6 and error(kept_too, kept) <= 1e-6


@MODULES
def test_no_frame_sees_a_later_one(ops: ModuleType) -> None:
    x, weight, bias, _, gamma = draw(CONVS["start-large-frames"])
    x[:, :, 3] = torch.nan
    y, _ = ops.causal_conv3d(x, weight, bias, None, gamma)
    assert y[:, :, :3].isfinite().all() and y[:, :, 3:].isnan().all()


@MODULES
def test_conv_is_the_textbook(ops: ModuleType) -> None:
    """Zeros before the clip and around each frame, in fp64."""
    x, weight, bias, _, _ = draw(CONVS["pixels-in"])
    y, _ = ops.causal_conv3d(x, weight, bias, None)
    padded = F.pad(x.double(), (1, 1, 1, 1, 2, 0))
    assert error(y.double(), F.conv3d(padded, weight.double(), bias.double())) <= 1e-6


@MODULES
def test_norm_is_by_length_alone(ops: ModuleType) -> None:
    """Trap 16: x / max(|x|, 1e-12) * sqrt(C) * gamma, without a mean square's epsilon."""
    x = torch.randn(2, 6, 3, 4, 5) * torch.logspace(-8, 8, 5)
    x[0, :, 0], x[1, :, 1] = 0, 1e-14
    gamma = torch.rand(6, 1, 1, 1) + 0.5
    wide = x.double()
    length = wide.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    expected = wide / length * 6**0.5 * gamma.double()
    y = ops.rms_norm_channels(x, gamma)
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=0)
    assert (y[0, :, 0] == 0).all() and 0 < y[1, :, 1].abs().max() < 0.1


SIZES = {"small": (1, 6, 3, 4, 5), "batch": (2, 6, 2, 3, 4), "pieces": (1, 24, 5, 160, 164)}


@pytest.mark.parametrize("op", ["upsample_conv2d", "downsample_conv2d"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, holes])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_resampling_matches_reference(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], op: str
) -> None:
    b, c, t, h, w = shape
    x = layout(torch.randn(b, c, t, 2 * (h // 2), 2 * (w // 2)))
    weight, bias = torch.randn(5, c, 3, 3) * (9 * c) ** -0.5, torch.randn(5)
    expected = getattr(reference, op)(x, weight, bias)
    assert error(getattr(torch_conv, op)(x, weight, bias), expected) <= 3e-6
    narrow = [tensor.bfloat16() for tensor in (x, weight, bias)]
    expected = getattr(reference, op)(*narrow)
    assert error(getattr(torch_conv, op)(*narrow), expected) <= 2**-6  # folded kernels are rounded


@pytest.mark.parametrize("op", ["upsample_conv2d", "downsample_conv2d"])
def test_resampling_gradients_match_reference(op: str) -> None:
    x, weight, bias = torch.randn(2, 6, 3, 4, 6), torch.randn(5, 6, 3, 3), torch.randn(5)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    gradients = []
    for ops in (torch_conv, reference):
        y = getattr(ops, op)(*tensors)
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        gradients.append(torch.autograd.grad(loss, tensors))
    for actual, exact in zip(*gradients, strict=True):
        assert error(actual, exact) <= 1e-5


@MODULES
def test_upsampling_repeats_every_pixel(ops: ModuleType) -> None:
    """Trap 17: nearest-exact by two, then zeros around the doubled frame."""
    x = torch.randn(2, 3, 2, 4, 5)
    twice = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    padded = F.pad(twice, (1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(3, 3, 3, 3)
            weight[[0, 1, 2], [0, 1, 2], i, j] = 1
            y = ops.upsample_conv2d(x, weight, torch.zeros(3))
            assert torch.equal(y, padded[..., i : i + 8, j : j + 10])


@MODULES
def test_downsampling_pads_right_and_bottom(ops: ModuleType) -> None:
    """Trap 17."""
    x = torch.randn(2, 3, 2, 4, 6)
    padded = F.pad(x, (0, 1, 0, 1))
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(3, 3, 3, 3)
            weight[[0, 1, 2], [0, 1, 2], i, j] = 1
            y = ops.downsample_conv2d(x, weight, torch.zeros(3))
            assert torch.equal(y, padded[..., i : i + 3 : 2, j : j + 5 : 2])
