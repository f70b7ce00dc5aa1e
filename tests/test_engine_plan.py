"""Plans of requests whose arithmetic engines do: against traced runs, and with real workspaces."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wanrt.config import MODELS, VaeSpec, VaeWork, WanSpec
from wanrt.engine import vae as graph_vae
from wanrt.engine import vae_way
from wanrt.engine.attach import attach
from wanrt.engine.trt_place import Workspace
from wanrt.engine.vae import GraphVae
from wanrt.export.part import cast
from wanrt.memory.dit_bytes import Tokens, count_tokens, latent_bytes
from wanrt.memory.engine_bytes import step_activations
from wanrt.memory.measure import LiveBytes
from wanrt.memory.vae_engine_bytes import VaeEngines, coder_bytes
from wanrt.models.dit import CrossKV, TextCache, WanDiT
from wanrt.models.vae import WanVAE
from wanrt.vae_sections import Section, decoder_sections, encoder_sections

SHARE = 0.05  # by which a plan may be more than what is traced; it is never less
WORKSPACE = 1 << 20  # bytes of every engine here
BF16, FP32 = torch.bfloat16, torch.float32
Shape = tuple[int, ...]  # channels, frames, height, width
CPU, META = torch.device("cpu"), torch.device("meta")


class FakePlace:
    """A card of tensors without data: nothing runs on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def hold(self, tensor: Tensor) -> None:
        pass

    def here(self) -> Any:
        return nullcontext()


class FakeRunner:
    """An engine that computes nothing: it copies inputs and holds memory as `TrtRunner` does."""

    def __init__(
        self, inputs: dict[str, torch.dtype], outputs: dict[str, Any], memory: Workspace
    ) -> None:
        """outputs: by name, what makes one out of the inputs."""
        self.inputs, self.outputs = inputs, {name: FP32 for name in outputs}
        self._makes, self._memory = outputs, memory

    def __call__(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        held = {name: inputs[name].contiguous() for name in self.inputs if name in inputs}
        for name, x in held.items():
            assert x.dtype == self.inputs[name], f"{name=}"
        given = out or {}
        made = {n: given[n] if n in given else make(held) for n, make in self._makes.items()}
        self._memory.of(WORKSPACE)
        return made


class DitGraphs:
    """The engines of a transformer's blocks, in halves or whole, and of what is around them."""

    def __init__(self, spec: WanSpec, names: tuple[str, ...]) -> None:
        dit, memory = spec.dit, Workspace(FakePlace(CPU))
        heads = (dit.num_heads, dit.head_dim)
        text = {"k": BF16, "v": BF16, "key_bias": FP32, "k_image": BF16, "v_image": BF16}
        common = {"x": FP32, "e0": FP32}

        def rows(dtype: torch.dtype, *shape: int) -> Any:
            return lambda given: empty(given["x"].shape[:2] + shape, dtype)

        patch = dit.out_dim * 4
        runners = {
            "dit.pre": (common | {"freqs": FP32}, dict.fromkeys("qkv", rows(BF16, *heads))),
            "dit.post": (common | text | {"y": BF16}, {"out": rows(FP32, dit.dim)}),
            "dit.block": (common | text | {"freqs": FP32}, {"out": rows(FP32, dit.dim)}),
            "dit.attention": (
                dict.fromkeys("qkv", BF16),
                {"y": lambda given: empty(given["q"].shape, BF16)},
            ),
            "dit.before": ({"x": FP32}, {"out": rows(BF16, dit.dim)}),
            "dit.after": ({"x": FP32}, {"out": rows(BF16, dit.dim)}),
            "dit.head": ({"x": FP32, "e": FP32}, {"out": rows(FP32, patch)}),
        }
        self._runners = {name: FakeRunner(*runners[name], memory) for name in names}

    def has(self, name: str) -> bool:
        return name in self._runners

    def get(self, name: str) -> FakeRunner:
        return self._runners[name]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CPU)


