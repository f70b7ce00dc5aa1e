"""`wanrt bench gpu`: all that wants one NVIDIA GPU, in slices, within nine minutes.

Each slice is a process of its own, and ends with all that it started; each line of its result is on
disk before the next is made. What there is no time for says so, and can be asked for by name. A
slice that breaks ends itself and no other. Needs torch, Triton, numpy, safetensors
and pytest (more for the slices `vram` and `e2e`); with no more than these, in a checkout:
PYTHONPATH=. python3 -m wanrt.bench.gpu [SLICES [CASES]]
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from typing import Any

import torch
import triton

from wanrt.bench.gpu_slices import RESULTS, SLICES
from wanrt.bench.measure import machine
from wanrt.errors import NumericsError, UsageError, WanrtError
from wanrt.kernels.winners import slug

BUDGET = 510.0  # seconds for all slices together


def main(only: str, cases: str, out: Path | None) -> None:
    """`only`: slices, as "vram,tune"; all of them where it is empty. `cases`: a part of op names.

    Raises UsageError; at the end NumericsError where op tests failed on this card, and WanrtError
    where a slice ended with an error of its own.
    """
    wanted = only.split(",") if only else list(SLICES)
    if unknown := set(wanted) - set(SLICES):
        raise UsageError(f"no slice {min(unknown)!r}; choose of {', '.join(SLICES)}")
    if not torch.cuda.is_available():
        raise UsageError(
            "there is no NVIDIA GPU here; `wanrt bench compile` and the tests need none"
        )
    begin = time.monotonic()
    card = torch.cuda.get_device_name()
    about = machine("cuda") | {"triton": triton.__version__}
    out = out or RESULTS / f"{slug(card)}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    failed, broken = 0, []
    with out.open("a", encoding="utf-8") as file:
        for record in run(wanted, cases, begin + BUDGET):
            failed += record.get("failed", 0)
            broken += [record["bench"]] if record.get("broken") else []
            file.write(json.dumps(record | about) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(json.dumps(record), flush=True)
    print(f"{time.monotonic() - begin:.0f} s, written to {out}")
    if failed:
        raise NumericsError(f"{failed} op tests failed on {card}; `named` in {out} says which")
    if broken:
        raise WanrtError(f"ended with an error, by {out}: {', '.join(broken)} (--only runs one)")


def run(wanted: list[str], cases: str, until: float) -> Iterator[dict[str, Any]]:
    """What slices find, one after the other, until `time.monotonic()` says so."""
    for name in wanted:
        left = until - time.monotonic()
        if left < min(60, SLICES[name].seconds):
            yield {"bench": name, "note": f"not run: out of time (--only {name})"}
            continue
        yield from _child(name, min(left, SLICES[name].seconds), cases)


def _child(name: str, seconds: float, cases: str) -> Iterator[dict[str, Any]]:
    """The lines of one slice; it is ended, and all that it started, where it takes longer."""
    said: list[str] = []
    with TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            _command(name, seconds, cases),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        timer = Timer(seconds, _end, [child])
        timer.start()
        assert child.stdout is not None
        try:
            for line in child.stdout:
                try:
                    yield json.loads(line)
                except ValueError:
                    said.append(line)
            failed, in_time = child.wait() != 0, timer.is_alive()
        finally:
            timer.cancel()
            if child.poll() is None:  # whoever reads these lines stopped
                _end(child)
        errors.seek(0)
        said.append(errors.read())
    if not in_time:
        yield {"bench": name, "note": f"not finished within {seconds:.0f} s"}
    elif failed:
        yield {"bench": name, "broken": True, "note": "".join(said).strip()[-800:]}


def _end(child: subprocess.Popen[str]) -> None:
    """A slice and its workers, which hold its output open. Windows has no such groups."""
    if os.name != "posix":
        child.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _command(name: str, seconds: float, cases: str) -> list[str]:
    """It begins nothing new in its last tenth."""
    return [sys.executable, "-m", "wanrt.bench.gpu_slices", name, str(0.9 * seconds), cases]


if __name__ == "__main__":  # where only torch, Triton, numpy, safetensors and pytest are installed
    main(*[*sys.argv[1:], "", ""][:2], None)
