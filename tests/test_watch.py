"""Numbers that go wrong cost a step, computed again one notch safer; the layer is named."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wanrt.errors import NumericsError
from wanrt.memory.vae_formats import VAE_FORMATS
from wanrt.models.quantized import QuantizedLinear
from wanrt.pipeline import Pipeline
from wanrt.watch import find_culprit, healthy

SETTINGS = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 3, "seed": 1}


def latents(pipe: Pipeline, **more: Any) -> Tensor:
    return pipe.generate("a red circle", output="latents", **SETTINGS, **more)


def broken(function: Callable[..., Tensor], calls: int, value: float) -> Callable[..., Tensor]:
    """`function`, but after so many calls all its results hold one bad number."""
    count = iter(range(10**9))

    def result(*args: Any, **kwargs: Any) -> Tensor:
        y = function(*args, **kwargs)
        if next(count) >= calls:
            y[(0,) * y.ndim] = value
        return y

    return result


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attention_goes_first(
    precision: str, value: float, zoo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken from the start: all steps are those of plain attention, to the bit."""
    plain = zoo.open("nano", precision=precision)
    for block in plain.components.dit().blocks:
        block.attend = block.ops.attention
    pipe = zoo.open("nano", precision=precision)
    block = pipe.components.dit().blocks[3]
    block.attend = broken(block.attend, 0, value)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(latents(pipe), latents(plain))
    (record,) = caplog.records
    assert "step 1 of 3: blocks.3" in record.message and precision in record.message
    assert "attention no longer in eight bits" in record.message


def test_a_later_step_keeps_what_is_done(zoo: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The first step's velocity is not computed anew: two branches, then the second step fails."""
    pipe, steps = zoo.open("nano", precision="int8"), []
    block = pipe.components.dit().blocks[0]
    block.attend = broken(block.attend, 2, float("nan"))
    result = latents(pipe, on_step=lambda step: steps.append(step.latents))
    assert "step 2 of 3" in caplog.text and len(caplog.records) == 1
    assert len(steps) == 3 and torch.isfinite(result).all()
    sound = []
    latents(zoo.open("nano", precision="int8"), on_step=lambda step: sound.append(step.latents))
    assert torch.equal(steps[0], sound[0]) and not torch.equal(steps[1], sound[1])


def test_then_activations(zoo: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe = zoo.open("nano", precision="int8")
    dit = pipe.components.dit()
    linear = dit.blocks[2].self_attn.v
    multiply = linear.ops.multiply
    bad = broken(multiply.linear_quantized, 0, float("nan"))
    linear.ops = linear.ops._replace(multiply=multiply._replace(linear_quantized=bad))
    assert torch.isfinite(latents(pipe)).all()
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "activations no longer" in said[1]
    assert all("blocks.2.self_attn.v gave NaN" in one for one in said)
    parts = [part for part in dit.modules() if isinstance(part, QuantizedLinear)]
    assert not any(part.multiplies for part in parts)


def test_fp16_overflows_and_becomes_bf16(
    zoo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hidden activation beyond 65504, as the released models have them."""
    source = zoo.path("nano")
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    tensors["blocks.1.ffn.0.weight"] *= 3e4
    tensors["blocks.1.ffn.2.weight"] /= 3e4
    save_file(tensors, path, metadata={"format": "pt"})
    pipe = Pipeline.load(str(tmp_path), precision="fp16")
    result = latents(pipe)
    assert "bf16 instead of fp16" in caplog.text and "blocks.1.ffn.0 gave infinity" in caplog.text
    assert torch.equal(result, latents(Pipeline.load(str(tmp_path), precision="bf16")))
    caplog.clear()
    latents(pipe)
    assert not caplog.records  # it has learned


def test_nothing_is_left_to_try(zoo: Any) -> None:
    pipe = zoo.open("nano", precision="int8")
    dit = pipe.components.dit()
    dit.blocks[4].norm3.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match=r"step 1 of 3: blocks\.4.*nothing safer") as caught:
        latents(pipe)
    assert caught.value.exit_code == 7


def test_latents_that_are_broken_when_given(zoo: Any) -> None:
    shape = (1, 16, 2, 4, 4)
    with pytest.raises(NumericsError, match="the latents given"):
        latents(zoo.open("nano"), latents=torch.full(shape, float("nan")))


def test_a_vae_in_fp16(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames that came out sound are yielded once; the others come from bf16."""
    pipe = zoo.open("nano")
    in_fp16 = replace(pipe.components.dtypes, vae_format=VAE_FORMATS["fp16"])
    pipe.components.dtypes = in_fp16
    skips = []

    def decoded(self: Pipeline, vae: nn.Module, z: Tensor, skip: int) -> Iterator[Tensor]:
        skips.append((skip, next(vae.parameters()).dtype))
        for frame in range(skip, z.shape[2]):
            sound = frame == 0 or pipe.components.dtypes.vae == torch.bfloat16
            yield torch.full((1, 3, 4 if frame else 1, 8, 8), 0.0 if sound else float("nan"))

    monkeypatch.setattr(Pipeline, "_decoded", decoded)
    video = pipe.generate("a red circle", **SETTINGS)
    assert video.np.shape[0] == 5
    assert skips == [(0, torch.float16), (1, torch.bfloat16)]
    assert "latent frame 2 gave NaN" in caplog.text
    pipe.components.dtypes = replace(in_fp16, vae_format=VAE_FORMATS["fp32"])
    with pytest.raises(NumericsError, match="is the VAE's file sound"):
        pipe.generate("a red circle", **SETTINGS)


def test_healthy() -> None:
    x = torch.ones(3)
    assert healthy(x, None)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e4):
        assert not healthy(x, torch.tensor([1.0, bad]))


def test_the_culprit_is_the_first_of_its_inputs() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].bias.data[0] = float("inf")
    found = find_culprit(net, lambda: net(torch.ones(1, 2)))
    assert found is not None and (found.layer, found.saw) == ("1", "infinity")
    net[1].bias.data[0] = 0
    assert find_culprit(net, lambda: net(torch.ones(1, 2))) is None


def test_what_was_learned_outlives_the_module(zoo: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A transformer that is read again, as under a budget or after the other expert, is as safe."""
    pipe = zoo.open("nano", precision="int8")
    block = pipe.components.dit().blocks[1]
    block.attend = broken(block.attend, 0, float("nan"))
    expected = latents(pipe)
    pipe.components.clear()
    caplog.clear()
    assert torch.equal(latents(pipe), expected) and not caplog.records
    again = pipe.components.dit().blocks
    assert all(block.attend is block.ops.attention for block in again)
