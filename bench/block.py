"""`wanrt bench block`: one transformer block of the 1.3B beside diffusers', on the same weights.

Ours gets the keys and values of the text that `WanDiT.prepare` computes once per request; the peer
computes them in every call, as it does in its pipeline.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt.bench import peers
from wanrt.bench.measure import alternate, check_close, machine
from wanrt.config import DIT_1_3B
from wanrt.errors import UsageError
from wanrt.models.dit import Block, TimeEmbedding
from wanrt.models.layers import RopeTables
from wanrt.quant.formats import PLAIN

_LIMITS = {"fp32": 1e-4, "bf16": 3e-2}  # bf16: the peer keeps its residual stream in bf16
_GRID = 8  # tokens per row and column of the made-up video


class Case(NamedTuple):
    """Inputs of one call: tokens, text, and the projected time embedding."""

    x: Tensor  # [1, L, D] fp32
    text: Tensor  # [1, 512, D]
    e0: Tensor  # [1, 6, D] fp32


def main(
    device: str, peer: str | None, dtypes: list[str], tokens: int, repeats: int, as_json: bool
) -> None:
    """Check, then time; one line per dtype. Raises NumericsError where the two disagree."""
    if peer not in (None, "diffusers"):
        raise UsageError(f"peer {peer!r} is not known; choose diffusers or leave it out")
    if tokens % _GRID**2:
        raise UsageError(f"tokens is {tokens}; it must be a multiple of {_GRID**2}")
    about = machine(device)
    if not as_json:
        print("1.3B block, " + ", ".join(f"{key} {value}" for key, value in about.items() if value))
    for name in dtypes:
        if name not in _LIMITS:
            raise UsageError(f"dtype {name!r} does not exist; choose of {', '.join(_LIMITS)}")
        row = {"bench": "block", "dtype": name, "tokens": tokens}
        row |= measure(device, peer, name, tokens, repeats)
        print(json.dumps(row | about) if as_json else _line(row))


@torch.inference_mode()
def measure(
    device: str, peer: str | None, name: str, tokens: int, repeats: int
) -> dict[str, float]:
    """Seconds of ours and of the peer, their ratio and their relative error."""
    torch.manual_seed(0)
    dtype, d = PLAIN[name], DIT_1_3B.dim
    case = Case(
        torch.randn(1, tokens, d, device=device),
        torch.randn(1, 512, d, device=device).to(dtype),
        torch.randn(1, 6, d, device=device) * 0.1,
    )
    block = _our_block(dtype).to(device)
    runs = {"wanrt": _ours(block, case, tokens)}
    result = {}
    if peer:
        runs["diffusers"] = _theirs(block, case, tokens, dtype)
        result["error"] = check_close(name, runs["wanrt"](), runs["diffusers"](), _LIMITS[name])
    seconds = alternate(runs, repeats, device)
    result |= {f"{who}_s": value for who, value in seconds.items()}
    if peer:
        result["ratio"] = seconds["wanrt"] / seconds["diffusers"]
    return result


def _our_block(dtype: torch.dtype) -> Block:
    """A block of random weights: norms and modulation fp32, the rest in `dtype`."""
    block = Block(DIT_1_3B).eval()
    for name, p in block.named_parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim == 2 else 0.1)
        if "norm" in name and name.endswith("weight"):
            p.add_(1.0)
        if "norm" not in name and "modulation" not in name:
            p.data = p.data.to(dtype)
    return block


def _ours(block: Block, case: Case, tokens: int) -> Callable[[], Tensor]:
    grid = (tokens // _GRID**2, _GRID, _GRID)
    freqs = RopeTables(DIT_1_3B.head_dim).get(grid, case.x.device)
    time = TimeEmbedding(case.e0[:, 0], case.e0, None)
    kv = block.cross_attn.prepare(case.text, None)
    return lambda: block(case.x.clone(), time, freqs, kv)  # the block overwrites its tokens


def _theirs(block: Block, case: Case, tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    theirs, rope = peers.diffusers_block(block, DIT_1_3B, dtype, case.x.device)
    side = 2 * _GRID
    rotary = rope(torch.empty(1, 16, tokens // _GRID**2, side, side, device=case.x.device))
    return lambda: theirs(case.x.to(dtype), case.text, case.e0, rotary)


def _line(row: dict[str, float | str]) -> str:
    text = f"  {row['dtype']}  L={row['tokens']}  wanrt {row['wanrt_s']:.3f} s"
    if "ratio" in row:
        text += f"  diffusers {row['diffusers_s']:.3f} s  ratio {row['ratio']:.2f}"
        text += f"  (relative error {row['error']:.1e})"
    return text
