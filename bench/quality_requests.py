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
from wanrt.config import Precision
from wanrt.nano.language import Scene, held_out_prompts
from wanrt.nano.scorer import agreement, score
from wanrt.pipeline import Pipeline


class Mode(NamedTuple):
    """A precision, and whether attention has its eight-bit form."""

    precision: Precision
    attention: bool = True


MODES = {
    "bf16": Mode("bf16"),
    "int8": Mode("int8"),
    "int8 with plain attention": Mode("int8", attention=False),
    "fp8": Mode("fp8"),
    "fp8 with plain attention": Mode("fp8", attention=False),
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
        expected, frames = _generate(plain, scene, i)
        verdicts.append(_right(scene, frames))
        for name, pipe in pipes.items():
            latents, made = _generate(pipe, scene, i)
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
    pipe = Pipeline.load("nano", precision=mode.precision, device="cpu")
    if not mode.attention:
        for block in pipe.components.dit().blocks:
            block.attend = block.ops.attention
    return pipe


def _generate(pipe: Pipeline, scene: Scene, seed: int) -> tuple[Tensor, np.ndarray]:
    run = pipe.start(scene.caption(), seed=seed)
    latents = pipe.denoise(run)
    return latents, np.concatenate(list(pipe.decode(run, latents)))


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
