"""VAEs whose graphs run in ONNX Runtime, against their own modules."""

import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from onnx_graphs import CPU, TracedGraphs, Without
from torch import Tensor
from vae_models import (
    SPECS,
    WHOLE,
    distance,
    draw_latents,
    draw_video,
    random_vae,
    traced,
)

from wanrt.config import VaeWork
from wanrt.engine.ort import OrtRunner
from wanrt.engine.vae import GraphVae
from wanrt.errors import FormatError, UsageError
from wanrt.export import onnx
from wanrt.export import vae as parts
from wanrt.export.part import cast
from wanrt.models.vae import WanVAE
from wanrt.vae_sections import decoder_sections
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.load import load_component

SLOW = pytest.mark.slow
WAYS = [
    pytest.param("2.1-short", False, id="2.1-short-whole"),
    pytest.param("2.2-short", True, id="2.2-short-sections"),
    pytest.param("2.1-short", True, id="2.1-short-sections", marks=SLOW),
    pytest.param("2.2-short", False, id="2.2-short-whole", marks=SLOW),
    *(
        pytest.param(name, cut, id=f"{name}-{'sections' if cut else 'whole'}", marks=SLOW)
        for name in ("2.1", "2.2")
        for cut in (False, True)
    ),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Watched:
    """Graphs that note each run, and where it was told to put what it keeps."""

    def __init__(self, graphs: TracedGraphs | Without) -> None:
        self._graphs = graphs
        self.runs: list[str] = []
        self.places: set[int] = set()
        self.alive = 0  # the most tensors for what is kept that were there at once
        self._given: list[weakref.ref[Tensor]] = []

    def has(self, name: str) -> bool:
        return self._graphs.has(name)

    def get(self, name: str) -> "WatchedRunner":
        return WatchedRunner(self, name, self._graphs.get(name))

    def note(self, name: str, out: Mapping[str, Tensor]) -> None:
        self.runs.append(name)
        self.places |= {place.data_ptr() for place in out.values()}
        self._given += [weakref.ref(place) for place in out.values()]
        alive = {x.data_ptr() for given in self._given if (x := given()) is not None}
        self.alive = max(self.alive, len(alive))


class WatchedRunner:
    def __init__(self, graphs: Watched, name: str, runner: OrtRunner) -> None:
        self._graphs, self._name, self._runner = graphs, name, runner
        self.inputs, self.outputs = runner.inputs, runner.outputs

    def __call__(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        self._graphs.note(self._name, out)
        return self._runner(inputs, out)


def sections(name: str) -> Without:
    return Without(traced(name), *WHOLE)


@pytest.mark.parametrize(("name", "cut"), WAYS)
def test_a_vae_of_graphs_is_the_vae(name: str, cut: bool) -> None:
    """Clips of nine frames and more, at sizes other than those that were traced."""
    spec, vae = SPECS[name], random_vae(SPECS[name])
    engine = GraphVae(vae, sections(name) if cut else traced(name))
    for size in ((3, 5), (4, 2), (7, 7)):
        latents, video = draw_latents(spec, size), draw_video(spec, size)
        expected = vae.decode(latents)
        assert (expected.abs() < 1).float().mean() > 0.5, "too much is clamped to compare"
        assert distance(engine.decode(latents), expected) < 1e-5
        assert distance(engine.encode(video), vae.encode(video)) < 1e-5
    other = random_vae(spec, seed=5)  # weights are inputs: the same graphs serve another checkpoint
    vae.load_state_dict(other.state_dict())
    assert distance(engine.decode(latents), other.decode(latents)) < 1e-5


def test_a_clip_goes_from_engine_to_modules_and_back() -> None:
    spec, vae = SPECS["2.1-short"], random_vae(SPECS["2.1-short"])
    engine = GraphVae(vae, traced("2.1-short"))
    latents, video = draw_latents(spec, (3, 4), 6), draw_video(spec, (3, 4), 6)
    stride = spec.temporal_stride
    cuts = {
        "decode": (latents, (slice(0, 2), slice(2, 3), slice(3, 6))),
        "encode": (video, (slice(0, stride + 1), slice(stride + 1, 2 * stride + 1),
                           slice(2 * stride + 1, 5 * stride + 1))),
    }  # fmt: skip
    for side, (clip, pieces) in cuts.items():
        state, parts = None, []
        for who, piece in zip((engine, vae, engine), pieces, strict=True):
            for part, after in getattr(who, f"{side}_chunks")(clip[:, :, piece], state):
                parts.append(part)
                state = after
        assert distance(torch.cat(parts, 2), getattr(vae, side)(clip)) < 1e-5


def test_a_state_that_is_kept_stays_what_it_was() -> None:
    spec, engine = SPECS["2.1-short"], GraphVae(random_vae(SPECS["2.1-short"]), traced("2.1-short"))
    latents = draw_latents(spec, (3, 4))
    chunks = list(engine.decode_chunks(latents))
    assert [len(frames[0, 0]) for frames, _ in chunks] == [1, 2, 2, 2, 2]
    for i, (_, state) in enumerate(chunks[:-1]):
        again = torch.cat([f for f, _ in engine.decode_chunks(latents[:, :, i + 1 :], state)], 2)
        assert torch.equal(again, torch.cat([frames for frames, _ in chunks[i + 1 :]], 2))
    pairs = [frames for frames, _ in engine.decode_chunks(latents, chunk=2)]
    assert [frames.shape[2] for frames in pairs] == [3, 4, 2]
    assert torch.equal(torch.cat(pairs, 2), engine.decode(latents))


def test_samples_go_one_after_the_other() -> None:
    spec, vae = SPECS["2.1-short"], random_vae(SPECS["2.1-short"])
    engine = GraphVae(vae, traced("2.1-short"))
    latents = draw_latents(spec, (3, 4)).view(1, -1, 5, 3, 4)
    both = torch.cat([latents, latents.flip(2)])
    assert distance(engine.decode(both), vae.decode(both)) < 1e-5
    with pytest.raises(UsageError, match="one clip at a time, not of 2"):
        next(engine.decode_chunks(both))


def test_caches_go_to_and_fro_between_two_places() -> None:
    spec, graphs = SPECS["2.1-short"], Watched(traced("2.1-short"))
    engine = GraphVae(random_vae(spec), graphs)
    engine.decode(draw_latents(spec, (3, 4), 8))
    assert graphs.runs == ["vae.decode.first"] + ["vae.decode.step"] * 7
    assert len(graphs.places) == 2 * len(engine.decoder_state().slots)


def test_sections_hold_the_caches_of_one_twice() -> None:
    spec, graphs = SPECS["2.2-short"], Watched(sections("2.2-short"))
    engine = GraphVae(random_vae(spec), graphs)
    engine.decode(draw_latents(spec, (3, 4), 8))
    cut = decoder_sections(spec)
    frame = [f"vae.decode.{i}.frame.wide" for i in (2, 3, 4)]
    assert graphs.runs[-8:] == ["vae.decode.0.frame.wide", "vae.decode.1.step.wide", *frame * 2]
    most = max(len(section.slots) for section in cut)
    assert graphs.alive <= len(engine.decoder_state().slots) + most


def test_what_stands_still_is_not_encoded_again() -> None:
    spec, graphs = SPECS["2.2-short"], Watched(sections("2.2-short"))
    vae = random_vae(spec)
    engine = GraphVae(vae, graphs)
    video = draw_video(spec, (3, 4), 14)
    video[:, :, 3:-2] = 0.25
    plain = engine.encode(video)
    every = len(graphs.runs)
    assert every == 14 * 3
    graphs.runs.clear()
    assert torch.equal(engine.encode(video, still=True), plain)
    first = [name for name in graphs.runs if name.startswith("vae.encode.0")]
    assert len(graphs.runs) < every and len(first) < 10
    assert distance(plain, vae.encode(video)) < 1e-5


def test_caches_may_wait_in_host_memory() -> None:
    spec, graphs = SPECS["2.2-short"], Watched(traced("2.2-short"))
    vae, latents = random_vae(spec), draw_latents(spec, (3, 4))
    result = GraphVae(vae, graphs).decode(latents, work=VaeWork(1, host=True))
    assert "vae.decode.step" not in graphs.runs, "sections need less of the card's memory"
    assert distance(result, vae.decode(latents)) < 1e-5


@pytest.mark.parametrize(("side", "frames"), [("encode", 1), pytest.param("decode", 3, marks=SLOW)])
def test_fp16(side: str, frames: int) -> None:
    """Graph and modules round at the same places; sums in fp16 have another order."""
    spec = SPECS["2.1-short"]
    clip = (draw_latents if side == "decode" else draw_video)(spec, (3, 4), frames)
    exact, vae = random_vae(spec), cast(random_vae(spec), torch.float16)
    expected = getattr(exact, side)(clip)
    graphs = traced("2.1-short", torch.float16)
    actual = getattr(GraphVae(vae, graphs), side)(clip)
    rounded = distance(getattr(vae, side)(clip), expected)
    assert 0 < distance(actual, expected) < 2 * rounded < 5e-3
    with pytest.raises(UsageError, match="is torch.float32 on cpu, not torch.float16"):
        getattr(GraphVae(exact, graphs), side)(clip)


def test_less_than_whole_frames_at_once_is_done_by_the_modules() -> None:
    """To the bit, chunk by chunk too; where these have no weights, it is refused."""
    spec, vae = SPECS["2.1-short"], random_vae(SPECS["2.1-short"])
    engine, latents = GraphVae(vae, traced("2.1-short")), draw_latents(spec, (4, 4))
    bare = GraphVae(parts.empty(spec, torch.float32), traced("2.1-short"))
    for work in (VaeWork(1, band=2), VaeWork(1, band=2, order="bands"), VaeWork(1, frames=1)):
        expected = vae.decode(latents, work=work)
        assert torch.equal(engine.decode(latents, work=work), expected)
        chunks = [frames for frames, _ in engine.decode_chunks(latents, work=work)]
        assert torch.equal(torch.cat(chunks, 2), expected)
        with pytest.raises(UsageError, match="less at once, .* than the VAE's graphs.*--embed"):
            bare.decode(latents, work=work)


def test_what_an_engine_refuses() -> None:
    spec, vae = SPECS["2.1-short"], random_vae(SPECS["2.1-short"])
    engine, latents = GraphVae(vae, traced("2.1-short")), draw_latents(spec, (4, 4))
    *_, (_, state) = vae.decode_chunks(latents, work=VaeWork(1, band=2))
    with pytest.raises(UsageError, match="state is of 2 bands"):
        next(engine.decode_chunks(latents, state))
    less = Without(
        traced("2.1-short"),
        "vae.decode.step",
        "vae.decode.1.first.wide",
        "vae.decode.1.first.tall",
        "vae.decode.1.first.any",
    )
    assert torch.equal(GraphVae(vae, less).decode(latents), vae.decode(latents)), "by the modules"
    bare = parts.empty(spec, torch.float32)
    with pytest.raises(FormatError, match="no graphs that decode: .* 5 sections"):
        GraphVae(bare, less).decode(latents)


class Named:
    """Graphs that there are by their names alone."""

    def __init__(self, *sizes: str) -> None:
        self._sizes = sizes
        self.asked: list[str] = []

    def has(self, name: str) -> bool:
        return name.rpartition(".")[2] in self._sizes

    def get(self, name: str) -> OrtRunner:
        self.asked.append(name)
        raise KeyError(name)


@pytest.mark.parametrize(
    ("rows", "columns", "there", "taken"),
    [
        (90, 160, "wide tall any", "wide"),
        (160, 90, "wide tall any", "tall"),
        (60, 104, "wide tall any", "wide"),
        (90, 160, "tall any", "any"),
        (91, 160, "wide tall any", "any"),
        (120, 120, "wide tall any", "any"),
        (90, 162, "wide tall any", None),
        (160, 90, "wide", None),
    ],
)
def test_the_narrowest_range_that_has_the_size(
    rows: int, columns: int, there: str, taken: str | None
) -> None:
    """Latents without data; where no range has it, the modules take over."""
    graphs = Named(*there.split())
    with torch.device("meta"):
        engine = GraphVae(WanVAE(SPECS["2.1"]), graphs)
        latents = torch.empty(1, 16, 1, rows, columns)
        with pytest.raises(KeyError if taken else UsageError, match=None if taken else "larger"):
            engine.decode(latents)  # the modules have no weights and say so
    assert graphs.asked == ([f"vae.decode.0.frame.{taken}"] if taken else [])


class Embedded(TracedGraphs):
    """Graphs with one model's weights within."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__(parts.parts(parts.empty(vae.spec, torch.float32), torch.float32))
        self._weights = vae.state_dict()

    def get(self, name: str) -> OrtRunner:
        if name not in self._loaded:
            graph = onnx.embed(onnx.trace(self._parts[name]), self._weights)
            self._loaded[name] = OrtRunner(name, onnx.serialise(graph), CPU, threads=1)
        return self._loaded[name]


@SLOW
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "sections"])
def test_nano_from_graphs_alone(cut: bool) -> None:
    """The weights are in the graphs; the modules beside them have none."""
    vae = load_component(NANO_WEIGHTS, "vae")
    graphs = Embedded(vae)
    engine = GraphVae(parts.empty(vae.spec, torch.float32), Without(graphs, *WHOLE[: 4 * cut]))
    latents, video = draw_latents(vae.spec, (4, 6)), draw_video(vae.spec, (4, 6))
    assert distance(engine.decode(latents), vae.decode(latents)) < 1e-5
    assert distance(engine.encode(video), vae.encode(video)) < 1e-5
