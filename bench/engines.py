"""`wanrt bench engines`: build the set of TensorRT-RTX engines on a CPU and say what came out.

Nothing is run on a card. Sizes are the engines' own; memory is what the builder states: at the
largest sizes of an engine, and at those of 81 frames of 832x480 (VAE 2.2: 1280x704). Seconds are
the builder's, without tracing. Attention: one kernel, or the scores in memory, by that memory.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from wanrt.bench.measure import machine
from wanrt.errors import UsageError
from wanrt.export import engine_set, engines, lock


def main(
    out: Path,
    models: list[str],
    precisions: list[str],
    workers: int,
    write_lock: bool,
    as_json: bool,
) -> None:
    """Build what is missing in `out`; a row per part, or with `as_json` a line per engine."""
    for what, given, legal in (
        ("model", models, engines.IDS),
        ("precision", precisions, tuple(engines.CARDS)),
    ):
        for name in given:
            if name not in legal:
                raise UsageError(f"{what} {name!r} is not in the set; choose of {', '.join(legal)}")
    out.mkdir(parents=True, exist_ok=True)
    todo = engines.jobs(models, precisions)
    records = engine_set.build_set(out, todo, lambda line: print(line, file=sys.stderr), workers)
    if as_json:
        about = machine("cpu")
        for record in records:
            print(json.dumps({"bench": "engines"} | asdict(record) | about))
    else:
        print("\n".join(table(records)))
    if write_lock:
        lock.write(records)
    elif lock.FILE.exists():
        _compare(records)


def table(records: list[engine_set.Record]) -> Iterator[str]:
    """Markdown, a row for each part of a model in a precision; of its cards the largest numbers."""
    yield "| model | part | precision | cards | engine | memory | usual | build | attention |"
    yield "|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[engine_set.Record]] = {}
    for record in records:
        groups.setdefault(record.key[:3], []).append(record)
    for key, rows in groups.items():
        cards = " ".join(str(row.card) for row in rows)
        size = max(row.size for row in rows) / 1e6
        memory = max(row.workspace for row in rows) / 1e6
        usual = max(row.usual for row in rows) / 1e6
        seconds = max(row.seconds for row in rows)
        fused = {None: "", True: "one kernel", False: "NOT fused"}[rows[0].fused]
        numbers = f"{size:.2f} MB | {memory:,.0f} MB | {usual:,.0f} MB | {seconds:.1f} s"
        yield f"| {' | '.join(key)} | {cards} | {numbers} | {fused} |"
    total = sum(record.size for record in records) / 1e6
    yield ""
    yield f"{len(records)} engines, {total:.0f} MB."


def _compare(records: list[engine_set.Record]) -> None:
    held = lock.read()
    if held.tools != lock.tools():
        there = ", ".join(sorted(set(held.tools) - set(lock.tools())))
        print(f"not compared with {lock.FILE.name}, which is for {there}", file=sys.stderr)
        return
    found = lock.differences(records, held)
    for line in found:
        print(f"differs from {lock.FILE.name}: {line}", file=sys.stderr)
    if not found:
        print(f"as in {lock.FILE.name}", file=sys.stderr)
