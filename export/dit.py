"""The transformer as graphs: a block cut at its self-attention, or whole, and what is around it.

Every graph computes one sample. Tokens lie `[1, L, D]` and heads `[1, L, H, hd]`, so that `pre` and
`post`, which treat each token by itself, may be given the tokens in parts of any length.

    patch, vace_patch   latents or control -> tokens             text, image   features -> rows
    time                sinusoid of t -> e, e0                   kv            rows -> keys, values
    pre                 tokens -> q, k, v                        post          + attention -> tokens
    block               pre, attention and post                  head          tokens -> velocity
    before, after       the projections of a VACE block
    attention           q, k, v -> y; for engines, where nothing else has it
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt.config import DitSpec
from wanrt.export.part import Axis, Multiple, Part, Value, cast
from wanrt.kernels import registry
from wanrt.kernels.limits import PART_TOKENS
from wanrt.models.dit import Block, TimeEmbedding, WanDiT
from wanrt.models.eight_bit import policy_formats
from wanrt.models.layers import CrossAttention, CrossKV, Ops
from wanrt.quant.formats import LinearFormat
from wanrt.quant.policy import EightBit

OPS = Ops(*(registry.function(name, "onnx") for name in Ops._fields))
FP32 = torch.float32

MAX_TOKENS = 1 << 18  # of a clip; 1280x720 with 81 frames has 75600
TOKENS = Axis("L", 4, 32760, MAX_TOKENS, trace=40)
SOME_TOKENS = Axis("L", 4, PART_TOKENS, PART_TOKENS, trace=40)
TEXT = Axis("n", 1, 512, 512, trace=24)
LEVELS = Axis("levels", 1, 2, 16, trace=3)
FRAMES, ROWS, COLUMNS = (
    Axis(name, low, best, high, trace)
    for name, low, best, high, trace in (
        ("T", 1, 21, 64, 3),
        ("rows", 1, 30, 256, 5),
        ("columns", 1, 52, 256, 7),
    )
)


def parts(dit: WanDiT, dtype: torch.dtype) -> Iterator[Part]:
    """Every graph of a transformer that has the ops of ONNX; `dtype` is that of its products.

    Blocks are alike: those of the first stand for all.
    """
    spec = dit.spec
    simple = partial(_simple, dit)
    yield simple("dit.patch", "patch_embedding", _latents("latents", spec.in_dim), dtype=FP32)
    yield simple("dit.text", "text_embedding", _rows("context", dtype, TEXT, spec.text_dim))
    levels = LEVELS if spec.t_per_token else 1
    yield simple("dit.time", "time_embedding", Value("sinusoid", FP32, (levels, spec.freq_dim)))
    yield simple("dit.time_projection", "time_projection", Value("e", FP32, (levels, spec.dim)))
    if spec.image_dim is not None:
        tokens = spec.image_pos_tokens or 257
        yield simple("dit.image", "img_emb", _rows("image", dtype, tokens, spec.image_dim))
    yield _keys_and_values(dit, dtype)
    yield _pre(dit)
    yield _post(dit, dtype)
    yield _whole(dit, dtype)
    yield _head(dit)
    if spec.vace_layers:
        x = _rows("x", FP32, SOME_TOKENS, spec.dim)
        control = _latents("latents", spec.vace_in_dim)
        yield simple("dit.vace_patch", "vace_patch_embedding", control)
        yield simple("dit.before", "vace_blocks.0.before_proj", x)
        yield simple("dit.after", *(f"{side}.after_proj" for side in _sides(dit)), x)


def attention(dit: WanDiT, dtype: torch.dtype) -> Part:
    """What stands between `pre` and `post`, over all tokens of a clip; it has no weights."""
    spec = dit.spec

    def call(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    shape = (1, TOKENS, spec.num_heads, spec.head_dim)
    inputs = tuple(Value(name, dtype, shape) for name in ("q", "k", "v"))
    return Part("dit.attention", dit.blocks[0], call, inputs, ("y",), tuple(_blocks(dit)))


def formats(dit: WanDiT, part: Part, precision: EightBit) -> dict[str, LinearFormat]:
    """Of the weights of one of its parts, by their names in it, as `quant.policy` has them.

    Those of weights that its graph does not use are among them; empty where the policy names none.
    """
    place = f"{part.homes[0]}."
    return {
        name.removeprefix(place): form
        for name, form in policy_formats(dit, precision).items()
        if name.startswith(place)
    }


def empty(spec: DitSpec, dtype: torch.dtype) -> WanDiT:
    """A transformer of a spec on the meta device, with the ops of ONNX and the runtime's dtypes."""
    with torch.device("meta"):
        return cast(WanDiT(spec, OPS), dtype)


def _blocks(dit: WanDiT) -> list[str]:
    """Where the blocks are; those of the control branch come after the others."""
    return [f"blocks.{i}" for i in range(len(dit.blocks))] + _sides(dit)


def _sides(dit: WanDiT) -> list[str]:
    return [f"vace_blocks.{j}" for j in range(len(dit.spec.vace_layers))]


