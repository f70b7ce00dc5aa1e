"""The command line: parse, call, print. Progress goes to stderr, results to stdout."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wanrt import (
    cli_bundle,
    cli_export,
    cli_machine,
    cli_plan,
    cli_provenance,
    cli_quantize,
    cli_tools,
    command,
)
from wanrt.clock import TOTAL, Clock
from wanrt.conditions import prepare_inputs
from wanrt.config import GenerateConfig
from wanrt.errors import UsageError
from wanrt.media.marking import Marking, Saved
from wanrt.media.saving import Marker
from wanrt.memory.budget import gib
from wanrt.memory.meter import Meter, metered
from wanrt.memory.plan import Plan
from wanrt.pipeline import Pipeline, Run
from wanrt.progress import Bars
from wanrt.tasks.limits import round_frames
from wanrt.tasks.sizes import parse_size

app = command.new_app()

_INPUTS, _MODEL, _SAMPLING, _OUTPUT = "Inputs", "Model", "Sampling", "Output"


def _choices(name: str, *values: str) -> type[StrEnum]:
    return StrEnum(name, {v.replace("+", "p").replace("-", "_"): v for v in values})


Task = _choices("Task", "auto", "t2v", "t2i", "i2v", "flf2v", "vace")
Solver = _choices("Solver", "unipc", "dpm++", "euler")
Precision = _choices("Precision", "auto", "fp32", "bf16", "fp16", "fp8", "int8")
VaePrecision = _choices("VaePrecision", "auto", "fp32", "bf16", "fp16", "fp16-accumulate", "int8")
Device = _choices("Device", "auto", "cuda", "cpu")
EngineName = _choices("EngineName", "native", "onnxruntime", "tensorrt-rtx")
Noise = _choices("Noise", "cpu", "cuda")
Codec = _choices("Codec", "h264", "hevc", "av1")
Extend = _choices("Extend", "after", "before")


def _in(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True)
class Job:
    """One video to make and where it goes."""

    prompt: str
    seed: int
    out: Path


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to show.", show_default=False)] = None,
    out: Annotated[Path, _in(_OUTPUT, ".mp4, or .png for one image.", "-o", "--out")] = Path(
        "out.mp4"
    ),
    model: Annotated[str, _in(_MODEL, "An id, a folder, a file or a repository (nano).")] = "nano",
    text_encoder: Annotated[Path | None, _in(_MODEL, "Its file or folder, if apart.")] = None,
    vae: Annotated[Path | None, _in(_MODEL, "Its file or folder, if apart.")] = None,
    clip_vision: Annotated[Path | None, _in(_MODEL, "Its file or folder, if apart.")] = None,
    low_noise_model: Annotated[Path | None, _in(_MODEL, "The second expert of A14B.")] = None,
    lora: Annotated[list[str] | None, _in(_MODEL, "FILE[:WEIGHT[:high|low]]; repeatable.")] = None,
    task: Annotated[Task, _in(_INPUTS, "Usually clear from model and inputs.")] = Task.auto,
    image: Annotated[Path | None, _in(_INPUTS, "First frame.")] = None,
    last_image: Annotated[Path | None, _in(_INPUTS, "Last frame.")] = None,
    video: Annotated[Path | None, _in(_INPUTS, "VACE: video to control or edit by.")] = None,
    mask: Annotated[Path | None, _in(_INPUTS, "VACE: image or video, white is made anew.")] = None,
    ref: Annotated[list[Path] | None, _in(_INPUTS, "VACE: reference image; repeatable.")] = None,
    outpaint: Annotated[str | None, _in(_INPUTS, "VACE: as left,right:0.25.")] = None,
    extend: Annotated[Extend | None, _in(_INPUTS, "VACE: go on after --video, or before.")] = None,
    context_scale: Annotated[float, _in(_INPUTS, "VACE: strength (1).")] = 1.0,
    size: Annotated[str | None, _in(_SAMPLING, "WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, _in(_SAMPLING, "4n+1; 1 is an image.")] = None,
    round_: Annotated[bool, _in(_SAMPLING, "Take the nearest legal --frames.", "--round")] = False,
    fps: Annotated[int | None, _in(_SAMPLING, "Frames per second.")] = None,
    steps: Annotated[int | None, _in(_SAMPLING, "Denoising steps.")] = None,
    guidance: Annotated[float | None, _in(_SAMPLING, "1 switches it off.")] = None,
    guidance_low: Annotated[float | None, _in(_SAMPLING, "Of the low-noise expert.")] = None,
    flow_shift: Annotated[float | None, _in(_SAMPLING, "Of the noise schedule.")] = None,
    solver: Annotated[Solver, _in(_SAMPLING, "unipc, dpm++ or euler (unipc).")] = Solver.unipc,
    distilled: Annotated[bool, _in(_SAMPLING, "Schedule of 4-step models.", "--distilled")] = False,
    preset: Annotated[str | None, _in(_SAMPLING, "Of a distilled LoRA: lightx2v-4step ...")] = None,
    seed: Annotated[list[int] | None, _in(_SAMPLING, "Repeatable; random if absent.")] = None,
    noise: Annotated[Noise, _in(_SAMPLING, "Generator of the noise (cpu).")] = Noise.cpu,
    negative: Annotated[str | None, _in(_SAMPLING, 'What not to show; "" for nothing.')] = None,
    prompts: Annotated[Path | None, _in(_INPUTS, "A file with one prompt per line.")] = None,
    precision: Annotated[
        Precision, _in(_MODEL, "auto, fp32, bf16, fp16, fp8 or int8.")
    ] = Precision.auto,
    vae_precision: Annotated[
        VaePrecision, _in(_MODEL, "auto, fp32, bf16, fp16, fp16-accumulate or int8.")
    ] = VaePrecision.auto,
    device: Annotated[Device, _in(_MODEL, "auto, cuda or cpu.")] = Device.auto,
    engine: Annotated[
        EngineName, _in(_MODEL, "native, onnxruntime or tensorrt-rtx.")
    ] = EngineName.native,
    bundle: Annotated[Path | None, _in(_MODEL, "Its graphs, if apart from the model.")] = None,
    vram: Annotated[str | None, _in(_MODEL, "Budget on the device, as 8G.")] = None,
    ram: Annotated[str | None, _in(_MODEL, "Budget of host memory, as 32G.")] = None,
    codec: Annotated[Codec, _in(_OUTPUT, "h264, hevc or av1 (h264).")] = Codec.h264,
    crf: Annotated[int | None, _in(_OUTPUT, "Quality, lower is better.")] = None,
    marking: Annotated[cli_provenance.Mode, cli_provenance.MODE_OPTION] = (
        cli_provenance.Mode.required
    ),
    key: Annotated[Path | None, cli_provenance.KEY_OPTION] = None,
    tsa: Annotated[str | None, cli_provenance.TSA_OPTION] = None,
    ledger: Annotated[Path | None, cli_provenance.LEDGER_OPTION] = None,
    record_prompt: Annotated[bool, cli_provenance.PROMPT_OPTION] = False,
    offline: Annotated[bool, _in(_MODEL, "Never download.", "--offline")] = False,
    as_json: Annotated[bool, _in(_OUTPUT, "One JSON object per video.", "--json")] = False,
    overwrite: Annotated[bool, _in(_OUTPUT, "Overwrite the output.", "-y", "--yes")] = False,
) -> None:
    """Make a video (or an image) from a prompt, pictures or a video."""
    width, height = parse_size(size)
    settings = {
        "negative": negative,
        "task": str(task),
        "width": width,
        "height": height,
        "num_frames": round_frames(frames) if round_ and frames is not None else frames,
        "fps": fps,
        "num_steps": steps,
        "guidance": guidance,
        "guidance_low": guidance_low,
        "flow_shift": flow_shift,
        "solver": str(solver),
        "distilled": distilled,
        "preset": preset,
        "noise": str(noise),
        "image": image,
        "last_image": last_image,
        "video": video,
        "mask": mask,
        "refs": tuple(ref or ()),
        "outpaint": outpaint,
        "extend": extend and str(extend),
        "context_scale": context_scale,
    }
    jobs = list(_jobs(_read_prompts(prompt, prompts), seed or [-1], out))
    clock = context.find_object(Clock) or Clock()
    clock.rest("start")
    marker = Marker(Marking(str(marking), key, tsa, ledger, record_prompt), clock)
    for job in jobs:
        marker.check(job.out, str(codec), crf, overwrite)
    with Bars(quiet=as_json) as bars:
        pipe = Pipeline.load(
            model,
            text_encoder=text_encoder,
            vae=vae,
            clip=clip_vision,
            low_noise=low_noise_model,
            loras=lora or (),
            precision=str(precision),
            vae_precision=str(vae_precision),
            device=str(device),
            engine=str(engine),
            bundle=bundle,
            vram=vram,
            ram=ram,
            offline=offline,
            report=bars.report,
        )
        configs = [GenerateConfig(job.prompt, seed=job.seed, **settings) for job in jobs]
        requests = [pipe.check(config) for config in configs]
        settled, inputs = prepare_inputs(configs[0], requests[0], pipe.spec)  # alike for all jobs
        for job in jobs:
            marker.check(job.out, str(codec), crf, overwrite, settled.num_frames)
        plan = pipe.plan(settled, refs=len(inputs.refs))
        if plan is not None and not as_json:
            cli_plan.show(plan, Console(stderr=True, width=cli_plan.WIDE))
        clock.rest("open")
        pipe.components.clock = clock
        with metered(pipe.components.device) if plan else nullcontext(Meter()) as meter:
            pipe.encode_prompts([text for r in requests for text in r.prompts])
            clock.rest("text")
            for job in jobs:
                run = pipe.start(job.prompt, seed=job.seed, clock=clock, **settings)
                latents = pipe.denoise(run, on_step=bars.on_step)
                frames = pipe.decode(run, latents)
                fps, marker.clock = run.request.fps, clock
                saved = marker.save(frames, job.out, fps, str(codec), crf, overwrite, run.origin)
                bars.finish()
                _print_result(saved, run, plan, meter, as_json)
                clock = Clock()


app.command()(cli_plan.plan)
app.command()(cli_quantize.quantize)
app.command()(cli_export.export)
cli_tools.add_to(app)
cli_machine.add_to(app)
cli_provenance.add_to(app)
cli_bundle.add_to(app)


def _jobs(prompts: list[str], seeds: list[int], out: Path) -> Iterator[Job]:
    """Every prompt with every seed; several results are numbered out-001, out-002, ..."""
    several = len(prompts) * len(seeds) > 1
    if several and not out.name:
        raise UsageError(f"the output name {str(out)!r} is a folder (add a file name)")
    pairs = ((p, s) for p in prompts for s in seeds)
    for number, (prompt, seed) in enumerate(pairs, start=1):
        name = f"{out.stem}-{number:03d}{out.suffix}"
        yield Job(prompt, seed, out.with_name(name) if several else out)


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise UsageError("give one prompt, or --prompts FILE with one prompt per line")
    if file is None:
        return [prompt or ""]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompts in {file}: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"{file} holds no prompt")
    return found


def _print_result(saved: Saved, run: Run, plan: Plan | None, meter: Meter, as_json: bool) -> None:
    """plan: that of the prompts of all jobs, which were encoded before the first."""
    request, timings = run.request, run.clock.timings()
    planned = plan and run.plan and max(plan.peak, run.plan.peak)
    if as_json:
        result = {"path": str(saved.path), **asdict(request)}
        result["timings"] = {phase: round(value, 3) for phase, value in timings.items()}
        result["steps"] = [round(value, 3) for value in run.steps]
        result["cold"] = run.clock.cold
        result["memory"] = planned and {
            "planned": planned,
            "measured": meter.peak,
            "of": "card" if meter.whole_card else "process",
        }
        result["provenance"] = cli_provenance.record(saved)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    print(
        f"{saved.path}: {request.width}x{request.height}, {request.num_frames} frames, "
        f"seed {request.seed}, {request.num_steps} steps of {request.solver}, "
        f"guidance {request.guidance:g}, {timings[TOTAL]:.1f} s"
        + (f", peak {gib(meter.peak)} of {gib(planned)} planned" if planned else "")
        + (" (what other programs hold is in it)" if planned and meter.whole_card else "")
        + f"; {cli_provenance.marks_of(saved)}",
        flush=True,
    )


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    command.run(app, args)
