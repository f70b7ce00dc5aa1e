"""`wanrt plan` and a request ask the same, at once, and what a prompt says moves nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import DIALECTS, shapes_of, truth
from safetensors.torch import save_file

from wanrt import cli_plan
from wanrt.config import MODELS, GenerateConfig
from wanrt.errors import BudgetError
from wanrt.memory.budget import GIB, HOST_FIXED
from wanrt.memory.dit_bytes import FORMATS
from wanrt.memory.placement import Ask
from wanrt.memory.plan import make_plan, plan_for_any_text
from wanrt.memory.question import Lessons, Question
from wanrt.models.tokenizer import Tokenizer
from wanrt.pipeline import Pipeline
from wanrt.planning import expected_machine, format_of
from wanrt.weights.load import skeleton

ROOT = Path(__file__).resolve().parent.parent
T2V, I2V, FLF2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p"
VACE, TI2V, A14B = "wan2.1-vace-1.3b", "wan2.2-ti2v-5b", "wan2.2-t2v-a14b"
SMALL = {"num_frames": 9, "num_steps": 2, "seed": 3}
LONG = "a red circle moving right " * 200


def test_a_plan_loads_no_torch() -> None:
    """Nor anything else that takes long: it is what makes the answer immediate."""
    script = (
        "import sys; from wanrt.__main__ import main\n"
        "try: main(['plan', 'wan2.2-i2v-a14b', '--vram', '12G', '--precision', 'int8'])\n"
        "except SystemExit as done: print(done.code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    code, *loaded = done.stderr.split()
    assert code == "0" and "peak" in done.stdout
    assert "wanrt.memory.plan" in loaded
    assert not {"torch", "numpy", "triton", "safetensors", "av", "tokenizers"} & set(loaded)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What `wanrt plan` says, as JSON."""
    with pytest.raises(SystemExit) as exit_:
        cli_plan.main(["plan", *map(str, arguments), "--json", "--device", "cpu"])
    assert exit_.value.code == 0
    return json.loads(capsys.readouterr().out)


