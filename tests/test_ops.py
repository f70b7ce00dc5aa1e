"""The torch ops against the reference ops: values, bf16 rounding, gradients, awkward layouts."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference, torch_conv, torch_ops

EPS = 1e-6


class Case(NamedTuple):
    """One call: `op` by name, its tensors, drawn anew for each test, and its other arguments."""

    op: str
    tensors: Callable[[], tuple[Tensor, ...]]
    kwargs: dict[str, object] = {}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def strided(*shape: int) -> Tensor:
    """Normal values in a layout that is dense in no dimension but the last."""
    return torch.randn(*shape[:-2], shape[-2] * 2, shape[-1] + 3)[..., ::2, : shape[-1]]


def heads(b: int, h: int, n: int, d: int) -> Tensor:
    """[B, H, n, hd] as a view of [B, n, H, hd], which is what a projection gives."""
    return torch.randn(b, n, h, d).transpose(1, 2)


def freqs(tokens: int, pairs: int) -> Tensor:
    angles = torch.rand(tokens, pairs) * 6.3
    return torch.stack((angles.cos(), angles.sin()), -1)


def lengths_bias(*counts: int) -> Tensor:
    """Key bias of 9 rows: row 4 + b of sample b counts `counts[b]` times, those behind it never."""
    bias = torch.zeros(len(counts), 1, 1, 9)
    for b, count in enumerate(counts):
        bias[b, ..., 4 + b] = torch.log(torch.tensor(float(count)))
        bias[b, ..., 5 + b :] = -torch.inf
    return bias


ROWS = {"eps": EPS}
ROPE = {"num_heads": 3, "eps": EPS}
CASES = {
    "layer_norm": Case("layer_norm", lambda: (normal(2, 7, 384), normal(384), normal(384)), ROWS),
    "layer_norm-strided": Case(
        "layer_norm", lambda: (strided(2, 7, 130), normal(130), normal(130)), ROWS
    ),
    "modulate-one-sample": Case(
        "layer_norm_modulate",
        lambda: (normal(1, 63, 256), normal(1, 1, 256), normal(1, 1, 256)),
        ROWS,
    ),
    "modulate-two-samples": Case(
        "layer_norm_modulate",
        lambda: (normal(2, 63, 256), normal(2, 1, 256), normal(2, 1, 256)),
        ROWS,
    ),
    "modulate-one-token": Case(
        "layer_norm_modulate",
        lambda: (normal(2, 1, 256), normal(2, 1, 256), normal(2, 1, 256)),
        ROWS,
    ),
    "modulate-per-token": Case(
        "layer_norm_modulate",
        lambda: (strided(2, 9, 130), normal(2, 9, 130), strided(2, 9, 130)),
        ROWS,
    ),
    "gated-per-sample": Case(
        "gated_residual", lambda: (normal(2, 63, 130), normal(2, 63, 130), normal(2, 1, 130))
    ),
    "gated-per-token": Case(
        "gated_residual", lambda: (normal(2, 9, 130), strided(2, 9, 130), normal(2, 9, 130))
    ),
    "rms_norm": Case("rms_norm", lambda: (normal(2, 63, 384), normal(384)), ROWS),
    "rms_norm-strided": Case("rms_norm", lambda: (strided(2, 63, 130), normal(130)), ROWS),
    "rope": Case("rms_norm_rope", lambda: (normal(2, 63, 384), normal(384), freqs(63, 64)), ROPE),
    "rope-one-token": Case(
        "rms_norm_rope", lambda: (normal(1, 1, 384), normal(384), freqs(1, 64)), ROPE
    ),
    "rope-strided": Case(
        "rms_norm_rope", lambda: (strided(2, 5, 36), normal(36), freqs(5, 6)), ROPE
    ),
    "gelu-tanh": Case("gelu", lambda: (normal(2, 9, 333) * 3,), {"approximate": "tanh"}),
    "gelu-erf": Case("gelu", lambda: (strided(2, 9, 333) * 3,), {"approximate": "none"}),
    "attention": Case("attention", lambda: tuple(heads(2, 3, 65, 128) for _ in range(3))),
    "attention-other-keys": Case(
        "attention", lambda: (heads(2, 3, 65, 128), heads(2, 3, 9, 128), heads(2, 3, 9, 128))
    ),
    "attention-one-key": Case(
        "attention", lambda: (heads(1, 2, 65, 128), heads(1, 2, 1, 128), heads(1, 2, 1, 128))
    ),
    "attention-key-bias": Case(
        "attention",
        lambda: (
            heads(2, 3, 65, 128),
            heads(2, 3, 9, 128),
            heads(2, 3, 9, 128),
            lengths_bias(3, 500),
        ),
    ),
    "attention-shared-context": Case(
        "attention",
        lambda: (
            heads(2, 3, 65, 128),
            heads(1, 3, 9, 128).expand(2, -1, -1, -1),
            heads(1, 3, 9, 128).expand(2, -1, -1, -1),
            lengths_bias(7),
        ),
    ),
    "attention-position-bias": Case(
        "attention",
        lambda: (*(heads(2, 4, 11, 64) / 3 for _ in range(3)), normal(1, 4, 11, 11)),
        {"scale": 1.0},
    ),
    "channels-3d": Case("rms_norm_channels", lambda: (normal(2, 5, 3, 7, 6), normal(5, 1, 1, 1))),
    "channels-2d": Case("rms_norm_channels", lambda: (normal(3, 33, 7, 5), normal(33, 1, 1))),
    "conv": Case(
        "causal_conv3d",
        lambda: (
            normal(1, 24, 3, 7, 5),
            normal(20, 24, 3, 3, 3) / 20,
            normal(20),
            normal(1, 24, 2, 7, 5),
        ),
    ),
    "conv-few-channels": Case(
        "causal_conv3d",
        lambda: (
            normal(1, 5, 1, 7, 5),
            normal(9, 5, 3, 3, 3) / 9,
            normal(9),
            normal(1, 5, 2, 7, 5),
        ),
    ),
    "conv-norm-silu": Case(
        "causal_conv3d",
        lambda: (
            normal(2, 24, 3, 7, 5),
            normal(20, 24, 3, 3, 3) / 20,
            normal(20),
            normal(2, 24, 2, 7, 5),
            normal(24, 1, 1, 1),
        ),
    ),
    "conv-time-only": Case(
        "causal_conv3d",
        lambda: (
            normal(1, 24, 3, 7, 5),
            normal(48, 24, 3, 1, 1) / 8,
            normal(48),
            normal(1, 24, 2, 7, 5),
        ),
    ),
    "conv-pointwise": Case(
        "causal_conv3d",
        lambda: (normal(1, 24, 3, 7, 5), normal(9, 24, 1, 1, 1) / 5, normal(9), None),
    ),
}
OUT_CASES = ["gated-per-sample", "gated-per-token", "gelu-tanh", "gelu-erf"]


def draw(name: str) -> tuple[Tensor | None, ...]:
    torch.manual_seed(sum(name.encode()))
    return CASES[name].tensors()


def call(module: object, name: str, tensors: tuple[Tensor | None, ...], **kwargs: object) -> Tensor:
    """The op's result; where it returns a history too, both in one tensor."""
    result = getattr(module, CASES[name].op)(*tensors, **CASES[name].kwargs, **kwargs)
    if isinstance(result, tuple):
        return torch.cat([part.flatten() for part in result if part is not None])
    return result


