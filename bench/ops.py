"""`wanrt bench ops`: every op at the models' shapes, each backend beside PyTorch's, as JSON lines.

First the numbers: a backend whose result is not near that of the others is not timed. Then medians
of alternating runs, beside the two ceilings of the card as measured in the same run: a large copy
and a large matrix product.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wanrt.bench.measure import alternate, machine
from wanrt.bench.rivals import rivals
from wanrt.errors import UsageError
from wanrt.installed import release
from wanrt.kernels import registry
from wanrt.kernels.cases import Case, all_cases
from wanrt.kernels.reference import Quantized, dequantize

MIN_COSINE = 0.999  # of two backends; a wrong kernel is far below, rounding far above
_WARM_UP, _REPEATS = 3, 15


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
    cosine: float | None = None  # with PyTorch's result
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
    for case in all_cases().values():
        if case.size == "wan" and only in case.id:
            for dtype in case.dtypes:
                yield from measure(case, dtype)
                torch.cuda.empty_cache()


@torch.inference_mode()
def measure(case: Case, dtype: torch.dtype, device: str = "cuda") -> list[Row]:
    """Rows of Triton's, PyTorch's and the rivals' kernels; small sizes run on a CPU, for tests."""
    name = str(dtype).removeprefix("torch.")
    target = registry.here(dtype, device, case.result)
    tensors = case.draw(dtype, device)
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    for backend in ("torch", "triton"):
        reason = registry.reason_against(case.op, backend, target)
        if reason is None:
            runs[backend] = _bound(registry.function(case.op, backend), tensors, case.kwargs)
        else:
            rows[backend] = Row(case.id, name, backend, note=f"not measured: {reason}")
    runs |= rivals(case, tensors, device)
    results = {}
    for backend, run in list(runs.items()):
        try:
            results[backend] = flat(run())
        except RuntimeError as error:  # out of memory, or a peer that declines this card
            reason = str(error).partition("\n")[0]
            rows[backend] = Row(case.id, name, backend, note=f"not measured: {reason}")
            del runs[backend]
    cosines = {b: cosine(y, results["torch"]) for b, y in results.items() if "torch" in results}
    for backend, near in cosines.items():
        if not near >= MIN_COSINE:  # a NaN too
            note = f"not timed: its result is far from PyTorch's (cosine {near:.6f})"
            rows[backend] = Row(case.id, name, backend, cosine=near, note=note)
            del runs[backend]
    outputs = results.get("torch", results.get("triton", []))
    moved = sum(map(_bytes, [*_parts(tensors), *outputs]))
    del results
    seconds = time_alternating(runs, device)
    flop = case.flop(*tensors) if case.flop else None
    for backend, value in seconds.items():
        rows[backend] = Row(
            case.id,
            name,
            backend,
            seconds=value,
            gbytes_per_s=moved / value / 1e9,
            tflops=flop / value / 1e12 if flop else None,
            speedup=seconds["torch"] / value if "torch" in seconds else None,
            cosine=cosines.get(backend),
        )
    order = ("triton", "torch", *rows)
    return [rows[backend] for backend in dict.fromkeys(order) if backend in rows]


def time_alternating(runs: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Median seconds of each, taking turns, by device events; every run touches its own memory."""
    if device != "cuda":
        return alternate(runs, 3, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_WARM_UP + _REPEATS):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if turn >= _WARM_UP:
                times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


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


def _bound(function: Callable[..., Any], tensors: Any, kwargs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(*tensors, **kwargs)


def triton_version() -> str:
    """Of the Triton that compiles the kernels; empty where there is none."""
    return release("triton", "triton-windows") or ""


def flat(result: Any) -> list[Tensor]:
    """Every tensor of a result; a quantised one as what it stands for."""
    if isinstance(result, Quantized):
        return [dequantize(result)]
    return [x for x in result if x is not None] if isinstance(result, tuple) else [result]


def _parts(inputs: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor of a call's inputs; a quantised one is two."""
    for x in inputs:
        if isinstance(x, tuple):
            yield from _parts(x)
        elif isinstance(x, Tensor):
            yield x


def cosine(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Of the first tensors, piece by piece in fp64: they may be gigabytes."""
    dot = left = right = 0.0
    pieces = (x[0].flatten().split(1 << 24) for x in (actual, expected))
    for a, b in zip(*pieces, strict=True):
        a, b = a.double(), b.double()
        dot, left, right = dot + (a @ b).item(), left + (a @ a).item(), right + (b @ b).item()
    return dot / (left * right) ** 0.5 if left and right else float(left == right)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _line(row: Row) -> str:
    head = f"{row.case:44} {row.dtype:9} {row.backend:7}"
    if row.seconds is None:
        return f"{head} {row.note}"
    tflops = f" {row.tflops:7.1f} TFLOP/s" if row.tflops else ""
    speedup = f" {row.speedup:5.2f}x PyTorch" if row.speedup else ""
    return f"{head} {row.seconds * 1e3:9.3f} ms {row.gbytes_per_s:7.0f} GB/s{tflops}{speedup}"