# A model; what a request is given; the same for `wanrt plan`; what the pipeline is loaded with.
REQUESTS: dict[str, tuple[str, dict[str, Any], list[object], dict[str, Any]]] = {
    "nano": ("nano", {}, [], {"vram": "45M"}),
    "defaults": (T2V, {"num_frames": None}, ["--frames", 81], {"vram": "4G"}),
    "unguided": ("nano", {"guidance": 1.0}, ["--guidance", 1], {"vram": "45M"}),
    "preset": (T2V, {"preset": "causvid"}, ["--preset", "causvid"], {"vram": "64M"}),
    "bf16": (T2V, {}, [], {"vram": "64M", "precision": "bf16"}),
    "int8": (T2V, {}, [], {"vram": "64M", "precision": "int8"}),
    "vae int8": ("nano", {}, [], {"vram": "45M", "vae_precision": "int8"}),
    "little ram": (T2V, {}, [], {"vram": "64M", "ram": "2100M"}),
    "an image": (T2V, {"num_frames": 1}, ["--frames", 1], {"vram": "64M"}),
    "i2v": (I2V, {"image": "a.png"}, [], {"vram": "64M"}),
    "flf2v": (FLF2V, {"image": "a.png", "last_image": "b.png"}, [], {"vram": "64M"}),
    "ti2v, text": (TI2V, {}, [], {"vram": "64M"}),
    "ti2v, image": (TI2V, {"image": "a.png"}, ["--task", "i2v"], {"vram": "64M"}),
    "vace": (VACE, {"refs": ("b.png", "c.png")}, ["--refs", 2], {"vram": "64M"}),
    "two experts": (A14B, {}, [], {"vram": "64M"}),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("case", REQUESTS)
def test_plan_and_generate_agree(
    case: str, zoo: Any, files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, given, arguments, loaded = REQUESTS[case]
    pictures = {name: files[v] for name, v in given.items() if name in ("image", "last_image")}
    pictures |= {"refs": tuple(files[ref] for ref in given.get("refs", ()))}
    size = {"width": 96, "height": 64}  # the shape of the pictures
    run = zoo.open(model, **loaded).start("a circle", **(SMALL | size | given | pictures))
    options = [part for name, value in loaded.items() for part in (flag(name), value)]
    shape = ["--size", "96x64", *([] if "--frames" in arguments else ["--frames", 9])]
    said = printed(capsys, zoo.path(model), *shape, *arguments, *options)
    assert said == cli_plan.record(run.plan)
    assert said["peak"] <= run.plan.budget


def test_they_agree_about_loras(
    zoo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = shapes_of(zoo.specs[T2V].dit)
    change = truth(shapes, ["blocks.0.self_attn.q", "blocks.1.ffn.0"])
    tensors = next(iter(DIALECTS.values()))(change)
    path = tmp_path / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    pipe = zoo.open(T2V, vram="64M", loras=[path])
    run = pipe.start("a circle", width=96, height=64, **SMALL)
    arguments = (zoo.path(T2V), "--size", "96x64", "--frames", 9, "--vram", "64M")
    said = printed(capsys, *arguments, "--lora", path)
    assert said == cli_plan.record(run.plan) and said["lora"] > 0
    assert said["peak"] > printed(capsys, *arguments)["peak"]
    with pytest.raises(SystemExit) as exit_:
        cli_plan.main(["plan", *map(str, arguments), "--lora", str(tmp_path / "none")])
    assert exit_.value.code in (2, 3)


@pytest.mark.parametrize("model", MODELS)
def test_a_released_model_has_the_format_of_its_file(model: str) -> None:
    """What `auto` means, counted from the shapes."""
    num_params = sum(p.numel() for p in skeleton("dit", MODELS[model].dit).parameters())
    small = num_params <= 200_000_000
    assert format_of("auto", MODELS[model]) == ("fp32" if small else "bf16")
    assert format_of("int8", MODELS[model]) == ("int8/fp32" if small else "int8")
    assert {format_of(p, MODELS[model]) for p in ("fp16", "fp8")} <= set(FORMATS)


def test_a_machine_that_was_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expected_machine("cuda").fused and expected_machine("cpu").device == "cpu"
    monkeypatch.setenv("WANRT_OPS", "torch")
    assert not expected_machine("cuda").fused


def request_of(pipe: Pipeline, prompt: str, **settings: Any) -> Any:
    size = {"width": 64, "height": 64, "num_frames": 9, "negative": ""}
    return pipe.check(GenerateConfig(prompt, **(size | settings)))


@pytest.mark.parametrize("vram", ["64G", "45M", "26M"])
def test_what_a_prompt_says_moves_nothing(vram: str, zoo: Any) -> None:
    pipe = zoo.open("nano", vram=vram)
    plans = [pipe.plan(request_of(pipe, prompt)) for prompt in ("a", LONG, "a blue square")]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].ask.text_rows == 512


def test_a_text_that_does_not_fit_is_refused(zoo: Any) -> None:
    """Where the model's own length does not fit, shorter texts do; the plan says how long."""
    pipe = zoo.open("nano", vram="64G")
    whole = pipe.plan(request_of(pipe, "a"), decode=False).question
    pipe = zoo.open("nano", vram=f"{whole.least() - (2 << 20) >> 20}M")
    plan = pipe.plan(request_of(pipe, "a"), decode=False)
    assert 16 < plan.ask.text_rows < 512
    longest = pipe.plan(request_of(pipe, "a red circle"), decode=False)
    assert longest == plan
    with pytest.raises(BudgetError, match=r"512 tokens.*shorter texts, or --vram") as error:
        pipe.plan(request_of(pipe, LONG), decode=False)
    enough = str(error.value).partition("--vram ")[2].split()[0]
    pipe = zoo.open("nano", vram=enough)
    assert pipe.plan(request_of(pipe, LONG), decode=False).ask.text_rows == 512


def test_one_token_more_would_not_fit() -> None:
    ask = Ask(1280, 720, 81, image=True)
    question = Question(MODELS["wan2.1-i2v-14b-480p"], ask, "bf16", 32 * GIB)
    plan = plan_for_any_text(question, 8 * GIB)
    rows = plan.ask.text_rows
    assert 1 < rows < 512 and plan.peak <= 8 * GIB

    def least(rows: int) -> int:
        longer = Ask(1280, 720, 81, image=True, text_rows=rows)
        return Question(question.spec, longer, "bf16", 32 * GIB).least()

    assert least(rows) <= 8 * GIB < least(rows + 1)


def test_lessons_bind_only_where_they_can() -> None:
    """More bytes than were refused are taken where less does not do what is asked now."""
    question = Question(MODELS[T2V], Ask(832, 480, 81), "bf16", 32 * GIB)
    free = make_plan(question, 16 * GIB)
    most = free.options["step"].phase.peak - 1
    taught = make_plan(question, 16 * GIB, Lessons(True, {"step": most}))
    assert free.keep and not taught.keep
    assert taught.options["step"].phase.peak <= most
    assert taught.options["decode"] == free.options["decode"]
    least = min(option.phase.peak for option in question.phases["step"])
    desperate = make_plan(question, 16 * GIB, Lessons(True, {"step": 1}))
    assert desperate.options["step"].phase.peak == least
    both = Lessons(most={"step": 5, "text": 9}).merged(Lessons(True, {"step": 7, "decode": 3}))
    assert both == Lessons(True, {"step": 5, "text": 9, "decode": 3})


def test_the_tokenizer_is_read_once(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, load = [], Tokenizer.load
    monkeypatch.setattr(Tokenizer, "load", lambda path: reads.append(path) or load(path))
    pipe = zoo.open("nano", vram="45M")
    for prompt in ("a red circle", "a blue square"):
        pipe.generate(prompt, width=64, height=64, output="latents", **SMALL)
    assert len(reads) == 1
    other = zoo.open(T2V)
    pipe.components.parts = other.components.parts  # another text encoder
    pipe.components.tokenizer()
    assert len(reads) == 2


@torch.inference_mode()
def test_host_memory_is_what_the_plan_says(zoo: Any) -> None:
    """Blocks that wait and the buffers through which others come from the file, to the byte."""
    pipe = zoo.open("nano", vram="64G")
    plan = pipe.plan(request_of(pipe, "a"))
    for room, waits in ((None, 5), (16 << 20, 2), (8 << 20, 0)):
        question = replace(plan.question, ram=room and HOST_FIXED + room)
        options = question.phases["step"]
        streaming = next(o for o in options if o.placement.num_resident == 1)
        assert streaming.placement.num_pinned == waits
        chosen = replace(plan, question=question, keep=False, options={"step": streaming})
        pipe.components.clear()
        pipe.components.follow(chosen)
        stream = pipe.components.dit().weight_stream
        waiting = sum(s.host.nbytes for s in stream._stops.values() if s.host is not None)
        staging = sum(slot.staging.nbytes for slot in stream._free if slot.staging is not None)
        assert waiting == streaming.placement.pinned
        assert staging == streaming.placement.staging
        assert waiting + staging == streaming.phase.host == chosen.host
        assert sum(slot.buffer.nbytes for slot in stream._free) == streaming.phase.ring
