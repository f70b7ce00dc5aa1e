"""`wanrt bench gpu`: all that wants one NVIDIA GPU, within nine minutes.

Compiles every kernel in parallel, tests every op on the device, measures, decodes with the VAE
beside its peers, and last tunes: winners go to a file beside the result. Each line of the result is
on disk before the next begins. Needs torch, triton, numpy, safetensors and pytest; with
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
from wanrt.bench import ops, tune
from wanrt.bench.measure import machine
from wanrt.bench.rivals import absent
from wanrt.errors import NumericsError, UsageError
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases
from wanrt.kernels.winners import slug

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 510.0  # seconds after which nothing new begins
OPS_BUDGET, VAE_BUDGET = 360.0, 420.0  # the same of the ops and the VAE: the rest is the tuner's
VAE_SIZE = (60, 104)  # latents of 480x832
_TESTS = tuple(f"tests/test_ops{n}.py" for n in ("", "_attention", "_conv", "_quantized"))


def main(only: str, out: Path | None) -> None:
    """Run everything. Raises NumericsError at the end where an op is wrong on this card."""
    if not torch.cuda.is_available():
        raise UsageError(
            "there is no NVIDIA GPU here; `wanrt bench compile` and the tests need none"
        )
    begin = time.monotonic()
    about = machine("cuda") | {"triton": gate.triton.__version__}
    out = out or ROOT / "bench" / "results" / f"{slug(torch.cuda.get_device_name())}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with out.open("a", encoding="utf-8") as file:
        for record in _records(only, begin, out):
            failed += record.get("failed", 0)
            file.write(json.dumps(record | about) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(json.dumps(record), flush=True)
    print(f"{time.monotonic() - begin:.0f} s, written to {out}")
    if failed:
        raise NumericsError(f"{failed} op tests failed on {torch.cuda.get_device_name()}")


def _records(only: str, begin: float, out: Path) -> Iterator[dict[str, Any]]:
    yield _compiled(only)
    yield _tested(only)
    yield {"bench": "ceilings"} | ops.ceilings()
    for name, note in absent().items():
        yield {"bench": "peer", "peer": name, "note": note}
    for case in all_cases().values():
        if case.size != "wan" or only not in case.id:
            continue
        for dtype in case.dtypes:
            if time.monotonic() - begin > OPS_BUDGET:
                yield {"bench": "ops", "case": case.id, "note": "not measured: out of time"}
                continue
            for row in ops.measure(case, dtype):
                yield {"bench": "ops"} | asdict(row)
            torch.cuda.empty_cache()
    yield from _decoded(only, begin)
    yield _tuned(only, begin, out)


def _decoded(only: str, begin: float) -> Iterator[dict[str, Any]]:
    """The VAE's decoder in bf16 beside each peer; its modules need more than the kernels do."""
    row = {"bench": "vae", "dtype": "bf16", "size": "832x480"}
    if only not in "vae":
        return
    for peer in ("diffusers", "fastvae"):
        try:
            from wanrt.bench import peers, vae

            note = peers.absent(peer)
            if note is None and time.monotonic() - begin > VAE_BUDGET:
                note = "not measured: out of time"
            result = {} if note else vae.measure("cuda", peer, "bf16", VAE_SIZE, 3)
        except (ImportError, RuntimeError, NumericsError) as error:
            note, result = f"not measured: {str(error).partition(chr(10))[0]}", {}
        yield row | {"peer": peer} | ({"note": note} if note else result)
        torch.cuda.empty_cache()


def _tuned(only: str, begin: float, out: Path) -> dict[str, Any]:
    """Winners as `kernels/tuned/` takes them, beside the result: who wants them copies the file."""
    wanted, answers = tune.questions(only), []
    path = out.with_name(f"{out.stem}.tuned.json")
    for answer in tune.tune(wanted, "cuda", until=begin + BUDGET):
        answers.append(answer)
        tune.write(answers, torch.cuda.get_device_name(), path)
    faults = [f"{a.question.key}: {fault}" for a in answers for fault in a.faults]
    left = len(wanted) - len(answers)
    return {"bench": "tune", "keys": len(answers), "out_of_time": left, "faults": faults}


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


if __name__ == "__main__":  # where only torch, Triton, numpy, safetensors and pytest are installed
    main(sys.argv[1] if len(sys.argv) > 1 else "", None)
