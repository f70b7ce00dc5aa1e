"""Bytes of the text encoder and of the CLIP tower: weights per block, activations of a pass."""

from dataclasses import dataclass

from wanrt.config import ClipSpec, Umt5Spec
from wanrt.memory.packed_bytes import PackedWeights


@dataclass(frozen=True)
class EncoderWeights:
    """Bytes of one of its equal blocks, and of what stays outside them."""

    block: int
    num_blocks: int
    rest: int

    @property
    def total(self) -> int:
        return self.block * self.num_blocks + self.rest


def umt5_weights(spec: Umt5Spec, element: int) -> EncoderWeights:
    """Without the token table, whose few rows in use are read from the file."""
    matrices = 4 * spec.dim * spec.attn_dim + 3 * spec.dim * spec.ffn_dim
    tables = 2 * spec.dim + spec.num_buckets * spec.num_heads
    return EncoderWeights((matrices + tables) * element, spec.num_layers, spec.dim * element)


def umt5_activations(
    spec: Umt5Spec, length: int, element: int, packed: PackedWeights | None = None
) -> int:
    """One prompt of `length` tokens: three copies of its scores, in fp32 once, or the hidden rows.

    packed: a matrix is unpacked while it is used.
    NOTE: an upper bound; the tests hold it within a few per cent of the count at 512 tokens.
    """
    scores = spec.num_heads * length * length
    attention = scores * (3 * element + 4) + 4 * length * spec.attn_dim * element
    hidden = 3 * length * spec.ffn_dim * element
    if packed is not None:
        square = packed.matrices * spec.dim * spec.attn_dim * element
        square += 2 * scores * element + 5 * length * spec.attn_dim * element  # the last product
        rows = length * spec.ffn_dim * element
        wide = packed.matrices * spec.dim * spec.ffn_dim * element
        hidden = max(hidden, rows + wide + max(rows, packed.scratch))  # the second of its products
        attention = max(attention, square + packed.scratch)
    return max(attention, hidden) + 4 * length * spec.dim * element


def clip_weights(spec: ClipSpec, element: int) -> EncoderWeights:
    """Without the last block, which the models do not use."""
    d, m = spec.dim, spec.mlp_dim
    block = 4 * d * d + 4 * d + 2 * d * m + m + d + 4 * d
    tokens = 1 + (spec.image_size // spec.patch_size) ** 2
    rest = 3 * spec.patch_size**2 * d + d + tokens * d + 2 * d
    return EncoderWeights(block * element, spec.num_layers - 1, rest * element)


def clip_activations(spec: ClipSpec, element: int) -> int:
    """One picture: tokens, their q, k and v or the hidden rows, and fp32 copies in the norms."""
    tokens = 1 + (spec.image_size // spec.patch_size) ** 2
    rows = tokens * max(2 * spec.mlp_dim, 5 * spec.dim) * element
    return rows + tokens * spec.dim * (3 * element + 8) + 3 * spec.image_size**2 * 12