def fast(name: str) -> object:
    return torch_conv if CASES[name].op in ("rms_norm_channels", "causal_conv3d") else torch_ops


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", {case.op: name for name, case in CASES.items()}.values())
def test_signatures_agree(name: str) -> None:
    op = CASES[name].op
    theirs, ours = (inspect.signature(getattr(m, op)) for m in (reference, fast(name)))
    assert list(ours.parameters.items()) == list(theirs.parameters.items())


@pytest.mark.parametrize("name", CASES)
def test_fp32_matches_reference(name: str) -> None:
    tensors = draw(name)
    with torch.no_grad():
        assert error(call(fast(name), name, tensors), call(reference, name, tensors)) <= 2e-6


@pytest.mark.parametrize("name", [n for n in CASES if n != "attention-one-key"])  # q, k have none
def test_gradients_match_reference(name: str) -> None:
    gradients = []
    for module in (fast(name), reference):
        tensors = draw(name)
        leaves = [x.detach().requires_grad_() for x in tensors if x is not None]
        if CASES[name].op == "attention" and len(leaves) > 3:
            leaves[3].requires_grad_(False)  # a bias is data
        if CASES[name].op == "rms_norm_rope":
            leaves[2].requires_grad_(False)
        given = iter(leaves)
        result = call(module, name, tuple(None if x is None else next(given) for x in tensors))
        weight = torch.linspace(-1, 1, result.numel()).view(result.shape)
        wanted = [x for x in leaves if x.requires_grad]
        gradients.append(torch.autograd.grad((result * weight).sum(), wanted))
    for actual, expected in zip(*gradients, strict=True):
        assert error(actual, expected) <= 1e-5


