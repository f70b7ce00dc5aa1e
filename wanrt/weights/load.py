"""From a path to a module with its weights, one tensor at a time.

    load_component(path, "vae")      path: a file, a component's folder, or a whole model's folder

The module is built on the meta device from the shape that the header tells, checked name by name
and shape by shape, and only then filled.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor, nn

from wanrt.errors import FormatError
from wanrt.kernels.reference import Quantized
from wanrt.kernels.torch_quantize import quantize_weight
from wanrt.memory.offload import WeightStream, assign
from wanrt.memory.placement import Placement
from wanrt.models.eight_bit import make_eight_bit, policy_formats
from wanrt.models.layers import choose
from wanrt.quant.formats import LinearFormat
from wanrt.quant.policy import EightBit
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.detect import Detected, shape_of, translate
from wanrt.weights.names import Kind, Source
from wanrt.weights.parts import find_component
from wanrt.weights.quantised import PlainReader, check_formats, scale_of
from wanrt.weights.specs import Spec

_CLASSES: dict[Kind, tuple[str, str]] = {
    "dit": ("wanrt.models.dit", "WanDiT"),
    "vae": ("wanrt.models.vae", "WanVAE"),
    "umt5": ("wanrt.models.umt5", "Umt5Encoder"),
    "clip": ("wanrt.models.clip", "ClipVision"),
}
# CLIP's last block and what follows it are in the files but not in the module.
_UNUSED = re.compile(r"post_norm\.|transformer\.(\d+)\.")

_LARGE_TABLE = 64 << 20  # bytes
CPU = torch.device("cpu")

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


def load_component(
    path: str | Path,
    kind: Kind,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    check: bool = True,
    progress: Progress | None = None,
    placement: Placement | None = None,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    eight_bit: EightBit | None = None,
) -> nn.Module:
    """The module, in eval mode and without gradients, its tensors in `dtype` on `device`.

    Parameters that match the class's FP32_NAMES stay fp32. `check` refuses NaN and infinity.
    `eight_bit`: a transformer's products and attention become int8 or fp8, as `quant/policy.py`
    has it; weights that are stored in that very format are taken as they are.
    With a `placement`, blocks that do not stay on the device stream (the VAE has none), and large
    token tables stay in their file; its `weight_stream` is then their WeightStream. `changes` by
    name: a weight is read in fp32, changed on the device and rounded once; with a placement that
    streams there are none. Raises FormatError.
    Peak: the model and 8 MiB; on a device, one tensor on the CPU.
    """
    device = torch.device(device)
    found = find_component(Path(path), kind)
    module = skeleton(kind, found.spec, device, dtype)
    weights = Weights(module, found, dtype, check)
    if eight_bit is not None:
        assert kind == "dit" and not changes, f"{kind=} {eight_bit=}"
        weights.formats = {
            name: weights.stored_form(name, form)
            for name, form in policy_formats(module, eight_bit).items()
        }
        make_eight_bit(module, weights.formats, eight_bit, device, dtype)
    stream = None
    if placement is not None and placement.slots:
        stream = WeightStream(
            module, module.visits(), placement, device, weights.dtype_of, weights.read
        )
        assert not changes, f"{placement=}"
    done = 0
    for name in weights.names():
        if placement is not None and weights.is_large_table(name):
            _replace_table(module, name, weights, device)
        elif stream is None or stream.waits_in_memory(name) or not stream.streams(name):
            if changes and name in changes:
                tensor = weights.read_changed(name, changes[name], device)
            else:
                tensor = weights.read(name, device)
            if stream is not None and stream.streams(name):
                stream.hold(name, tensor)
            else:
                assign(module, name, _place(tensor, kind, device))
        done += weights.num_bytes(name)
        if progress:
            progress(done, weights.total)
    if stream is not None:
        stream.attach()
        module.weight_stream = stream
    return module.eval().requires_grad_(False)


class Weights:
    """The weights of one component as its module wants them, read one at a time."""

    def __init__(self, module: nn.Module, found: Detected, dtype: torch.dtype, check: bool) -> None:
        """`check`: each weight is looked at once, when it is first read."""
        self.checkpoint = Checkpoint.open(found.path)
        self.sources = match(module, self.checkpoint, found)
        check_formats(self.checkpoint)
        self.total = sum(self.num_bytes(name) for name in self.sources)
        self._fp32 = re.compile("|".join(module.FP32_NAMES) or r"(?!)")
        self._dtype, self._reader = dtype, PlainReader(self.checkpoint)
        self._unchecked = set(self.sources) if check else set()
        self._lock = Lock()  # a stream reads in its own thread
        self.formats: dict[str, LinearFormat] = {}  # of weights that the module has in eight bits
        self._scales: dict[str, Tensor] = {}  # of those read so far: a number per channel

    def names(self) -> Iterator[str]:
        """Of every tensor of the module; a scale follows its weight."""
        for name in self.sources:
            yield name
            if name in self.formats:
                yield scale_of(name)

    def num_bytes(self, name: str) -> int:
        """As stored."""
        source = self.sources.get(name)
        return sum(self.checkpoint.tensors[n].num_bytes for n in source.stored) if source else 0

    def dtype_of(self, name: str) -> torch.dtype:
        if name in self.formats:
            return self.formats[name].dtype
        kept = name not in self.sources or self._fp32.search(name)
        return torch.float32 if kept else self._dtype

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """A tensor of the module. Eight-bit weights are made on `device`, others read to the CPU.

        A scale is known once its weight was read.
        """
        if name not in self.sources:
            return self._scales[name]
        if name not in self.formats:
            return self._read(name, self.dtype_of(name))
        values, self._scales[scale_of(name)] = self._quantized(name, self.formats[name], device)
        return values

    def stored_form(self, name: str, form: LinearFormat) -> LinearFormat:
        """A weight that is stored in eight bits stays as it is."""
        (stored,) = self.sources[name].stored
        return self._reader.stored_form(stored, form)

    def _quantized(self, name: str, form: LinearFormat, device: torch.device) -> Quantized:
        """As it is stored, where that is the format; else made of the plain weight."""
        (stored,) = self.sources[name].stored
        with self._lock:
            found = self._reader.read_quantised(stored, form.dtype)
        if found is None:
            plain = self._read(name, torch.float32)
            found = quantize_weight(plain.to(device), form.dtype, form.rotated)
        elif name in self._unchecked:
            _check_finite(self.checkpoint, self.sources[name], found.scale)
        return found

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, whatever the module's and whatever the file's."""
        return self._read(name, dtype)

    def plain_dtype(self, name: str) -> torch.dtype:
        """As stored; bf16 where that is an eight-bit number with a scale."""
        stored = self.checkpoint.tensors[self.sources[name].stored[0]].dtype
        return stored if stored.is_floating_point and stored.itemsize > 1 else torch.bfloat16

    def read_changed(
        self, name: str, change: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        return change(self._read(name, torch.float32).to(device)).to(self.dtype_of(name))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        source = self.sources[name]
        shape = shape_of(source, self.checkpoint.tensors)
        with self._lock:
            tensor = _read(self._reader, source, shape, dtype)
        if name in self._unchecked:
            _check_finite(self.checkpoint, source, tensor)
            self._unchecked.remove(name)
        return tensor

    def is_large_table(self, name: str) -> bool:
        """A token table of which a prompt needs few rows."""
        return name == "token_embedding.weight" and self.num_bytes(name) > _LARGE_TABLE

    def rows(self, name: str, ids: list[int]) -> Tensor:
        """Some rows of a table, in this order."""
        stored = self.sources[name].stored[0]
        with self._lock:
            rows = [self._reader.read(stored, self.dtype_of(name), range(i, i + 1)) for i in ids]
        return torch.cat(rows)


class FileEmbedding(nn.Module):
    """An embedding whose table stays in its file; the rows of a prompt are read when asked for."""

    def __init__(self, rows: Callable[[list[int]], Tensor], device: torch.device) -> None:
        super().__init__()
        self._rows, self._device = rows, device

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, n] -> [B, n, D] on the device of the model."""
        distinct, place = ids.unique(return_inverse=True)
        return self._rows(distinct.tolist()).to(self._device)[place]


def _replace_table(module: nn.Module, name: str, weights: Weights, device: torch.device) -> None:
    owner = name.rpartition(".")[0]
    module.set_submodule(owner, FileEmbedding(partial(weights.rows, name), device))


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


def _is_unused(name: str, found: Detected) -> bool:
    if found.kind != "clip" or not (hit := _UNUSED.match(name)):
        return False
    return hit[1] is None or int(hit[1]) == found.spec.num_layers - 1


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
