"""What each precision makes of whole requests: latents, pictures, and what a reader sees in them.

nano's held-out prompts, each from the same noise in fp32 and in every mode. Its scorer reads shape,
colour, background, size and motion back from the pixels.
"""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanrt.bench.pictures import closeness, psnr, ssim
from wanrt.config import Precision, VaePrecision
from wanrt.nano.language import Scene, held_out_prompts
from wanrt.nano.scorer import agreement, score
from wanrt.pipeline import Pipeline, Run


class Mode(NamedTuple):
    """A precision, whether attention has its eight-bit form, and the VAE's precision."""

    precision: Precision
    attention: bool = True
    vae: VaePrecision = "auto"


MODES = {
    "bf16": Mode("bf16"),
    "int8": Mode("int8"),
    "int8 with plain attention": Mode("int8", attention=False),
    "fp8": Mode("fp8"),
    "fp8 with plain attention": Mode("fp8", attention=False),
    "VAE bf16": Mode("fp32", vae="bf16"),
    "VAE fp16": Mode("fp32", vae="fp16"),
    "VAE int8": Mode("fp32", vae="int8"),
}


@dataclass(frozen=True)
class Row:
    """One mode over all prompts; `verdict` is the share of prompts read right in everything."""

    mode: str
    prompts: int
    least_cosine: float  # of the latents after all steps, with fp32
    median_cosine: float
    median_error: float  # relative, of the same
    psnr: float  # medians over prompts, dB
    ssim: float
    verdict: float
    verdict_fp32: float


@dataclass
class _Seen:
    """What was measured of one mode, prompt by prompt."""

    cosine: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def rows(modes: Iterable[str], num_prompts: int) -> Iterator[Row]:
    """One row for each mode, after the last prompt."""
    plain = Pipeline.load("nano", precision="fp32", device="cpu")
    pipes = {name: _open(MODES[name]) for name in modes}
    seen = {name: _Seen() for name in modes}
    verdicts = []
    for i, scene in enumerate(held_out_prompts(num_prompts)):
        run, expected = _denoise(plain, scene, i)
        frames = _decode(plain, run, expected)
        verdicts.append(_right(scene, frames))
        for name, pipe in pipes.items():
            same = MODES[name].precision == "fp32"  # it changes the VAE alone
            own, latents = (run, expected) if same else _denoise(pipe, scene, i)
            made = _decode(pipe, own, latents)
            _note(seen[name], latents, expected, made, frames)
            seen[name].right.append(_right(scene, made))
    for name, one in seen.items():
        yield Row(
            name,
            num_prompts,
            min(one.cosine),
            statistics.median(one.cosine),
            statistics.median(one.error),
            statistics.median(one.psnr),
            statistics.median(one.ssim),
            statistics.mean(one.right),
            statistics.mean(verdicts),
        )


def _open(mode: Mode) -> Pipeline:
    pipe = Pipeline.load("nano", precision=mode.precision, vae_precision=mode.vae, device="cpu")
    if not mode.attention:
        for block in pipe.components.dit().blocks:
            block.attend = block.ops.attention
    return pipe


def _denoise(pipe: Pipeline, scene: Scene, seed: int) -> tuple[Run, Tensor]:
    run = pipe.start(scene.caption(), seed=seed)
    return run, pipe.denoise(run)


def _decode(pipe: Pipeline, run: Run, latents: Tensor) -> np.ndarray:
    return np.concatenate(list(pipe.decode(run, latents)))


def _right(scene: Scene, frames: np.ndarray) -> bool:
    return all(value is not False for value in agreement(scene, score(frames)))


def _note(
    seen: _Seen, latents: Tensor, expected: Tensor, made: np.ndarray, frames: np.ndarray
) -> None:
    near = closeness(latents, expected)
    seen.cosine.append(near.cosine)
    seen.error.append(near.error)
    x, y = torch.from_numpy(made), torch.from_numpy(frames)
    seen.psnr.append(psnr(x, y))
    seen.ssim.append(ssim(x, y))
