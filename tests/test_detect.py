"""Detection: kind, shape and title of every released model, from a header without its bytes."""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanrt.config import (
    MODELS,
    NANO,
    VAE_2_1,
    VAE_2_2,
    ClipSpec,
    DitSpec,
    Umt5Spec,
    VaeSpec,
    WanSpec,
)
from wanrt.errors import FormatError
from wanrt.weights import configs, names
from wanrt.weights.detect import Detected, describe
from wanrt.weights.load import skeleton
from wanrt.weights.names import Kind
from wanrt.weights.specs import Spec
from wanrt.weights.titles import dit_task

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
Header = dict[str, tuple[str, tuple[int, ...]]]


def hollow(path: Path, header: Header, metadata: Mapping[str, str] | None = None) -> Path:
    """A file of true size whose tensor bytes are a hole: detection must not need them."""
    entries: dict[str, object] = {"__metadata__": dict(metadata or {})}
    position = 0
    for name, (dtype, shape) in header.items():
        end = position + BYTES[dtype] * torch.Size(shape).numel()
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


@cache
def shapes(kind: Kind, spec: Spec) -> dict[str, tuple[int, ...]]:
    """Original names and shapes; CLIP with the last block that the module leaves out."""
    full = replace(spec, num_layers=spec.num_layers + 1) if isinstance(spec, ClipSpec) else spec
    return {name: tuple(t.shape) for name, t in skeleton(kind, full).state_dict().items()}


