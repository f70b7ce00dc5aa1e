"""The command line as it is used: results on stdout, progress on stderr, exit codes, Ctrl-C."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from wanrt import cli
from wanrt.config import NANO
from wanrt.media.marking import Saved
from wanrt.media.saving import Marker
from wanrt.media.video import probe_video, write_video
from wanrt.pipeline import Pipeline

T2V, I2V, FLF2V, VACE = (
    *("wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p", "wan2.1-vace-1.3b"),
)
T2V_A14B, TI2V = "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"
PROMPT = "a red circle moving right"
SETTINGS = ("--size", "48x32", "--frames", "5", "--steps", "2", "--seed", "3", "--negative", "")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def wanrt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs `wanrt ARGS` inside this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(arg) for arg in args])
        return Outcome(exit_.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The frames that went into each file; the encoder does not always give the same bytes."""
    frames: dict[str, np.ndarray] = {}
    save = Marker.save

    def kept(marker: Marker, chunks: Iterator[np.ndarray], path: Path, *options: Any) -> Saved:
        parts: list[np.ndarray] = []
        result = save(marker, (parts.append(c) or c for c in chunks), path, *options)
        frames[path.name] = np.concatenate(parts)
        return result

    monkeypatch.setattr(Marker, "save", kept)
    return frames


