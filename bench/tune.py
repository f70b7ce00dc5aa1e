"""`wanrt bench tune`: time every tile that a kernel lists, on this card, and write the winners.

For each key that a kernel picks a tile under, the first case of `cases.py` at the models' shapes
that asks for it runs with each tile in turn, attention and the VAE's convolutions first. A tile
whose result is far from PyTorch's is not timed. `kernels/winners.py` reads the file that comes out.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanrt.bench import ops
from wanrt.bench.agreement import MIN_COSINE, expected, nearness
from wanrt.bench.measure import faults, machine, reason, time_alternating
from wanrt.errors import NumericsError, UsageError
from wanrt.kernels import registry, winners
from wanrt.kernels.cases import Case, all_cases
from wanrt.kernels.launch import record

Timer = Callable[[dict[str, Callable[[], Any]], str], dict[str, float]]

# Ops by what a request's seconds depend on: a run that is cut off has asked about the first.
_ORDER = (
    "attention_int8",
    "causal_conv3d_int8",
    "causal_conv3d",
    "upsample_conv2d",
    "linear_quantized_out",
    "linear_gated_residual",
    "linear_quantized",
    "attention_int8_fp8",
    "attention",
)


class Question(NamedTuple):
    """A key, the tiles its kernel lists, and the case that asks."""

    key: str
    tiles: Sequence[tuple[int, ...]]
    case: Case
    dtype: torch.dtype


@dataclass(frozen=True)
class Answer:
    """Median seconds of each tile that was right, fastest first; what was wrong with others."""

    question: Question
    seconds: dict[tuple[int, ...], float]
    faults: tuple[str, ...]


def main(device: str, only: str, out: Path | None) -> None:
    """Tune and write. Raises UsageError without a GPU, NumericsError where nothing was right."""
    if device != "cuda" or not torch.cuda.is_available():
        raise UsageError("tiles are timed on an NVIDIA GPU (--device cuda); there is none here")
    card = torch.cuda.get_device_name()
    answers = []
    for answer in tune(questions(only), "cuda"):
        print(line(answer), flush=True)
        answers.append(answer)
    print(f"written to {write(answers, card, out or default_path(card))}")


def default_path(card: str) -> Path:
    """Where the kernels look for this card's winners."""
    return winners.FOLDER / f"{winners.slug(card)}.json"


def questions(only: str = "", size: str = "wan", device: str = "cuda") -> list[Question]:
    """What kernels ask in the cases of a size, each key once, where there is more than one tile.

    Nothing runs: the cases are drawn on the meta device.
    """
    found: dict[str, Question] = {}
    for case in sorted(all_cases().values(), key=_place):
        if case.size != size or only not in case.id:
            continue
        for dtype in case.dtypes:
            target = registry.here(dtype, device, case.result)
            if registry.reason_against(case.op, "triton", target) is None:
                for key, tiles in asked(case, dtype, target.arch).items():
                    found.setdefault(key, Question(key, tiles, case, dtype))
    return [question for question in found.values() if len(set(question.tiles)) > 1]


def _place(case: Case) -> int:
    return _ORDER.index(case.op) if case.op in _ORDER else len(_ORDER)


def asked(case: Case, dtype: torch.dtype, arch: int) -> dict[str, Sequence[tuple[int, ...]]]:
    """Keys and tiles that a case's kernels ask with on a card of this compute capability."""
    with record(arch), winners.trial() as trial:
        registry.function(case.op, "triton")(*case.draw(dtype, "meta"), **case.kwargs)
    return trial.asked


def tune(
    wanted: Sequence[Question],
    device: str,
    timer: Timer = time_alternating,
    until: float = float("inf"),
) -> Iterator[Answer]:
    """An answer to each question, until `time.monotonic()` says so."""
    for question in wanted:
        if time.monotonic() > until:
            return
        yield answer(question, device, timer)
        if device == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def answer(question: Question, device: str, timer: Timer) -> Answer:
    """Correctness first, then all right tiles take turns. Raises NumericsError where none is."""
    case, tensors = question.case, question.case.draw(question.dtype, device)
    target = expected(case, tensors)
    function = registry.function(case.op, "triton")
    runs: dict[str, Callable[[], Any]] = {}
    named: dict[str, tuple[int, ...]] = {}
    wrong = []
    for tile in dict.fromkeys(question.tiles):
        name = str(tile)
        run = partial(_run, question.key, tile, function, tensors, case.kwargs)
        try:
            cosine = nearness(run(), target)
        except faults() as error:  # the card has less shared memory or fewer registers
            wrong.append(f"{name}: {reason(error)}")
            continue
        if cosine >= MIN_COSINE:
            runs[name], named[name] = run, tile
        else:
            wrong.append(f"{name}: far from PyTorch's result (cosine {cosine:.6f})")
    if not runs:
        raise NumericsError(f"{question.key}: no tile is right: {'; '.join(wrong)}")
    del target
    ranked = sorted(timer(runs, device).items(), key=lambda item: item[1])
    return Answer(question, {named[n]: seconds for n, seconds in ranked}, tuple(wrong))


def _run(
    key: str, tile: tuple[int, ...], function: Callable[..., Any], tensors: Any, kwargs: Any
) -> Tensor | tuple[Any, ...]:
    with winners.trial({key: tile}):
        return function(*tensors, **kwargs)


def write(answers: Sequence[Answer], card: str, path: Path) -> Path:
    """The file that `winners.read` takes; what one right tile answered has no runner-up: left out.

    Keys that an older file of the same card holds and that were not asked now stay.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device)
    entries = {}
    if path.exists():
        entries = {key: winner._asdict() for key, winner in winners.read(path).items()}
    for each in answers:
        if len(each.seconds) > 1:
            entries[each.question.key] = _entry(each)
    content = {
        "format": winners.FORMAT,
        "card": card,
        "torch": str(about["torch"]),
        "triton": ops.triton_version(),
        "commit": str(about["commit"]),
        "date": str(about["date"]),
        "winners": dict(sorted(entries.items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return path


def _entry(each: Answer) -> dict[str, Any]:
    (first, seconds), (second, later), *_ = each.seconds.items()
    return winners.Winner(
        tile=first._asdict(),
        case=each.question.case.id,
        median_s=seconds,
        runner_up=second._asdict(),
        runner_up_s=later,
    )._asdict()


def line(each: Answer) -> str:
    """For people: every tile that was right, in milliseconds."""
    times = ", ".join(f"{tuple(t)} {s * 1e3:.3f} ms" for t, s in each.seconds.items())
    faults = f"  ({'; '.join(each.faults)})" if each.faults else ""
    return f"{each.question.key:36} {times}{faults}"
