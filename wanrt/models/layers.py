"""The layers that the models share, where models meet ops (the VAE's are in `vae_layers.py`).

Precision is decided here by two rules. A matrix product runs in the dtype of its weight, and
whatever feeds it is rounded to that dtype once. Everything between the products (norms, modulation,
rotary embedding, residual stream) is computed in fp32, whatever the weights are.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt import env
from wanrt.errors import UsageError
from wanrt.kernels import registry, torch_ops
from wanrt.kernels.limits import FEED_FORWARD_ROWS
from wanrt.kernels.reference import Quantized
from wanrt.kernels.target import UnsupportedOp
from wanrt.models.lora import LowRankBranch
from wanrt.models.packed import PackedLinear, held
from wanrt.models.quantized import QuantizedLinear

log = logging.getLogger("wanrt")


class Ops(NamedTuple):
    """The arithmetic of a transformer, chosen when it is built; `kernels/reference.py` says it."""

    layer_norm: Callable[..., Tensor]
    layer_norm_modulate: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    rms_norm_rope: Callable[..., Tensor]
    gelu: Callable[..., Tensor]
    attention: Callable[..., Tensor]


TORCH = Ops(*(getattr(torch_ops, name) for name in Ops._fields))
Chosen = TypeVar("Chosen", bound=tuple)


def choose(
    ops: type[Chosen], device: torch.device, dtype: torch.dtype, result: torch.dtype | None = None
) -> Chosen:
    """Fill a tuple of ops with the best backend of each for a device and dtype of activations.

    `result`: the eight-bit dtype that they make. Raises UsageError, with every backend's reason,
    where one of them cannot be done.
    """
    target = registry.here(dtype, device.type, result)
    try:
        choices = [registry.resolve(name, target, env.ops_backend()) for name in ops._fields]
    except UnsupportedOp as error:
        raise UsageError(str(error)) from error
    for choice in choices:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.declined.items())
        log.debug("%s: %s%s", choice.op, choice.backend, f" ({reasons})" if reasons else "")
    return ops(*(choice.function for choice in choices))


class Visit(NamedTuple):
    """A stop of a pass through a model: weights that are needed once `module` is called.

    They are needed until the next visit. What a model's `visits` does not name, it always needs.
    """

    module: str
    weights: tuple[str, ...]


def weights_of(module: nn.Module, name: str) -> tuple[str, ...]:
    """Full names of the weights of one submodule."""
    return tuple(f"{name}.{leaf}" for leaf, _ in module.get_submodule(name).named_parameters())


def reusable(x: Tensor) -> Tensor | None:
    """x itself as the place for a result, where no backward pass can ask for its old value."""
    return None if torch.is_grad_enabled() else x


class Linear(nn.Linear):
    """A matrix product in its weight's dtype, and what LoRAs add to it."""

    branch: LowRankBranch | None = None  # no parameter: it stays where it is when weights move
    input_form = None  # it takes no eight-bit activations

    @property
    def dtype(self) -> torch.dtype:
        """In which the product runs."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = F.linear(x, self.weight, self.bias)
        return y if self.branch is None else self.branch.add_to(y, x)


Product = Linear | PackedLinear | QuantizedLinear


def modulated(
    x: Tensor,
    row: Callable[[int], Tensor],
    i: int,
    eps: float,
    products: Sequence[Product],
    ops: Ops,
) -> Tensor | Quantized:
    """LN(x) * (1 + row(i + 1)) + row(i), in the form that all these products take.

    The rows may be as large as x: nothing here holds them while the op works.
    """
    first, form = products[0], products[0].input_form
    if form is None or any(product.input_form != form for product in products):
        return ops.layer_norm_modulate(x, row(i + 1), row(i), eps, first.dtype)
    make = first.ops.make.layer_norm_modulate_quantize
    return make(x, row(i + 1), row(i), eps, form.dtype, form.rotated)


def normalised(x: Tensor, norm: "LayerNorm", product: Product) -> Tensor | Quantized:
    """norm(x), in the form that this product takes."""
    form = product.input_form
    if form is None:
        return norm(x, product.dtype)
    scale, shift = (norm.weight - 1)[None, None], norm.bias[None, None]
    make = product.ops.make.layer_norm_modulate_quantize
    return make(x, scale, shift, norm.eps, form.dtype, form.rotated)


def add_product(
    residual: Tensor, x: Tensor | Quantized, gate: Tensor | None, product: Product, ops: Ops
) -> Tensor:
    """residual + gate * product(x), fp32; overwrites the residual where autograd is off."""
    if product.input_form is not None and not torch.is_grad_enabled():
        return product.add_to(residual, x, gate)
    y = product(x)
    if gate is None:
        return torch.add(residual, y, out=reusable(residual))
    return ops.gated_residual(residual, y, gate, reusable(residual))


class PatchEmbedding(nn.Conv3d):
    """Non-overlapping patches to tokens: a convolution's weight, used as a matrix product."""

    branch: LowRankBranch | None = None

    def __init__(self, in_dim: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, patch_size, patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, C, T, h, w] -> [B, L, D], tokens in (time, row, column) order."""
        b, c, *size = latents.shape
        (pt, ph, pw), (t, h, w) = self.kernel_size, size
        x = latents.view(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, L, C * pt * ph * pw]
        x = x.to(self.weight.dtype)
        y = F.linear(x, self.weight.flatten(1), self.bias)
        return y if self.branch is None else self.branch.add_to(y, x)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, computed in fp32; `dtype` is that of the result (fp32)."""

    def __init__(self, dim: int, eps: float, ops: Ops = TORCH) -> None:
        super().__init__(dim, eps=eps)
        self.ops = ops

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps, dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the full width; the result keeps the input's dtype."""

    def __init__(self, dim: int, eps: float, ops: Ops = TORCH) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Gelu(nn.Module):
    """GELU, by its tanh approximation unless `exact`; without autograd it overwrites its input."""

    def __init__(self, exact: bool = False, ops: Ops = TORCH) -> None:
        super().__init__()
        self.approximate, self.ops = "none" if exact else "tanh", ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.gelu(x, self.approximate, reusable(x))


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear: the hidden activations stay in the weights' dtype.

    Long sequences go through in parts, so that what is hidden stays small.
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int | None = None, ops: Ops = TORCH
    ) -> None:
        last = Linear(hidden_dim, out_dim or dim)
        super().__init__(Linear(dim, hidden_dim), Gelu(ops=ops), last)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x [B, L, D] -> [B, L, out]."""
        _, length, _ = shape = x.values.shape if isinstance(x, Quantized) else x.shape
        if length <= FEED_FORWARD_ROWS or torch.is_grad_enabled():
            return self[2](self._hidden(x))
        last = self[2]
        y = torch.empty(*shape[:2], last.out_features, dtype=last.dtype, device=last.weight.device)
        with held(self):
            for rows in _parts(length):
                y[:, rows] = last(self._hidden(_rows(x, rows)))
        return y

    def add_to(self, residual: Tensor, x: Tensor | Quantized, gate: Tensor, ops: Ops) -> Tensor:
        """residual + gate * self(x), fp32 [B, L, D]; overwrites it where autograd is off."""
        if self[2].input_form is None or torch.is_grad_enabled():
            return ops.gated_residual(residual, self(x), gate, reusable(residual))
        gates = gate.expand(len(residual), -1, -1)
        for i in range(len(residual)):
            sample = slice(i, i + 1)
            for rows in _parts(residual.shape[1]):
                hidden = self._hidden(_rows(x, rows, sample))
                own = gates[sample] if gate.shape[1] == 1 else gates[sample, rows]
                self[2].add_to(residual[sample, rows], hidden, own)
        return residual

    def _hidden(self, x: Tensor | Quantized) -> Tensor | Quantized:
        """In the form that the second product takes."""
        first, gelu, second = self
        if isinstance(first, QuantizedLinear):
            return first.gelu(x, second.input_form)
        return gelu(first(x))


def _parts(length: int) -> Iterator[slice]:
    """Rows that go through the hidden width together."""
    for start in range(0, length, FEED_FORWARD_ROWS):
        yield slice(start, min(start + FEED_FORWARD_ROWS, length))


def _rows(x: Tensor | Quantized, rows: slice, samples: slice = slice(None)) -> Tensor | Quantized:
    if isinstance(x, Quantized):
        return x._replace(values=x.values[samples, rows], scale=x.scale[samples, rows])
    return x[samples, rows]


class RopeTables:
    """Rotary tables of the last few grids: computed in fp64, kept in fp32, one per grid and device.

    A head of size hd is hd / 2 pairs; rows and columns get (hd / 2) // 3 of them each, time the
    rest. Pair i of an axis with n pairs turns by position * 10000^(-i / n).
    Source: Wan2.1 @9737cba `wan/modules/model.py` rope_params, rope_apply.
    """

    def __init__(self, head_dim: int, capacity: int = 4) -> None:
        side = head_dim // 2 // 3
        self.pairs = (head_dim // 2 - 2 * side, side, side)
        self.capacity = capacity
        self._tables: dict[tuple[tuple[int, int, int], torch.device], Tensor] = {}

    def get(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """-> fp32 [L, hd / 2, 2]: (cos, sin) of each token and pair; `grid` counts tokens."""
        key = (grid, device)
        if key not in self._tables:
            while len(self._tables) >= self.capacity:
                del self._tables[next(iter(self._tables))]
            with torch.inference_mode(False):  # the table may serve a backward pass later
                self._tables[key] = self._build(grid).to(device)
        return self._tables[key]

    def _build(self, grid: tuple[int, int, int]) -> Tensor:
        axes = []
        for axis, (size, pairs) in enumerate(zip(grid, self.pairs, strict=True)):
            angles = torch.outer(_positions(size), inverse_frequencies(pairs))
            shape = [1, 1, 1, pairs]
            shape[axis] = size
            axes.append(angles.view(shape).expand(*grid, pairs))
        angles = torch.cat(axes, -1).flatten(0, 2)  # [L, hd / 2]
        return torch.stack((angles.cos(), angles.sin()), -1).float()


def inverse_frequencies(pairs: int) -> Tensor:
    """10000^(-i / pairs) for i = 0 .. pairs - 1, in fp64 on the CPU."""
    return 10000.0 ** -(_positions(pairs) / pairs)


def _positions(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device="cpu")


class CrossKV(NamedTuple):
    """What one cross-attention sees of the conditions, `[B, H, n, hd]` each."""

    k: Tensor
    v: Tensor
    k_image: Tensor | None = None
    v_image: Tensor | None = None


class SelfAttention(nn.Module):
    """Full attention over the video's tokens: RMSNorm and rotary embedding on q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.num_heads, self.eps, self.ops = num_heads, eps, ops
        self.q, self.k = Linear(dim, dim), Linear(dim, dim)
        self.v, self.o = Linear(dim, dim), Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, eps, ops), RMSNorm(dim, eps, ops)

    @property
    def inputs(self) -> tuple[Product, ...]:
        """The products that take what `project` is given."""
        return self.q, self.k, self.v

    def project(self, x: Tensor | Quantized, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D], freqs [L, hd / 2, 2] -> q, k, v [B, H, L, hd]."""
        norm_rope = self.ops.rms_norm_rope
        q = norm_rope(self.q(x), self.norm_q.weight, freqs, self.num_heads, self.eps)
        k = norm_rope(self.k(x), self.norm_k.weight, freqs, self.num_heads, self.eps)
        return q, k, _split_heads(self.v(x), self.num_heads)

    def add_to(self, residual: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """residual + gate * (what the attention made, y [B, H, L, hd]), fp32 [B, L, D]."""
        return add_product(residual, _join_heads(y), gate, self.o, self.ops)


class CrossAttention(nn.Module):
    """Attention from the video's tokens to the text's and, apart, to the image's; no rotation."""

    def __init__(self, dim: int, num_heads: int, eps: float, image: bool, ops: Ops) -> None:
        super().__init__()
        self.num_heads, self.ops = num_heads, ops
        self.q, self.k = Linear(dim, dim), Linear(dim, dim)
        self.v, self.o = Linear(dim, dim), Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(dim, eps, ops), RMSNorm(dim, eps, ops)
        if image:
            self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps, ops)

    def prepare(self, context: Tensor, image: Tensor | None) -> CrossKV:
        """Keys and values of text tokens [B, n, D] and image tokens [B, m, D]."""

        def heads(z: Tensor) -> Tensor:
            return _split_heads(z, self.num_heads)

        kv = CrossKV(heads(self.norm_k(self.k(context))), heads(self.v(context)))
        if image is None:
            return kv
        k_image = heads(self.norm_k_img(self.k_img(image)))
        return kv._replace(k_image=k_image, v_image=heads(self.v_img(image)))

    def add_to(
        self, residual: Tensor, norm: LayerNorm, kv: CrossKV, key_bias: Tensor | None = None
    ) -> Tensor:
        """residual + attention(norm(residual)), fp32 [B, L, D].

        key_bias [B or 1, n] is added to the scores of the text.
        """
        y = self._mix(self.norm_q(self.q(normalised(residual, norm, self.q))), kv, key_bias)
        return add_product(residual, y, None, self.o, self.ops)

    def _mix(self, q: Tensor, kv: CrossKV, key_bias: Tensor | None) -> Tensor:
        """What the text and, apart, the image have for each token: q and result [B, L, D]."""
        q = _split_heads(q, self.num_heads)
        bias = None if key_bias is None else key_bias[:, None, None]
        y = self._attend(q, kv.k, kv.v, bias)
        if kv.k_image is not None and kv.v_image is not None:
            y = torch.add(y, self._attend(q, kv.k_image, kv.v_image), out=reusable(y))
        return _join_heads(y)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        batch = q.shape[0]  # one context may serve every sample
        k, v = (x.expand(batch, -1, -1, -1) for x in (k, v))
        return self.ops.attention(q, k, v, bias)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, L, hd]


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, L, D]
