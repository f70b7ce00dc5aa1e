"""`wanrt bench quality`: the numerical contract of every precision, measured on the CPU.

Four parts: `layers` (each kind of layer in each format), `requests` (nano's latents, pictures and
the scorer's verdicts), `vae` (decoders) and `frames` (requests whose VAE alone changes). Printed as
JSON lines, or written into docs/quality.md.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wanrt.bench import quality_frames, quality_layers, quality_requests, quality_vae
from wanrt.bench.measure import machine
from wanrt.bench.memory import insert
from wanrt.errors import UsageError

TABLES: dict[str, Callable[[Sequence[Any]], str]] = {"layers": quality_layers.table}
_UNITS = {"db": "dB", "psnr": "PSNR, dB", "least_psnr": "least PSNR, dB", "ssim": "SSIM"}


@dataclass(frozen=True)
class Settings:
    """What the parts are asked for."""

    vae: Path | None = None
    size: str = "48x48"
    variants: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    prompts: int = 256
    record: Path | None = None


PARTS: dict[str, Callable[[Settings], Iterator[Any]]] = {
    "layers": lambda s: quality_layers.rows(),
    "requests": lambda s: quality_requests.rows(
        list(s.modes) or list(quality_requests.MODES), s.prompts, s.record
    ),
    "vae": lambda s: quality_vae.rows(s.vae, s.size, list(s.variants)),
    "frames": lambda s: quality_frames.rows(s.prompts),
}


def main(parts: Sequence[str], settings: Settings, out: Path | None) -> None:
    """Measure some parts, or all; to stdout, and with `out` into that page too."""
    unknown = set(parts) - set(PARTS) or set(settings.modes) - set(quality_requests.MODES)
    if unknown:
        choices = ", ".join((*PARTS, *quality_requests.MODES))
        raise UsageError(f"no part or mode {min(unknown)!r}; choose of {choices}")
    for part in parts or PARTS:
        found = []
        for row in PARTS[part](settings):
            found.append(row)
            line = {"bench": "quality", "part": part} | asdict(row) | machine("cpu")
            print(json.dumps(line), flush=True)
        if out is not None:
            text = TABLES.get(part, table)(found) + where()
            insert(out, text, f"wanrt bench quality --part {part}")


def table(rows: Sequence[Any]) -> str:
    """Markdown of dataclass rows of one kind."""
    names = [field.name for field in fields(rows[0])]
    lines = [f"| {' | '.join(_UNITS.get(n, n.replace('_', ' ')) for n in names)} |"]
    lines.append(f"|{'---|' * len(names)}")
    lines += [f"| {' | '.join(_cell(getattr(row, name)) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n\n"


def where() -> str:
    """The machine, as a line below a table."""
    this = machine("cpu")
    return (
        f"{this['machine']}, {this['threads']} threads, torch {this['torch']}, "
        f"commit {this['commit']}, {this['date']}.\n"
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
