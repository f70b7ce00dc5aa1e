"""`wanrt bench e2e`: whole requests, from the start of a process to the file, phase by phase.

Each side runs in fresh processes that take turns. A process makes three requests: cold (imports,
weights from their files), warm (the next prompt), and that again. The peer is diffusers'
WanPipeline on the same files, from the same noise at the same noise levels, with its
`export_to_video`; its files carry no marks. Weights may lie in the system's file cache in every
state. Never run on a GPU yet.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanrt.bench.e2e_case import STATES, Case
from wanrt.bench.measure import check_close, machine
from wanrt.bench.memory import insert
from wanrt.bench.peers import require_diffusers_requests
from wanrt.clock import TOTAL
from wanrt.conditions import noise_shape
from wanrt.config import NANO, GenerateConfig, WanSpec, find_variant
from wanrt.errors import UsageError, WanrtError
from wanrt.request import resolve
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.layouts import write_model
from wanrt.weights.load import load_component
from wanrt.weights.parts import find_parts
from wanrt.weights.random import write_random

PROMPTS = ("a red circle moving right", "a blue square moving up")
PARTS = ("dit", "umt5", "vae")
# max|a - b| / max|b| of the latents. fp32: sinusoids of t are fp64 on one side. bf16: the peer
# keeps its residual stream in bf16.
LIMITS = {"fp32": 1e-3, "bf16": 1e-1}
# Phases of the clocks, by the line that both sides share; what no line names is `other`.
LINES = {
    "start": ("start",),
    "load": ("open", "load", *(f"load {part}" for part in PARTS)),
    "text": ("text",),
    "denoise": ("prepare", "conditions", "denoise"),
    "decode": ("decode",),
    "write": ("encode",),
    "mark": ("watermark", "sign"),
}
_COMMAND = "wanrt bench e2e"

Seconds = dict[str, float]  # by line


@dataclass(frozen=True)
class Settings:
    """What to ask; None is what the model does by itself."""

    model: str = NANO.id
    size: tuple[int, int] | None = None  # width, height
    num_frames: int | None = None
    num_steps: int | None = None
    peer: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    repeats: int = 3


def main(settings: Settings, as_json: bool, out: Path | None) -> None:
    """Check, time, print a table; with `out` into that page too.

    Raises NumericsError where the two sides give different latents, UsageError.
    """
    if settings.peer not in (None, "diffusers"):
        raise UsageError(f"peer {settings.peer!r} is not known; choose diffusers or leave it out")
    if settings.peer:
        require_diffusers_requests()
    with tempfile.TemporaryDirectory(prefix="wanrt-e2e-") as folder:
        case = prepare(settings, Path(folder))
        result = measure(case, settings.peer, settings.repeats)
    about = {"bench": "e2e", "model": settings.model, "dtype": case.dtype}
    about |= {"size": f"{case.width}x{case.height}", "frames": case.num_frames}
    about |= {"steps": case.num_steps, "repeats": settings.repeats} | machine(case.device)
    text = table(result) + f"\n{', '.join(f'{key} {value}' for key, value in about.items())}.\n"
    if as_json:
        print(json.dumps(about | result))
    else:
        sys.stdout.write(text)
    if out is not None:
        insert(out, text, _COMMAND)


def prepare(settings: Settings, folder: Path) -> Case:
    """The request with nothing left open, and its weights in `folder`: nano's, or random ones."""
    spec = find_variant(settings.model)
    if spec.task != "t2v" or spec.boundary is not None:
        raise UsageError(f"{spec.id} is no model for this; take one of text to video, as {NANO.id}")
    width, height = settings.size or (None, None)
    config = GenerateConfig(
        PROMPTS[0],
        width=width,
        height=height,
        num_frames=settings.num_frames,
        num_steps=settings.num_steps,
        seed=1,
    )
    request = resolve(config, spec)
    dtype = settings.dtype or ("fp32" if spec.id == NANO.id else "bf16")
    if dtype not in LIMITS:
        raise UsageError(f"dtype {dtype!r} does not exist; choose of {', '.join(LIMITS)}")
    case = Case(
        str(folder),
        settings.device,
        dtype,
        PROMPTS,
        request.negative,
        request.width,
        request.height,
        request.num_frames,
        request.fps,
        request.num_steps,
        request.guidance,
        request.flow_shift,
        noise_shape(request, spec, num_refs=0),
    )
    _write_weights(spec, case)
    return case


