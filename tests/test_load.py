"""Loading: the same bits from every layout and container; and what is refused, and how."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel

from wanrt.config import WanSpec
from wanrt.errors import FormatError
from wanrt.weights import load, names, quantised
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.layouts import Layout, Part, Precision
from wanrt.weights.load import load_component, read_spiece, skeleton
from wanrt.weights.names import Kind
from wanrt.weights.parts import find_parts
from wanrt.weights.random import random_values, write_random

KINDS: tuple[Kind, ...] = ("dit", "vae", "umt5", "clip")
VARIANTS = (
    *("wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p", "wan2.1-vace-14b"),
    *("wan2.2-i2v-a14b", "wan2.2-ti2v-5b"),
)


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


def expected(model: WanSpec, kind: Kind, part: Part | None = None) -> dict[str, Tensor]:
    """What write_random has written, made anew: the oracle that no reading code has touched."""
    named = skeleton(kind, getattr(model, kind)).state_dict().items()
    return {n: random_values(0, part or kind, n, tuple(t.shape), torch.float32) for n, t in named}


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names that one side lacks or whose bits differ."""
    return [
        n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])
    ]


@pytest.mark.parametrize(
    ("kind", "device", "shape", "laid"),
    [
        ("vae", "meta", (4, 5, 3, 3, 3), torch.channels_last_3d),
        ("vae", "meta", (4, 5, 3, 3), torch.channels_last),
        ("vae", "cpu", (4, 5, 3, 3, 3), torch.channels_last_3d),
        ("dit", "meta", (4, 5, 1, 2, 2), torch.contiguous_format),
    ],
)
def test_the_vaes_weights_lie_as_kernels_read_them(
    kind: Kind, device: str, shape: tuple[int, ...], laid: torch.memory_format
) -> None:
    placed = load.place(torch.zeros(shape), kind, torch.device(device))
    assert placed.device.type == device and placed.is_contiguous(memory_format=laid)


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_load_the_same_bits(variant: str, layout: Layout, zoo: Any, tmp_path: Path) -> None:
    model = zoo.specs[variant]
    write(tmp_path, model, layout)
    for kind in KINDS if model.clip else KINDS[:3]:
        module = load_component(tmp_path, kind)
        assert module.spec == getattr(model, kind)
        assert not differences(module.state_dict(), expected(model, kind))
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    low = find_parts(tmp_path).low_noise
    assert (low is None) == (model.boundary is None)
    if low:
        loaded = load_component(low, "dit").state_dict()
        assert not differences(loaded, expected(model, "dit", "low_noise"))


def one_file(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "m.safetensors")
    return folder / "m.safetensors"


