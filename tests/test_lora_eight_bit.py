"""LoRAs beside eight-bit weights: nothing is quantised again, and all of it acts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lora_runs import CPU, I2V, SMALL, T2V, adapted, error, files, latents, merged
from test_offload import placement_of, run
from torch import Tensor

from wanrt.adapter import Adapter
from wanrt.config import Lora
from wanrt.loras import Shelf
from wanrt.quant.policy import EightBit
from wanrt.weights.load import load_component

__all__ = ["files"]  # a fixture


def cosine(ours: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([x.flatten() for x in results]).double() for results in (ours, expected))
    return float(torch.cosine_similarity(a, b, 0))


@pytest.mark.parametrize(("precision", "bar"), [("int8", 0.999), ("fp8", 0.997)])
@pytest.mark.parametrize("name", [T2V, I2V])
def test_close_to_merged(
    name: str, precision: EightBit, bar: float, zoo: Any, files: Callable[..., list[str]]
) -> None:
    """Low ranks and whole differences, of matrices, norms and biases."""
    spec, (first, second) = zoo.specs[name], files(name)
    loras = [Lora(first, 0.7), Lora(second, -0.4)]
    dit = load_component(zoo.path(name), "dit", eight_bit=precision)
    bare = {key: tensor.clone() for key, tensor in dit.state_dict().items()}
    plain = run(dit, spec, together=False)
    put_on = adapted(dit, name, zoo)
    put_on(loras)
    ours = run(dit, spec, together=False)
    assert cosine(ours, run(merged(name, loras, zoo), spec, together=False)) >= bar
    assert error(ours, plain) > 0.1
    matrices = [key for key in bare if bare[key].dtype.itemsize == 1]
    now = dit.state_dict()
    assert all(
        torch.equal(now[key].view(torch.uint8), bare[key].view(torch.uint8)) for key in matrices
    )
    put_on([Lora(first, 0.0), Lora(second, 0.0)])
    assert error(run(dit, spec, together=False), plain) < 0.02  # activations are rounded elsewhere
    put_on([])
    assert error(run(dit, spec, together=False), plain) == 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("placed", [(0, 2, None), (1, 2, 0)])
def test_streamed_is_resident(
    precision: EightBit,
    placed: tuple[int, int, int | None],
    zoo: Any,
    files: Callable[..., list[str]],
) -> None:
    spec, (first, second) = zoo.specs[T2V], files(T2V)
    loras, results = [Lora(first, 0.7), Lora(second, -0.4)], []
    for placement in (None, placement_of(spec.dit.num_layers, *placed)):
        dit = load_component(zoo.path(T2V), "dit", eight_bit=precision, placement=placement)
        Adapter(dit, CPU).put_on(Shelf(spec).uses(loras, "high"))
        results.append(run(dit, spec, together=True))
    assert error(*results) == 0


def test_in_a_request(zoo: Any, files: Callable[..., list[str]]) -> None:
    """Given when loading or with the request, it is a branch; strengths differ per request."""
    first, _ = files(T2V)
    pipe = zoo.open(T2V, precision="int8")
    plain, half = latents(pipe), latents(pipe, loras=[f"{first}:0.5"])
    assert not torch.equal(half, plain)
    assert torch.equal(latents(pipe), plain)
    assert torch.equal(latents(zoo.open(T2V, precision="int8", loras=[f"{first}:0.5"])), half)
    assert SMALL["num_steps"] == 2
