"""config.json: what no shape tells comes from it, and it must fit the tensors it lies beside."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanrt.config import WanSpec
from wanrt.errors import FormatError
from wanrt.weights.names import Kind
from wanrt.weights.parts import find_component
from wanrt.weights.random import write_random
from wanrt.weights.specs import Spec


def write(out: Path, model: WanSpec, layout: str, kind: Kind) -> Path:
    write_random("", layout, out, spec=model, components=(kind,), precision="fp16")
    return next(out.rglob("config.json"))


# A setting of each kind that no tensor shows, by another value than the default.
UNSEEN: dict[Kind, Callable[[Any], Spec]] = {
    "dit": lambda spec: replace(spec, eps=3e-4, vace_layers=(1,)),
    "umt5": lambda spec: replace(spec, eps=3e-4, max_distance=64),
    "clip": lambda spec: replace(spec, eps=3e-4),
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dit", "original"), ("dit", "diffusers"), ("umt5", "diffusers"), ("clip", "diffusers")],
)
def test_settings_that_no_shape_tells(kind: Kind, layout: str, zoo: Any, tmp_path: Path) -> None:
    model = zoo.specs["wan2.1-i2v-14b-480p" if kind == "clip" else "wan2.1-vace-14b"]
    spec = UNSEEN[kind](getattr(model, kind))
    config = write(tmp_path, replace(model, **{kind: spec}), layout, kind)
    assert find_component(tmp_path, kind).spec == spec
    config.unlink()
    assert find_component(tmp_path, kind).spec == getattr(model, kind)


@pytest.mark.parametrize(
    ("vace_layers", "expected"), [(None, (0, 2, 4)), ([0, 1, 5], (0, 1, 5)), ([0, 1], None)]
)
def test_vace_layers(
    vace_layers: list[int] | None, expected: tuple[int, ...] | None, zoo: Any, tmp_path: Path
) -> None:
    """From the config, else evenly spread over the blocks."""
    model = zoo.specs["wan2.1-vace-14b"]
    model = replace(model, dit=replace(model.dit, num_layers=6, vace_layers=(0, 1, 5)))
    path = write(tmp_path, model, "original", "dit")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vace_layers": vace_layers}))
    if expected is None:
        with pytest.raises(FormatError, match=r"3 VACE blocks, but vace_layers is \[0, 1\]"):
            find_component(path.parent / "diffusion_pytorch_model.safetensors", "dit")
        return
    assert find_component(tmp_path, "dit").spec.vace_layers == expected


WRONG: dict[Kind, dict[str, int]] = {
    "dit": {"num_layers": 40, "ffn_dim": 7, "num_attention_heads": 12, "in_channels": 36},
    "vae": {"z_dim": 48, "base_dim": 160, "num_res_blocks": 3},
    "umt5": {"d_model": 4096, "d_ff": 1, "num_heads": 64},
    "clip": {"hidden_size": 768, "num_attention_heads": 16},
}


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(k, key, v) for k, row in WRONG.items() for key, v in row.items()]
)
def test_config_of_another_model(
    kind: Kind, key: str, value: int, zoo: Any, tmp_path: Path
) -> None:
    model = zoo.specs["wan2.1-i2v-14b-480p" if kind == "clip" else "wan2.1-t2v-1.3b"]
    path = write(tmp_path, model, "diffusers", kind)
    assert find_component(path.parent, kind).spec == getattr(model, kind)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(
        FormatError, match=f"this is .* but its config.json says {key} {value}, the"
    ):
        find_component(next(path.parent.glob("*.safetensors")), kind)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', "[" * 200_000], ids=str.__len__)
def test_broken_config(text: str, zoo: Any, tmp_path: Path) -> None:
    path = write(tmp_path, zoo.specs["wan2.1-t2v-1.3b"], "diffusers", "vae")
    path.write_text(text)
    with pytest.raises(FormatError, match="config.json"):
        find_component(next(path.parent.glob("*.safetensors")), "vae")
