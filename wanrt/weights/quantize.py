"""`wanrt quantize`: a whole model rewritten with eight-bit matrices, one tensor at a time.

The transformers get the formats of `quant/policy.py`; of the text encoder the blocks' matrices are
kept in eight bits and widened when they are loaded. In int8, convolutions of the VAE's decoder get
their static format (there is none of fp8); a CLIP tower stays as it is. What runs from the files
is, bit for bit, the plain model loaded with `--precision` and `--vae-precision`.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from wanrt.errors import OutputError
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.models.eight_bit import policy_formats
from wanrt.models.vae_int8 import default_convs
from wanrt.quant.formats import INT8_STATIC, LinearFormat
from wanrt.quant.policy import WEIGHTS, EightBit
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.contents import Weights
from wanrt.weights.detect import Detected, shape_of, translate
from wanrt.weights.load import load_component, skeleton
from wanrt.weights.parts import Parts
from wanrt.weights.quantised import (
    INPUT_STEP,
    INPUT_ZERO,
    METADATA,
    SCALE,
    check_formats,
    scale_of,
    static_convs,
)
from wanrt.weights.static_convs import SIDE, made_convs, stored_convs
from wanrt.weights.writer import Piece, check_space, write_resumable

Progress = Callable[[str, int, int], None]  # part, bytes done, bytes in all
_TEXT_MATRIX = re.compile(r"blocks\.\d+\.(attn|ffn)\..*weight$")
_NOISE = {"dit": "-high-noise", "low_noise": "-low-noise"}


@dataclass(frozen=True)
class Written:
    """One file, and what it was made from, bytes."""

    part: str
    path: Path
    before: int
    after: int
    num_quantised: int


def rewrite_model(
    parts: Parts,
    model_id: str,
    out: Path,
    precision: EightBit | None,
    progress: Progress,
    *,
    plain_vae: bool = False,
) -> Iterator[Written]:
    """Write every part that the model has into the folder `out`; resumes, verifies each file.

    Without a precision nothing is quantised: the same numbers, under the original names.
    `plain_vae`: nor is the VAE. Peak: one tensor and its eight-bit form; while an int8 VAE is
    calibrated, a plain fp32 one. Raises FormatError, OutputError.
    """
    sources = {
        name: _Source(found, None if found.kind == "vae" and plain_vae else precision)
        for name, found in parts.found.items()
    }
    there = sum(f.stat().st_size for f in out.glob("*.safetensors*")) if out.is_dir() else 0
    check_space(out, sum(source.num_bytes for source in sources.values()) - there)
    for name, source in sources.items():
        found = source.found
        stem = model_id if found.kind == "dit" else name
        stem += _NOISE[name] if name in _NOISE and parts.low_noise is not None else ""
        ending = f"-{precision}" if source.changes else ""
        path = out / f"{stem}{ending}.safetensors"
        pieces, total = list(source.pieces()), source.num_bytes
        done = 0

        def advance(num_bytes: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += num_bytes
            progress(f"quantize {name}", done, total)

        write_resumable(path, pieces, source.metadata, advance)
        _verify(path, pieces)
        yield Written(name, path, found.num_bytes, path.stat().st_size, len(source.changes))
    if parts.tokenizer is not None:
        target = out / parts.tokenizer.name
        if not target.exists():
            shutil.copyfile(parts.tokenizer, target)


class _Source:
    """The tensors of one part as they are to be written."""

    def __init__(self, found: Detected, precision: EightBit | None) -> None:
        self.found, module = found, skeleton(found.kind, found.spec)
        self._weights = Weights(module, found, torch.float32, check=True)
        if found.kind == "clip":  # with the last block, which no module has: it is counted
            self._weights.sources = translate(self._weights.checkpoint, found.component)[0]
        self.formats: dict[str, LinearFormat] = {}
        if precision and found.kind == "dit":
            self.formats = policy_formats(module, precision)
        elif precision and found.kind == "umt5":
            named = (name for name in self._weights.sources if _TEXT_MATRIX.match(name))
            self.formats = dict.fromkeys(named, WEIGHTS[precision])
        self._convs: frozenset[str] = frozenset()  # of a VAE: weights that get the static format
        if precision == "int8" and found.kind == "vae":
            stored = static_convs(self._weights.checkpoint)
            convs = stored or (SIDE + name for name in default_convs(module))
            self._convs = frozenset(f"{name}.weight" for name in convs)
        self._last: tuple[str, Tensor] | None = None  # the scale of the weight made last

    @property
    def changes(self) -> dict[str, str]:
        """The name of the format of every weight that has one."""
        forms = {name: form.name for name, form in self.formats.items()}
        return forms | dict.fromkeys(sorted(self._convs), INT8_STATIC)

    @property
    def metadata(self) -> dict[str, str]:
        if not self.changes:
            return {}
        forms = {name.removesuffix(".weight"): form for name, form in self.changes.items()}
        return {METADATA: json.dumps(forms, separators=(",", ":"))}

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """In stored order, under the original names."""
        tensors = self._weights.checkpoint.tensors
        for name, source in self._weights.sources.items():
            shape, form = shape_of(source, tensors), self.formats.get(name)
            if name in self._convs:
                yield from self._static(name.removesuffix(".weight"), shape)
                continue
            if form is None:
                dtype = self._weights.stored_dtype(name)
                yield Piece(name, dtype, shape, lambda n=name, d=dtype: self._weights.plain(n, d))
                continue
            yield Piece(name, form.dtype, shape, lambda n=name: self._make(n))
            scale = (shape[0], 1)
            yield Piece(scale_of(name), torch.float32, scale, lambda n=name: self._scale(n))

    def _static(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """A convolution and the format of its input."""
        for leaf, part, dtype, size in (
            ("weight", "values", torch.int8, shape),
            (SCALE, "scale", torch.float32, shape[:1]),
            (INPUT_STEP, "step", torch.float32, shape[1:2]),
            (INPUT_ZERO, "zero", torch.int8, shape[1:2]),
        ):
            yield Piece(f"{name}.{leaf}", dtype, size, lambda p=part: getattr(self._made[name], p))

    @cached_property
    def _made(self) -> dict[str, QuantizedConv]:
        """The convolutions: those that are stored, or new ones, for which the VAE is loaded."""
        convs = stored_convs(self._weights.checkpoint)
        convs = convs or made_convs(load_component(self.found.path, "vae"))
        return {SIDE + name: conv for name, conv in convs.items()}

    def _make(self, name: str) -> Tensor:
        form = self.formats[name]
        made = self._weights.quantized(name, form)
        self._last = (name, made.scale)
        return made.values

    def _scale(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:  # the file is being resumed
            self._make(name)
        assert self._last is not None
        return self._last[1]


def _verify(path: Path, pieces: list[Piece]) -> None:
    """Make every tensor again and hold it against the file, bit for bit."""
    checkpoint = Checkpoint.open(path)
    check_formats(checkpoint)
    for piece in pieces:
        stored, made = checkpoint.read(piece.name), piece.make()
        if not torch.equal(stored.view(torch.uint8), made.contiguous().view(torch.uint8)):
            raise OutputError(f"{path}: {piece.name} is not what was written; is the disk sound?")
