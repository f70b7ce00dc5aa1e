"""The verbs about this machine: ops, doctor."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wanrt.engine.kinds import LIBRARIES
from wanrt.errors import UsageError
from wanrt.installed import release
from wanrt.kernels import registry
from wanrt.kernels.cases import dtypes_of
from wanrt.memory.budget import gib
from wanrt.quant.formats import PLAIN

if TYPE_CHECKING:
    from wanrt.doctor import Report

_WIDE = 1000  # columns: nothing is cut off, the terminal wraps


def ops(
    device: Annotated[str, typer.Option(help="cpu or cuda; this machine's by default.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the activations.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per row.")] = False,
) -> None:
    """What does each op here: op x backend, yes, or the reason why not; and the engines."""
    if dtype not in PLAIN:
        raise UsageError(f"dtype {dtype!r} does not exist; choose {', '.join(PLAIN)}")
    backends = (*registry.BACKENDS, "onnx")
    table = Table("op", "of", *backends, box=None, pad_edge=False)
    for op in registry.OPS:
        taken = dtypes_of(op)
        target = registry.here(PLAIN[dtype] if PLAIN[dtype] in taken else taken[0], device)
        given = str(target.dtype).removeprefix("torch.")
        reasons = {b: registry.reason_against(op, b, target) for b in backends}
        chosen = registry.resolve(op, target).backend
        if as_json:
            row = {"op": op, "dtype": given, "backend": chosen, "declined": reasons}
            print(json.dumps(row))
        cells = (reason or ("yes, used" if b == chosen else "yes") for b, reason in reasons.items())
        table.add_row(op, given, *map(Text, cells))
    engines = Table("engine", "installed", "tested", box=None, pad_edge=False)
    for name, library in LIBRARIES.items():
        release = library.release()
        if as_json:
            print(json.dumps({"engine": name, "installed": release, "tested": library.tested}))
        engines.add_row(name, Text(release or f"no: {library.remedy}"), library.tested)
    if not as_json:
        console = Console(width=_WIDE)
        console.print(table, highlight=False, soft_wrap=True)
        console.print()
        console.print(engines, highlight=False, soft_wrap=True)


def doctor_(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """This machine: card, driver, versions, what will be used, and what stands in the way."""
    from wanrt import doctor

    report = doctor.examine()
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    for name, value in _rows(report):
        print(f"{name:9}  {value}")


def _version(asked: bool) -> None:
    if asked:
        print(f"wanrt {release('wanrt') or '(a checkout, not installed)'}")
        raise typer.Exit


def _rows(report: "Report") -> list[tuple[str, str]]:
    absent = ", ".join(name for name, held in report.packages.items() if held is None)
    there = {name: held for name, held in report.packages.items() if held}
    memory = "memory not known" if report.memory is None else gib(report.memory)
    return [
        ("wanrt", ", ".join(filter(None, (report.wanrt, report.commit)))),
        ("system", f"{report.system}, Python {report.python}"),
        ("processor", f"{report.processor}, {report.threads} threads, {memory}"),
        ("card", _card(report)),
        ("packages", _pairs(there) + (f"; without {absent}" if absent else "")),
        ("encoders", _pairs({codec: name or "none" for codec, name in report.encoders.items()})),
        ("folders", _pairs(report.folders)),
        ("variables", _pairs(report.variables) or "none of wanrt's is set"),
        ("used", f"{report.device}; ops by {_pairs(report.backends) or 'nothing'}"),
        *(("problem", text) for text in report.problems or ("none",)),
    ]


def _card(report: "Report") -> str:
    found = report.card
    if found is None:
        cuda = f"with CUDA {report.cuda}" if report.cuda else "without CUDA"
        return f"none that PyTorch sees, which is built {cuda}"
    driver = f", driver {found.driver}" if found.driver else ""
    memory = f"{gib(found.free)} of {gib(found.total)} free"
    cuda = f", CUDA {report.cuda}" if report.cuda else ""
    return f"{found.name}, {found.capability}, {memory}{driver}{cuda}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print it and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


def add_to(app: typer.Typer) -> None:
    """Register these verbs."""
    app.command()(ops)
    app.command("doctor")(doctor_)
    app.callback()(_main)
