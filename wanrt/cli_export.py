"""`wanrt export`: a model becomes a bundle of graphs, for engines."""

import json
from pathlib import Path
from typing import Annotated

import typer

from wanrt.config import MODELS
from wanrt.errors import OutputError, UsageError
from wanrt.identity import spec_of
from wanrt.memory.budget import gib
from wanrt.progress import Bars
from wanrt.weights.hub import resolve_model
from wanrt.weights.parts import find_parts

_PLAIN = ("fp32", "fp16", "bf16")
_ATTENTION = ("native", "engine")
_BESIDE = {"onnxruntime": "fp32", "tensorrt-rtx": "bf16"}  # what is not in eight bits


def export(
    model: Annotated[str, typer.Argument(help="An id, a folder, a file or a repository.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, or a .zip.")],
    engine: Annotated[str, typer.Option(help="onnxruntime or tensorrt-rtx.")] = "onnxruntime",
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, int8 or fp8 (fp32; of engines bf16).")
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Weights within the graphs, not beside them.")
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Graphs alone, megabytes.")
    ] = True,
    attention: Annotated[
        str, typer.Option(help="native, or engine: one of TensorRT-RTX, in bf16 and fp16.")
    ] = "native",
    key: Annotated[Path | None, typer.Option(help="Signs it; by default one of your own.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Trace a model into ONNX graphs and sign them as a bundle; stopped, it goes on."""
    try:
        from wanrt.export import bundle
    except ModuleNotFoundError as error:
        hint = "pip install 'wanrt[onnx]'"
        raise UsageError(f"{error.name} is not installed, and export wants it: {hint}") from error
    from wanrt.engine.trust import load_signer, own_signer

    precision = precision or _BESIDE.get(engine, "fp32")
    _check(out, engine, precision, embed, weights, attention)
    parts = None if not weights and model in MODELS else find_parts(resolve_model(model, offline))
    eight_bit = precision if precision in ("int8", "fp8") else None
    order = bundle.Order(
        spec=MODELS[model] if parts is None else spec_of(parts, f"{model} {parts.dit}"),
        parts=parts,
        plain=precision if eight_bit is None else _BESIDE[engine],
        eight_bit=eight_bit,
        embed=embed,
        weights=weights,
        engines=engine == "tensorrt-rtx",
        attention=attention == "engine",
    )
    signer = own_signer() if key is None else load_signer(key)
    with Bars(quiet=as_json) as bars:
        made = bundle.export(order, out, signer, bars.report)
        bars.finish()
    size = sum(member.size for member in made.members)
    if as_json:
        told = {"path": str(out), "graphs": len(made.graphs), "bytes": size, "key": signer.key}
        print(json.dumps(told | {"model": made.model.id, "precision": precision}))
        return
    held = "weights within them" if embed else "weights beside them" if weights else "no weights"
    print(
        f"{out}: {made.model.id} in {precision}: {len(made.graphs)} graphs, {held}, {_shown(size)}"
    )


def _shown(size: int) -> str:
    return gib(size) if size >= 10 << 20 else f"{size / 2**20:.1f} MiB"


def _check(
    out: Path, engine: str, precision: str, embed: bool, weights: bool, attention: str
) -> None:
    if engine not in _BESIDE:
        raise UsageError(f"engine {engine!r} does not exist; choose {', '.join(_BESIDE)}")
    if precision not in (*_PLAIN, "int8", "fp8"):
        known = ", ".join((*_PLAIN, "int8", "fp8"))
        raise UsageError(f"precision {precision!r} does not exist; choose {known}")
    if attention not in _ATTENTION:
        known = " or ".join(_ATTENTION)
        raise UsageError(f"attention {attention!r} does not exist; choose {known}")
    if embed and not weights:
        raise UsageError("--embed puts weights into the graphs, --no-weights leaves them out")
    if out.exists():
        raise OutputError(f"{out} is there already (name a new folder or file)")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.absolute().parent} (make it first)")
