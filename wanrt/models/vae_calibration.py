"""What an int8 VAE is calibrated with: the VAE's own encodings of clips that a formula draws."""

import math

import torch
from torch import Tensor

from wanrt.models.vae import WanVAE

FRAMES, SIDE = 5, 64  # of a clip: two latent frames; pixels
_SPEED = 1 / 24  # of the patterns, in their wavelengths per frame


def calibration_latents(vae: WanVAE) -> list[Tensor]:
    """Normalised latents [1, z, 2, h, w] of three clips, the same on every machine."""
    device = next(vae.parameters()).device
    return [vae.encode(clip.to(device)) for clip in calibration_clips()]


def calibration_clips() -> list[Tensor]:
    """Pixels fp32 [1, 3, 5, 64, 64] in [-1, 1]: patches, slopes, grain.

    Patches of all eight colours at the ends of the range, with hard edges; slow waves of colour;
    and grain as fine as a pixel over both. All of them move.
    """
    patches = _waves((2.0, 3.0, 5.0)).sign()
    slopes = _waves((0.5, 1.0, 1.5))
    noise = torch.rand(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    grain = (0.5 * slopes + 0.25 * patches + (noise.movedim(0, 1) - 0.5)).clamp(-1, 1)
    return [clip[None] for clip in (patches, slopes, grain)]


def _waves(lengths: tuple[float, ...]) -> Tensor:
    """One plane wave for each colour, fp32 [3, F, H, W]: so many in a frame's side."""
    time = torch.arange(FRAMES)[:, None, None] * _SPEED
    row = torch.arange(SIDE)[None, :, None] / SIDE
    column = torch.arange(SIDE)[None, None, :] / SIDE
    waves = []
    for i, number in enumerate(lengths):
        turn = math.tau * i / len(lengths) + 0.3
        place = math.cos(turn) * row + math.sin(turn) * column
        waves.append((math.tau * (number * place + time)).sin())
    return torch.stack(waves)
