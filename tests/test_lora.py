"""LoRA files: every dialect says the same, diffusers' converters agree, broken files are named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from hypothesis import strategies as st
from lora_files import ALPHA, DIALECTS, RANK, Truth, matrices, shapes_of, truth
from safetensors.torch import save_file
from torch import Tensor

from wanrt.errors import FormatError
from wanrt.weights.lora import LoraFile
from wanrt.weights.lora_fit import fit
from wanrt.weights.lora_names import parse
from wanrt.weights.names import to_diffusers

T2V, I2V, VACE = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-vace-1.3b"
DIFFERENCES = (
    *("blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.self_attn.norm_q.weight"),
    *("blocks.0.self_attn.q.bias", "head.head.weight", "head.head.bias", "time_projection.1.bias"),
    *("blocks.1.modulation", "head.modulation", "patch_embedding.weight"),
)
PIECES = (torch.ones(2, 128), torch.ones(128, 2))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(tensors: dict[str, Tensor], **metadata: str) -> Path:
        path = tmp_path / "lora.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata or None)
        return path

    return call


def changes(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All that a file adds to a model's weights."""
    file = LoraFile.open(path)
    found = {}
    for name in fit(file, shapes, "the model").names:
        change = file.read(name, shapes[name])
        total = torch.zeros(shapes[name]) if change.diff is None else change.diff
        if change.low_rank is not None:
            total = total + (change.low_rank.up @ change.low_rank.down).view(shapes[name])
        found[name] = total
    return found


def assert_is(found: dict[str, Tensor], given: Truth) -> None:
    expected = {f"{module}.weight" for module in given.pairs} | set(given.differences)
    assert set(found) == expected
    for name, values in found.items():
        torch.testing.assert_close(values.view(-1), given.change(name).reshape(-1))


@pytest.mark.parametrize("name", [T2V, I2V, VACE])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(dialect: str, name: str, zoo: Any, write: Write) -> None:
    shapes = shapes_of(zoo.specs[name].dit)
    given = truth(shapes, matrices(shapes, blocks_only=False))
    assert_is(changes(write(DIALECTS[dialect](given)), shapes), given)


@pytest.mark.parametrize("dialect", ["comfy down up", "diffsynth", "kohya"])
def test_differences(dialect: str, zoo: Any, write: Write) -> None:
    """`.diff`, `.diff_b` and `.diff_m`, also beside a low-rank change of the same weight."""
    shapes = shapes_of(zoo.specs[T2V].dit)
    differences = (*DIFFERENCES, "blocks.0.ffn.0.weight")
    given = truth(shapes, ["blocks.0.ffn.0", "blocks.0.self_attn.q"], differences)
    assert_is(changes(write(DIALECTS[dialect](given)), shapes), given)


CONVERTERS = {
    "comfy AB": theirs._convert_non_diffusers_wan_lora_to_diffusers,
    "comfy down up": theirs._convert_non_diffusers_wan_lora_to_diffusers,
    "kohya": theirs._convert_musubi_wan_lora_to_diffusers,
}


@pytest.mark.parametrize("name", [T2V, I2V])
@pytest.mark.parametrize("dialect", CONVERTERS)
def test_diffusers_reads_the_same(dialect: str, name: str, zoo: Any, write: Write) -> None:
    """What its converters make of a file, held against our reading of the file itself."""
    shapes = shapes_of(zoo.specs[name].dit)
    outside = () if dialect == "kohya" else ("head.head", "time_projection.1")
    if dialect == "comfy AB":
        outside += ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    alpha = None if outside else ALPHA  # the converter forgets alpha outside the blocks
    biases = () if dialect == "kohya" else ("blocks.0.ffn.0.bias", "time_projection.1.bias")
    given = truth(shapes, [*matrices(shapes), *outside], biases, alpha=alpha)
    tensors = DIALECTS[dialect](given)
    path = write(tensors)
    converted = CONVERTERS[dialect](dict(tensors))
    ours = changes(path, shapes)
    stems = {s.stored[0]: n for n, s in to_diffusers(shapes, "dit").items()}
    seen = set()
    for key, down in converted.items():
        stem, _, leaf = key.removeprefix("transformer.").partition(".lora_")
        if leaf == "A.weight":
            up = converted[f"transformer.{stem}.lora_B.weight"]
            weight = stems[f"{stem}.weight"]
            torch.testing.assert_close(ours[weight], (up @ down).view(shapes[weight]))
            seen.add(weight)
        elif leaf == "B.bias":
            torch.testing.assert_close(ours[stems[f"{stem}.bias"]], down)
            seen.add(stems[f"{stem}.bias"])
    assert seen == set(ours)


