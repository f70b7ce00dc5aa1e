"""An int8 VAE from a VAE and a few latents: which convolutions change, and by what they saw."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import CausalConv3d, Int8CausalConv3d, Resample
from wanrt.quant.conv_int8 import Range, StaticInt8, observe, quantize_conv

_FULL_SIZE = 2  # upsamplings after which a decoder's convolutions are worth eight bits


def default_convs(vae: WanVAE) -> list[str]:
    """The decoder's convolutions that take int8 unless others are named.

    Those behind the second upsampling: of Wan 2.1 they do 78 % of the multiplications of all 3x3x3
    ones and hold three quarters of the history, and an error that they make meets few layers more
    (docs/kernels.md has the figures). The first (16 channels, no norm) and the last (3 results)
    stay as they are, as do the 3x3 ones of each frame, the 3x1x1 and the 1x1x1 ones, which no norm
    precedes.
    """
    normalised, names, doubled = set(_normalised(vae)), [], 0
    for name, module in vae.decoder.named_modules():
        doubled += isinstance(module, Resample)
        if doubled >= _FULL_SIZE and name in normalised and not name.startswith("head"):
            names.append(name)
    return names


@torch.inference_mode()
def calibrate(vae: WanVAE, latents: Iterable[Tensor]) -> dict[str, Range]:
    """The inputs' range of each normalised convolution of the decoder, by its name there.

    latents: normalised ones [B, z, T, h, w], such as a VAE encodes. Time: one decode of each.
    """
    ranges: dict[str, Range] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen = observe(args[0], kwargs["gamma"])
            ranges[name] = ranges[name].joined(seen) if name in ranges else seen

        return hook

    convs = {name: vae.decoder.get_submodule(name) for name in _normalised(vae)}
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
    for name in default_convs(vae) if names is None else names:
        conv = result.decoder.get_submodule(name)
        assert isinstance(conv, CausalConv3d), f"{name=}"
        quantized = quantize_conv(conv.weight, ranges[name], form or StaticInt8())
        owner, _, leaf = name.rpartition(".")
        setattr(result.decoder.get_submodule(owner), leaf, Int8CausalConv3d(conv, quantized))
    return result


def _normalised(vae: WanVAE) -> list[str]:
    """Names of the decoder's 3x3x3 convolutions that a norm precedes: all but the first."""
    return [
        name
        for name, module in vae.decoder.named_modules()
        if isinstance(module, CausalConv3d) and module.kernel_size == (3, 3, 3) and name != "conv1"
    ]


def _sharing_copy(vae: WanVAE) -> WanVAE:
    """Modules of its own, the same tensors."""
    return copy.deepcopy(vae, {id(p): p for p in (*vae.parameters(), *vae.buffers())})
