"""The slices of `wanrt bench gpu`: each yields its results as it finds them, in its own process.

    PYTHONPATH=. python3 -m wanrt.bench.gpu_slices NAME SECONDS [CASES]

A fault of the card ends one slice and not the rest, and what a budget does to the allocator stays
with its slice.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from wanrt.bench import chain, gpu_tests, model, ops, peers, tune, vae
from wanrt.bench import compile as gate
from wanrt.bench.measure import faults, reason, time_alternating
from wanrt.bench.rivals import absent
from wanrt.errors import NumericsError
from wanrt.kernels import registry
from wanrt.kernels.winners import slug

RESULTS = gpu_tests.ROOT / "bench" / "results"
E2E = ("bench", "e2e", "--model", "wan2.1-t2v-1.3b", "--device", "cuda", "--steps", "4", "--json")
CONSUMER = 89  # the compute capability of an RTX 4070
_VAE_SIZE = (60, 104)  # latents of 480x832

Record = dict[str, Any]
T = TypeVar("T")


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
    """Compile for this card, or the nearest the gate knows; the launches that follow find it.

    The models' shapes first, then those of the op tests, for this card and for an RTX 4070.
    """
    start, arch = time.monotonic(), _known_arch()
    with gate.pool() as executor:
        jobs = gate.jobs([arch], asked.cases)
        rows = list(_in_time(executor.map(gate.compile_job, jobs, timeout=asked.left)))
        wrong = [f"{row.kernel} ({row.case}): {fault}" for row in rows for fault in row.faults]
        about = {"as": arch, "kernels": len(rows), "left": len(jobs) - len(rows), "faults": wrong}
        yield about | {"seconds": _since(start)}
        for each in dict.fromkeys((arch, CONSUMER)):
            jobs = gate.jobs([each], asked.cases, size="small")
            yield {"as": each, "of": "tests"} | _warmed(executor, jobs, asked.left)


def _warmed(executor: Executor, jobs: list[gate.Job], seconds: float) -> Record:
    """Compile into Triton's cache, on all cores, for no longer than this."""
    start = time.monotonic()
    done = list(_in_time(executor.map(gate.warm_job, jobs, timeout=max(0.0, seconds))))
    about = {"kernels": len(done), "left": len(jobs) - len(done), "not compiled": done.count(False)}
    return about | {"seconds": _since(start)}


def _in_time(results: Iterator[T]) -> Iterator[T]:
    """Those of a pool that come before its time is over; it drops the others."""
    with suppress(TimeoutError):
        yield from results


def tested(asked: Asked) -> Iterator[Record]:
    """The op tests on the device, without the rest's conftest."""
    yield gpu_tests.run(asked.cases, asked.until)


def consumer(asked: Asked) -> Iterator[Record]:
    """The same with the code that an RTX 4070 gets, on this card."""
    options = ["-p", "wanrt.bench.consumer", "--as-arch", str(CONSUMER)]
    yield {"as": CONSUMER} | gpu_tests.run(asked.cases, asked.until, options)


def measured(asked: Asked) -> Iterator[Record]:
    """Every op at the models' shapes, beside the two ceilings of the card."""
    try:
        yield {"case": "ceilings"} | ops.ceilings()
    except faults() as error:
        yield {"case": "ceilings", "note": f"not measured: {reason(error)}"}
    for name, note in absent().items():
        yield {"peer": name, "note": note}
    for case, dtype in ops.wanted(asked.cases):
        if asked.left < 0:
            about = {"case": case.id, "dtype": ops.dtype_name(dtype)}
            yield about | {"note": "not measured: out of time"}
            continue
        for row in ops.measure(case, dtype):
            yield asdict(row)
        torch.cuda.empty_cache()


def chained(asked: Asked) -> Iterator[Record]:
    """The VAE's residual blocks at both usual sizes."""
    for width, height in ((832, 480), (1280, 720)):
        for row in chain.rows("cuda", width, height, 7):
            yield asdict(row)
            if asked.left < 0:
                yield {"size": f"{width}x{height}", "note": "the rest not measured: out of time"}
                return


def decoded(asked: Asked) -> Iterator[Record]:
    """Nine frames of 832x480: ours beside the reference's numbers, then beside each peer."""
    for peer in (None, "diffusers", "fastvae"):
        about = {"dtype": "bf16", "size": "832x480", "peer": peer}
        if peer and (note := peers.absent(peer)):
            yield about | {"note": note}
            continue
        try:
            yield about | vae.measure("cuda", peer, "bf16", _VAE_SIZE, 3)
        except (*faults(), NumericsError) as error:  # memory, or a peer that declines this card
            yield about | {"note": f"not measured: {reason(error)}"}
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
    card = torch.cuda.get_device_name()
    with gate.pool() as executor:  # so that no question waits for its tiles
        jobs = gate.jobs([_known_arch()], asked.cases, candidates=True)
        yield {"of": "tiles"} | _warmed(executor, jobs, asked.left / 2)
    wanted, answers = tune.questions(asked.cases), []
    for question in wanted:
        if asked.left < 0:
            yield {"key": question.key, "note": "not asked: out of time"}
            continue
        try:
            answers.append(tune.answer(question, "cuda", time_alternating))
        except (*faults(), NumericsError) as error:
            yield {"key": question.key, "note": f"no answer: {reason(error)}"}
            continue
        tune.write(answers, card, RESULTS / f"{slug(card)}.tuned.json")
        yield _told(answers[-1])
        torch.cuda.empty_cache()


def _told(answer: tune.Answer) -> Record:
    """Median seconds of every tile that was right, fastest first; what was wrong with others."""
    tiles = [{"tile": tuple(tile), "seconds": value} for tile, value in answer.seconds.items()]
    about = {"key": answer.question.key, "case": answer.question.case.id}
    return about | {"default": tuple(answer.question.tiles[0]), "tiles": tiles,
                    "faults": answer.faults}  # fmt: skip


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


def _known_arch() -> int:
    """Of the compute capabilities that the gate knows, the card's, or the newest before it."""
    return max(arch for arch in gate.ARCHS if arch <= max(registry.here().arch, min(gate.ARCHS)))


def _since(start: float) -> float:
    return round(time.monotonic() - start, 1)


if __name__ == "__main__":
    name, seconds, *cases = sys.argv[1:]
    wanted = Asked("".join(cases), time.monotonic() + float(seconds))
    for record in SLICES[name].run(wanted):
        print(json.dumps({"bench": name} | record), flush=True)
