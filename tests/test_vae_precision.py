"""`--vae-precision`: what each one runs, files of int8 VAEs, and what a VAE does after NaN."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanrt.bench import quality_frames
from wanrt.cli import main
from wanrt.config import MODELS
from wanrt.errors import BudgetError, FormatError, UsageError
from wanrt.kernels import conv
from wanrt.memory.budget import GIB
from wanrt.memory.phases import decode_options
from wanrt.memory.placement import TYPICAL, Ask
from wanrt.memory.vae_formats import VAE_FORMATS, settle_vae
from wanrt.models.vae import WanVAE
from wanrt.models.vae_calibration import calibration_clips
from wanrt.models.vae_int8 import default_convs
from wanrt.models.vae_layers import (
    TORCH,
    Int8CausalConv3d,
    check_fp16_sums,
    with_fp16_sums,
)
from wanrt.pipeline import Pipeline
from wanrt.quant.policy import is_int8_conv
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.load import load_component
from wanrt.weights.parts import find_parts
from wanrt.weights.quantize import rewrite_model

SETTINGS = {"num_frames": 5, "width": 32, "height": 32, "num_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships, rewritten in int8."""
    out = tmp_path_factory.mktemp("int8")
    list(rewrite_model(find_parts(NANO_WEIGHTS), "nano", out, "int8", lambda *_: None))
    return out


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.inference_mode():
        yield


def int8_convs(vae: torch.nn.Module) -> list[Int8CausalConv3d]:
    return [part for part in vae.modules() if isinstance(part, Int8CausalConv3d)]


def frames_of(pipe: Pipeline, latents: Tensor) -> np.ndarray:
    run = pipe.start("a red circle", **SETTINGS)
    return np.concatenate(list(pipe.decode(run, latents)))


