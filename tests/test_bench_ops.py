"""The op bench: correctness before speed, and honesty where there is nothing to measure."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wanrt.bench import ops
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases

CASE = all_cases()["rms_norm-odd"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rms_norm-odd", torch.float32), ("linear_quantized_out-odd", torch.int8)],
)
def test_both_backends_are_timed_when_they_agree(name: str, dtype: torch.dtype) -> None:
    triton, torch_row = ops.measure(all_cases()[name], dtype, "cpu")
    assert torch_row.seconds > 0 and torch_row.speedup == 1 and torch_row.cosine > 0.999999
    assert torch_row.gbytes_per_s > 0 and torch_row.backend == "torch"
    if triton.seconds is None:
        assert triton.note.startswith("not measured: ")
    else:
        assert triton.speedup == torch_row.seconds / triton.seconds


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.function

    def wrong(op: str, backend: str) -> Callable[..., Tensor]:
        if backend == "torch":
            return right(op, "torch")
        return lambda x, *_, **__: torch.full_like(x, torch.nan)

    monkeypatch.setattr(ops.registry, "function", wrong)
    monkeypatch.setattr(ops.registry, "reason_against", lambda *_: None)
    triton, torch_row = ops.measure(CASE, torch.float32, "cpu")
    assert triton.seconds is None and triton.note.startswith("not timed: its result is far")
    assert torch_row.seconds > 0


def test_an_op_without_a_kernel_says_so() -> None:
    triton, torch_row = ops.measure(all_cases()["gelu-tanh"], torch.float32, "cpu")
    assert triton.seconds is None and triton.note == "not measured: not written; PyTorch does it"
    assert torch_row.seconds > 0
