"""ONNX graphs become engines of TensorRT for RTX; that needs no GPU and no driver.

Each engine is built by a process of its own (`trt_child.py`), for two reasons. A builder that gives
up takes nothing else with it. And the builder orders some of what is alike by its addresses: two
engines of one graph, built in one process, differ in a few bytes. A fresh process whose addresses
are not random, with the same environment, gives the same bytes every time in one installation.

Classic TensorRT has the same interface and goes the same way (`CLASSIC`). Its builder wants the
card that the engine is for, and could not be installed where this was written: not tested.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanrt.engine.bundle import shown_capability
from wanrt.engine.manifest import EngineKind, Input
from wanrt.errors import FormatError, UsageError

CHILD = Path(__file__).with_name("trt_child.py")
_MEMORY = "Total Activation Memory: "
_ATTENTION = "Registering attention: "
_DULL = ("CUDA driver version is insufficient", "checkMacros.cpp::catchCudaError")


@dataclass(frozen=True)
class Flavour:
    """A builder of the family: its kind in a bundle, its module, what brings it.

    `cards`: those that it builds for by their number; none: for the one that is in the machine.
    """

    kind: EngineKind
    module: str
    package: str
    cards: tuple[int, ...]


# Its builder also knows 7.5, where it has no bf16 and no fp32 products, and 12.1.
RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "wanrt[rtx]", (80, 86, 89, 120))
CLASSIC = Flavour("tensorrt", "tensorrt", "tensorrt-cu13", ())


@dataclass(frozen=True)
class Built:
    """An engine and what the builder said of it.

    workspace: bytes that it needs beside inputs and outputs, at the largest sizes of its profile.
    attentions: attention ops of the graph. reproducible: another build gives the same bytes.
    log: the builder's own lines, without those of its detailed level.
    """

    engine: bytes
    kind: EngineKind
    release: str
    capabilities: tuple[int, ...]
    workspace: int
    attentions: int
    reproducible: bool
    seconds: float
    log: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(line for line in self.log if line.startswith("WARNING "))


def build(
    name: str,
    graph: bytes,
    inputs: Sequence[Input],
    capabilities: tuple[int, ...],
    flavour: Flavour = RTX,
) -> Built:
    """The engine of a graph for these cards (89 is 8.9). Peak: a process of 0.3 GB and the graph.

    `inputs` give the sizes of what the graph leaves open. Every tensor keeps the dtype that it has
    in the graph; products of fp32 are not made in TF32. Raises UsageError where the builder is not
    installed or a card cannot do what the graph asks, FormatError with the builder's reason.
    """
    cards = _cards(capabilities, flavour)
    ranges = {one.name: (one.min, one.opt, one.max) for one in inputs}
    head = {"module": flavour.module, "capabilities": capabilities, "ranges": ranges}
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD)],
        input=json.dumps(head).encode() + b"\n" + graph,
        capture_output=True,
        cwd=CHILD.anchor,
        env=_environment(),
    )
    if done.returncode:
        raise _failed(name, cards, flavour, done)
    head_line, _, engine = done.stdout.partition(b"\n")
    found = json.loads(head_line)
    lines = tuple(f"{level} {text}" for level, text in found["lines"])
    if "needs" in found:
        raise UsageError(
            f"{name} computes in {found['error']}, which needs compute capability "
            f"{shown_capability(found['needs'])} or higher; it was to be built for {cards} "
            "(take int8 or bf16 for older cards)"
        )
    if "error" in found:
        told = f"{flavour.kind} {found['release']} builds no engine of it for {cards}"
        raise FormatError(name, f"{told}: {_sentence(found['error'])}")
    memory = [int(line.split(_MEMORY)[1].split()[0]) for line in lines if _MEMORY in line]
    if len(memory) != 1:
        raise FormatError(name, f"the builder's log states its memory {len(memory)} times, not 1")
    return Built(
        engine=engine,
        kind=flavour.kind,
        release=found["release"],
        capabilities=capabilities,
        workspace=memory[0],
        attentions=sum(_ATTENTION in line for line in lines),
        reproducible=found["fixed"],
        seconds=found["seconds"],
        log=tuple(line for line in lines if not line.startswith("VERBOSE ")),
    )


def _cards(capabilities: tuple[int, ...], flavour: Flavour) -> str:
    """What an engine is for, in words. Raises UsageError for what the builder does not know."""
    assert bool(flavour.cards) == bool(capabilities), f"{flavour.kind=} {capabilities=}"
    for number in capabilities:
        if number not in flavour.cards:
            legal = ", ".join(map(shown_capability, flavour.cards))
            raise UsageError(
                f"{flavour.kind} builds nothing for compute capability "
                f"{shown_capability(number)}; choose of {legal}"
            )
    return ", ".join(map(shown_capability, capabilities)) or "the card of this machine"


def _environment() -> dict[str, str]:
    """Little, and always the same variables, so that the process begins in the same state."""
    kept = {name: os.environ.get(name, "") for name in ("SYSTEMROOT", "LD_LIBRARY_PATH")}
    always = {"PYTHONHASHSEED": "0", "HOME": os.environ.get("HOME", "/")}
    return always | {name: value for name, value in kept.items() if value}


def _failed(
    name: str, cards: str, flavour: Flavour, done: subprocess.CompletedProcess[bytes]
) -> UsageError | FormatError:
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
    if "ModuleNotFoundError" in last[0]:
        return UsageError(f"{flavour.module} is not installed: pip install '{flavour.package}'")
    code = done.returncode
    how = signal.Signals(-code).name if code < 0 else str(code)
    ended = f"its process ended with {how}: {last[0][:300]}"
    return FormatError(name, f"{flavour.kind} builds no engine of it for {cards}; {ended}")


def _sentence(text: str) -> str:
    """The builder's reason, without the lines that only say that there is no driver here."""
    parts = [part for part in text.replace("\n", "; ").split("; ") if part]
    told = [part for part in parts if not any(word in part for word in _DULL)]
    return "; ".join(told or parts)[:600]
