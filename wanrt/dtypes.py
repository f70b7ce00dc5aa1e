"""In which dtype and form each part of a model runs: what `auto` means, what a bundle has."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from wanrt.config import Precision, VaePrecision
from wanrt.errors import UsageError
from wanrt.kernels import registry
from wanrt.kernels.target import MIN_ARCH_FP8
from wanrt.memory.dit_bytes import plain_precision
from wanrt.memory.vae_formats import VAE_FORMATS, VaeFormat, settle_vae
from wanrt.models.vae_layers import check_fp16_sums
from wanrt.quant.formats import PLAIN
from wanrt.quant.policy import EightBit
from wanrt.weights.detect import Detected

if TYPE_CHECKING:
    from wanrt.engine.opened import Engine

NAMES = {dtype: name for name, dtype in PLAIN.items()}


@dataclass(frozen=True)
class Dtypes:
    """Weight dtype of each part. On a CPU the VAE is fp32, as it is in the reference.

    With `eight_bit`, the transformer's blocks are int8 or fp8, and `dit` is the dtype of the rest.
    """

    name: str  # fp32, bf16, fp16, fp8, int8
    dit: torch.dtype
    umt5: torch.dtype
    clip: torch.dtype
    vae_format: VaeFormat = VAE_FORMATS["fp32"]
    eight_bit: EightBit | None = None

    @property
    def vae(self) -> torch.dtype:
        """Of what is not int8 in it."""
        return PLAIN[self.vae_format.plain]

    @property
    def format(self) -> str:
        """Its name in `memory.dit_bytes.FORMATS`."""
        whole = self.eight_bit and self.dit == torch.float32
        return f"{self.name}/fp32" if whole else self.name


def choose_dtypes(
    precision: Precision,
    dit: Detected,
    device: torch.device,
    vae_precision: VaePrecision = "auto",
    vae: Detected | None = None,
) -> Dtypes:
    """What `auto` means: a quantised file as it is; fp32 for small models, else bf16 matmuls.

    fp8 files are widened where the device does not multiply fp8. Raises UsageError.
    """
    plain = plain_precision(dit.num_params)
    if precision == "auto":
        precision = plain
        if dit.precision == "int8":
            precision = "int8"
        elif dit.precision in ("fp8", "fp8_scaled") and _multiplies_fp8(device):
            precision = "fp8"
    eight_bit = precision if precision in ("fp8", "int8") else None
    if eight_bit is None and precision not in PLAIN:
        choices = "auto, fp32, bf16, fp16, fp8 or int8"
        raise UsageError(f"precision {precision!r} does not exist; choose {choices}")
    dtype = PLAIN[plain if eight_bit else precision]
    text = torch.bfloat16 if dtype == torch.float16 else dtype  # umT5 overflows in fp16
    cuda = device.type == "cuda"
    image = dtype if cuda else torch.float32
    stored = vae is not None and vae.precision == "int8"
    form = settle_vae(vae_precision, NAMES[image], device.type, stored)
    if form.fp16_sums:
        check_fp16_sums(device)
    return Dtypes(precision, dtype, text, image, form, eight_bit)


def engine_dtypes(
    engine: "Engine", native: Dtypes, asked: Precision, vae_asked: VaePrecision = "auto"
) -> Dtypes:
    """Those of a bundle's graphs, for the parts that it serves. Raises UsageError."""
    changes: dict[str, torch.dtype | VaeFormat] = {}
    for kind in ("dit", "umt5", "clip", "vae"):
        plain = engine.precisions(kind) - {"int8", "fp8"}
        if plain:
            (name,) = plain
            changes |= {"vae_format": VAE_FORMATS[name]} if kind == "vae" else {kind: PLAIN[name]}
    eight = engine.precisions("dit") & {"int8", "fp8"}
    name = next(iter(eight or engine.precisions("dit") or {native.name}))
    if asked not in ("auto", name):
        raise UsageError(f"precision {asked} asked; the bundle {engine.bundle.path} is in {name}")
    vae = changes.get("vae_format", native.vae_format)
    if engine.serves("vae") and vae_asked not in ("auto", vae.name):
        raise UsageError(
            f"VAE precision {vae_asked} asked; the bundle {engine.bundle.path} has a VAE in "
            f"{vae.name} (leave it out, or use --engine native)"
        )
    return replace(native, name=name, eight_bit=next(iter(eight), None), **changes)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and registry.here(device="cuda").arch >= MIN_ARCH_FP8
