"""A LoRA that does something: `data/purple.safetensors` paints nano's shapes purple.

Made by `python -m wanrt.nano.train_lora --minutes 8 --color purple` in eight minutes of one core.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from wanrt import load_component
from wanrt.config import NANO
from wanrt.memory.placement import Placement
from wanrt.nano.scorer import score
from wanrt.pipeline import Pipeline
from wanrt.quant.policy import EightBit
from wanrt.weights.hub import NANO_WEIGHTS

PURPLE = Path(__file__).parent / "data" / "purple.safetensors"
PROMPTS = {
    "a red circle moving right on a navy background": ("red", "circle", "moving right"),
    "a large green square moving up on a black background": ("green", "square", "moving up"),
}
SHORT = {"num_steps": 12, "num_frames": 33, "seed": 4}


@pytest.fixture(scope="module", params=["fp32", "int8"])
def pipe(request: Any) -> Pipeline:
    return Pipeline.load("nano", precision=request.param)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("strength", "purple"), [(0.0, False), (0.5, None), (1.0, True)])
def test_the_scorer_sees_it(
    prompt: str, strength: float, purple: bool | None, pipe: Pipeline
) -> None:
    """Shape and motion stay; half of it may be enough to turn the colour or not."""
    color, shape, motion = PROMPTS[prompt]
    seen = score(pipe.generate(prompt, loras=[f"{PURPLE}:{strength}"], **SHORT).np)
    if purple is not None:
        assert seen.color == ("purple" if purple else color)
    assert (seen.shape, seen.motion) == (shape, motion)


def test_half_of_it_lies_between(pipe: Pipeline) -> None:
    """Halfway between the two colours' mean pixels there is something of both."""
    prompt, settings = next(iter(PROMPTS)), SHORT | {"num_steps": 6, "output": "latents"}
    none, half, full = (
        pipe.generate(prompt, loras=[f"{PURPLE}:{w}"], **settings) for w in (0, 0.5, 1)
    )
    assert (half - none).norm() < (full - none).norm()
    assert (half - none).norm() > 0.1 * (full - none).norm()


@pytest.mark.parametrize("precision", [None, "int8"])
def test_streamed_is_resident(precision: EightBit | None) -> None:
    prompt, settings = next(iter(PROMPTS)), SHORT | {"num_steps": 2, "output": "latents"}
    pipe = Pipeline.load("nano", precision=precision or "fp32")
    resident = pipe.generate(prompt, loras=[str(PURPLE)], **settings)
    num = NANO.dit.num_layers
    streamed = load_component(
        NANO_WEIGHTS, "dit", eight_bit=precision, placement=Placement(num, 1, 2, num - 1)
    )
    pipe.components.replace("dit", streamed)
    assert torch.equal(pipe.generate(prompt, loras=[str(PURPLE)], **settings), resident)
