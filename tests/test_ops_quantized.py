"""Eight-bit activations and linears: casts bit for bit, and what each form keeps of a product."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import fp8_sums, reference, registry
from wanrt.kernels.cases import Case, all_cases, heavy_tailed, normal
from wanrt.kernels.fp8_sums import ACTIVATION_PEAK
from wanrt.kernels.launch import INTERPRETER, Mma
from wanrt.kernels.reference import TINY, Quantized, hadamard_matrix, rotate
from wanrt.kernels.target import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
CASTS = [
    pytest.param(case, dtype, id=f"{case.id}-{dtype}")
    for case in all_cases().values()
    if case.op == "quantize" and case.size == "small" and "hadamard" not in case.kwargs
    for dtype in case.dtypes
]


def function(
    op: str, backend: str, dtype: torch.dtype, result: torch.dtype | None = None
) -> Callable[..., Any]:
    reason = registry.reason_against(op, backend, registry.here(dtype, result=result))
    if reason is not None:
        pytest.skip(reason)
    return registry.function(op, backend)


@BACKENDS
@pytest.mark.parametrize("case, dtype", CASTS)
def test_casts_are_equal_in_every_bit(backend: str, case: Case, dtype: torch.dtype) -> None:
    (x,) = case.draw(dtype, DEVICE)
    actual = function("quantize", backend, dtype, case.result)(x, **case.kwargs)
    expected = reference.quantize(x, **case.kwargs)
    if actual.peak == ACTIVATION_PEAK:  # a card whose fp8 products add up in fp16
        expected = in_small_numbers(x, **case.kwargs)
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(actual.scale, expected.scale)


def in_small_numbers(x: Tensor, dtype: torch.dtype, group: int | None = None) -> Quantized:
    """`reference.quantize` whose largest number is ACTIVATION_PEAK."""
    groups = x.float().unflatten(-1, (-1, group or x.shape[-1]))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(TINY)
    values = groups * (torch.full_like(largest, ACTIVATION_PEAK) / largest)
    scale = (largest / ACTIVATION_PEAK).squeeze(-1)
    return Quantized(values.flatten(-2).to(dtype), scale, ACTIVATION_PEAK)


class InFp16(NamedTuple):
    """Kernels as they run on a card of 8.9, and the products that they started."""

    products: list[Mma]


@pytest.fixture
def in_fp16(monkeypatch: pytest.MonkeyPatch) -> InFp16:
    """fp8 products with sums in fp16, wherever the kernels run."""
    function("linear_quantized", "triton", FP8)  # skips where there is no Triton
    from wanrt.kernels import linear

    found, launch = InFp16([]), linear.launch

    def watched(*args: Any, **options: Any) -> None:
        found.products.append(options["mma"][0])
        launch(*args, **options)

    monkeypatch.setattr(linear, "launch", watched)
    monkeypatch.setattr(fp8_sums, "ARCHS", (INTERPRETER, 89, 90, 120))
    return found


def test_small_numbers_stand_for_the_same(in_fp16: InFp16) -> None:
    """To the bit what the reference gives with another peak; few lose more than otherwise."""
    for case, dtype in (param.values for param in CASTS):
        if case.result == FP8:
            test_casts_are_equal_in_every_bit("triton", case, dtype)
    x = heavy_tailed(2, 64, 384).to(DEVICE)
    small = registry.function("quantize", "triton")(x, FP8)
    assert small.values.float().abs().max() == small.peak == ACTIVATION_PEAK
    errors = [
        float((reference.dequantize(y) - x).norm() / x.norm())
        for y in (small, reference.quantize(x, FP8))
    ]
    assert errors[0] <= 1.25 * errors[1]  # outliers 60 times the rest push it below 2^-6
    scale, shift = torch.randn(2, 2, 1, 384, device=DEVICE)
    modulate = registry.function("layer_norm_modulate_quantize", "triton")
    normed = modulate(x, scale, shift, 1e-6, FP8)
    assert normed.values.float().abs().max() == normed.peak == ACTIVATION_PEAK


@pytest.mark.parametrize("group", [None, 128])
def test_sums_in_fp16_are_near_and_never_too_large(group: int | None, in_fp16: InFp16) -> None:
    quantize, linear, onward = (
        registry.function(op, "triton")
        for op in ("quantize", "linear_quantized", "linear_quantized_out")
    )
    drawn = normal(33, 384).to(DEVICE), normal(256, 384).to(DEVICE)
    most = tuple(map(torch.ones_like, drawn))  # every product is as large as can be
    for x, weight in (drawn, most):
        a, w = quantize(x, FP8, group), reference.quantize_weight(weight, FP8)
        expected = reference.linear_quantized(a, w, dtype=torch.float32)
        y = linear(a, w, dtype=torch.float32)
        assert float((y - expected).abs().max() / expected.abs().max()) <= 2**-10
        then = onward(a, w, dtype=FP8)
        assert then.values.float().abs().max() == then.peak == ACTIVATION_PEAK
        least = float(y.abs().max()) * 2**-11  # half a step of the least numbers of e4m3
        torch.testing.assert_close(reference.dequantize(then), y, rtol=2**-4, atol=1.01 * least)
    assert in_fp16.products == [Mma("e4m3", "f16")] * 4
    in_fp16.products.clear()
    linear(reference.quantize(x, FP8, group), w, dtype=torch.float32)  # nobody said how large
    assert in_fp16.products == [Mma("e4m3", "f32")]


class Form(NamedTuple):
    """How activations are quantised, and whether the bar is reached with outliers in them."""

    dtype: torch.dtype
    group: int | None
    hadamard: bool
    holds_outliers: bool


BARS = {INT8: 0.9995, FP8: 0.999}  # the least cosine of a linear with the exact product
FORMS = {
    "int8-row": Form(INT8, None, False, False),
    "int8-group": Form(INT8, 128, False, True),
    "int8-row-hadamard": Form(INT8, None, True, True),
    "int8-group-hadamard": Form(INT8, 128, True, True),
    "fp8-row": Form(FP8, None, False, True),
    "fp8-group": Form(FP8, 128, False, True),
    "fp8-row-hadamard": Form(FP8, None, True, True),
    "fp8-group-hadamard": Form(FP8, 128, True, True),
}


@pytest.mark.parametrize("draw", [normal, heavy_tailed])
@pytest.mark.parametrize("name", FORMS)
def test_which_forms_reach_the_bar(name: str, draw: Callable[..., Tensor]) -> None:
    """One int8 scale for a whole row falls short where a few channels are 60 times the others."""
    form = FORMS[name]
    torch.manual_seed(0)
    x, weight = draw(256, 1536), normal(384, 1536) / 1536**0.5
    rows = reference.quantize(x, form.dtype, form.group, form.hadamard)
    columns = reference.quantize_weight(weight, form.dtype, form.hadamard)
    y = reference.linear_quantized(rows, columns, dtype=torch.float32)
    exact = x.double() @ weight.double().T
    cosine = F.cosine_similarity(y.double().flatten(), exact.flatten(), 0).item()
    assert (cosine >= BARS[form.dtype]) == (form.holds_outliers or draw is normal), f"{cosine=}"


def test_rotation_is_its_own_inverse() -> None:
    h = hadamard_matrix(128, torch.device("cpu")) / 128**0.5
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h @ h, torch.eye(128), rtol=0, atol=1e-6)
    x, weight = normal(9, 384), normal(33, 384)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=0, atol=2e-4)


@BACKENDS
def test_int8_sums_are_exact_past_2_to_the_24(backend: str) -> None:
    """Sums that fp32 products would round on the way: s32 rounds once, at the end."""
    torch.manual_seed(0)
    x, weight = (torch.randint(90, 128, (n, 2048), dtype=INT8, device=DEVICE) for n in (33, 40))
    ones = [torch.ones(n, 1, device=DEVICE) for n in (33, 40)]
    linear = function("linear_quantized", backend, INT8)
    y = linear(Quantized(x, ones[0]), Quantized(weight, ones[1]), dtype=torch.float32)
    assert torch.equal(y, (x.double() @ weight.double().T).float())
    assert y.min() > 2**24


@BACKENDS
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_one_scale_for_a_whole_weight(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = function("linear_quantized", backend, dtype)
    x = reference.quantize(normal(9, 256).to(DEVICE), dtype)
    weight = reference.quantize_weight(normal(77, 256).to(DEVICE), dtype)
    one = weight.scale[:1]
    whole = linear(x, weight._replace(scale=one), dtype=torch.float32)
    assert torch.equal(
        whole, linear(x, weight._replace(scale=one.expand(77, 1)), dtype=whole.dtype)
    )


@pytest.mark.parametrize(
    "op, dtype, result",
    [
        ("quantize", torch.bfloat16, FP8),
        ("layer_norm_modulate_quantize", torch.bfloat16, FP8),
        ("linear_quantized", FP8, torch.bfloat16),
        ("linear_quantized_out", INT8, FP8),
    ],
)
def test_cards_without_fp8_decline_it(op: str, dtype: torch.dtype, result: torch.dtype) -> None:
    lacking = registry.reason_against(op, "triton", Target("cuda", 86, dtype, result))
    assert lacking == "fp8 needs compute capability 8.9, not 8.6"
    assert registry.reason_against(op, "triton", Target("cuda", 89, dtype, result)) is None
    assert registry.reason_against(op, "torch", Target("cuda", 86, dtype, result)) is None