def _write_weights(spec: WanSpec, case: Case) -> None:
    if spec.id == NANO.id:
        parts = find_parts(NANO_WEIGHTS)
        states = {part: load_component(getattr(parts, part), part).state_dict() for part in PARTS}

        def stored(part: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return states[part][name].to(dtype)

        write_model(spec, "diffusers", case.model, stored, components=PARTS, precision=case.dtype)
    else:
        write_random(spec.id, "diffusers", case.model, components=PARTS, precision=case.dtype)
    (case.model / "tokenizer").mkdir()
    shutil.copy(NANO_WEIGHTS / "tokenizer.json", case.model / "tokenizer")


def measure(case: Case, peer: str | None, repeats: int) -> dict[str, dict[str, Seconds] | float]:
    """Median seconds by side, state and line; with a peer the ratios, and the latents' error."""
    sides = {"wanrt": "e2e_ours"} | ({"diffusers": "e2e_diffusers"} if peer else {})
    runs: dict[str, list[dict[str, Seconds]]] = {side: [] for side in sides}
    result: dict[str, dict[str, Seconds] | float] = {}
    for turn in range(repeats):
        for side, module in sides.items():
            runs[side].append(_run(module, case))
        if peer and not turn:
            ours, theirs = (torch.load(case.latents(side), weights_only=True) for side in sides)
            result["error"] = check_close("latents", ours, theirs, LIMITS[case.dtype])
    for side, found in runs.items():
        result[side] = {state: _median([run[state] for run in found]) for state in STATES}
    if peer:
        result["ratio"] = {state: _ratios(result, state) for state in STATES}
    return result


def _run(module: str, case: Case) -> dict[str, Seconds]:
    """One process; seconds by state and line. Raises WanrtError with what it said last."""
    command = [sys.executable, "-m", f"wanrt.bench.{module}", case.to_argument()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WanrtError(f"{module} failed: {done.stderr.strip()[-2000:]}")
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["state"]: _lines(one["timings"]) for one in told}


def _lines(timings: Seconds) -> Seconds:
    named = {line: sum(timings.get(p, 0.0) for p in phases) for line, phases in LINES.items()}
    total = timings[TOTAL]
    return named | {"other": total - sum(named.values()), "total": total}


def _median(runs: list[Seconds]) -> Seconds:
    """Line by line; the lines' medians need not add up to the total's."""
    return {line: statistics.median(run[line] for run in runs) for line in runs[0]}


def _ratios(result: dict, state: str) -> Seconds:
    """Ours by theirs, for the lines that both have."""
    ours, theirs = (result[side][state] for side in ("wanrt", "diffusers"))
    both = [line for line in ours if line not in ("mark", "other") and theirs[line] > 0.0]
    return {line: ours[line] / theirs[line] for line in both}


def table(result: dict) -> str:
    """Markdown: a line per phase, each state of each side, ratios last."""
    sides = [side for side in ("wanrt", "diffusers") if side in result]
    columns = [(side, state) for side in sides for state in STATES]
    head = ["seconds", *(f"{side} {state}" for side, state in columns)]
    head += [f"ratio {state}" for state in STATES] if "ratio" in result else []
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for line in result["wanrt"]["cold"]:
        cells = [f"{result[side][state][line]:.2f}" for side, state in columns]
        if "ratio" in result:
            ratios = (result["ratio"][state].get(line) for state in STATES)
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append(f"| {line} | {' | '.join(cells)} |")
    if "error" in result:
        rows += ["", f"Relative error of the latents: {result['error']:.1e}."]
    return "\n".join(rows) + "\n"
