"""`wanrt plan`: where a request's bytes will be, said without weights, without a GPU and at once.

A released model's plan imports no torch, with a bundle of engines neither; headers of checkpoints
and LoRAs are read with it.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import typer
from rich.console import Console
from rich.table import Table

from wanrt.cli_bundle import card_of
from wanrt.command import new_app, run
from wanrt.config import (
    MODELS,
    GenerateConfig,
    Precision,
    VaePrecision,
    WanSpec,
    find_variant,
)
from wanrt.errors import UsageError
from wanrt.memory.budget import HOST_FIXED, gib
from wanrt.memory.dit_bytes import FORMATS
from wanrt.memory.engine_bytes import NATIVE, EngineBytes
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.memory.placement import Machine
from wanrt.memory.plan import Plan, plan_for_any_text
from wanrt.memory.vae_formats import VaeFormat, settle_vae
from wanrt.planning import Budgets, expected_machine, format_of, question_of
from wanrt.presets import parse_loras
from wanrt.request import NEEDS, Request, resolve, size_for
from wanrt.tasks.sizes import parse_size
from wanrt.weights.hub import resolve_model

WIDE = 160  # columns of a table that no terminal needs to wrap
_COLUMNS = ("phase", "weights", "ring", "streamed", "activations", "caches", "peak", "host")


class _Model(NamedTuple):
    """What is known of a model before its weights: `format` is that of its numbers.

    vae_int8: the VAE's file is.
    """

    spec: WanSpec
    format: str
    packed: PackedWeights | None = None
    engines: EngineBytes = NATIVE
    packed_text: PackedWeights | None = None
    vae_int8: bool = False


def plan(
    model: Annotated[str, typer.Argument(help="An id, a folder, a file or a repository.")],
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; a picture of that shape.")] = None,
    frames: Annotated[int | None, typer.Option(help="4n+1; 1 is an image.")] = None,
    task: Annotated[str, typer.Option(help="i2v for a picture to TI2V-5B.")] = "auto",
    guidance: Annotated[float | None, typer.Option(help="1 switches it off.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of a distilled LoRA.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE; repeatable.")] = None,
    refs: Annotated[int, typer.Option(help="VACE: how many reference images.")] = 0,
    precision: Annotated[str, typer.Option(help=", ".join(get_args(Precision)) + ".")] = "auto",
    vae_precision: Annotated[
        str, typer.Option(help=", ".join(get_args(VaePrecision)) + ".")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cuda or cpu; it is not looked at.")] = "cuda",
    vram: Annotated[str | None, typer.Option(help="Budget on the device, as 8G.")] = None,
    ram: Annotated[str | None, typer.Option(help="Budget of host memory, as 32G.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Of engines of TensorRT-RTX.")] = None,
    card: Annotated[str | None, typer.Option(help="That runs them, as 8.9.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a request will hold on the device, phase by phase; reads no weights."""
    for name, value, legal in (
        ("precision", precision, get_args(Precision)),
        ("VAE precision", vae_precision, get_args(VaePrecision)),
        ("device", device, ("cuda", "cpu")),
    ):
        if value not in legal:
            raise UsageError(f"{name} {value!r} does not exist; choose of {', '.join(legal)}")
    if (bundle is None) != (card is None):
        raise UsageError("--bundle and --card belong together")
    if bundle is not None and device == "cpu":
        raise UsageError("engines run on a card; leave --bundle or --device cpu out")
    if refs < 0:
        raise UsageError(f"refs is {refs}; it must be 0 or more")
    budgets = Budgets.parse(vram, ram)
    known = _released(model, precision) or _stored(model, precision, device, offline)
    if bundle is not None and card is not None:
        known = _with_engines(known, bundle, card_of(card, "--card"), precision)
    width, height = parse_size(size)
    sampling = {"task": task, "guidance": guidance, "preset": preset, "refs": (0,) * refs}
    asked = _request(known.spec, width=width, height=height, num_frames=frames, **sampling)
    machine = expected_machine(device)
    question = question_of(
        known.spec,
        asked,
        known.format,
        budgets,
        machine,
        refs=refs,
        lora=_lora_bytes(lora or [], known),
        packed=known.packed,
        packed_text=known.packed_text,
        engines=known.engines,
        vae=_vae_format(vae_precision, known, machine),
    )
    made = plan_for_any_text(question, budgets.vram)
    if as_json:
        print(json.dumps(record(made)))
    else:
        show(made, Console(width=WIDE))


def _released(model: str, precision: Precision) -> _Model | None:
    """A released model by its id."""
    if model.lower() not in {key for name in MODELS for key in (name, name.partition("-")[2])}:
        return None
    spec = find_variant(model)
    return _Model(spec, format_of(precision, spec))


def _stored(model: str, precision: Precision, device: str, offline: bool) -> _Model:
    """What lies there, by its headers."""
    import torch

    from wanrt.components import open_parts
    from wanrt.weights.parts import find_parts

    path = resolve_model(model, offline=offline)
    parts = find_parts(path)
    where = torch.device(device if torch.cuda.is_available() else "cpu")
    name = f"{model} {path} {parts.dit}"
    components = open_parts(parts, name, precision, where, False, lambda *_: None)
    vae = parts.found.get("vae")
    form, int8 = components.dtypes.format, vae is not None and vae.precision == "int8"
    packed = {"packed": components.packed, "packed_text": components.packed_text}
    return _Model(components.spec, form, **packed, vae_int8=int8)