BF16_NAMES = [n for n in CASES if CASES[n].op not in ("rms_norm_channels", "causal_conv3d")]


@pytest.mark.parametrize("name", BF16_NAMES)
def test_bf16_matches_reference(name: str) -> None:
    """Activations in bf16, parameters of norms and modulation in fp32.

    Both round an fp32 value once, so they differ by one unit in the last place at most: 2^-7 of the
    value. Attention also rounds its probabilities, hence 2^-7 of the largest value there.
    """
    activations = {"gated_residual": 2, "attention": 3}.get(CASES[name].op, 1)
    tensors = tuple(x.bfloat16() if i < activations else x for i, x in enumerate(draw(name)))
    with torch.no_grad():
        actual, expected = (call(m, name, tensors) for m in (torch_ops, reference))
    assert actual.dtype == expected.dtype
    actual, expected = actual.float(), expected.float()
    limit = expected.abs().max() if CASES[name].op == "attention" else expected.abs()
    assert ((actual - expected).abs() <= limit * 2**-7 + 1e-6).all()


@pytest.mark.parametrize("op", ["layer_norm", "layer_norm_modulate", "rms_norm", "rms_norm_rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_asked_for(op: str, dtype: torch.dtype) -> None:
    """One rounding, from fp32 to the dtype asked for: the same as a cast afterwards."""
    name = next(n for n, case in CASES.items() if case.op == op)
    tensors = draw(name)
    for module in (torch_ops, reference):
        exact = call(module, name, tensors, dtype=torch.float32)
        assert torch.equal(call(module, name, tensors, dtype=dtype), exact.to(dtype))


def test_rms_norm_rounds_before_its_weight() -> None:
    """In bf16 the normalised value is rounded, then multiplied by the fp32 weight in fp32."""
    x = torch.randn(3, 256).bfloat16()
    weight = torch.randn(256)
    wide = x.double()
    n = (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()).float().bfloat16()
    for module in (reference, torch_ops):
        assert torch.equal(module.rms_norm(x, weight, EPS, torch.float32), n.float() * weight)


@pytest.mark.parametrize("name", OUT_CASES)
@pytest.mark.parametrize("module", [reference, torch_ops])
def test_out_may_be_the_input(module: object, name: str) -> None:
    tensors = draw(name)
    expected = call(module, name, tensors)
    result = call(module, name, tensors, out=tensors[0])
    assert result is tensors[0]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_left_alone(name: str) -> None:
    tensors, before = draw(name), draw(name)
    with torch.no_grad():
        call(fast(name), name, tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True) if x is not None)


def test_reference_is_the_textbook() -> None:
    """The reference against PyTorch's own operators in fp64, where PyTorch has them."""
    torch.manual_seed(1)
    x, w, b = torch.randn(5, 384), torch.randn(384), torch.randn(384)
    q, k, v = torch.randn(3, 1, 2, 9, 64)
    x64, w64, b64 = x.double(), w.double(), b.double()
    pairs = [
        (reference.layer_norm(x, w, b, EPS), F.layer_norm(x64, (384,), w64, b64, EPS)),
        (reference.rms_norm(x, w, EPS), F.rms_norm(x64, (384,), w64, EPS)),
        (reference.gelu(x * 3), F.gelu(x64 * 3, approximate="tanh")),
        (reference.gelu(x * 3, "none"), F.gelu(x64 * 3)),
        (
            reference.attention(q, k, v),
            F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
        ),
    ]
    for actual, expected in pairs:
        assert error(actual.double(), expected) <= 1e-6
