"""What wanrt is measured beside: diffusers' modules with our weights in them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from wanrt.config import DitSpec
from wanrt.models.dit import Block
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import ResidualBlock
from wanrt.weights.names import to_diffusers


def diffusers_vae(ours: WanVAE) -> nn.Module:
    """The released VAE 2.1 (AutoencoderKLWan) with the weights of ours, fp32."""
    from diffusers import AutoencoderKLWan

    theirs = AutoencoderKLWan().eval().requires_grad_(False)
    state = ours.state_dict()
    names = to_diffusers(state, "vae", ours.spec)
    theirs.load_state_dict({names[n].stored[0]: state[n] for n in state})
    return theirs


def diffusers_residual_block(ours: ResidualBlock) -> nn.Module:
    """A residual block of the VAE without a shortcut, with the weights of ours, fp32."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    norm1, _, conv1, norm2, _, _, conv2 = ours.residual
    theirs = WanResidualBlock(conv1.in_channels, conv2.out_channels).eval().requires_grad_(False)
    theirs.norm1.gamma.copy_(norm1.gamma)
    theirs.norm2.gamma.copy_(norm2.gamma)
    theirs.conv1.load_state_dict(conv1.state_dict())
    theirs.conv2.load_state_dict(conv2.state_dict())
    return theirs


def diffusers_transformer(folder: Path, device: torch.device) -> nn.Module:
    """The transformer of a Diffusers folder, in bf16."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return theirs.eval().requires_grad_(False).to(device)


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
