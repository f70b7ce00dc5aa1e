"""Random checkpoints: shards, precisions, files beside the weights, and full disks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wanrt.config import MODELS, WanSpec, find_variant
from wanrt.errors import OutputError, UsageError
from wanrt.weights.detect import describe
from wanrt.weights.layouts import Layout
from wanrt.weights.load import load_component
from wanrt.weights.parts import find_component
from wanrt.weights.random import random_values, write_random


@pytest.fixture
def t2v(zoo: Any) -> WanSpec:
    return zoo.specs["wan2.1-t2v-1.3b"]


@pytest.fixture
def i2v(zoo: Any) -> WanSpec:
    return zoo.specs["wan2.1-i2v-14b-480p"]


def write(out: Path, model: WanSpec, layout: Layout = "original", **more: Any) -> Path:
    """Random weights, fp32 unless told otherwise."""
    write_random(model.id, layout, out, spec=model, **({"precision": "fp32"} | more))
    return out


def test_model_index_names_the_parts(zoo: Any, tmp_path: Path) -> None:
    write(tmp_path, zoo.specs["wan2.2-i2v-a14b"], "diffusers")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline" and index["boundary_ratio"] == 0.9
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert "image_encoder" not in index


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_large_models_are_written_in_shards(layout: Layout, t2v: WanSpec, tmp_path: Path) -> None:
    write(tmp_path / "one", t2v, layout, components=("dit",))
    write(tmp_path / "many", t2v, layout, components=("dit",), max_shard=300_000)
    one, many = (find_component(tmp_path / name, "dit") for name in ("one", "many"))
    files = list(many.path.parent.glob("*-of-*.safetensors"))
    assert (one.container, many.container) == ("safetensors", "shards") and len(files) > 3
    assert all(f.stat().st_size < 320_000 for f in files if len(load_file(f)) > 1)
    whole = load_file(one.path)
    pieces = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


RELEASED = {
    "original": {"dit": "fp32", "umt5": "bf16", "vae": "fp32", "clip": "fp16"},
    "diffusers": {"dit": "fp32", "umt5": "bf16", "vae": "fp32", "clip": "fp32"},
    "comfyui": {"dit": "fp16", "umt5": "fp16", "vae": "fp16", "clip": "fp16"},
}


@pytest.mark.parametrize("layout", RELEASED)
def test_released_precisions_are_the_default(layout: Layout, i2v: WanSpec, tmp_path: Path) -> None:
    write(tmp_path, i2v, layout, precision=None)
    assert {d.kind: d.precision for d in describe(tmp_path)} == RELEASED[layout]


def test_fp16_files_keep_the_patch_embedding_in_fp32(i2v: WanSpec, tmp_path: Path) -> None:
    write(tmp_path, i2v, "comfyui", precision="fp16")
    stored = load_file(next(tmp_path.rglob("diffusion_models/*")))
    exact = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert exact == {"model.diffusion_model.patch_embedding.weight"}


@pytest.mark.parametrize("name", ["t2v-1.3B", "T2V-1.3b", "wan2.1-t2v-1.3b"])
def test_variant_names(name: str) -> None:
    assert find_variant(name) is MODELS["wan2.1-t2v-1.3b"]
    assert find_variant("ti2v-5B").id == "wan2.2-ti2v-5b"
    with pytest.raises(UsageError, match="no variant 'x'; known: nano"):
        find_variant("x")


def test_random_weights_never_overwrite(t2v: WanSpec, tmp_path: Path) -> None:
    path = write(tmp_path / "a", t2v, components=("vae",)) / "Wan2.1_VAE.pth"
    before = path.read_bytes()
    with pytest.raises(OutputError, match="already there"):
        write(tmp_path / "a", t2v, components=("vae",), seed=1)
    assert path.read_bytes() == before


def test_values_depend_on_the_seed_and_nothing_else(t2v: WanSpec, tmp_path: Path) -> None:
    loaded = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = write(tmp_path / name, t2v, components=("vae",), seed=seed)
        loaded[name] = load_component(path, "vae").state_dict()["conv1.weight"]
    assert torch.equal(loaded["a"], loaded["b"]) and not torch.equal(loaded["a"], loaded["c"])


def test_random_weights_check_the_space_first(t2v: WanSpec, tmp_path: Path) -> None:
    model = replace(t2v, umt5=replace(t2v.umt5, vocab_size=10**13))
    with pytest.raises(OutputError, match="GiB are free"):
        write(tmp_path / "huge", model)
    assert not (tmp_path / "huge").exists()


@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_failed_writes_leave_nothing(
    layout: Layout, t2v: WanSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def full(*tensor: Any) -> Tensor:
        made.append(tensor)
        if len(made) > 5:
            raise OSError(28, "No space left on device")
        return random_values(*tensor)

    monkeypatch.setattr("wanrt.weights.random.random_values", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path, t2v, layout)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
