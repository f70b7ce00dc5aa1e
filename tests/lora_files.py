"""LoRA files of every dialect, written from one set of random changes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wanrt.weights.load import skeleton
from wanrt.weights.names import to_diffusers
from wanrt.weights.specs import Spec

RANK, ALPHA = 3, 6.0  # so that alpha / rank is 2


@dataclass(frozen=True)
class Truth:
    """down and up by module, without alpha / rank; differences by weight."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    differences: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = ALPHA

    def change(self, weight: str) -> Tensor:
        """All that it adds to one weight at strength 1, as a matrix or as the weight is."""
        module = weight.removesuffix(".weight")
        if module not in self.pairs or weight == module:
            return self.differences[weight]
        down, up = self.pairs[module]
        product = up @ down * (1.0 if self.alpha is None else self.alpha / len(down))
        difference = self.differences.get(weight)
        return product if difference is None else product + difference.reshape(product.shape)


def shapes_of(spec: Spec) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in skeleton("dit", spec).state_dict().items()}


def truth(
    shapes: dict[str, tuple[int, ...]],
    modules: list[str],
    differences: tuple[str, ...] = (),
    seed: int = 0,
    rank: int = RANK,
    alpha: float | None = ALPHA,
) -> Truth:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    pairs = {}
    for module in modules:
        rows, *rest = shapes[f"{module}.weight"]
        columns = math.prod(rest)
        pairs[module] = (random(rank, columns) / columns**0.5 * 5, random(rows, rank))
    return Truth(pairs, {name: random(*shapes[name]) for name in differences}, alpha)


def matrices(shapes: dict[str, tuple[int, ...]], *, blocks_only: bool = True) -> list[str]:
    """Modules that LoRAs usually change."""
    names = [name for name, shape in shapes.items() if len(shape) == 2]
    inside = [name for name in names if name.startswith("blocks.") or not blocks_only]
    return [name.removesuffix(".weight") for name in inside]


def _diffusers(module: str) -> str:
    (source,) = to_diffusers([f"{module}.weight"], "dit").values()
    return source.stored[0].removesuffix(".weight")


def _with(
    name: Callable[[str], str], down: str, up: str, alpha: bool
) -> Callable[[Truth], dict[str, Tensor]]:
    def write(given: Truth) -> dict[str, Tensor]:
        tensors = {}
        for module, (low, high) in given.pairs.items():
            factor = 1.0 if given.alpha is None else given.alpha / len(low)
            tensors[name(module) + down] = low if alpha else low * factor
            tensors[name(module) + up] = high
            if alpha and given.alpha is not None:
                tensors[name(module) + ".alpha"] = torch.tensor(given.alpha)
        for weight, values in given.differences.items():
            module, _, leaf = weight.rpartition(".")
            ending = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
            tensors[f"{name(module)}.{ending}"] = values
        return tensors

    return write


def _comfy(module: str) -> str:
    return f"diffusion_model.{module}"


def _flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


A, B = ".lora_A.weight", ".lora_B.weight"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
DIALECTS: dict[str, Callable[[Truth], dict[str, Tensor]]] = {
    "diffusers": _with(lambda m: "transformer." + _diffusers(m), A, B, False),
    "diffusers alpha": _with(lambda m: "transformer." + _diffusers(m), A, B, True),
    "diffusers bare": _with(_diffusers, A, B, False),
    "diffusers old": _with(_diffusers, "_lora.down.weight", "_lora.up.weight", False),
    "peft": _with(lambda m: f"base_model.model.{m}", A, B, False),
    "comfy AB": _with(_comfy, A, B, False),
    "comfy AB alpha": _with(_comfy, A, B, True),
    "comfy down up": _with(_comfy, DOWN, UP, True),
    "comfy full prefix": _with(lambda m: f"model.diffusion_model.{m}", DOWN, UP, True),
    "diffsynth": _with(str, ".lora_A.default.weight", ".lora_B.default.weight", False),
    "diffsynth pipe": _with(lambda m: f"pipe.dit.{m}", A, B, False),
    "mochi": _with(_comfy, ".lora_A", ".lora_B", False),
    "dots": _with(str, ".lora.down.weight", ".lora.up.weight", True),
    "linear layer": _with(
        str, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", True
    ),
    "kohya": _with(_flat, DOWN, UP, True),
    "kohya diffusers": _with(lambda m: _flat(_diffusers(m)), DOWN, UP, True),
    "lycoris": _with(lambda m: "lycoris_" + m.replace(".", "_"), DOWN, UP, True),
}
