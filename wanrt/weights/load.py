"""From a path to a module with its weights, one tensor at a time.

    load_component(path, "vae")      path: a file, a component's folder, or a whole model's folder

The module is built on the meta device from the shape that the header tells, checked name by name
and shape by shape, and only then filled.
"""

import math
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from wanrt.errors import FormatError
from wanrt.models.layers import choose
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.detect import Detected, shape_of, translate
from wanrt.weights.names import Kind, Source
from wanrt.weights.parts import find_component
from wanrt.weights.quantised import PlainReader, check_formats
from wanrt.weights.specs import Spec

_CLASSES: dict[Kind, tuple[str, str]] = {
    "dit": ("wanrt.models.dit", "WanDiT"),
    "vae": ("wanrt.models.vae", "WanVAE"),
    "umt5": ("wanrt.models.umt5", "Umt5Encoder"),
    "clip": ("wanrt.models.clip", "ClipVision"),
}
# CLIP's last block and what follows it are in the files but not in the module.
_UNUSED = re.compile(r"post_norm\.|transformer\.(\d+)\.")

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


def load_component(
    path: str | Path,
    kind: Kind,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    check: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """The module, in eval mode and without gradients, its tensors in `dtype` on `device`.

    Parameters that match the class's FP32_NAMES stay fp32. `check` refuses NaN and infinity.
    Raises FormatError. Peak: the model and 8 MiB; on a device, one tensor on the CPU.
    """
    found = find_component(Path(path), kind)
    module = skeleton(kind, found.spec, device, dtype)
    checkpoint = Checkpoint.open(found.path)
    sources = match(module, checkpoint, found)
    check_formats(checkpoint)
    fp32 = re.compile("|".join(module.FP32_NAMES) or r"(?!)")
    total = sum(
        checkpoint.tensors[n].num_bytes for source in sources.values() for n in source.stored
    )
    reader, done = PlainReader(checkpoint), 0
    for name, source in sources.items():
        wanted = torch.float32 if fp32.search(name) else dtype
        tensor = _read(reader, source, shape_of(source, checkpoint.tensors), wanted)
        if check:
            _check_finite(checkpoint, source, tensor)
        _assign(module, name, _place(tensor, kind, torch.device(device)))
        done += sum(checkpoint.tensors[n].num_bytes for n in source.stored)
        if progress:
            progress(done, total)
    return module.eval().requires_grad_(False)


def skeleton(
    kind: Kind,
    spec: Spec,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The empty module of a spec, on the meta device: names and shapes, no bytes.

    Its ops are those for the device and dtype that it will be filled for.
    """
    home, name = _CLASSES[kind]
    module = getattr(import_module(home), name)
    with torch.device("meta"):
        if not hasattr(module, "OPS"):
            return module(spec)
        return module(spec, choose(module.OPS, torch.device(device), dtype))


def latent_statistics(z_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel that the VAE class assumes; Diffusers keeps them in its config."""
    return import_module("wanrt.models.vae").LATENT_STATISTICS[z_dim]


def match(module: nn.Module, checkpoint: Checkpoint, found: Detected) -> dict[str, Source]:
    """Where each tensor of the module lies, in stored order; exactly these names and shapes."""
    sources, unknown = translate(checkpoint, found.component)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in sources]
    extra = unknown + [n for n in sources if n not in expected and not _is_unused(n, found)]
    if missing:
        raise FormatError(
            found.path, f"{found.title} lacks {_some(missing)}", "the file is incomplete"
        )
    if extra:
        raise FormatError(
            found.path, f"{found.title} has no place for {_some(extra)}", "another variant?"
        )
    used = {name: source for name, source in sources.items() if name in expected}
    for name, source in used.items():
        shape = shape_of(source, checkpoint.tensors)
        if shape != expected[name]:
            reason = f"{name} is {list(shape)}; in {found.title} it is {list(expected[name])}"
            raise FormatError(found.path, reason)
    return used


def read_spiece(path: str | Path) -> bytes | None:
    """The SentencePiece model that ComfyUI keeps in its text-encoder files, as one uint8 tensor."""
    checkpoint = Checkpoint.open(path)
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[2] == "spiece_model" and info.dtype == torch.uint8:
            return checkpoint.read(name).numpy().tobytes()
    return None


def _read(
    reader: PlainReader, source: Source, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    if len(source.stored) == 1:
        return reader.read(source.stored[0], dtype).view(shape)
    fused, row = torch.empty(shape, dtype=dtype), 0
    for name in source.stored:
        part = reader.read(name, dtype)
        fused[row : row + len(part)] = part
        row += len(part)
    return fused


def _check_finite(checkpoint: Checkpoint, source: Source, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN wins both; unlike isfinite, this allocates nothing
    if not (math.isfinite(low) and math.isfinite(high)):
        fix = "the file is broken; get it again"
        if tensor.dtype == torch.float16:
            fix += ", or its numbers are too large for float16"
        raise FormatError(checkpoint.path, f"{source.stored[0]} holds NaN or infinity", fix)


def _place(tensor: Tensor, kind: Kind, device: torch.device) -> Tensor:
    """On the device, where the VAE's kernels read weights channels last: so they lie, for good."""
    tensor = tensor.to(device)
    if kind != "vae" or device.type == "cpu" or tensor.ndim < 4:
        return tensor
    last = torch.channels_last_3d if tensor.ndim == 5 else torch.channels_last
    return tensor.contiguous(memory_format=last)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _is_unused(name: str, found: Detected) -> bool:
    if found.kind != "clip" or not (hit := _UNUSED.match(name)):
        return False
    return hit[1] is None or int(hit[1]) == found.spec.num_layers - 1


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
