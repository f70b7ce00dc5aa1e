"""The op table: one row per op, and the choice of a backend for each, made once, with reasons.

    reference   the specification, fp32 inside, as plain as it can be
    torch       PyTorch's own kernels: the CPU's fast path, and the fallback on every GPU
    triton      ours, for NVIDIA GPUs; in Triton's interpreter also for tests on a CPU
    onnx        as standard ops of ONNX; what models have while they are exported, never chosen

An op is a function of one name and signature in every backend that has it. The eight-bit ones have
no `onnx`: graphs are quantised after they are made.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from wanrt.kernels.launch import INTERPRETING
from wanrt.kernels.target import Target, UnsupportedOp, lacks_fp8

VAE = "reference_vae"  # where the VAE's ops are specified
MARK = "reference_watermark"
BACKENDS = ("triton", "torch", "reference")  # the order of preference
MIN_ARCH = 80  # the oldest cards that multiply bf16


class Op(NamedTuple):
    """Where an op lives: modules of `wanrt.kernels`."""

    name: str
    torch: str
    triton: str | None = None
    reference: str = "reference"
    onnx: str | None = None


OPS = {
    op.name: op
    for op in (
        Op("layer_norm", "torch_ops", "norm", onnx="onnx_ops"),
        Op("layer_norm_modulate", "torch_ops", "norm", onnx="onnx_ops"),
        Op("layer_norm_modulate_quantize", "torch_quantize", "norm"),
        Op("gated_residual", "torch_ops", "norm", onnx="onnx_ops"),
        Op("rms_norm", "torch_ops", "norm", onnx="onnx_ops"),
        Op("rms_norm_rope", "torch_ops", "norm", onnx="onnx_ops"),
        Op("gelu", "torch_ops", onnx="onnx_ops"),
        Op("attention", "torch_ops", "attention", onnx="onnx_ops"),
        Op("attention_int8", "torch_attention", "attention_int8"),
        Op("attention_int8_fp8", "torch_attention", "attention_int8"),
        Op("quantize", "torch_quantize", "quantize"),
        Op("quantize_weight", "torch_quantize"),
        Op("dequantize", "torch_quantize"),
        Op("linear_quantized", "torch_linear", "linear"),
        Op("linear_quantized_out", "torch_linear", "linear"),
        Op("linear_gated_residual", "torch_linear", "linear"),
        Op("rms_norm_channels", "torch_conv", "channel_norm", VAE, "onnx_conv"),
        Op("channel_norm_silu", "torch_conv", "channel_norm", VAE, "onnx_conv"),
        Op("causal_conv3d", "torch_conv", "conv", VAE, "onnx_conv"),
        Op("quantize_conv_weight", "torch_conv_int8", None, VAE),
        Op("channel_norm_silu_quantize", "torch_conv_int8", "channel_norm", VAE),
        Op("causal_conv3d_int8", "torch_conv_int8", "conv_int8", VAE),
        Op("upsample_conv2d", "torch_conv", "conv", VAE, "onnx_conv"),
        Op("downsample_conv2d", "torch_conv", "conv", VAE, "onnx_conv"),
        Op("frame_attention", "torch_conv", None, VAE, "onnx_conv"),
        Op("mark_frame", "torch_watermark", "watermark", MARK),
    )
}


class Choice(NamedTuple):
    """The function that an op became, and why no backend before it was taken."""

    op: str
    backend: str
    function: Callable[..., Any]
    declined: dict[str, str]


def here(
    dtype: torch.dtype = torch.bfloat16, device: str = "auto", result: torch.dtype | None = None
) -> Target:
    """The target that this machine is: its first GPU, or its CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda":
        return Target(device, 0, dtype, result)
    major, minor = torch.cuda.get_device_capability()
    return Target(device, 10 * major + minor, dtype, result)


def reason_against(op: str, backend: str, target: Target) -> str | None:
    """Why a backend cannot do an op there; None where it can."""
    row = OPS[op]
    if backend == "reference":
        return None
    if backend == "torch":
        return None if row.torch else "not written"
    if backend == "onnx":
        return None if row.onnx else "not written"
    if row.triton is None:
        return "not written; PyTorch does it"
    lacking = _triton_lacks(target)
    if lacking is not None:
        return lacking
    return _module(row.triton).supports(op, target)


def resolve(op: str, target: Target, backend: str = "auto") -> Choice:
    """The best backend that can, or the one named. Raises UnsupportedOp with every reason."""
    declined: dict[str, str] = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = reason_against(op, name, target)
        if reason is None and backend == "auto" and name == "triton" and target.device == "cpu":
            reason = "its interpreter is for tests"
        if reason is None:
            return Choice(op, name, function(op, name), declined)
        declined[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
    raise UnsupportedOp(f"{op} cannot run on {target.device} in {target.dtype} ({reasons})")


def function(op: str, backend: str) -> Callable[..., Any]:
    """One backend's function, whether or not it can run here."""
    row = OPS[op]
    home = getattr(row, backend)
    assert home is not None, f"{op=} {backend=}"
    return getattr(_module(home), op)


def _triton_lacks(target: Target) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if target.device == "cuda":
        if torch.float8_e4m3fn in (target.dtype, target.result):
            return lacks_fp8(target)
        if target.arch >= MIN_ARCH:
            return None
        return f"needs compute capability {MIN_ARCH / 10}, not {target.arch / 10}"
    if target.device == "cpu" and INTERPRETING:
        return None
    return f"needs an NVIDIA GPU; on {target.device} only its interpreter runs (TRITON_INTERPRET=1)"


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"wanrt.kernels.{name}")
