"""A recorded launch, compiled for a card and run on the CPU."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.compiler.compiler import CompiledKernel

from wanrt.bench.emulator.instructions import load
from wanrt.bench.emulator.machine import Work, run
from wanrt.bench.emulator.memory import GlobalMemory
from wanrt.bench.emulator.program import WARP
from wanrt.bench.emulator.traffic import Traffic
from wanrt.kernels.launch import Launch

_FORMATS = {"i1": "?", "u1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i",
            "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip


def execute(
    launch: Launch,
    choose: Callable[[int], range] | None = None,
    traffic: Traffic | None = None,
) -> None:
    """Compile for the active driver's target, then run thread blocks on the launch's tensors.

    `choose` says which, of so many; without it all run. `traffic` takes down their accesses.
    Raises EmulatorError where the kernel leaves its tensors or its shared memory.
    """
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    program, steps = load(compiled.asm["ptx"])
    values = list(_arguments(launch, compiled))
    values += [b"\0" * 8] * (len(program.parameters) - len(values))  # scratch that none uses
    grid = (*launch.grid, 1, 1)[:3]
    metadata = compiled.metadata
    tensors = [x for x in _flat(launch.args) if isinstance(x, Tensor)]
    work = Work(
        (int(grid[0]), int(grid[1]), int(grid[2])),
        metadata.num_warps * WARP,
        metadata.shared,
        dict(zip(program.parameters, values, strict=True)),
        GlobalMemory(tensors),
    )
    run(program, steps, work, choose(work.blocks) if choose else None, traffic)


def _arguments(launch: Launch, compiled: CompiledKernel) -> Iterator[bytes]:
    """The values of a launch as a kernel's parameters; what was compiled in has none."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | launch.options
    for name, kind in compiled.src.signature.items():
        yield from _packed(values.get(name), kind)


def _packed(value: Any, kind: Any) -> Iterator[bytes]:
    if isinstance(kind, tuple):
        for part, its_kind in zip(value, kind, strict=True):
            yield from _packed(part, its_kind)
    elif kind.startswith("*"):
        yield struct.pack("Q", 0 if value is None else value.data_ptr())
    elif kind != "constexpr":
        yield struct.pack(_FORMATS[kind], value)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            yield from _flat(value)
        else:
            yield value
