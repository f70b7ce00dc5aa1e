"""Bytes of a diffusion transformer: its weights part by part, and what a forward pass holds.

Activations are counted in N, the elements of one tensor [L, D] over all tokens. The residual stream
is fp32; everything beside it has the `element` bytes of the weights' dtype. What is alive together
is read off `wanrt/models/dit.py` (Block.forward), and traced at real sizes by the tests.
"""

from dataclasses import dataclass
from typing import Literal

from wanrt.config import DitSpec, WanSpec
from wanrt.kernels.limits import FEED_FORWARD_ROWS, SCORES, WIDENED_AT_ONCE, heads_at_once
from wanrt.memory.packed_bytes import PackedWeights

_FP32 = 4


@dataclass(frozen=True)
class Format:
    """Bytes of the numbers a precision keeps: of a block's matrices, and of everything 16-bit."""

    name: str
    matrix: int
    other: int

    @property
    def quantised(self) -> bool:
        """Every output channel of a matrix has an fp32 scale."""
        return self.matrix == 1


FORMATS = {
    "fp32": Format("fp32", 4, 4),
    "bf16": Format("bf16", 2, 2),
    "fp16": Format("fp16", 2, 2),
    "fp8": Format("fp8", 1, 2),
    "int8": Format("int8", 1, 2),
    "fp8/fp32": Format("fp8/fp32", 1, 4),  # small models keep the rest in fp32
    "int8/fp32": Format("int8/fp32", 1, 4),
}


_SMALL_PARAMS = 200_000_000  # up to here fp32 costs nothing worth saving


def plain_precision(num_params: int) -> Literal["fp32", "bf16"]:
    """Of a transformer of so many numbers, where the user names none; of what is not eight-bit."""
    return "fp32" if num_params <= _SMALL_PARAMS else "bf16"


@dataclass(frozen=True)
class DitWeights:
    """Bytes of one block less its cross-attention keys and values, of those, and of the rest."""

    block: int
    cross_kv: int  # of one block; needed once per request
    vace_extra: int  # what a block of the control branch has beyond a block
    rest: int  # embeddings, head, and the control branch's first projection
    num_blocks: int
    num_vace: int

    @property
    def total(self) -> int:
        every = self.num_blocks + self.num_vace
        return every * (self.block + self.cross_kv) + self.num_vace * self.vace_extra + self.rest


@dataclass(frozen=True)
class Tokens:
    """The size of a request as a transformer sees it."""

    length: int  # tokens of the video, L
    text: int  # rows of text that have keys, padding counted as one
    image: int = 0  # CLIP tokens
    pixels: int = 0  # latent pixels T·h·w
    levels: bool = False  # t differs from token to token (TI2V with an image)


