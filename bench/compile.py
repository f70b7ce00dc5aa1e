"""The compile gate: every kernel at the models' shapes, for every architecture, without a GPU.

Host functions run on meta tensors while their launches are recorded, as on a card of that
architecture. So what is compiled is what users will run, tile for tile.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from wanrt.bench.measure import faults, reason
from wanrt.bench.sass import TOOLS, Loop, busiest_loop
from wanrt.errors import WanrtError
from wanrt.kernels import registry, winners
from wanrt.kernels.cases import Case, all_cases
from wanrt.kernels.launch import INTERPRETING, Launch, Mma, record
from wanrt.kernels.target import Target

# Shared memory that one block may use, in bytes. Triton does not check it.
# Source: CUDA C++ Programming Guide 13.0, table "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
ARCHS = tuple(SHARED_MEMORY)
_MMA = re.compile(
    r"(?:mma\.sync|wgmma\.mma_async)[\w.]*?\.(f32|f16|s32)\.(bf16|f16|tf32|s8|e4m3)\."
)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Row:
    """One compiled kernel: where it is used first, what it takes, and what is wrong with it."""

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int
    spilled: int  # bytes of stack
    shared: int  # bytes
    mma: tuple[str, ...]
    loop: Loop | None  # the busiest one with products
    faults: tuple[str, ...]


class _Resources(NamedTuple):
    registers: int
    spilled: int


class CompilingDriver:
    """Stands in for a card, as far as compiling asks."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def compile_all(
    archs: Sequence[int] = ARCHS,
    only: str = "",
    workers: int | None = None,
    candidates: bool = False,
) -> list[Row]:
    """Compile what every `wan` case starts. Raises WanrtError in Triton's interpreter.

    `candidates`: with every tile that the kernels list, not only with the first.
    """
    with pool(workers) as executor:
        return list(executor.map(compile_job, jobs(archs, only, candidates)))


def pool(workers: int | None = None) -> ProcessPoolExecutor:
    """Processes that compile, as many as there are cores. Raises WanrtError in the interpreter."""
    if INTERPRETING:
        raise WanrtError("TRITON_INTERPRET is set; unset it to compile kernels")
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


class Job(NamedTuple):
    """The `index`-th launch of a case, where the kernel that picks under `key` runs `tile`."""

    case: str
    arch: int
    dtype: torch.dtype
    index: int
    key: str = ""
    tile: tuple[int, ...] = ()


def jobs(archs: Sequence[int], only: str, candidates: bool = False, size: str = "wan") -> list[Job]:
    """One job for all launches that compile to the same code: those of the first case."""
    found: dict[Any, Job] = {}
    for name, case in all_cases().items():
        if case.size != size or only not in name:
            continue
        for arch in archs:
            for dtype in case.dtypes:
                for key, tile in _choices(case, arch, dtype, candidates):
                    for i, launch in enumerate(launches(case, arch, dtype, {key: tile})):
                        kind = (arch, launch.kernel.fn.__qualname__, launch.mma, _kind(launch))
                        found.setdefault(kind, Job(name, arch, dtype, i, key, tile))
    return list(found.values())