def shell(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m wanrt ARGS` as a process of its own."""
    command = [sys.executable, "-m", "wanrt", *map(str, args)]
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command, **options)


def test_the_file_is_what_the_pipeline_makes(
    zoo: Any, wanrt: Callable[..., Outcome], written: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = zoo.path(T2V)
    done = wanrt("generate", PROMPT, "--model", model, *SETTINGS, "--fps", 12, "-o", "a.mp4")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("a.mp4: 48x32, 5 frames, seed 3, 2 steps of unipc, guidance 5, ")
    video = zoo.open(T2V).generate(
        PROMPT, width=48, height=32, num_frames=5, num_steps=2, seed=3, negative=""
    )
    assert np.array_equal(written["a.mp4"], video.np)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]
    info = probe_video("a.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (48, 32, 5, 12)


def test_json_and_a_file_per_prompt_and_seed(
    zoo: Any, wanrt: Callable[..., Outcome], written: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("a small star\n\n  a large ring \n", encoding="utf-8")
    args = ("--prompts", "list.txt", "--model", zoo.path(T2V), *SETTINGS, "--seed", 4)
    done = wanrt("generate", *args, "--json", "-o", "out.mp4", "--size", "32x32")
    assert (done.code, done.err) == (0, "")
    results = [json.loads(line) for line in done.out.splitlines()]
    assert [(r["path"], r["prompt"], r["seed"]) for r in results] == [
        ("out-001.mp4", "a small star", 3),
        ("out-002.mp4", "a small star", 4),
        ("out-003.mp4", "a large ring", 3),
        ("out-004.mp4", "a large ring", 4),
    ]
    for r in results:
        assert (r["width"], r["height"], r["num_frames"], r["num_steps"]) == (32, 32, 5, 2)
        assert (r["task"], r["fps"], r["guidance"], r["flow_shift"]) == ("t2v", 16, 5.0, 5.0)
        assert r["negative"] == "" and r["timings"]["denoise"] >= 0
    one = zoo.open(T2V).generate(
        "a large ring", width=32, height=32, num_frames=5, num_steps=2, seed=3, negative=""
    )
    assert list(written) == [r["path"] for r in results]
    assert np.array_equal(written["out-003.mp4"], one.np)
    assert len({frames.tobytes() for frames in written.values()}) == 4
    assert all(probe_video(tmp_path / name).num_frames == 5 for name in written)


def test_a_random_seed_is_told_and_repeats(
    zoo: Any, wanrt: Callable[..., Outcome], written: dict[str, np.ndarray]
) -> None:
    args = ("generate", PROMPT, "--model", zoo.path(T2V), "--size", "32x32", "--frames", 5)
    args += ("--steps", 1, "--json", "-o")
    first = json.loads(wanrt(*args, "a.mp4").out)
    assert first["seed"] != json.loads(wanrt(*args, "b.mp4").out)["seed"]
    wanrt(*args, "c.mp4", "--seed", first["seed"])
    assert np.array_equal(written["a.mp4"], written["c.mp4"])
    assert not np.array_equal(written["a.mp4"], written["b.mp4"])


def test_one_frame_is_a_png(zoo: Any, wanrt: Callable[..., Outcome]) -> None:
    call = ("generate", PROMPT, "--model", zoo.path(T2V), *SETTINGS, "--frames", 1)
    done = wanrt(*call, "-o", "a.png", "--marking", "off")  # whose pixels are exact
    assert done.code == 0, done
    image = zoo.open(T2V).generate(
        PROMPT, width=48, height=32, num_frames=1, num_steps=2, seed=3, negative=""
    )
    assert np.array_equal(np.asarray(Image.open("a.png")), image.np[0])


@pytest.mark.parametrize(("asked", "made"), [(10, 9), (11, 13), (2, 1), (5, 5)])
def test_round_takes_the_nearest_frames(
    asked: int, made: int, zoo: Any, wanrt: Callable[..., Outcome]
) -> None:
    args = (*SETTINGS, "--frames", asked, "--round", "--steps", 1, "--json")
    done = wanrt("generate", PROMPT, "--model", zoo.path(T2V), *args, "-o", "a.mp4")
    assert json.loads(done.out)["num_frames"] == made == probe_video("a.mp4").num_frames


def test_overwriting_needs_consent(zoo: Any, wanrt: Callable[..., Outcome]) -> None:
    Path("a.mp4").write_text("old")
    args = ("generate", PROMPT, "--model", zoo.path(T2V), *SETTINGS, "-o", "a.mp4")
    assert wanrt(*args).code == 5 and Path("a.mp4").read_text() == "old"
    assert wanrt(*args, "-y").code == 0 and probe_video("a.mp4").num_frames == 5


INPUTS: list[tuple[str, str, dict[str, Any]]] = [  # flags, and the same in Python
    (I2V, "--image a.png --flow-shift 4", {"image": "a.png", "flow_shift": 4.0}),
    (FLF2V, "--image a.png --last-image b.png", {"image": "a.png", "last_image": "b.png"}),
    (
        VACE,
        "--ref a.png --ref b.png --context-scale 0.5",
        {"refs": ("a.png", "b.png"), "context_scale": 0.5},
    ),
    (VACE, "--video c.mp4 --mask b.png", {"video": "c.mp4", "mask": "b.png"}),
    (VACE, "--video c.mp4 --outpaint left:0.35", {"video": "c.mp4", "outpaint": "left:0.35"}),
    (
        VACE,
        "--video c.mp4 --extend after --frames 9",
        {"video": "c.mp4", "extend": "after", "num_frames": 9},
    ),
    (
        T2V_A14B,
        "--guidance 3 --guidance-low 2 --solver dpm++",
        {"guidance": 3.0, "guidance_low": 2.0, "solver": "dpm++"},
    ),
    (
        TI2V,
        "--image a.png --size 64x32 --distilled",
        {"image": "a.png", "width": 64, "distilled": True},
    ),
]


@pytest.mark.parametrize(("model", "flags", "settings"), INPUTS)
def test_flags_are_the_settings(
    model: str,
    flags: str,
    settings: dict[str, Any],
    zoo: Any,
    wanrt: Callable[..., Outcome],
    written: dict[str, np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(name)
    write_video("c.mp4", [rng.integers(0, 256, (5, 32, 48, 3), np.uint8)], 16)
    args = (*SETTINGS, *flags.split(), "-o", "a.mp4")
    done = wanrt("generate", PROMPT, "--model", zoo.path(model), *args)
    assert done.code == 0, done
    common = {"width": 48, "height": 32, "num_frames": 5, "num_steps": 2, "seed": 3, "negative": ""}
    expected = zoo.open(model).generate(PROMPT, **common | settings)
    assert np.array_equal(written["a.mp4"], expected.np)


@pytest.mark.parametrize(
    "prompt",
    ["", "\n\n", "a star\nand a ring", "مربع أحمر", "👩‍👩‍👧 🏳️‍🌈", "a" * 3000, "--", "../../x"],
)
def test_unusual_prompts_are_fine(
    prompt: str, zoo: Any, wanrt: Callable[..., Outcome], tmp_path: Path
) -> None:
    args = ("--model", zoo.path(T2V), *SETTINGS, "--json", "-o", "a.mp4")
    done = wanrt("generate", *args, "--", prompt)
    assert done.code == 0 and json.loads(done.out)["prompt"] == prompt
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]


def test_a_long_prompt_is_cut_with_a_notice(
    zoo: Any, wanrt: Callable[..., Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    done = wanrt("generate", "star " * 700, "--model", zoo.path(T2V), *SETTINGS, "-o", "a.mp4")
    assert done.code == 0
    assert "the prompt has 701 tokens; the model reads the first 512" in caplog.text


@pytest.mark.parametrize("chunks", [0, 1])
def test_ctrl_c_while_writing_leaves_nothing(
    chunks: int, zoo: Any, wanrt: Callable[..., Outcome], tmp_path: Path, monkeypatch: Any
) -> None:
    decode = Pipeline.decode

    def interrupted(self: Pipeline, *args: Any) -> Iterator[np.ndarray]:
        for _, frames in zip(range(chunks), decode(self, *args), strict=False):
            yield frames
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "decode", interrupted)
    done = wanrt("generate", PROMPT, "--model", zoo.path(T2V), *SETTINGS, "-o", "a.mp4")
    assert done == (130, "", "wanrt: interrupted\n") and not list(tmp_path.iterdir())


class Terminal:
    """A process whose stderr is a terminal."""

    def __init__(self, folder: Path, *args: object) -> None:
        self.reader, writer = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wanrt", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=writer,
            cwd=folder,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
            # a shell's background job ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(writer)
        self.seen = b""

    def read(self, until: bytes | None = None) -> bytes:
        """Everything written to the terminal so far, at least up to `until`, or to the end."""
        while until is None or until not in self.seen:
            try:
                data = os.read(self.reader, 65536)
            except OSError:  # how Linux tells that the other side is gone
                data = b""
            if not data:
                assert until is None, self.seen
                break
            self.seen += data
        return self.seen


def test_progress_goes_to_stderr(zoo: Any, tmp_path: Path) -> None:
    terminal = Terminal(
        tmp_path, "generate", PROMPT, "--model", zoo.path(T2V), *SETTINGS, "-o", "a.mp4"
    )
    shown = terminal.read()
    out, _ = terminal.process.communicate(timeout=60)
    assert terminal.process.returncode == 0
    for phase in (b"load umt5", b"load dit", b"denoise", b"load vae", b"decode"):
        assert phase in shown
    assert b"2/2" in shown and b"\x1b[" in shown
    assert out.startswith(b"a.mp4: 48x32, 5 frames") and out.count(b"\n") == 1


def test_ctrl_c_while_denoising(zoo: Any, tmp_path: Path) -> None:
    args = ("--size", "256x256", "--frames", "17", "--steps", "1000", "-o", "a.mp4")
    terminal = Terminal(tmp_path, "generate", PROMPT, "--model", zoo.path(T2V), *args)
    terminal.read(until=b"denoise")
    terminal.process.send_signal(signal.SIGINT)
    shown = terminal.read().replace(b"\r\n", b"\n")
    out, _ = terminal.process.communicate(timeout=60)
    assert terminal.process.returncode == 130
    assert out == b"" and b"Traceback" not in shown
    assert shown.endswith(b"wanrt: interrupted\n"), shown[-300:]
    assert not list(tmp_path.iterdir())


def test_as_a_process(zoo: Any, tmp_path: Path) -> None:
    """Not a terminal: no bars, no colour, one line on stdout; a mistake is one line on stderr."""
    args = ("generate", PROMPT, "--model", zoo.path(T2V), *SETTINGS, "--json", "-o", "a.mp4")
    done = shell(*args, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("wanrt: a.mp4: watermark: not certain: the frames are too few")
    assert json.loads(done.stdout)["path"] == "a.mp4"
    again = shell(*args, cwd=tmp_path)
    assert again.returncode == 5 and again.stdout == ""
    assert again.stderr == "wanrt: a.mp4 exists already (-y overwrites it, -o names another file)\n"


def test_hub_models_offline_by_environment(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = shell("inspect", "wan2.1-t2v-1.3b", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "download it once without HF_HUB_OFFLINE, or give a path" in done.stderr


@pytest.mark.parametrize("name", [T2V, I2V, FLF2V, VACE, T2V_A14B, TI2V])
def test_inspect(name: str, zoo: Any, wanrt: Callable[..., Outcome]) -> None:
    spec = zoo.specs[name]
    done = wanrt("inspect", zoo.path(name), "--json")
    assert done.code == 0 and not done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    by_kind: dict[str, list[Any]] = {}
    for one in found:
        by_kind.setdefault(one["kind"], []).append(one["spec"])
        assert one["layout"] == "original" and Path(one["path"]).is_file()
    as_json = {k: json.loads(json.dumps(asdict(getattr(spec, k)))) for k in ("dit", "vae", "umt5")}
    assert by_kind["dit"] == [as_json["dit"]] * (2 if spec.boundary else 1)
    assert by_kind["vae"] == [as_json["vae"]] and by_kind["umt5"] == [as_json["umt5"]]
    if spec.clip:
        assert by_kind["clip"] == [asdict(spec.clip)]
    else:
        assert "clip" not in by_kind
    table = wanrt("inspect", zoo.path(name)).out
    for one in found:
        row = next(line for line in table.splitlines() if line.rstrip().endswith(one["path"]))
        assert row.startswith(one["title"]) and f" {one['parameters']:,} " in row


def test_inspect_shows_odd_paths_as_they_are(
    zoo: Any, wanrt: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "[red]" / ":smile:" / ("x" * 150)
    folder.mkdir(parents=True)
    shutil.copy(zoo.path(T2V) / "Wan2.1_VAE.pth", folder / "vae.pth")
    assert f"{folder}/vae.pth" in wanrt("inspect", folder).out


@pytest.mark.parametrize(
    ("layout", "precision", "looks", "tokenizer"),
    [  # `looks`: by its names; text encoders in ComfyUI's files have Hugging Face's
        (
            "original",
            {"dit": "fp32", "vae": "fp32", "umt5": "bf16"},
            {"dit": "original", "vae": "original", "umt5": "original"},
            ".",
        ),
        (
            "diffusers",
            {"dit": "fp32", "vae": "fp32", "umt5": "bf16"},
            {"dit": "diffusers", "vae": "diffusers", "umt5": "diffusers"},
            "tokenizer",
        ),
        (
            "comfyui",
            {"dit": "fp16", "vae": "fp16", "umt5": "fp16"},
            {"dit": "comfyui", "vae": "original", "umt5": "diffusers"},
            "split_files/text_encoders",
        ),
    ],
)
def test_random_weights(
    layout: str,
    precision: dict[str, str],
    looks: dict[str, str],
    tokenizer: str,
    wanrt: Callable[..., Outcome],
    zoo: Any,
) -> None:
    made = wanrt("dev", "random-weights", "--variant", "nano", "--layout", layout, "-o", "model")
    assert made == (0, "model\n", "")
    found = [json.loads(line) for line in wanrt("inspect", "model", "--json").out.splitlines()]
    assert {one["kind"]: one["precision"] for one in found} == precision
    titles = {"dit": "wanrt nano", "vae": "wanrt nano VAE", "umt5": "wanrt nano umT5"}
    for one in found:
        kind = one["kind"]
        assert one["title"] == f"{titles[kind]} {precision[kind]}"
        assert one["spec"] == json.loads(json.dumps(asdict(getattr(NANO, kind))))
        assert one["layout"] == looks[kind]
    args = ("generate", PROMPT, "--model", "model", "--size", "32x32", "--frames", 5)
    args += ("--steps", 1, "-o", "a.mp4")
    lacking = wanrt(*args)
    assert lacking.code == 3 and "comes without a tokenizer" in lacking.err
    (Path("model") / tokenizer).mkdir(exist_ok=True)
    shutil.copy(zoo.path(T2V) / "tokenizer.json", Path("model") / tokenizer)
    assert wanrt(*args).code == 0 and probe_video("a.mp4").num_frames == 5
    again = wanrt("dev", "random-weights", "--variant", "nano", "--layout", layout, "-o", "model")
    assert again.code == 5 and "is already there" in again.err


def test_random_weights_of_one_part(wanrt: Callable[..., Outcome]) -> None:
    args = ("dev", "random-weights", "--variant", "nano", "-o", "vae")
    assert wanrt(*args, "--parts", "vae", "--dtype", "bf16").code == 0
    assert [p.name for p in Path("vae").iterdir()] == ["Wan2.1_VAE.pth"]
    assert json.loads(wanrt("inspect", "vae", "--json").out)["precision"] == "bf16"
    for option, value in (
        ("--variant", "t2v-99B"),
        ("--layout", "zip"),
        ("--parts", "dit,tail"),
        ("--dtype", "int3"),
    ):
        bad = wanrt(*args, option, value)
        assert bad.code == 2 and bad.err.count("\n") == 1 and value.split(",")[-1] in bad.err


def test_plan_says_what_a_released_model_holds(wanrt: Callable[..., Outcome]) -> None:
    size = ("--size", "832x480", "--frames", 81)
    done = wanrt("plan", "t2v-14b", *size, "--vram", "8G", "--ram", "64G")
    assert done.code == 0 and done.err == ""
    assert [line.split()[0] for line in done.out.splitlines()[:4]] == [
        *("phase", "text", "step", "decode")
    ]
    assert "of budget 8.00 GiB" in done.out and "blocks stay" in done.out
    record = json.loads(wanrt("plan", "t2v-14b", *size, "--vram", "8G", "--json").out)
    assert record["peak"] == max(phase["peak"] for phase in record["phases"]) <= 8 << 30
    assert record["placement"]["num_resident"] < record["placement"]["num_blocks"] == 40


def test_plan_knows_a_checkpoint_by_its_headers(wanrt: Callable[..., Outcome], zoo: Any) -> None:
    record = json.loads(wanrt("plan", zoo.path(I2V), "--size", "64x64", "--json").out)
    assert [phase["name"] for phase in record["phases"]] == [
        *("text", "image", "encode", "step", "decode")
    ]
    assert record["placement"]["num_blocks"] == 2


def test_plan_that_does_not_fit_says_what_would(wanrt: Callable[..., Outcome]) -> None:
    done = wanrt("plan", "t2v-14b", "--vram", "4G")
    assert done.code == 4 and done.out == ""
    assert "--vram 7." in done.err and "or --frames " in done.err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("t2v-99b",), "t2v-99b"),
        (("t2v-14b", "--precision", "int3"), "int3"),
        (("t2v-14b", "--vram", "lots"), "--vram 'lots'"),
        (("t2v-14b", "--size", "832x481"), "481"),
        (("t2v-14b", "--frames", "80"), "77 and 81"),
    ],
)
def test_plan_refuses_what_it_cannot_plan(
    arguments: tuple[str, ...], message: str, wanrt: Callable[..., Outcome]
) -> None:
    done = wanrt("plan", *arguments)
    assert done.code in (2, 3) and message in done.err and "Traceback" not in done.err


def test_generate_prints_the_plan_and_the_measured_peak(
    wanrt: Callable[..., Outcome], zoo: Any
) -> None:
    model = ("--model", zoo.path("nano"), "--vram", "64M")
    large = (*SETTINGS, "--size", "96x64")  # activations outweigh the mapped .pth of the VAE
    done = wanrt("generate", PROMPT, *model, *large)
    assert done.code == 0 and "phase" in done.err and "blocks" not in done.out
    assert re.search(r"peak \d+ MiB of \d+ MiB planned", done.out)
    done = wanrt("generate", PROMPT, *model, *large, "--json", "-y")
    memory = json.loads(done.out)["memory"]
    assert 0.8 * memory["planned"] <= memory["measured"] <= memory["planned"] + (2 << 20)
    assert wanrt("generate", PROMPT, *model[:3], "1M", *SETTINGS, "-y").code == 4