def stored(
    kind: Kind, spec: Spec, dtype: str = "F16", prefix: str = "", foreign: bool = False
) -> Header:
    ours = shapes(kind, spec)
    if not foreign:
        return {prefix + name: (dtype, shape) for name, shape in ours.items()}
    vae = spec if isinstance(spec, VaeSpec) else None
    header: Header = {}
    for name, source in names.to_diffusers(ours, kind, vae).items():
        rows, *rest = ours[name][source.lead :]
        for part in source.stored:
            header[prefix + part] = (dtype, (rows // len(source.stored), *rest))
    return header


def only(found: Iterable[Detected]) -> Detected:
    (one,) = found
    return one


DIT_TITLES = {
    "nano": "wanrt nano",
    "wan2.1-t2v-1.3b": "Wan2.1-T2V-1.3B",
    "wan2.1-t2v-14b": "Wan2.1-T2V-14B",
    "wan2.1-i2v-14b-480p": "Wan2.1-I2V-14B",
    "wan2.1-i2v-14b-720p": "Wan2.1-I2V-14B",
    "wan2.1-flf2v-14b-720p": "Wan2.1-FLF2V-14B-720P",
    "wan2.1-vace-1.3b": "Wan2.1-VACE-1.3B",
    "wan2.1-vace-14b": "Wan2.1-VACE-14B",
    "wan2.2-t2v-a14b": "Wan2.1-T2V-14B",  # same shapes; names decide, see below
    "wan2.2-i2v-a14b": "Wan2.2-I2V-A14B",
    "wan2.2-ti2v-5b": "Wan2.2-TI2V-5B",
}


@pytest.mark.parametrize("foreign", [False, True], ids=["original", "diffusers"])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_transformer(model: WanSpec, foreign: bool, tmp_path: Path) -> None:
    path = hollow(tmp_path / "m.safetensors", stored("dit", model.dit, "BF16", foreign=foreign))
    found = only(describe(path))
    assert found.title == DIT_TITLES[model.id] + " bf16"
    assert (found.kind, found.spec, found.precision) == ("dit", model.dit, "bf16")
    assert found.layout == ("diffusers" if foreign else "original")
    assert found.num_bytes == 2 * found.num_params


PARAMETERS = {  # wan-spec 7.1, from published file sizes
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b-720p": 16_394_878_784,
    "wan2.1-flf2v-14b-720p": 16_395_536_704,
    "wan2.1-vace-1.3b": 2_153_972_032,
    "wan2.1-vace-14b": 17_337_592_896,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameter_counts_are_the_released_ones(model: str, tmp_path: Path) -> None:
    path = hollow(tmp_path / "m.safetensors", stored("dit", MODELS[model].dit))
    assert only(describe(path)).num_params == PARAMETERS[model]


OTHERS: dict[str, tuple[Kind, Spec, str, int]] = {
    "vae 2.1": ("vae", VAE_2_1, "Wan2.1 VAE fp16", 126_892_531),
    "vae 2.2": ("vae", VAE_2_2, "Wan2.2 VAE fp16", 704_688_668),
    "vae nano": ("vae", NANO.vae, "wanrt nano VAE fp16", 0),
    "vae other": (
        "vae",
        VaeSpec(16, 8, 12, (1, 3, 5), 1, (True, False)),
        "Wan VAE (base 8, z 16) fp16",
        0,
    ),
    "vae 2.2, other": (
        "vae",
        VaeSpec(48, 8, 16, (1, 2, 2), 3, (False, True), 2),
        "Wan VAE (base 8, z 48) fp16",
        0,
    ),
    "umt5-xxl": ("umt5", Umt5Spec(), "umT5-xxl fp16", 5_680_910_336),
    "umt5 nano": ("umt5", NANO.umt5, "wanrt nano umT5 fp16", 0),
    "umt5 other": (
        "umt5",
        Umt5Spec(300, 64, 96, 128, num_heads=6, num_layers=3, num_buckets=16),
        "umT5 (dim 64, 3 layers) fp16",
        0,
    ),
    "clip": ("clip", ClipSpec(), "CLIP ViT-H/14 fp16", 0),
    "clip other": (
        "clip",
        ClipSpec(160, 320, 2, 4, image_size=56, patch_size=8),
        "CLIP vision (dim 160, 4 layers) fp16",
        0,
    ),
}


@pytest.mark.parametrize("foreign", [False, True], ids=["original", "diffusers"])
@pytest.mark.parametrize("case", OTHERS)
def test_every_other_part(case: str, foreign: bool, tmp_path: Path) -> None:
    kind, spec, title, num_params = OTHERS[case]
    path = hollow(tmp_path / "m.safetensors", stored(kind, spec, foreign=foreign))
    found = only(describe(path))
    assert (found.kind, found.spec, found.title) == (kind, spec, title)
    assert not num_params or found.num_params == num_params


ODD_DITS = {
    "one layer": replace(NANO.dit, num_layers=1),
    "wide patch": replace(NANO.dit, patch_size=(1, 4, 4), in_dim=48, out_dim=48),
    "i2v": replace(NANO.dit, in_dim=36, image_dim=80),
    "flf2v": replace(NANO.dit, in_dim=36, image_dim=80, image_pos_tokens=10),
    "i2v without CLIP": replace(NANO.dit, in_dim=36),
    "vace": replace(NANO.dit, vace_layers=(0, 2, 4), vace_in_dim=32),
    "other widths": DitSpec(384, 500, 3, 2, in_dim=8, out_dim=4, freq_dim=64, text_dim=48),
}
TASKS = dict(zip(ODD_DITS, ("t2v", "t2v", "i2v", "flf2v", "i2v", "vace", "i2v"), strict=True))


@pytest.mark.parametrize("case", ODD_DITS)
def test_small_transformers_of_any_shape(case: str, tmp_path: Path) -> None:
    spec = ODD_DITS[case]
    found = only(describe(hollow(tmp_path / "m.safetensors", stored("dit", spec, foreign=True))))
    assert found.spec == spec and dit_task(spec) == TASKS[case]
    assert found.title == f"Wan DiT (dim {spec.dim}, {spec.num_layers} layers) fp16"


def test_shapes_of_two_releases_are_told_apart_by_names(tmp_path: Path) -> None:
    header = stored("dit", MODELS["wan2.2-t2v-a14b"].dit)
    titles = {
        "a.safetensors": ("Wan2.1-T2V-14B fp16", "same shapes: Wan2.2-T2V-A14B"),
        "wan2.2_t2v_high_noise_14B.safetensors": ("Wan2.2-T2V-A14B high noise fp16", ""),
        "low_noise_model/m.safetensors": ("Wan2.2-T2V-A14B low noise fp16", ""),
        "Wan2_2-T2V-A14B-LOW_fp8.safetensors": ("Wan2.2-T2V-A14B low noise fp16", ""),
        "wan_low_vram.safetensors": ("Wan2.1-T2V-14B fp16", "same shapes: Wan2.2-T2V-A14B"),
        "Wan-AI--Wan2.2-T2V-A14B/m.safetensors": ("Wan2.2-T2V-A14B fp16", ""),
    }
    for name, expected in titles.items():
        found = only(describe(hollow(tmp_path / name, header)))
        assert (found.title, found.note) == expected


def block(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(
        ("ffn.0.weight", "ffn.2.weight", ".q.weight")
    )


def cast(header: Header, dtype: str, leaf: str = "") -> Header:
    """The block matrices in another dtype, with a scale of this name beside each."""
    changed = {
        name: (dtype, shape) if block(name) else (old, shape)
        for name, (old, shape) in header.items()
    }
    if leaf:
        changed |= {
            name.removesuffix("weight") + leaf: ("F32", ()) for name in header if block(name)
        }
    return changed


BIG = MODELS["wan2.1-i2v-14b-480p"].dit
PRECISIONS = {
    "fp32": stored("dit", BIG, "F32"),
    "bf16": stored("dit", BIG, "BF16"),
    "fp16": stored("dit", BIG, "F16") | {"patch_embedding.weight": ("F32", (5120, 36, 1, 2, 2))},
    "fp8": cast(stored("dit", BIG, "F16"), "F8_E4M3"),
    "fp8_scaled": cast(stored("dit", BIG, "F16"), "F8_E4M3", "scale_weight"),
    "int8": cast(stored("dit", BIG, "BF16"), "I8", "weight_scale"),
    "mixed": cast(stored("dit", BIG, "F16"), "BF16"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_is_part_of_the_title(precision: str, tmp_path: Path) -> None:
    found = only(describe(hollow(tmp_path / "m.safetensors", PRECISIONS[precision])))
    assert found.precision == precision and found.spec == BIG
    assert str(found) == f"Wan2.1-I2V-14B {precision}, a diffusion transformer"


LAYOUTS = {
    "model.diffusion_model. prefix": (
        stored("dit", NANO.dit, prefix="model.diffusion_model."),
        "comfyui",
    ),
    "fp8 marker": (stored("dit", NANO.dit) | {"scaled_fp8": ("F8_E4M3", (2,))}, "comfyui"),
    "embedded tokenizer": (
        stored("umt5", NANO.umt5, foreign=True) | {"spiece_model": ("U8", (1000,))},
        "comfyui",
    ),
    "visual. prefix": (stored("clip", ClipSpec(), prefix="visual."), "original"),
    "vision_model. prefix": (
        stored("clip", ClipSpec(), prefix="vision_model.", foreign=True),
        "diffusers",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(case: str, tmp_path: Path) -> None:
    header, layout = LAYOUTS[case]
    assert only(describe(hollow(tmp_path / "m.safetensors", header))).layout == layout


def test_config_of_another_variant(tmp_path: Path) -> None:
    path = hollow(tmp_path / "m.safetensors", PRECISIONS["fp8"])
    small = configs.original_dit(MODELS["wan2.1-t2v-1.3b"].dit, "t2v")
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(
        FormatError, match="this is Wan2.1-I2V-14B fp8, but its config.json says dim 1536"
    ):
        describe(path)


def test_config_of_another_part_is_not_read(tmp_path: Path) -> None:
    """In the original folders the transformer's config.json lies beside all other parts."""
    path = hollow(tmp_path / "Wan2.1_VAE.safetensors", stored("vae", VAE_2_1))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "z_dim": 3}))
    assert only(describe(path)).spec == VAE_2_1


def without(header: Header, *parts: str) -> Header:
    return {
        name: value for name, value in header.items() if not any(part in name for part in parts)
    }


NANO_DIT = stored("dit", NANO.dit)
UNUSABLE = {
    "no patch embedding": (without(NANO_DIT, "patch_embedding"), "lacks patch_embedding.weight"),
    "a block missing": (without(NANO_DIT, "blocks.3."), "numbers are missing"),
    "odd width": ({"head.modulation": ("F16", (1, 2, 100))}, "no multiple of the head size 128"),
    "flat patch embedding": (
        NANO_DIT | {"patch_embedding.weight": ("F16", (256, 16))},
        "not usable",
    ),
    "an empty tensor": (
        NANO_DIT | {"head.modulation": ("F16", (1, 2, 0))},
        "head.modulation is empty",
    ),
    "a T5": (
        without(stored("umt5", NANO.umt5), "blocks.1.pos_embedding"),
        "T5, not a umT5: 1 bias tables, 2 layers",
    ),
    "a CLIP-L": (
        stored("clip", ClipSpec()) | {"patch_embedding.weight": ("F16", (1024, 3, 14, 14))},
        "no multiple of the head size 80",
    ),
    "VAE stages cut": (
        without(stored("vae", VAE_2_1), "encoder.downsamples.9", "downsamples.10"),
        "stages",
    ),
    "VAE of 5 channels": (
        stored("vae", VAE_2_1) | {"encoder.conv1.weight": ("F16", (96, 40, 3, 3, 3))},
        "patch size 3",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_models_that_do_not_hold_together(case: str, tmp_path: Path) -> None:
    header, word = UNUSABLE[case]
    with pytest.raises(FormatError, match=word):
        describe(hollow(tmp_path / "m.safetensors", header))


LORAS = {
    "PEFT": {"transformer.blocks.0.attn1.to_q.lora_A.weight": ("F16", (32, 256))},
    "ComfyUI": {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": ("F16", (32, 256))},
    "DiffSynth": {"blocks.0.self_attn.q.lora_A.default.weight": ("F16", (32, 256))},
    "kohya": {"lora_unet_blocks_0_self_attn_q.lora_down.weight": ("F16", (32, 256))},
    "dots": {"blocks.0.self_attn.q.lora.down.weight": ("F16", (32, 256))},
    "full differences": {"diffusion_model.blocks.0.self_attn.q.diff": ("F16", (4, 4))},
}


@pytest.mark.parametrize("case", LORAS)
def test_lora(case: str, tmp_path: Path) -> None:
    found = only(describe(hollow(tmp_path / "m.safetensors", LORAS[case])))
    title = "LoRA" if case == "full differences" else "LoRA of rank 32"
    assert (found.kind, found.title, found.spec) == ("lora", title, None)


RELATIVES = {
    "face_adapter.fuser.weight": "Wan2.2-Animate-14B fp16",
    "casual_audio_encoder.weights": "Wan2.2-S2V-14B fp16",
    "control_adapter.conv.weight": "Wan Fun-Camera fp16",
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_wan_are_named_and_not_taken_for_it(name: str, tmp_path: Path) -> None:
    path = hollow(tmp_path / "m.safetensors", stored("dit", NANO.dit) | {name: ("F16", (4, 4))})
    found = only(describe(path))
    assert (found.kind, found.title, found.note) == (
        "unknown",
        RELATIVES[name],
        "wanrt does not run it",
    )


def test_foreign_file(tmp_path: Path) -> None:
    found = only(
        describe(hollow(tmp_path / "m.safetensors", {"model.embed.weight": ("F16", (4, 4))}))
    )
    assert (found.kind, found.title) == ("unknown", "no Wan model")
    assert "model.embed.weight" in found.note


def test_all_in_one_file(tmp_path: Path) -> None:
    header = stored("dit", NANO.dit, prefix="model.diffusion_model.") | stored(
        "vae", NANO.vae, prefix="vae."
    )
    header |= stored("umt5", NANO.umt5, prefix="text_encoders.umt5xxl.transformer.", foreign=True)
    found = describe(hollow(tmp_path / "aio.safetensors", header))
    assert {d.kind: d.spec for d in found} == {"dit": NANO.dit, "vae": NANO.vae, "umt5": NANO.umt5}
    assert sum(d.num_bytes for d in found) == sum(
        BYTES[dtype] * torch.Size(shape).numel() for dtype, shape in header.values()
    )


def test_folder(tmp_path: Path) -> None:
    """Below the folder, hidden folders aside; what cannot be read is listed, not fatal."""
    hollow(tmp_path / "unet" / "sub" / "wan.safetensors", stored("dit", NANO.dit))
    torch.save(
        {n: torch.zeros(s) for n, s in shapes("vae", NANO.vae).items()}, tmp_path / "vae.pth"
    )
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    hollow(tmp_path / ".cache" / "hidden.safetensors", stored("dit", NANO.dit))
    (tmp_path / "readme.md").write_text("no weights")
    found = {d.path.name: d for d in describe(tmp_path)}
    kinds = {name: d.kind for name, d in found.items()}
    assert kinds == {
        "broken.safetensors": "unknown",
        "foreign.safetensors": "unknown",
        "vae.pth": "vae",
        "wan.safetensors": "dit",
    }
    assert "limit" in found["broken.safetensors"].note and found["vae.pth"].container == "pickle"
