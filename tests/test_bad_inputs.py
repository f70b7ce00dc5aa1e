"""What a person gets wrong: one line, the documented exit code, and before any weights are read."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from wanrt import cli, components
from wanrt.media.video import write_video
from wanrt.weights.gguf_file import GgufFile

T2V, I2V, VACE, TI2V = (
    *("wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-vace-1.3b", "wan2.2-ti2v-5b"),
)
DIT = "diffusion_pytorch_model.safetensors"
PACKED = "blocks.1.ffn.0.weight"
SETTINGS = ("--size", "32x32", "--frames", "5", "--steps", "1", "--seed", "3")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def wanrt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(arg) for arg in args])
        return Outcome(exit_.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(
    wanrt: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs `wanrt ARGS` in an empty folder; returns its one line. Loading weights is a failure."""

    def load(path: Path, kind: str, **options: object) -> None:
        raise AssertionError(f"{kind} was loaded")

    monkeypatch.setattr(components, "load_component", load)
    monkeypatch.chdir(tmp_path)

    def call(code: int, *args: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = wanrt(*args)
        assert outcome.code == code, outcome
        assert not outcome.out
        assert outcome.err.startswith("wanrt: ") and outcome.err.count("\n") == 1, outcome.err
        assert sorted(tmp_path.rglob("*")) == before
        return outcome.err

    return call


def generate(model: object, *args: object) -> tuple[object, ...]:
    """A request that is fine, but for `args`: a later option wins."""
    return ("generate", "a red circle", "--model", model, *SETTINGS, *args)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("--frames 0", "frames is 0; it must be 1 .an image. to 4093"),
        ("--frames -1", "frames is -1; it must be 1"),
        ("--frames 10", "it must be 4n.1, and the nearest are 9 and 13 .--round"),
        ("--frames 82", "it must be 4n.1, and the nearest are 81 and 85"),
        ("--frames 1000000", "frames is 1000000; .* to 4093"),
        ("--frames 0 --round", "frames is 0"),
        ("--frames 1000000 --round", "to 4093"),
        ("--size 0x0", "width is 0; it must be 16 to 4096"),
        ("--size 100x100", "multiples of 16 .the nearest is 96x96"),
        ("--size 100000x100000", "width is 100000; it must be 16 to 4096"),
        ("--size 4096x16", "more than 8 times"),
        ("--size 32", "size '32': write WIDTHxHEIGHT"),
        ("--size -32x32", "write WIDTHxHEIGHT"),
        ("--size 32x32x32", "write WIDTHxHEIGHT"),
        ("--size ３２x３２", "write WIDTHxHEIGHT"),
        (f"--size {'9' * 5000}x32", "write WIDTHxHEIGHT"),
        ("--steps 0", "steps is 0; it must be 1 to 1000"),
        ("--steps -5", "steps is -5"),
        ("--steps 10000", "steps is 10000; it must be 1 to 1000"),
        ("--guidance nan", "guidance is nan; it must be 0 to 100"),
        ("--guidance -1", "guidance is -1.0"),
        ("--guidance 1e3", "guidance is 1000.0"),
        ("--guidance inf", "guidance is inf"),
        ("--guidance-low 3", "--guidance-low is for two-expert models"),
        ("--flow-shift 0", "flow shift is 0.0; it must be 0.01 to 100"),
        ("--flow-shift nan", "flow shift is nan"),
        ("--seed 18446744073709551616", "seed is 18446744073709551616; it must be 0 to 2.63-1"),
        ("--seed -2", "seed is -2"),
        ("--fps 0", "fps is 0; it must be 1 to 240"),
        ("--fps -16", "fps is -16"),
        ("--fps 100000", "fps is 100000"),
        ("--crf 99", "crf is 99; for h264 it is a whole number 0 to 51"),
        ("--noise cuda", "noise 'cuda' needs a CUDA GPU"),
        ("--task i2v", "task 'i2v' is not what"),
        ("--task t2i", "task 't2i' makes one image, not 5 frames"),
        ("--image a.png", "takes no --image"),
        ("--extend after", "takes no --extend"),
        ("--prompts list.txt", "give one prompt, or --prompts FILE"),
    ],
)
def test_settings(args: str, reason: str, zoo: Any, refused: Callable[..., str]) -> None:
    assert_says(refused(2, *generate(zoo.path(T2V), *args.split())), reason)


