"""`wanrt bench vram`: is a budget kept, and what does keeping it cost? Steps and a full decode.

A true-shaped model of random weights runs the same request within each budget, and before that
without one. Planned and measured peaks, the latents beside those of the run without a budget, the
time of a step beside its time, and the copies beside the computing that should hide them.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanrt.bench import true_shapes
from wanrt.bench.measure import alternate, machine
from wanrt.bench.pictures import closeness
from wanrt.config import Precision, WanSpec
from wanrt.errors import BudgetError, NumericsError
from wanrt.memory.budget import gib
from wanrt.memory.meter import metered
from wanrt.memory.pinned import host_buffer
from wanrt.memory.placement import Placement
from wanrt.memory.plan import Plan
from wanrt.pipeline import Pipeline, Step
from wanrt.tasks.sizes import parse_size

_MIN_COSINE = 0.99999  # of latents with those without a budget; on one device they are equal
_COPIED = 1 << 30  # bytes, to measure the way to the device


@dataclass(frozen=True)
class Settings:
    """`blocks` None: all of the model's. `budgets` as users write them."""

    variant: str = "wan2.1-t2v-1.3b"
    size: str = "832x480"
    frames: int = 81
    blocks: int | None = None
    precision: Precision = "bf16"
    budgets: tuple[str, ...] = ("5G", "4G")
    steps: int = 3
    device: str = "cuda"


@dataclass(frozen=True)
class Row:
    """One run. Bytes on the device are the process's, or the card's where the driver tells no more.

    `fixed` is what is held beside PyTorch's tensors. `copied` per step; `copy` is the seconds that
    the measured bandwidth needs for it. `slowdown`: of a step, over the run without a budget.
    """

    variant: str
    precision: str
    budget: str  # empty: none
    planned: int | None = None
    measured: int = 0
    fixed: int = 0
    streams: int = 0  # blocks
    copied: int = 0
    copy: float = math.nan
    step: float = math.nan  # median seconds, without the first one
    decode: float = math.nan
    cosine: float = math.nan
    slowdown: float = math.nan
    note: str = ""  # why it did not run


class _Ran(NamedTuple):
    plan: Plan | None
    measured: int
    fixed: int
    step: float
    decode: float
    latents: Tensor


def main(settings: Settings, as_json: bool) -> None:
    """A line for the run without a budget and for each budget. Raises NumericsError."""
    about = machine(settings.device)
    for row in rows(settings):
        print(json.dumps({"bench": "vram"} | asdict(row) | about) if as_json else _line(row))


def rows(settings: Settings) -> Iterator[Row]:
    """Raises NumericsError where latents depend on the budget."""
    spec = true_shapes.text_model(settings.variant, settings.blocks)
    rate = bandwidth(settings.device)
    with tempfile.TemporaryDirectory(prefix="wanrt-bench-") as folder:
        true_shapes.write(spec, Path(folder), ("dit", "vae"))
        free = _run(spec, Path(folder), settings, None)
        for budget in (None, *settings.budgets):
            try:
                ran = free if budget is None else _run(spec, Path(folder), settings, budget)
            except BudgetError as error:
                yield Row(settings.variant, settings.precision, budget or "", note=str(error))
                continue
            yield _row(settings, budget or "", ran, free, rate)


def bandwidth(device: str) -> float:
    """Bytes per second from pinned host memory to the device."""
    source = host_buffer(_COPIED, torch.device(device))
    target = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    return _COPIED / alternate({"copy": lambda: target.copy_(source)}, 5, device)["copy"]


def _run(spec: WanSpec, folder: Path, settings: Settings, budget: str | None) -> _Ran:
    """One request in a pipeline of its own; the first step warms up."""
    device = torch.device(settings.device)
    pipe = Pipeline.load(
        str(folder), precision=settings.precision, device=settings.device, vram=budget
    )
    width, height = parse_size(settings.size)
    embeds = torch.randn(2, 64, spec.dit.text_dim, generator=torch.Generator().manual_seed(0))
    ends = []

    def on_step(step: Step) -> None:
        _wait(device)
        ends.append(time.perf_counter())

    with metered(device) as meter:
        run = pipe.start(
            "",
            embeds[0],
            embeds[1],
            seed=0,
            width=width,
            height=height,
            num_frames=settings.frames,
            num_steps=settings.steps + 1,
        )
        latents = pipe.denoise(run, on_step=on_step)
        begin = time.perf_counter()
        for _ in pipe.decode(run, latents):
            pass
        decode = time.perf_counter() - begin
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else meter.peak
        step = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
        result = _Ran(run.plan, meter.peak, meter.peak - reserved, step, decode, latents.cpu())
    pipe.components.clear()
    return result


def _row(settings: Settings, budget: str, ran: _Ran, free: _Ran, rate: float) -> Row:
    cosine = closeness(ran.latents, free.latents).cosine
    if not cosine >= _MIN_COSINE:
        raise NumericsError(f"within {budget} the latents differ: cosine {cosine:.7f}")
    placement = None if ran.plan is None else ran.plan.placement("step")
    copied = 0 if ran.plan is None or placement is None else _copied(ran.plan, placement)
    return Row(
        settings.variant,
        settings.precision,
        budget,
        None if ran.plan is None else ran.plan.peak,
        ran.measured,
        ran.fixed,
        0 if placement is None else placement.num_blocks - placement.num_resident,
        copied,
        copied / rate,
        ran.step,
        ran.decode,
        cosine,
        ran.step / free.step,
    )


def _copied(plan: Plan, placement: Placement) -> int:
    """Bytes that come in one step; both branches by turns bring everything twice."""
    passes = 2 if plan.guidance == "sequential" else 1
    return passes * (placement.pinned + placement.mapped)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(row: Row) -> str:
    head = f"{row.variant}  {row.precision:5} {row.budget or 'no budget':9}"
    if row.note:
        return f"{head}  {row.note}"
    planned = "" if row.planned is None else f" of {gib(row.planned)} planned"
    return (
        f"{head}  peak {gib(row.measured)}{planned} (beside tensors {gib(row.fixed)})  "
        f"step {row.step:.3f} s ({row.slowdown:.2f}x), {row.streams} blocks stream: "
        f"{gib(row.copied)}, {row.copy:.3f} s of copies  decode {row.decode:.2f} s"
    )
