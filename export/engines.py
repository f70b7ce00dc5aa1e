"""The set of engines: which parts of which models become engines of TensorRT-RTX, and for whom.

An engine has no weights in it: they are inputs. So one engine serves every block of a model and
every checkpoint of its shape, and the set is a few megabytes per model. Engines are built for one
card each: one that is to run on several has the memory of the neediest.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import get_args

import torch

from wanrt.config import MODELS, NANO, VAE_2_1, VAE_2_2
from wanrt.engine.manifest import Input, Precision
from wanrt.export import dit, onnx, trt, vae
from wanrt.export.jobs import Job
from wanrt.export.part import Axis, Part
from wanrt.quant.policy import EightBit

VAES = {"vae-2.1": VAE_2_1, "vae-2.2": VAE_2_2}
IDS = (
    "nano",
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "wan2.1-i2v-14b-480p",
    "wan2.2-ti2v-5b",
    *VAES,
)
CARDS: dict[Precision, tuple[int, ...]] = {
    "bf16": (86, 89, 120),
    "int8": (86, 89, 120),
    "fp8": (89, 120),
}
# The largest sizes of an engine, where a graph leaves more open: 81 frames of 1280x720 have 75600
# tokens (TI2V: 31 latent frames).
LARGEST = {"L": 75600, "T": 31, "rows": 80, "columns": 80}
_BF16 = torch.bfloat16
_SCORE = 2  # bytes of a score in bf16


def jobs(models: Iterable[str] = IDS, precisions: Iterable[str] = tuple(CARDS)) -> Iterator[Job]:
    """All that are to be built, in the order of the table.

    In eight bits are the parts that have such products; the others are those of bf16.
    """
    wanted = set(precisions)
    for model in models:
        if model in VAES or model == "nano":
            coder = vae.empty(VAES.get(model, NANO.vae), _BF16)
            parts = vae.parts(coder, _BF16) if "bf16" in wanted else ()
            yield from (Job(model, "bf16", part) for part in parts)
        if model in MODELS:
            yield from _transformer(model, wanted)


def cards_for(precision: Precision) -> tuple[int, ...]:
    """Compute capabilities that multiply it; fp16 wherever bf16 is."""
    return CARDS.get(precision, CARDS["bf16"])


def _transformer(model: str, wanted: Collection[str]) -> Iterator[Job]:
    empty = dit.empty(MODELS[model].dit, _BF16)
    if "bf16" in wanted:
        yield Job(model, "bf16", dit.attention(empty, _BF16))
    for part in dit.parts(empty, _BF16):
        for eight_bit in (None, *get_args(EightBit)):
            job = Job.of(model, empty, part, "bf16", eight_bit)
            if job.precision in wanted and job.precision == (eight_bit or "bf16"):
                yield job


def inputs_of(model: onnx.Model, part: Part) -> tuple[Input, ...]:
    """The records of a graph's inputs, weights among them, with the ranges of an engine."""
    values, found = {value.name: value for value in part.inputs}, []
    for given in model.graph.inputs:
        if given.name in values:
            at = values[given.name].at
            sizes = at(lambda axis: axis.min), at(_best), at(_largest)
        else:
            sizes = (tuple(given.shape.numpy()),) * 3
        found.append(Input(given.name, onnx.DTYPES[given.dtype], *sizes))
    return tuple(found)


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
    to each other the memory has to show it too: scores would be L * L numbers for each head.
    `fixed` has the sizes of `at_best`: where sizes are open, the builder does not count a tensor
    that is too large for it.
    """
    if not fixed.attentions and not attends(part):
        return None
    return not attends(part) or fixed.workspace < scores(part)


def scores(part: Part) -> int:
    """Bytes of what one token has for another, in bf16, at the sizes of `at_best`."""
    return part.module.self_attn.num_heads * _best(dit.TOKENS) ** 2 * _SCORE


def attends(part: Part) -> bool:
    """Whether the tokens of a clip attend to each other in it."""
    return any(axis == dit.TOKENS for value in part.inputs for axis in value.shape)
