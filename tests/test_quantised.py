"""Quantised files: each dialect loads as its stored number times its scale, the rest is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanrt.config import WanSpec
from wanrt.errors import FormatError
from wanrt.weights import names, quantised
from wanrt.weights.layouts import Precision
from wanrt.weights.load import load_component, skeleton
from wanrt.weights.names import Kind
from wanrt.weights.parts import find_component
from wanrt.weights.random import random_values, write_random

Change = Callable[[str, Tensor], dict[str, Tensor]]  # stem and matrix -> stored tensors


@pytest.fixture
def t2v(zoo: Any) -> WanSpec:
    return zoo.specs["wan2.1-t2v-1.3b"]


@pytest.fixture
def i2v(zoo: Any) -> WanSpec:
    return zoo.specs["wan2.1-i2v-14b-480p"]


def expected(model: WanSpec, kind: Kind) -> dict[str, Tensor]:
    """What write_random has written, made anew: the oracle that no reading code has touched."""
    named = skeleton(kind, getattr(model, kind)).state_dict().items()
    return {n: random_values(0, kind, n, tuple(t.shape), torch.float32) for n, t in named}


@pytest.mark.parametrize("precision", ["fp8", "fp8_scaled"])
def test_comfyui_fp8(precision: Precision, i2v: WanSpec, tmp_path: Path) -> None:
    """Exactly the stored number times its scale in fp32, then one rounding."""
    write_random("", "comfyui", tmp_path, spec=i2v, precision=precision)
    for kind, folder in {"dit": "diffusion_models", "umt5": "text_encoders"}.items():
        path = next((tmp_path / "split_files" / folder).iterdir())
        stored, found = load_file(path), find_component(path, kind)
        assert found.precision == precision
        loaded, original = (
            load_component(path, kind, torch.bfloat16).state_dict(),
            expected(i2v, kind),
        )
        sources = names.translate(stored, found.component).sources
        num_quantised = 0
        for name, tensor in loaded.items():
            (key,) = sources[name].stored
            value = stored[key].float()
            if stored[key].dtype == torch.float8_e4m3fn:
                num_quantised += 1
                value *= stored.get(key.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
                error = (value - original[name]).norm() / original[name].norm()
                assert 0.001 < error < (0.04 if precision == "fp8" else 0.03)
            assert torch.equal(tensor, value.to(tensor.dtype)), name
        assert num_quantised == (2 * 10 + 2 * 2 if kind == "dit" else 2 * 7)


def requantised(path: Path, model: WanSpec, change: Change, **metadata: str) -> Path:
    """The tiny transformer's block matrices replaced by what `change` makes of them."""
    state: dict[str, Tensor] = {}
    for name, tensor in expected(model, "dit").items():
        matrix = name.startswith("blocks.") and tensor.dim() == 2
        state |= change(name.removesuffix(".weight"), tensor) if matrix else {name: tensor}
    save_file(state, path, metadata=metadata)
    return path


ROWS = torch.linspace(0.5, 2.0, 256)


def row_scales(values: Tensor) -> Tensor:
    return values.abs().amax(1, keepdim=True) / 127 * ROWS[: len(values), None]


