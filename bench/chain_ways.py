"""The ways in which `wanrt bench chain` computes a residual block: ours, cuDNN's, diffusers'."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.bench import peers
from wanrt.kernels import reference_vae, registry
from wanrt.models.layers import choose
from wanrt.models.vae_layers import (
    CausalState,
    Int8CausalConv3d,
    ResidualBlock,
    VaeOps,
    Walk,
    number_slots,
)
from wanrt.quant.conv_int8 import Range, StaticInt8, observe, quantize_conv

_CONVS = (2, 6)  # their places in a residual block
_REFERENCE = VaeOps(*(getattr(reference_vae, name) for name in VaeOps._fields))
Run = Callable[[], Tensor]


class Case(NamedTuple):
    """A block and what it is called with."""

    block: ResidualBlock  # fp32
    x: Tensor  # fp32 [1, C, T, H, W]
    past: tuple[Tensor, Tensor]  # fp32 [1, C, 2, H, W], what each convolution has seen


def draw(shape: tuple[int, ...], device: str) -> Case:
    """Weights of the CPU's generator; x [1, C, T, H, W] and pasts of the device's own."""
    generator, channels = torch.Generator().manual_seed(0), shape[1]
    block = ResidualBlock(channels, channels).eval().requires_grad_(False)
    number_slots(block)
    for name, p in block.named_parameters():
        p.normal_(generator=generator).mul_(p[0].numel() ** -0.5 if p.ndim == 5 else 0.1)
        if name.endswith("gamma"):
            p.add_(1)
    frames = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=frames, device=device)
    before = (*shape[:2], 2, *shape[3:])
    past = [_past(before, frames, device) for _ in _CONVS]
    return Case(block.to(device), _channels_last(x), (past[0], past[1]))


def _past(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    return _channels_last(F.silu(torch.randn(shape, generator=generator, device=device)))


def reference(case: Case) -> Tensor:
    """What the block adds to x, fp32."""
    return _block_run(case.block, _REFERENCE, torch.float32, case.x, case.past)().sub_(case.x)


def ways(case: Case, device: str) -> dict[str, Callable[[], Run]]:
    """What makes each way; those of one dtype share their inputs.

    fp16 is for GPUs; with fp16 sums it is the fast one of a GeForce.
    """
    where = torch.device(device)

    @cache
    def inputs(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        return case.x.to(dtype), tuple(p.to(dtype) for p in case.past)

    def block(ops: VaeOps, dtype: torch.dtype) -> Run:
        return _block_run(case.block, ops, dtype, *inputs(dtype))

    half = choose(VaeOps, where, torch.float16)
    found: dict[str, Callable[[], Run]] = {
        "bf16": lambda: block(choose(VaeOps, where, torch.bfloat16), torch.bfloat16),
        "int8": lambda: _int8_run(case, half, *inputs(torch.float16)),
        "cudnn": lambda: block(_cudnn_ops(device), torch.bfloat16),
    }
    if device == "cuda":
        sums = partial(half.causal_conv3d, accumulator=torch.float16)
        found["fp16"] = lambda: block(half, torch.float16)
        found["fp16-accumulate"] = lambda: block(half._replace(causal_conv3d=sums), torch.float16)
    if peers.absent("diffusers") is None:
        found["diffusers"] = lambda: _diffusers_run(case)
    return found


def _block_run(
    block: ResidualBlock, ops: VaeOps, dtype: torch.dtype, x: Tensor, past: tuple[Tensor, ...]
) -> Run:
    return partial(_call, _cast(block, dtype), ops, x, past)


def _call(block: nn.Module, ops: VaeOps, x: Tensor, past: tuple[Tensor, ...]) -> Tensor:
    return block(x, Walk(CausalState(past, first=False), ops))


def _int8_run(case: Case, ops: VaeOps, x: Tensor, halves: tuple[Tensor, ...]) -> Run:
    """Ranges of this very input and past, which is int8 beforehand, as the chunk before left it."""
    block = _cast(case.block, torch.float16)
    convs = [block.residual[place] for place in _CONVS]
    seen: list[Range] = []
    handles = [
        conv.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(observe(args[0], kwargs["gamma"])), with_kwargs=True
        )
        for conv in convs
    ]
    _call(block, ops, x, halves)
    for handle in handles:
        handle.remove()
    past = []
    for place, found, before in zip(_CONVS, seen, case.past, strict=True):
        every = found.joined(Range(*before.transpose(0, 1).flatten(1).aminmax(dim=1)))
        form = quantize_conv(case.block.residual[place].weight, every, StaticInt8())
        block.residual[place] = Int8CausalConv3d(block.residual[place], form)
        step, zero = (v.float().view(1, -1, 1, 1, 1) for v in (form.step, form.zero))
        past.append((before / step + zero).round().clamp(-127, 127).to(torch.int8))
    return partial(_call, block, ops, x, tuple(past))


def _cudnn_ops(device: str) -> VaeOps:
    """The best norm there is, then PyTorch's convolution of the frames behind their past."""
    target = registry.here(torch.bfloat16, device)
    norm = registry.resolve("channel_norm_silu", target).function

    def causal_conv3d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        history: Tensor,
        gamma: Tensor,
        residual: Tensor | None = None,
        stride: int = 1,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        frames = torch.cat((history, norm(x, gamma)), 2)
        y = F.conv3d(frames, weight, bias, padding=(0, 1, 1))
        return y if residual is None else y.add_(residual), frames[:, :, -2:].clone()

    return _REFERENCE._replace(causal_conv3d=causal_conv3d)


def _diffusers_run(case: Case) -> Run:
    """Its residual block, weights of ours, contiguous as it has them."""
    theirs = peers.diffusers_residual_block(case.block).to(case.x.device, torch.bfloat16)
    x, *past = (t.to(torch.bfloat16).contiguous() for t in (case.x, *case.past))
    return lambda: theirs(x, feat_cache=list(past), feat_idx=[0])


def _cast(block: ResidualBlock, dtype: torch.dtype) -> ResidualBlock:
    """A copy in this dtype, its weights channels last."""
    result = copy.deepcopy(block).to(dtype)
    for p in result.parameters():
        p.data = _channels_last(p.data) if p.ndim == 5 else p.data
    return result


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
