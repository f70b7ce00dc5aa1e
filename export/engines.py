"""The set of engines: which parts of which models become engines of TensorRT-RTX, and for whom.

An engine has no weights in it: they are inputs. So one engine serves every block of a model and
every checkpoint of its shape, and the set is a few megabytes per model. Engines are built for one
card each: one that is to run on several has the memory of the neediest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from wanrt.config import MODELS, NANO, VAE_2_1, VAE_2_2
from wanrt.engine.manifest import Input, Precision
from wanrt.export import dit, onnx, rtx, trt, vae
from wanrt.export.part import Axis, Part

VAES = {"vae-2.1": VAE_2_1, "vae-2.2": VAE_2_2}
IDS = (
    "nano",
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "wan2.1-i2v-14b-480p",
    "wan2.2-ti2v-5b",
    *VAES,
)
CARDS: dict[Precision, tuple[int, ...]] = {"bf16": (86, 89, 120)}
# The largest sizes of an engine, where a graph leaves more open: 81 frames of 1280x720 have 75600
# tokens (TI2V: 31 latent frames).
LARGEST = {"L": 75600, "T": 31, "rows": 80, "columns": 80}
_BF16 = torch.bfloat16
_SCORE = 2  # bytes of a score in bf16
_DTYPES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.INT8: "int8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class Job:
    """A part of a model in a precision."""

    model: str
    precision: Precision
    part: Part

    def trace(self) -> ir.Model:
        """Its graph, as the builder takes it."""
        return rtx.spared(onnx.trace(self.part))


def jobs(models: Iterable[str] = IDS, precisions: Iterable[str] = tuple(CARDS)) -> Iterator[Job]:
    """All that are to be built, in the order of the table."""
    wanted = [precision for precision in CARDS if precision in set(precisions)]
    for model in models:
        for part in _parts(model):
            if "bf16" in wanted:
                yield Job(model, "bf16", part)


def _parts(model: str) -> Iterator[Part]:
    """The graphs of a transformer or of a VAE; nano has both, as it is alone with its own."""
    if model in VAES or model == "nano":
        yield from vae.parts(vae.empty(VAES.get(model, NANO.vae), _BF16), _BF16)
    if model in MODELS:
        empty = dit.empty(MODELS[model].dit, _BF16)
        yield dit.attention(empty, _BF16)
        yield from dit.parts(empty, _BF16)


def inputs_of(model: ir.Model, part: Part) -> tuple[Input, ...]:
    """The records of a graph's inputs, weights among them, with the ranges of an engine."""
    open_ = {value.name: value for value in part.inputs}

    def record(value: ir.Value) -> Input:
        assert value.name and value.shape is not None and value.dtype, f"{value=}"
        dtype = _DTYPES[value.dtype]
        if value.name not in open_:
            shape = tuple(int(size) for size in value.shape)
            return Input(value.name, dtype, shape, shape, shape)
        at = open_[value.name].at
        return Input(value.name, dtype, at(lambda axis: axis.min), at(_best), at(_largest))

    return tuple(record(value) for value in model.graph.inputs)


def _largest(axis: Axis) -> int:
    return min(axis.max, LARGEST.get(axis.name, axis.max))


def _best(axis: Axis) -> int:
    return min(axis.opt, _largest(axis))


def at_best(inputs: Iterable[Input]) -> tuple[Input, ...]:
    """The same inputs with nothing left open: each has the sizes that it is to be fastest at."""
    return tuple(replace(one, min=one.opt, max=one.opt) for one in inputs)


def fused(part: Part, fixed: trt.Built) -> bool | None:
    """Whether attention is one kernel; None where there is no attention.

    The builder refuses an Attention node for which it has none. Where the tokens of a clip attend
    to each other the memory has to show it too: the scores of a single head would be L * L numbers.
    `fixed` has the sizes of `at_best`: where sizes are open, the builder does not count a tensor
    that is too large for it.
    """
    if not fixed.attentions and not attends(part):
        return None
    return not attends(part) or fixed.workspace < _best(dit.TOKENS) ** 2 * _SCORE


def attends(part: Part) -> bool:
    """Whether the tokens of a clip attend to each other in it."""
    return any(axis == dit.TOKENS for value in part.inputs for axis in value.shape)
