"""Timing to be trusted on a noisy machine: alternating runs, medians, and which machine it was."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

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


def alternate(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each run, after one of each to warm up; they take turns in one process."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            _synchronise(device)
            begin = time.perf_counter()
            run()
            _synchronise(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check_close(name: str, ours: Tensor, peer: Tensor, limit: float) -> float:
    """Relative error max|a - b| / max|b|; raises NumericsError above the limit: no number then."""
    error = float((ours.float() - peer.float()).abs().max() / peer.float().abs().max())
    if not error <= limit:
        raise NumericsError(
            f"{name}: relative error {error:.2g} is over {limit:g}; nothing was timed"
        )
    return error
