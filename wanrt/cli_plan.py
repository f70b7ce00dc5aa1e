"""`wanrt plan`: where a request's bytes will be, said without weights and without a GPU."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from wanrt.components import memory_bytes, open_parts
from wanrt.config import MODELS, WanSpec
from wanrt.errors import UsageError
from wanrt.memory.budget import gib, parse_bytes
from wanrt.memory.dit_bytes import FORMATS
from wanrt.memory.placement import TEXT_ROWS, Ask
from wanrt.memory.plan import Plan, make_plan
from wanrt.planning import HOST_SHARE
from wanrt.tasks import limits
from wanrt.tasks.sizes import parse_size
from wanrt.weights.hub import resolve_model
from wanrt.weights.parts import find_parts
from wanrt.weights.random import find_variant

WIDE = 160  # columns of a table that no terminal needs to wrap
PRECISIONS = tuple(name for name in FORMATS if "/" not in name)
_CPU = torch.device("cpu")
_COLUMNS = ("phase", "weights", "ring", "streamed", "activations", "caches", "peak")


def plan(
    model: Annotated[str, typer.Argument(help="An id, a folder, a file or a repository.")],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(help="4n+1.")] = None,
    precision: Annotated[str, typer.Option(help=", ".join(PRECISIONS) + ".")] = "bf16",
    vram: Annotated[str | None, typer.Option(help="Budget on the device, as 8G.")] = None,
    ram: Annotated[str | None, typer.Option(help="Budget of host memory, as 32G.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Of the longer prompt.")] = TEXT_ROWS,
    offline: Annotated[bool, typer.Option("--offline", help="Never download.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a request will hold on the device, phase by phase; reads no weights."""
    if precision not in PRECISIONS:
        choices = ", ".join(PRECISIONS)
        raise UsageError(f"precision {precision!r} does not exist; choose of {choices}")
    spec = _spec(model, offline)
    width, height = parse_size(size)
    width, height = width or spec.defaults.size[0], height or spec.defaults.size[1]
    frames = spec.defaults.num_frames if frames is None else frames
    limits.check_size(width, height, spec.vae.spatial_stride * 2)
    limits.check_frames(frames)
    ask = Ask(width, height, frames, image=spec.task != "t2v", text_rows=text_tokens)
    host = parse_bytes(ram, "--ram") or int(HOST_SHARE * memory_bytes(_CPU))
    made = make_plan(spec, ask, precision, parse_bytes(vram, "--vram"), host)
    if as_json:
        print(json.dumps(record(made)))
    else:
        show(made, Console(width=WIDE))


def _spec(model: str, offline: bool) -> WanSpec:
    """Of a released model by its id, else of what lies there, by its headers."""
    if model.lower() in {key for name in MODELS for key in (name, name.partition("-")[2])}:
        return find_variant(model)
    path = resolve_model(model, offline=offline)
    parts = find_parts(path)
    return open_parts(
        parts, f"{model} {path} {parts.dit}", "auto", _CPU, False, lambda *_: None
    ).spec


def show(plan: Plan, console: Console) -> None:
    """The plan as a table and what it means."""
    table = Table(*_COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in plan.phases:
        numbers = (phase.weights, phase.ring, phase.streamed, phase.activations, phase.caches)
        peak = gib(plan.fixed + phase.peak)
        table.add_row(phase.name, *(gib(n) if n else "-" for n in numbers), peak)
    console.print(table, highlight=False)
    for line in summary(plan):
        console.print(line, highlight=False, soft_wrap=True)


def summary(plan: Plan) -> list[str]:
    """Sentences under the table."""
    step, decode = plan.placement("step"), plan.work("decode")
    budget = "no budget" if plan.budget is None else f"budget {gib(plan.budget)}"
    lines = [
        f"{plan.model} {plan.ask.width}x{plan.ask.height}, {plan.ask.num_frames} frames,"
        f" {plan.precision}: peak {gib(plan.peak)} of {budget},"
        f" {gib(plan.fixed)} of it held by the process itself"
    ]
    if step.slots:
        lines.append(
            f"transformer: {step.num_resident} of {step.num_blocks} blocks stay, the others pass"
            f" through {step.slots} buffers from {gib(step.pinned)} of pinned memory"
            + (f" and {gib(step.mapped)} of file" if step.mapped else "")
            + (", both texts block by block" if plan.guidance == "interleaved" else "")
        )
    if decode.band or decode.host or decode.frames:
        how = [f"bands of {decode.band} latent rows, {decode.order} outermost"] * bool(decode.band)
        how += ["caches in host memory"] * decode.host
        how += ["full-rate frames one by one"] * bool(decode.frames)
        lines.append("decode: " + ", ".join(how))
    return lines


def record(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; bytes."""
    phases = [asdict(phase) | {"peak": plan.fixed + phase.peak} for phase in plan.phases]
    return {
        "model": plan.model,
        "precision": plan.precision,
        **asdict(plan.ask),
        "budget": plan.budget,
        "fixed": plan.fixed,
        "peak": plan.peak,
        "pinned": plan.pinned,
        "guidance": plan.guidance,
        "keep": plan.keep,
        "phases": phases,
        "placement": asdict(plan.placement("step")),
        "decode": asdict(plan.work("decode")),
    }
