"""A run watches itself: one number per step tells whether the arithmetic still holds.

NaN, infinity or a saturated velocity costs a step, which is computed again one notch safer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Velocities are differences of noise and normalised latents: beyond 30 is unheard of.
SATURATED = 1e3


def healthy(*tensors: Tensor | None) -> bool:
    """Whether all are finite and none is saturated; one synchronisation."""
    largest = [torch.linalg.vector_norm(x, torch.inf) for x in tensors if x is not None]
    return bool((torch.stack(largest) < SATURATED).all())  # no NaN is less than anything


class Culprit(NamedTuple):
    """The first layer whose result is not finite although all that it was given is."""

    layer: str
    saw: str


def find_culprit(module: nn.Module, run: Callable[[], object]) -> Culprit | None:
    """Run once more and look at every layer's result; None where all are finite."""
    found: list[Culprit] = []
    sound: list[bool] = []  # of the layers under way: whether they were given finite numbers

    def enter(_: nn.Module, inputs: tuple[object, ...]) -> None:
        sound.append(not found and all(map(_finite, _tensors(inputs))))

    def leave(name: str, output: object) -> None:
        if sound.pop() and not found:
            bad = next((x for x in _tensors(output) if not _finite(x)), None)
            if bad is not None:
                found.append(Culprit(name, "NaN" if bad.isnan().any() else "infinity"))

    hooks = []
    for name, part in module.named_modules():
        if name:
            hooks.append(part.register_forward_pre_hook(enter))
            hooks.append(part.register_forward_hook(lambda _, args, y, n=name: leave(n, y)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.float()).all()) if x.is_floating_point() else True


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [x for item in value for x in _tensors(item)]
    return []
