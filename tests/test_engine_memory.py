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
from wanrt.memory.budget import GIB
from wanrt.memory.engine_bytes import EngineBytes, VaeEngines
from wanrt.memory.placement import Ask
from wanrt.memory.plan import make_plan, plan_for_any_text
from wanrt.memory.question import Question

ROOT = Path(__file__).resolve().parent.parent
B14 = MODELS["wan2.1-t2v-14b"]
HD = Ask(1280, 720, 81)

# Bytes that TensorRT-RTX 1.7.1.116 stated for compute capability 8.9, at the largest sizes of
# `export/engines.py`: of the 14B, and of the sections of VAE 2.1 (up to 1280 by 1280 pixels).
AROUND = {
    "dit.patch": 34252800,
    "dit.text": 107827200,
    "dit.time": 8232960,
    "dit.time_projection": 8335360,
    "dit.kv": 133785600,
    "dit.head": 177275392,
}
BLOCKS = {
    "bf16": {"dit.pre": 607682560, "dit.post": 1010691072, "dit.block": 7318264320},
    "int8": {"dit.pre": 803094528, "dit.post": 725659648, "dit.block": 9306742272},
}
VAE = {
    "decode": {
        "first": (2753724416, 262225920, 953008128, 2047356928, 3145893888),
        "step": (2724200448, 337822720, 2398224896, 5672595968, 8178892800),
    },
    "encode": {
        "first": (2208563200, 946683904, 482476032, 145588224, 2753128448),
        "step": (8178892800, 3779850240, 974242304, 169477120, 2724200448),
    },
}


def workspaces(precision: str) -> dict[str, int]:
    """By graph, of a bundle as wanrt makes it: blocks in halves, the VAE in sections."""
    sections = {
        f"vae.{side}.{i}.{when}": size
        for side, whens in VAE.items()
        for when, sizes in whens.items()
        for i, size in enumerate(sizes)
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
    coder = VaeEngines(sections=8178892800)
    assert found == EngineBytes("halves", 803094528, coder, coder)
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
    assert held.step == 803094528  # attention is native there, in eight bits
    plain.pop("vae.decode.2.first")
    plain |= {"vae.decode.first": 1 << 30, "vae.decode.step": 2 << 30}
    whole = plain
    found = engine_bytes(write_engines(B14, tmp_path / "part", whole), B14.vae, 89)
    assert found.decode == VaeEngines(whole=2 << 30)
    assert found.blocks == "halves"
    whole.pop("dit.pre")
    found = engine_bytes(write_engines(B14, tmp_path / "whole", whole), B14.vae, 89)
    assert (found.blocks, found.step) == ("whole", 7318264320)


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


def test_the_vae_decodes_720p_by_engines_in_14_gib_and_by_its_modules_in_8(int8: Bundle) -> None:
    """Engines take 1280 by 1280 pixels, and their workspace is counted for that size."""
    asked = question(engine_bytes(int8, B14.vae, 89))
    room = asked.machine.fixed
    engines = [o for o in asked.phases["decode"] if o.phase.workspace]
    least = room + min(option.phase.peak for option in engines)
    assert 12 * GIB < least <= 14 * GIB
    plan = plan_for_any_text(asked, 20 * GIB)  # room for the caches as well
    assert plan.peak <= 20 * GIB and plan.work("decode") == VaeWork(chunk=1)
    assert plan.workspace == plan.options["decode"].phase.workspace == 8178892800
    for budget in (14, 12, 8):
        small = plan_for_any_text(asked, budget * GIB)
        assert small.peak <= budget * GIB and small.options["decode"].phase.workspace == 0
        assert small.work("decode").frames == 1  # what `GraphVae` leaves to the modules
    assert plan_for_any_text(replace(asked, ask=Ask(832, 480, 81)), 12 * GIB)


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
    assert sizes == {"text": 0, "step": 803094528, "decode": 8178892800}


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
