"""The table of docs/memory.md: what each released model holds within each budget, predicted."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wanrt.config import MODELS
from wanrt.errors import BudgetError
from wanrt.memory.budget import GIB, gib
from wanrt.memory.placement import TEXT_ROWS, TYPICAL, Ask
from wanrt.memory.plan import Plan, plan_for_any_text
from wanrt.memory.question import Question

BUDGETS = (8, 10, 12, 16)  # GiB
PRECISIONS = ("bf16", "fp8", "int8")
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
NUM_FRAMES = 81
RAM = 32 * GIB


class Row(NamedTuple):
    """One model, size and precision: the least budget, and the peak within each; GiB.

    None where nothing fits.
    """

    model: str
    size: str
    precision: str
    least: float
    peaks: tuple[float | None, ...]
    notes: tuple[str, ...]


def rows() -> Iterator[Row]:
    """Every released model; nano needs no table."""
    for spec in MODELS.values():
        if spec.id == "nano":
            continue
        for name, (width, height) in SIZES.items():
            side = spec.vae.spatial_stride * 2
            ask = Ask(width, height // side * side, NUM_FRAMES, image=spec.task != "t2v")
            for precision in PRECISIONS:
                question = Question(spec, ask, precision, RAM)
                plans = [_plan(question, budget * GIB) for budget in BUDGETS]
                peaks = tuple(None if p is None else round(p.peak / GIB, 2) for p in plans)
                least = math.ceil(question.least() / GIB * 100) / 100
                yield Row(spec.id, name, precision, least, peaks, tuple(map(_note, plans)))


def _plan(question: Question, budget: int) -> Plan | None:
    try:
        return plan_for_any_text(question, budget)
    except BudgetError:
        return None


def _note(plan: Plan | None) -> str:
    """s: blocks stream; f: some come from their file; b: the VAE works in bands; h: its caches are
    in host memory; t and a number: longer texts do not fit."""
    if plan is None:
        return ""
    step, work = plan.placement("step"), plan.work("decode")
    marks = {"s": step.slots, "f": step.mapped, "b": work.band, "h": work.host}
    shorter = f" t{plan.ask.text_rows}" if plan.ask.text_rows < TEXT_ROWS else ""
    return ("".join(mark for mark, there in marks.items() if there) + shorter).strip()


def markdown() -> str:
    """The table, with what it assumes above it."""
    head = ["model", "size", "precision", "least", *(f"{budget} GiB" for budget in BUDGETS)]
    lines = [
        f"{NUM_FRAMES} frames, both texts, {TEXT_ROWS} tokens of text, {RAM // GIB} GiB of host "
        f"memory; predicted, {gib(TYPICAL.fixed)} of each peak for what is no tensor.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for row in rows():
        cells = [
            "does not fit" if peak is None else f"{peak:.2f}" + (f" ({note})" if note else "")
            for peak, note in zip(row.peaks, row.notes, strict=True)
        ]
        cells = [row.model, row.size, row.precision, f"{row.least:.2f}", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(out: Path | None, as_json: bool) -> None:
    """Print the table, or write it between the marks of a Markdown file."""
    if as_json:
        for row in rows():
            print(json.dumps(row._asdict()))
    elif out is None:
        sys.stdout.write(markdown())
    else:
        insert(out, markdown())


def insert(path: Path, table: str, command: str = "wanrt bench memory") -> None:
    """Replace what stands behind the comment that names the command, up to the next `end`."""
    begin, end = f"<!-- {command} -->\n", "<!-- end -->\n"
    before, found, rest = path.read_text().partition(begin)
    assert found, f"{path} has no line {begin!r}"
    path.write_text(before + begin + table + end + rest.partition(end)[2])
