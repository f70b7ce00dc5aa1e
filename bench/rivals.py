"""What users have today for an op, measured beside ours: PyTorch's fused kernels, sageattention."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanrt.kernels.cases import Case
from wanrt.kernels.reference import Quantized, dequantize, rotate

Run = Callable[[], Tensor]


def rivals(case: Case, tensors: tuple[Any, ...], device: str) -> dict[str, Run]:
    """Functions without arguments that compute what a case computes, by name; none on a CPU."""
    if device != "cuda":
        return {}
    if case.op.startswith("attention") and len(tensors) == 3:
        return _attention(*tensors)
    if case.op.startswith("linear_quantized"):
        return {"bf16": _bf16_linear(*tensors, activation=case.kwargs.get("activation"))}
    return {}


def comparable(case: Case, result: Tensor) -> Tensor:
    """A rival's result as ours is: rotated where the case rotates, which no rival need do."""
    return rotate(result) if case.kwargs.get("hadamard") else result


def absent() -> dict[str, str]:
    """Peers that are not installed, and what installs them."""
    names = ("sageattention", "fastvae", "diffusers")
    return {n: "absent (make peers)" for n in names if importlib.util.find_spec(n) is None}


def _attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    runs: dict[str, Run] = {
        "flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION, q, k, v),
        "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION, q, k, v),
    }
    if "sageattention" not in absent():
        runs["sageattention"] = partial(_sage, q, k, v)
    return runs


def _bf16_linear(
    x: Quantized, weight: Quantized, bias: Tensor | None, activation: str | None
) -> Run:
    """The same linear on bf16 tensors, GELU in cuBLASLt's epilogue; they are made beforehand."""
    rows, columns = (dequantize(t).to(torch.bfloat16) for t in (x, weight))
    rows = rows.flatten(0, -2)
    if activation is None or bias is None:
        return lambda: F.linear(rows, columns, None if bias is None else bias.to(rows.dtype))
    narrow = bias.to(rows.dtype)
    return lambda: torch._addmm_activation(narrow, rows, columns.T, use_gelu=True)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND", is_causal=False)
