"""Timing to be trusted on a noisy machine: alternating runs, medians, and which machine it was.

Whole models are timed by the clock on the wall (`alternate`), kernels and blocks by the device's
own (`time_alternating`), which leaves out how long Python takes to start them.
"""

import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanrt.errors import NumericsError


def machine(device: str) -> dict[str, str | int]:
    """What a number depends on: processor or GPU, threads, versions, commit, date."""
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _commit() -> str:
    """Of the checkout this file lies in, with `+` where it has changes; empty when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip()


Run = Callable[[], object]
Clock = Callable[[Run], float]

_WARM_UP, _REPEATS = {"cuda": 3, "cpu": 1}, 15
_LONG = 0.3  # seconds, from which four runs must do
_FLUSHED = 256 << 20  # bytes: several times the L2 of any card
_HEAD_START = 2_000_000  # cycles, about 1 ms, in which Python queues what is timed


class _Turns(NamedTuple):
    warm_up: int
    repeats: int


def alternate(runs: dict[str, Run], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each run on the wall, after one to warm up; they take turns."""
    clock = partial(_on_the_wall, device)
    return _medians(runs, {name: _Turns(1, repeats) for name in runs}, clock)


def time_alternating(
    runs: dict[str, Run], device: str, repeats: int | None = None
) -> dict[str, float]:
    """Median seconds of each kernel or block, taking turns, by the device's clock.

    repeats: else 15, or 3 where the first takes longer than 0.3 s.
    """
    clock = _DeviceClock() if device == "cuda" else partial(_on_the_wall, device)
    turns = {name: _Turns(_WARM_UP[device], repeats or _REPEATS) for name in runs}
    if repeats is None:
        turns |= {name: _Turns(0, 3) for name, run in runs.items() if clock(run) > _LONG}
    return _medians(runs, turns, clock)


def _medians(runs: dict[str, Run], turns: dict[str, _Turns], clock: Clock) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max((sum(each) for each in turns.values()), default=0)):
        for name, run in runs.items():
            if turn < sum(turns[name]):
                seconds[name].append(clock(run))
    return {name: statistics.median(each[turns[name].warm_up :]) for name, each in seconds.items()}


def _on_the_wall(device: str, run: Run) -> float:
    _synchronise(device)
    begin = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - begin


class _DeviceClock:
    """Seconds between two events around a run whose inputs are not in L2.

    The card waits before the first event until what follows is queued. So short kernels are timed,
    and not their launches, as long as those take less than a millisecond.
    """

    def __init__(self) -> None:
        self.flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def faults() -> tuple[type[Exception], ...]:
    """What is raised where a card cannot run something: PyTorch's errors, peers' and Triton's."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError  # too much shared memory, ptxas, no compilation

    return RuntimeError, TritonError


def reason(error: Exception) -> str:
    """The beginning of its message, in one line; of Triton's without the source before it."""
    text = getattr(error, "error_message", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


def check_close(name: str, ours: Tensor, peer: Tensor, limit: float) -> float:
    """Relative error max|a - b| / max|b|; raises NumericsError above the limit: no number then."""
    error = float((ours.float() - peer.float()).abs().max() / peer.float().abs().max())
    if not error <= limit:
        raise NumericsError(
            f"{name}: relative error {error:.2g} is over {limit:g}; nothing was timed"
        )
    return error
