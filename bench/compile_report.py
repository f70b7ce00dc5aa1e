"""`wanrt bench compile`: the compile gate on the command line, its table and its verdict."""

import json
from dataclasses import asdict
from pathlib import Path

from wanrt.bench.compile import ARCHS, compile_all, table
from wanrt.errors import UsageError, WanrtError


def main(
    archs: list[str],
    only: str,
    workers: int,
    out: Path | None,
    as_json: bool,
    candidates: bool = False,
) -> None:
    """Compile, print, and raise WanrtError where a kernel is not what it was meant to be."""
    for arch in archs:
        if not arch.isdecimal() or int(arch) not in ARCHS:
            raise UsageError(f"arch {arch!r} is not known; choose of {', '.join(map(str, ARCHS))}")
    rows = compile_all([int(arch) for arch in archs] or ARCHS, only, workers or None, candidates)
    if not rows:
        raise UsageError(f"no kernel case has {only!r} in its name; `wanrt ops` lists the ops")
    text = table(rows)
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    elif out is None:
        print(text)
    if out is not None:
        out.write_text(text + "\n")
    faults = [f"{r.kernel} ({r.case}, sm_{r.arch}): {f}" for r in rows for f in r.faults]
    if faults:
        raise WanrtError("\n".join(faults))
