"""What each precision of the VAE makes of whole requests, and what a reader sees in the frames.

nano's held-out prompts; everything but the decoder is fp32 and done once, so that all decode the
same latents. The scorer reads shape, colour, background, size and motion back from the pixels.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wanrt.bench.pictures import psnr, ssim
from wanrt.config import VaePrecision
from wanrt.nano.language import Scene, held_out_prompts
from wanrt.nano.scorer import agreement, score
from wanrt.pipeline import Pipeline, Run

PRECISIONS: tuple[VaePrecision, ...] = ("bf16", "fp16", "int8")  # beside fp32


@dataclass(frozen=True)
class Row:
    """One precision over all prompts; `verdict` is the share of prompts read right."""

    vae: str
    prompts: int
    psnr: float  # with fp32's frames, of 8 bits: the median over prompts, dB
    least_psnr: float
    ssim: float  # median
    verdict: float
    verdict_fp32: float


@dataclass(frozen=True)
class _Clip:
    psnr: float
    ssim: float
    right: bool
    right_fp32: bool


def rows(num_prompts: int) -> Iterator[Row]:
    """One row for each precision, after the last prompt."""
    plain = Pipeline.load("nano", precision="fp32", device="cpu")
    pipes = {
        name: Pipeline.load("nano", precision="fp32", vae_precision=name, device="cpu")
        for name in PRECISIONS
    }
    clips: dict[str, list[_Clip]] = {name: [] for name in PRECISIONS}
    for i, scene in enumerate(held_out_prompts(num_prompts)):
        run = plain.start(scene.caption(), seed=i)
        latents = plain.denoise(run)
        expected = _decode(plain, run, latents)
        for name, pipe in pipes.items():
            clips[name].append(_compared(scene, _decode(pipe, run, latents), expected))
    for name, seen in clips.items():
        yield Row(
            name,
            len(seen),
            statistics.median(clip.psnr for clip in seen),
            min(clip.psnr for clip in seen),
            statistics.median(clip.ssim for clip in seen),
            statistics.mean(clip.right for clip in seen),
            statistics.mean(clip.right_fp32 for clip in seen),
        )


def _decode(pipe: Pipeline, run: Run, latents: Tensor) -> np.ndarray:
    return np.concatenate(list(pipe.decode(run, latents)))


def _compared(scene: Scene, made: np.ndarray, expected: np.ndarray) -> _Clip:
    x, y = torch.from_numpy(made), torch.from_numpy(expected)
    return _Clip(psnr(x, y), ssim(x, y), _right(scene, made), _right(scene, expected))


def _right(scene: Scene, frames: np.ndarray) -> bool:
    return all(value is not False for value in agreement(scene, score(frames)))
