"""Between plain numbers and fp8 or int8 weights with the scales that lie beside them.

`X.weight` times `X.scale_weight` (ComfyUI fp8_scaled) or `X.weight_scale` (newer ComfyUI,
LightX2V), one number for the matrix or one per output row. Without a scale, fp8 stands for itself.
What `wanrt quantize` writes is the same per row, and says in its metadata which are rotated.
A VAE's convolutions that it writes have `X.input_step` and `X.input_zero` too, of their static
input: `X.weight` times its scale is the plain weight times the step of its input channel.
Blocks of GGUF files hold their own scales (`wanrt/quant/gguf_blocks.py`).
Source: ComfyUI `QUANTIZATION.md`, `comfy/ops.py`; LightX2V @f8aee98 `tools/convert`.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from wanrt.errors import FormatError
from wanrt.kernels.reference import Quantized, rotate
from wanrt.quant.formats import FORMATS, INT8_STATIC, LinearFormat
from wanrt.quant.gguf_blocks import unpack_into
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.writer import Piece

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("scale_weight", "weight_scale")
METADATA = "wanrt_formats"  # of our own files: {name of a product: name of its format}
SCALE, INPUT_STEP, INPUT_ZERO = "weight_scale", "input_step", "input_zero"
_READABLE = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "int8_tensorwise",
    "int8_rowwise",
)
_REMEDY = "use the fp16, bf16 or fp8_scaled file"
_PIECE = 2**20  # elements converted at a time: 4 MiB of fp32


class PlainReader:
    """Reads tensors in a wanted dtype, dequantised where they are quantised.

    What must change is read in pieces through two buffers that live as long as the reader: with
    fresh memory for each piece, the heap between the model's tensors would fill with holes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._rotated = checkpoint, _rotated(checkpoint)
        self._static = {f"{name}.weight" for name in static_convs(checkpoint)}
        self._stored = torch.from_numpy(np.empty(_PIECE * 4, np.uint8))
        self._product = torch.from_numpy(np.empty(_PIECE, np.float32))

    def read(
        self,
        name: str,
        dtype: torch.dtype,
        rows: range | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The tensor, or these rows of it (step 1), in `dtype`. Peak: the result.

        out: contiguous memory of `dtype` and of as many numbers, for the result. A product with a
        scale is made in fp32.
        """
        info = self._checkpoint.tensors[name]
        scale = _scale(self._checkpoint, name) if info.packing is None else None
        smoothed = input_step(self._checkpoint, name) if name in self._static else None
        if info.packing is None and ((scale is None and info.dtype == dtype) or not info.shape):
            buffer = None if out is None or info.dtype != dtype else out.view(-1).view(torch.uint8)
            return self._checkpoint.read(name, rows, buffer).to(dtype)
        wanted = range(info.shape[0]) if rows is None else rows
        shape = (len(wanted), *info.shape[1:])
        plain = torch.empty(shape, dtype=dtype) if out is None else out.view(shape)
        step = max(1, _PIECE * info.shape[0] // max(1, info.numel))
        for start in range(wanted.start, wanted.stop, step):
            part = range(start, min(start + step, wanted.stop))
            piece = self._checkpoint.read(name, part, self._stored)
            target = plain[start - wanted.start : part.stop - wanted.start]
            if info.packing is not None:
                unpack_into(target, piece, info.packing)
                continue
            if scale is not None:
                piece = self._times(piece, scale if len(scale) == 1 else scale[start : part.stop])
            if smoothed is not None:
                piece.div_(smoothed[:, None, None, None])
            target.copy_(rotate(piece) if name in self._rotated else piece)
        return plain

    def stored_form(self, name: str, form: LinearFormat) -> LinearFormat:
        """`form`, rotated or not as the file has it where the file has its dtype."""
        if self._checkpoint.tensors[name].dtype != form.dtype:
            return form
        return replace(form, rotated=name in self._rotated)

    def read_quantised(self, name: str, dtype: torch.dtype) -> Quantized | None:
        """A matrix [O, I] as it is stored, one scale per row; None where it has another dtype."""
        info = self._checkpoint.tensors[name]
        if info.dtype != dtype:
            return None
        scale = _scale(self._checkpoint, name)
        rows = torch.ones(1, 1) if scale is None else scale
        return Quantized(self._checkpoint.read(name), rows.expand(info.shape[0], 1).contiguous())

    def _times(self, piece: Tensor, scale: Tensor) -> Tensor:
        """fp32; bytes are fp8, as some files declare them."""
        if piece.dtype == torch.uint8:
            piece = piece.view(FP8[0])
        if piece.numel() > self._product.numel():  # one row larger than the buffer
            return piece.float().mul_(scale)
        product = self._product[: piece.numel()].view(piece.shape)
        return product.copy_(piece).mul_(scale)


def scale_of(name: str) -> str:
    """Of a module's eight-bit weight; our own files call it so, too."""
    return name + "_scale"


def scale_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The stored scale of a weight, if it has one."""
    stem = name.removesuffix(".weight")
    return next((f"{stem}.{s}" for s in SCALES if f"{stem}.{s}" in checkpoint.tensors), None)


def _rotated(checkpoint: Checkpoint) -> frozenset[str]:
    """Weights of our own files whose columns met a Hadamard matrix, 128 at a time."""
    formats = _own_formats(checkpoint)
    return frozenset(f"{name}.weight" for name, form in formats.items() if form and form.rotated)


def static_convs(checkpoint: Checkpoint) -> list[str]:
    """Convolutions of a VAE that `wanrt quantize` wrote, with static int8 formats."""
    return [name for name, form in _own_formats(checkpoint).items() if form is None]


def input_step(checkpoint: Checkpoint, name: str) -> Tensor:
    """Of the input channels of such a convolution's weight, fp32 [C]. Raises FormatError."""
    stored = f"{name.removesuffix('.weight')}.{INPUT_STEP}"
    if len(checkpoint.tensors[name].shape) != 5:
        raise FormatError(checkpoint.path, f"{name} is no convolution over time")
    found, channels = checkpoint.tensors.get(stored), checkpoint.tensors[name].shape[1]
    if found is None or found.shape != (channels,) or found.dtype != torch.float32:
        raise FormatError(checkpoint.path, f"{stored} is not fp32 [{channels}]", "write it again")
    step = checkpoint.read(stored)
    if not bool((step.isfinite() & (step > 0)).all()):
        raise FormatError(checkpoint.path, f"{stored} holds what is no step", "write it again")
    return step


def _own_formats(checkpoint: Checkpoint) -> dict[str, LinearFormat | None]:
    """Of each product of a file that `wanrt quantize` wrote, by its name; None: INT8_STATIC."""
    text = checkpoint.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        named = json.loads(text).items()
        return {name: None if form == INT8_STATIC else FORMATS[form] for name, form in named}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        fix = "it was written by a newer wanrt, or is broken"
        raise FormatError(
            checkpoint.path, f"{METADATA} names a format unknown to wanrt", fix
        ) from None


def check_formats(checkpoint: Checkpoint) -> None:
    """Refuse quantisations that a scale alone does not undo (nvfp4, blocks, rotated int8)."""
    for name in checkpoint.tensors:
        leaf = name.rpartition(".")[2]
        if leaf in ("weight_scale_2", "pre_quant_scale"):
            raise FormatError(
                checkpoint.path, f"{name} belongs to a format wanrt does not read", _REMEDY
            )
        if leaf == "comfy_quant":
            _check_layer(checkpoint, name, bytes(checkpoint.read(name).tolist()))
    layers = checkpoint.metadata.get("_quantization_metadata")
    if layers is not None:
        _check_layer(checkpoint, "_quantization_metadata", layers.encode())


def _check_layer(checkpoint: Checkpoint, name: str, text: bytes) -> None:
    """text: {"format": ...} of one layer, or {"layers": {name: {"format": ...}}} of all."""
    try:
        content = json.loads(text)
        layers = content.get("layers", {"": content}).values()
        found = {(layer["format"], bool(layer.get("convrot"))) for layer in layers}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FormatError(checkpoint.path, f"{name} does not tell its format") from None
    for layer_format, rotated in found:
        if layer_format not in _READABLE or rotated:
            label = f"{layer_format}{' (rotated)' if rotated else ''}"
            raise FormatError(
                checkpoint.path, f"is quantised as {label}, unknown to wanrt", _REMEDY
            )


def _scale(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """fp32 `[1, 1, ...]` or `[out, 1, ...]`; None where the weight stands for itself."""
    info, stored = checkpoint.tensors[name], scale_name(checkpoint, name)
    if stored is None:
        if not info.dtype.is_floating_point:
            raise FormatError(checkpoint.path, f"{name} is {info.dtype} and has no scale", _REMEDY)
        return None
    scale = checkpoint.tensors[stored]
    if scale.numel not in (1, *info.shape[:1]) or not scale.dtype.is_floating_point:
        reason = f"{stored} is {list(scale.shape)} for a weight {list(info.shape)}"
        raise FormatError(checkpoint.path, reason, _REMEDY)
    return checkpoint.read(stored).float().reshape(-1, *[1] * (len(info.shape) - 1))


def quantise(piece: Piece, *, scaled: bool) -> Iterator[Piece]:
    """A matrix to be written as fp8: cast, or divided by amax / 448 with that scale beside it.

    The inverse of PlainReader. The scale is known once the weight is made, so it comes second.
    """
    scales: list[Tensor] = []

    def make_weight() -> Tensor:
        values = piece.make().float()
        if not scaled:
            return values.to(FP8[0])
        scales.append(values.abs().amax().clamp(min=1e-12) / torch.finfo(FP8[0]).max)
        return (values / scales[-1]).to(FP8[0])

    yield piece._replace(dtype=FP8[0], make=make_weight)
    if scaled:
        name = piece.name.removesuffix(".weight") + ".scale_weight"
        yield Piece(name, torch.float32, (), lambda: scales.pop())
