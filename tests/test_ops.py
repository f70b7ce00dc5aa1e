"""Every op of the table, in every backend, against the reference: values, dtypes, inputs kept.

Triton's kernels run on the GPU where there is one, else in Triton's interpreter.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference, registry
from wanrt.kernels.cases import EPS, Case, Limit, all_cases, limits, to
from wanrt.kernels.reference import LARGEST, Quantized

torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 on a GPU too; conftest.py may be left out
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {name: case for name, case in all_cases().items() if case.size == "small"}


class Run(NamedTuple):
    """One case in one backend and dtype."""

    case: Case
    backend: str
    dtype: torch.dtype


def _runs(backends: tuple[str, ...] = ("torch", "triton", "onnx")) -> list[Any]:
    runs = [
        Run(case, backend, dtype)
        for case in SMALL.values()
        for backend in backends
        if getattr(registry.OPS[case.op], backend)
        for dtype in case.dtypes
    ]
    names = [f"{r.case.id}-{r.backend}-{str(r.dtype).removeprefix('torch.')}" for r in runs]
    return [pytest.param(run, id=name) for run, name in zip(runs, names, strict=True)]


def op(run: Run) -> Callable[..., Any]:
    target = registry.here(run.dtype, result=run.case.result)
    reason = registry.reason_against(run.case.op, run.backend, target)
    if reason is not None:
        pytest.skip(reason)
    return registry.function(run.case.op, run.backend)


def call(function: Callable[..., Any], case: Case, tensors: Any, **kwargs: Any) -> list[Tensor]:
    """Every tensor of the result; quantised values as what they stand for."""
    result = function(*tensors, **(case.kwargs | kwargs))
    if isinstance(result, Quantized):
        peak = result.peak or LARGEST[result.values.dtype]  # what the largest of a row became
        return [reference.dequantize(result), result.scale * peak]
    if isinstance(result, tuple):
        return [part for part in result if part is not None]
    return [result]


def parts(inputs: Any) -> list[Tensor]:
    """The tensors of drawn inputs, eight-bit values as their bytes."""
    each = [part for x in inputs for part in (x if isinstance(x, tuple) else (x,))]
    tensors = [part for part in each if isinstance(part, Tensor)]
    return [x.view(torch.uint8) if x.itemsize == 1 else x for x in tensors]


def expected_of(run: Run, tensors: Any) -> list[Tensor]:
    return call(registry.function(run.case.op, "reference"), run.case, tensors)


def check(actual: Tensor, expected: Tensor, limit: Limit) -> None:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    assert actual.dtype == expected.dtype
    actual, expected = actual.double(), expected.double()
    allowed = limit.relative * expected.abs() + limit.absolute * expected.abs().max()
    excess = ((actual - expected).abs() - allowed).max().item()
    assert excess <= 0, f"over {limit} by {excess:.3g}"  # a NaN fails


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN in deterministic mode, so that a hole in a result shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", registry.OPS)
def test_backends_agree_on_the_signature(name: str) -> None:
    row = registry.OPS[name]
    expected = inspect.signature(registry.function(name, "reference")).parameters
    for backend in (name for name in ("torch", "triton", "onnx") if getattr(row, name)):
        actual = inspect.signature(registry.function(name, backend)).parameters
        assert list(actual.items()) == list(expected.items()), backend


@pytest.mark.parametrize("run", _runs())
def test_matches_reference(run: Run) -> None:
    function = op(run)
    tensors, before = (run.case.draw(run.dtype, DEVICE) for _ in range(2))
    with torch.no_grad():
        actual, expected = call(function, run.case, tensors), expected_of(run, tensors)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        check(a, b, run.case.limit or limits()[run.case.op][run.dtype])
    for a, b in zip(parts(tensors), parts(before), strict=True):
        assert torch.equal(a, b), "an input was written to"


@pytest.mark.parametrize("run", _runs())
def test_meta_tensors_give_shapes_and_dtypes(run: Run) -> None:
    function = op(run)
    meta = tuple(to(x, "meta") for x in run.case.draw(run.dtype))
    actual = call(function, run.case, meta)
    for a, b in zip(actual, expected_of(run, meta), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


GRADIENTS = [
    pytest.param(run.values[0].case, id=run.values[0].case.id)
    for run in _runs(("torch",))
    if run.values[0].dtype == torch.float32
    and "quantize" not in run.id  # which rounds
    and "int8" not in run.id
    and "one-key" not in run.id  # whose q and k have none
    and "one-token" not in run.id
]


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_match_reference(case: Case) -> None:
    gradients = []
    for backend in ("torch", "reference"):
        drawn = case.draw(torch.float32)
        leaves = [None if x is None else x.detach().requires_grad_() for x in drawn]
        if case.op == "attention" and len(leaves) > 3:
            leaves[3].requires_grad_(False)  # a bias is data
        if case.op == "rms_norm_rope":
            leaves[2].requires_grad_(False)
        result, *_ = call(registry.function(case.op, backend), case, leaves)
        weight = torch.linspace(-1, 1, result.numel()).view(result.shape)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        gradients.append(torch.autograd.grad((result * weight).sum(), wanted))
    for actual, expected in zip(*gradients, strict=True):
        check(actual, expected, Limit(0, 1e-5, "two ways through the same formula"))


def _takes_dtype(op: str) -> bool:
    signature = inspect.signature(registry.function(op, "reference"))
    return "dtype" in signature.parameters and signature.return_annotation is Tensor


DTYPE_RUNS = [
    run
    for run in _runs()
    if run.values[0].dtype in (torch.float32, torch.int8) and _takes_dtype(run.values[0].case.op)
]


@pytest.mark.parametrize("run", DTYPE_RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_dtype_asked_for(run: Run, dtype: torch.dtype) -> None:
    """One rounding, from fp32 to the dtype asked for: as by a cast afterwards."""
    function, tensors = op(run), run.case.draw(run.dtype, DEVICE)
    (exact,) = call(function, run.case, tensors, dtype=torch.float32)
    (rounded,) = call(function, run.case, tensors, dtype=dtype)
    if run.backend != "triton":
        assert torch.equal(rounded, exact.to(dtype))
        return
    assert rounded.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    reason = "half a unit; compiled for another dtype, a sum may have another order"
    check(rounded.float(), exact, Limit(half * 1.001, 1e-6, reason))


IN_PLACE = {"gated_residual": 0, "gelu": 0, "linear_gated_residual": 3}  # which input `out` may be

OUT_RUNS = [
    run
    for run in _runs(("torch", "triton", "reference")[:2])
    if run.values[0].case.op in IN_PLACE and run.values[0].dtype in (torch.float32, torch.int8)
]


@pytest.mark.parametrize("run", OUT_RUNS)
def test_out_may_be_the_input(run: Run) -> None:
    for function in (op(run), registry.function(run.case.op, "reference")):
        tensors = run.case.draw(run.dtype, DEVICE)
        out = tensors[IN_PLACE[run.case.op]]
        (expected,) = call(function, run.case, tensors)
        (result,) = call(function, run.case, tensors, out=out)
        assert result is out
        assert torch.equal(result, expected)


def test_rms_norm_rounds_before_its_weight() -> None:
    """In bf16 the normalised value is rounded, then multiplied by the fp32 weight in fp32."""
    x = torch.randn(3, 256).bfloat16()
    weight = torch.randn(256)
    wide = x.double()
    n = (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()).float().bfloat16()
    for backend in ("reference", "torch"):
        rms_norm = registry.function("rms_norm", backend)
        assert torch.equal(rms_norm(x, weight, EPS, torch.float32), n.float() * weight)


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
        check(actual.double(), expected, Limit(0, 1e-6, "fp32 against fp64"))
