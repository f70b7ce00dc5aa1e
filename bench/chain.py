"""`wanrt bench chain`: norm, SiLU and causal convolution, twice, at the stages of a decoder.

A residual block of each stage of VAE 2.1 with its past, as decoding calls it. Ours in bf16, fp16
and int8 beside diffusers' block, and beside cuDNN's convolution in channels-last with our norm
around it. Numbers first, against the reference's arithmetic; then medians of alternating runs. What
a card has no memory for has a row that says so.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from wanrt.bench import chain_ways
from wanrt.bench.agreement import cosine_of_pieces
from wanrt.bench.chain_ways import Case
from wanrt.bench.measure import faults, machine, reason, time_alternating
from wanrt.config import VAE_2_1
from wanrt.tasks.sizes import parse_size
from wanrt.vae_shapes import decoder_stages

MIN_COSINE = {"int8": 0.995}  # of what the block adds; the others 0.999


@dataclass(frozen=True)
class Row:
    """One way to compute one stage's block, or all where it has no name; a note if not timed."""

    stage: int
    shape: tuple[int, ...]  # [B, C, T, H, W]
    name: str
    cosine: float | None = None  # of what the block adds, with the reference's
    seconds: float | None = None
    tflops: float | None = None
    over_diffusers: float | None = None  # how many times as fast
    over_cudnn: float | None = None
    note: str = ""


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
        shape = (1, stage.widths[-1], frames, height // side, width // side)
        failed = None
        try:
            yield from _measured(number, shape, device, repeats)
        except faults() as error:
            failed = Row(number, shape, "", note=f"not measured: {reason(error)}")
        if failed:  # told when the error is gone, and the memory that it kept
            yield failed
        frames *= 2 if stage.mode == "upsample3d" else 1
        side //= 2 if stage.mode else 1
        _empty_cache(device)


def _measured(number: int, shape: tuple[int, ...], device: str, repeats: int) -> Iterator[Row]:
    """The reference first, while nothing else is there; then one way after the other is made."""
    case = chain_ways.draw(shape, device)
    expected = chain_ways.reference(case)
    runs, cosines = {}, {}
    for name, make in chain_ways.ways(case, device).items():
        try:
            run = make()
            cosines[name] = _nearness(case, run(), expected)
        except faults() as error:
            yield Row(number, shape, name, note=f"not measured: {reason(error)}")
            continue
        if cosines[name] >= MIN_COSINE.get(name, 0.999):
            runs[name] = run
        else:
            yield Row(number, shape, name, cosines[name], note="not timed: far from the reference")
    del case, expected, make
    flop = 2 * 2 * 27 * shape[1] * math.prod(shape)
    seconds = time_alternating(runs, device, repeats)
    for name, value in seconds.items():
        over = {
            f"over_{peer}": seconds[peer] / value
            for peer in ("diffusers", "cudnn")
            if peer in seconds
        }
        tflops = flop / value / 1e12
        yield Row(number, shape, name, cosines[name], seconds=value, tflops=tflops, **over)


def _nearness(case: Case, y: Tensor, expected: Tensor) -> float:
    """Cosine of what was added, a frame at a time."""
    frames = range(y.shape[2])
    return cosine_of_pieces(
        (y[:, :, t].float() - case.x[:, :, t], expected[:, :, t]) for t in frames
    )


def _empty_cache(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    head = f"stage {row.stage}  {'x'.join(map(str, row.shape)):18} {row.name:15}"
    if row.seconds is None:
        return f"{head} {row.note}" + (f": cosine {row.cosine:.5f}" if row.cosine else "")
    over = {"diffusers": row.over_diffusers, "cuDNN": row.over_cudnn}
    peers = "".join(f"  {value:5.2f}x {name}" for name, value in over.items() if value)
    return (
        f"{head} {row.seconds * 1e3:9.3f} ms  {row.tflops:7.2f} TFLOP/s{peers}  "
        f"cosine {row.cosine:.6f}"
    )