def assert_says(line: str, reason: str) -> None:
    assert re.search(reason, line), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(zoo: Any, refused: Callable[..., str]) -> None:
    assert "sees no CUDA GPU" in refused(2, *generate(zoo.path(T2V), "--device", "cuda"))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a" * 1_000_000, "prompt is 1,000,000 bytes, the limit is 65,536"),
        ("a red\0circle", "NUL character at character 5"),
        ("a red \udc80 circle", r"lone surrogate U\+DC80 at character 6"),
    ],
)
@pytest.mark.parametrize("where", ["prompt", "negative", "file"])
def test_prompts(
    prompt: str, reason: str, where: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    args = list(generate(zoo.path(T2V)))
    match where:
        case "prompt":
            args[1] = prompt
        case "negative":
            args += ["--negative", prompt]
        case "file":
            (tmp_path / "list.txt").write_text(f"a star\n{prompt}\n", errors="surrogatepass")
            args[1:2] = ["--prompts", "list.txt"]
            reason = "list.txt: 'utf-8'" if "surrogate" in reason else reason
    assert_says(refused(2, *args), reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\n  \n", "holds no prompt"), (b"\xff\xfe", "'utf-8' codec")],
)
def test_prompt_files(
    content: bytes | None, reason: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    args = list(generate(zoo.path(T2V)))
    args[1:2] = ["--prompts", "list.txt"]
    assert reason in refused(2, *args)


@pytest.mark.parametrize(
    ("out", "code", "reason"),
    [
        ("there.mp4", 5, "there.mp4 exists already .-y overwrites it"),
        ("folder.mp4", 5, "it is a folder"),
        ("absent/a.mp4", 5, "the folder absent does not exist and is never created"),
        ("there.mp4/a.mp4", 5, "is not a folder"),
        ("/sys/a.mp4", 5, "cannot write /sys/a.mp4: Permission denied"),
        ("/dev/full/a.mp4", 5, "the folder /dev/full is not a folder"),
        ("/dev/full", 2, "has no ending"),
        ("a\nb.mp4", 2, "contains a control character"),
        ("a.mov", 2, "results are .mp4"),
        ("a.png", 2, "holds one image, but 5 frames were asked for"),
        (".", 2, "has no ending"),
        ("", 2, "has no ending"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_outputs(
    out: str, code: int, reason: str, seeds: int, zoo: Any, tmp_path: Path, refused: Any
) -> None:
    for name in ("there.mp4", "there-001.mp4"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder-001.mp4").mkdir()
    more = ("--seed", "4") * (seeds - 1)
    line = refused(code, *generate(zoo.path(T2V), "-o", out, *more))
    if seeds == 2:
        reason = reason.replace("there.mp4 exists", "there-001.mp4 exists")
        reason = reason.replace("/sys/a", "/sys/a-001")
        reason = "is a folder .add a file name" if out in ("", ".") else reason
    assert_says(line, reason)
    assert (tmp_path / "there.mp4").read_text() == "precious"


def test_default_number_of_frames_does_not_fit_an_image(zoo: Any, refused: Any) -> None:
    args = ("generate", "a red circle", "--model", zoo.path(T2V), "-o", "a.png")
    assert "holds one image, but 81 frames were asked for" in refused(2, *args)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of the size it claims, with whatever data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BROKEN_IMAGES: dict[str, tuple[bytes | None, str]] = {
    "absent.png": (None, "no such file"),
    "folder.png": (None, "is a folder"),
    "text.png": (b"this is no image", "is not an image that can be read"),
    "empty.png": (b"", "is not an image that can be read"),
    "cut.png": (png(64, 64, zlib.compress(bytes(99))), "the image is broken"),
    "bomb.png": (png(30_000, 30_000), "900000000 pixels. exceeds limit"),
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
@pytest.mark.parametrize(
    ("model", "option"), [(I2V, "--image"), (TI2V, "--image"), (VACE, "--ref"), (VACE, "--image")]
)
def test_images(
    name: str, model: str, option: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    content, reason = BROKEN_IMAGES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name.startswith("folder"):
        (tmp_path / name).mkdir()
    size = ("--size", "64x64")
    assert_says(refused(3, *generate(zoo.path(model), *size, option, name)), reason)


@pytest.mark.parametrize("model", [I2V, TI2V])
def test_an_image_too_narrow_for_the_size(
    model: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "tall.png").write_bytes(png(1, 4000, zlib.compress(bytes(4 * 4000))))
    line = refused(2, *generate(zoo.path(model), "--size", "64x64", "--image", "tall.png"))
    assert "an input of 1x4000 is too small or too narrow" in line


@pytest.mark.parametrize("option", ["--video", "--mask"])
@pytest.mark.parametrize("fault", ["absent", "garbage", "cut off", "sound"])
def test_videos(
    option: str, fault: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    good = write_video(tmp_path / "good.mp4", [frames], 16)
    bad = tmp_path / "bad.mp4"
    match fault:
        case "garbage":
            bad.write_bytes(os.urandom(4096))
        case "cut off":
            bad.write_bytes(good.read_bytes()[:-4000])
        case "sound":
            bad.write_bytes(b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(24))
    args = ("--video", bad) if option == "--video" else ("--video", good, "--mask", bad)
    line = refused(3, *generate(zoo.path(VACE), *args))
    assert line.startswith(f"wanrt: {bad}: ")


class Payload:
    """Unpickled by code that trusts it, this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def header(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


def entry(name: int | str, size: int = 0) -> str:
    return f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}'


def gguf(num_tensors: int, num_settings: int, num_items: int = 2) -> bytes:
    """The begin of a GGUF file with one setting, a list of bytes."""
    setting = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, num_items) + bytes(2)
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_settings) + setting


BROKEN_WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut.safetensors": (lambda good: good[:-1], "truncated: 1 of"),
    "short.safetensors": (lambda good: good[:500], "truncated: the header needs"),
    "empty.safetensors": (lambda good: b"", "0 bytes are too few"),
    "more.safetensors": (lambda good: good + b"x", "1 bytes follow the last tensor"),
    "noise.safetensors": (lambda good: b"\x99" * 1000, "its header would be"),
    "json.safetensors": (lambda good: header("{]"), "the header is not valid"),
    "deep.safetensors": (lambda good: header("[" * 100_000), "nested too deeply|not valid"),
    "bomb.safetensors": (
        lambda good: header("{" + ",".join(map(entry, range(30_000))) + "}"),
        "names more than 20000 tensors",
    ),
    "twice.safetensors": (
        lambda good: header("{" + ",".join([entry("x", 1)] * 2) + "}") + b"0",
        "'x' appears twice",
    ),
    "page.safetensors": (lambda good: b"<!DOCTYPE html>" + bytes(99), "this is a web page"),
    "noise.pth": (lambda good: b"\x99" * 1000, "not a zip-based .pth"),
    "zeros.gguf": (lambda good: b"GGUF" + bytes(99), "is GGUF version 0; wanrt reads 2 and 3"),
    "noise.gguf": (lambda good: b"\x99" * 1000, "it does not begin with GGUF"),
    "other.gguf": (lambda good: good, "it does not begin with GGUF"),
    "empty.gguf": (lambda good: b"", "truncated: the magic ends at byte 4, the file has 0"),
    "cut.gguf": (lambda good: gguf(1, 1)[:-1], "truncated: the setting 'k'"),
    "bomb.gguf": (lambda good: gguf(2**60, 0), f"claims {2**60} tensors; the limit is 20000"),
    "settings.gguf": (lambda good: gguf(0, 2**60), f"claims {2**60} settings; the limit is 21000"),
    "list.gguf": (lambda good: gguf(0, 1, 2**60), f"claims {2**60} items of the setting 'k'"),
    "swapped.gguf": (lambda good: b"GGUF\0\0\0\3" + bytes(99), "is a big-endian GGUF file"),
}


@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
@pytest.mark.parametrize("option", ["--model", "--vae", "--text-encoder", "--low-noise-model"])
def test_weight_files(
    name: str, option: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    make, reason = BROKEN_WEIGHTS[name]
    (tmp_path / name).write_bytes(make((zoo.path(T2V) / DIT).read_bytes()))
    line = refused(3, *generate(zoo.path(T2V), option, name))
    assert_says(line, reason)
    assert name in line
    assert_says(refused(3, "inspect", name), reason)


@pytest.mark.parametrize("option", ["--model", "--vae", "--text-encoder", "--low-noise-model"])
def test_a_pickle_with_code_is_not_run(
    option: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    target = tmp_path / "made by the payload"
    torch.save({"a": torch.zeros(1), "b": Payload(target)}, tmp_path / "bad.pth")
    for args in (generate(zoo.path(T2V), option, "bad.pth"), ("inspect", "bad.pth")):
        assert "holds code or objects besides tensors" in refused(3, *args)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(target)))
    assert "not a zip-based .pth" in refused(3, *generate(zoo.path(T2V), option, "bare.pth"))
    assert not target.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert target.is_dir(), "the payload is harmless, and this test proves nothing"


@pytest.mark.parametrize("part", [DIT, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_a_broken_file_within_a_model_is_named(
    part: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.path(T2V), folder)
    (folder / part).write_bytes((folder / part).read_bytes()[:-100])
    assert_says(refused(3, *generate(folder)), f"{part}: truncated")


@pytest.mark.parametrize(
    ("option", "path", "reason"),
    [
        ("--vae", f"{T2V}/{DIT}", r"this is Wan DiT \(dim 128, 2 layers\) fp32, a diffusion trans"),
        ("--vae", f"{TI2V}/Wan2.2_VAE.pth", r"z 48\) fp32, a VAE with 48 latent channels; .* 16"),
        ("--text-encoder", f"{T2V}/Wan2.1_VAE.pth", "a VAE; a umT5 text encoder was asked for"),
        (
            "--text-encoder",
            "nano/models_t5_umt5-xxl-enc-bf16.pth",
            "128 text features; .* takes 48",
        ),
        ("--low-noise-model", f"{I2V}/{DIT}", "the other expert is Wan DiT"),
        ("--model", f"{T2V}/Wan2.1_VAE.pth", "comes without a diffusion transformer"),
    ],
)
def test_wrong_variants(
    option: str, path: str, reason: str, zoo: Any, refused: Callable[..., str]
) -> None:
    zoo.path(path.partition("/")[0])
    assert_says(refused(3, *generate(zoo.path(T2V), option, zoo.root / path)), reason)


def test_a_config_that_contradicts_the_weights(
    zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.path(T2V), folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_layers": 30}
    (folder / "config.json").write_text(json.dumps(config))
    reason = "its config.json says num_layers 30, the tensors say 2"
    assert reason in refused(3, *generate(folder))


def test_an_image_model_without_an_image(zoo: Any, refused: Callable[..., str]) -> None:
    assert_says(refused(2, *generate(zoo.path(I2V))), "makes i2v videos and needs --image")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "wan2.1-t2v-99b"])
def test_models_that_do_not_exist(name: str, refused: Callable[..., str]) -> None:
    assert f"no model '{name}'" in refused(2, *generate(name))


def test_offline_says_how_to_go_on(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    line = refused(2, *generate("wan2.1-t2v-1.3b", "--offline"))
    assert "is not in the local cache; download it once without --offline, or give a path" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(value: float, zoo: Any, tmp_path: Path, wanrt: Callable[..., Outcome]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.path(T2V), folder)
    weights = load_file(folder / DIT)
    weights["blocks.1.ffn.0.weight"][3, 5] = value
    save_file(weights, folder / DIT)
    outcome = wanrt(*generate(folder, "-o", tmp_path / "a.mp4"))
    assert outcome.code == 3 and not outcome.out
    assert "blocks.1.ffn.0.weight holds NaN or infinity" in outcome.err
    assert outcome.err.count("\n") == 1 and list(tmp_path.iterdir()) == [folder]


def packed(zoo: Any, path: Path) -> tuple[object, ...]:
    """A request to a model whose transformer is a GGUF file with one packed matrix."""
    weights = load_file(zoo.path(T2V) / DIT)
    write_gguf(path, weights, lambda name, _: "Q8_0" if name == PACKED else "F32")
    parts = ("--vae", zoo.path(T2V) / "Wan2.1_VAE.pth")
    parts += ("--text-encoder", zoo.path(T2V) / "models_t5_umt5-xxl-enc-bf16.pth")
    return generate(path, *parts)


@pytest.mark.parametrize("scale", [b"\xff\x7f", b"\x00\x7c"], ids=["NaN", "infinity"])
def test_nan_in_a_packed_block(
    scale: bytes, zoo: Any, tmp_path: Path, wanrt: Callable[..., Outcome]
) -> None:
    path = tmp_path / "model.gguf"
    request = packed(zoo, path)
    raw, begin = bytearray(path.read_bytes()), GgufFile(path).begin[PACKED]
    raw[begin : begin + 2] = scale
    path.write_bytes(raw)
    outcome = wanrt(*request, "-o", tmp_path / "a.mp4")
    assert outcome.code == 3 and not outcome.out
    assert f"{PACKED} holds NaN or infinity" in outcome.err
    assert outcome.err.count("\n") == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a", "split-00001-of-00002"])
def test_a_gguf_file_of_another_kind(
    name: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Formats without a reader, and a part of a split file, are refused by name."""
    path = tmp_path / f"{name}.gguf"
    request = packed(zoo, path)
    raw, label = path.read_bytes(), PACKED.encode()
    if name == "a":
        at = raw.index(label) + len(label) + 4 + 2 * 8
        assert raw[at] == 8
        path.write_bytes(raw[:at] + b"\x17" + raw[at + 1 :])
        reason = f"'{PACKED}' is IQ4_XS, which wanrt does not read .get the Q4_0 to Q8_0 or"
    else:
        path.unlink()
        write_gguf(path, {"x": torch.ones(32)}, lambda *_: "F32", split__count=2)
        reason = "is one of 2 parts of a split file .join them with `llama-gguf-split --merge`"
    assert_says(refused(3, *request), reason)
    assert_says(refused(3, "inspect", path), reason)


QUERY = "diffusion_model.blocks.0.self_attn.q"
PAIR = {
    f"{QUERY}.lora_down.weight": torch.ones(2, 128),
    f"{QUERY}.lora_up.weight": torch.ones(128, 2),
}
LORAS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another model": ({k: torch.ones(2, 2) for k in PAIR}, "does not fit .*another model"),
    "no model of ours": ({"unet.down.lora_A.weight": torch.ones(2, 2)}, "in 0 of its 1 keys"),
    "rank 0": (
        {
            f"{QUERY}.lora_down.weight": torch.ones(0, 128),
            f"{QUERY}.lora_up.weight": torch.ones(128, 0),
        },
        "rank 0",
    ),
    "same change twice": (
        PAIR | {k.replace("diffusion_model.", "transformer."): v.clone() for k, v in PAIR.items()},
        "are the same part of blocks.0.self_attn.q.weight",
    ),
}


@pytest.mark.parametrize("name", LORAS)
def test_loras(name: str, zoo: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
    tensors, reason = LORAS[name]
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_says(refused(3, *generate(zoo.path(T2V), "--lora", "lora.safetensors")), reason)


def test_too_many_loras(zoo: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
    save_file(PAIR, tmp_path / "lora.safetensors")
    flags = ("--lora", "lora.safetensors") * 400
    assert "400 LoRAs; at most 64 at once" in refused(2, *generate(zoo.path(T2V), *flags))


def test_a_lora_with_nan(zoo: Any, tmp_path: Path, wanrt: Callable[..., Outcome]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(PAIR | {f"{QUERY}.lora_up.weight": torch.full((128, 2), torch.nan)}, path)
    outcome = wanrt(*generate(zoo.path(T2V), "--lora", path, "-o", tmp_path / "a.mp4"))
    assert outcome.code == 3 and not outcome.out
    assert f"{QUERY}.lora_up.weight holds NaN or infinity" in outcome.err
    assert outcome.err.count("\n") == 1 and list(tmp_path.iterdir()) == [path]


def test_a_lora_without_alpha_and_in_two_dialects(
    zoo: Any, tmp_path: Path, wanrt: Callable[..., Outcome]
) -> None:
    """Neither is a mistake: the alpha is the rank, and each key is understood by itself."""
    path = tmp_path / "lora.safetensors"
    key = {
        f"transformer.blocks.1.attn1.to_k.lora_{x}.weight": v
        for x, v in zip("AB", PAIR.values(), strict=True)
    }
    save_file(PAIR | {name: tensor.clone() for name, tensor in key.items()}, path)
    outcome = wanrt(*generate(zoo.path(T2V), "--lora", path, "-o", tmp_path / "a.mp4"))
    assert outcome.code == 0 and "no place" not in outcome.err
    rows = wanrt("inspect", path, "--model", zoo.path(T2V)).out
    assert "changes 2 weights" in rows


def test_weights_that_overflow(zoo: Any, tmp_path: Path, wanrt: Callable[..., Outcome]) -> None:
    """Finite numbers, so that only sampling shows it: after the first step, not after the last."""
    folder = tmp_path / "model"
    shutil.copytree(zoo.path(T2V), folder)
    weights = load_file(folder / DIT)
    weights["head.head.weight"].fill_(3e38)
    save_file(weights, folder / DIT)
    outcome = wanrt(*generate(folder, "-o", tmp_path / "a.mp4", "--steps", 3))
    assert outcome.code == 7 and not outcome.out
    assert outcome.err.startswith("wanrt: step 1 of 3: head.head gave infinity")
    assert outcome.err.count("\n") == 1 and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_full_disk(
    name: str, zoo: Any, tmp_path: Path, wanrt: Callable[..., Outcome], monkeypatch: Any
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    frames = ("--frames", 1) if name == "a.png" else ()
    outcome = wanrt(*generate(zoo.path(T2V), "-o", tmp_path / name, *frames))
    assert outcome.code == 6 and not outcome.out and not list(tmp_path.iterdir())
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("wanrt: marking failed")
    assert "no space left in" in outcome.err  # marks are the first to be flushed


def test_a_broken_tokenizer(zoo: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.path(T2V), folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in refused(3, *generate(folder))


def test_a_gray_image_with_32_bits(zoo: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "deep.tiff")
    assert "32-bit samples" in refused(3, *generate(zoo.path(I2V), "--image", "deep.tiff"))