def test_diffusers_reads_alpha_the_same(zoo: Any, write: Write) -> None:
    shapes = shapes_of(zoo.specs[T2V].dit)
    tensors = DIALECTS["comfy down up"](truth(shapes, matrices(shapes)))
    path = write(tensors)
    converted = CONVERTERS["comfy down up"](dict(tensors))
    product = converted["transformer.blocks.1.ffn.net.0.proj.lora_B.weight"]
    product = product @ converted["transformer.blocks.1.ffn.net.0.proj.lora_A.weight"]
    torch.testing.assert_close(changes(path, shapes)["blocks.1.ffn.0.weight"], product)


def test_alpha_of_diffusers_metadata(zoo: Any, write: Write) -> None:
    shapes = shapes_of(zoo.specs[T2V].dit)
    plain = truth(shapes, ["blocks.0.ffn.0"], alpha=None)
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    path = write(DIALECTS["diffusers"](plain), lora_adapter_metadata=json.dumps(settings))
    assert_is(changes(path, shapes), Truth(plain.pairs, alpha=ALPHA))


def test_a_convolution_between_two_of_size_1(zoo: Any, write: Write) -> None:
    """LoCon's mid, on the patch embedding: three convolutions in a row."""
    shapes = shapes_of(zoo.specs[T2V].dit)
    torch.manual_seed(0)
    down, mid = torch.randn(RANK, 16, 1, 1, 1), torch.randn(RANK, RANK, 1, 2, 2)
    up, stem = torch.randn(128, RANK, 1, 1, 1), "lora_unet_patch_embedding"
    names = ("lora_down", "lora_mid", "lora_up")
    path = write({f"{stem}.{n}.weight": t for n, t in zip(names, (down, mid, up), strict=True)})
    weight = changes(path, shapes)["patch_embedding.weight"]
    x = torch.randn(1, 16, 1, 6, 4)
    conv = torch.nn.functional.conv3d
    expected = conv(conv(conv(x, down), mid, stride=(1, 2, 2)), up)
    torch.testing.assert_close(conv(x, weight, stride=(1, 2, 2)), expected)


def test_a_lora_for_text_to_video_on_image_to_video(zoo: Any, write: Write) -> None:
    """Nothing for the image's keys and values; further input channels keep their weights."""
    t2v, i2v = (shapes_of(zoo.specs[name].dit) for name in (T2V, I2V))
    given = truth(t2v, [*matrices(t2v), "patch_embedding"], ("patch_embedding.weight",))
    found = changes(write(DIALECTS["comfy down up"](given)), i2v)
    assert not any("k_img" in name for name in found)
    patches = found["patch_embedding.weight"]
    assert patches.shape[1] == 36 and not patches[:, 16:].any()
    expected = given.change("patch_embedding.weight").view(128, 16, 1, 2, 2)
    torch.testing.assert_close(patches[:, :16], expected)


