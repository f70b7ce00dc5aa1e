"""The verbs for people who look inside: inspect, dev random-weights, bench."""

import json
import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wanrt import cli_bundle
from wanrt.config import MODELS, WanSpec
from wanrt.engine.manifest import is_bundle
from wanrt.errors import UsageError
from wanrt.identity import identify
from wanrt.loras import match
from wanrt.tasks.sizes import parse_size
from wanrt.weights.detect import KIND_NAMES, Detected, describe
from wanrt.weights.hub import resolve_model
from wanrt.weights.layouts import Layout
from wanrt.weights.names import Kind
from wanrt.weights.parts import find_parts
from wanrt.weights.random import write_random

_WIDE = 1000  # columns: nothing is cut off, the terminal wraps
_DTYPES = ("fp32", "bf16", "fp16", "fp8", "fp8_scaled")


def inspect(
    path: Annotated[str, typer.Argument(help="A file, a folder, an id or a repository.")],
    offline: Annotated[bool, typer.Option("--offline", help="Never download.")] = False,
    model: Annotated[str | None, typer.Option(help="Which keys of a LoRA match it?")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per model.")] = False,
) -> None:
    """Say what a checkpoint, a LoRA or a bundle is; reads headers only."""
    where = resolve_model(path, offline=offline)
    if is_bundle(where):
        cli_bundle.list_members(where, as_json)
        return
    found = describe(where)
    spec = None if model is None else _spec_of(model, offline)
    matches = {one.path: match(one.path, spec) for one in found if spec and one.kind == "lora"}
    if as_json:
        for one in found:
            held = (
                {"matches": [m._asdict() for m in matches[one.path]]} if one.path in matches else {}
            )
            print(json.dumps(_record(one) | held, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("what", "kind", "precision", "layout", "parameters", "size", "path"):
        table.add_column(column, justify="right" if column in ("parameters", "size") else "left")
    for one in found:
        cells = (
            one.title + (f" ({one.note})" if one.note else ""),
            re.sub(r"^an? ", "", KIND_NAMES[one.kind]),
            one.precision or "",
            f"{one.layout or ''} {one.container}".strip(),
            f"{one.num_params:,}",
            f"{one.num_bytes / 2**30:.2f} GiB"
            if one.num_bytes >= 2**28
            else f"{one.num_bytes / 2**20:.1f} MiB",
            str(one.path),
        )
        table.add_row(*map(Text, cells))  # as they are: a path may look like markup
    Console(width=_WIDE).print(table, highlight=False, soft_wrap=True)
    for where, held in matches.items():
        for one in held:
            of = "" if spec.boundary is None else f", {one.expert} noise"
            print(f"{where}: changes {len(one.weights)} weights of {spec.title}{of}")
            for key in one.unmatched:
                print(f"  no place for {key}")


def _spec_of(model: str, offline: bool) -> WanSpec:
    """Of a model by its id, or of one that lies somewhere; reads headers."""
    if model in MODELS:
        return MODELS[model]
    path = resolve_model(model, offline=offline)
    parts = find_parts(path)
    parts.require("dit")
    return identify(parts.found["dit"], parts.low_noise is not None, f"{model} {path} {parts.dit}")


def _record(found: Detected) -> dict[str, Any]:
    spec = asdict(found.spec) if is_dataclass(found.spec) else None
    return {
        "path": str(found.path),
        "kind": found.kind,
        "title": found.title,
        "precision": found.precision,
        "layout": found.layout,
        "container": found.container,
        "parameters": found.num_params,
        "bytes": found.num_bytes,
        "spec": spec,
        "note": found.note,
    }


def random_weights(
    variant: Annotated[str, typer.Option(help="An id such as t2v-1.3B or wan2.2-ti2v-5b.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    layout: Annotated[str, typer.Option(help="original, diffusers or comfyui.")] = "original",
    parts: Annotated[str, typer.Option(help="Which parts.")] = "dit,umt5,vae,clip",
    dtype: Annotated[str | None, typer.Option(help=", ".join(_DTYPES) + "; as released.")] = None,
    seed: Annotated[int, typer.Option(help="Of the values.")] = 0,
) -> None:
    """Write a checkpoint of true shapes and random values, to measure without a download."""
    write_random(
        variant,
        _one_of("layout", layout, get_args(Layout)),
        out,
        components=[_one_of("part", part, get_args(Kind)) for part in parts.split(",")],
        precision=dtype and _one_of("dtype", dtype, _DTYPES),
        seed=seed,
    )
    print(out)


def _one_of(what: str, value: str, legal: tuple[str, ...]) -> Any:
    if value not in legal:
        raise UsageError(f"{what} {value!r} does not exist; choose of {', '.join(legal)}")
    return value


def bench_vae(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    peer: Annotated[str | None, typer.Option(help="diffusers, fastvae, or nothing.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or both as fp32,bf16.")] = "fp32,bf16",
    sizes: Annotated[str, typer.Option(help="Frame sizes.")] = "64x64,96x96",
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """Decode 9 frames with the true-size VAE 2.1, alternating with the peer."""
    from wanrt.bench import vae

    vae.main(device, peer, dtype.split(","), sizes.split(","), repeats, as_json)


def bench_block(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    peer: Annotated[str | None, typer.Option(help="diffusers, fastvae, or nothing.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or both as fp32,bf16.")] = "fp32,bf16",
    tokens: Annotated[int, typer.Option(help="Sequence length.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """One transformer block of the 1.3B, alternating with the peer."""
    from wanrt.bench import block

    block.main(device, peer, dtype.split(","), tokens, repeats, as_json)


def bench_chain(
    sizes: Annotated[str, typer.Option(help="Of the decoded frames.")] = "832x480,1280x720",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """Residual blocks of the VAE's decoder, alternating with diffusers' and cuDNN's."""
    from wanrt.bench import chain

    chain.main(device, sizes.split(","), repeats, as_json)


def bench_model(
    variant: Annotated[str, typer.Option("--model", help="An id.")] = "wan2.1-t2v-1.3b",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "832x480",
    frames: Annotated[int, typer.Option(help="4n+1.")] = 81,
    blocks: Annotated[int | None, typer.Option(help="The first so many; all.")] = None,
    precision: Annotated[str, typer.Option(help="As bf16,int8.")] = "bf16,int8,fp8",
    peer: Annotated[str, typer.Option(help="diffusers, compile, or both as a,b.")] = "",
    lora: Annotated[bool, typer.Option(help="With a LoRA on every product, too.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """One forward of a transformer in each precision, alternating with diffusers'."""
    from wanrt.bench import model

    precisions, peers = (tuple(filter(None, text.split(","))) for text in (precision, peer))
    asked = (variant, size, frames, blocks, precisions, peers, lora, device, repeats)
    model.main(model.Settings(*asked), as_json)


def bench_vram(
    variant: Annotated[str, typer.Option("--model", help="An id.")] = "wan2.1-t2v-1.3b",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "832x480",
    frames: Annotated[int, typer.Option(help="4n+1.")] = 81,
    blocks: Annotated[int | None, typer.Option(help="The first so many; all.")] = None,
    precision: Annotated[str, typer.Option(help="As for generate.")] = "bf16",
    budgets: Annotated[str, typer.Option(help="As 5G,4G.")] = "5G,4G",
    steps: Annotated[int, typer.Option(help="Timed ones.", min=2)] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """A request within budgets beside one without: peaks, planned and measured, and time."""
    from wanrt.bench import vram

    asked = (variant, size, frames, blocks, precision, tuple(budgets.split(",")), steps, device)
    vram.main(vram.Settings(*asked), as_json)


def bench_e2e(
    model: Annotated[str, typer.Option(help="nano, or an id: random weights then.")] = "nano",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="4n+1; the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="The model's.")] = None,
    peer: Annotated[str | None, typer.Option(help="diffusers, or nothing.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; the model's.")] = None,
    repeats: Annotated[int, typer.Option(help="Processes of each side.", min=1)] = 3,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Page to put it into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Whole requests, cold and warm, phase by phase, alternating with the peer."""
    from wanrt.bench import e2e

    width, height = parse_size(size)
    asked = None if width is None else (width, height)
    settings = e2e.Settings(model, asked, frames, steps, peer, device, dtype, repeats)
    e2e.main(settings, as_json, out)


def bench_memory(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Page to put it into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """What each released model holds within 8 to 16 GiB, predicted; needs neither."""
    from wanrt.bench import memory

    memory.main(out, as_json)


def bench_compile(
    archs: Annotated[str, typer.Option(help="Such as 89 or 86,89; all by default.")] = "",
    only: Annotated[str, typer.Option(help="Cases that have this in their name.")] = "",
    workers: Annotated[int, typer.Option(help="Processes; as many as cores by default.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Markdown file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Every tile that `bench tune` tries, too.")
    ] = False,
) -> None:
    """Compile every kernel for every architecture; needs no GPU. Fails on spills and the like."""
    from wanrt.bench import compile_report

    wanted = archs.split(",") if archs else []
    compile_report.main(wanted, only, workers, out, as_json, candidates)


def bench_traffic(
    arch: Annotated[int, typer.Option(help="Compute capability: 80, 86, 89, 90, 120.")] = 89,
    only: Annotated[str, typer.Option(help="Cases that have this in their name.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Markdown file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """What every kernel asks of shared memory and of L2, counted in an emulator; needs no GPU."""
    from wanrt.bench import traffic

    traffic.main(arch, only, out, as_json)


def bench_quality(
    part: Annotated[str, typer.Option(help="layers, requests, vae, frames; all by default.")] = "",
    modes: Annotated[str, typer.Option(help="Of requests, as int8,fp8; all by default.")] = "",
    prompts: Annotated[int, typer.Option(help="Of requests, frames.", min=1, max=256)] = 256,
    record: Annotated[Path | None, typer.Option(help="Requests' clips; goes on there.")] = None,
    vae: Annotated[
        Path | None, typer.Option(help="A VAE's file; nano's, and random weights.")
    ] = None,
    size: Annotated[str, typer.Option(help="Of the random VAE's clip.")] = "48x48",
    variants: Annotated[str, typer.Option(help="Of the VAE, as bf16,int8; all by default.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Page to put it into.")] = None,
) -> None:
    """The numbers of every precision beside fp32's, on the CPU, as JSON lines."""
    from wanrt.bench import quality

    wanted = (tuple(text.split(",")) if text else () for text in (part, variants, modes))
    parts, variants_, modes_ = wanted
    quality.main(parts, quality.Settings(vae, size, variants_, modes_, prompts, record), out)


def bench_ops(
    device: Annotated[str, typer.Option(help="cuda.")] = "cuda",
    only: Annotated[str, typer.Option(help="Cases that have this in their name.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """Every op at the models' shapes, Triton's beside PyTorch's, correctness first."""
    from wanrt.bench import ops

    ops.main(device, only, as_json)


def bench_tune(
    device: Annotated[str, typer.Option(help="cuda.")] = "cuda",
    only: Annotated[str, typer.Option(help="Cases that have this in their name.")] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="JSON; else where the kernels look.")
    ] = None,
) -> None:
    """Time every tile that the kernels list on this GPU, and write the winners."""
    from wanrt.bench import tune

    tune.main(device, only, out)


def bench_engines(
    out: Annotated[Path, typer.Option(help="Folder of the engines; kept.")] = Path("dist/engines"),
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; all.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Repeatable; all.")] = None,
    jobs: Annotated[int, typer.Option(help="Builders beside the tracing.")] = 2,
    write_lock: Annotated[bool, typer.Option("--write-lock", help="Note their digests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """Build the TensorRT-RTX engines of the released models on this CPU: time, size, memory."""
    from wanrt.bench import engines
    from wanrt.export.engines import CARDS, IDS

    engines.main(out, model or list(IDS), precision or list(CARDS), jobs, write_lock, as_json)


def bench_gpu(
    only: Annotated[str, typer.Option(help="Slices, as vram,tune; all of them.")] = "",
    cases: Annotated[str, typer.Option(help="Ops and tests with this in their name.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON lines; appended.")] = None,
) -> None:
    """Compile, test and measure on this machine's GPU, in slices, within nine minutes."""
    from wanrt.bench import gpu

    gpu.main(only, cases, out)


def bench_watermark(
    videos: Annotated[list[Path] | None, typer.Option("--video", help="A further clip.")] = None,
    only: Annotated[str, typer.Option(help="Clips that have this in their name.")] = "",
    crops: Annotated[int, typer.Option(help="Unmarked ones, for false alarms.", min=0)] = 2000,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Page to put it into.")] = None,
) -> None:
    """Which attacks the watermark withstands, on clips that it was not tuned on; JSON lines."""
    from wanrt.bench import watermark

    watermark.main(videos or [], only, crops, out)


def add_to(app: typer.Typer) -> None:
    """Register these verbs."""
    app.command()(inspect)
    dev = typer.Typer(no_args_is_help=True, help="For people who work on wanrt.")
    dev.command("random-weights")(random_weights)
    app.add_typer(dev, name="dev")
    bench = typer.Typer(no_args_is_help=True, help="Measure, beside a peer, in one run.")
    bench.command("vae")(bench_vae)
    bench.command("block")(bench_block)
    bench.command("e2e")(bench_e2e)
    bench.command("memory")(bench_memory)
    bench.command("compile")(bench_compile)
    bench.command("traffic")(bench_traffic)
    bench.command("ops")(bench_ops)
    bench.command("chain")(bench_chain)
    bench.command("model")(bench_model)
    bench.command("vram")(bench_vram)
    bench.command("quality")(bench_quality)
    bench.command("tune")(bench_tune)
    bench.command("engines")(bench_engines)
    bench.command("gpu")(bench_gpu)
    bench.command("watermark")(bench_watermark)
    app.add_typer(bench, name="bench")