def _choices(
    case: Case, arch: int, dtype: torch.dtype, candidates: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """No key, which is the defaults; with `candidates` every key of the case and each tile too."""
    if not candidates:
        return [("", ())]
    with winners.trial() as trial:
        launches(case, arch, dtype)
    return [("", ()), *((key, tile) for key, tiles in trial.asked.items() for tile in tiles[1:])]


def _kind(launch: Launch) -> Any:
    """What Triton specialises code for: types, and of whole numbers if 1 or a multiple of 16.

    Of a tensor, whether its first element lies at one; a view on the meta device says that, too.
    """

    def kind(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16 == 0
        if isinstance(x, tuple):
            return tuple(map(kind, x))
        if isinstance(x, bool) or not isinstance(x, int):
            return type(x)
        return "i", x == 1, x % 16 == 0, x.bit_length() > 31

    return kind(launch.args), tuple(sorted((k, str(v)) for k, v in launch.options.items()))


def compile_job(job: Job) -> Row:
    """What one launch compiles to; a fault where it does not."""
    launch = _launch(job)
    try:
        return _compile(launch, job.case, job.arch)
    except faults() as error:
        name, fault = launch.kernel.fn.__name__, f"does not compile: {reason(error)}"
        return Row(name.strip("_"), job.case, job.arch, 0, 0, 0, 0, (), None, (fault,))


def warm_job(job: Job) -> bool:
    """Whether one launch compiles. Its code is in Triton's cache on disk, where a run finds it."""
    launch = _launch(job)
    try:
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    except faults():
        return False
    return True


def _launch(job: Job) -> Launch:
    driver.set_active(CompilingDriver(job.arch))
    tiles = {job.key: job.tile}
    return launches(all_cases()[job.case], job.arch, job.dtype, tiles)[job.index]


def launches(
    case: Case, arch: int, dtype: torch.dtype, tiles: Mapping[str, tuple[int, ...]] | None = None
) -> list[Launch]:
    """What the Triton backend starts for a case, with `tiles` by key; nothing where it declines."""
    target = Target("cuda", arch, dtype, case.result)
    if registry.reason_against(case.op, "triton", target) is not None:
        return []
    with record(arch) as found, winners.trial(tiles) if tiles else nullcontext():
        registry.function(case.op, "triton")(*case.draw(dtype, "meta"), **case.kwargs)
    return found


def _compile(launch: Launch, case: str, arch: int) -> Row:
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spilled = _resources(compiled.asm["cubin"])
    found = {Mma(operand, accumulator) for accumulator, operand in _MMA.findall(ptx)}
    return Row(
        kernel=compiled.metadata.name.strip("_"),
        case=case,
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=shared,
        mma=tuple(sorted(f"{mma.operand}->{mma.accumulator}" for mma in found)),
        loop=busiest_loop(compiled.asm["cubin"]) if found else None,
        faults=tuple(_faults(launch.mma, found, spilled, shared, arch)),
    )


def _faults(
    meant: tuple[Mma, ...], found: set[Mma], spilled: int, shared: int, arch: int
) -> Iterable[str]:
    if spilled:
        yield f"spills {spilled} bytes"
    if shared > SHARED_MEMORY[arch]:
        yield f"{shared} bytes of shared memory; sm_{arch} has {SHARED_MEMORY[arch]}"
    if set(meant) != found:
        names = [
            ", ".join(f"{m.operand}->{m.accumulator}" for m in sorted(s)) for s in (meant, found)
        ]
        yield f"products meant: {names[0] or 'none'}; compiled: {names[1] or 'none'}"


def _resources(cubin: bytes) -> _Resources:
    """What cuobjdump reads from the code: registers, and the stack, which is where spills go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", path]
        done = subprocess.run(command, capture_output=True, text=True)
    found = _USAGE.search(done.stdout)
    if found is None:
        raise WanrtError(f"cuobjdump read no resources: {done.stderr.strip() or done.stdout}")
    registers, stack, local = map(int, found.groups())
    return _Resources(registers, stack + local)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and the versions they were made with."""
    lines = [
        f"Triton {triton.__version__}. Shared memory in KiB, spills in bytes. *to one*: how many "
        "instructions the busiest loop has to each of its products.",
        "",
        "| kernel | first case | arch | warps | registers | spills | shared | products | to one |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    once = {replace(row, case=""): row for row in reversed(rows)}  # what compiled alike, first case
    for r in sorted(once.values(), key=lambda r: (r.kernel, r.case, r.arch)):
        shared = math.ceil(r.shared / 1024)
        to_one = "" if r.loop is None else f"{r.loop.instructions / r.loop.products:.1f}"
        lines.append(
            f"| `{r.kernel}` | {r.case} | {r.arch} | {r.warps} | {r.registers} | {r.spilled} "
            f"| {shared} | {' '.join(r.mma)} | {to_one} |"
        )
    return "\n".join(lines)
