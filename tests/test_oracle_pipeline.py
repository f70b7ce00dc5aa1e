"""Whole requests through diffusers' own WanPipeline, from the same weights, schedule and noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from wanrt import sampler
from wanrt.config import NANO
from wanrt.media.image import to_uint8
from wanrt.pipeline import Pipeline
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.layouts import write_model
from wanrt.weights.load import load_component
from wanrt.weights.parts import find_parts

T2V_A14B, TI2V = "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"
NUM_STEPS, FLOW_SHIFT = 6, 5.0
MAX_LATENT_ERROR = 1e-3  # of the largest latent; sinusoids of t are fp32 there and fp64 here
MIN_PSNR = 50  # dB between 8-bit frames


class OurSchedule(UniPCMultistepScheduler):
    """Diffusers' solver at the reference's timesteps and sigmas."""

    def set_timesteps(self, num_inference_steps: int, **options: Any) -> None:
        super().set_timesteps(num_inference_steps, **options)
        ours = sampler.schedule("unipc", num_inference_steps, FLOW_SHIFT)
        assert len(ours.sigmas) == len(self.sigmas)
        self.timesteps, self.sigmas = ours


def model_folder(name: str, zoo: Any) -> Path:
    return NANO_WEIGHTS if name == NANO.id else zoo.path(name)


def in_diffusers(name: str, source: Path, folder: Path, zoo: Any, tokenizer: Path) -> WanPipeline:
    """The same weights as a Diffusers folder, opened as anybody would."""
    parts = find_parts(source)
    paths = {"dit": parts.dit, "low_noise": parts.low_noise, "vae": parts.vae, "umt5": parts.umt5}
    states = {
        part: load_component(path, "dit" if part == "low_noise" else part).state_dict()
        for part, path in paths.items()
        if path is not None
    }

    def stored(part: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return states[part][name].to(dtype)

    write_model(zoo.specs[name], "diffusers", folder, stored, precision="fp32")
    words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pipe = WanPipeline.from_pretrained(
        folder, tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **words)
    )
    pipe.scheduler = OurSchedule.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize(
    ("name", "prompt", "negative", "settings"),
    [
        (NANO.id, "a red circle moving right on a navy background", "", {"guidance": 3.0}),
        (NANO.id, "a large ring  &amp;amp;\n bouncing", "a blue square", {"guidance": 5.0}),
        (NANO.id, "a small cyan star moving up", "", {"guidance": 1.0}),
        (T2V_A14B, "a red circle", "a blue square", {"guidance": 4.0, "guidance_low": 3.0}),
        (TI2V, "a red circle", "a blue square", {"guidance": 3.0, "width": 64, "height": 64}),
    ],
)
def test_same_latents_and_frames_as_diffusers(
    name: str, prompt: str, negative: str, settings: dict[str, Any], zoo: Any, tmp_path: Path
) -> None:
    source = model_folder(name, zoo)
    pipe = Pipeline.load(str(source))
    settings = {"width": 48, "height": 48} | settings
    request = {"num_frames": 9, "num_steps": NUM_STEPS, "flow_shift": FLOW_SHIFT, "seed": 5}
    request |= {"negative": negative, **settings}
    ours = pipe.generate(prompt, output="latents", **request)
    noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))

    peer = in_diffusers(name, source, tmp_path, zoo, source / "tokenizer.json")
    latents: list[Tensor] = []

    def keep_latents(*state: Any) -> dict[str, Tensor]:
        latents.append(state[-1]["latents"])
        return {}

    theirs = peer(
        prompt=prompt,
        negative_prompt=negative,
        height=settings["height"],
        width=settings["width"],
        num_frames=9,
        num_inference_steps=NUM_STEPS,
        guidance_scale=settings["guidance"],
        guidance_scale_2=settings.get("guidance_low"),
        latents=noise,
        output_type="pt",
        callback_on_step_end=keep_latents,
    ).frames
    assert len(latents) == NUM_STEPS
    error = (ours - latents[-1]).abs().max() / latents[-1].abs().max()
    assert error < MAX_LATENT_ERROR
    frames = pipe.generate(prompt, **request).np
    expected = to_uint8(theirs[0].transpose(0, 1) * 2 - 1).numpy()
    assert psnr(frames, expected) > MIN_PSNR
