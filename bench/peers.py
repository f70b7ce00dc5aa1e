"""What wanrt is measured beside: diffusers' modules with our weights in them, and fastvae's."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wanrt.config import DitSpec
from wanrt.models.dit import Block
from wanrt.models.vae import WanVAE
from wanrt.weights.names import to_diffusers


def diffusers_vae(ours: WanVAE) -> nn.Module:
    """The released VAE 2.1 (AutoencoderKLWan) with the weights of ours, fp32."""
    from diffusers import AutoencoderKLWan

    theirs = AutoencoderKLWan().eval().requires_grad_(False)
    state = ours.state_dict()
    names = to_diffusers(state, "vae", ours.spec)
    theirs.load_state_dict({names[n].stored[0]: state[n] for n in state})
    return theirs


def _diffusers_decode(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda latents: vae.decode(latents).sample


def _fastvae_decode(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """fastvae (PyPI, MIT): its decoder made of diffusers' modules; frames `[B, 3, T, H, W]`."""
    from fastvae import FastVAEDecoder

    return FastVAEDecoder.from_vae(vae).decode


# Peers that decode what diffusers' VAE decodes, made of it: latents as it takes them -> pixels.
DECODERS = {"diffusers": _diffusers_decode, "fastvae": _fastvae_decode}
NEEDED = {"diffusers": ("diffusers",), "fastvae": ("fastvae", "diffusers")}


def absent(peer: str) -> str | None:
    """Why a peer cannot be measured; None where it can."""
    missing = [name for name in NEEDED[peer] if importlib.util.find_spec(name) is None]
    return f"{peer}: absent (make peers): needs {', '.join(missing)}" if missing else None


def diffusers_block(
    ours: Block, spec: DitSpec, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """One block with the weights of ours and its rotary embedding; norms and modulation fp32."""
    from diffusers.models.transformers.transformer_wan import (
        WanRotaryPosEmbed,
        WanTransformerBlock,
    )

    theirs = WanTransformerBlock(
        spec.dim, spec.ffn_dim, spec.num_heads, cross_attn_norm=True, eps=spec.eps
    ).eval()
    state: dict[str, Tensor] = {f"blocks.0.{n}": value for n, value in ours.state_dict().items()}
    names = to_diffusers(state, "dit")
    theirs.load_state_dict(
        {names[n].stored[0].removeprefix("blocks.0."): state[n].cpu() for n in state}
    )
    theirs.to(device, dtype)
    for norm in (theirs.norm1, theirs.norm2, theirs.norm3):  # what diffusers keeps in fp32
        norm.float()
    theirs.scale_shift_table.data = theirs.scale_shift_table.data.float()
    return theirs, WanRotaryPosEmbed(spec.head_dim, spec.patch_size, 1024).to(device)
