"""`wanrt bench vae`: decode with the true-size VAE 2.1 beside a peer's, on the same weights.

Times are medians of alternating runs in one process. Peak memory is what a decode adds to the
resident memory of a fresh process that holds the weights, by Linux's VmHWM.
"""

import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wanrt.bench import peers
from wanrt.bench.measure import alternate, check_close, machine
from wanrt.config import VAE_2_1
from wanrt.errors import UsageError
from wanrt.kernels import reference_vae
from wanrt.models.layers import choose
from wanrt.models.vae import LATENT_STATISTICS, WanVAE
from wanrt.models.vae_layers import VaeOps
from wanrt.quant.formats import PLAIN
from wanrt.tasks.sizes import parse_size
from wanrt.weights.load import place

Decode = Callable[[Tensor], Tensor]

LATENT_FRAMES = 3  # 9 frames
_REFERENCE = VaeOps(*(getattr(reference_vae, name) for name in VaeOps._fields))
_CHILDREN = 3  # fresh processes differ by what their allocator keeps
_CHECKED = (16, 24)  # at most, of latents whose decode is compared where no peer is
_LIMITS = {"fp32": 1e-4, "bf16": 6e-2}  # bf16: two roads through 40 layers, pixels in [-1, 1]


def main(
    device: str, peer: str | None, dtypes: list[str], sizes: list[str], repeats: int, as_json: bool
) -> None:
    """Check, then time; a line per dtype and size. Raises NumericsError where the two disagree."""
    if peer not in (None, *peers.DECODERS):
        known = ", ".join(peers.DECODERS)
        raise UsageError(f"peer {peer!r} is not known; choose of {known} or leave it out")
    about = machine(device)
    if peer and (note := peers.absent(peer)):
        print(json.dumps({"bench": "vae", "peer": peer, "note": note} | about) if as_json else note)
        peer = None
    if not as_json:
        about_text = ", ".join(f"{key} {value}" for key, value in about.items() if value)
        print(f"VAE 2.1 decode, 9 frames, {about_text}")
    for name in dtypes:
        if name not in _LIMITS:
            raise UsageError(f"dtype {name!r} does not exist; choose of {', '.join(_LIMITS)}")
        for size in sizes:
            row = {"bench": "vae", "dtype": name, "size": size}
            row |= measure(device, peer, name, latent_size(size), repeats)
            print(json.dumps(row | about) if as_json else _line(row, peer), flush=True)


def latent_size(size: str) -> tuple[int, int]:
    """Rows and columns of the latents of a clip. Raises UsageError."""
    width, height = parse_size(size)
    if not (width and height) or width % 8 or height % 8:
        raise UsageError(f"size {size!r}: write WIDTHxHEIGHT in multiples of 8, as 96x96")
    return height // 8, width // 8


@torch.inference_mode()
def measure(
    device: str, peer: str | None, name: str, size: tuple[int, int], repeats: int
) -> dict[str, float]:
    """Seconds and peak bytes of ours and of the peer, their ratios and their relative error.

    Without a peer, the error of a small clip, beside the reference's ops. Raises NumericsError.
    """
    names = ("wanrt", peer) if peer else ("wanrt",)
    decoders = {who: make_decoder(who, name, device) for who in names}
    latents = torch.randn(1, 16, LATENT_FRAMES, *size, device=device)
    result: dict[str, float] = {}
    if peer:
        ours, theirs = (decoders[who](latents) for who in names)
        result["error"] = check_close(name, ours, theirs, _LIMITS[name])
    else:
        result["error"] = _check_alone(name, device, decoders["wanrt"], size)
    runs = {who: partial(decode, latents) for who, decode in decoders.items()}
    for who, seconds in alternate(runs, repeats, device).items():
        result[f"{who}_s"] = seconds
    result["wanrt_gflops"] = decode_flop(size) / result["wanrt_s"] / 1e9
    del decoders, runs  # the children of the memory measurement need the room
    gc.collect()
    for who in names:
        peaks = [_peak_in_child(who, name, device, size) for _ in range(_CHILDREN)]
        result[f"{who}_peak"] = statistics.median(peaks)
    if peer:
        result["ratio"] = result["wanrt_s"] / result[f"{peer}_s"]
        result["peak_ratio"] = result["wanrt_peak"] / result[f"{peer}_peak"]
    return result


def _check_alone(name: str, device: str, decode: Decode, size: tuple[int, int]) -> float:
    """Relative error of a clip that is small enough for the reference's fp32."""
    height, width = map(min, size, _CHECKED)
    latents = torch.randn(1, 16, LATENT_FRAMES, height, width, device=device)
    expected = make_decoder("reference", "fp32", device)(latents)
    return check_close(name, decode(latents), expected, _LIMITS[name])


def decode_flop(size: tuple[int, int]) -> int:
    """Floating-point operations of the reference's arithmetic, whatever a fast path leaves out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        WanVAE(VAE_2_1, _REFERENCE).decode(torch.empty(1, 16, LATENT_FRAMES, *size))
    return counter.get_total_flops()


def make_decoder(who: str, name: str, device: str) -> Decode:
    """The decode of one side, on random weights that are the same for all."""
    torch.manual_seed(0)
    ops = _REFERENCE
    if who != "reference":
        ops = choose(VaeOps, torch.device(device), PLAIN[name])
    ours = WanVAE(VAE_2_1, ops).eval().requires_grad_(False)
    if who in ("wanrt", "reference"):
        for weight in ours.to(device, PLAIN[name]).parameters():
            weight.data = place(weight.data, "vae", torch.device(device))  # as a loaded one lies
        return ours.decode
    theirs = peers.DECODERS[who](peers.diffusers_vae(ours).to(device, PLAIN[name]))
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1).to(device) for v in LATENT_STATISTICS[16])
    return lambda latents: theirs((latents * std + mean).to(PLAIN[name]))


def _peak_in_child(who: str, name: str, device: str, size: tuple[int, int]) -> float:
    """Bytes that one decode adds at its peak; NaN where the system does not tell."""
    if device == "cuda":
        decode = make_decoder(who, name, device)
        latents = torch.randn(1, 16, LATENT_FRAMES, *size, device=device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decode(latents)
        return float(torch.cuda.max_memory_allocated() - before)
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    command = [sys.executable, "-m", "wanrt.bench.vae", who, name, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@torch.inference_mode()
def _child(who: str, name: str, height: str, width: str) -> None:
    decode = make_decoder(who, name, "cpu")
    latents = torch.randn(1, 16, LATENT_FRAMES, int(height), int(width))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    decode(latents)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _line(row: dict[str, float | str], peer: str | None) -> str:
    text = f"  {row['dtype']}  {row['size']:>7}  wanrt {row['wanrt_s']:.3f} s"
    text += f" ({row['wanrt_gflops']:.0f} GFLOP/s), peak {row['wanrt_peak'] / 2**20:.0f} MiB"
    if "ratio" in row:
        seconds, peak = row[f"{peer}_s"], row[f"{peer}_peak"] / 2**20
        text += f"  {peer} {seconds:.3f} s, {peak:.0f} MiB"
        text += f"  ratio {row['ratio']:.2f}, memory {row['peak_ratio']:.2f}"
        text += f"  (relative error {row['error']:.1e})"
    return text


if __name__ == "__main__":
    _child(*sys.argv[1:])