def count_tokens(
    spec: WanSpec,
    width: int,
    height: int,
    num_frames: int,
    text: int,
    image: bool = False,
    refs: int = 0,
) -> Tokens:
    """width, height in pixels; `image`: a first frame is given to a model that may do without;
    `refs`: reference images, each a frame of latents."""
    stride, patch = spec.vae.spatial_stride, spec.dit.patch_size
    frames = (num_frames - 1) // spec.vae.temporal_stride + 1 + refs
    pixels = frames * (height // stride) * (width // stride)
    tokens = pixels // (patch[0] * patch[1] * patch[2])
    clip = 0 if spec.dit.image_dim is None else (spec.dit.image_pos_tokens or 257)
    return Tokens(tokens, text, clip, pixels, image and spec.vae.patch == 2)


def dit_weights(spec: DitSpec, form: Format) -> DitWeights:
    """By the shapes of `wanrt/models/dit.py`; norms, modulation, time and head are fp32."""
    d, f, image = spec.dim, spec.ffn_dim, spec.image_dim

    def linear(inputs: int, outputs: int, matrix: int = form.matrix) -> int:
        scales = outputs * _FP32 if matrix == 1 else 0
        return inputs * outputs * matrix + outputs * form.other + scales

    own = 4 * linear(d, d) + 2 * linear(d, d) + linear(d, f) + linear(f, d)
    norms = (3 + 2 + 6) * d * _FP32  # norm_q twice, norm_k, norm3, modulation
    cross_kv = 2 * linear(d, d) + d * _FP32
    if image is not None:
        cross_kv += 2 * linear(d, d) + d * _FP32
    patch = spec.patch_size[0] * spec.patch_size[1] * spec.patch_size[2]
    rest = linear(spec.in_dim * patch, d, form.other)
    rest += linear(spec.text_dim, d, form.other) + linear(d, d, form.other)
    time = spec.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d
    head = d * spec.out_dim * patch + spec.out_dim * patch + 2 * d
    rest += (time + head) * _FP32
    if image is not None:
        inner = linear(image, image, form.other)  # img_emb.proj.1; the norms around are fp32
        rest += inner + linear(image, d, form.other) + 2 * (image + d) * _FP32
        rest += (spec.image_pos_tokens or 0) * image * _FP32
    if spec.vace_layers:
        rest += linear(spec.vace_in_dim * patch, d, form.other) + linear(d, d)
    return DitWeights(
        own + norms, cross_kv, linear(d, d), rest, spec.num_layers, len(spec.vace_layers)
    )


def text_cache_bytes(spec: DitSpec, tokens: Tokens, element: int) -> int:
    """Keys and values of one text (and of the image) for all blocks."""
    rows = tokens.text + tokens.image
    return 2 * rows * spec.dim * element * (spec.num_layers + len(spec.vace_layers))


def latent_bytes(spec: DitSpec, tokens: Tokens) -> int:
    """fp32 tensors over the latent pixels: what the solver keeps, the conditions, both velocities.

    UniPC holds the sample, two predictions and the last sample, and makes two more in a step. With
    them the rotary table, cos and sin of each token and pair.
    """
    channels = 8 * spec.out_dim + 2 * spec.in_dim
    table = tokens.length * spec.head_dim * 4
    return channels * tokens.pixels * 4 + condition_bytes(spec, tokens) + table


def condition_bytes(spec: DitSpec, tokens: Tokens) -> int:
    """What conditions a request is there until its end, in fp32: latents of pictures and videos,
    features of both texts, CLIP tokens."""
    channels = spec.in_dim - spec.out_dim + (spec.vace_in_dim if spec.vace_layers else 0)
    features = 2 * tokens.text * spec.text_dim + tokens.image * (spec.image_dim or 0)
    return (channels * tokens.pixels + features) * _FP32


def activation_bytes(
    spec: DitSpec,
    tokens: Tokens,
    element: int,
    branches: int,
    fused: bool,
    extra: int = 0,
    packed: PackedWeights | None = None,
    widened: int = 0,
) -> int:
    """The most a forward pass holds beside weights, text cache and latents.

    `branches` texts go through together; `fused`: norms and rotation are single kernels (Triton),
    else PyTorch's, which make fp32 copies. `extra`: what attention makes beside its result.
    `widened`: what an eight-bit weight takes that becomes plain for one product.
    `packed`: matrices are unpacked while they are used; those of a long feed-forward both at once.
    """
    n = tokens.length * spec.dim
    streams = branches * (2 if spec.vace_layers else 1) * _FP32 * n
    square = wide = table = 0
    if packed is not None:
        both = 2 if tokens.length > FEED_FORWARD_ROWS else 1
        square = packed.matrices * spec.dim * spec.dim * element + packed.scratch
        wide = packed.matrices * both * spec.dim * spec.ffn_dim * element + packed.scratch
        table = packed.table + packed.scratch
    return streams + max(
        table,
        prepare_bytes(spec, tokens, element) + widened,
        2 * element * n + widened if spec.vace_layers else 0,  # before_proj, after_proj
        _project(n, element, tokens.levels, fused) + square,
        4 * element * n + extra,  # q, k, v and the attention's result
        _feed_forward(spec, tokens, element, fused) + wide,
        head_bytes(spec, tokens),
    )


def widened_bytes(spec: DitSpec, form: Format) -> int:
    """A matrix whose product takes no eight-bit activations, and the rows under way, in fp32."""
    return spec.dim * spec.dim * form.other + 4 * _FP32 * WIDENED_AT_ONCE if form.quantised else 0


def attention_extra(spec: DitSpec, tokens: Tokens, form: Format, fused: bool) -> int:
    """What eight-bit attention makes of q, k and v before its products, some heads at a time.

    int8 q and k with an fp32 scale for each row of a head, and v in fp16 or fp8. PyTorch's makes
    fp32 copies of everything, and for fp8 some scores twice (`kernels/torch_attention.py`).
    """
    fp8 = form.name.startswith("fp8")
    if not fused:
        n = tokens.length * spec.dim
        return 17 * n + n // 10 + 2 * SCORES * 4 if fp8 else 19 * n + n // 2
    value_bytes = 1 if fp8 else 2
    size, length = spec.head_dim, tokens.length
    heads = min(heads_at_once(length, length, size, value_bytes), spec.num_heads)
    return heads * length * ((2 + value_bytes) * size + 2 * 4)


def head_bytes(spec: DitSpec, tokens: Tokens) -> int:
    """Normalised tokens and patches of velocity, in fp32."""
    return (tokens.length * spec.dim + tokens.length * spec.out_dim * 4) * _FP32


def prepare_bytes(spec: DitSpec, tokens: Tokens, element: int) -> int:
    """Both texts embedded, and a key on its way through its norm: of short videos the most."""
    n = (tokens.text + tokens.image) * spec.dim
    return 2 * element * n + (2 * element + 2 * _FP32) * n


def _normalised(n: int, element: int, levels: bool, fused: bool) -> int:
    """A modulated norm: its result, and what PyTorch makes on the way to it."""
    rows = 2 * _FP32 * n if levels else 0  # shift and scale of each token
    if fused:
        return rows + element * n
    if levels:
        return rows + 2 * _FP32 * n
    return _FP32 * n + (element * n if element != _FP32 else 0)


def _project(n: int, element: int, levels: bool, fused: bool) -> int:
    """Normalised tokens, q done, k under way; or all three done."""
    done = 4 * element * n
    norm_rope = 2 * element * n  # the product and what becomes of it
    if not fused:
        norm_rope += _FP32 * n * (2 if element != _FP32 else 1)
    return max(done, 2 * element * n + norm_rope, _normalised(n, element, levels, fused))


def _feed_forward(spec: DitSpec, tokens: Tokens, element: int, fused: bool) -> int:
    n = tokens.length * spec.dim
    rows = min(FEED_FORWARD_ROWS, tokens.length)
    parts = rows * (spec.ffn_dim + (spec.dim if rows < tokens.length else 0)) * element
    inside = 2 * element * n + parts
    return max(inside, _normalised(n, element, tokens.levels, fused))
