"""Real requests under a budget: the same frames, and no more memory than was planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanrt.budgeted import machine_of
from wanrt.config import MODELS
from wanrt.errors import BudgetError, UsageError
from wanrt.memory.budget import GIB, parse_bytes
from wanrt.memory.dit_bytes import FORMATS
from wanrt.memory.meter import metered
from wanrt.memory.phases import dit_options
from wanrt.pipeline import Pipeline
from wanrt.weights.random import write_random

SHARE = 0.05  # by which plan and measurement may differ
# What the arithmetic leaves out: tables, noise levels, frames on their way to bytes, and the text
# encoder's .pth, which is mapped and so counts as tensors on a CPU.
SMALL = 2 << 20
SIZE = {"width": 64, "height": 64, "num_frames": 9, "num_steps": 2, "seed": 3}
PROMPT = "a red circle moving right"
LONG = {"prompt": f"{PROMPT} " * 200, "negative": "a blue square " * 200}  # as plans assume
CPU = torch.device("cpu")
TRUE = MODELS["wan2.1-t2v-1.3b"]
TRUE = replace(TRUE, dit=replace(TRUE.dit, num_layers=4))


def run(pipe: Pipeline, prompt: str = PROMPT, **settings: Any) -> tuple[np.ndarray, int, int]:
    """Frames, the planned and the measured peak."""
    with metered(CPU) as meter:
        started = pipe.start(prompt, **settings)
        frames = np.concatenate(list(pipe.decode(started, pipe.denoise(started))))
    assert started.plan is not None
    return frames, started.plan.peak, meter.peak


def check(planned: int, measured: int, vram: str | int) -> None:
    budget = parse_bytes(vram, "") if isinstance(vram, str) else vram
    assert budget is not None
    assert planned <= budget
    assert measured <= planned + SMALL
    assert planned <= measured * (1 + SHARE) + SMALL


@pytest.mark.parametrize("vram", ["64G", "100M", "45M", "33M", "28M"])
def test_nano_keeps_its_budget(vram: str, zoo: Any) -> None:
    expected = zoo.open("nano").generate(**LONG, **SIZE).np
    frames, planned, measured = run(zoo.open("nano", vram=vram), **LONG, **SIZE)
    assert np.array_equal(frames, expected)
    check(planned, measured, vram)


INPUTS: dict[str, dict[str, str]] = {
    "wan2.1-i2v-14b-480p": {"image": "a.png"},
    "wan2.1-flf2v-14b-720p": {"image": "a.png", "last_image": "b.png"},
    "wan2.1-vace-1.3b": {"video": "clip.mp4"},
    "wan2.2-i2v-a14b": {"image": "a.png"},
    "wan2.2-ti2v-5b": {"image": "a.png"},
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_task_gives_the_same_frames_in_the_least_memory(
    name: str, zoo: Any, files: Any
) -> None:
    given = {key: files[file] for key, file in INPUTS[name].items()}
    settings = SIZE | {"width": 64, "height": 64} | given
    expected = zoo.open(name).generate(PROMPT, **settings).np
    with pytest.raises(BudgetError) as error:
        run(zoo.open(name, vram="0.1M"), **settings)
    least = str(error.value).partition("--vram ")[2].split()[0]
    frames, planned, _ = run(zoo.open(name, vram=least), **settings)
    assert np.array_equal(frames, expected)
    assert planned <= parse_bytes(least, "")


@pytest.fixture(scope="module")
def true_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("true") / "model"
    write_random("t2v-1.3b", "comfyui", folder, components=("dit",), precision="bf16", spec=TRUE)
    return folder


@pytest.mark.parametrize("resident", [4, 1, 0])
def test_true_blocks_keep_their_budget(resident: int, true_blocks: Path) -> None:
    """The least budget in which so many of four blocks stay."""
    torch.manual_seed(0)
    text = torch.randn(512, 4096).bfloat16()  # so that the run holds features of its own
    settings = {"prompt_embeds": text, "negative_embeds": text.flip(0), "width": 256, "height": 256}
    settings |= {"num_frames": 9, "num_steps": 2, "seed": 1}

    def denoise(vram: int | None) -> tuple[torch.Tensor, Any, int]:
        pipe = Pipeline.load(str(true_blocks), precision="bf16", vram=vram and f"{vram / GIB}G")
        with metered(CPU) as meter:
            started = pipe.start("", decode=False, **settings)
            latents = pipe.denoise(started)
        return latents, started.plan, meter.peak

    expected, _, _ = denoise(None)
    _, whole, _ = denoise(64 * GIB)
    options = dit_options(TRUE, whole.ask, FORMATS["bf16"], machine_of(CPU), None)
    vram = next(o.phase.peak for o in options if o.placement.num_resident == resident)
    latents, plan, measured = denoise(vram)
    assert torch.equal(latents, expected)
    assert plan.placement("step").num_resident == resident
    check(plan.peak, measured, vram)


@pytest.mark.slow  # 20 s
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_true_block_of_the_14b_keeps_its_budget(precision: str, tmp_path: Path) -> None:
    """One block, streamed and resident, at a few tokens: what is planned is what is held."""
    spec = MODELS["wan2.1-t2v-14b"]
    spec = replace(spec, dit=replace(spec.dit, num_layers=1))
    folder = tmp_path / "model"
    write_random("t2v-14b", "comfyui", folder, components=("dit",), precision="bf16", spec=spec)
    text = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    settings = {"prompt_embeds": text, "negative_embeds": text.flip(0), "width": 64, "height": 64}
    settings |= {"num_frames": 5, "num_steps": 1, "seed": 1}

    def denoise(streams: bool) -> torch.Tensor:
        pipe = Pipeline.load(str(folder), precision=precision, vram="64G")
        with metered(CPU) as meter:
            started = pipe.start("", decode=False, **settings)
            options = started.plan.question.phases["step"]
            option = next(o for o in options if bool(o.placement.slots) == streams)
            chosen = started.plan.options | {"step": option}
            started.plan = replace(started.plan, options=chosen, keep=False)
            latents = pipe.denoise(started)
        check(started.plan.peak, meter.peak, 64 * GIB)
        return latents

    assert torch.equal(denoise(streams=True), denoise(streams=False))


def test_budgets_are_read_as_people_write_them() -> None:
    assert parse_bytes("8G", "--vram") == parse_bytes("8 GiB", "--vram") == 8 * GIB
    assert parse_bytes("7.5", "--vram") == 15 * GIB // 2
    assert parse_bytes("6500M", "--vram") == 6500 << 20
    assert parse_bytes(None, "--vram") is None
    for text in ("", "0", "-1G", "8T", "eight"):
        with pytest.raises(UsageError, match="--vram"):
            parse_bytes(text, "--vram")


def test_requests_may_be_interleaved(zoo: Any) -> None:
    """A run goes by its own plan, whatever came in between."""
    alone = zoo.open("nano").generate(PROMPT, **SIZE).np
    pipe = zoo.open("nano", vram="30M")
    first = pipe.start(PROMPT, **SIZE)
    latents = pipe.denoise(first)
    other = pipe.start("a blue square", decode=False, **(SIZE | {"width": 96, "num_frames": 5}))
    frames = pipe.decode(first, latents)
    begun = next(frames)
    pipe.denoise(other)
    assert np.array_equal(np.concatenate([begun, *frames]), alone)


def test_what_was_kept_goes_when_it_no_longer_fits(zoo: Any) -> None:
    pipe = zoo.open("nano", vram="62M")
    pipe.generate(PROMPT, **SIZE)
    assert pipe.components.keep and len(pipe.components._loaded) == 3
    pipe.generate(PROMPT, **(SIZE | {"width": 128, "height": 128}))
    assert not pipe.components.keep and not pipe.components._loaded
