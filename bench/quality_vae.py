"""What each precision of the VAE's decoder costs, in dB against fp32.

PSNR with peak 2 (pixels lie in [-1, 1]) of a clip decoded frame by frame. Without a file, nano's
VAE, and the true-size VAE 2.1 with random weights, its last convolution scaled to results of
standard deviation 0.45. A random network hands on errors that a trained one damps; it is calibrated
with noise like what it decodes, the trained one as `wanrt quantize` does it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wanrt.bench import fp16_sums
from wanrt.bench.vae import latent_size
from wanrt.config import VAE_2_1
from wanrt.errors import UsageError
from wanrt.kernels import reference_vae
from wanrt.models.vae import WanVAE
from wanrt.models.vae_calibration import calibration_latents
from wanrt.models.vae_int8 import calibrate, default_convs, quantize_vae
from wanrt.models.vae_layers import TORCH, Int8CausalConv3d, VaeOps
from wanrt.nano.train_vae import render_batch
from wanrt.quant.conv_int8 import Range, StaticInt8
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.load import load_component

BARS = {"int8": 45.0, "fp16-accumulate": 60.0}  # dB
STD = 0.45  # of a random VAE's results, before they are clamped
# The reference's ops are fp32 inside and take fp16 on any CPU at the speed of fp32.
EXACT = VaeOps(*(getattr(reference_vae, name) for name in VaeOps._fields))._replace(
    causal_conv3d_int8=TORCH.causal_conv3d_int8
)


@dataclass(frozen=True)
class Row:
    """One way to decode."""

    vae: str
    variant: str
    int8_convs: int
    db: float
    bar: float | None
    state_bytes: int  # what decoding remembers between chunks


@dataclass(frozen=True)
class Subject:
    """An fp32 VAE, what it was calibrated with, and what it decodes."""

    name: str
    vae: WanVAE
    ranges: dict[str, Range]
    latents: Tensor


def rows(weights: Path | None, size: str, variants: list[str]) -> Iterator[Row]:
    """Of some variants, or of all. Raises UsageError."""
    unknown = set(variants) - set(VARIANTS)
    if unknown:
        raise UsageError(f"no variant {min(unknown)!r}; choose of {', '.join(VARIANTS)}")
    latents = latent_size(size)
    with torch.inference_mode():
        subjects = (
            [lambda: trained(weights)]
            if weights
            else [
                lambda: random(*latents),
                lambda: trained(NANO_WEIGHTS / "vae.safetensors", "nano VAE"),
            ]
        )
        for make in subjects:
            yield from measure(make(), variants or list(VARIANTS))


def measure(given: Subject, variants: list[str]) -> Iterator[Row]:
    """PSNR of each variant with the fp32 decode."""
    expected, _ = _decode(given.vae, given.latents)
    for name in variants:
        vae = VARIANTS[name](given)
        actual, state_bytes = _decode(vae, given.latents)
        count = sum(isinstance(module, Int8CausalConv3d) for module in vae.decoder.modules())
        yield Row(given.name, name, count, psnr(actual, expected), BARS.get(name), state_bytes)


def psnr(actual: Tensor, expected: Tensor) -> float:
    """dB, peak 2."""
    error = (actual.double() - expected.double()).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


def random(height: int, width: int) -> Subject:
    """The true-size VAE 2.1 with PyTorch's random weights; latents [1, 16, 3, height, width]."""
    torch.manual_seed(0)
    vae = WanVAE(VAE_2_1).eval().requires_grad_(False)
    latents, seen = (torch.randn(1, 16, 3, *side) for side in ((height, width), (14, 14)))
    head, raw = vae.decoder.head[2], []
    handle = head.register_forward_hook(lambda module, args, y: raw.append(y))
    vae.decode(latents)
    handle.remove()
    factor = STD / torch.cat(raw, 2).std()
    head.weight.mul_(factor)
    head.bias.mul_(factor)
    return Subject("random VAE 2.1", vae, calibrate(vae, [seen]), latents)


def trained(path: Path, name: str | None = None, clips: int = 4) -> Subject:
    """A VAE from a file; what it decodes are its own encodings of nano's procedural clips."""
    vae = load_component(path, "vae")
    assert isinstance(vae, WanVAE)
    rng = np.random.default_rng(0)
    latents = torch.cat([vae.encode(render_batch(1, rng))[:, :, :3] for _ in range(clips)])
    ranges = calibrate(vae, calibration_latents(vae))
    return Subject(name or path.name, vae, ranges, latents)


def _decode(vae: WanVAE, latents: Tensor) -> tuple[Tensor, int]:
    """Pixels, and the bytes of the last state."""
    parts, state_bytes = [], 0
    for frames, state in vae.decode_chunks(latents):
        parts.append(frames)
        state_bytes = sum(slot.nbytes for slot in state.slots if slot is not None)
    return torch.cat(parts, 2), state_bytes


def _cast(vae: WanVAE, dtype: torch.dtype, ops: VaeOps) -> WanVAE:
    result = WanVAE(vae.spec, ops).eval().requires_grad_(False)
    result.load_state_dict(vae.state_dict())
    return result.to(dtype)


def _int8(
    dtype: torch.dtype, everywhere: bool = False, form: StaticInt8 | None = None
) -> Callable[[Subject], WanVAE]:
    def make(given: Subject) -> WanVAE:
        vae = _cast(given.vae, dtype, EXACT)
        names = list(given.ranges) if everywhere else default_convs(vae)
        return quantize_vae(vae, given.ranges, names, form)

    return make


VARIANTS: dict[str, Callable[[Subject], WanVAE]] = {
    "bf16": lambda given: _cast(given.vae, torch.bfloat16, EXACT),
    "fp16": lambda given: _cast(given.vae, torch.float16, EXACT),
    "fp16-accumulate": lambda given: _cast(
        given.vae, torch.float16, EXACT._replace(causal_conv3d=fp16_sums.causal_conv3d)
    ),
    "int8": _int8(torch.float16),
    "int8-bf16": _int8(torch.bfloat16),
    "int8-symmetric": _int8(torch.float16, form=StaticInt8(symmetric=True)),
    "int8-everywhere": _int8(torch.float16, everywhere=True),
    "int8-everywhere-symmetric": _int8(torch.float16, True, StaticInt8(symmetric=True)),
}
