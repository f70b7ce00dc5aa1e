"""An int8 VAE from a VAE and a few latents: which convolutions change, and by what they saw."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import CausalConv3d, Int8CausalConv3d, QuantizedConv, Resample
from wanrt.quant.conv_int8 import Range, StaticInt8, observe, quantize_conv
from wanrt.quant.policy import is_int8_conv


def default_convs(vae: WanVAE) -> list[str]:
    """The decoder's convolutions that `quant/policy.py` has in int8, by their names there."""
    normalised, names, doubled = set(normalised_convs(vae)), [], 0
    for name, module in vae.decoder.named_modules():
        doubled += isinstance(module, Resample)
        kind = "head" if name.startswith("head") else "normalised"
        if name in normalised and is_int8_conv(f"decoder.{doubled}.{kind}"):
            names.append(name)
    return names


@torch.inference_mode()
def calibrate(
    vae: WanVAE, latents: Iterable[Tensor], names: Iterable[str] | None = None
) -> dict[str, Range]:
    """The inputs' range of normalised convolutions of the decoder, by name; None: of all.

    latents: normalised ones [B, z, T, h, w], such as a VAE encodes. Time: one decode of each.
    """
    ranges: dict[str, Range] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen = observe(args[0], kwargs["gamma"])
            ranges[name] = ranges[name].joined(seen) if name in ranges else seen

        return hook

    watched = normalised_convs(vae) if names is None else names
    convs = {name: vae.decoder.get_submodule(name) for name in watched}
    handles = [
        conv.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, conv in convs.items()
    ]
    try:
        for clip in latents:
            vae.decode(clip)
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def quantize_vae(
    vae: WanVAE,
    ranges: dict[str, Range],
    names: Iterable[str] | None = None,
    form: StaticInt8 | None = None,
) -> WanVAE:
    """A VAE whose named decoder convolutions are int8 (None: `default_convs`), in vae's dtype.

    Weights that do not change are shared with `vae`. `ranges` may come from a VAE of another dtype.
    """
    result = _sharing_copy(vae)
    put_convs(result, quantize_convs(vae, ranges, names, form))
    return result


def quantize_convs(
    vae: WanVAE,
    ranges: dict[str, Range],
    names: Iterable[str] | None = None,
    form: StaticInt8 | None = None,
) -> dict[str, QuantizedConv]:
    """The named decoder convolutions (None: `default_convs`) in int8, by their names there."""
    names = default_convs(vae) if names is None else names
    weights = {name: vae.decoder.get_submodule(name).weight for name in names}
    return {
        name: quantize_conv(weight, ranges[name], form or StaticInt8())
        for name, weight in weights.items()
    }


def put_convs(vae: WanVAE, convs: Mapping[str, QuantizedConv]) -> None:
    """Have these in the place of the decoder's convolutions of those names, for good."""
    for name, quantized in convs.items():
        conv = vae.decoder.get_submodule(name)
        assert isinstance(conv, CausalConv3d), f"{name=}"
        vae.decoder.set_submodule(name, Int8CausalConv3d(conv, quantized))


def normalised_convs(vae: WanVAE) -> list[str]:
    """Names of the decoder's 3x3x3 convolutions that a norm precedes: all but the first."""
    return [
        name
        for name, module in vae.decoder.named_modules()
        if isinstance(module, CausalConv3d) and module.kernel_size == (3, 3, 3) and name != "conv1"
    ]


def _sharing_copy(vae: WanVAE) -> WanVAE:
    """Modules of its own, the same tensors."""
    return copy.deepcopy(vae, {id(p): p for p in (*vae.parameters(), *vae.buffers())})
