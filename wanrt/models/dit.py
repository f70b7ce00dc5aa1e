"""The diffusion transformer of every Wan model: latents, time and conditions in, velocity out.

Precision, with bf16 or fp16 weights (with fp32 weights everything is fp32):

    fp32   time embedding and projection, modulation, gates, residual stream, head, all norms,
           rotary embedding, velocity; the parameters of these are `WanDiT.FP32_NAMES`
    bf16   every other matrix product: patches, text and image embedding, q k v o, feed-forward,
           VACE projections; normalised q and k before their fp32 norm weight; attention's inputs

This is the reference's autocast policy but for one rounding: what the first norm makes of the patch
embedding stays fp32. The sinusoid of t is computed in fp64, as in the reference.

Source: `wan/modules/model.py` of Wan2.1 @9737cba and Wan2.2 @42bf4cf, Wan2.1 `vace_model.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanrt.config import DitSpec
from wanrt.errors import UsageError
from wanrt.models.first_values import normal
from wanrt.models.layers import (
    TORCH,
    CrossAttention,
    CrossKV,
    FeedForward,
    Gelu,
    LayerNorm,
    Linear,
    Ops,
    PatchEmbedding,
    RopeTables,
    SelfAttention,
    Visit,
    inverse_frequencies,
    modulated,
    reusable,
    weights_of,
)

_TEXT_SIDE = re.compile(r"\.cross_attn\.(norm_)?[kv](_img)?\.")


@dataclass(frozen=True)
class TextCache:
    """All that a request's conditions contribute, computed once: keys and values per block."""

    blocks: tuple[CrossKV, ...]
    vace_blocks: tuple[CrossKV, ...] = ()
    key_bias: Tensor | None = None  # [B or 1, n]


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of each sample, or of each token through its level of t."""

    table: Tensor  # fp32 [B or levels, rows, D]
    level: Tensor | None

    def row(self, i: int) -> Tensor:
        """-> [B, 1, D], or [B, L, D] where t is per token."""
        return self.table[:, i : i + 1] if self.level is None else self.table[:, i][self.level]


@dataclass(frozen=True)
class TimeEmbedding:
    """Time as the head (`e`) and the blocks (`e0`) see it, once per distinct level of t."""

    e: Tensor  # [B or levels, 1, D]
    e0: Tensor  # [B or levels, 6, D]
    level: Tensor | None  # int64 [B, L]; None where t is one value per sample


@dataclass
class Branch:
    """One text on its way through the blocks: residual streams fp32 [B, L, D], overwritten."""

    text: TextCache
    x: Tensor
    control: Tensor | None  # of VACE


class ImageEmbedding(nn.Module):
    """CLIP tokens to the transformer's width; for first and last frame with a learned position."""

    def __init__(self, image_dim: int, dim: int, pos_tokens: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim, eps=1e-5),
            Linear(image_dim, image_dim),
            Gelu(exact=True),
            Linear(image_dim, dim),
            LayerNorm(dim, eps=1e-5),
        )
        if pos_tokens is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, pos_tokens, image_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, m, image_dim] -> [B, m, D]."""
        return self.proj(tokens + self.emb_pos if hasattr(self, "emb_pos") else tokens)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last modulated by time."""

    def __init__(self, spec: DitSpec, ops: Ops = TORCH) -> None:
        super().__init__()
        dim, self.eps, self.ops = spec.dim, spec.eps, ops
        image = spec.image_dim is not None
        self.modulation = nn.Parameter(normal(1, 6, dim, std=dim**-0.5))
        self.self_attn = SelfAttention(dim, spec.num_heads, spec.eps, ops)
        self.norm3 = LayerNorm(dim, spec.eps, ops)
        self.cross_attn = CrossAttention(dim, spec.num_heads, spec.eps, image, ops)
        self.ffn = FeedForward(dim, spec.ffn_dim, ops=ops)
        self.attend = ops.attention  # of the tokens to each other

    def forward(
        self,
        x: Tensor,
        time: TimeEmbedding,
        freqs: Tensor,
        kv: CrossKV,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """x fp32 [B, L, D] -> the same; overwrites x where autograd is off."""
        return self.post(x, self.attend(*self.pre(x, time, freqs)), time, kv, key_bias)

    def pre(self, x: Tensor, time: TimeEmbedding, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before the tokens attend to each other: q, k, v `[B, H, L, hd]`."""
        row = Modulation(self.modulation + time.e0, time.level).row
        y = modulated(x, row, 0, self.eps, self.self_attn.inputs, self.ops)
        return self.self_attn.project(y, freqs)

    def post(
        self,
        x: Tensor,
        y: Tensor,
        time: TimeEmbedding,
        kv: CrossKV,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """What comes after it: y `[B, H, L, hd]` is what they saw. See `forward`."""
        row = Modulation(self.modulation + time.e0, time.level).row
        x = self.self_attn.add_to(x, y, row(2))
        del y  # at real sizes this is gigabytes
        x = self.cross_attn.add_to(x, self.norm3, kv, key_bias)
        y = modulated(x, row, 3, self.eps, (self.ffn[0],), self.ops)
        return self.ffn.add_to(x, y, row(5), self.ops)


class VaceBlock(Block):
    """A block of the control branch; what `after_proj` makes of its tokens is a hint."""

    def __init__(self, spec: DitSpec, first: bool, ops: Ops = TORCH) -> None:
        super().__init__(spec, ops)
        if first:
            self.before_proj = Linear(spec.dim, spec.dim)
        self.after_proj = Linear(spec.dim, spec.dim)


class Head(nn.Module):
    """Tokens to patches of velocity, all in fp32."""

    def __init__(self, spec: DitSpec, patch_out: int, ops: Ops = TORCH) -> None:
        super().__init__()
        self.eps, self.ops = spec.eps, ops
        self.head = Linear(spec.dim, patch_out)
        self.modulation = nn.Parameter(normal(1, 2, spec.dim, std=spec.dim**-0.5))

    def forward(self, x: Tensor, time: TimeEmbedding) -> Tensor:
        row = Modulation(self.modulation + time.e, time.level).row
        return self.head(self.ops.layer_norm_modulate(x, row(1), row(0), self.eps))


class WanDiT(nn.Module):
    """A Wan transformer of any variant; what `spec` holds decides which conditions it takes.

    `ops` is its arithmetic: PyTorch's own, unless the loader chose better for the device.
    """

    OPS = Ops
    FP32_NAMES = (
        r"^time_embedding\.",
        r"^time_projection\.",
        r"modulation$",
        r"^head\.",
        r"\.norm(3|_q|_k|_k_img)\.",
        r"^img_emb\.(proj\.[04]\.|emb_pos$)",
    )

    def __init__(self, spec: DitSpec, ops: Ops = TORCH) -> None:
        super().__init__()
        self.spec, dim, patch = spec, spec.dim, spec.patch_size
        self.rope = RopeTables(spec.head_dim)
        self.patch_embedding = PatchEmbedding(spec.in_dim, dim, patch)
        self.text_embedding = FeedForward(spec.text_dim, dim, dim)
        self.time_embedding = nn.Sequential(Linear(spec.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if spec.image_dim is not None:
            self.img_emb = ImageEmbedding(spec.image_dim, dim, spec.image_pos_tokens)
        self.blocks = nn.ModuleList(Block(spec, ops) for _ in range(spec.num_layers))
        self.head = Head(spec, spec.out_dim * patch[0] * patch[1] * patch[2], ops)
        if spec.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(spec.vace_in_dim, dim, patch)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(spec, j == 0, ops) for j in range(len(spec.vace_layers))
            )

    def forward(
        self,
        latents: Tensor,
        t: int | float | Tensor,
        context: Tensor | TextCache,
        *,
        y: Tensor | None = None,
        image_context: Tensor | None = None,
        vace_context: Tensor | None = None,
        context_scale: float = 1.0,
    ) -> Tensor:
        """Velocity, fp32 [B, out_dim, T, h, w].

        latents [B, C, T, h, w]; y [B, 20, T, h, w] is put behind its channels. t in [0, 1000]: one
        number, [B], or [B, L] per token. context: text [B, n, text_dim] with its zero rows, or what
        `prepare` made of it and image_context. vace_context [B, 96, T, h, w].
        """
        if not isinstance(context, TextCache):
            context = self.prepare(context, image_context)
        elif image_context is not None:
            raise UsageError("image_context is already part of the prepared context; leave it out")
        conditions = {"y": y, "vace_context": vace_context, "context_scale": context_scale}
        return self.forward_each(latents, t, (context,), **conditions)[0]

    def forward_each(
        self,
        latents: Tensor,
        t: int | float | Tensor,
        texts: Sequence[TextCache],
        *,
        y: Tensor | None = None,
        vace_context: Tensor | None = None,
        context_scale: float = 1.0,
    ) -> list[Tensor]:
        """`forward` for each of several texts, block by block: a block's weights are needed once.

        The results are those of as many calls of `forward`, bit for bit. Every text more costs one
        more residual stream, fp32 [B, L, D] (with VACE two).
        """
        latents = latents if y is None else torch.cat((latents, y), 1)
        self._check(latents, vace_context)
        grid = tuple(n // p for n, p in zip(latents.shape[2:], self.spec.patch_size, strict=True))
        freqs = self.rope.get(grid, latents.device)
        x = self.patch_embedding(latents).float()  # [B, L, D]
        time = self._embed_time(t, x)
        control = None
        if vace_context is not None:
            control = self.vace_patch_embedding(vace_context)
            control = self.vace_blocks[0].before_proj(control) + x
        branches = [Branch(text, _copy(x), _copy(control)) for text in texts[1:]]
        branches.insert(0, Branch(texts[0], x, control))
        del x, control
        for i, block in enumerate(self.blocks):
            for branch in branches:
                text = branch.text
                branch.x = block(branch.x, time, freqs, text.blocks[i], text.key_bias)
            if i in self.spec.vace_layers:
                side = self.spec.vace_layers.index(i)
                for branch in branches:
                    self._add_hint(branch, side, time, freqs, context_scale)
        return [self._unpatchify(self.head(branch.x, time), grid) for branch in branches]

    def _add_hint(
        self, branch: Branch, i: int, time: TimeEmbedding, freqs: Tensor, scale: float
    ) -> None:
        """Advance the control stream by its block i; what comes out steers the main stream."""
        side, text = self.vace_blocks[i], branch.text
        branch.control = side(branch.control, time, freqs, text.vace_blocks[i], text.key_bias)
        hint = side.after_proj(branch.control)
        branch.x = torch.add(branch.x, hint, alpha=scale, out=reusable(branch.x))

    def prepare(
        self,
        context: Tensor,
        image_context: Tensor | None = None,
        *,
        key_bias: Tensor | None = None,
    ) -> TextCache:
        """All that does not depend on t: the embeddings, then each block's keys and values.

        context [B or 1, n, text_dim]; image_context [B or 1, m, image_dim]. key_bias [B or 1, n] is
        added to the scores of each text row: with log(c), one row counts as c equal ones, exactly,
        so that the zero rows behind a prompt need not be computed one by one.
        """
        return self.prepare_each([(context, key_bias)], image_context)[0]

    def prepare_each(
        self,
        texts: Sequence[tuple[Tensor, Tensor | None]],
        image_context: Tensor | None = None,
    ) -> list[TextCache]:
        """`prepare` for each (context, key_bias), block by block: weights are needed once."""
        for context, _ in texts:
            if context.shape[-1] != self.spec.text_dim:
                width = context.shape[-1]
                raise UsageError(f"text of width {width}; this model takes {self.spec.text_dim}")
        _check_given("image_context", image_context, self.spec.image_dim is not None)
        rows = [self.text_embedding(context) for context, _ in texts]
        image = None if image_context is None else self.img_emb(image_context)
        sides = self.vace_blocks if self.spec.vace_layers else ()
        made = [
            [block.cross_attn.prepare(text, image) for text in rows]
            for block in (*self.blocks, *sides)
        ]
        num = len(self.blocks)
        return [
            TextCache(tuple(kv[:num]), tuple(kv[num:]), key_bias)
            for kv, (_, key_bias) in zip(zip(*made, strict=True), texts, strict=True)
        ]

    def visits(self) -> tuple[list[Visit], list[Visit]]:
        """The blocks as `forward_each` comes to them, and their text projections as `prepare` does.

        `before_proj` belongs to no visit: it is called before its block.
        """
        names = [f"blocks.{i}" for i in range(len(self.blocks))]
        sides = [f"vace_blocks.{j}" for j in range(len(self.spec.vace_layers))]
        order = []
        for i, name in enumerate(names):
            order += [name]
            order += [sides[j] for j, main in enumerate(self.spec.vace_layers) if main == i]
        forward = [Visit(n, self._weights(n, text=False)) for n in order]
        texts = [Visit(f"{n}.cross_attn.k", self._weights(n, text=True)) for n in names]
        texts += [Visit(f"{n}.cross_attn.k", self._weights(n, text=True)) for n in sides]
        return forward, texts

    def _weights(self, block: str, text: bool) -> tuple[str, ...]:
        """Of one block: what makes keys and values of the conditions, or everything else."""
        every = (name for name in weights_of(self, block) if ".before_proj." not in name)
        return tuple(name for name in every if bool(_TEXT_SIDE.search(name)) == text)

    def _embed_time(self, t: int | float | Tensor, x: Tensor) -> TimeEmbedding:
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        b, tokens, _ = x.shape
        if t.shape not in ((), (1,), (b,), (b, tokens)):
            shape = list(t.shape)
            raise UsageError(f"t of shape {shape}; give one number, [{b}] or [{b}, {tokens}]")
        level = None
        if t.ndim == 2:  # tokens share a few values: each is embedded once
            t, level = torch.unique(t, return_inverse=True)
        else:
            t = t.expand(b)
        e = self.time_embedding(sinusoid(t, self.spec.freq_dim))
        return TimeEmbedding(e[:, None], self.time_projection(e).unflatten(-1, (6, -1)), level)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, pt * ph * pw * C], channel fastest -> [B, C, T, h, w]."""
        x = patches.unflatten(2, (*self.spec.patch_size, -1)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, T, pt, h, ph, w, pw]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3).float()

    def _check(self, latents: Tensor, vace_context: Tensor | None) -> None:
        spec = self.spec
        channels, *size = latents.shape[1:]
        if channels != spec.in_dim:
            raise UsageError(
                f"latents and y have {channels} channels together; this model takes {spec.in_dim}"
            )
        if any(n % p for n, p in zip(size, spec.patch_size, strict=True)):
            raise UsageError(f"latents of size {size} do not divide into patches {spec.patch_size}")
        _check_given("vace_context", vace_context, bool(spec.vace_layers))


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _check_given(name: str, value: Tensor | None, wanted: bool) -> None:
    if wanted and value is None:
        raise UsageError(f"this model needs {name}")
    if not wanted and value is not None:
        raise UsageError(f"this model takes no {name}; leave it out")


def sinusoid(t: Tensor, width: int) -> Tensor:
    """t [n] -> fp32 [n, width]: all cosines, then all sines, of t * 10000^(-i / (width / 2))."""
    angles = t.double()[:, None] * inverse_frequencies(width // 2).to(t.device)
    return torch.cat((angles.cos(), angles.sin()), -1).float()
