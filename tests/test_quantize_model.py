"""`wanrt quantize`: the same bits as quantising while loading, whatever interrupts the writing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanrt.cli import main
from wanrt.errors import FormatError, OutputError
from wanrt.kernels.reference import Quantized, dequantize, quantize, rotate
from wanrt.models.eight_bit import policy_formats
from wanrt.pipeline import Pipeline
from wanrt.quant.policy import EightBit
from wanrt.weights.load import load_component, skeleton
from wanrt.weights.parts import find_parts
from wanrt.weights.quantised import METADATA
from wanrt.weights.quantize import Written, rewrite_model
from wanrt.weights.random import write_random

PRECISIONS: tuple[EightBit, ...] = ("int8", "fp8")


def write(path: Path, out: Path, precision: EightBit = "int8", name: str = "nano") -> list[Written]:
    return list(rewrite_model(find_parts(path), name, out, precision, lambda *_: None))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(*(held[name].contiguous().view(torch.uint8) for held in (a, b))), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", ["nano", "wan2.2-i2v-a14b", "wan2.1-vace-1.3b"])
def test_files_hold_what_loading_makes(
    model: str, precision: EightBit, zoo: Any, tmp_path: Path
) -> None:
    """Both experts too; the text encoder is dequantised, the tokenizer is as it was.

    The VAE has the int8 convolutions that loading makes, and no eight-bit form beside int8.
    """
    source, out = zoo.path(model), tmp_path / "q"
    written = write(source, out, precision, model)
    assert all(one.path.stat().st_size == one.after for one in written)
    before, after = find_parts(source), find_parts(out)
    assert set(before.found) == set(after.found)
    for name in {"dit", "low_noise"} & set(after.found):
        paths = getattr(before, name), getattr(after, name)
        same(*(load_component(p, "dit", eight_bit=precision).state_dict() for p in paths))
    static = "int8" if precision == "int8" else None
    same(*(load_component(p.vae, "vae", eight_bit=static).state_dict() for p in (before, after)))
    assert after.tokenizer.read_bytes() == before.tokenizer.read_bytes()
    plain, made = (load_component(p.umt5, "umt5").state_dict() for p in (before, after))
    for name, weight in plain.items():
        matrix = name.startswith("blocks.") and (".attn." in name or ".ffn." in name)
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[precision]
        assert torch.equal(made[name], dequantize(quantize(weight, dtype)) if matrix else weight)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_clip_tower_keeps_its_last_block(
    precision: EightBit | None, zoo: Any, tmp_path: Path
) -> None:
    """No module has that block, but files are told apart by how many there are."""
    source = zoo.path("wan2.1-i2v-14b-480p")
    list(rewrite_model(find_parts(source), "i2v", tmp_path, precision, lambda *_: None))
    before, after = (load_component(path, "clip") for path in (source, tmp_path))
    assert before.spec == after.spec
    same(before.state_dict(), after.state_dict())
    if precision is None:
        same(*(load_component(path, "dit").state_dict() for path in (source, tmp_path)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_files_can_be_widened_again(precision: EightBit, zoo: Any, tmp_path: Path) -> None:
    """To the last bit as the reference does it, the rotation undone."""
    write(zoo.path("nano"), tmp_path, precision)
    stored = load_file(find_parts(tmp_path).dit)
    plain = load_component(tmp_path, "dit").state_dict()
    formats = policy_formats(skeleton("dit", zoo.specs["nano"].dit), precision)
    for name, form in formats.items():
        expected = dequantize(Quantized(stored[name], stored[name + "_scale"]))
        expected = rotate(expected) if form.rotated else expected
        if form.rotated:  # sums of 128 products: made in pieces, in another order
            assert torch.allclose(plain[name], expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(plain[name], expected)


def test_a_request_needs_no_flag(zoo: Any, tmp_path: Path) -> None:
    """`auto` runs an int8 file in int8; the pictures are those of the plain model in int8."""
    write(zoo.path("nano"), tmp_path)
    settings = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 2, "seed": 1}
    pipe = Pipeline.load(str(tmp_path))
    made = pipe.generate("a red circle", output="latents", **settings)
    assert pipe.components.dtypes.eight_bit == "int8" and pipe.spec.id == "nano"
    text = find_parts(tmp_path).umt5
    plain = zoo.open("nano", precision="int8", text_encoder=text)
    assert torch.equal(made, plain.generate("a red circle", output="latents", **settings))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_stopped_writing_goes_on(share: float, zoo: Any, tmp_path: Path) -> None:
    """Wherever it was cut, even inside a tensor or the header, the file comes out the same."""
    write(zoo.path("nano"), tmp_path / "whole")
    whole = next((tmp_path / "whole").glob("nano*")).read_bytes()
    part = tmp_path / "again" / "nano-int8.safetensors.part"
    part.parent.mkdir()
    part.write_bytes(whole[: int(share * len(whole))])
    write(zoo.path("nano"), tmp_path / "again")
    assert part.with_suffix("").read_bytes() == whole
    assert not part.exists()


def test_nothing_appears_under_its_name_before_it_is_complete(zoo: Any, tmp_path: Path) -> None:
    def stop(part: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(rewrite_model(find_parts(zoo.path("nano")), "nano", tmp_path, "int8", stop))
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    kept = next(tmp_path.iterdir()).stat()
    write(zoo.path("nano"), tmp_path)
    assert next(tmp_path.glob("nano*")).stat().st_ino == kept.st_ino  # it went on in that file


def test_another_file_of_that_name_is_left_alone(zoo: Any, tmp_path: Path) -> None:
    write(zoo.path("nano"), tmp_path)
    path = next(tmp_path.glob("nano*"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(OutputError, match="another file"):
        write(zoo.path("nano"), tmp_path)


def test_a_disk_that_lies_is_found_out(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(zoo.path("nano"), tmp_path)
    path = next(tmp_path.glob("nano*"))
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(OutputError, match="not what was written"):
        write(zoo.path("nano"), tmp_path)


def test_a_format_of_the_future_is_refused(zoo: Any, tmp_path: Path) -> None:
    write(zoo.path("nano"), tmp_path)
    path = next(tmp_path.glob("nano*"))
    tensors = load_file(path)
    for text in ('{"blocks.0.ffn.0": "int3"}', "[]", "{", '{"a": []}'):
        save_file(tensors, path, metadata={METADATA: text})
        with pytest.raises(FormatError, match="unknown to wanrt"):
            load_component(tmp_path, "dit")


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_every_layout_comes_out_original(layout: str, zoo: Any, tmp_path: Path) -> None:
    spec = zoo.specs["wan2.1-t2v-1.3b"]
    for one in (layout, "original"):
        write_random("", one, tmp_path / one, spec=spec, precision="bf16")
        write(tmp_path / one, tmp_path / f"{one}-q", name="t2v")
    paths = [find_parts(tmp_path / f"{one}-q").dit for one in (layout, "original")]
    same(*map(load_file, paths))


def test_the_command(zoo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main_ok(["quantize", str(zoo.path("nano")), "-o", str(out), "--precision", "int8", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["part"] for line in lines} == {"dit", "umt5", "vae"}
    with safe_open(lines[0]["path"], "pt") as file:
        assert json.loads(file.metadata()[METADATA])["blocks.0.ffn.0"] == "int8-rotated"
    main_ok(["inspect", str(out), "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(one["kind"], one["precision"]) for one in found} >= {("dit", "int8"), ("umt5", "int8")}


def main_ok(args: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--precision", "bf16"], 2, "choose int8 or fp8"),
        (["--precision", "int8", "-o", "SOURCE"], 2, "the model itself"),
    ],
)
def test_what_the_command_refuses(
    args: list[str], code: int, said: str, zoo: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(zoo.path("nano"))
    args = [source if arg == "SOURCE" else arg for arg in args]
    rest = [] if "-o" in args else ["-o", "/nowhere/at/all"]
    with pytest.raises(SystemExit) as stop:
        main(["quantize", source, *args, *rest])
    assert stop.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_in_what_is_taken_as_it_is(precision: EightBit, zoo: Any, tmp_path: Path) -> None:
    """In a scale, and in an fp8 number; looked for once, when the weight is first read."""
    write(zoo.path("nano"), tmp_path, precision)
    path = next(tmp_path.glob("nano*"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    names = ["blocks.2.ffn.0.weight_scale"]
    if precision == "fp8":
        names.append("blocks.2.ffn.0.weight")
    for name in names:
        tensors = load_file(path)
        whole = tensors[name].clone()
        tensors[name].view(-1)[5] = float("nan")
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(FormatError, match=r"blocks\.2\.ffn\.0\.weight holds NaN"):
            load_component(tmp_path, "dit", eight_bit=precision)
        save_file(tensors | {name: whole}, path, metadata=metadata)
    load_component(tmp_path, "dit", eight_bit=precision)
