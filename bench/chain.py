"""`wanrt bench chain`: norm, SiLU and causal convolution, twice, at the stages of a decoder.

A residual block of each stage of VAE 2.1 with its past, as decoding calls it. Ours in bf16, fp16
and int8 beside diffusers' block, and beside cuDNN's convolution in channels-last with our norm
around it. Numbers first, against the reference's arithmetic; then medians of alternating runs.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.bench import peers
from wanrt.bench.measure import alternate, machine
from wanrt.bench.pictures import closeness
from wanrt.config import VAE_2_1
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
from wanrt.tasks.sizes import parse_size
from wanrt.vae_shapes import decoder_stages

_CONVS = (2, 6)  # their places in a residual block
MIN_COSINE = {"int8": 0.995}  # of what the block adds; the others 0.999
_REFERENCE = VaeOps(*(getattr(reference_vae, name) for name in VaeOps._fields))


@dataclass(frozen=True)
class Row:
    """One way to compute one stage's block; without seconds it was too far off to be timed."""

    stage: int
    shape: tuple[int, ...]  # [B, C, T, H, W]
    name: str
    cosine: float  # of what the block adds, with the reference's
    seconds: float | None = None
    tflops: float | None = None
    over_diffusers: float | None = None  # how many times as fast
    over_cudnn: float | None = None


class _Case(NamedTuple):
    block: ResidualBlock  # fp32
    x: Tensor  # fp32 [1, C, T, H, W]
    past: tuple[Tensor, Tensor]  # fp32 [1, C, 2, H, W], what each convolution has seen


def main(device: str, sizes: list[str], repeats: int, as_json: bool) -> None:
    """sizes: of the decoded frames, as 832x480. A line per stage and way."""
    about = machine(device)
    for size in sizes:
        width, height = parse_size(size)
        assert width and height, f"{size=}"
        for row in rows(device, width, height, repeats):
            print(json.dumps({"bench": "chain"} | asdict(row) | about) if as_json else _line(row))


@torch.inference_mode()
def rows(device: str, width: int, height: int, repeats: int) -> Iterator[Row]:
    """Of every stage. A way that is far off is not timed, and says so."""
    frames, side = 1, VAE_2_1.spatial_stride
    for number, stage in enumerate(decoder_stages(VAE_2_1)):
        case = _case(stage.widths[-1], (frames, height // side, width // side), device)
        yield from _measured(number, case, device, repeats)
        frames *= 2 if stage.mode == "upsample3d" else 1
        side //= 2 if stage.mode else 1
        del case
        _empty_cache(device)


def _measured(number: int, case: _Case, device: str, repeats: int) -> Iterator[Row]:
    runs = _ways(case, device)
    expected = _block_run(case, _REFERENCE, torch.float32)().float() - case.x
    shape, channels = tuple(case.x.shape), case.x.shape[1]
    cosines = {}
    for name, run in list(runs.items()):
        cosines[name] = closeness(run().float() - case.x, expected).cosine
        if not cosines[name] >= MIN_COSINE.get(name, 0.999):
            yield Row(number, shape, name, cosines[name])
            del runs[name]
    del expected
    flop = 2 * 2 * 27 * channels * case.x.numel()
    seconds = alternate(runs, repeats, device)
    for name, value in seconds.items():
        over = {
            f"over_{peer}": seconds[peer] / value
            for peer in ("diffusers", "cudnn")
            if peer in seconds
        }
        tflops = flop / value / 1e12
        yield Row(number, shape, name, cosines[name], seconds=value, tflops=tflops, **over)


def _case(channels: int, size: tuple[int, int, int], device: str) -> _Case:
    generator = torch.Generator().manual_seed(0)
    block = ResidualBlock(channels, channels).eval().requires_grad_(False)
    number_slots(block)
    for name, p in block.named_parameters():
        p.normal_(generator=generator).mul_(p[0].numel() ** -0.5 if p.ndim == 5 else 0.1)
        if name.endswith("gamma"):
            p.add_(1)
    frames, height, width = size
    x = torch.randn(1, channels, frames, height, width, generator=generator)
    past = [F.silu(torch.randn(1, channels, 2, height, width, generator=generator)) for _ in "12"]
    x, *past = (_channels_last(t.to(device)) for t in (x, *past))
    return _Case(block.to(device), x, (past[0], past[1]))


def _ways(case: _Case, device: str) -> dict[str, Callable[[], Tensor]]:
    """fp16 is for GPUs; with fp16 sums it is the fast one of a GeForce."""
    where = torch.device(device)
    runs = {
        "bf16": _block_run(case, choose(VaeOps, where, torch.bfloat16), torch.bfloat16),
        "int8": _int8_run(case, choose(VaeOps, where, torch.float16)),
        "cudnn": _block_run(case, _cudnn_ops(device), torch.bfloat16),
    }
    if device == "cuda":
        ops = choose(VaeOps, where, torch.float16)
        sums = partial(ops.causal_conv3d, accumulator=torch.float16)
        runs["fp16"] = _block_run(case, ops, torch.float16)
        runs["fp16-accumulate"] = _block_run(case, ops._replace(causal_conv3d=sums), torch.float16)
    if peers.absent("diffusers") is None:
        runs["diffusers"] = _diffusers_run(case)
    return runs


def _block_run(case: _Case, ops: VaeOps, dtype: torch.dtype) -> Callable[[], Tensor]:
    block = _cast(case.block, dtype)
    return partial(_call, block, ops, case.x.to(dtype), tuple(p.to(dtype) for p in case.past))


def _call(block: nn.Module, ops: VaeOps, x: Tensor, past: tuple[Tensor, ...]) -> Tensor:
    return block(x, Walk(CausalState(past, first=False), ops))


def _int8_run(case: _Case, ops: VaeOps) -> Callable[[], Tensor]:
    """Ranges of this very input and past, which is int8 beforehand, as the chunk before left it."""
    block, x = _cast(case.block, torch.float16), case.x.half()
    convs = [block.residual[place] for place in _CONVS]
    seen: list[Range] = []
    handles = [
        conv.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(observe(args[0], kwargs["gamma"])), with_kwargs=True
        )
        for conv in convs
    ]
    _call(block, ops, x, tuple(p.half() for p in case.past))
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


def _diffusers_run(case: _Case) -> Callable[[], Tensor]:
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


def _empty_cache(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    head = f"stage {row.stage}  {'x'.join(map(str, row.shape)):18} {row.name:15}"
    if row.seconds is None:
        return f"{head} not timed: cosine {row.cosine:.5f}"
    over = {"diffusers": row.over_diffusers, "cuDNN": row.over_cudnn}
    peers = "".join(f"  {value:5.2f}x {name}" for name, value in over.items() if value)
    return (
        f"{head} {row.seconds * 1e3:9.3f} ms  {row.tflops:7.2f} TFLOP/s{peers}  "
        f"cosine {row.cosine:.6f}"
    )
