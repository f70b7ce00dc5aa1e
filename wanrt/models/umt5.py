"""The umT5 encoder: token ids in, one context row per token out.

A pre-norm T5 encoder whose every layer has its own relative position table. Nothing has a bias, the
embedding is not scaled, and the attention logits are not divided by sqrt(head size).

Source: Wan2.1 @9737cba `wan/modules/t5.py` (names, arithmetic); T5 (arXiv 1910.10683) section 2.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wanrt.config import Umt5Spec
from wanrt.models.first_values import Table
from wanrt.models.layers import Visit, weights_of


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Table row for each distance key - query, int64, same shape.

    Half of the rows are for keys to the right of the query. Within a half, the first half of the
    rows holds one distance each, the rest share the distances up to `max_distance` on a log scale.
    """
    half = num_buckets // 2
    exact = half // 2
    r = distance.abs()
    fraction = torch.log(r.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    coarse = exact + (fraction * (half - exact)).long()
    row = torch.where(r < exact, r, coarse.clamp(max=half - 1))
    return row + half * (distance > 0)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32, rounded to the weight's dtype before the product."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class PositionBias(nn.Module):
    """One learned number per relative position bucket and head."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = Table(num_buckets, num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        return self.embedding(buckets).permute(2, 0, 1)  # [n, n] -> [H, n, n]


class Attention(nn.Module):
    """softmax(q k^T + bias) v per head, softmax in fp32; `attn_dim` need not equal `dim`."""

    def __init__(self, dim: int, attn_dim: int, num_heads: int) -> None:
        super().__init__()
        assert attn_dim % num_heads == 0, f"{attn_dim=} {num_heads=}"
        self.num_heads = num_heads
        self.q = nn.Linear(dim, attn_dim, bias=False)
        self.k = nn.Linear(dim, attn_dim, bias=False)
        self.v = nn.Linear(dim, attn_dim, bias=False)
        self.o = nn.Linear(attn_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
        """x [B, n, D], bias [H, n, n], pad [B, 1, 1, n] true where the key is no token."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, n, d]
            for proj in (self.q, self.k, self.v)
        )
        logits = (q @ k.mT + bias).masked_fill_(pad, torch.finfo(q.dtype).min)  # [B, H, n, n]
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x))), GELU in its tanh form."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, ffn_dim, bias=False)
        self.fc2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.norm1 = RMSNorm(spec.dim, spec.eps)
        self.attn = Attention(spec.dim, spec.attn_dim, spec.num_heads)
        self.norm2 = RMSNorm(spec.dim, spec.eps)
        self.ffn = FeedForward(spec.dim, spec.ffn_dim)
        self.pos_embedding = PositionBias(spec.num_buckets, spec.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, pad: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), pad)
        return x + self.ffn(self.norm2(x))


class Umt5Encoder(nn.Module):
    """The whole encoder, in the dtype of its weights."""

    FP32_NAMES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: Umt5Spec) -> None:
        super().__init__()
        self.spec = spec
        self.token_embedding = Table(spec.vocab_size, spec.dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.dim, spec.eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, n] (mask 1 at tokens, 0 at pads) -> [B, n, D]; rows at pads mean nothing.

        Real rows do not depend on the pads. Peak beside the weights: B·H·n² logits, two copies.
        """
        return self.forward_each([(ids, mask)])[0]

    def forward_each(self, prompts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """`forward` for each prompt, block by block: a block's weights are needed once."""
        passes = [self._begin(ids, mask) for ids, mask in prompts]
        for block in self.blocks:
            for one in passes:
                one.x = block(one.x, one.buckets, one.pad)
        return [self.norm(one.x) for one in passes]

    def _begin(self, ids: Tensor, mask: Tensor) -> "Pass":
        assert ids.shape == mask.shape, f"{ids.shape=} {mask.shape=}"
        position = torch.arange(ids.shape[1], device=ids.device)
        buckets = relative_buckets(
            position[None, :] - position[:, None], self.spec.num_buckets, self.spec.max_distance
        )
        pad = (mask == 0)[:, None, None, :]
        return Pass(self.token_embedding(ids), buckets, pad)

    def visits(self) -> tuple[list[Visit]]:
        """The blocks, as a pass comes to them."""
        names = [f"blocks.{i}" for i in range(len(self.blocks))]
        return ([Visit(name, weights_of(self, name)) for name in names],)


@dataclass
class Pass:
    """One prompt batch on its way through the blocks."""

    x: Tensor  # [B, n, D]
    buckets: Tensor  # int64 [n, n]
    pad: Tensor  # bool [B, 1, 1, n]
