"""What each precision makes of whole requests: latents, pictures, and what a reader sees in them.

nano's held-out prompts, each from the same noise in fp32 and in every mode. Its scorer reads shape,
colour, background, size and motion back from the pixels.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanrt.bench.pictures import closeness, psnr, ssim
from wanrt.bench.quality_layers import small_activations
from wanrt.config import Precision
from wanrt.nano.language import Scene, held_out_prompts
from wanrt.nano.scorer import agreement, score
from wanrt.pipeline import Pipeline


class Mode(NamedTuple):
    """A precision, whether attention has its eight-bit form, and fp8 activations small numbers."""

    precision: Precision
    attention: bool = True
    small: bool = False


MODES = {
    "bf16": Mode("bf16"),
    "int8": Mode("int8"),
    "int8 with plain attention": Mode("int8", attention=False),
    "fp8": Mode("fp8"),
    "fp8 with plain attention": Mode("fp8", attention=False),
    "fp8 with small activations": Mode("fp8", small=True),  # of cards that add fp8 up in fp16
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


@dataclass(frozen=True)
class Clip:
    """One prompt in one mode beside fp32: closeness of latents, PSNR and SSIM of frames."""

    mode: str
    prompt: int
    cosine: float
    error: float
    psnr: float
    ssim: float
    right: bool  # the scorer reads everything as the prompt has it
    right_fp32: bool


def rows(modes: Sequence[str], num_prompts: int, record: Path | None = None) -> Iterator[Row]:
    """One row for each mode, after the last prompt.

    record: a file of JSON lines, a clip each; prompts that it has are not made again.
    """
    known = _recorded(record, modes, num_prompts)
    clips = known + _measured(modes, num_prompts, {(c.mode, c.prompt) for c in known}, record)
    for mode in modes:
        yield _row(mode, [clip for clip in clips if clip.mode == mode])


def _measured(
    modes: Sequence[str], num_prompts: int, known: set[tuple[str, int]], record: Path | None
) -> list[Clip]:
    plain = Pipeline.load("nano", precision="fp32", device="cpu")
    pipes = {name: _open(MODES[name]) for name in modes}
    clips = []
    for i, scene in enumerate(held_out_prompts(num_prompts)):
        wanted = [name for name in modes if (name, i) not in known]
        if not wanted:
            continue
        expected = _generate(plain, scene, i)
        for name in wanted:
            pipes[name].components.dit()  # its weights are not small
            with small_activations() if MODES[name].small else nullcontext():
                made = _generate(pipes[name], scene, i)
            clips.append(_compared(name, i, scene, made, expected))
            if record is not None:
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(clips[-1])) + "\n")
    return clips


def _recorded(record: Path | None, modes: Sequence[str], num_prompts: int) -> list[Clip]:
    if record is None or not record.exists():
        return []
    clips = [Clip(**json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]
    return [clip for clip in clips if clip.mode in modes and clip.prompt < num_prompts]


def _row(mode: str, clips: list[Clip]) -> Row:
    return Row(
        mode,
        len(clips),
        min(clip.cosine for clip in clips),
        statistics.median(clip.cosine for clip in clips),
        statistics.median(clip.error for clip in clips),
        statistics.median(clip.psnr for clip in clips),
        statistics.median(clip.ssim for clip in clips),
        statistics.mean(clip.right for clip in clips),
        statistics.mean(clip.right_fp32 for clip in clips),
    )


def _open(mode: Mode) -> Pipeline:
    pipe = Pipeline.load("nano", precision=mode.precision, device="cpu")
    if not mode.attention:
        for block in pipe.components.dit().blocks:
            block.attend = block.ops.attention
    return pipe


class _Made(NamedTuple):
    latents: Tensor
    frames: np.ndarray


def _generate(pipe: Pipeline, scene: Scene, seed: int) -> _Made:
    run = pipe.start(scene.caption(), seed=seed)
    latents = pipe.denoise(run)
    return _Made(latents, np.concatenate(list(pipe.decode(run, latents))))


def _compared(mode: str, prompt: int, scene: Scene, made: _Made, expected: _Made) -> Clip:
    near = closeness(made.latents, expected.latents)
    x, y = torch.from_numpy(made.frames), torch.from_numpy(expected.frames)
    right, right_fp32 = (_right(scene, frames) for frames in (made.frames, expected.frames))
    return Clip(mode, prompt, near.cosine, near.error, psnr(x, y), ssim(x, y), right, right_fp32)


def _right(scene: Scene, frames: np.ndarray) -> bool:
    return all(value is not False for value in agreement(scene, score(frames)))