@torch.inference_mode()
def traced_step(spec: WanSpec, tokens: Tokens, size: tuple[int, ...], names: tuple[str, ...],
                branches: int) -> int:  # fmt: skip
    """Peak bytes of a forward pass of some blocks at real sizes, in fake tensors."""
    d = spec.dit
    with FakeTensorMode():
        dit = cast(WanDiT(d), BF16)
        attach("dit", dit, DitGraphs(spec, names))
        rows = empty((1, d.num_heads, tokens.text, d.head_dim), BF16)
        kv = CrossKV(rows, rows)
        sides = (kv,) * len(d.vace_layers)
        text = TextCache((kv,) * d.num_layers, sides, torch.zeros(1, tokens.text))
        given = {"y": empty((1, d.in_dim - d.out_dim, *size), FP32)} if d.in_dim > 16 else {}
        if d.vace_layers:
            given["vace_context"] = empty((1, d.vace_in_dim, *size), FP32)
        latents = empty((1, d.out_dim, *size), FP32)
        dit.rope.get(tuple(n // p for n, p in zip(size, d.patch_size, strict=True)), CPU)
        with LiveBytes(granule=512) as count:
            dit.forward_each(latents, 500.0, [text] * branches, **given)
    return count.peak


HALVES = ("dit.pre", "dit.post", "dit.head", "dit.before", "dit.after")
SIZES = [
    ("wan2.1-t2v-1.3b", 832, 480),
    ("wan2.1-t2v-14b", 1280, 720),
    ("wan2.1-t2v-1.3b", 256, 256),
    ("wan2.1-vace-1.3b", 832, 480),
]


@pytest.mark.parametrize(
    "names",
    [HALVES, (*HALVES, "dit.attention"), ("dit.block",)],
    ids=["halves", "halves-attention", "whole"],
)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("model,width,height", SIZES)
def test_a_traced_step_peaks_where_the_plan_says(
    model: str, width: int, height: int, branches: int, names: tuple[str, ...]
) -> None:
    spec = MODELS[model]
    spec = replace(spec, dit=replace(spec.dit, num_layers=2, vace_layers=spec.dit.vace_layers[:1]))
    tokens = count_tokens(spec, width, height, 81, text=60)
    measured = traced_step(spec, tokens, (21, height // 8, width // 8), names, branches)
    whole = names == ("dit.block",)
    planned = step_activations(spec.dit, tokens, 2, branches, whole) + WORKSPACE
    assert measured <= planned + latent_bytes(spec.dit, tokens)
    assert planned <= measured * (1 + SHARE)


class VaeGraphs:
    """The engines of a VAE: of sections, of whole steps, or both."""

    def __init__(self, spec: VaeSpec, size: tuple[int, int], ways: tuple[str, ...]) -> None:
        """size: pixels."""
        self._memory, self._runners = Workspace(FakePlace(META)), {}
        self._size = tuple(side // spec.spatial_stride for side in size)
        pixels, latents = (3, spec.temporal_stride, *size), (spec.z_dim, 1, *self._size)
        for way in ways:
            self._lay("decode", decoder_sections(spec), way, latents, pixels)
            self._lay("encode", encoder_sections(spec), way, pixels, latents)

    def _lay(self, side: str, sections: Any, way: str, first: Shape, last: Shape) -> None:
        """first, last: what enters the first engine and leaves the last, without the batch."""
        entering, leaving = ("latents", "frames")[:: 1 if side == "decode" else -1]
        if way == "whole":
            self._add(f"vae.{side}", sections, (entering, leaving), (first, last))
            return
        between = [shape_of(section, *self._size) for section in sections[1:]]
        shapes = [first, *between, last]
        names = [entering, *["x"] * len(between)], [*["y"] * len(between), leaving]
        for i, section in enumerate(sections):
            group, ends = (section,), (names[0][i], names[1][i])
            self._add(f"vae.{side}.{i}", group, ends, (shapes[i], shapes[i + 1]), ".any")

    def _add(
        self,
        name: str,
        group: Any,
        names: tuple[str, str],
        shapes: tuple[Shape, Shape],
        suffix: str = "",
    ) -> None:
        """shapes: of what enters and leaves for a latent frame."""
        slots = {n: slot for section in group for n, slot in section.slots.items()}
        given, result = names
        for when in group[0].graphs if suffix else ("first", "step"):
            one = [(c, f if when == "step" else 1, *rest) for c, f, *rest in shapes]
            takes = {given: BF16 if given == "x" else FP32}
            if when != "first":
                takes |= {f"cache.{n}": BF16 for n in slots}
            makes = {result: maker(one[1], BF16 if result == "y" else FP32)}
            for n, slot in slots.items():
                if not (when == "first" and slot.late):
                    sides = [slot.scale * side for side in self._size]
                    makes[f"kept.{n}"] = maker((slot.channels, slot.frames, *sides), BF16)
            runner = FakeRunner(takes, makes, self._memory)
            runner.outputs |= {f"kept.{n}": BF16 for n in slots if f"kept.{n}" in makes}
            self._runners[f"{name}.{when}{suffix}"] = runner

    def has(self, name: str) -> bool:
        return name in self._runners

    def get(self, name: str) -> FakeRunner:
        return self._runners[name]


def shape_of(section: Section, h: int, w: int) -> Shape:
    """Of what enters for a latent frame."""
    frames = section.frames * section.times
    return section.channels, frames, section.scale * h, section.scale * w


def maker(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return lambda given: torch.empty((1, *shape), dtype=dtype, device=META)


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors without data, so that what waits there has none either."""

    def cpu(x: Tensor) -> Tensor:
        return x if x.device == CPU else torch.empty(x.shape, dtype=x.dtype)

    monkeypatch.setattr(Tensor, "cpu", cpu)


def pixels_of(chunks: Iterator[tuple[Tensor, object]], num: int) -> Iterator[Tensor]:
    """As `Pipeline._decoded` takes them."""
    for _ in range(num):
        frames = next(chunks)[0]
        yield frames


@torch.inference_mode()
def traced_decode(engine: GraphVae, latents: Tensor, work: VaeWork) -> int:
    with LiveBytes("meta").ignore(latents) as count:
        for frames in pixels_of(engine.decode_chunks(latents, work=work), latents.shape[2]):
            (frames * 127.5).round_().to(torch.uint8)
            del frames
    return count.peak


@torch.inference_mode()
def traced_encode(engine: GraphVae, video: Tensor, work: VaeWork) -> int:
    with LiveBytes("meta").ignore(video) as count:
        engine.encode(video, work=work, still=True)
    return count.peak


WAYS = {"sections": VaeEngines({"any": WORKSPACE}), "whole": VaeEngines(whole=WORKSPACE)}
WAYS["both"] = VaeEngines({"any": WORKSPACE}, WORKSPACE)


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side,same", [("decode", False), ("encode", False), ("encode", True)])
@pytest.mark.parametrize("model", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
def test_a_traced_vae_peaks_where_the_plan_says(
    model: str, side: str, way: str, host: bool, same: bool, host_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """same: all caches of a first section are, so that all are compared. Decoders compare none."""
    spec, size = MODELS[model].vae, (256, 416)

    def compared(a: Tensor, b: Tensor) -> bool:
        torch.empty(a.shape, dtype=torch.bool, device=META)  # as torch.equal makes on a card
        return same and a.shape[3] == size[0] // spec.patch and a.shape[2] == 2

    for module in (graph_vae, vae_way):
        monkeypatch.setattr(module, "equal", compared)
    ways = ("sections", "whole") if way == "both" else (way,)
    with META:
        engine = GraphVae(WanVAE(spec), VaeGraphs(spec, size, ways))
        latents = torch.empty(1, spec.z_dim, 4, *(n // spec.spatial_stride for n in size))
        video = torch.empty(1, 3, 13, *size)
    traced = traced_decode(engine, latents, VaeWork(1, host=host)) if side == "decode" else (
        traced_encode(engine, video, VaeWork(1, host=host)))  # fmt: skip
    need, workspace, _ = coder_bytes(spec, side, *size, 13, 2, host, WAYS[way])
    planned = need.activations + need.caches + workspace
    assert traced <= planned
    if same or side == "decode":
        assert planned <= traced * (1 + SHARE)
