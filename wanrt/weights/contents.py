"""The weights of one component as its module wants them, read one at a time, each checked once."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from threading import Lock

import torch
from torch import Tensor, nn

from wanrt.errors import FormatError
from wanrt.kernels.reference import Quantized
from wanrt.kernels.torch_quantize import quantize_weight
from wanrt.models.packed import packed
from wanrt.quant.formats import LinearFormat
from wanrt.quant.gguf_blocks import BlockFormat, unpack
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.detect import Detected, shape_of, translate
from wanrt.weights.names import Source
from wanrt.weights.quantised import PlainReader, check_formats, scale_of

CPU = torch.device("cpu")
TOKEN_TABLE = "token_embedding.weight"
LARGE_TABLE = 64 << 20  # bytes
_QUANTISED_AT_ONCE = 1 << 20  # numbers
# CLIP's last block and what follows it are in the files but not in the module.
_UNUSED = re.compile(r"post_norm\.|transformer\.(\d+)\.")


class Weights:
    """The weights of one component as its module wants them, read one at a time."""

    def __init__(self, module: nn.Module, found: Detected, dtype: torch.dtype, check: bool) -> None:
        """`check`: each weight is looked at once, when it is first read."""
        self.checkpoint = found.open()
        self.sources = match(module, self.checkpoint, found)
        check_formats(self.checkpoint)
        self.total = sum(self.num_bytes(name) for name in self.sources)
        self._fp32 = re.compile("|".join(module.FP32_NAMES) or r"(?!)")
        self._dtype, self._reader = dtype, PlainReader(self.checkpoint)
        self._packed: dict[str, BlockFormat] = {}
        self._unchecked = set(self.sources) if check else set()
        self.checks = check
        self._lock = Lock()  # a stream reads in its own thread
        self.formats: dict[str, LinearFormat] = {}  # of weights that the module has in eight bits
        self._scales: dict[str, Tensor] = {}  # of those read so far: a number per channel

    def names(self) -> Iterator[str]:
        """Of every tensor of the module; a scale follows its weight."""
        for name in self.sources:
            yield name
            if name in self.formats:
                yield scale_of(name)

    def leave_out(self, names: Collection[str]) -> None:
        """Somebody else gives the module what these stand for."""
        for name in names:
            self.total -= self.num_bytes(name)
            del self.sources[name]

    def num_bytes(self, name: str) -> int:
        """As stored."""
        source = self.sources.get(name)
        return sum(self.checkpoint.tensors[n].num_bytes for n in source.stored) if source else 0

    def keep_packed(self, module: nn.Module, plain: Collection[str], tables: bool) -> None:
        """From now on matrices come as they are stored, into layers that take them so.

        plain: weights that shall not. `tables` false: nor shall large token tables.
        """
        for name, source in self.sources.items():
            owner, _, leaf = name.rpartition(".")
            form = self.checkpoint.tensors[source.stored[0]].packing
            if form is None or leaf != "weight" or name in plain or len(source.stored) > 1:
                continue
            twin = packed(module.get_submodule(owner), form, self.plain_dtype(name))
            if twin is not None and (tables or not self.is_large_table(name)):
                module.set_submodule(owner, twin)
                self._packed[name] = form

    def stays_packed(self, name: str) -> bool:
        return name in self._packed

    def dtype_of(self, name: str) -> torch.dtype:
        if name in self.formats:
            return self.formats[name].dtype
        if name in self._packed:
            return torch.uint8
        return self.plain_dtype(name) if name in self.sources else torch.float32

    def plain_dtype(self, name: str) -> torch.dtype:
        """That of the product, or of a number that is no matrix."""
        return torch.float32 if self._fp32.search(name) else self._dtype

    def stored_dtype(self, name: str) -> torch.dtype:
        """As stored; bf16 where that is an eight-bit number or a block."""
        stored = self.checkpoint.tensors[self.sources[name].stored[0]].dtype
        return stored if stored.is_floating_point and stored.itemsize > 1 else torch.bfloat16

    def read(self, name: str, device: torch.device = CPU, out: Tensor | None = None) -> Tensor:
        """A tensor of the module. Eight-bit weights are made on `device`, others read to the CPU.

        A scale is known once its weight was read. See `read_into` for `out`.
        """
        if name not in self.sources:
            return self._scales[name]
        if name in self._packed:
            return self._read_packed(name)
        if name not in self.formats:
            return self.plain(name, self.plain_dtype(name), out)
        form = self.formats[name]
        made = self._quantized(name, form, device, out)
        self._scales[scale_of(name)] = made.scale
        return made.values

    def read_into(self, out: Tensor, name: str, device: torch.device = CPU) -> None:
        """A tensor of the module into memory of the CPU, with no copy of it beside where that can
        be: large ones that are not packed, and those that are stored in eight bits."""
        found = self.read(name, device, out)
        if found.data_ptr() != out.data_ptr():
            out.copy_(found)

    def stored_form(self, name: str, form: LinearFormat) -> LinearFormat:
        """A weight that is stored in eight bits stays as it is."""
        (stored,) = self.sources[name].stored
        return self._reader.stored_form(stored, form)

    def _quantized(
        self, name: str, form: LinearFormat, device: torch.device, out: Tensor | None
    ) -> Quantized:
        """As it is stored, where that is the format; else made of the plain weight."""
        (stored,) = self.sources[name].stored
        with self._lock:
            found = self._reader.read_quantised(stored, form.dtype)
        if found is None:
            found = self.quantized(name, form, device, out)
        elif name in self._unchecked:
            for numbers in (found.scale, found.values.bfloat16()):  # fp8 has a NaN of its own
                _check_finite(self.checkpoint, self.sources[name], numbers)
            self._unchecked.remove(name)
        return found

    def quantized(
        self,
        name: str,
        form: LinearFormat,
        device: torch.device = CPU,
        out: Tensor | None = None,
    ) -> Quantized:
        """Made on `device` of the plain weight, some rows at a time, each with its own scale.

        out: memory for the values. Peak: the result, and 16 bytes for each number of these rows:
        16 MiB.
        """
        (stored,) = self.sources[name].stored
        num, columns = self.checkpoint.tensors[stored].shape
        values = out
        if values is None:
            values = torch.empty(num, columns, dtype=form.dtype, device=device)
        scale, step = torch.empty(num, 1, device=device), max(1, _QUANTISED_AT_ONCE // columns)
        for begin in range(0, num, step):
            rows = range(begin, min(begin + step, num))
            with self._lock:
                plain = self._reader.read(stored, torch.float32, rows)
            if name in self._unchecked:
                _check_finite(self.checkpoint, self.sources[name], plain)
            made = quantize_weight(plain.to(device), form.dtype, form.rotated)
            values[begin : rows.stop], scale[begin : rows.stop] = made.values, made.scale
        self._unchecked.discard(name)
        return Quantized(values, scale)

    def _read_packed(self, name: str) -> Tensor:
        source = self.sources[name]
        tensor = self.checkpoint.read(source.stored[0])
        if name in self._unchecked:
            plain = unpack(tensor, self._packed[name], self.plain_dtype(name))
            _check_finite(self.checkpoint, source, plain)
            self._unchecked.remove(name)
        return tensor

    def read_changed(
        self, name: str, change: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        return change(self.plain(name, torch.float32).to(device)).to(self.dtype_of(name))

    def plain(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`, whatever the module's and the file's; in `out`, if given."""
        source = self.sources[name]
        shape = shape_of(source, self.checkpoint.tensors)
        with self._lock:
            tensor = _read(self._reader, source, shape, dtype, out)
        if name in self._unchecked:
            _check_finite(self.checkpoint, source, tensor)
            self._unchecked.remove(name)
        return tensor

    def is_large_table(self, name: str) -> bool:
        """A token table of which a prompt needs few rows."""
        return name == TOKEN_TABLE and self.num_bytes(name) > LARGE_TABLE

    def rows(self, name: str, ids: list[int]) -> Tensor:
        """Some rows of a table, in this order."""
        stored = self.sources[name].stored[0]
        with self._lock:
            rows = [self._reader.read(stored, self.dtype_of(name), range(i, i + 1)) for i in ids]
        return torch.cat(rows)


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


def _read(
    reader: PlainReader,
    source: Source,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    if len(source.stored) == 1:
        return reader.read(source.stored[0], dtype, out=out).view(shape)
    fused, row = torch.empty(shape, dtype=dtype) if out is None else out, 0
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


def _is_unused(name: str, found: Detected) -> bool:
    if found.kind != "clip" or not (hit := _UNUSED.match(name)):
        return False
    return hit[1] is None or int(hit[1]) == found.spec.num_layers - 1


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
