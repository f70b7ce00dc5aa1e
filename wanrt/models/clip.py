"""The CLIP image encoder (ViT-H/14, visual tower): an image in, 257 tokens out.

The tokens are the hidden state before the last block, so neither that block nor the norm and head
after it are built. Parameter names are the reference's without `visual.`.

Source: Wan2.1 @9737cba `wan/modules/clip.py`.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.config import ClipSpec
from wanrt.models.layers import Visit, weights_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image: Tensor, size: int = 224) -> Tensor:
    """image [B, 3, H, W] in [-1, 1] -> normalised pixels [B, 3, size, size].

    The reference squashes the whole image into the square (no crop), bicubic without antialiasing,
    and does not clamp the overshoot.
    """
    x = F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (x * 0.5 + 0.5 - mean) / std


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32 and returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(x.dtype)


class Attention(nn.Module):
    """Full self-attention; q, k and v come from one matrix, in this order."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        assert dim % num_heads == 0, f"{dim=} {num_heads=}"
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, L, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, L, d] each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP (exact GELU), each behind a norm and added to the residual stream."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.dim, spec.eps)
        self.attn = Attention(spec.dim, spec.num_heads)
        self.norm2 = LayerNorm(spec.dim, spec.eps)
        self.mlp = nn.Sequential(
            nn.Linear(spec.dim, spec.mlp_dim), nn.GELU(), nn.Linear(spec.mlp_dim, spec.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClipVision(nn.Module):
    """The visual tower up to its penultimate block, in the dtype of its weights."""

    FP32_NAMES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        assert spec.image_size % spec.patch_size == 0, f"{spec=}"
        self.spec = spec
        num_tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(
            3, spec.dim, spec.patch_size, stride=spec.patch_size, bias=False
        )
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, num_tokens, spec.dim))
        self.pre_norm = LayerNorm(spec.dim, spec.eps)
        self.transformer = nn.Sequential(*(Block(spec) for _ in range(spec.num_layers - 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels [B, 3, 224, 224] -> tokens [B, 257, D], the class token first."""
        size = self.spec.image_size
        assert pixels.shape[1:] == (3, size, size), f"{pixels.shape=} {size=}"
        return self.transformer(self.embed(pixels))

    def embed(self, pixels: Tensor) -> Tensor:
        """What the first block takes, [B, 257, D]."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, 256, D]
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        return self.pre_norm(x)

    def visits(self) -> tuple[list[Visit]]:
        """The blocks, as a pass comes to them."""
        names = [f"transformer.{i}" for i in range(len(self.transformer))]
        return ([Visit(name, weights_of(self, name)) for name in names],)
