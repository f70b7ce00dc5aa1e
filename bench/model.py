"""`wanrt bench model`: one forward of a true-shaped transformer in each precision, beside peers.

Random weights, the same for all; diffusers' transformer eager and compiled. First the numbers: what
is not near the others is not timed. Then medians of alternating runs in one process.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wanrt.adapter import Adapter
from wanrt.bench import peers, true_shapes
from wanrt.bench.measure import alternate, machine
from wanrt.bench.pictures import closeness
from wanrt.config import Lora, WanSpec
from wanrt.errors import NumericsError, UsageError
from wanrt.loras import Shelf
from wanrt.tasks.sizes import LatentShape, Size, latent_shape, parse_size, token_count
from wanrt.weights.load import load_component

MIN_COSINE = {"bf16": 0.999, "int8": 0.995, "fp8": 0.98, "diffusers": 0.999, "compile": 0.999}
_EIGHT_BIT = ("int8", "fp8")
_RANK = 32  # of the LoRA


@dataclass(frozen=True)
class Settings:
    """What is timed. `blocks` None: all. `lora`: int8 with a LoRA on every product, too."""

    variant: str = "wan2.1-t2v-1.3b"
    size: str = "832x480"
    frames: int = 81
    blocks: int | None = None
    precisions: tuple[str, ...] = ("bf16", "int8", "fp8")
    peers: tuple[str, ...] = ()
    lora: bool = False
    device: str = "cuda"
    repeats: int = 3


@dataclass(frozen=True)
class Row:
    """One way to compute a forward; `cosine` is with our bf16 (or the first one asked for)."""

    variant: str
    blocks: int
    tokens: int
    name: str
    seconds: float
    cosine: float
    speedup: float | None  # over eager diffusers


def main(settings: Settings, as_json: bool) -> None:
    """Check, time, print. Raises UsageError, NumericsError."""
    unknown = set(settings.precisions) - {"bf16", "fp32", *_EIGHT_BIT}
    unknown |= set(settings.peers) - {"diffusers", "compile"}
    if unknown:
        raise UsageError(
            f"{min(unknown)!r} is not known; precisions: bf16, fp32, int8, fp8; "
            "peers: diffusers, compile"
        )
    about = machine(settings.device)
    for row in measure(settings):
        record = {"bench": "model"} | asdict(row) | about
        print(json.dumps(record) if as_json else _line(row), flush=True)


@torch.inference_mode()
def measure(settings: Settings) -> list[Row]:
    """Rows in the order of what was asked for, peers last. Disk: the weights once, in bf16."""
    spec = true_shapes.text_model(settings.variant, settings.blocks)
    with tempfile.TemporaryDirectory(prefix="wanrt-bench-") as folder:
        true_shapes.write(spec, Path(folder))
        runs = dict(_ours(spec, Path(folder), settings)) | _theirs(Path(folder), spec, settings)
    results = {name: run() for name, run in runs.items()}
    base = next(iter(results.values()))
    cosines = {name: closeness(y.float(), base.float()).cosine for name, y in results.items()}
    del results, base
    for name, cosine in cosines.items():
        limit = MIN_COSINE.get(name.removesuffix("+lora"), 0.999)
        if not cosine >= limit:
            raise NumericsError(f"{name}: cosine {cosine:.5f} is under {limit}; nothing was timed")
    seconds = alternate(runs, settings.repeats, settings.device)
    eager = seconds.get("diffusers")
    tokens = token_count(_shape(spec, settings))
    return [
        Row(
            settings.variant,
            spec.dit.num_layers,
            tokens,
            name,
            seconds[name],
            cosines[name],
            eager and eager / seconds[name],
        )
        for name in runs
    ]


def _ours(
    spec: WanSpec, folder: Path, settings: Settings
) -> list[tuple[str, Callable[[], Tensor]]]:
    runs = []
    for name in settings.precisions:
        runs.append((name, _call(_load(folder, name, settings.device), spec, settings)))
    if settings.lora:
        for name in ("int8" if "int8" in settings.precisions else settings.precisions[0],):
            dit = _load(folder, name, settings.device)
            _put_on_lora(dit, spec, folder, settings.device)
            runs.append((f"{name}+lora", _call(dit, spec, settings)))
    return runs


def _load(folder: Path, precision: str, device: str) -> nn.Module:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    eight_bit: Any = precision if precision in _EIGHT_BIT else None
    return load_component(folder, "dit", dtype=dtype, device=device, eight_bit=eight_bit)


def _call(dit: nn.Module, spec: WanSpec, settings: Settings) -> Callable[[], Tensor]:
    """A forward, with the text's keys and values made beforehand, as a request makes them."""
    latents, context = _inputs(spec, settings)
    text = dit.prepare(context.to(dit.text_embedding[0].weight.dtype))
    return partial(dit, latents, 500.0, text)


def _theirs(folder: Path, spec: WanSpec, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    if not settings.peers:
        return {}
    latents, context = (x.to(torch.bfloat16) for x in _inputs(spec, settings))
    time = torch.tensor([500.0], device=settings.device)
    model = peers.diffusers_transformer(folder / "transformer", torch.device(settings.device))
    models = {"diffusers": model, "compile": torch.compile(model)}

    def run(name: str) -> Tensor:
        return models[name](latents, time, context, return_dict=False)[0]

    return {name: partial(run, name) for name in settings.peers}


def _inputs(spec: WanSpec, settings: Settings) -> tuple[Tensor, Tensor]:
    """Latents [1, C, T, h, w] and 512 rows of text, fp32."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *_shape(spec, settings), generator=generator)
    context = torch.randn(1, spec.dit.text_len, spec.dit.text_dim, generator=generator)
    return latents.to(settings.device), context.to(settings.device)


def _shape(spec: WanSpec, settings: Settings) -> LatentShape:
    width, height = parse_size(settings.size)
    assert width and height, f"{settings.size=}"
    return latent_shape(settings.frames, Size(height, width), spec.vae)


def _put_on_lora(dit: nn.Module, spec: WanSpec, folder: Path, device: str) -> None:
    """One of rank 32 on every product of every block, small enough to change little."""
    tensors, shelf = {}, Shelf(spec)
    for name, shape in shelf.shapes.items():
        if name.startswith("blocks.") and name.endswith("weight") and len(shape) == 2:
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(_RANK, shape[1]).mul_(1e-3)
            tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], _RANK).mul_(1e-3)
    save_file(tensors, folder / "lora.safetensors")
    uses = shelf.uses((Lora(str(folder / "lora.safetensors")),), "high")
    Adapter(dit, torch.device(device)).put_on(uses)


def _line(row: Row) -> str:
    speedup = "" if row.speedup is None else f"  {row.speedup:5.2f}x eager diffusers"
    return (
        f"{row.variant}  {row.blocks} blocks  L={row.tokens}  {row.name:10} {row.seconds:8.4f} s"
        f"{speedup}  cosine {row.cosine:.6f}"
    )
