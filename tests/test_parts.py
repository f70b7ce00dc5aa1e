"""Parts: which file of a folder is which part of a model, and what a model name stands for."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from wanrt.config import WanSpec
from wanrt.errors import FormatError, UsageError
from wanrt.weights import hub
from wanrt.weights.layouts import Layout
from wanrt.weights.parts import find_component, find_parts
from wanrt.weights.random import write_random

T2V, I2V, A14B = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.2-i2v-a14b"


def write(out: Path, model: WanSpec, layout: Layout = "original", **more: Any) -> Path:
    """Random weights, fp32 unless told otherwise."""
    write_random(model.id, layout, out, spec=model, **({"precision": "fp32"} | more))
    return out


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui"])
@pytest.mark.parametrize("variant", [T2V, I2V, A14B])
def test_parts_of_a_model_folder(variant: str, layout: Layout, zoo: Any, tmp_path: Path) -> None:
    model = zoo.specs[variant]
    write(tmp_path, model, layout)
    tokenizer = {
        "original": "google/umt5-xxl/spiece.model",
        "diffusers": "tokenizer/tokenizer.json",
    }
    if layout in tokenizer:
        (tmp_path / tokenizer[layout]).parent.mkdir(parents=True)
        (tmp_path / tokenizer[layout]).write_text("{}")
    parts = find_parts(tmp_path)
    kinds = {name: detected.kind for name, detected in parts.found.items()}
    wanted = {"dit": "dit", "vae": "vae", "umt5": "umt5"}
    wanted |= {"clip": "clip"} if model.clip else {}
    wanted |= {"low_noise": "dit"} if model.boundary else {}
    assert kinds == wanted
    assert all(getattr(parts, name) == detected.path for name, detected in parts.found.items())
    assert parts.tokenizer == (tmp_path / tokenizer[layout] if layout in tokenizer else None)
    if model.boundary:
        place = (f"{path.parent.name}/{path.name}" for path in (parts.dit, parts.low_noise))
        high, low = {
            "original": ("high_noise_model/", "low_noise_model/"),
            "diffusers": ("transformer/", "transformer_2/"),
            "comfyui": ("high_noise_", "low_noise_"),
        }[layout]
        assert high in next(place) and low in next(place)


def comfy_models(folder: Path, zoo: Any) -> Path:
    """A grown models/ folder: three transformers, two of all else, and other people's files."""
    for variant, precision in ((T2V, "fp16"), ("wan2.2-ti2v-5b", "fp16"), (T2V, "fp8")):
        part = folder.parent / f"{variant}-{precision}"
        write(part, zoo.specs[variant], "comfyui", precision=precision)
        for path in part.rglob("*.safetensors"):
            target = folder / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    (folder / "loras").mkdir()
    (folder / "loras" / "broken.safetensors").write_bytes(b"x")
    save_file({"decoder.mid.weight": torch.ones(1)}, folder / "vae" / "other_vae.safetensors")
    return folder


def test_comfyui_models_folder_asks_for_a_choice(zoo: Any, tmp_path: Path) -> None:
    """The VAE needs none: only one of the two has the transformer's latents."""
    models = comfy_models(tmp_path / "models", zoo)
    transformers = models / "diffusion_models"
    word = "3 candidates for a diffusion transformer: .*--model"
    with pytest.raises(FormatError, match=word) as caught:
        find_parts(models)
    assert all(path.name in str(caught.value) for path in transformers.iterdir())
    for path in transformers.glob("*1.3b*"):
        path.unlink()
    with pytest.raises(FormatError, match="2 candidates for a umT5 text encoder: .*--text-encoder"):
        find_parts(models)
    chosen = models / "text_encoders" / "umt5_xxl_fp8.safetensors"
    parts = find_parts(models, text_encoder=chosen)
    assert parts.umt5 == chosen
    assert parts.vae == models / "vae" / "wan2.2_vae.safetensors"


def test_single_file_and_overrides(zoo: Any, tmp_path: Path) -> None:
    comfy = write(tmp_path / "a14b", zoo.specs[A14B], "comfyui")
    i2v = write(tmp_path / "i2v", zoo.specs[I2V])
    high, low = sorted((comfy / "split_files" / "diffusion_models").iterdir())
    alone = find_parts(high)
    assert (alone.dit, alone.low_noise, alone.vae, alone.umt5) == (high, None, None, None)
    with pytest.raises(FormatError, match="comes without a VAE .*--vae"):
        alone.require("dit", "vae")
    parts = find_parts(high, low_noise=low, vae=i2v, text_encoder=comfy, clip=i2v)
    parts.require("dit", "vae", "umt5", "clip")
    assert parts.low_noise == low and parts.vae == i2v / "Wan2.1_VAE.pth"
    assert parts.umt5.parent.name == "text_encoders" and parts.clip.name.startswith("models_clip")
    word = "this is .* a diffusion transformer; a VAE was asked for"
    with pytest.raises(FormatError, match=word):
        find_parts(high, vae=low)


def test_component_folder_and_foreign_file(zoo: Any, tmp_path: Path) -> None:
    write(tmp_path / "m", zoo.specs[T2V], "diffusers")
    parts = find_parts(tmp_path / "m" / "vae")
    assert list(parts.found) == ["vae"] and parts.dit is None
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError, match="holds no part of a Wan model"):
        find_parts(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui"])
def test_broken_file_in_a_model_folder(layout: Layout, zoo: Any, tmp_path: Path) -> None:
    """The transformer is cut short: that is said, not that the folder has none."""
    write(tmp_path, zoo.specs[T2V], layout)
    path = find_parts(tmp_path).dit
    path.write_bytes(path.read_bytes()[:-1])
    for find in (find_parts, lambda folder: find_component(folder, "dit")):
        with pytest.raises(FormatError, match="truncated: 1 of .* no other file is a diffusion"):
            find(tmp_path)
    assert find_component(tmp_path, "vae").kind == "vae"


def test_safetensors_win_over_a_pickle_of_the_same_part(zoo: Any, tmp_path: Path) -> None:
    write(tmp_path, zoo.specs[T2V], components=("vae",))
    save_file(torch.load(tmp_path / "Wan2.1_VAE.pth"), tmp_path / "converted.safetensors")
    assert find_component(tmp_path, "vae").path.name == "converted.safetensors"


def test_ids_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def snapshot(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repository, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve_model("wan2.2-i2v-a14b") == tmp_path
    assert hub.resolve_model("someone/some-wan", offline=True) == tmp_path
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.resolve_model("wan2.1-vace-14b")
    assert asked == [
        ("Wan-AI/Wan2.2-I2V-A14B", False),
        ("someone/some-wan", True),
        ("Wan-AI/Wan2.1-VACE-14B", True),
    ]
    assert hub.resolve_model(str(tmp_path)) == tmp_path and len(asked) == 3
    with pytest.raises(UsageError, match="neither a file or folder nor an id .*wan2.1-t2v-1.3b"):
        hub.resolve_model("wan2.1-t2v-1.3")


def test_offline_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client with an empty cache; it may not touch the network."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went online"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UsageError, match="not in the local cache; download it once without --offline"
    ):
        hub.resolve_model("wan2.1-t2v-1.3b", offline=True)


def test_hub_errors_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise hub_errors.LocalEntryNotFoundError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UsageError, match="the hub did not answer: no route") as caught:
        hub.resolve_model("a/b")
    assert "\n" not in str(caught.value)
