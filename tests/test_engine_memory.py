"""What bundles say of their engines' memory, with the workspaces of real builds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_files import RELEASE
from engine_files import write_engines

from wanrt import cli_plan
from wanrt.config import MODELS, VaeWork
from wanrt.engine.bundle import Bundle
from wanrt.engine.memory import engine_bytes, format_in
from wanrt.engine.trt_place import Workspace
from wanrt.errors import BudgetError, FormatError
from wanrt.export import engine_set, engines, onnx, trt, vae
from wanrt.memory.budget import GIB
from wanrt.memory.engine_bytes import EngineBytes
from wanrt.memory.placement import Ask
from wanrt.memory.plan import make_plan, plan_for_any_text
from wanrt.memory.question import Question
from wanrt.memory.vae_engine_bytes import VaeEngines
from wanrt.vae_sections import decoder_sections

ROOT = Path(__file__).resolve().parent.parent
B14 = MODELS["wan2.1-t2v-14b"]
HD = Ask(1280, 720, 81)

# Bytes that TensorRT-RTX 1.7.1.116 stated for compute capability 8.9, at the largest sizes of
# `export/engines.py`: of the 14B, and of the sections of VAE 2.1 by range (tall is as wide).
AROUND = {
    "dit.patch": 34252800,
    "dit.text": 65873920,
    "dit.time": 8232960,
    "dit.time_projection": 8335360,
    "dit.kv": 67911680,
    "dit.head": 177275392,
}
BLOCKS = {
    "bf16": {"dit.pre": 513589248, "dit.post": 659419136, "dit.block": 6743629312},
    "int8": {"dit.pre": 463486976, "dit.post": 715190272, "dit.block": 7666760704},
}
VAE = {
    "decode": {
        "0.frame": (870809600, 2688614400),
        "1.first": (143827456, 255692800),
        "1.step": (165888000, 294912000),
        "2.first": (356548608, 631799808),
        "2.step": (619315200, 1101004800),
        "3.frame": (621305856, 1102995456),
        "4.frame": (541024256, 953901056),
        "5.frame": (629497856, 1111187456),
        "6.frame": (1070372864, 1896126464),
        "7.frame": (1070372864, 1896126464),
        "8.frame": (1070372864, 1896126464),
        "9.frame": (890281472, 1581071872),
    },
    "encode": {
        "0.frame": (1242316800, 2208563200),
        "1.frame": (1070372864, 1896126464),
        "2.frame": (539070464, 951947264),
        "3.frame": (541024256, 953901056),
        "4.first": (119447552, 205463552),
        "4.step": (451223552, 795287552),
        "5.first": (268075008, 474513408),
        "5.step": (538804224, 951681024),
        "6.frame": (85377024, 145588224),
        "7.frame": (870809600, 2688614400),
    },
}
DECODES = VaeEngines({"wide": 1070372864, "tall": 1070372864, "any": 2688614400})
ENCODES = VaeEngines({"wide": 1242316800, "tall": 1242316800, "any": 2688614400})
# The neediest of VAE 2.2, decoding; 1280x704 is the 5B's size.
DECODES_2_2 = VaeEngines({"wide": 1592524800, "tall": 1592524800, "any": 2831155200})


def workspaces(precision: str) -> dict[str, int]:
    """By graph, of a bundle as wanrt makes it: blocks in halves, the VAE in sections."""
    sections = {
        f"vae.{side}.{section}.{sizes}": size
        for side, found in VAE.items()
        for section, (narrow, largest) in found.items()
        for sizes, size in (("wide", narrow), ("tall", narrow), ("any", largest))
    }
    halves = {name: size for name, size in BLOCKS[precision].items() if name != "dit.block"}
    return AROUND | halves | sections


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_engines(
        B14, tmp_path_factory.mktemp("int8") / "bundle", workspaces("int8"), "int8"
    )


def test_a_workspace_is_that_of_the_neediest_engine_in_use(int8: Bundle, tmp_path: Path) -> None:
    found = engine_bytes(int8, B14.vae, 89, RELEASE)
    assert found == EngineBytes("halves", BLOCKS["int8"]["dit.post"], DECODES, ENCODES)
    assert format_in(int8.manifest) == "int8"
    for card, release in ((86, RELEASE), (89, "1.6.0.0")):
        with pytest.raises(FormatError, match=f"no engine for tensorrt-rtx {release} on"):
            engine_bytes(int8, B14.vae, card, release)

    plain = workspaces("bf16") | BLOCKS["bf16"] | {"dit.attention": 3096576000}
    with_all = write_engines(B14, tmp_path / "all", plain)
    assert format_in(with_all.manifest) == "bf16"
    assert engine_bytes(with_all, B14.vae, 89).step == 3096576000  # what halves leave idle is not
    eight = workspaces("int8") | {"dit.attention": 3096576000}
    held = engine_bytes(write_engines(B14, tmp_path / "eight", eight, "int8"), B14.vae, 89)
    assert held.step == BLOCKS["int8"]["dit.post"]  # attention is native there, in eight bits
    whole = {"vae.decode.first": 1 << 30, "vae.decode.step": 2 << 30}
    kept = {"tall": DECODES.sections["tall"], "any": DECODES.sections["any"]}
    for sizes in ("wide", "tall", "any"):
        plain.pop(f"vae.decode.2.first.{sizes}")
        found = engine_bytes(write_engines(B14, tmp_path / sizes, plain | whole), B14.vae, 89)
        assert found.decode == VaeEngines(kept, whole=2 << 30)
        kept.pop("tall" if sizes == "wide" else "any", None)
    whole |= plain
    assert found.blocks == "halves"
    whole.pop("dit.pre")
    found = engine_bytes(write_engines(B14, tmp_path / "whole", whole), B14.vae, 89)
    assert (found.blocks, found.step) == ("whole", BLOCKS["bf16"]["dit.block"])


def question(engines: EngineBytes, ask: Ask = HD, precision: str = "int8") -> Question:
    return Question(B14, ask, precision, 32 * GIB, engines=engines)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_the_14b_denoises_720p_in_12_gib(precision: str, tmp_path: Path) -> None:
    bundle = write_engines(B14, tmp_path / "bundle", workspaces(precision), precision)
    engines = engine_bytes(bundle, B14.vae, 89)
    plan = plan_for_any_text(question(engines, replace(HD, decodes=False), precision), 12 * GIB)
    step = plan.options["step"].phase
    assert step.workspace == max(BLOCKS[precision][f"dit.{half}"] for half in ("pre", "post"))
    assert plan.fixed + step.peak <= 12 * GIB and plan.ask.text_rows == 512
    native = plan_for_any_text(question(replace(engines, decode=None), HD, precision), 12 * GIB)
    assert native.peak <= 12 * GIB and native.ask.text_rows == 512


GB = 10**9


@pytest.mark.parametrize("size", [(1280, 720), (720, 1280)], ids=["wide", "tall"])
def test_the_vae_decodes_720p_by_engines_in_8_gb(int8: Bundle, size: tuple[int, int]) -> None:
    """And the whole request runs in 12 GB, the transformer by engines, too."""
    ask = replace(HD, width=size[0], height=size[1])
    asked = question(engine_bytes(int8, B14.vae, 89), ask)
    plan = plan_for_any_text(asked, 12 * GB)
    decode = plan.options["decode"].phase
    assert decode.workspace == DECODES.sections["wide"] and plan.work("decode") == VaeWork(chunk=1)
    assert plan.fixed + decode.peak <= 8 * GB
    assert plan.peak <= 12 * GB and plan.ask.text_rows == 512
    assert plan.options["step"].phase.workspace == BLOCKS["int8"]["dit.post"]


def test_below_that_the_modules_decode() -> None:
    """Of a model whose steps need less."""
    spec, engines = MODELS["wan2.1-t2v-1.3b"], EngineBytes(decode=DECODES)
    asked = Question(spec, HD, ram=32 * GIB, engines=engines)
    large = plan_for_any_text(asked, 8 * GIB).options["decode"].phase
    assert large.workspace == DECODES.sections["wide"]
    small = plan_for_any_text(asked, 7 * GIB)
    assert small.peak <= 7 * GIB and small.options["decode"].phase.workspace == 0
    assert small.work("decode").frames == 1  # what `GraphVae` leaves to the modules


def test_the_vae_encodes_720p_by_engines_in_8_gb(int8: Bundle) -> None:
    spec = MODELS["wan2.1-i2v-14b-720p"]
    asked = question(engine_bytes(int8, B14.vae, 89), replace(HD, image=True))
    plan = plan_for_any_text(replace(asked, spec=spec), 12 * GIB)
    for side, stated in (("encode", ENCODES), ("decode", DECODES)):
        phase = plan.options[side].phase
        assert phase.workspace == stated.sections["wide"] and plan.fixed + phase.peak <= 8 * GB


def test_other_shapes_take_the_engines_of_any_and_larger_ones_the_modules() -> None:
    engines = EngineBytes(decode=DECODES)
    for width, height, sizes in (
        (832, 480, "wide"), (480, 832, "tall"), (1104, 832, "any"), (960, 960, "any"),
        (1296, 720, ""),
    ):  # fmt: skip
        workspace = DECODES.sections.get(sizes, 0)
        options = question(engines, Ask(width, height, 81)).phases["decode"]
        assert max(option.phase.workspace for option in options) == workspace
        assert all(option.work != VaeWork(chunk=1) for option in options if (
            workspace and not option.phase.workspace))  # fmt: skip


def test_the_5b_decodes_by_engines_in_8_gib() -> None:
    """With caches in host memory in 6, for the time that it takes to copy them."""
    spec = MODELS["wan2.2-ti2v-5b"]
    asked = Question(
        spec, Ask(1280, 704, 81), ram=32 * GIB, engines=EngineBytes(decode=DECODES_2_2)
    )
    room = asked.machine.fixed
    peaks = {
        option.work.host: room + option.phase.peak
        for option in asked.phases["decode"]
        if option.phase.workspace and option.work
    }
    assert 6 * GIB < peaks[False] < 8 * GIB and peaks[True] < 6 * GIB
    host = next(o for o in asked.phases["decode"] if o.phase.workspace and o.phase.host)
    sections = decoder_sections(spec.vae)
    per_frame = sum(
        section.times * slot.channels * slot.frames * slot.scale**2
        for section in sections
        for slot in section.slots.values()
    )
    copied = 2 * 21 * per_frame * 2 * (1280 // 16) * (704 // 16) / asked.machine.copy
    device = next(o for o in asked.phases["decode"] if o.phase.workspace and not o.phase.host)
    assert host.phase.seconds - device.phase.seconds == pytest.approx(copied)


NEEDIEST = ("vae.decode.6.frame.wide", "vae.encode.0.frame.tall", "vae.decode.0.frame.any")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_builder_states_these_workspaces(every: bool) -> None:
    """Those that a plan's peak hangs on; with `every`, of all sections."""
    pytest.importorskip("tensorrt_rtx", reason="the builder is not installed (wanrt[rtx])")
    parts = vae.parts(vae.empty(B14.vae, torch.bfloat16), torch.bfloat16)
    stated, traced, checked = workspaces("int8"), engine_set.Traced(), 0
    for part in parts:
        if vae.is_section(part) and (every or part.name in NEEDIEST):
            job = engines.Job("vae-2.1", "bf16", part)
            graph = traced.of(job)
            inputs = engines.inputs_of(graph, part)
            built = trt.build(part.name, onnx.serialise(graph), inputs, (89,))
            assert built.workspace == stated[part.name], part.name
            checked += 1
    assert checked == (66 if every else len(NEEDIEST))


