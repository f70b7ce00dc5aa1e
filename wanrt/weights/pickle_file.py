"""The `.pth` container (a zip of a pickle and raw tensors), opened without ever running its code.

Only `torch.load(weights_only=True, mmap=True)` is used. The Wan releases keep the text encoder, the
VAE and CLIP in such files.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanrt.errors import FormatError
from wanrt.weights.safetensors_file import MAX_HEADER, MAX_TENSORS, TensorInfo

WRAPPERS = ("generator_ema", "state_dict", "model_state_dict", "model", "module", "generator")
_CONVERT = "convert it to safetensors, where you trust it"


class PickleFile:
    """One file: `tensors`, `metadata` (empty), `read`; it stays mapped while this object lives."""

    container = "pickle"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        _check_zip(path)
        self._state = _tensors(path, _unwrap(_load(path)))
        self.tensors = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape), path)
            for name, tensor in self._state.items()
        }

    def read(self, name: str, rows: range | None = None, buffer: Tensor | None = None) -> Tensor:
        """The tensor or some rows of it, as stored, in fresh memory or in `buffer` (uint8)."""
        tensor = self._state[name]
        if rows is not None:
            tensor = tensor[rows.start : rows.stop]
        if buffer is None or buffer.numel() < tensor.nbytes:
            return tensor.clone(memory_format=torch.contiguous_format)
        return buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _check_zip(path: Path) -> None:
    """Refuse what torch.load would answer with its older, slower or riskier readers."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        reason = "not a zip-based .pth (legacy tar, bare pickle, or no checkpoint at all)"
        raise FormatError(path, reason, "save it again with a recent torch, or as safetensors")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        reason = f"truncated or broken: {error}"
        raise FormatError(path, reason, "download or copy the file again") from None
    if len(members) > MAX_TENSORS:
        raise FormatError(path, f"holds {len(members)} members", f"the limit is {MAX_TENSORS}")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise FormatError(path, f"{member.filename[:80]} is compressed", _CONVERT)
        if member.filename.endswith(".pkl") and member.file_size > MAX_HEADER:
            reason = f"its pickle is {member.file_size} bytes long; the limit is {MAX_HEADER}"
            raise FormatError(path, reason, _CONVERT)


def _load(path: Path) -> Any:
    try:
        return torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        reason = f"it holds code or objects besides tensors{what}; nothing of it was run"
        raise FormatError(path, reason, _CONVERT) from None
    except Exception as error:
        # NOTE: on a damaged pickle torch raises nearly any type; all of them mean the same here.
        detail = (str(error).splitlines() or [type(error).__name__])[0][:120]
        reason = f"not readable as a checkpoint: {detail}"
        raise FormatError(path, reason, "download or copy the file again") from error


def _unwrap(value: Any) -> Any:
    """The state dict inside training checkpoints such as {"generator_ema": {...}, "step": 5}."""
    while isinstance(value, dict) and not any(isinstance(v, Tensor) for v in value.values()):
        inner = next((value[key] for key in WRAPPERS if isinstance(value.get(key), dict)), None)
        if inner is None:
            return value
        value = inner
    return value


def _tensors(path: Path, state: Any) -> dict[str, Tensor]:
    """The plain tensors of a state dict; numbers and strings beside them are dropped."""
    if not isinstance(state, dict):
        raise FormatError(path, f"holds a {type(state).__name__}, not a state dict")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FormatError(path, "holds no tensors", f"top-level keys: {list(state)[:5]}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise FormatError(path, f"{name} is no plain tensor", _CONVERT)
        if tensor.numel() * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
            raise FormatError(path, f"{name} claims shape {list(tensor.shape)}, beyond its bytes")
    return tensors
