"""`engines.lock`: of each engine the digests of its graph and of all that it is built from.

Graphs depend on our sources and on PyTorch and onnxscript, and on nothing of the machine. The bytes
of an engine are the same in one installation, but not in another: the builder orders what is alike
by its addresses, and the path of the interpreter moves them (`trt.py`). So the lock has what goes
into the builder: graph, ranges, release, options (`engine_set.recipe`).
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from wanrt.export.engine_set import Record

FILE = Path(__file__).with_name("engines.lock")
_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "tensorrt-rtx-cu13")


@dataclass(frozen=True, order=True)
class Locked:
    """One engine: what it is, and the SHA-256 of its graph and of what it is built from."""

    model: str
    part: str
    precision: str
    card: int
    onnx: str
    recipe: str


@dataclass(frozen=True)
class Lock:
    """The versions that it holds for, as "torch 2.13.0", and its engines."""

    tools: tuple[str, ...]
    engines: tuple[Locked, ...]


def locked(record: Record) -> Locked:
    """What the lock says of an engine that was built."""
    return Locked(
        record.model, record.part, record.precision, record.card, record.onnx, record.recipe
    )


def tools() -> tuple[str, ...]:
    """The versions here, as the lock names them."""
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    return (python, *(f"{name} {version(name).partition('+')[0]}" for name in _TOOLS))


def write(records: Iterable[Record], path: Path = FILE) -> None:
    """A line for each engine, sorted; the same records give the same text."""
    lines = [json.dumps(tools())]
    lines += [json.dumps(asdict(one)) for one in sorted(map(locked, records))]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def read(path: Path = FILE) -> Lock:
    """What `write` wrote."""
    head, *rows = path.read_text("utf-8").splitlines()
    return Lock(tuple(json.loads(head)), tuple(Locked(**json.loads(row)) for row in rows))


def differences(records: Iterable[Record], lock: Lock) -> list[str]:
    """In which engines these differ from the lock, and in what; none where the versions do.

    Engines that the lock does not name are passed over.
    """
    if lock.tools != tools():
        return []
    known = {(one.model, one.part, one.precision, one.card): one for one in lock.engines}
    found = []
    for record in records:
        one = known.get(record.key)
        if one is None:
            continue
        where = f"{record.model} {record.part} {record.precision} sm{record.card}"
        if one.onnx != record.onnx:
            found.append(f"{where}: another graph")
        elif one.recipe != record.recipe:
            found.append(f"{where}: the same graph, built in another way")
    return found
