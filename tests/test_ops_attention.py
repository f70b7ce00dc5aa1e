"""What the table of cases does not say of attention: eight bits come near the exact result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import fp8_sums, limits, reference, registry
from wanrt.kernels.cases_attention import heads, real
from wanrt.kernels.launch import INTERPRETER, Mma
from wanrt.kernels.reference import dequantize, quantize
from wanrt.kernels.target import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = registry.BACKENDS
EIGHT_BITS = pytest.mark.parametrize("name", ["attention_int8", "attention_int8_fp8"])
NEAR = 0.999


def op(name: str, backend: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    reason = registry.reason_against(name, backend, registry.here(dtype))
    if reason is not None:
        pytest.skip(reason)
    return registry.function(name, backend)


def cosines(actual: Tensor, expected: Tensor) -> list[float]:
    """Of each head."""
    return F.cosine_similarity(
        actual.double().transpose(0, 1).flatten(1), expected.double().transpose(0, 1).flatten(1)
    ).tolist()


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def draw(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    q, k, v = real(1, 4, 128, 256)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


@EIGHT_BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_near_exact_attention(name: str, backend: str, dtype: torch.dtype) -> None:
    """Every head, with channels 60 times as large as others and keys far from zero."""
    function = op(name, backend, dtype)
    for seed in range(2 if backend == "triton" else 8):
        q, k, v = draw(seed, dtype)
        assert min(cosines(function(q, k, v), exact(q, k, v))) >= NEAR, f"{seed=}"


@pytest.mark.parametrize("seed", range(3))
def test_quantised_rows_alone_are_not_near(seed: int) -> None:
    """What the mean, the factors and the Hadamard matrix are for: the test above can fail."""
    q, k, v = draw(seed, torch.float32)
    for keys in (k, k - k.mean(2, keepdim=True)):
        bare = reference.attention(
            dequantize(quantize(q, torch.int8)), dequantize(quantize(keys, torch.int8)), v
        )
        assert min(cosines(bare, exact(q, k, v))) < NEAR


@EIGHT_BITS
@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_see_the_mean_of_the_keys(name: str, backend: str) -> None:
    """Keys of eighths, moved by up to 250, which fp16 holds exactly."""
    function = op(name, backend, torch.float16)
    torch.manual_seed(0)
    q, k, v = (heads(1, 2, 70, 64).to(DEVICE, torch.float16) for _ in range(3))
    k = (k * 8).round() / 8
    far = torch.randint(-2000, 2000, (1, 2, 1, 64), device=DEVICE).half() / 8
    moved = k + far
    assert torch.equal(moved - far, k)
    difference = (function(q, moved, v) - function(q, k, v)).abs().max()
    # A key near a tie may round to its other side, and in fp8 (2^-4) a probability with it.
    near = 2**-9 if name == "attention_int8" else 2**-7
    assert difference <= near * v.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_does_not_see_the_mean_of_the_values(backend: str) -> None:
    """Values of eighths, moved by up to 250: all that fp8 rounds is how far they are from it."""
    function = op("attention_int8_fp8", backend, torch.float16)
    torch.manual_seed(0)
    q, k, v = (heads(1, 2, 70, 64).to(DEVICE, torch.float16) for _ in range(3))
    v = (v * 8).round() / 8
    far = torch.randint(-2000, 2000, (1, 2, 1, 64), device=DEVICE).half() / 8
    moved = v + far
    assert torch.equal(moved - far, v)
    difference = (function(q, k, moved).float() - far - function(q, k, v)).abs().max()
    # The result has 11 bits of up to 255; a value near a tie may round to its other side.
    assert difference <= 2**-4 + 2**-7 * v.abs().max()


@EIGHT_BITS
@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_values_of_any_size(name: str, backend: str) -> None:
    """No sum in fp16 overflows, and a power of two passes through."""
    torch.manual_seed(0)
    q, k, v = (heads(1, 1, 257, 64).to(DEVICE) for _ in range(3))
    for dtype, factor in ((torch.bfloat16, 2.0**100), (torch.bfloat16, 2.0**-90)):
        function = op(name, backend, dtype)
        q16, k16, v16 = q.to(dtype), k.to(dtype), v.to(dtype)
        assert torch.equal(function(q16, k16, v16 * factor), function(q16, k16, v16) * factor)
    largest = torch.full_like(v, 65504.0).half()
    same = torch.ones_like(k).half()  # all keys count alike, so that sums are as large as can be
    assert torch.equal(op(name, backend, torch.float16)(same, same, largest), largest)


def test_cards_without_fp8_decline_it() -> None:
    for arch, reason in ((86, "fp8 needs compute capability 8.9, not 8.6"), (89, None)):
        target = Target("cuda", arch, torch.bfloat16)
        assert registry.reason_against("attention_int8_fp8", "triton", target) == reason
        assert registry.reason_against("attention_int8", "triton", target) is None


@pytest.mark.parametrize("name", ["attention", "attention_int8", "attention_int8_fp8"])
def test_heads_of_the_result_join_without_a_copy(name: str) -> None:
    function = op(name, "triton", torch.bfloat16)
    q = heads(2, 3, 5, 64).to(DEVICE, torch.bfloat16)
    assert function(q, q, q).transpose(1, 2).is_contiguous()


@EIGHT_BITS
def test_heads_in_groups_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = op(name, "triton", torch.float16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, n, 64, device=DEVICE).half() for n in (40, 33, 33))
    bias = torch.randn(1, 5, 1, 33, device=DEVICE)
    whole = function(q, k, v, bias)
    monkeypatch.setattr(limits, "ATTENTION_AT_ONCE", 2 * 64 * (40 + 33 * 3))  # two heads or three
    assert torch.equal(function(q, k, v, bias), whole)


def test_fp8_with_sums_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an RTX 40 does it: all of the above, and no sum overflows, however large it can be."""
    function = op("attention_int8_fp8", "triton", torch.float16)
    from wanrt.kernels import attention_int8  # needs Triton

    attend = attention_int8.attend
    launched: list[tuple[Mma, ...]] = []

    def watched(*args: Any) -> Tensor:
        launched.append(args[-1])
        return attend(*args)

    monkeypatch.setattr(attention_int8, "attend", watched)
    monkeypatch.setattr(fp8_sums, "ARCHS", (INTERPRETER, 89, 90, 120))
    test_is_near_exact_attention("attention_int8_fp8", "triton", torch.bfloat16)
    test_does_not_see_the_mean_of_the_keys("attention_int8_fp8", "triton")
    test_fp8_does_not_see_the_mean_of_the_values("triton")
    test_takes_values_of_any_size("attention_int8_fp8", "triton")
    alike = torch.ones(1, 1, 256, 64, device=DEVICE).half()
    v = torch.cat((alike[:, :, :128], -alike[:, :, 128:] / 2), 2)  # sums of 128 of one sign
    y = function(alike, alike, v)
    assert (y - 0.25).abs().max() <= 2**-10
    assert all(mma[-1] == Mma("e4m3", "f16") for mma in launched)