def _simple(dit: WanDiT, name: str, *rest: str | Value, dtype: torch.dtype | None = None) -> Part:
    """Modules of one input, alike; their result in `dtype`, if that is given."""
    *homes, value = rest

    def call(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        return y if dtype is None else y.to(dtype)

    return Part(name, dit.get_submodule(homes[0]), call, (value,), ("out",), tuple(homes))


def _keys_and_values(dit: WanDiT, dtype: torch.dtype) -> Part:
    spec, names = dit.spec, [f"{name}.cross_attn" for name in _blocks(dit)]
    inputs, outputs = (_rows("context", dtype, TEXT, spec.dim),), ("k", "v")
    if spec.image_dim is not None:
        inputs += (_rows("image", dtype, spec.image_pos_tokens or 257, spec.dim),)
        outputs += ("k_image", "v_image")

    def call(attention: CrossAttention, context: Tensor, image: Tensor | None = None) -> object:
        return tuple(x for x in attention.prepare(context, image) if x is not None)

    return Part("dit.kv", dit.get_submodule(names[0]), call, inputs, outputs, tuple(names))


def _pre(dit: WanDiT) -> Part:
    def call(
        block: Block, x: Tensor, e0: Tensor, freqs: Tensor, level: Tensor | None = None
    ) -> object:
        return tuple(y.transpose(1, 2) for y in block.pre(x, TimeEmbedding(e0, e0, level), freqs))

    spec, axis = dit.spec, SOME_TOKENS
    inputs = (_rows("x", FP32, axis, spec.dim), _modulation(spec), _freqs(spec, axis))
    return _of_blocks(dit, "dit.pre", call, inputs + _level(spec, axis), ("q", "k", "v"))


def _post(dit: WanDiT, dtype: torch.dtype) -> Part:
    spec, axis = dit.spec, SOME_TOKENS

    def call(block: Block, x: Tensor, y: Tensor, e0: Tensor, *rest: Tensor) -> Tensor:
        given = _conditions(spec, rest)
        return block.post(x, y.transpose(1, 2), TimeEmbedding(e0, e0, given.level), *given.text)

    y = Value("y", dtype, (1, axis, spec.num_heads, spec.head_dim))
    inputs = (_rows("x", FP32, axis, spec.dim), y, _modulation(spec), *_text(spec, dtype))
    return _of_blocks(dit, "dit.post", call, inputs + _level(spec, axis))


def _whole(dit: WanDiT, dtype: torch.dtype) -> Part:
    spec = dit.spec

    def call(block: Block, x: Tensor, e0: Tensor, freqs: Tensor, *rest: Tensor) -> Tensor:
        given = _conditions(spec, rest)
        return block(x, TimeEmbedding(e0, e0, given.level), freqs, *given.text)

    inputs = (_rows("x", FP32, TOKENS, spec.dim), _modulation(spec), _freqs(spec, TOKENS))
    return _of_blocks(dit, "dit.block", call, inputs + _text(spec, dtype) + _level(spec, TOKENS))


def _of_blocks(
    dit: WanDiT,
    name: str,
    call: Callable[..., object],
    inputs: tuple[Value, ...],
    outputs: tuple[str, ...] = ("out",),
) -> Part:
    return Part(name, dit.blocks[0], call, inputs, outputs, tuple(_blocks(dit)))


def _head(dit: WanDiT) -> Part:
    def call(head: nn.Module, x: Tensor, e: Tensor, level: Tensor | None = None) -> Tensor:
        return head(x, TimeEmbedding(e, e, level))

    spec = dit.spec
    e = Value("e", FP32, (LEVELS if spec.t_per_token else 1, 1, spec.dim))
    inputs = (_rows("x", FP32, SOME_TOKENS, spec.dim), e, *_level(spec, SOME_TOKENS))
    return Part("dit.head", dit.head, call, inputs, ("out",), ("head",))


class _Conditions(NamedTuple):
    """What `post` and `block` are given beside the tokens."""

    text: tuple[CrossKV, Tensor]  # and its key bias
    level: Tensor | None


def _conditions(spec: DitSpec, rest: tuple[Tensor, ...]) -> _Conditions:
    """From the inputs of `_text` and `_level`."""
    k, v, key_bias, *more = rest
    images = 0 if spec.image_dim is None else 2
    return _Conditions((CrossKV(k, v, *more[:images]), key_bias), next(iter(more[images:]), None))


def _text(spec: DitSpec, dtype: torch.dtype) -> tuple[Value, ...]:
    """Keys and values of the conditions; the key bias is zero where a row counts once."""
    heads, width = spec.num_heads, spec.head_dim
    values = [Value(name, dtype, (1, heads, TEXT, width)) for name in ("k", "v")]
    values.append(Value("key_bias", FP32, (1, TEXT)))
    if spec.image_dim is not None:
        tokens = spec.image_pos_tokens or 257
        shape = (1, heads, tokens, width)
        values += [Value(name, dtype, shape) for name in ("k_image", "v_image")]
    return tuple(values)


def _level(spec: DitSpec, axis: Axis) -> tuple[Value, ...]:
    """Which level of t each token has, where they differ."""
    return (Value("level", torch.int64, (1, axis)),) if spec.t_per_token else ()


def _modulation(spec: DitSpec) -> Value:
    return Value("e0", FP32, (LEVELS if spec.t_per_token else 1, 6, spec.dim))


def _freqs(spec: DitSpec, axis: Axis) -> Value:
    return Value("freqs", FP32, (axis, spec.head_dim // 2, 2))


def _rows(name: str, dtype: torch.dtype, length: int | Axis, width: int) -> Value:
    return Value(name, dtype, (1, length, width))


def _latents(name: str, channels: int) -> Value:
    size = (FRAMES, Multiple(ROWS, 2), Multiple(COLUMNS, 2))
    return Value(name, FP32, (1, channels, *size))
