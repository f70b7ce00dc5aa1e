"""A whole request with engines of TensorRT-RTX in it, but for the vendor's library: that is a FAKE.

Everything of wanrt's own runs: the export with its jobs and records, the bundle, the choice of
engines for a card, the native loop around `pre` and `post`, the VAE section by section. Engines
hold their graphs (`fake_tensorrt_rtx`), and ONNX Runtime does their arithmetic, which is why this
is in fp16: it has no bf16 on a CPU.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fake_tensorrt_rtx as fake
import pytest
from fake_tensorrt_rtx import FakePlace
from onnx_graphs import each_graph_traced_once
from torch import Tensor

from wanrt import Pipeline, cli
from wanrt.engine import trt as adapter
from wanrt.engine.bundle import Bundle
from wanrt.engine.manifest import Input
from wanrt.engine.records import canonical
from wanrt.engine.trust import own_signer
from wanrt.errors import UsageError
from wanrt.export import trt

PROMPT = "a red circle moving right on a navy background"
ATTENTION = 1 << 20  # bytes that its engine says it works in
SETTINGS = {"seed": 3, "num_steps": 2, "num_frames": 9, "width": 64, "height": 48}


def fake_build(
    name: str, graph: bytes, inputs: Sequence[Input], capabilities: tuple[int, ...]
) -> trt.Built:
    """A builder that builds nothing."""
    engine = fake.engine_of(graph, inputs)
    memory = ATTENTION if name == "dit.attention" else 1
    return trt.Built(
        engine, "tensorrt-rtx", fake.__version__, capabilities, memory, 0, True, 0.0, ()
    )


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with each_graph_traced_once():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bundles of nano in fp16 by their further flags, each made once."""

    @cache
    def make(*flags: str) -> Path:
        out = tmp_path_factory.mktemp("rtx") / "bundle"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trt, "build", fake_build)
            words = ["--engine", "tensorrt-rtx", "--precision", "fp16", *flags]
            with pytest.raises(SystemExit) as ended:
                cli.main(["export", "nano", "-o", str(out), *words])
            assert not ended.value.code
        return out

    return make


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., Path]) -> Path:
    return exported()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakePlace:
    place = FakePlace()
    place.at_once = True
    monkeypatch.setattr(adapter, "CudaPlace", lambda device: place)
    monkeypatch.setattr(adapter, "library", lambda kind: fake)
    return place


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def noted(patch: pytest.MonkeyPatch) -> list[str]:
    """The engines that run from now on, by name."""
    calls: list[str] = []
    run = adapter.TrtRunner.__call__

    def note(self: adapter.TrtRunner, *args: Any) -> Any:
        calls.append(self.name)
        return run(self, *args)

    patch.setattr(adapter.TrtRunner, "__call__", note)
    return calls


def test_a_bundle_has_an_engine_for_each_card(bundle: Path) -> None:
    held = Bundle.open(bundle).manifest
    names = {graph.name for graph in held.graphs}
    assert {"dit.pre", "dit.post", "vae.decode.1.step.wide"} <= names
    assert not {"dit.block", "vae.decode.step", "umt5.block"} & names
    cards = {(engine.graph, engine.compute_capabilities) for engine in held.engines}
    assert cards == {(name, (card,)) for name in names for card in (86, 89, 120)}
    assert held.weights and held.tokenizer == "weights/tokenizer.json"


def test_a_request_runs_through_them(bundle: Path, card: FakePlace) -> None:
    pipe = Pipeline.load(str(bundle), engine="tensorrt-rtx")
    video = pipe.generate(PROMPT, **SETTINGS)
    latents = pipe.generate(PROMPT, output="latents", **SETTINGS)
    native = Pipeline.load("nano")
    expected = native.generate(PROMPT, **SETTINGS)
    assert distance(latents, native.generate(PROMPT, output="latents", **SETTINGS)) < 1e-2
    difference = abs(video.frames.astype(int) - expected.frames.astype(int))
    assert difference.mean() < 1 and video.frames.shape == (9, 48, 64, 3)


