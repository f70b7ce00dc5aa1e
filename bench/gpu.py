"""`wanrt bench gpu`: all that wants one NVIDIA GPU, within nine minutes.

Compiles every kernel in parallel, tests every op on the device, then measures; each line of the
result is on disk before the next begins. Needs torch, triton, numpy, safetensors and pytest; with
no more than these, in a checkout: PYTHONPATH=. python3 -m wanrt.bench.gpu [ONLY]
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wanrt.bench import compile as gate
from wanrt.bench import ops
from wanrt.bench.measure import machine
from wanrt.bench.rivals import absent
from wanrt.errors import NumericsError, UsageError
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 510.0  # seconds after which nothing new begins
REQUEST_NAME, REQUEST_SECONDS = "e2e", 240.0  # what it may need, most of it to write weights
# 832x480, 81 frames; few steps, so that what is paid once is seen beside them.
REQUEST = (
    *("bench", "e2e", "--model", "wan2.1-t2v-1.3b", "--device", "cuda"),
    *("--steps", "4", "--repeats", "1", "--json"),
)
_TESTS = tuple(f"tests/test_ops{n}.py" for n in ("", "_attention", "_conv", "_quantized"))


def main(only: str, out: Path | None) -> None:
    """Run everything. Raises NumericsError at the end where an op is wrong on this card."""
    if not torch.cuda.is_available():
        raise UsageError(
            "there is no NVIDIA GPU here; `wanrt bench compile` and the tests need none"
        )
    begin = time.monotonic()
    about = machine("cuda") | {"triton": gate.triton.__version__}
    out = out or ROOT / "bench" / "results" / f"{_slug(torch.cuda.get_device_name())}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with out.open("a", encoding="utf-8") as file:
        for record in _records(only, begin):
            failed += record.get("failed", 0)
            file.write(json.dumps(record | about) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(json.dumps(record), flush=True)
    print(f"{time.monotonic() - begin:.0f} s, written to {out}")
    if failed:
        raise NumericsError(f"{failed} op tests failed on {torch.cuda.get_device_name()}")


def _records(only: str, begin: float) -> Iterator[dict[str, Any]]:
    yield _compiled(only)
    yield _tested(only)
    yield {"bench": "ceilings"} | ops.ceilings()
    for name, note in absent().items():
        yield {"bench": "peer", "peer": name, "note": note}
    for case in all_cases().values():
        if case.size != "wan" or only not in case.id:
            continue
        for dtype in case.dtypes:
            if time.monotonic() - begin > BUDGET:
                yield {"bench": "ops", "case": case.id, "note": "not measured: out of time"}
                continue
            for row in ops.measure(case, dtype):
                yield {"bench": "ops"} | asdict(row)
            torch.cuda.empty_cache()
    if only in REQUEST_NAME:
        yield _requests(begin)


def _compiled(only: str) -> dict[str, Any]:
    """Compile for this card, or the nearest the gate knows; the launches that follow find it."""
    start, arch = time.monotonic(), registry.here().arch
    known = [a for a in gate.ARCHS if a <= arch]
    rows = gate.compile_all([max(known)], only) if known else []
    faults = [f"{row.kernel}: {fault}" for row in rows for fault in row.faults]
    seconds = round(time.monotonic() - start, 1)
    return {"bench": "compile", "kernels": len(rows), "faults": faults, "seconds": seconds}


def _tested(only: str) -> dict[str, Any]:
    """The op tests on the device, in a process of their own, without the rest's conftest."""
    files = [name for name in _TESTS if (ROOT / name).exists()]
    if not files:
        return {"bench": "tests", "note": "not run: they are in the checkout, not in the package"}
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-k", only] if only else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=env, capture_output=True, text=True)
    tail = done.stdout.strip().splitlines()
    found = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail[-1])
    }
    named = [line for line in tail if line.startswith(("FAILED", "ERROR"))]
    found["failed"] = (
        found.get("failed", 0) + found.pop("error", 0) + (done.returncode not in (0, 1, 5))
    )
    seconds = round(time.monotonic() - start, 1)
    return {"bench": "tests"} | found | {"named": named[:40], "seconds": seconds}


def _requests(begin: float) -> dict[str, Any]:
    """Whole requests of the true-shaped 1.3B, in processes of their own; `ONLY` may be `e2e`."""
    left = BUDGET - (time.monotonic() - begin)
    if left < REQUEST_SECONDS:
        return {"bench": "e2e", "note": "not measured: out of time (it takes ONLY=e2e)"}
    command = [sys.executable, "-m", "wanrt", *REQUEST]
    command += [] if "diffusers" in absent() else ["--peer", "diffusers"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"bench": "e2e", "note": f"not measured: more than {left:.0f} s"}
    if done.returncode:
        return {"bench": "e2e", "note": f"not measured: {done.stderr.strip()[-400:]}"}
    return json.loads(done.stdout)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":  # where only torch, Triton, numpy, safetensors and pytest are installed
    main(sys.argv[1] if len(sys.argv) > 1 else "", None)
