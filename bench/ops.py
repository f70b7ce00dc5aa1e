"""`wanrt bench ops`: every op at the models' shapes, each backend beside PyTorch's, as JSON lines.

First the numbers: a backend whose result is not near PyTorch's is not timed. Then medians of
alternating runs, beside the two ceilings of the card as measured in the same run: a large copy and
a large matrix product. What is not measured has a row that says why.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wanrt.bench.agreement import MIN_COSINE, expected, nearness, one_head, parts
from wanrt.bench.measure import Run, faults, machine, reason, time_alternating
from wanrt.bench.rivals import comparable, rivals
from wanrt.errors import UsageError
from wanrt.installed import release
from wanrt.kernels import registry
from wanrt.kernels.cases import Case, all_cases

_NO_BASELINE = "not timed: PyTorch has no kernel for it; its result of one head is what is compared"


@dataclass(frozen=True)
class Row:
    """One backend's time for one case; without seconds, why there are none."""

    case: str
    dtype: str
    backend: str
    seconds: float | None = None
    gbytes_per_s: float | None = None
    tflops: float | None = None
    speedup: float | None = None  # over PyTorch's own choice
    cosine: float | None = None  # with PyTorch's result, or with its first head
    note: str = ""


def main(device: str, only: str, as_json: bool) -> None:
    """Print the ceilings, then a line for each case, dtype and backend."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no NVIDIA GPU here; the cases' shapes need one")
    if device != "cuda":
        raise UsageError("ops are timed on a GPU (--device cuda); for a CPU see `wanrt bench vae`")
    about = machine(device)
    print(json.dumps({"bench": "ceilings"} | ceilings() | about), flush=True)
    for row in measure_all(only):
        print(
            json.dumps({"bench": "ops"} | asdict(row) | about) if as_json else _line(row),
            flush=True,
        )


def measure_all(only: str = "") -> Iterator[Row]:
    for case, dtype in wanted(only):
        yield from measure(case, dtype)
        torch.cuda.empty_cache()


def wanted(only: str = "") -> list[tuple[Case, torch.dtype]]:
    """Cases at the models' shapes: the first of every op, then the second; other dtypes follow."""
    seen: Counter[str] = Counter()
    found = []
    for case in all_cases().values():
        if case.size == "wan" and only in case.id:
            found += [((i, seen[case.op]), case, dtype) for i, dtype in enumerate(case.dtypes)]
            seen[case.op] += 1
    return [(case, dtype) for _, case, dtype in sorted(found, key=lambda item: item[0])]


def measure(case: Case, dtype: torch.dtype, device: str = "cuda") -> list[Row]:
    """Rows of Triton's, PyTorch's and the rivals' kernels; small sizes run on a CPU, for tests.

    Where the card cannot hold the inputs or fails while it is timed, one row says so.
    """
    try:
        return _measure(case, dtype, device)
    except faults() as error:
        return [Row(case.id, dtype_name(dtype), "", note=f"not measured: {reason(error)}")]


@torch.inference_mode()
def _measure(case: Case, dtype: torch.dtype, device: str) -> list[Row]:
    tensors = case.draw(dtype, device)
    runs, notes = _candidates(case, tensors, dtype, device)
    near, written = _compare(case, tensors, runs, notes)
    seconds = time_alternating(runs, device)
    moved = written + sum(map(_bytes, parts(tensors)))
    flop = case.flop(*tensors) if case.flop else None
    blank = partial(Row, case.id, dtype_name(dtype))
    rows = {name: blank(name, cosine=near.get(name), note=note) for name, note in notes.items()}
    for backend, value in seconds.items():
        rows[backend] = blank(
            backend,
            seconds=value,
            gbytes_per_s=moved / value / 1e9,
            tflops=flop / value / 1e12 if flop else None,
            speedup=seconds["torch"] / value if "torch" in seconds else None,
            cosine=near[backend],
        )
    return [rows[name] for name in dict.fromkeys(("triton", "torch", *rows)) if name in rows]


def _candidates(
    case: Case, tensors: tuple[Any, ...], dtype: torch.dtype, device: str
) -> tuple[dict[str, Run], dict[str, str]]:
    """What can run, by backend; why others cannot."""
    target = registry.here(dtype, device, case.result)
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    for backend in ("torch", "triton"):
        against = registry.reason_against(case.op, backend, target)
        if backend == "torch" and one_head(case, tensors):
            notes[backend] = _NO_BASELINE
        elif against is not None:
            notes[backend] = f"not measured: {against}"
        else:
            runs[backend] = partial(registry.function(case.op, backend), *tensors, **case.kwargs)
    return runs | rivals(case, tensors, device), notes


def _compare(
    case: Case, tensors: tuple[Any, ...], runs: dict[str, Run], notes: dict[str, str]
) -> tuple[dict[str, float], int]:
    """Cosines by backend, and the bytes of a result. `runs` keeps what runs and is right."""
    target, near, written = expected(case, tensors), {}, 0
    for backend, run in list(runs.items()):
        del runs[backend]
        try:
            result = run()
            ours = backend in registry.BACKENDS
            near[backend] = nearness(result if ours else comparable(case, result), target)
            written = written or sum(map(_bytes, parts((result,))))
        except faults() as error:  # out of memory, or a peer that declines this card
            notes[backend] = f"not measured: {reason(error)}"
            continue
        if near[backend] >= MIN_COSINE:  # a NaN is not
            runs[backend] = run
        else:
            far = f"not timed: its result is far from PyTorch's (cosine {near[backend]:.6f})"
            notes[backend] = far
    return near, written


@torch.inference_mode()
def ceilings() -> dict[str, float]:
    """What this card reaches at best: GB/s of a 2 GiB copy, TFLOP/s of 8192^3 products."""
    n = 8192
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device="cuda").to(torch.bfloat16)
    i, j = torch.randint(-127, 128, (2, n, n), device="cuda", dtype=torch.int8)
    c, d = a.half(), b.half()
    runs = {
        "copy": lambda: target.copy_(source),
        "bf16": lambda: a @ b.T,
        "fp16": lambda: c @ d.T,
        "int8": lambda: torch._int_mm(i, j.T),
    }
    seconds = time_alternating(runs, "cuda")
    result = {"copy_gbytes_per_s": 2 * _bytes(source) / seconds.pop("copy") / 1e9}
    return result | {f"{name}_tflops": 2 * n**3 / s / 1e12 for name, s in seconds.items()}


def triton_version() -> str:
    """Of the Triton that compiles the kernels; empty where there is none."""
    return release("triton", "triton-windows") or ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _line(row: Row) -> str:
    head = f"{row.case:44} {row.dtype:9} {row.backend:7}"
    if row.seconds is None:
        return f"{head} {row.note}"
    tflops = f" {row.tflops:7.1f} TFLOP/s" if row.tflops else ""
    speedup = f" {row.speedup:5.2f}x PyTorch" if row.speedup else ""
    return f"{head} {row.seconds * 1e3:9.3f} ms {row.gbytes_per_s:7.0f} GB/s{tflops}{speedup}"