def test_an_engine_may_do_the_attention(exported: Callable[..., Path], card: FakePlace) -> None:
    """For every block, and for nothing else; the plan leaves it its workspace."""
    made = exported("--attention", "engine")
    held = Bundle.open(made).manifest
    assert {e.workspace_bytes for e in held.engines if e.graph == "dit.attention"} == {ATTENTION}
    pipe = Pipeline.load(str(made), engine="tensorrt-rtx")
    assert pipe.components.engine_bytes.step == ATTENTION
    native = Pipeline.load("nano")
    with pytest.MonkeyPatch.context() as patch:
        calls = noted(patch)
        video = pipe.generate(PROMPT, **SETTINGS)
    assert calls.count("dit.attention") == calls.count("dit.pre") > 0
    expected = native.generate(PROMPT, **SETTINGS)
    difference = abs(video.frames.astype(int) - expected.frames.astype(int))
    assert difference.mean() < 1


def without(bundle: Path, out: Path, parts: str) -> Path:
    """A copy that has no engines of these parts for the card here, signed again."""
    held = Bundle.open(bundle).manifest
    card = FakePlace.compute_capability
    engines = tuple(
        one
        for one in held.engines
        if not one.graph.startswith(parts) or card not in one.compute_capabilities
    )
    dropped = {one.member for one in held.engines} - {one.member for one in engines}
    members = tuple(one for one in held.members if one.name not in dropped)
    raw = canonical(replace(held, engines=engines, members=members))
    shutil.copytree(bundle, out)
    for name in dropped:
        (out / name).unlink()
    (out / "manifest.json").write_bytes(raw)
    (out / "manifest.sig").write_bytes(own_signer().signature(raw))
    return out


@pytest.mark.parametrize("parts", ["vae.", "dit.post"])
def test_what_a_card_has_no_engines_for_is_native(
    parts: str, bundle: Path, card: FakePlace, tmp_path: Path
) -> None:
    """A part of a model, or the blocks where a half is missing: in the plan as in the request."""
    pipe = Pipeline.load(str(without(bundle, tmp_path / "bundle", parts)), engine="tensorrt-rtx")
    planned = pipe.components.engine_bytes
    assert (planned.decode is None) == (parts == "vae.")
    assert planned.blocks == ("halves" if parts == "vae." else "native")
    with pytest.MonkeyPatch.context() as patch:
        calls = noted(patch)
        video = pipe.generate(PROMPT, **SETTINGS)
    assert calls and not [name for name in calls if name.startswith(parts)]
    assert ("dit.pre" in calls) == (parts == "vae.")
    expected = Pipeline.load("nano").generate(PROMPT, **SETTINGS)
    assert abs(video.frames.astype(int) - expected.frames.astype(int)).mean() < 1


def test_a_card_that_the_bundle_does_not_know(
    bundle: Path, card: FakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "compute_capability", 90)
    with pytest.raises(Exception, match="has no engine for tensorrt-rtx .* 9.0"):
        Pipeline.load(str(bundle), engine="tensorrt-rtx")


def test_a_machine_without_a_card_says_so(bundle: Path) -> None:
    with pytest.raises(UsageError, match="run on an NVIDIA card|is not installed"):
        Pipeline.load(str(bundle), engine="tensorrt-rtx", device="cpu")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--precision", "fp32"], "no attention in fp32"),
        (["--embed"], "take weights as inputs"),
        (["--attention", "none"], "choose native or engine"),
        (["--attention", "engine", "--precision", "int8"], "in int8 the native kernel attends"),
        (["--attention", "engine", "--engine", "onnxruntime"], "is for --engine tensorrt-rtx"),
    ],
)
def test_what_an_export_refuses(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "nano", "-o", str(tmp_path / "b"), "--engine", "tensorrt-rtx", *flags])
    assert ended.value.code == 2 and says in capsys.readouterr().err