def fp8(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return (values / scale).to(dtype)


QUANTISED: dict[str, Callable[[Tensor], tuple[Tensor, str, Tensor]]] = {
    "LightX2V fp8": lambda v: (fp8(v, row_scales(v)), "weight_scale", row_scales(v)),
    "LightX2V int8": lambda v: (
        (v / row_scales(v)).round().to(torch.int8),
        "weight_scale",
        row_scales(v),
    ),
    "one scale per row, flat": lambda v: (
        fp8(v, row_scales(v)),
        "weight_scale",
        row_scales(v).flatten(),
    ),
    "newer ComfyUI": lambda v: (fp8(v, torch.tensor(0.01)), "weight_scale", torch.tensor(0.01)),
    "e5m2": lambda v: (
        fp8(v, torch.tensor(0.3), torch.float8_e5m2),
        "scale_weight",
        torch.tensor([0.3]),
    ),
    "fp8 as bytes": lambda v: (
        fp8(v, torch.tensor(0.02)).view(torch.uint8),
        "weight_scale",
        torch.tensor(0.02),
    ),
}


@pytest.mark.parametrize("piece", [100, 1000], ids=["less than a row", "7 rows, 3 at the end"])
@pytest.mark.parametrize("case", QUANTISED)
def test_other_quantised_files(
    case: str, piece: int, t2v: WanSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "_PIECE", piece)

    def change(stem: str, values: Tensor) -> dict[str, Tensor]:
        weight, leaf, scale = QUANTISED[case](values)
        return {
            f"{stem}.weight": weight,
            f"{stem}.{leaf}": scale,
            f"{stem}.input_scale": torch.ones(()),
        }

    path = requantised(tmp_path / "m.safetensors", t2v, change)
    loaded, original = load_component(path, "dit").state_dict(), expected(t2v, "dit")
    stored = load_file(path)
    name = "blocks.1.ffn.0.weight"
    weight, _, scale = QUANTISED[case](original[name])
    if weight.dtype == torch.uint8:
        weight = weight.view(torch.float8_e4m3fn)
    scale = scale[:, None] if scale.dim() == 1 and len(scale) > 1 else scale
    assert torch.equal(loaded[name], weight.float() * scale)
    plain = {n: t for n, t in loaded.items() if stored[n].dtype == torch.float32}
    assert 0 < len(plain) < len(loaded)
    assert all(torch.equal(tensor, original[n]) for n, tensor in plain.items())


def layer_format(text: str) -> Change:
    def change(stem: str, values: Tensor) -> dict[str, Tensor]:
        note = torch.tensor(list(text.encode()), dtype=torch.uint8)
        weight = {
            f"{stem}.weight": fp8(values, torch.tensor(0.01)),
            f"{stem}.weight_scale": torch.tensor(0.01),
        }
        return weight | ({f"{stem}.comfy_quant": note} if text else {})

    return change


FORMATS = {
    "float8_e4m3fn": '{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}',
    "nvfp4": '{"format": "nvfp4"}',
    "int8 in blocks": '{"format": "int8_blockwise", "group_size": 128}',
    "rotated": '{"format": "int8_tensorwise", "convrot": true}',
    "nonsense": "\x00\x01",
    "no format": "{}",
    "a list": "[1]",
}


@pytest.mark.parametrize("place", ["comfy_quant", "metadata"])
@pytest.mark.parametrize("case", FORMATS)
def test_formats_named_in_the_file(case: str, place: str, t2v: WanSpec, tmp_path: Path) -> None:
    text, path = FORMATS[case], tmp_path / "m.safetensors"
    if place == "comfy_quant":
        requantised(path, t2v, layer_format(text))
    elif case in ("nonsense", "a list"):
        requantised(path, t2v, layer_format(""), _quantization_metadata=text)
    else:
        layers = f'{{"layers": {{"blocks.0.ffn.0": {text}}}}}'
        requantised(path, t2v, layer_format(""), _quantization_metadata=layers)
    if case == "float8_e4m3fn":
        assert load_component(path, "dit").spec == t2v.dit
        return
    word = (
        "does not tell its format"
        if case in ("nonsense", "no format", "a list")
        else "unknown to wanrt"
    )
    with pytest.raises(FormatError, match=word):
        load_component(path, "dit")


BAD_SCALES: dict[str, tuple[Change, str]] = {
    "int8 without scale": (lambda s, v: {f"{s}.weight": v.to(torch.int8)}, "has no scale"),
    "one per column": (
        lambda s, v: {f"{s}.weight": v.to(torch.int8), f"{s}.weight_scale": torch.ones(1, 7)},
        "is \\[1, 7\\] for a weight",
    ),
    "in blocks": (
        lambda s, v: {f"{s}.weight": v.to(torch.int8), f"{s}.weight_scale": torch.ones(2, 2)},
        "for a weight",
    ),
    "scale of bytes": (
        lambda s, v: {
            f"{s}.weight": v.to(torch.int8),
            f"{s}.weight_scale": torch.ones((), dtype=torch.int8),
        },
        "for a weight",
    ),
    "two levels": (
        lambda s, v: {f"{s}.weight": v.to(torch.int8), f"{s}.weight_scale_2": torch.ones(())},
        "does not read",
    ),
    "NaN scale": (
        lambda s, v: {
            f"{s}.weight": v.to(torch.int8),
            f"{s}.weight_scale": torch.tensor(float("nan")),
        },
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_bad_scales(case: str, t2v: WanSpec, tmp_path: Path) -> None:
    change, word = BAD_SCALES[case]
    with pytest.raises(FormatError, match=word):
        load_component(requantised(tmp_path / "m.safetensors", t2v, change), "dit")
