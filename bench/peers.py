"""What wanrt is measured beside, with our weights: diffusers' modules and pipeline, fastvae."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wanrt import sampler
from wanrt.config import DitSpec
from wanrt.errors import UsageError
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


def require_diffusers_requests() -> None:
    """Raises UsageError where a whole request of diffusers cannot be made here."""
    needed = ("diffusers", "transformers", "accelerate", "ftfy", "imageio", "imageio_ffmpeg")
    if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
        names = " ".join(lacking).replace("_", "-")
        raise UsageError(f"--peer diffusers needs {names} (pip install {names})")


def import_diffusers_requests() -> None:
    """Imports what a program with diffusers' pipeline imports at its top, for the time it takes."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline  # noqa: F401
    from diffusers.utils import export_to_video  # noqa: F401
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel  # noqa: F401


def diffusers_pipeline(
    folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype, device: str, flow_shift: float
) -> Any:
    """WanPipeline over a folder in its layout, at wanrt's timesteps and sigmas; no progress bar."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import PreTrainedTokenizerFast

    class Schedule(UniPCMultistepScheduler):
        def set_timesteps(self, num_inference_steps: int, **options: Any) -> None:
            super().set_timesteps(num_inference_steps, **options)
            found = sampler.schedule("unipc", num_inference_steps, flow_shift)
            assert len(found.sigmas) == len(self.sigmas), f"{len(found.sigmas)=}"
            self.timesteps, self.sigmas = found.timesteps.to(options.get("device")), found.sigmas

    words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = str(folder / "tokenizer" / "tokenizer.json")
    pipe = WanPipeline.from_pretrained(
        folder,
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=tokenizer, **words),
        vae=AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=vae_dtype),
        torch_dtype=dtype,
    )
    pipe.scheduler = Schedule.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def diffusers_write(frames: np.ndarray, path: Path, fps: int) -> None:
    """frames [F, H, W, 3] in [0, 1] -> .mp4, as diffusers writes it by default."""
    from diffusers.utils import export_to_video

    export_to_video(list(frames), str(path), fps=fps)