def shards(folder: Path, state: dict[str, Tensor]) -> Path:
    order = sorted(state)
    weight_map = {name: f"m-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(order)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def pickle(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state, "step": 7}, folder / "m.pth")
    return folder / "m.pth"


def spelled(
    model: WanSpec, kind: Kind, state: dict[str, Tensor], foreign: bool, prefix: str = ""
) -> dict[str, Tensor]:
    """An original state dict under another spelling."""
    if not foreign:
        return {prefix + name: tensor for name, tensor in state.items()}
    result = {}
    for name, source in names.to_diffusers(state, kind, model.vae).items():
        parts = state[name].reshape(state[name].shape[source.lead :]).chunk(len(source.stored))
        result |= {prefix + n: part.clone() for n, part in zip(source.stored, parts, strict=True)}
    return result


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model."])
@pytest.mark.parametrize("foreign", [False, True], ids=["original", "diffusers"])
@pytest.mark.parametrize("container", [one_file, shards, pickle])
@pytest.mark.parametrize("kind", KINDS)
def test_container_spelling_and_prefix_are_independent(
    kind: Kind,
    container: Callable[..., Path],
    foreign: bool,
    prefix: str,
    i2v: WanSpec,
    tmp_path: Path,
) -> None:
    """CLIP's file has one block more than the module uses."""
    full = replace(i2v, clip=replace(i2v.clip, num_layers=i2v.clip.num_layers + 1))
    path = container(tmp_path, spelled(i2v, kind, expected(full, kind), foreign, prefix))
    module = load_component(path, kind)
    assert not differences(module.state_dict(), expected(i2v, kind))
    assert module.spec == getattr(i2v, kind)


PEERS: dict[str, tuple[Kind, type]] = {
    "transformer": ("dit", WanTransformer3DModel),
    "vae": ("vae", AutoencoderKLWan),
    "text_encoder": ("umt5", UMT5EncoderModel),
    "image_encoder": ("clip", CLIPVisionModel),
}


@pytest.mark.parametrize("variant", ["wan2.1-flf2v-14b-720p", "wan2.1-vace-14b", "wan2.2-ti2v-5b"])
def test_peers_load_the_diffusers_layout(variant: str, zoo: Any, tmp_path: Path) -> None:
    """Their own from_pretrained finds config and weights, and then saves what ours loads again."""
    model = zoo.specs[variant]
    write(tmp_path / "ours", model, "diffusers")
    for folder, (kind, peer) in PEERS.items():
        if kind == "clip" and model.clip is None:
            continue
        if kind == "dit" and model.dit.vace_layers:
            peer = WanVACETransformer3DModel
        theirs, info = peer.from_pretrained(tmp_path / "ours" / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        theirs.save_pretrained(tmp_path / "theirs" / folder, max_shard_size="100KB")
        again = load_component(tmp_path / "theirs" / folder, kind)
        assert not differences(again.state_dict(), expected(model, kind))
        assert again.spec == getattr(model, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dtypes_are_cast_and_islands_stay_fp32(
    precision: Precision, dtype: torch.dtype, i2v: WanSpec, tmp_path: Path
) -> None:
    write(tmp_path, i2v, "comfyui", precision=precision)
    module = load_component(tmp_path, "dit", dtype)
    stored = load_file(next(tmp_path.rglob("diffusion_models/*")))
    for name, tensor in module.state_dict().items():
        island = (
            name.startswith(("time_", "head.")) or "norm" in name or name.endswith("modulation")
        )
        island |= name.startswith(("img_emb.proj.0", "img_emb.proj.4"))
        assert tensor.dtype == (torch.float32 if island else dtype), name
        assert torch.equal(tensor, stored[f"model.diffusion_model.{name}"].to(tensor.dtype)), name
    vae = load_component(tmp_path, "vae", dtype)
    assert {p.dtype for p in vae.parameters()} == {dtype}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers(
    kind: Kind, value: float, i2v: WanSpec, tmp_path: Path
) -> None:
    full = replace(i2v, clip=replace(i2v.clip, num_layers=i2v.clip.num_layers + 1))
    name = list(expected(i2v, kind))[-1]
    state = expected(full, kind)
    state[name].view(-1)[-1] = value
    path = one_file(tmp_path, state)
    with pytest.raises(FormatError, match=f"{name} holds NaN or infinity"):
        load_component(path, kind)
    assert not load_component(path, kind, check=False).state_dict()[name].isfinite().all()


def test_numbers_too_large_for_fp16(t2v: WanSpec, tmp_path: Path) -> None:
    state = expected(t2v, "vae")
    state["conv1.weight"][0] = 1e6
    path = one_file(tmp_path, state)
    load_component(path, "vae", torch.bfloat16)
    with pytest.raises(FormatError, match="too large for float16"):
        load_component(path, "vae", torch.float16)


def drop(state: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(start)}


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "many missing": (
        lambda s: drop(s, "blocks.1.self_attn"),
        r"fp32 lacks blocks.1.self_attn.\S+, .* and 5 more",
    ),
    "one missing": (lambda s: drop(s, "head.head.bias"), "lacks head.head.bias "),
    "extra": (
        lambda s: s | {"patch_embedding.gamma": torch.ones(2)},
        "no place for patch_embedding.gamma",
    ),
    "shape": (
        lambda s: s | {"blocks.1.ffn.2.weight": torch.ones(128, 64)},
        r"blocks.1.ffn.2.weight is \[128, 64\]; in Wan DiT .* it is \[128, 256\]",
    ),
}


@pytest.mark.parametrize("foreign", [False, True], ids=["original", "diffusers"])
@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit(case: str, foreign: bool, t2v: WanSpec, tmp_path: Path) -> None:
    change, word = DAMAGED[case]
    path = one_file(tmp_path, spelled(t2v, "dit", change(expected(t2v, "dit")), foreign))
    with pytest.raises(FormatError, match=word):
        load_component(path, "dit")


@pytest.mark.parametrize("foreign", [False, True], ids=["original", "diffusers"])
def test_names_no_wan_model_has(foreign: bool, t2v: WanSpec, tmp_path: Path) -> None:
    state = spelled(t2v, "dit", expected(t2v, "dit"), foreign)
    path = one_file(tmp_path, state | {"blocks.0.extra.weight": torch.ones(2)})
    with pytest.raises(FormatError, match="has no place for blocks.0.extra.weight"):
        load_component(path, "dit")


def test_nothing_is_read_before_everything_fits(
    t2v: WanSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = one_file(tmp_path, drop(expected(t2v, "dit"), "head.head.bias"))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(FormatError, match="lacks"):
        load_component(path, "dit")


@pytest.mark.parametrize("precision", ["fp16", "fp32", "fp8_scaled"])
def test_reading_needs_no_memory_beside_the_model(
    precision: Precision, t2v: WanSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes its dtype goes through one buffer; what does not is read once and kept."""
    monkeypatch.setattr(quantised, "_PIECE", 2000)
    write(tmp_path, t2v, "comfyui", precision=precision, components=("dit",))
    plain_read, pieces, whole = Checkpoint.read, [], []

    def read(
        self: Checkpoint, name: str, rows: range | None = None, buffer: Tensor | None = None
    ) -> Tensor:
        tensor = plain_read(self, name, rows, buffer)
        if rows is not None:
            pieces.append(tensor.data_ptr())
        elif not name.endswith("scale_weight"):
            whole.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    module = load_component(tmp_path, "dit", torch.float16)
    assert len(pieces) > 100 and len(set(pieces)) == 1
    assert set(whole) <= {tensor.data_ptr() for tensor in module.state_dict().values()}


def test_progress_counts_the_bytes_read(t2v: WanSpec, tmp_path: Path) -> None:
    write(tmp_path, t2v, components=("dit",))
    seen: list[tuple[int, int]] = []
    module = load_component(
        tmp_path, "dit", progress=lambda done, total: seen.append((done, total))
    )
    sizes = [4 * p.numel() for p in module.parameters()]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) == len(
        sizes
    )
    assert seen[-1] == (sum(sizes), sum(sizes))


WRONG_KIND = {
    "vae": "a VAE was asked for",
    "umt5": "a umT5 text encoder was asked for",
    "clip": "a CLIP image encoder was asked for",
}


@pytest.mark.parametrize("kind", WRONG_KIND)
def test_wrong_kind_says_what_the_file_is(kind: Kind, t2v: WanSpec, tmp_path: Path) -> None:
    write(tmp_path, t2v, "comfyui", precision="fp8", components=("dit",))
    path = next(tmp_path.rglob("*.safetensors"))
    title = r"this is Wan DiT \(dim 128, 2 layers\) fp8, a diffusion transformer; "
    with pytest.raises(FormatError, match=title + WRONG_KIND[kind]):
        load_component(path, kind)
    with pytest.raises(FormatError, match=title + WRONG_KIND[kind]):
        load_component(tmp_path, kind)


def test_folder_without_the_part_lists_what_it_holds(t2v: WanSpec, tmp_path: Path) -> None:
    write(tmp_path, t2v, components=("dit", "umt5"))
    with pytest.raises(FormatError, match="holds .*Wan DiT .*; .*umT5 .*; a VAE was asked for"):
        load_component(tmp_path, "vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds no weights; a VAE"):
        load_component(tmp_path / "empty", "vae")


def test_embedded_tokenizer(t2v: WanSpec, tmp_path: Path) -> None:
    model = bytes(range(256)) * 3
    state = spelled(t2v, "umt5", expected(t2v, "umt5"), True)
    state["spiece_model"] = torch.tensor(list(model), dtype=torch.uint8)
    path = one_file(tmp_path, state)
    assert read_spiece(path) == model
    assert not differences(load_component(path, "umt5").state_dict(), expected(t2v, "umt5"))
    del state["spiece_model"]
    assert read_spiece(one_file(tmp_path, state)) is None
