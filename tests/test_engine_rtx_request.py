"""A whole request with engines of TensorRT-RTX in it, but for the vendor's library: that is a FAKE.

Everything of wanrt's own runs: the export with its jobs and records, the bundle, the choice of
engines for a card, the native loop around `pre` and `post`, the VAE section by section. Engines
hold their graphs (`fake_tensorrt_rtx`), and ONNX Runtime does their arithmetic, which is why this
is in fp16: it has no bf16 on a CPU.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import fake_tensorrt_rtx as fake
import pytest
from fake_tensorrt_rtx import FakePlace
from torch import Tensor

from wanrt import Pipeline, cli
from wanrt.engine import trt as adapter
from wanrt.engine.bundle import Bundle
from wanrt.engine.manifest import Input
from wanrt.errors import UsageError
from wanrt.export import trt

PROMPT = "a red circle moving right on a navy background"
SETTINGS = {"seed": 3, "num_steps": 2, "num_frames": 9, "width": 64, "height": 48}


def fake_build(
    name: str, graph: bytes, inputs: Sequence[Input], capabilities: tuple[int, ...]
) -> trt.Built:
    """A builder that builds nothing."""
    engine = fake.engine_of(graph, inputs)
    return trt.Built(engine, "tensorrt-rtx", fake.__version__, capabilities, 1, 0, True, 0.0, ())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("rtx") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "build", fake_build)
        words = ["--engine", "tensorrt-rtx", "--precision", "fp16"]
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", "nano", "-o", str(out), *words])
        assert not ended.value.code
    yield out


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakePlace:
    place = FakePlace()
    place.at_once = True
    monkeypatch.setattr(adapter, "CudaPlace", lambda device: place)
    monkeypatch.setattr(adapter, "library", lambda kind: fake)
    return place


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


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
    ],
)
def test_what_an_export_refuses(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "nano", "-o", str(tmp_path / "b"), "--engine", "tensorrt-rtx", *flags])
    assert ended.value.code == 2 and says in capsys.readouterr().err