def test_what_has_no_place_is_listed(zoo: Any, write: Write) -> None:
    """A LoRA for image to video on text to video, and keys of a text encoder."""
    t2v, i2v = (shapes_of(zoo.specs[name].dit) for name in (T2V, I2V))
    given = truth(i2v, [*matrices(i2v), "patch_embedding"])
    tensors = DIALECTS["comfy AB"](given) | {"lora_te_text_model.lora_down.weight": torch.ones(2)}
    found = fit(LoraFile.open(write(tensors)), t2v, "the model")
    assert len(found.names) == len(matrices(t2v))
    lost = {name.split(".")[-3] for name in found.unmatched}
    assert lost == {"k_img", "v_img", "patch_embedding", "lora_te_text_model"}


Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 128), f"{Q}.lora_B.weight": torch.ones(128, 2)}
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing of ours": ({"unet.down.lora_A.weight": torch.ones(2, 2)}, "matches .* in 0 of its 1"),
    "another width": (
        {f"{Q}.lora_A.weight": torch.ones(2, 5120), f"{Q}.lora_B.weight": torch.ones(5120, 2)},
        r"does not fit the model: .* is \[2, 5120\].* there is \[128, 128\] .*another model",
    ),
    "another input": (PAIR | {f"{Q}.lora_A.weight": torch.ones(2, 64)}, r"lora_A.* \[2, 64\]"),
    "two ranks": (PAIR | {f"{Q}.lora_A.weight": torch.ones(3, 128)}, r"\[128, 2\], beside .*\[3"),
    "rank 0": (
        {f"{Q}.lora_A.weight": torch.ones(0, 128), f"{Q}.lora_B.weight": torch.ones(128, 0)},
        "rank 0",
    ),
    "one half": ({f"{Q}.lora_A.weight": torch.ones(2, 128)}, "the other half is missing"),
    "NaN": (PAIR | {f"{Q}.lora_B.weight": torch.full((128, 2), torch.nan)}, "NaN"),
    "infinite alpha": (PAIR | {f"{Q}.alpha": torch.tensor(torch.inf)}, "alpha holds NaN or inf"),
    "many alphas": (PAIR | {f"{Q}.alpha": torch.ones(2)}, "one number"),
    "DoRA": (PAIR | {f"{Q}.dora_scale": torch.ones(128, 1)}, "DoRA.*q.dora_scale.*plain LoRA"),
    "PEFT's DoRA": (PAIR | {f"{Q}.lora_magnitude_vector": torch.ones(128)}, "DoRA"),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "LoKr"),
    "twice": (
        PAIR | {"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.ones(2, 128)},
        "are the same part of blocks.0.self_attn.q.weight",
    ),
    "a difference of another shape": ({f"{Q}.diff": torch.ones(64, 128)}, r"\[64, 128\]"),
    "a norm of rank 2": (
        {
            "blocks.0.norm3.lora_A.weight": torch.ones(2, 1),
            "blocks.0.norm3.lora_B.weight": torch.ones(128, 2),
        },
        "norm3",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, zoo: Any, write: Write) -> None:
    tensors, reason = BROKEN[case]
    path = write(tensors)
    with pytest.raises(FormatError, match=reason) as error:
        changes(path, shapes_of(zoo.specs[T2V].dit))
    assert error.value.path == str(path)


def test_dialects_may_be_mixed(zoo: Any, write: Write) -> None:
    shapes = shapes_of(zoo.specs[T2V].dit)
    given = truth(shapes, ["blocks.0.ffn.0", "blocks.1.ffn.0"])
    parts = [Truth({m: given.pairs[m]}) for m in given.pairs]
    tensors = DIALECTS["kohya"](parts[0]) | DIALECTS["diffusers"](parts[1])
    assert_is(changes(write(tensors), shapes), given)


def test_garbage(tmp_path: Path) -> None:
    for name, content in {"a.safetensors": b"GGUF" + bytes(99), "b.gguf": b"GGUF"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match="GGUF|gguf"):
            LoraFile.open(tmp_path / name)


KEYS = [key for write in DIALECTS.values() for key in write(Truth({"blocks.0.ffn.0": PIECES}))]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.lists(st.sampled_from([*"._0129ab", *KEYS, *re.split(r"[._]", "".join(KEYS))]))
)
def test_any_key_is_understood_or_not(pieces: list[str]) -> None:
    """Whatever stands in a header; what is understood is a module of a Wan transformer."""
    found = parse("".join(pieces))
    if found is not None:
        inside = r"(vace_)?blocks\.\d+\.(ffn|self_attn|modulation)"
        assert re.match(rf"{inside}|patch_embedding|head|text_|time_", found.module), found
