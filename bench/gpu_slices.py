"""The slices of `wanrt bench gpu`: each yields its results as it finds them, in its own process.

    PYTHONPATH=. python3 -m wanrt.bench.gpu_slices NAME SECONDS [CASES]

A fault of the card ends one slice and not the rest, and what a budget does to the allocator stays
with its slice.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wanrt.bench import chain, model, ops, peers, tune, vae
from wanrt.bench import compile as gate
from wanrt.bench.rivals import absent
from wanrt.errors import NumericsError
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases
from wanrt.kernels.winners import slug

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
E2E = ("bench", "e2e", "--model", "wan2.1-t2v-1.3b", "--device", "cuda", "--steps", "4", "--json")
_FAMILIES = ("", "_attention", "_conv", "_conv_int8", "_quantized")
_TESTS = tuple(f"tests/test_ops{family}.py" for family in _FAMILIES)
_VAE_SIZE = (60, 104)  # latents of 480x832

Record = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """`cases`: those that have this in their name; `until`: when to begin nothing more."""

    cases: str
    until: float  # of time.monotonic()

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


class Slice(NamedTuple):
    """`seconds` is the most that it takes."""

    run: Callable[[Asked], Iterator[Record]]
    seconds: float


def compiled(asked: Asked) -> Iterator[Record]:
    """Compile for this card, or the nearest the gate knows; the launches that follow find it."""
    start, arch = time.monotonic(), registry.here().arch
    known = [a for a in gate.ARCHS if a <= arch]
    rows = gate.compile_all([max(known)], asked.cases) if known else []
    faults = [f"{row.kernel}: {fault}" for row in rows for fault in row.faults]
    yield {"kernels": len(rows), "faults": faults, "seconds": _since(start)}


def tested(asked: Asked) -> Iterator[Record]:
    """The op tests on the device, without the rest's conftest."""
    yield _pytest(asked, [])


def consumer(asked: Asked) -> Iterator[Record]:
    """The same with the code that an RTX 4070 gets, on this card."""
    yield {"as": 89} | _pytest(asked, ["-p", "wanrt.bench.consumer", "--as-arch", "89"])


def measured(asked: Asked) -> Iterator[Record]:
    """Every op at the models' shapes, beside the two ceilings of the card."""
    yield {"case": "ceilings"} | ops.ceilings()
    for name, note in absent().items():
        yield {"peer": name, "note": note}
    for case in all_cases().values():
        if case.size != "wan" or asked.cases not in case.id:
            continue
        for dtype in case.dtypes:
            if asked.left < 0:
                yield {"case": case.id, "note": "not measured: out of time"}
                continue
            for row in ops.measure(case, dtype):
                yield asdict(row)
            torch.cuda.empty_cache()


def chained(asked: Asked) -> Iterator[Record]:
    """The VAE's residual blocks at both usual sizes."""
    for width, height in ((832, 480), (1280, 720)):
        for row in chain.rows("cuda", width, height, 7):
            yield asdict(row)


def decoded(asked: Asked) -> Iterator[Record]:
    """Nine frames of 832x480 beside each peer."""
    for peer in ("diffusers", "fastvae"):
        about = {"dtype": "bf16", "size": "832x480", "peer": peer}
        if note := peers.absent(peer):
            yield about | {"note": note}
            continue
        try:
            yield about | vae.measure("cuda", peer, "bf16", _VAE_SIZE, 3)
        except (RuntimeError, NumericsError) as error:  # memory, or a peer that declines this card
            yield about | {"note": f"not measured: {str(error).partition(chr(10))[0]}"}
        torch.cuda.empty_cache()


def modelled(asked: Asked) -> Iterator[Record]:
    """A forward of the 1.3B with a LoRA beside it, then a block of the 14B."""
    rivals = () if peers.absent("diffusers") else ("diffusers", "compile")
    whole = model.Settings(peers=rivals, lora=True)
    for settings in (whole, replace(whole, variant="wan2.1-t2v-14b", blocks=1, lora=False)):
        for row in model.measure(settings):
            yield asdict(row)


def kept(asked: Asked) -> Iterator[Record]:
    """The 1.3B within 5 and 4 GiB, the 14B in int8 within 12 and 8."""
    from wanrt.bench import vram  # with the libraries of pictures and videos

    small = vram.Settings()
    large = vram.Settings("wan2.1-t2v-14b", precision="int8", budgets=("12G", "8G"), steps=2)
    for settings in (small, large):
        for row in vram.rows(settings):
            yield asdict(row)


def requested(asked: Asked) -> Iterator[Record]:
    """Whole requests of the true-shaped 1.3B, cold and warm."""
    command = [sys.executable, "-m", "wanrt", *E2E, "--repeats", "1"]
    command += [] if peers.absent("diffusers") else ["--peer", "diffusers"]
    done = subprocess.run(command, capture_output=True, text=True)
    failed = {"note": f"not measured: {done.stderr.strip()[-400:]}"}
    yield failed if done.returncode else json.loads(done.stdout)


def tuned(asked: Asked) -> Iterator[Record]:
    """Winners as `kernels/tuned/` takes them, beside the result: who wants them copies the file."""
    wanted, answers = tune.questions(asked.cases), []
    card = torch.cuda.get_device_name()
    for answer in tune.tune(wanted, "cuda", until=asked.until):
        answers.append(answer)
        tune.write(answers, card, RESULTS / f"{slug(card)}.tuned.json")
    faults = [f"{a.question.key}: {fault}" for a in answers for fault in a.faults]
    yield {"keys": len(answers), "out_of_time": len(wanted) - len(answers), "faults": faults}


SLICES = {
    "compile": Slice(compiled, 90),
    "tests": Slice(tested, 120),
    "ops": Slice(measured, 120),
    "chain": Slice(chained, 60),
    "vae": Slice(decoded, 60),
    "model": Slice(modelled, 150),
    "consumer": Slice(consumer, 150),
    "tune": Slice(tuned, 200),
    "vram": Slice(kept, 300),
    "e2e": Slice(requested, 240),
}


def _pytest(asked: Asked, plugin: list[str]) -> Record:
    files = [name for name in _TESTS if (ROOT / name).exists()]
    if not files:
        return {"note": "not run: they are in the checkout, not in the package"}
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += plugin + (["-k", asked.cases] if asked.cases else [])
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    env |= {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr[-400:]]
    words = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
    found = {word: int(number) for number, word in words}
    named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    found["failed"] = (
        found.get("failed", 0) + found.pop("error", 0) + (done.returncode not in (0, 1, 5))
    )
    return found | {"named": named[:40], "seconds": _since(start)}


def _since(start: float) -> float:
    return round(time.monotonic() - start, 1)


if __name__ == "__main__":
    name, seconds, *cases = sys.argv[1:]
    wanted = Asked("".join(cases), time.monotonic() + float(seconds))
    for record in SLICES[name].run(wanted):
        print(json.dumps({"bench": name} | record), flush=True)