def some_latents(frames: int = 2) -> Tensor:
    return torch.randn(1, 16, frames, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_plain_file_and_an_int8_one_give_the_same_frames(int8_folder: Path) -> None:
    """To the bit, by `auto` and by name; plain again, the int8 file is close to what it was."""
    z, file = some_latents(), find_parts(int8_folder).vae
    plain = Pipeline.load("nano")
    made = Pipeline.load("nano", vae_precision="int8")
    stored = Pipeline.load("nano", vae=file)
    widened = Pipeline.load("nano", vae=file, vae_precision="fp32")
    for pipe, name in ((plain, "fp32"), (made, "int8/fp32"), (stored, "int8/fp32")):
        assert pipe.components.dtypes.vae_format == VAE_FORMATS[name]
    expected, frames = frames_of(plain, z), frames_of(made, z)
    assert np.array_equal(frames, frames_of(stored, z))
    assert not np.array_equal(frames, expected)
    assert np.abs(frames.astype(int) - expected).max() <= 2
    assert np.abs(frames_of(widened, z).astype(int) - expected).max() <= 2
    count = len(default_convs(plain.components.vae()))
    assert [len(int8_convs(p.components.vae())) for p in (plain, made, stored, widened)] == [
        0, count, count, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_encoded_as_ever(dtype: torch.dtype) -> None:
    clip = calibration_clips()[2]
    plain, made = (
        load_component(NANO_WEIGHTS, "vae", dtype=dtype, eight_bit=form) for form in (None, "int8")
    )
    assert torch.equal(plain.encode(clip), made.encode(clip))


def test_the_file_says_what_it_is(int8_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = find_parts(int8_folder).vae
    assert file.name == "vae-int8.safetensors"
    with safe_open(file, "pt") as opened:
        forms = json.loads(opened.metadata()["wanrt_formats"])
    assert set(forms.values()) == {"int8-static"}
    assert all(name.startswith("decoder.upsamples.") for name in forms)
    with pytest.raises(SystemExit):
        main(["inspect", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["precision"]) == ("vae", "int8")


def test_an_int8_model_can_be_written_again(int8_folder: Path, tmp_path: Path) -> None:
    """In int8 byte for byte; in fp8 the VAE is plain, and the command says so."""
    parts = find_parts(int8_folder)
    list(rewrite_model(parts, "nano", tmp_path / "int8", "int8", lambda *_: None))
    again = find_parts(tmp_path / "int8").vae
    assert again.read_bytes() == parts.vae.read_bytes()
    list(rewrite_model(parts, "nano", tmp_path / "fp8", "fp8", lambda *_: None))
    assert find_parts(tmp_path / "fp8").vae.name == "vae.safetensors"
    assert not int8_convs(load_component(tmp_path / "fp8", "vae"))


def test_what_quantize_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision, said in (("int8", "12 convolutions of the decoder in int8"), ("fp8", "no fp8")):
        with pytest.raises(SystemExit) as stop:
            main(["quantize", "nano", "-o", str(tmp_path / precision), "--precision", precision])
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == 0 and said in next(line for line in lines if "vae" in line)
    with pytest.raises(SystemExit):
        main(
            ["quantize", "nano", "-o", str(tmp_path / "plain"), "--precision", "int8"]
            + ["--plain-vae", "--json"]
        )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (vae,) = [line for line in lines if line["part"] == "vae"]
    assert vae["num_quantised"] == 0 and Path(vae["path"]).name == "vae.safetensors"


@pytest.mark.parametrize(
    ("leaf", "value", "said"),
    [
        ("input_step", float("nan"), "no step"),
        ("input_step", 0.0, "no step"),
        ("input_step", None, "input_step is not fp32"),
        ("input_zero", None, "input_zero is not"),
        ("weight_scale", float("inf"), "NaN or infinity"),
        ("weight_scale", None, "weight_scale is not"),
    ],
)
def test_a_broken_format_is_named(
    leaf: str, value: float | None, said: str, int8_folder: Path, tmp_path: Path
) -> None:
    tensors, metadata = opened(find_parts(int8_folder).vae)
    name = next(n for n in tensors if n.endswith(leaf))
    if value is None:
        del tensors[name]
    else:
        tensors[name][0] = value
    save_file(tensors, tmp_path / "vae.safetensors", metadata=metadata)
    with pytest.raises(FormatError, match=said):
        load_component(tmp_path / "vae.safetensors", "vae", eight_bit="int8")


@pytest.mark.parametrize("name", ["decoder.conv1", "decoder.upsamples.3.time_conv", "encoder.x"])
def test_a_convolution_that_takes_no_int8(name: str, int8_folder: Path, tmp_path: Path) -> None:
    tensors, metadata = opened(find_parts(int8_folder).vae)
    forms = json.loads(metadata["wanrt_formats"]) | {name: "int8-static"}
    tensors.setdefault(f"{name}.weight", torch.zeros(1, 1, 3, 3, 3))
    metadata["wanrt_formats"] = json.dumps(forms)
    save_file(tensors, tmp_path / "vae.safetensors", metadata=metadata)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        load_component(tmp_path / "vae.safetensors", "vae", eight_bit="int8")


def test_a_matrix_has_no_such_format(int8_folder: Path, tmp_path: Path) -> None:
    """Nor has it when it is widened."""
    tensors, metadata = opened(find_parts(int8_folder).dit)
    metadata["wanrt_formats"] = json.dumps({"blocks.0.ffn.0": "int8-static"})
    save_file(tensors, tmp_path / "dit.safetensors", metadata=metadata)
    with pytest.raises(FormatError, match=r"blocks\.0\.ffn\.0\.weight is no convolution"):
        load_component(tmp_path / "dit.safetensors", "dit")


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def test_the_policy_goes_by_places() -> None:
    int8 = [f"decoder.{i}.normalised" for i in range(4) if is_int8_conv(f"decoder.{i}.normalised")]
    assert int8 == ["decoder.2.normalised", "decoder.3.normalised"]
    assert not is_int8_conv("decoder.3.head") and not is_int8_conv("encoder.2.normalised")


def test_calibration_is_the_same_everywhere() -> None:
    """Three clips of five frames in the range of pixels; both ends of it are reached."""
    clips, again = calibration_clips(), calibration_clips()
    assert all(torch.equal(a, b) for a, b in zip(clips, again, strict=True))
    assert {tuple(clip.shape) for clip in clips} == {(1, 3, 5, 64, 64)}
    assert min(c.min() for c in clips) == -1 and max(c.max() for c in clips) == 1
    assert all(not torch.equal(clip[:, :, 0], clip[:, :, 1]) for clip in clips)


@pytest.mark.parametrize(
    ("asked", "usual", "device", "stored", "name"),
    [
        ("auto", "bf16", "cuda", False, "bf16"),
        ("auto", "fp32", "cpu", False, "fp32"),
        ("auto", "bf16", "cuda", True, "int8"),
        ("auto", "fp32", "cpu", True, "int8/fp32"),
        ("int8", "bf16", "cuda", False, "int8"),
        ("fp32", "bf16", "cuda", True, "fp32"),
        ("fp16-accumulate", "bf16", "cuda", True, "fp16-accumulate"),
    ],
)
def test_what_a_precision_means(
    asked: Any, usual: Any, device: str, stored: bool, name: str
) -> None:
    assert settle_vae(asked, usual, device, stored) == VAE_FORMATS[name]


def test_precisions_that_do_not_exist() -> None:
    for name in ("fp8", "int8/fp32", ""):
        with pytest.raises(UsageError, match="choose auto, fp32"):
            Pipeline.load("nano", vae_precision=name)


def test_fp16_sums_need_the_kernel_that_has_them() -> None:
    with pytest.raises(UsageError, match="Triton.*--vae-precision fp16"):
        Pipeline.load("nano", vae_precision="fp16-accumulate", device="cpu")


@pytest.mark.parametrize("arguments", [["--device", "cpu"], []])
def test_a_plan_refuses_them_likewise(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not arguments:
        monkeypatch.setenv("WANRT_OPS", "torch")
    with pytest.raises(SystemExit) as stop:
        main(["plan", "wan2.1-t2v-14b", "--vae-precision", "fp16-accumulate", *arguments])
    assert stop.value.code == 2 and "needs Triton" in capsys.readouterr().err


def test_fp16_sums_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: 3x3x3 taps are added up otherwise, and nothing else is."""
    monkeypatch.setenv("WANRT_OPS", "triton")
    check_fp16_sums(torch.device("cpu"))
    ops = TORCH._replace(causal_conv3d=conv.causal_conv3d)
    x, past = (torch.randn(1, 40, t, 4, 5).half() for t in (2, 2))
    for side, same in ((3, False), (1, True)):
        weight, bias = torch.randn(24, 40, side, side, side).half(), torch.zeros(24).half()
        given = (x, weight, bias, past if side == 3 else None)
        plain, summed = (o.causal_conv3d(*given)[0].float() for o in (ops, with_fp16_sums(ops)))
        assert torch.equal(plain, summed) == same
        assert (plain - summed).norm() / plain.norm() < 2**-9


def test_fp16_sums_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way from the argument to the ops of the loaded VAE."""
    monkeypatch.setattr("wanrt.dtypes.check_fp16_sums", lambda device: None)
    pipe, seen = Pipeline.load("nano", vae_precision="fp16-accumulate", device="cpu"), set()

    def note(x: Tensor, weight: Tensor, *more: Any, accumulator: torch.dtype) -> Any:
        seen.add((x.dtype, weight.shape[2:], accumulator))
        raise StopIteration

    monkeypatch.setattr("wanrt.kernels.torch_conv.causal_conv3d", note)
    vae = pipe.components.vae()
    weight = torch.zeros(1, 1, 3, 3, 3)
    with pytest.raises(StopIteration):
        vae.ops.causal_conv3d(torch.zeros(1, 1, 1, 1, 1).half(), weight, None, None)
    assert seen == {(torch.float16, (3, 3, 3), torch.float16)}


def test_an_engine_keeps_its_vae() -> None:
    from wanrt.dtypes import choose_dtypes, engine_dtypes

    class Bundle:
        path = "a bundle"

    class Engine:
        bundle = Bundle()

        def precisions(self, kind: str) -> frozenset[str]:
            return frozenset({"bf16"} if kind == "vae" else ())

        def serves(self, kind: str) -> bool:
            return kind == "vae"

    found = find_parts(NANO_WEIGHTS).found
    native = choose_dtypes("auto", found["dit"], torch.device("cpu"), "int8", found["vae"])
    with pytest.raises(UsageError, match="has a VAE in bf16"):
        engine_dtypes(Engine(), native, "auto", "int8")
    assert engine_dtypes(Engine(), native, "auto").vae_format == VAE_FORMATS["bf16"]


def test_a_request_with_an_int8_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to the file, and what it says of memory."""
    with pytest.raises(SystemExit) as stop:
        main(
            ["generate", "a red circle", "--vae-precision", "int8", "--frames", "5", "--size"]
            + ["32x32", "--steps", "1", "--seed", "1", "--vram", "45M", "--json"]
            + ["-o", str(tmp_path / "a.mp4")]
        )
    assert stop.value.code == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["measured"] <= memory["planned"]
    assert (tmp_path / "a.mp4").stat().st_size > 0


def nan_after(vae: WanVAE, frames: int) -> None:
    """Its last int8 convolution but one breaks after so many latent frames."""
    conv, count = int8_convs(vae)[-2], iter(range(10**6))
    forward = conv.forward

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        y = forward(*args, **kwargs)
        if next(count) >= frames:
            y[..., 0] = float("nan")
        return y

    conv.forward = broken


def test_nan_takes_int8_away(caplog: pytest.LogCaptureFixture) -> None:
    """Sound frames stay, the others are the plain VAE's; what was learned stays."""
    z = some_latents()
    pipe, int8, plain = (Pipeline.load("nano", vae_precision=p) for p in ("int8", "int8", "auto"))
    nan_after(pipe.components.vae(), 1)
    with caplog.at_level(logging.WARNING):
        frames = frames_of(pipe, z)
    (record,) = caplog.records
    assert "latent frame 2 gave NaN" in record.message and "fp32 instead of int8" in record.message
    assert np.array_equal(frames[:1], frames_of(int8, z)[:1])
    assert np.array_equal(frames[1:], frames_of(plain, z)[1:])
    assert np.array_equal(frames_of(pipe, z), frames_of(plain, z))


def test_the_plan_goes_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """A plain VAE holds more: the request goes on by a plan for that, or says what would do."""
    settings = SETTINGS | {"width": 96, "height": 96, "num_frames": 33}
    z = torch.zeros(1, 16, 9, 12, 12)
    pipe = Pipeline.load("nano", vae_precision="int8", vram="1G")
    run = pipe.start("a red circle", **settings)
    before = run.plan.options["decode"].phase
    nan_after(pipe.components.vae(), 0)
    assert len(list(pipe.decode(run, z))) == 9
    after = run.plan.options["decode"].phase
    assert after.caches > before.caches and run.plan.question.vae == VAE_FORMATS["fp32"]
    assert pipe.components.plan is run.plan
    tight = Pipeline.load("nano", vae_precision="int8", vram=least_of(run.plan, "int8/fp32"))
    run = tight.start("a red circle", **settings)
    nan_after(tight.components.vae(), 0)
    with pytest.raises(BudgetError, match="decode"):
        list(tight.decode(run, z))


def least_of(plan: Any, name: str) -> str:
    """The smallest budget with a VAE of this format."""
    return f"{replace(plan.question, vae=VAE_FORMATS[name]).least() / GIB:.6f}G"


def test_encodings_are_watched(zoo: Any, files: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An fp16 VAE that overflows on a picture is bf16 from there on."""
    source = zoo.path("wan2.1-i2v-14b-480p")
    pipe = Pipeline.load(str(source), vae_precision="fp16")
    encode, broken = WanVAE.encode, pipe.components.vae()

    def overflowing(self: WanVAE, *args: Any, **kwargs: Any) -> Tensor:
        z = encode(self, *args, **kwargs)
        return z * float("inf") if self is broken else z

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(WanVAE, "encode", overflowing)
        run = pipe.start("a", image=files["a.png"], **(SETTINGS | {"width": 48}))
    assert torch.isfinite(run.conditions.y).all()
    assert "encoding a picture or video gave NaN" in caplog.text
    assert "bf16 instead of fp16" in caplog.text


def test_decoding_holds_less(capsys: pytest.CaptureFixture[str]) -> None:
    """720p in one piece, and at the least; `wanrt plan` says so."""
    spec, ask = MODELS["wan2.1-t2v-14b"], Ask(1280, 720, 81)
    peaks = {}
    for name in ("bf16", "int8"):
        options = list(decode_options(spec, ask, TYPICAL, VAE_FORMATS[name]))
        whole = [o.phase for o in options if not (o.work.band or o.work.host)]
        peaks[name] = [min(p.peak for p in ps) for ps in (whole, [o.phase for o in options])]
        caches = min(p.caches for p in whole)
        peaks[name].append(caches)
    assert peaks["int8"][0] < 0.75 * peaks["bf16"][0]
    assert peaks["int8"][1] < peaks["bf16"][1]
    assert peaks["int8"][2] < 0.65 * peaks["bf16"][2]
    with pytest.raises(SystemExit):
        main(["plan", "wan2.1-t2v-14b", "--size", "1280x720", "--vae-precision", "int8"])
    assert "bf16, VAE int8: peak" in capsys.readouterr().out


def test_whole_requests_are_measured() -> None:
    """The scorer reads what it read."""
    found = {row.vae: row for row in quality_frames.rows(1)}
    assert set(found) == {"bf16", "fp16", "int8"}
    for row in found.values():
        assert row.verdict == row.verdict_fp32 and row.psnr == row.least_psnr >= 45


def test_a_vae_without_an_encoder_is_named(tmp_path: Path) -> None:
    tensors = load_file(NANO_WEIGHTS / "vae.safetensors")
    half = {name: x for name, x in tensors.items() if not name.startswith("encoder.")}
    save_file(half, tmp_path / "vae.safetensors")
    with pytest.raises(FormatError, match=r"lacks encoder\.conv1"):
        load_component(tmp_path / "vae.safetensors", "vae", eight_bit="int8")


def test_a_folder_loads_whole(int8_folder: Path, tmp_path: Path) -> None:
    """Every part by itself; the VAE, copied elsewhere, too."""
    pipe = Pipeline.load(str(int8_folder))
    assert pipe.generate("a red circle", **SETTINGS).np.shape == (5, 32, 32, 3)
    shutil.copy(find_parts(int8_folder).vae, tmp_path / "mine.safetensors")
    assert int8_convs(load_component(tmp_path / "mine.safetensors", "vae", eight_bit="int8"))
