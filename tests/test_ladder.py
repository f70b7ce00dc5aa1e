"""Memory that runs out in any phase costs a thriftier plan and a warning, not the work done."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from wanrt.errors import BudgetError
from wanrt.models.clip import ClipVision
from wanrt.models.dit import WanDiT
from wanrt.models.umt5 import Umt5Encoder
from wanrt.models.vae import WanVAE
from wanrt.pipeline import Step

MODEL = "wan2.1-i2v-14b-480p"
SETTINGS = {"width": 64, "height": 64, "num_frames": 9, "num_steps": 3, "seed": 3}
# Where a phase asks for memory, and how often it can in one request.
PHASES: dict[str, tuple[type, str]] = {
    "text": (Umt5Encoder, "forward_each"),
    "image": (ClipVision, "forward"),
    "encode": (WanVAE, "encode"),
    "step": (WanDiT, "forward_each"),
    "decode": (WanVAE, "_latent_pieces"),
}


def refuse(monkeypatch: pytest.MonkeyPatch, phase: str, when: Callable[[int], bool]) -> list[int]:
    """Let the calls for which `when` holds run out of memory; returns the list of calls."""
    owner, name = PHASES[phase]
    whole, calls = getattr(owner, name), []

    def called(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if when(calls[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return whole(self, *args, **options)

    monkeypatch.setattr(owner, name, called)
    return calls


@pytest.mark.parametrize("phase", ["text", "image", "encode", "step"])
def test_a_refused_phase_is_done_again(
    phase: str, zoo: Any, files: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    given = {"image": files["a.png"], "output": "latents"}
    expected = zoo.open(MODEL).generate("a circle", **SETTINGS, **given)
    calls = refuse(monkeypatch, phase, lambda call: call == 0)
    with caplog.at_level(logging.WARNING, "wanrt"):
        actual = zoo.open(MODEL, vram="64G").generate("a circle", **SETTINGS, **given)
    assert torch.equal(actual, expected) and len(calls) > 1
    assert f"memory ran out ({phase})" in caplog.text and "a test says so" in caplog.text


@pytest.mark.parametrize("refused", range(6))
def test_no_finished_step_is_lost(refused: int, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zoo.open("nano").generate("a circle", **SETTINGS, output="latents")
    calls, steps = refuse(monkeypatch, "step", lambda call: call == refused), []

    def on_step(step: Step) -> None:
        steps.append(step.index)

    pipe = zoo.open("nano", vram="64G")
    actual = pipe.generate("a circle", **SETTINGS, output="latents", on_step=on_step)
    assert torch.equal(actual, expected)
    assert steps == [0, 1, 2]
    repeated = 1 if refused % 2 == 0 else 2  # with the second text, the first is done again
    assert len(calls) == 6 + repeated


def test_a_refused_decode_goes_on_where_it_was(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zoo.open("nano").generate("a circle", **SETTINGS).np
    decode, refusals = WanVAE.decode_chunks, []

    def interrupted(self: WanVAE, *args: Any, **options: Any) -> Any:
        for i, chunk in enumerate(decode(self, *args, **options)):
            if i == 1 and not refusals:
                refusals.append(i)
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield chunk

    monkeypatch.setattr(WanVAE, "decode_chunks", interrupted)
    frames = zoo.open("nano", vram="64G").generate("a circle", **SETTINGS).np
    assert refusals and frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("phase,times", [("text", 1), ("step", 2)])
def test_what_a_refusal_taught_is_kept(
    phase: str, times: int, zoo: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The next request begins where the last one ended; another pipeline knows nothing of it."""
    calls = refuse(monkeypatch, phase, lambda call: call < times)
    pipe = zoo.open("nano", vram="64G")
    first = pipe.start("a circle", **SETTINGS)
    expected = pipe.denoise(first)
    assert caplog.text.count(f"memory ran out ({phase})") == times
    taught = pipe.components.lessons
    assert taught.apart and list(taught.most) == [phase] * (times - 1)
    assert all(first.plan.options[phase].phase.peak <= most for most in taught.most.values())
    caplog.clear()
    calls[:] = range(times)
    second = pipe.start("a circle of another kind", **SETTINGS)
    pipe.denoise(second)
    assert "memory ran out" not in caplog.text and second.plan == first.plan
    assert second.plan.lessons == taught
    fresh = zoo.open("nano", vram="64G").start("a circle", **SETTINGS)
    assert fresh.plan.keep and fresh.plan.lessons.most == {}
    assert torch.equal(pipe.denoise(pipe.start("a circle", **SETTINGS)), expected)


def test_a_run_that_began_before_learns_too(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    pipe = zoo.open("nano", vram="64G")
    early, late = (pipe.start(text, **SETTINGS) for text in ("a circle", "a blue square"))
    refuse(monkeypatch, "step", lambda call: call < 2)
    pipe.denoise(late)
    assert caplog.text.count("memory ran out") == 2
    pipe.denoise(early)
    assert caplog.text.count("memory ran out") == 2
    assert early.plan.lessons == late.plan.lessons == pipe.components.lessons


def test_the_ladder_has_an_end(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = refuse(monkeypatch, "step", lambda call: True)
    with pytest.raises(BudgetError, match=r"memory ran out \(step\).*--frames") as error:
        zoo.open("nano", vram="64G").generate("a circle", **SETTINGS)
    assert error.value.exit_code == 4 and len(calls) > 1


def test_without_a_plan_the_refusal_is_the_callers(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "step", lambda call: True)
    with pytest.raises(torch.OutOfMemoryError):
        zoo.open("nano").generate("a circle", **SETTINGS)