def _vae_format(asked: VaePrecision, model: _Model, machine: Machine) -> VaeFormat:
    """How the VAE will keep its numbers. Raises UsageError."""
    usual = machine.usual_vae(FORMATS[model.format])
    if model.engines.decode is not None:
        if asked not in ("auto", usual.name):
            raise UsageError(
                f"VAE precision {asked} asked; the bundle has engines of a VAE in {usual.name}"
            )
        return usual
    form = settle_vae(asked, usual.plain, machine.device, model.vae_int8)
    if form.fp16_sums and (machine.device == "cpu" or not machine.fused):
        raise UsageError(
            "VAE precision fp16-accumulate needs Triton's convolution on an NVIDIA GPU; use fp16"
        )
    return form


def _with_engines(model: _Model, path: Path, card: int, precision: Precision) -> _Model:
    """The model with the engines of a bundle, by whomever; only its manifest is read.

    Raises FormatError, and UsageError where the bundle is in another precision.
    """
    from wanrt.engine.bundle import Bundle
    from wanrt.engine.memory import check_shapes, engine_bytes, format_in

    found = Bundle.look(path)
    check_shapes(found, model.spec)
    engines = engine_bytes(found, model.spec.vae, card)
    held = format_in(found.manifest)
    if held is None:
        return model._replace(engines=engines)
    name = held.partition("/")[0]
    if precision not in ("auto", name):
        raise UsageError(f"precision {precision} asked; the bundle {path} is in {name}")
    return _Model(model.spec, held, engines=engines, vae_int8=model.vae_int8)


def _request(spec: WanSpec, task: str, **settings: Any) -> Request:
    """With the pictures that the task needs, of the shape that is asked for."""
    needed = NEEDS.get(spec.task if task == "auto" else task, ())
    config = GenerateConfig("", task=task, **dict.fromkeys(needed, "a picture"), **settings)
    request = resolve(config, spec)
    return size_for(request, spec, request.width, request.height)


def _lora_bytes(given: list[str], model: _Model) -> int:
    """What they keep on the device, at most; reads headers. Raises FormatError."""
    loras = parse_loras(given)
    if not loras:
        return 0
    from wanrt.loras import Shelf

    shelf = Shelf(model.spec)
    shelf.check(loras)
    return shelf.num_bytes(loras, FORMATS[model.format].other)


def show(plan: Plan, console: Console) -> None:
    """The plan as a table and what it means."""
    columns, engines = _COLUMNS, plan.question.engines != NATIVE
    if engines:
        columns = (*columns[:-2], "workspace", *columns[-2:])
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in plan.phases:
        numbers = (phase.weights, phase.ring, phase.streamed, phase.activations, phase.caches)
        numbers += (phase.workspace,) * engines
        peak = gib(plan.fixed + phase.peak)
        host = gib(phase.host) if phase.host else "-"
        table.add_row(phase.name, *(gib(n) if n else "-" for n in numbers), peak, host)
    console.print(table, highlight=False)
    for line in summary(plan):
        console.print(line, highlight=False, soft_wrap=True)


def summary(plan: Plan) -> list[str]:
    """Sentences under the table."""
    step, decode = plan.placement("step"), plan.work("decode")
    budget = "no budget" if plan.budget is None else f"budget {gib(plan.budget)}"
    lines = [
        f"{plan.model} {plan.ask.width}x{plan.ask.height}, {plan.ask.num_frames} frames,"
        f" {plan.precision}{_vae_words(plan)}: peak {gib(plan.peak)} of {budget},"
        f" {gib(plan.fixed)} of it held by the process itself"
    ]
    ram = plan.question.ram
    if plan.host and ram is not None:
        lines.append(
            f"host memory: {gib(plan.host)} for the device and {gib(HOST_FIXED)} for the process"
            f" itself, of {gib(ram)}"
        )
    if plan.ask.text_rows < plan.question.spec.dit.text_len:
        lines.append(f"text: {plan.ask.text_rows} tokens at most, prompt and negative alike")
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


def _vae_words(plan: Plan) -> str:
    """What is said of the VAE where it is not as usual."""
    form, question = plan.question.vae_format, plan.question
    usual = question.machine.usual_vae(FORMATS[question.precision])
    return "" if form == usual else f", VAE {form.name.partition('/')[0]}"


def record(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; bytes."""
    phases = [asdict(phase) | {"peak": plan.fixed + phase.peak} for phase in plan.phases]
    return {
        "model": plan.model,
        "precision": plan.precision,
        "vae_precision": plan.question.vae_format.name.partition("/")[0],
        **asdict(plan.ask),
        "budget": plan.budget,
        "fixed": plan.fixed,
        "peak": plan.peak,
        "host": plan.host,
        "ram": plan.question.ram,
        "guidance": plan.guidance,
        "keep": plan.keep,
        "phases": phases,
        "placement": asdict(plan.placement("step")),
        "decode": asdict(plan.work("decode")),
    }


def main(args: list[str] | None) -> None:
    """This verb alone."""
    app = new_app()
    app.callback()(lambda: None)
    app.command()(plan)
    run(app, args)
