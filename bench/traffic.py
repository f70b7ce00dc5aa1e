"""`wanrt bench traffic`: what kernels ask of shared memory and of L2, counted without a GPU.

One thread block, from the middle of each launch at the models' shapes, runs in the emulator
(`emulator/traffic.py`) on zeros: places are what counts. On a GeForce card from 8.6 on a
multiprocessor gives one turn of shared memory a cycle, and does one product of s8 or with fp16 sums
in four, in bf16 in eight. So turns to a product near these numbers are a ceiling as hard as that of
the tensor cores. It knows nothing of waiting: a bound, and no time.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from wanrt.bench.compile import ARCHS, CompilingDriver, launches
from wanrt.bench.emulator.launch import execute
from wanrt.bench.emulator.traffic import Access, Traffic
from wanrt.errors import UsageError, WanrtError
from wanrt.kernels.cases import Case, all_cases
from wanrt.kernels.launch import INTERPRETING, Launch


@dataclass(frozen=True)
class Row:
    """One kernel of one case: products, turns of shared memory, sectors, and the fewest of each."""

    kernel: str
    case: str
    dtype: str
    products: int  # tensor-core instructions of the thread block's warps
    turns: float
    least_turns: float
    sectors: float
    least_sectors: float
    worst: str  # where most is beyond the least, of both


def main(arch: int, only: str, out: Path | None, as_json: bool) -> None:
    """Print or write a line for each kernel. Raises UsageError, WanrtError in the interpreter."""
    if INTERPRETING:
        raise WanrtError("TRITON_INTERPRET is set; unset it to compile kernels")
    if arch not in ARCHS:
        raise UsageError(f"arch {arch} is not known; choose of {', '.join(map(str, ARCHS))}")
    rows = []
    for row in measure_all(arch, only):
        rows.append(row)
        if as_json:
            print(json.dumps(asdict(row)), flush=True)
    if not rows:
        raise UsageError(f"no kernel case has {only!r} in its name; `wanrt ops` lists the ops")
    text = table(rows, arch)
    if out is not None:
        out.write_text(text + "\n")
    elif not as_json:
        print(text)


def measure_all(arch: int, only: str = "") -> Iterator[Row]:
    """Of every `wan` case, each kernel once for each dtype of the activations."""
    driver.set_active(CompilingDriver(arch))
    for name, case in all_cases().items():
        if case.size == "wan" and only in name:
            for dtype in case.dtypes:
                for launch in launches(case, arch, dtype):
                    yield _measure(launch, case, dtype)


def _measure(launch: Launch, case: Case, dtype: torch.dtype) -> Row:
    traffic = Traffic()
    execute(launch._replace(args=_zeros(launch.args)), _middle, traffic)
    products = sum(
        n for name, n in traffic.instructions.items() if name.startswith(("mma", "wgmma.mma"))
    )
    shared, sectors = (list(traffic.accesses[space].values()) for space in ("shared", "global"))
    return Row(
        launch.kernel.fn.__name__.strip("_"),
        case.id,
        str(dtype).removeprefix("torch."),
        products,
        sum(a.total for a in shared),
        sum(a.total_least for a in shared),
        sum(a.total for a in sectors),
        sum(a.total_least for a in sectors),
        _worst([*shared, *sectors]),
    )


def _middle(blocks: int) -> range:
    return range(blocks // 2, blocks // 2 + 1)


def _zeros(value: Any) -> Any:
    """Arguments drawn on the meta device as zeros in memory, in their own layout."""
    if isinstance(value, tuple):
        parts = map(_zeros, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if not isinstance(value, Tensor):
        return value
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    stored = torch.zeros(value.storage_offset() + last + 1, dtype=value.dtype)
    return stored.as_strided(value.shape, value.stride(), value.storage_offset())


def _worst(accesses: list[Access]) -> str:
    """The line of Python with the most beyond the least."""
    beyond: dict[str, float] = {}
    for access in accesses:
        extra = access.total - access.total_least
        beyond[access.source] = beyond.get(access.source, 0) + extra
    return max(beyond, key=lambda line: beyond[line]) if any(beyond.values()) else ""


def table(rows: list[Row], arch: int) -> str:
    """The rows as Markdown: to a product where there are some, else beside the least."""
    lines = [
        f"Compute capability {arch / 10}, Triton {triton.__version__}; one thread block of each.",
        "",
        "| kernel | case | values | turns to a product | sectors to a product "
        "| turns / least | sectors / least | most beyond it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in dict.fromkeys(rows):
        each = ["", ""]
        if r.products:
            each = [f"{r.turns / r.products:.2f}", f"{r.sectors / r.products:.2f}"]
        beside = [
            f"{n / least:.2f}" if least else ""
            for n, least in ((r.turns, r.least_turns), (r.sectors, r.least_sectors))
        ]
        cells = [f"`{r.kernel}`", r.case, r.dtype, *each, *beside, r.worst]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
