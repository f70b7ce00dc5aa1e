"""`wanrt quantize`: a model rewritten in eight bits, for every later command."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from wanrt.errors import UsageError
from wanrt.identity import identify
from wanrt.memory.budget import gib
from wanrt.progress import Bars
from wanrt.quant.policy import EightBit
from wanrt.weights.hub import resolve_model
from wanrt.weights.parts import find_parts
from wanrt.weights.quantize import Written, rewrite_model


def quantize(
    model: Annotated[str, typer.Argument(help="An id, a folder, a file or a repository.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    precision: Annotated[str, typer.Option(help="int8 or fp8.")],
    plain_vae: Annotated[
        bool, typer.Option("--plain-vae", help="Leave the VAE as it is in int8, too.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never download.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per file.")] = False,
) -> None:
    """Write a model with eight-bit weights; stopped, it goes on where it was."""
    if precision not in get_args(EightBit):
        raise UsageError(f"precision {precision!r} does not exist here; choose int8 or fp8")
    path = resolve_model(model, offline=offline)
    parts = find_parts(path)
    parts.require("dit")
    if out.resolve() == path.resolve():
        raise UsageError(f"{out} is the model itself; choose another folder")
    spec = identify(parts.found["dit"], parts.low_noise is not None, f"{model} {path} {parts.dit}")
    with Bars(quiet=as_json) as bars:
        asked = (parts, spec.id, out, precision, bars.report)
        for one in rewrite_model(*asked, plain_vae=plain_vae):
            bars.finish()
            if as_json:
                print(json.dumps(asdict(one) | {"path": str(one.path)}), flush=True)
            else:
                held = _held(one, precision)
                print(f"{one.path}: {gib(one.before)} -> {gib(one.after)}, {held}", flush=True)


def _held(one: Written, precision: str) -> str:
    """What became of a part, in words."""
    if one.num_quantised:
        what = "convolutions of the decoder" if one.part == "vae" else "matrices"
        return f"{one.num_quantised} {what} in {precision}"
    fp8_vae = one.part == "vae" and precision == "fp8"
    return "as it was (a VAE has no fp8 form)" if fp8_vae else "as it was"
