"""The op tests as `wanrt bench gpu` runs them: in several processes, within a time, and counted.

Each process tests a share (`share.py`) and compiles what it needs, so that sixteen cores do that
at once. Every test's outcome is on disk when it is known: a process that is ended in the middle has
still told what it found, and in which test it was.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_FAMILIES = ("", "_attention", "_conv", "_conv_int8", "_quantized")
TESTS = tuple(f"tests/test_ops{family}.py" for family in _FAMILIES)
_MOST = 8  # processes; each has a context on the card, of about 0.5 GB
_GRACE = 8.0  # seconds for a summary
_OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.M)
_BEGUN = re.compile(r"^(\S+::.*?) *\Z", re.M)
_COLLECTED = re.compile(r"\bcollected (\d+) items?(?: / (\d+) deselected)?")


@dataclass
class _Share:
    """One process of pytest, and where it writes."""

    process: subprocess.Popen[bytes]
    output: Path
    interrupted: bool = False


def run(cases: str, until: float, options: Sequence[str] = (), root: Path = ROOT) -> dict[str, Any]:
    """How many passed, failed, were skipped, and were left when `time.monotonic()` said `until`.

    cases: a part of their names. options: of pytest. `named`: what failed and why, 40 at most.
    """
    files = [name for name in TESTS if (root / name).exists()]
    if not files:
        return {"note": "not run: they are in the checkout, not in the package"}
    start, count = time.monotonic(), max(1, min(_MOST, (os.cpu_count() or 1) // 2))
    chosen = [*options, *(["-k", cases] if cases else []), *files]
    with TemporaryDirectory() as folder:
        shares = [_start(i, count, chosen, root, Path(folder)) for i in range(count)]
        try:
            _wait(shares, until)
        finally:
            for share in shares:
                share.process.kill()
                share.process.wait()
        found, named = Counter(passed=0, failed=0, skipped=0, left=0), []
        for share in shares:
            _count(share, found, named)
    seconds = round(time.monotonic() - start, 1)
    return {**found, "named": named[:40], "processes": count, "seconds": seconds}


def _start(i: int, count: int, chosen: list[str], root: Path, folder: Path) -> _Share:
    command = [sys.executable, "-m", "pytest", "-v", "--noconftest", "-p", "no:cacheprovider"]
    command += ["--tb=line", "-p", "wanrt.bench.share", "--share", f"{i}/{count}", *chosen]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "300",  # so that a summary's line has room for a reason
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the tests ask for deterministic algorithms
    }
    output = folder / f"{i}.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=root, env=env, stdout=file, stderr=file)
    return _Share(process, output)


def _wait(shares: list[_Share], until: float) -> None:
    """Until all have ended; `_GRACE` before the time is over, they are asked to."""
    for share in shares:
        if _ended(share.process, until - _GRACE):
            continue
        share.interrupted = True
        if os.name == "posix":
            share.process.send_signal(signal.SIGINT)  # pytest sums up what it has
    for share in shares:
        _ended(share.process, until)


def _ended(process: subprocess.Popen[bytes], until: float) -> bool:
    try:
        process.wait(max(0.01, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _count(share: _Share, found: Counter[str], named: list[str]) -> None:
    """Add a share's outcomes, those of its summary's reasons too."""
    text, code = share.output.read_text("utf-8", "replace"), share.process.returncode
    outcomes = [outcome for _, outcome in _OUTCOME.findall(text)]
    selected = _COLLECTED.search(text)
    total = int(selected[1]) - int(selected[2] or 0) if selected else 0
    found["passed"] += outcomes.count("PASSED")
    found["skipped"] += outcomes.count("SKIPPED")
    bad = outcomes.count("FAILED") + outcomes.count("ERROR")
    found["left"] += max(0, total - len(outcomes))
    reasons = [row for row in text.splitlines() if row.startswith(("FAILED ", "ERROR "))]
    if code not in ((0, 1, 2, 5) if share.interrupted else (0, 1, 5)):
        last = _BEGUN.search(text)
        where = f"in {last[1]}" if last else text.strip()[-300:]
        reasons.append(f"ERROR a process ended with {code}, {where}")
        bad += 1
    found["failed"] += bad
    named += reasons