def test_what_is_kept_holds_one_workspace(int8: Bundle) -> None:
    """Parts that stay do not each have one; the engines' memory stays with them."""
    plan = make_plan(question(engine_bytes(int8, B14.vae, 89)), 64 * GIB)
    phases = {phase.name: phase for phase in plan.phases}
    weights = sum(phase.weights for phase in plan.phases)
    most = max(p.peak - p.weights - p.workspace for p in phases.values())
    assert plan.keep and plan.peak == plan.fixed + weights + phases["decode"].workspace + most


def test_plan_takes_a_bundle_and_loads_no_torch(int8: Bundle) -> None:
    arguments = ["plan", "wan2.1-t2v-14b", "--size", "1280x720", "--frames", "81"]
    arguments += ["--bundle", str(int8.path), "--card", "8.9", "--vram", "16G"]
    script = (
        "import sys; from wanrt.__main__ import main\n"
        f"try: main({arguments!r})\n"
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
    assert code == "0" and "workspace" in done.stdout and "int8: peak" in done.stdout
    assert not {"torch", "numpy", "onnxruntime"} & set(loaded)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as exit_:
        cli_plan.main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit_.value.code, " ".join((captured.err + captured.out).split())


def test_plan_says_what_does_not_belong_together(
    int8: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    model, with_bundle = "wan2.1-t2v-14b", ("--bundle", int8.path, "--card", "8.9")
    for code, said, arguments in (
        (2, "--bundle and --card belong together", (model, "--card", "8.9")),
        (2, "--card '89' is no compute capability", (model, "--bundle", int8.path, "--card", "89")),
        (2, "run on a card", (model, *with_bundle, "--device", "cpu")),
        (2, "precision bf16 asked", (model, *with_bundle, "--precision", "bf16")),
        (3, "has other shapes", ("wan2.1-t2v-1.3b", *with_bundle)),
        (3, "no engine for tensorrt-rtx on", (model, "--bundle", int8.path, "--card", "12.0")),
    ):
        found, text = refused(capsys, *arguments)
        assert found == code and said in text, text


def test_json_has_the_workspace(int8: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("wan2.1-t2v-14b", "--size", "832x480", "--bundle", int8.path, "--card", "8.9")
    _, text = refused(capsys, *arguments, "--json")
    sizes = {phase["name"]: phase["workspace"] for phase in json.loads(text)["phases"]}
    assert sizes == {
        "text": 0, "step": BLOCKS["int8"]["dit.post"], "decode": DECODES.sections["wide"]
    }  # fmt: skip


def test_a_workspace_goes_and_comes_back_and_keeps_its_limit() -> None:
    class Place:
        device = torch.device("cpu")

        def hold(self, tensor: torch.Tensor) -> None:
            pass

    workspace = Workspace(Place())
    assert workspace.of(100).nbytes == workspace.of(60).nbytes == 100
    workspace.release()
    assert workspace.of(60).nbytes == 60
    workspace.limit = 80
    with pytest.raises(BudgetError, match="works in 81 bytes; the plan leaves 80"):
        workspace.of(81)
